"""Components from outside, each as a config names it and as Python hands it over."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import yaml
from in_process import SMALL
from PIL import Image
from tiny_speech import tiny_speech

import fedpriv
from fedpriv.config import ExperimentConfig
from fedpriv.config_files import load_config

HERE = Path(__file__).parent / "outside"
PEOPLE = 12

TIMM = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 24}
SPEECH = {"users": 12, "speech": {"sample_rate": 8_000, "public_speakers": 4}}
SQUARES = {"bounds": {"squares": 0.01}}
SOFT = {"bound": 0.1, "softness": 1}

#: What a config says, as sections that are put into the small config's.
NAMED: dict[str, dict[str, Any]] = {
    "soft_clipping": {"privacy": {"clipping": {"kind": "soft_clipping:SoftClipping", **SOFT}}},
    "running_scale": {"server": {"normalize": {"name": "running_scale:RunningScale", "decay": 0}}},
    "root": {"server": {"normalize": {"name": "root:root", "power": 0.3}}},
    "signed": {"server": {"optimizer": "signed:Signed", "lr": 0.01, "options": {"beta": 0.5}}},
    "png_folders": {"data": {"name": "png_folders:people", "path": "people", "users": PEOPLE + 2}},
    "groupnorm_cnn": {"model": {"name": "groupnorm_cnn:cnn", "width": 4}},
    "timm": {"model": {"name": "timm.models:vit_tiny_patch16_224", "depth": 1, **TIMM}},
    "hf_vit": {"model": {"name": "hf_vit:vit", "width": 8}},
    "wav2vec2": {
        "model": {"name": "wav2vec2:Wav2Vec2", "width": 8},
        "data": {"name": "tiny_speech:build_tones", **SPEECH},
    },
    "brightness": {
        "data": {"name": "brightness:pictures", "users": 60},
        "model": {"name": "brightness:weights"},
    },
    "letters": {
        "data": {"name": "letters:alphabets", "users": 60},
        "model": {"name": "letters:Recurrent", "width": 4},
    },
    "second_payload": {"algorithm": {"name": "second_payload:WithSquares", **SQUARES}},
    "own_mechanism": {"privacy": {"mechanism": {"kind": "own_mechanism:TwoKeepers"}}},
}


def _timm() -> Callable[..., Any]:
    from timm.models import vit_tiny_patch16_224

    return vit_tiny_patch16_224


#: The same as Python hands it over: what is made already, wherever that can be.
HANDED: dict[str, Callable[[ModuleType], dict[str, Any]]] = {
    "soft_clipping": lambda of: {"privacy": {"clipping": {"kind": of.SoftClipping, **SOFT}}},
    "running_scale": lambda of: {"server": {"normalize": of.RunningScale(0.0)}},
    "root": lambda of: {"server": {"normalize": {"name": of.root, "power": 0.3}}},
    "png_folders": lambda of: {"data": {"name": of.people(Path("people")), "users": PEOPLE + 2}},
    "groupnorm_cnn": lambda of: {"model": of.cnn((1, 8, 8), 10, width=4)},
    "timm": lambda of: {"model": _timm()(depth=1, **TIMM)},
    "hf_vit": lambda of: {"model": {"name": of.vit, "width": 8}},
    "wav2vec2": lambda of: {"model": of.Wav2Vec2, "data": {"name": tiny_speech()}},
    "brightness": lambda of: {"data": {"name": of.Brightness(60)}, "model": of.weights((64,), 1)},
    "letters": lambda of: {"data": {"name": of.Alphabets(60)}, "model": {"name": of.Recurrent}},
    "second_payload": lambda of: {"algorithm": {"name": of.WithSquares(), **SQUARES}},
    "own_mechanism": lambda of: {"privacy": {"mechanism": {"kind": of.TwoKeepers}}},
}

#: The keys of each, at which a run says that it has something from outside.
KEYS: dict[str, tuple[str, ...]] = {
    "soft_clipping": ("privacy.clipping",),
    "running_scale": ("server.normalize",),
    "root": ("server.normalize",),
    "signed": ("server.optimizer",),
    "png_folders": ("data",),
    "groupnorm_cnn": ("model",),
    "timm": ("model",),
    "hf_vit": ("model",),
    "wav2vec2": ("data", "model"),
    "brightness": ("data", "model"),
    "letters": ("data", "model"),
    "second_payload": ("algorithm",),
    "own_mechanism": ("privacy.mechanism",),
}


def by_yaml(folder: Path, cases: Sequence[str], **changes: Any) -> ExperimentConfig:
    """Write a config with the files of `cases` beside it, and load it."""
    document = _small(**changes)
    for case in cases:
        if case != "timm":
            shutil.copy(HERE / f"{case}.py", folder)
        _put(document, NAMED[case])
    (folder / "mine.yaml").write_text(yaml.safe_dump(document))
    return load_config(folder / "mine.yaml")


def by_python(folder: Path, cases: Sequence[str], **changes: Any) -> ExperimentConfig:
    """Hand the objects of `cases` over; `folder`, for their modules, is on the path."""
    document = _small(**changes)
    for case in cases:
        module = None
        if case != "timm":
            shutil.copy(HERE / f"{case}.py", folder / f"handed_{case}.py")
            importlib.invalidate_caches()
            module = importlib.import_module(f"handed_{case}")
        _put(document, HANDED[case](module))
    return fedpriv.Experiment(**document).config


def write_people(folder: Path) -> None:
    """Write the PNG files of people whose images are noise."""
    generator = np.random.default_rng(3)
    for person in [*(f"person-{number}" for number in range(PEOPLE)), "held_out"]:
        (folder / person).mkdir(parents=True)
        for number in range(6):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / person / f"{number % 3}_{number}.png")


def _small(**changes: Any) -> dict[str, Any]:
    privacy = {**SMALL["privacy"]}
    return {**SMALL, "rounds": 2, "evaluation": {"every": 1}, "privacy": privacy, **changes}


def _put(document: dict[str, Any], sections: dict[str, Any]) -> None:
    for name, section in sections.items():
        part_of = name in ("privacy", "server")
        document[name] = {**document[name], **section} if part_of else section
