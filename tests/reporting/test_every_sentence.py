"""Each sentence of a statement is traced in docs/report.md to what makes it true."""

import importlib.util
import re
from pathlib import Path

import pytest

from fedpriv.reporting.overview import overview
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.spent import spent
from fedpriv.reporting.statement import privacy_statement

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs" / "report.md"
_HERE = Path(__file__).parent / "sentences.py"
_SPEC = importlib.util.spec_from_file_location("sentences", _HERE)
sentences = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sentences)

DEPLOYED = {"runtime": {"deployment": True}}
FIXED = {
    "privacy": {
        "delta": 1e-3,
        "noise_multiplier": 0.4,
        "sampling": {"kind": "fixed_size", "expected_cohort": 100},
        "clipping": {"kind": "adaptive", "bound": 0.5},
        "error_feedback": {"kind": "none"},
    }
}


def rows() -> list[tuple[str, str, str]]:
    """Sentence, reason and tests of each row of the page's last part."""
    part = PAGE.read_text(encoding="utf-8").split("## Every sentence")[1]
    lines = (line for line in part.splitlines() if line.startswith("| "))
    cells = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in lines]
    return [(a.replace("\\|", "|"), b, c) for a, b, c in cells if a != "sentence"]


def printed() -> set[str]:
    return {text for module in sentences.MODULES for _, text in sentences.sentences_of(module)}


def test_the_page_has_every_sentence_that_can_be_printed_and_no_other():
    listed = {sentence for sentence, _, _ in rows()}
    assert len(listed) > 200
    assert printed() - listed == set()
    assert listed - printed() == set()


def test_every_row_has_a_reason_and_tests_that_there_are():
    code = "".join(path.read_text(encoding="utf-8") for path in sorted(TESTS.rglob("test_*.py")))
    known = set(re.findall(r"^(?:    )?def (test_\w+)", code, re.MULTILINE))
    for sentence, reason, tests in rows():
        named = re.findall(r"`([^`]+)`", tests)
        assert reason, sentence
        assert named, sentence
        for name in named:
            there = (TESTS.parent / name).exists() if "/" in name else name in known
            assert there, f"{sentence}: {name}"


@pytest.mark.parametrize("changes", [{}, DEPLOYED, FIXED, {"privacy": None}])
def test_what_is_printed_begins_as_a_sentence_of_the_page(make_run, changes):
    """Of whatever module it came: one that is not walked would be found here."""
    patterns = [
        re.compile(r".*?".join(map(re.escape, sentence.split("…"))), re.DOTALL | re.IGNORECASE)
        for sentence, _, _ in rows()
        if len(re.findall(r"\w{2,}", sentence)) >= 3
    ]
    run = read_run(make_run(attempts={2: 2}, **changes))
    statement = privacy_statement(run, spent(run))
    said = [sentence for section in statement.sections for sentence in section.sentences]
    said += [*statement.cautions, *statement.alarms, *overview(run, statement).plain]
    said += [each.meaning for each in statement.guarantees]
    untraced = [
        one
        for one in said
        if len(one.split()) >= 10 and not any(each.match(one) for each in patterns)
    ]
    assert untraced == []


def test_a_new_sentence_would_be_found(tmp_path, monkeypatch):
    (tmp_path / "new.py").write_text(
        'def said(run):\n    """Not this one, which is none of its sentences."""\n'
        '    return f"Of {run.name} this is something new that nobody has checked."\n'
    )
    monkeypatch.setattr(sentences, "ROOT", tmp_path)
    found = [*sentences.sentences_of("new.py")]
    assert found == [("said", "Of … this is something new that nobody has checked.")]
    assert found[0][1] not in {sentence for sentence, _, _ in rows()}
