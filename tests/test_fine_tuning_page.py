"""The example of docs/fine_tuning.md runs as it stands there."""

import re
from pathlib import Path

import fedpriv

PAGE = Path(fedpriv.__file__).parent.parent / "docs" / "fine_tuning.md"


def test_the_example_trains_and_exports(tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").symlink_to(PAGE.parent.parent / "configs")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 25
    assert "rounds=3" in code
    # Two rounds more, and the other accountant, take long and show nothing more.
    code = code.replace("rounds=3", "{'privacy.accountants': ['rdp']}, rounds=1")
    exec(compile(code, "example.py", "exec"), {"__name__": "example"})
    run = fedpriv.Run.open("tuned")
    assert len(run.metrics) == 1
    assert (tmp_path / "model" / "README.md").exists()
    assert str(run.epsilon()) in capsys.readouterr().out
