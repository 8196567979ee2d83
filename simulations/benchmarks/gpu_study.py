"""Stage 4 of the GPU benchmark: global against per-layer clipping, 36 blocks deep. See gpu.py.

A speech model of 30 million parameters learns made-up speech from the start, with noise far below
what protects anyone, for as long as there is time: both rules in turns, the loss round by round. A
beginning of a study, not one. On a CPU the model is a small one.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import torch
from contenders import HERE
from gpu_stage import Stage

from fedpriv.config_files import load_config
from fedpriv.errors import FedprivError
from fedpriv.federation.builders import build_clipping, build_trainer
from fedpriv.models.parameters import Layout
from fedpriv.optimizers.server import Server
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism
from fedpriv.training.cohort import train_cohort

DEEP = ["model.dim=256", "model.depth=36", "model.heads=4", "data.users=64"]
SMALL = ["model.dim=32", "model.depth=2", "model.heads=2", "data.users=8"]
RULES = {
    "global": ["privacy.clipping.kind=global"],
    "per layer": ["privacy.clipping.kind=per_layer", "privacy.clipping.split=dim"],
}
COHORT, NOISE = {"cuda": 16, "cpu": 4}, 1e-4
LEFT_FOR_A_ROUND = 5.0


def main() -> None:
    stage = Stage.of_arguments()
    shape = DEEP if stage.on_gpu else SMALL
    precision = ["local.precision=bfloat16"] if stage.on_gpu else []
    settings = [*shape, *precision, f"runtime.device={stage.device}", "runtime.stack=4"]
    try:
        trainer = build_trainer(load_config(HERE / "speech.yaml", settings))
    except FedprivError as error:
        stage.write(what="study", absent=str(error))
        return
    layout, cohort = Layout.of(trainer.model), COHORT[stage.device.type]
    begin = layout.join({n: p.detach() for n, p in trainer.model.named_parameters()}).clone()
    servers, states, clippings = {}, {}, {}
    for rule, overrides in RULES.items():
        config = load_config(HERE / "speech.yaml", [*settings, *overrides])
        assert config.privacy is not None
        clippings[rule] = build_clipping(config, layout)
        servers[rule] = Server(
            trainer.model, "lamb", 0.01, {}, config.server.schedule, None, rounds=10_000
        )
        states[rule] = begin
    longest = 0.0
    for round_ in itertools.count(1):
        for rule in RULES:
            if stage.left < max(LEFT_FOR_A_ROUND, 2 * longest) or round_ > (
                500 if stage.on_gpu else 2
            ):
                return
            before = stage.left
            users = np.random.default_rng(round_).choice(
                trainer.dataset.population, cohort, replace=False
            )
            own = replace(trainer, clipping=clippings[rule])
            summed = train_cohort(own, states[rule], users.tolist(), round_)
            mechanism = GaussianMechanism(NOISE * cohort, clippings[rule])
            noisy = mechanism.release(
                summed.total, layout.sizes, np.random.default_rng((17, round_))
            )
            with torch.no_grad():
                for p, part in zip(
                    trainer.model.parameters(), states[rule].split(layout.sizes), strict=True
                ):
                    p.copy_(part.view_as(p))
            servers[rule].step(noisy / cohort, round_, seed=round_)
            states[rule] = servers[rule].parameters()
            longest = max(longest, before - stage.left)
            stage.write(
                rule=rule,
                round=round_,
                parameters=layout.total,
                loss=summed.loss / cohort,
                clipped=summed.clipped / cohort,
                seconds=before - stage.left,
            )


if __name__ == "__main__":
    main()
