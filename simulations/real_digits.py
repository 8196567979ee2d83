"""What does a recogniser learn from real recordings, and what does synthetic speech teach it?

Three models of one shape are measured on digit strings of the Free Spoken Digit Dataset: the seed
model of `configs/asr_digits.yaml`, which has heard one accent of synthetic speech; the model that
federated training over 2,048 synthetic speakers of eight accents makes of it, without privacy; and
the seed model after federated training on real recordings (`configs/asr_fsdd.yaml`), measured on
held-out recordings of the speakers it was trained on, and, for each of the six speakers, after
training on the five others.

    python simulations/real_digits.py FOLDER    # the data set's folder of wav files

writes results.csv into simulations/results/real_digits.
"""

from __future__ import annotations

import csv
import multiprocessing
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from one_process import prepared, resolved, train
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from fedpriv.models.parameters import parameters_of
from fedpriv.seed_model import seed_path

FOLDER = Path(__file__).parent / "results" / "real_digits"
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
SEEDS = (17, 18)
EIGHT_ACCENTS = ["privacy=null", "cohort=64"]
ONE, ACCENTS, REAL = "synthetic, one accent", "synthetic, eight accents", "real"


def fsdd(folder: str, start: Path, seed: int, speaker: str | None = None) -> list[str]:
    """Return the overrides of a run on real recordings that starts from a model's file."""
    held_out = f"data.speech.held_out_speakers=[{speaker or ''}]"
    return [f"data.path={folder}", f"seed_model.path={start}", f"seed={seed}", held_out]


def measured(overrides: list[str]) -> float:
    """Return the word error rate of the start model, as it is."""
    experiment = prepared(resolved("asr_fsdd.yaml", overrides))
    trainer = experiment.trainer
    return trainer.task.measure(trainer.model, experiment.held_out, 500)["wer"]


def trained(overrides: list[str]) -> float:
    return train(resolved("asr_fsdd.yaml", overrides)).measures["wer"]


def federated_on_synthetic(seed: int) -> Path:
    """Return the file of the model trained over synthetic speakers of eight accents."""
    path = Path(f"runs/real-digits/eight-accents-{seed}.safetensors")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        config = resolved("asr_digits.yaml", [*EIGHT_ACCENTS, f"seed={seed}"])
        experiment = prepared(config)
        train(config, experiment)
        save_file(parameters_of(experiment.server.model), path)
    return path


@dataclass(frozen=True)
class Job:
    """A model, by what it was trained on, and whom it is measured on: None for no one held out."""

    model: str
    speaker: str | None
    seed: int

    @property
    def measured_on(self) -> str:
        return f"held-out speaker {self.speaker}" if self.speaker else "held-out recordings"


def run(folder: str, job: Job) -> float:
    """Return the word error rate of one job."""
    torch.set_num_threads(1)
    start = seed_path(resolved("asr_digits.yaml", [f"seed={job.seed}"]))
    if job.model == ACCENTS:
        start = federated_on_synthetic(job.seed)
    overrides = fsdd(folder, start, job.seed, job.speaker)
    return trained(overrides) if job.model == REAL else measured(overrides)


def write(results: list[tuple[Job, float]]) -> None:
    with (FOLDER / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("trained on", "measured on", "seed", "wer"))
        writer.writerows((job.model, job.measured_on, job.seed, wer) for job, wer in results)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Six speakers repeat one another; the recordings of all of them take two seeds.
    places = [*((None, seed) for seed in SEEDS), *((speaker, SEEDS[0]) for speaker in SPEAKERS)]
    # The long ones first, so that both processes end together.
    jobs = [Job(model, who, seed) for model in (REAL, ONE, ACCENTS) for who, seed in places]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(federated_on_synthetic, SEEDS, chunksize=1)
        rates = pool.map(partial(run, sys.argv[1]), jobs, chunksize=1)
    results = list(zip(jobs, rates, strict=True))
    write(results)
    shown = Table("trained on", "measured on", "WER")
    for model, place in dict.fromkeys((job.model, job.measured_on) for job in jobs):
        found = [wer for job, wer in results if (job.model, job.measured_on) == (model, place)]
        shown.add_row(model, place, ", ".join(f"{wer:.1%}" for wer in found))
    Console().print(shown)


if __name__ == "__main__":
    main()
