"""Code from outside in which the examples of a batch meet: no user may reach another by it."""

from pathlib import Path

import pytest
import torch
from in_process import SILOS, small_config

from fedpriv.errors import InputError
from fedpriv.federation.builders import build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.training.cohort import train_cohort

OUTSIDE = {"code": str(Path(__file__).parent.parent / "outside")}
MODELS = ["plain", "centred", "batch_norm", "dropout", "zero_head"]
CASES = [*((model, "classification") for model in MODELS), ("plain", "mixing:relative")]


def built(model="plain", task="classification", **changes):
    changes = {**OUTSIDE, "model": {"name": f"mixing:{model}"}, "task": task, **changes}
    return build_trainer(small_config(**changes))


@pytest.mark.parametrize(
    ("model", "task"),
    [*((name, "classification") for name in MODELS), ("plain", "mixing:relative")],
)
def test_one_person_less_leaves_the_others_as_they_are(model, task):
    trainer = built(model, task)
    start = Layout.of(trainer.model).join(parameters_of(trainer.model))
    whole = train_cohort(trainer, start, range(6), round_=1).total
    less = train_cohort(trainer, start, range(5), round_=1).total
    alone = train_cohort(trainer, start, [5], round_=1).total
    torch.testing.assert_close(whole - less, alone, rtol=0, atol=1e-6)
    assert (trainer.stacked is not None) == (model == "plain" and task == "classification")


@pytest.mark.parametrize("grid", [False, True])
def test_a_model_that_keeps_something_of_a_batch_is_refused(grid):
    with pytest.raises(InputError, match="would carry one user's data to another"):
        built("remembering", runtime__deployment=grid, data__users=60)


@pytest.mark.parametrize("model", ["centred", "batch_norm", "zero_head"])
def test_examples_that_meet_cannot_be_bounded_alone(model):
    with pytest.raises(InputError, match="no example's gradient can be bounded alone"):
        built(model, **SILOS)


@pytest.mark.parametrize("model", ["plain", "dropout"])
def test_examples_that_do_not_meet_can(model):
    assert built(model, **SILOS).model is not None


def test_a_task_with_one_loss_for_all_is_refused():
    with pytest.raises(InputError, match=r"Mean returns losses \[\].* one for each"):
        built(task="mixing:mean")
