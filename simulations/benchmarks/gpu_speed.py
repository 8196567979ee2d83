"""Stage 2 of the GPU benchmark: users a second, ours beside others' on the same device. See gpu.py.

Each trains alone, in one process; nothing of messages or of Ray is in these numbers. Ours clips
every user and sums in float64; pfl-research adds its own noise. What is not installed, or what the
engine does not take, is recorded as absent with the reason.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from contenders import HERE, Contender, ContenderError, Running, arrays_of, task_of
from gpu_stage import Stage
from task import write as write_task
from torch import nn

from fedpriv.config_files import load_config
from fedpriv.data.federated import Examples
from fedpriv.errors import FedprivError
from fedpriv.federation.builders import build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.training.cohort import CohortTrainer, train_cohort
from fedpriv.training.stacked import can_stack

SPEECH = "speech"
WORKLOADS = {"W1, vit-small": "vit_small", "W2, vit-large": "vit_large", SPEECH: "speech"}
SIZES = {"cuda": (8, 32, 128, 512), "cpu": (8,)}
SPEAKERS = 64
REPEATS, SECONDS_EACH = 5, 2.0
# A stage of pfl-research takes this long at least, with its start.
_PFL_SECONDS = 25


def main() -> None:
    stage = Stage.of_arguments()
    for name, config in WORKLOADS.items():
        try:
            ours(stage, name, HERE / f"{config}.yaml")
        except FedprivError as error:  # speech needs libraries of its own
            stage.write(workload=name, who="fedpriv", absent=str(error))
        if name != SPEECH:  # which pfl-research has no model for
            pfl(stage, name, HERE / f"{config}.yaml")
    opacus(stage)
    convolutions(stage)


def ours(stage: Stage, name: str, config: Path) -> None:
    """Time the stacked engine at each size of stack, the sequential one, and where time goes."""
    sizes = SIZES[stage.device.type]
    if name == SPEECH:  # whose users take seconds to speak
        sizes = tuple(size for size in sizes if size <= SPEAKERS)
    most = max(sizes)
    users = [f"data.users={most}", f"runtime.device={stage.device}", "runtime.stack=1"]
    trainer = build_trainer(load_config(config, [*users, "privacy.sampling={kind: all}"]))
    start = Layout.of(trainer.model).join(parameters_of(trainer.model)).cpu()
    few = 16 if stage.on_gpu else 2
    one_by_one = replace(trainer, engine="sequential")
    seconds = stage.timed(lambda: train_cohort(one_by_one, start, range(few), 1), 3, SECONDS_EACH)
    stage.write(workload=name, who="fedpriv, sequential", users_a_second=few / seconds)
    for size in sizes:
        if stage.left < 2 * SECONDS_EACH:
            stage.write(
                workload=name, who="fedpriv, stacked", stack=size, absent="no time was left"
            )
            continue
        # In turns with what every operation is asked for by itself.
        for graphs in dict.fromkeys([trainer.graphs and name != SPEECH, False]):
            stacked(stage, name, replace(trainer, stack=size, graphs=graphs), start, size)


def stacked(stage: Stage, name: str, trainer: CohortTrainer, start: Any, size: int) -> None:
    users = range(size)
    who = "fedpriv, stacked" + (", CUDA graphs" if trainer.graphs else "")

    def work() -> None:
        train_cohort(trainer, start, users, 1)

    try:
        for _ in range(2 if trainer.graphs else 0):  # met, then recorded
            work()
        peak = stage.peak(work)
        seconds = stage.timed(work, REPEATS, SECONDS_EACH)
    except torch.OutOfMemoryError:
        stage.write(workload=name, who=who, stack=size, absent="out of memory")
        return
    spans = train_cohort(replace(trainer, timed=True), start, users, 1).spans
    taken: dict[str, float] = {}
    for span in spans:
        taken[span.name] = taken.get(span.name, 0.0) + span.end - span.start
    stage.write(
        workload=name,
        who=who,
        stack=size,
        users_a_second=size / seconds,
        clipping=taken["clip and sum"] / sum(taken.values()),
        peak_gib=peak,
    )


def pfl(stage: Stage, name: str, config: Path) -> None:
    """Time rounds of pfl-research in a process of its own, which sees the same GPU."""
    who = "pfl-research"
    if importlib.util.find_spec("pfl") is None:
        stage.write(workload=name, who=who, absent="pfl is not installed")
        return
    if stage.left < _PFL_SECONDS:
        stage.write(workload=name, who=who, absent="no time was left")
        return
    resolved = load_config(config, ["rounds=4", "runtime.workers=1"])
    given = task_of(resolved)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if stage.on_gpu else ""
    with TemporaryDirectory() as place:
        folder = Path(place)
        write_task(folder, given, arrays_of(resolved))
        line = (sys.executable, str(HERE / "pfl_rounds.py"), place)
        try:
            with Running(Contender(who, folder, line), {"CUDA_VISIBLE_DEVICES": visible}) as pfls:
                pfls.stand_ready()
                with pfls.turn():
                    times = [pfls.round(given.cohort) for _ in range(given.rounds)]
        except ContenderError as error:
            stage.write(workload=name, who=who, absent=str(error)[-300:])
            return
    stage.write(workload=name, who=who, users_a_second=given.cohort / min(times[1:]))


def opacus(stage: Stage) -> None:
    """Time per-example gradients as Opacus takes them, clipped and added up, by both hooks."""
    who = "Opacus' hooks, clipped and added by fedpriv"
    try:
        from fedpriv.privacy.clipping import GlobalClipping, clip_and_add
        from fedpriv.training.example_gradients import GRADIENTS, example_gradients
    except ImportError as error:
        stage.write(who=who, absent=str(error))
        return
    number = 64 if stage.on_gpu else 4
    trainer = build_trainer(
        load_config(HERE / "vit_small.yaml", [f"runtime.device={stage.device}"])
    )
    shape = trainer.dataset.input_shape
    batch = Examples(torch.randn(number, *shape), torch.zeros(number, dtype=torch.int64))
    for name, hooks in GRADIENTS.items():
        model = hooks(trainer.model, loss_reduction="sum")
        model.train()
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        sizes = [p.numel() for p in parameters]

        def work(
            model: Any = model, parameters: list[Any] = parameters, sizes: Any = sizes
        ) -> None:
            example_gradients(model, trainer.task, batch.to(stage.device))
            blocks = [
                p.grad_sample.flatten(1)
                if isinstance(p.grad_sample, torch.Tensor)
                else p.grad_sample
                for p in parameters
            ]
            total = torch.zeros(sum(sizes), dtype=torch.float64, device=stage.device)
            clip_and_add(blocks, GlobalClipping(1.0), total)
            for p in parameters:
                p.grad_sample = p.grad = None

        seconds = stage.timed(work, REPEATS, SECONDS_EACH)
        stage.write(workload="W1, vit-small", who=who, how=name, examples_a_second=number / seconds)
        model.to_standard_module()


def convolutions(stage: Stage) -> None:
    """Say whether users of a convolutional network can be stacked."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 676, 10)
    )
    if not can_stack(model):
        stage.write(workload="GroupNorm CNN", absent="the engine stacks no convolutions yet")


if __name__ == "__main__":
    main()
