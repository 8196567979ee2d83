"""Run directories written by the real classes, without training anything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpriv.config import ExperimentConfig
from fedpriv.config_files import parse_config
from fedpriv.privacy import (
    CentralMechanism,
    GaussianMechanism,
    GlobalClipping,
    Header,
    RdpAccountant,
    Release,
    Unclipped,
    build_sampling,
)
from fedpriv.privacy.sampling import Adjacency, Sampling
from fedpriv.reporting.run_directory import RunDirectory

POPULATION, COHORT, DELTA = 2000, 100.0, 1e-5
BLOCKS = ("embed.weight", "transformer.blocks.0.attention_residual.norm.weight", "head.bias")

MakeRun = Callable[..., Path]


def config_of(path: Path, **changes: Any) -> ExperimentConfig:
    """A private config; `changes` replace whole sections."""
    document: dict[str, Any] = {
        "name": "tiny",
        "rounds": 6,
        "run_dir": str(path),
        "data": {"users": POPULATION},
        "privacy": {
            "delta": DELTA,
            "noise_multiplier": 1.1,
            "sampling": {"kind": "poisson", "expected_cohort": COHORT},
            "clipping": {"kind": "per_layer", "bound": 0.5},
            "accountants": ["rdp", "pld"],
        },
        "evaluation": {"every": 2},
    }
    return parse_config(document | changes)


def sampling_and_mechanism(config: ExperimentConfig) -> tuple[Sampling, GaussianMechanism]:
    privacy = config.privacy
    if privacy is None:
        return build_sampling("poisson", POPULATION, COHORT), GaussianMechanism(0.0, Unclipped())
    sampling = build_sampling(
        privacy.sampling.kind,
        POPULATION,
        privacy.sampling.cohort,
        Adjacency(privacy.adjacency) if privacy.adjacency else None,
    )
    clipping = GlobalClipping(privacy.clipping.bound)
    return sampling, GaussianMechanism(privacy.noise_multiplier or 0.0, clipping)


def metrics_row(round_: int, config: ExperimentConfig, epsilon: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "round": round_,
        "epsilon": {"rdp": epsilon},
        "delta": config.privacy.delta if config.privacy else None,
        "lr": 0.01,
        "aggregate_norm": 0.02 + 0.001 * round_,
        "released_block_norms": dict.fromkeys(BLOCKS, 0.2),
        "noise_block_norms": dict.fromkeys(BLOCKS, 0.1 if config.privacy else 0.0),
        "clip_bound": 0.5,
        "seconds": 0.5,
        "nodes_lost": 0,
        "simulation_only": {
            "cohort": 95 + round_,
            "examples": 200,
            "users_per_second": 200.0,
            "non_finite": 0,
            "skipped": 0,
            "loss": 2.0 / round_,
            "norm": 0.4,
            "clipped": 0.5,
            "block_norms": dict.fromkeys(BLOCKS, 0.1),
            "block_clipped": dict.fromkeys(BLOCKS, 0.5),
        },
    }
    if round_ % config.evaluation.every == 0:
        row["held_out"] = {"loss": 1.0 / round_, "accuracy": 0.5 + 0.05 * round_}
    return row


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a run; `attempts` gives how often each round is charged, by round."""

    def make(folder: str = "run", attempts: dict[int, int] | None = None, **changes: Any) -> Path:
        config = config_of(tmp_path / folder, **changes)
        sampling, mechanism = sampling_and_mechanism(config)
        directory = RunDirectory.create(config, "cpu")
        delta = config.privacy.delta if config.privacy else None
        mode = "deployment" if config.runtime.deployment else "simulation"
        adjacency = sampling.adjacency.value
        header = Header(config.fingerprint(""), POPULATION, delta, adjacency, mode=mode)
        ledger = directory.open_ledger(header)
        accountant = RdpAccountant(sampling.adjacency)
        private = delta is not None and mechanism.stddev > 0
        for round_ in range(1, config.rounds + 1):
            for attempt in range((attempts or {}).get(round_, 1)):
                release = Release.of(
                    round_, attempt, CentralMechanism(sampling, mechanism), "0" * 64
                )
                ledger.append(release)
                accountant.compose(release.event())
            epsilon = accountant.epsilon(delta) if private and delta is not None else None
            directory.append_metrics(metrics_row(round_, config, epsilon))
        return directory.path

    return make
