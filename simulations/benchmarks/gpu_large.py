"""Stage 3 of the GPU benchmark: the published model of 255 million parameters. See gpu.py.

Seconds and memory of a step of 120 s of speech a user, by precision and users in a stack; then
rounds of `configs/asr_librispeech_255m.yaml` through Flower and a Ray worker that is given the GPU.
On a CPU the model is a small one of the same shape.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_stage import Stage
from large_model import CONFIG, make_tree, overrides

from fedpriv.config_files import load_config
from fedpriv.data.text import Alphabet
from fedpriv.data.utterances import Utterances
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.models.registry import build_model
from fedpriv.tasks.decoding import greedy
from fedpriv.tasks.recognition import Recognition
from fedpriv.training.device import set_tf32
from fedpriv.training.local import LocalTraining
from fedpriv.training.stacked import StackedUser, Stream, stacked_model, train_stack

# Of the model on a CPU.
SMALL = ["model.dim=64", "model.depth=3"]
FRAMES, CHARACTERS = 1500, 200
TRIED = {
    "cuda": [("bfloat16", 1), ("bfloat16", 2), ("bfloat16", 4), ("tf32", 1), ("float32", 1)],
    "cpu": [("bfloat16", 1), ("float32", 2)],
}
ROUND_SECONDS = {"cuda": 110, "cpu": 25}


def main() -> None:
    stage = Stage.of_arguments()
    kind = stage.device.type
    config = load_config(CONFIG, [] if stage.on_gpu else SMALL)
    model = build_model(config.model, (16_000,), len(ALPHABET) + 1, seed=1).to(stage.device)
    rows = 8 if stage.on_gpu else 1
    for precision, users in TRIED[kind]:
        if stage.left < ROUND_SECONDS[kind] + 10:
            stage.write(precision=precision, users=users, absent="no time was left")
            continue
        step(stage, model, precision, users, rows)
    stacked_model.cache_clear()
    del model
    if stage.on_gpu:
        torch.cuda.empty_cache()
    through_ray(stage)


ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"


def user(number: int, rows: int, mels: int, device: torch.device) -> StackedUser:
    """Return a user of made-up features, who takes one step of all of them."""
    generator = torch.Generator().manual_seed(number)
    targets = torch.randint(1, len(ALPHABET) + 1, (rows, CHARACTERS), generator=generator)
    examples = Utterances(
        torch.randn(rows, FRAMES, mels, generator=generator),
        torch.full((rows,), FRAMES),
        targets,
        torch.full((rows,), CHARACTERS),
    )
    dropout = Stream(lambda: torch.Generator(device).manual_seed(number))
    return StackedUser(number, examples, [torch.arange(rows)], dropout, Stream(lambda: generator))


def step(stage: Stage, model: Any, precision: Any, users: int, rows: int) -> None:
    """Time one local step of a stack of users."""
    recipe = LocalTraining(steps=1, batch_size=rows, lr=0.2, max_grad_norm=1.0, precision=precision)
    if stage.on_gpu:
        set_tf32(precision == "tf32", stage.device)
    stacked = stacked_model(model)
    assert stacked is not None
    start = Layout.of(model).join(parameters_of(model))
    mels = model.front_end.bands.shape[1]
    those = [user(number, rows, mels, stage.device) for number in range(users)]
    task = Recognition(Alphabet(ALPHABET), greedy)

    def work() -> None:
        train_stack(stacked, start, those, recipe, task, 1)

    what = {"what": "a local step", "parameters": Layout.of(model).total, "precision": precision}
    try:
        peak = stage.peak(work)
        seconds = stage.timed(work, 3, 6.0)
    except torch.OutOfMemoryError:
        stage.write(**what, users=users, absent="out of memory")
        return
    stage.write(**what, users=users, seconds_a_user=seconds / users, peak_gib=peak)


def through_ray(stage: Stage) -> None:
    """Run rounds of the shipped config, of one user each, through a Ray worker."""
    what = "rounds through Ray"
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("flwr") is None:
        stage.write(what=what, absent="Ray or Flower is not installed")
        return
    runtime = "{workers: 1, profile: true, device: cpu}"
    if stage.on_gpu:
        runtime = "{workers: 1, profile: true, device: cuda, gpus_per_worker: 1}"
    with TemporaryDirectory() as name:
        folder, run = Path(name) / "librispeech", Path(name) / "run"
        make_tree(folder, 10.0 if stage.on_gpu else 2.0)
        settings = [*overrides(folder, run), f"--set=runtime={runtime}"]
        settings += [
            f"--set={one}" for one in (["local.precision=bfloat16"] if stage.on_gpu else SMALL)
        ]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "fedpriv", "run", str(CONFIG), *settings],
                timeout=max(1, stage.left - 3),
            )
            how = f"ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            how = "out of time"
        metrics = run / "metrics.jsonl"
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        seconds = [json.loads(row)["seconds"] for row in rows]
    stage.write(what=what, how=how, rounds=len(seconds), seconds=min(seconds, default=None))
    if not seconds:
        sys.exit(1)


if __name__ == "__main__":
    main()
