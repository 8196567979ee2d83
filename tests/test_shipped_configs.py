"""The configs that the project ships: each is valid, and the published one has its size."""

from pathlib import Path

import pytest
import torch

from fedpriv.config_files import load_config
from fedpriv.data.text import ENGLISH, Alphabet
from fedpriv.models.registry import build_model

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_named_after_its_file(path):
    assert load_config(path).name == path.stem.replace("_", "-")


def test_the_published_shape_has_255_million_parameters():
    config = load_config(next(path for path in CONFIGS if path.stem == "asr_librispeech_255m"))
    with torch.device("meta"):
        model = build_model(config.model, (16_000,), Alphabet(ENGLISH).classes, config.seed)
    assert config.model.depth == 36
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(255e6, rel=0.02)
