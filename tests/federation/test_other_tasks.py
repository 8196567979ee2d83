"""Whole runs of tasks other than those of images and speech, in this process."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from in_process import SMALL, train_small

from fedpriv.data.content import Content
from fedpriv.data.facts import UNCHECKED, DataFacts
from fedpriv.data.federated import Examples
from fedpriv.data.options import DataOptions
from fedpriv.data.registry import DATASETS
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import write_report

USERS, LENGTH, LETTERS = 40, 12, 6


@dataclass(frozen=True, eq=False)
class MadeUp:
    """Users whose examples are drawn from a generator of their own."""

    task: str
    classes: int
    input_shape: tuple[int, ...]
    population: int = USERS
    description: str = "made up"
    sizes: str = ""
    facts: DataFacts = UNCHECKED

    @property
    def user_ids(self) -> Sequence[str]:
        return [f"user-{number}" for number in range(self.population)]

    def user(self, index: int) -> Examples:
        generator = torch.Generator().manual_seed(index)
        if self.task == "regression":
            inputs = torch.randn(6, *self.input_shape, generator=generator)
            return Examples(inputs, 3 * inputs.mean(dim=(1, 2, 3)))
        # Each letter is followed by the next one, so that there is something to learn.
        first = torch.randint(LETTERS, (6, 1), generator=generator)
        tokens = (first + torch.arange(LENGTH + 1)) % LETTERS
        return Examples(tokens[:, :-1].clone(), tokens[:, 1:].clone())

    def evaluation(self):
        yield self.user(1000)

    def digest(self) -> str:
        content = Content(self.task)
        for user_id in self.user_ids:
            content.add_user(user_id, 6)
        return content.hexdigest()


@pytest.fixture
def made_up(monkeypatch):
    sets = {
        "numbers": MadeUp("regression", 1, (1, 8, 8)),
        "letters": MadeUp("next_token", LETTERS, (LENGTH,)),
    }
    for name, made in sets.items():

        def build(options: DataOptions, seed: int, made: MadeUp = made) -> MadeUp:
            return made

        monkeypatch.setitem(DATASETS.registered, name, build)


GPT = {"name": "gpt", "dim": 16, "depth": 1, "heads": 2}


@pytest.mark.parametrize(
    ("name", "model", "key", "shown"),
    [
        ("numbers", SMALL["model"], "rmse", "root mean squared error"),
        ("letters", GPT, "perplexity", "perplexity"),
    ],
)
def test_a_run_measures_its_own_quality_and_reports_it(made_up, tmp_path, name, model, key, shown):
    changes = {
        "data": {"name": name, "users": USERS},
        "model": model,
        "rounds": 12,
        "privacy__noise_multiplier": 0.01,
        "privacy__clipping__bound": 1.0,
        "local__lr": 0.1 if key == "rmse" else 0.5,
    }
    directory, prepared = train_small(tmp_path / "run", **changes)
    run = read_run(directory.path)
    measured = run.measured
    assert measured.quality == prepared.trainer.task.quality
    assert measured.quality.key == key
    assert math.isfinite(measured.final)
    assert measured.final < measured.values[0]
    text = write_report([directory.path], tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"Held-out {shown}" in text
    assert "accuracy by round" not in text
