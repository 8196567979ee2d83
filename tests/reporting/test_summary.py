"""The table for the terminal."""

import io
import re

import pytest
from rich.console import Console

from fedpriv.errors import InputError
from fedpriv.reporting.summary import summary_table


def shown(*runs, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=True)
    console.print(summary_table(runs))
    return console.file.getvalue()


def test_a_private_run_shows_its_figures(make_run) -> None:
    text = shown(make_run())
    for words in ("tiny", "6/6", "80.0%", "per-layer", "0.5", "1.1", "lamb", "100", "1e-05"):
        assert words in text
    assert "no privacy" not in text


def test_a_run_without_privacy_says_so_in_red(make_run) -> None:
    text = shown(make_run(privacy=None))
    assert re.search(r"\x1b\[1;31mno privacy\b", text)


def test_a_narrow_terminal_cuts_nothing(make_run) -> None:
    assert "…" not in shown(make_run(privacy=None), make_run("b"), width=80)


def test_a_contradicted_run_is_marked(make_run) -> None:
    path = make_run()
    metrics = path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"rdp": ', '"rdp": 9'))
    assert "contradicts its ledger" in shown(path)


def test_a_missing_run_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        summary_table([tmp_path])
