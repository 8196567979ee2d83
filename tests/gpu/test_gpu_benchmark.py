"""The command that measures a GPU, but for its numbers: it runs on a CPU, small."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "simulations" / "benchmarks"


@pytest.fixture
def leader(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "_LEAST_SECONDS", 0)
    yield module
    sys.modules.pop("gpu", None)


def stage(leader, tmp_path, script):
    (tmp_path / "script.py").write_text(script)
    return leader.Stage("one", "script.py", {"cuda": 1, "cpu": 1})


FINDS = """
import sys
with open(sys.argv[2], "a") as file:
    file.write('{"what": "a card"}\\n{"what": "it", "number": 1.5}\\n')
"""


def test_what_a_stage_found_is_kept_however_it_ends(leader, tmp_path, capsys):
    endings = {"": (True, False), "sys.exit(3)": (False, False), "input()": (False, False)}
    for rest, (done, late) in endings.items():
        ended = leader.run(stage(leader, tmp_path, FINDS + rest), "cpu", tmp_path, 30)
        assert (ended["done"], ended["out of time"], ended["numbers"]) == (done, late, 1)
    told = capsys.readouterr().out
    assert "== one: failed with 3" in told
    assert "it | number 1.5" in told
    assert (tmp_path / "tables.txt").read_text().count("it | number 1.5") == 3
    rows = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert rows[1] == {"what": "it", "number": 1.5}
    assert rows[2]["stage"] == "one"


def test_a_stage_that_takes_too_long_is_ended_with_all_that_it_started(leader, tmp_path):
    script = FINDS + "import subprocess; subprocess.run(['sleep', '600'])"
    ended = leader.run(stage(leader, tmp_path, script), "cpu", tmp_path, 2)
    assert ended["out of time"]
    assert ended["numbers"] == 1


def test_a_stage_that_fails_does_not_keep_the_next_from_running(leader, tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("raise OSError")
    (tmp_path / "good.py").write_text(FINDS)
    seconds = {"cuda": 30, "cpu": 30}
    stages = [leader.Stage("bad", "bad.py", seconds), leader.Stage("good", "good.py", seconds)]
    monkeypatch.setattr(leader, "STAGES", stages)
    given = ["gpu.py", "--device=cpu", f"--out={tmp_path}", "--seconds=60"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as ended:
        leader.main()
    assert ended.value.code == 1
    assert '"what": "it"' in (tmp_path / "good.jsonl").read_text()


def test_a_stage_runs_on_a_cpu_from_the_command_that_make_calls(tmp_path):
    given = {"DEVICE": "cpu", "OUT": str(tmp_path), "STAGES": "study", "PYTHON": sys.executable}
    command = ["bash", str(BENCHMARKS / "gpu.sh")]
    done = subprocess.run(
        command, env={**os.environ, **given}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
    rows = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    assert rows[-1]["done"]
    assert rows[-1]["numbers"] > 2
    assert "all stages are done" in done.stdout


def test_a_device_that_is_neither_is_refused(tmp_path):
    command = ["bash", str(BENCHMARKS / "gpu.sh")]
    done = subprocess.run(
        command,
        env={**os.environ, "DEVICE": "tpu", "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "DEVICE: write cuda or cpu, got tpu"
    assert not (tmp_path / "out").exists()
