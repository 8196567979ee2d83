"""Components of others train with privacy, through YAML alone; ledger and report name them."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from in_process import SMALL, Silent, drive_on
from PIL import Image

from fedpriv import experiment
from fedpriv.components import KINDS
from fedpriv.config_files import load_config
from fedpriv.errors import InputError
from fedpriv.privacy import Ledger
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render
from fedpriv.reporting.spent import spent

HERE = Path(__file__).parent

CASES = {
    "soft_clipping": {
        "privacy": {"clipping": {"kind": "soft_clipping:SoftClipping", "bound": 0.1, "softness": 1}}
    },
    "png_folders": {"data": {"name": "png_folders:people", "path": "people", "users": 14}},
    "groupnorm_cnn": {"model": {"name": "groupnorm_cnn:cnn", "width": 4}},
    "root": {"server": {"normalize": {"name": "root:root", "power": 0.3}}},
    "signed": {"server": {"optimizer": "signed:Signed", "lr": 0.01, "options": {"beta": 0.5}}},
}
KEYS = {
    "soft_clipping": "privacy.clipping",
    "png_folders": "data",
    "groupnorm_cnn": "model",
    "root": "server.normalize",
    "signed": "server.optimizer",
}


def written(folder: Path, case: str) -> Path:
    """A config in a folder, with one component of somebody's own beside it."""
    shutil.copy(HERE / f"{case}.py", folder)
    document = {**SMALL, "rounds": 2, "evaluation": {"every": 1}}
    for section, changes in CASES[case].items():
        whole = changes if "name" in changes else {**SMALL[section], **changes}
        document[section] = whole
    (folder / "mine.yaml").write_text(yaml.safe_dump(document))
    return folder / "mine.yaml"


def write_people(folder: Path) -> None:
    generator = np.random.default_rng(3)
    for person in [*(f"person-{number}" for number in range(12)), "held_out"]:
        (folder / person).mkdir(parents=True)
        for number in range(6):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / person / f"{number % 3}_{number}.png")


@pytest.mark.parametrize("case", list(CASES))
def test_it_is_trained_and_named(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_people(tmp_path / "people")
    prepared = experiment.prepare(load_config(written(tmp_path, case), ["run_dir=run"]))
    directory = experiment.create(prepared)
    experiment.train(prepared, directory, Silent(), drive_on(None))

    rows = directory.read_metrics()
    assert [row["round"] for row in rows] == [1, 2]
    assert 0 < rows[0]["epsilon"]["rdp"] < rows[1]["epsilon"]["rdp"]
    assert all(np.isfinite(row["held_out"]["loss"]) for row in rows)
    assert rows[-1]["aggregate_norm"] > 0

    digest = hashlib.sha256((HERE / f"{case}.py").read_bytes()).hexdigest()
    ((key, named),) = directory.environment()["outside"].items()
    assert (key, named["sha256"]) == (KEYS[case], {f"{case}.py": digest})
    ledger = Ledger.open(directory.ledger)
    assert len(ledger) == 2
    assert ledger.header.outside == (
        f"{KEYS[case]}: {named['name']} ({case}.py, SHA-256 {digest})",
    )
    # Who reads the report need not have the code.
    (tmp_path / f"{case}.py").unlink()
    KINDS[key]._found.clear()
    assert spent(read_run(directory.path)).disagreements == ()
    for format in ("md", "json"):
        assert named["name"] in render([directory.path], format)
        assert digest in render([directory.path], format)
    with pytest.raises(InputError, match=rf"{KEYS[case]}\.?\w*: there is no module {case}"):
        experiment.reopen(directory.path)


def test_a_run_goes_on_with_the_code_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["run_dir=run", "rounds=4"]
    prepared = experiment.prepare(load_config(written(tmp_path, "groupnorm_cnn"), overrides))
    directory = experiment.create(prepared)
    experiment.train(prepared, directory, Silent(), drive_on(None))
    (directory.checkpoints / "round-000004.safetensors").unlink()
    assert experiment.reopen(directory.path)[1].finished_rounds == 3
    code = tmp_path / "groupnorm_cnn.py"
    code.write_text(code.read_text().replace("nn.ReLU()", "nn.GELU()"))
    with pytest.raises(InputError, match="only with the code that it began with") as refused:
        experiment.reopen(directory.path)
    assert "\n" not in str(refused.value)
    written(tmp_path, "groupnorm_cnn")
    assert json.loads((directory.path / "environment.json").read_text())["outside"]
    assert experiment.reopen(directory.path)[1].finished_rounds == 3
