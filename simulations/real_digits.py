"""What does a recogniser learn from real recordings, and what does synthetic speech teach it?

Three models of one shape are measured on digit strings of the Free Spoken Digit Dataset: the seed
model of `configs/asr_digits.yaml`, which has heard one accent of synthetic speech; the model that
federated training over 2,048 synthetic speakers of eight accents makes of it, without privacy; and
the seed model after federated training on real recordings (`configs/asr_fsdd.yaml`), measured on
held-out recordings of the speakers it was trained on, and, for each of the six speakers, after
training on the five others.

Found: trained on real recordings it makes 23% and 25% errors on recordings that it has not heard,
and 50% to 77% on a speaker whom it has not heard. Synthetic speech teaches nothing of them: more
words are wrong than were said.

    python simulations/real_digits.py FOLDER    # of wav files; finished runs are kept
    python simulations/real_digits.py show      # the table and the figure again

writes results.csv and figure.png into simulations/results/real_digits.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import study
from matplotlib.figure import Figure

import fedpriv

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
SEEDS = [17, 18]
# Six speakers repeat one another; the recordings of all of them take two seeds.
PLACES = [*((None, seed) for seed in SEEDS), *((speaker, SEEDS[0]) for speaker in SPEAKERS)]
MODELS = {
    "real": study.BLUE,
    "synthetic, one accent": study.RED,
    "synthetic, eight accents": study.ORANGE,
}
COLUMNS = ["trained on", "measured on", "seed", "wer"]


def measure(folder: str) -> pd.DataFrame:
    accents = fedpriv.Experiment.load(
        study.CONFIGS / "asr_digits.yaml", {"evaluation.every": 60}, privacy=None, cohort=64
    )
    synthetic = fedpriv.sweep(accents, {}, SEEDS, run_dir="runs/real-digits/accents")
    starts = dict(zip(SEEDS, synthetic.run, strict=True))
    real = fedpriv.Experiment.load(
        study.CONFIGS / "asr_fsdd.yaml", {"data.path": folder, "evaluation.every": 100}
    )
    rows = [row for place in PLACES for row in measured(real, starts, *place)]
    return pd.DataFrame(rows, columns=COLUMNS).sort_values("trained on", kind="stable")


def measured(
    real: fedpriv.Experiment, starts: dict[int, fedpriv.Run], speaker: str | None, seed: int
) -> list[tuple[str, str, int, float]]:
    """Return a row for each model; `speaker` is held out, None for nobody."""
    seed_model = starts[seed].config.seed_model
    assert seed_model is not None
    held_out = {"data.speech.held_out_speakers": [speaker] if speaker else []}
    here = real.with_({**held_out, "seed_model.path": str(seed_model.path), "seed": seed})
    trained = fedpriv.sweep(here, {}, [seed], run_dir=f"runs/real-digits/{speaker or 'recordings'}")
    errors = (
        trained.wer.iloc[0],
        here.evaluate()["wer"],
        here.evaluate(starts[seed].model())["wer"],
    )
    where = f"held-out speaker {speaker}" if speaker else "held-out recordings"
    return [(model, where, seed, wer) for model, wer in zip(MODELS, errors, strict=True)]


def figure(results: pd.DataFrame) -> Figure:
    plotted, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    places = results["measured on"].str.removeprefix("held-out ").str.replace("speaker ", "")
    for model, colour in MODELS.items():
        rows = results["trained on"] == model
        axes.plot(places[rows], 100 * results.wer[rows], "o", color=colour, label=model)
    axes.set(ylabel="word error rate, %", xlabel="held out: some recordings, or one speaker")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    axes.legend(title="trained on speech that is", frameon=False, fontsize=8, **place)
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    index, columns = ["measured on", "seed"], "trained on"
    return (100 * results.pivot(index=index, columns=columns, values="wer")).round(1)


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
