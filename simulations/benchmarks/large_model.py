"""One user, one step, of the published 255-million-parameter speech model: time and memory.

`configs/asr_librispeech_255m.yaml` is run for a few rounds through Flower and one Ray worker, on
the CPU, over a tree of made-up recordings in LibriSpeech's layout: one user a round, one local
step of one utterance.

    python simulations/benchmarks/large_model.py [SECONDS]    # of the utterance, 10 by default
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from rich.console import Console
from rich.table import Table
from watched import watch

CONFIG = Path(__file__).parents[2] / "configs" / "asr_librispeech_255m.yaml"
RATE = 16_000
ROUNDS = 3
SPEAKERS = {"train-clean-100": "19", "train-clean-360": "14", "dev-clean": "84", "test-clean": "61"}
TEXT = "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG"


def make_tree(folder: Path, seconds: float) -> None:
    """Write one utterance a subset: noise, since nothing is to be learnt."""
    generator = np.random.default_rng(0)
    for subset, speaker in SPEAKERS.items():
        chapter = folder / subset / speaker / "1"
        chapter.mkdir(parents=True)
        wave = generator.normal(0, 0.1, round(RATE * seconds)).clip(-1, 1)
        soundfile.write(chapter / f"{speaker}-1-0000.flac", wave, RATE)
        (chapter / f"{speaker}-1.trans.txt").write_text(f"{speaker}-1-0000 {TEXT}\n")


def overrides(folder: Path, run: Path) -> list[str]:
    settings = {
        "data.path": folder,
        "data.speech.train_subsets": "[train-clean-360]",
        "run_dir": run,
        "rounds": ROUNDS,
        "seed_model": "null",
        "local.steps": 1,
        "local.batch_size": 1,
        "privacy.delta": 0.5,
        "privacy.sampling": "{kind: all}",
        "runtime": "{workers: 1, profile: true}",
        "evaluation": "{every: 1000, batch_size: 1}",
        "checkpoint.keep": 1,
    }
    return [f"--set={key}={value}" for key, value in settings.items()]


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    with tempfile.TemporaryDirectory() as name:
        folder, run = Path(name) / "librispeech", Path(name) / "run"
        make_tree(folder, seconds)
        command = [sys.executable, "-m", "fedpriv", "run", str(CONFIG), *overrides(folder, run)]
        seen = watch(command)
        for _, line in seen.lines:
            Console(stderr=True).print(line, soft_wrap=True)
        if seen.returncode:
            sys.exit(f"the run ended with code {seen.returncode}; is memory short?")
        rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shown = Table("what", "")
    for row in rounds:
        shown.add_row(f"round {row['round']}", f"{row['seconds']:.1f} s")
    for who, mib in sorted(seen.peaks.items(), key=lambda one: -one[1])[:3]:
        shown.add_row(f"peak of {who}", f"{mib / 1024:.2f} GiB")
    shown.add_row("peak of all processes", f"{seen.peak / 1024:.2f} GiB")
    Console().print(shown)


if __name__ == "__main__":
    main()
