"""The scripts of docs/tutorials run as they stand there, and are as short as they promise."""

from pathlib import Path

import pytest
from own_data import write_images

import fedpriv

FOLDER = Path(fedpriv.__file__).parent.parent / "docs" / "tutorials"
#: How many lines each may have, of code.
LINES = {"own_images": 15, "own_model": 10, "fine_tuning": 20}
# The other accountant, and more rounds, take long and show nothing more.
SHORT = ("rounds=3", "{'privacy.accountants': ['rdp']}, rounds=1")


def lines_of(code: str) -> list[str]:
    """Lines that do something: neither empty ones nor the docstring."""
    return [line for line in code.splitlines()[1:] if line.strip()]


def test_every_script_is_tried():
    assert {path.stem for path in FOLDER.iterdir()} == set(LINES)


@pytest.mark.parametrize("name", sorted(LINES))
def test_a_tutorial_runs_as_it_stands(name, tmp_path, monkeypatch, capsys):
    code = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(lines_of(code)) <= LINES[name]
    (tmp_path / "configs").symlink_to(FOLDER.parent.parent / "configs")
    write_images(tmp_path / "photos", {f"user{number}": 2 for number in range(60)})
    monkeypatch.chdir(tmp_path)
    assert SHORT[0] in code
    exec(compile(code.replace(*SHORT), f"{name}.py", "exec"), {"__name__": name})
    run = fedpriv.Run.open(name.replace("_", "-"))
    assert len(run.metrics) == 1
    assert str(run.epsilon()) in capsys.readouterr().out
    if name in ("own_images", "fine_tuning"):
        assert (tmp_path / "model" / "README.md").exists()
