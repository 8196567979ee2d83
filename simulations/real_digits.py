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
import sys
from pathlib import Path

import torch
from one_process import prepared, resolved, train
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from fedpriv.seed_model import seed_path
from fedpriv.training.parameters import parameters_of

FOLDER = Path(__file__).parent / "results" / "real_digits"
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
SEEDS = (17, 18)
EIGHT_ACCENTS = ["privacy=null", "cohort=64"]


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


def rows_of(folder: str, seed: int) -> list[tuple[str, str, int, float]]:
    start = seed_path(resolved("asr_digits.yaml", [f"seed={seed}"]))
    accents = federated_on_synthetic(seed)
    found = [
        ("synthetic, one accent", "held-out recordings", measured(fsdd(folder, start, seed))),
        ("synthetic, eight accents", "held-out recordings", measured(fsdd(folder, accents, seed))),
        ("real", "held-out recordings", trained(fsdd(folder, start, seed))),
    ]
    for speaker in SPEAKERS:
        unseen = f"held-out speaker {speaker}"
        options = fsdd(folder, start, seed, speaker)
        found.append(("synthetic, one accent", unseen, measured(options)))
        other = fsdd(folder, accents, seed, speaker)
        found.append(("synthetic, eight accents", unseen, measured(other)))
        found.append(("real", unseen, trained(options)))
    return [(model, on, seed, wer) for model, on, wer in found]


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = [row for seed in SEEDS for row in rows_of(sys.argv[1], seed)]
    with (FOLDER / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("trained on", "measured on", "seed", "wer"))
        writer.writerows(rows)
    shown = Table("trained on", "measured on", *(f"WER, seed {seed}" for seed in SEEDS))
    for key in dict.fromkeys(row[:2] for row in rows):
        shown.add_row(*key, *(f"{row[3]:.1%}" for row in rows if row[:2] == key))
    Console().print(shown)


if __name__ == "__main__":
    main()
