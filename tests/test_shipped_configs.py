"""The configs that the project ships and shows: each is valid; the published one has its size."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from fedpriv.components import LookUp
from fedpriv.config_files import load_config
from fedpriv.data.registry import DATASETS
from fedpriv.data.text import ENGLISH, Alphabet
from fedpriv.models.registry import build_model

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SHOWN = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_named_after_its_file(path):
    assert load_config(path).name == path.stem.replace("_", "-")


def test_the_published_shape_has_255_million_parameters():
    config = load_config(next(path for path in CONFIGS if path.stem == "asr_librispeech_255m"))
    with torch.device("meta"):
        model = build_model(config.model, (16_000,), Alphabet(ENGLISH).classes, config.seed)
    assert config.model.depth == 36
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(255e6, rel=0.02)


def test_every_data_set_of_the_docs_is_valid(tmp_path, monkeypatch):
    code = "def Photos(path, size): ...\ndef Test(path): ...\n"
    (tmp_path / "mine.py").write_text(code)
    shown = [yaml.safe_load(each)["data"] for each in SHOWN]
    names = {DATASETS.parse(each, LookUp(tmp_path)).name for each in shown}
    assert names == {"image_folder", "table", "hf", "flwr_datasets", "torch", "text"}
