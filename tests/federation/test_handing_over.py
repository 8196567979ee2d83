"""A user's own code reaches another process, which sees neither its file nor its folder."""

import importlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from in_process import SMALL
from torch import nn

from fedpriv.config_files import load_config, parse_config
from fedpriv.errors import InputError
from fedpriv.federation.handing_over import Accepting, HandOver
from fedpriv.origins import origin_of_object

CODE = """
import torch
from torch import nn
from beside_helping import width_of
class Facts:
    def told(self):
        return torch.zeros(self.classes)  # a name that torch has too, for what no pickle takes
def cnn(input_shape, classes, width: int = 4):
    assert Facts.told
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width_of(width)), nn.Linear(width, classes))
"""

# Another process: a node that lets itself import nothing by itself.
NODE = """
import json, pickle, sys
from fedpriv.components import LookUp, outside
from fedpriv.config_files import parse_config
from fedpriv.models import build_model
node, document = pickle.load(open(sys.argv[1], "rb")), json.load(open(sys.argv[2]))
assert node(0, 1) == ("node", 0, 1)
config = parse_config(document, LookUp(allowed=()))
model = build_model(config.model, (1, 8, 8), 10, 1)
print(json.dumps([[tuple(p.shape) for p in model.parameters()], config.fingerprint("")]))
"""

# What a script hands over, which is `__main__` there.
SCRIPT = """
import json, pickle, sys
from torch import nn
from fedpriv.config_files import parse_config
from fedpriv.federation.handing_over import Accepting, HandOver
from fedpriv.origins import origin_of_object
from where import node
WIDTH = 6
def mine(input_shape, classes, wide: bool = True):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.Linear(WIDTH, classes))
document = json.load(open(sys.argv[1]))
document["model"] = {"name": mine, "wide": False}
config = parse_config(document)
pickle.dump(Accepting(HandOver.of(config), node), open(sys.argv[2], "wb"))
json.dump(json.loads(config.model_dump_json()), open(sys.argv[3], "w"))
"""


@pytest.fixture
def there(tmp_path):
    """A folder that the other process imports from."""
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "where.py").write_text(
        "def node(partition, partitions):\n    return ('node', partition, partitions)\n"
    )
    return folder


def answer(there: Path, *arguments: Path) -> tuple[list[list[int]], str]:
    path = f"{there}:{Path(__file__).parents[2]}"
    done = subprocess.run(
        [sys.executable, "-c", NODE, *arguments],
        capture_output=True,
        text=True,
        cwd=there,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    shapes, fingerprint = json.loads(done.stdout)
    return shapes, fingerprint


def test_a_file_beside_the_config_travels_with_what_it_imports(there, tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    (project / "beside_mine.py").write_text(CODE)
    (project / "beside_helping.py").write_text("def width_of(width):\n    return width\n")
    document = {**SMALL, "model": {"name": "beside_mine:cnn", "width": 5}}
    (project / "mine.yaml").write_text(yaml.safe_dump(document))
    config = load_config(project / "mine.yaml")
    monkeypatch.syspath_prepend(str(there))
    from where import node

    (tmp_path / "node").write_bytes(pickle.dumps(Accepting(HandOver.of(config), node)))
    (tmp_path / "config").write_text(config.model_dump_json())
    shutil.rmtree(project)  # as if the other process were on another machine
    shapes, fingerprint = answer(there, tmp_path / "node", tmp_path / "config")
    assert shapes == [[5, 64], [5], [10, 5], [10]]
    assert fingerprint == config.fingerprint("")


def test_what_a_script_hands_over_travels(there, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "small").write_text(json.dumps(SMALL))
    files = [tmp_path / name for name in ("small", "node", "config")]
    subprocess.run(
        [sys.executable, tmp_path / "script.py", *files],
        check=True,
        env={
            "PYTHONPATH": f"{there}:{Path(__file__).parents[2]}",
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
        },
    )
    (tmp_path / "script.py").unlink()
    shapes, _ = answer(there, *files[1:])
    assert shapes == [[6, 64], [6], [10, 6], [10]]


def test_nothing_is_handed_over_where_all_is_fedprivs_own(tmp_path):
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(SMALL))
    assert HandOver.of(load_config(tmp_path / "plain.yaml")) == HandOver((), b"")


@pytest.mark.parametrize("edited", ["on_path_mine.py", "on_path_helping.py", None])
def test_code_that_was_edited_since_is_not_taken_for_that_of_the_run(tmp_path, monkeypatch, edited):
    (tmp_path / "on_path_mine.py").write_text(CODE.replace("beside_", "on_path_"))
    (tmp_path / "on_path_helping.py").write_text("def width_of(width):\n    return width\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = parse_config({**SMALL, "model": {"name": "on_path_mine:cnn", "width": 5}})
    handed = HandOver.of(config)
    if edited is None:
        handed.accept()
        return
    file = tmp_path / edited
    file.write_text(file.read_text() + "# edited\n")
    with pytest.raises(InputError, match=rf"has another .*{edited}, which is not what the run"):
        handed.accept()


def test_what_cannot_be_sent_is_told_with_what_to_write():
    layer = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 10)))
    with pytest.raises(
        InputError, match=r"^model: given:Sequential(-\d+)? cannot be sent .*; hand"
    ) as told:
        HandOver.of(parse_config({**SMALL, "model": layer}))
    assert "\n" not in str(told.value)


def test_a_package_is_known_by_its_own_name(tmp_path, monkeypatch):
    """A folder on the path may hold an __init__.py of its own, as Ray's does in its workers."""
    package = tmp_path / "there" / "package_of_mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("class Thing: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path / "there"))
    origin = origin_of_object(importlib.import_module("package_of_mine").Thing(), private=False)
    assert [name for name, _ in origin.files] == ["package_of_mine/__init__.py"]
    (tmp_path / "decoy").mkdir()
    (tmp_path / "decoy" / "__init__.py").write_text("another = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "decoy"))
    assert origin.unlike_here("") is None
