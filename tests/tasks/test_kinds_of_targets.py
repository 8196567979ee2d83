"""A task refuses data whose targets are of another kind, in one line and before a round."""

import pytest
import torch
from own_data import WRITERS, document_of
from torch import nn

from fedpriv.config_files import parse_config
from fedpriv.data.federated import Examples
from fedpriv.data.utterances import Utterances
from fedpriv.errors import InputError
from fedpriv.experiment import prepare
from fedpriv.tasks.classification import Classification
from fedpriv.tasks.next_token import NextToken
from fedpriv.tasks.registry import TASKS, build_task
from fedpriv.tasks.regression import Regression

TOKENS = torch.arange(12).reshape(3, 4)
#: By the task that they are for.
BATCHES = {
    "classification": Examples(torch.zeros(3, 2), torch.tensor([0, 1, 1])),
    "regression": Examples(torch.zeros(3, 2), torch.zeros(3, 1)),
    "next_token": Examples(TOKENS, TOKENS + 1),
    "recognition": Utterances(
        torch.zeros(3, 8), torch.full((3,), 8), torch.ones(3, 3).long(), torch.full((3,), 3)
    ),
}
OWN = {"classification": Classification(), "regression": Regression(), "next_token": NextToken()}


@pytest.mark.parametrize("task", OWN)
@pytest.mark.parametrize("data", BATCHES)
def test_a_task_takes_its_own_kind_alone(task, data):
    if task == data:
        assert len(OWN[task].prepare(nn.Identity(), BATCHES[data])) == 3
        return
    with pytest.raises(InputError, match=task) as caught:
        OWN[task].prepare(nn.Identity(), BATCHES[data])
    assert "\n" not in str(caught.value)


def test_recognition_is_for_what_has_an_alphabet():
    options = TASKS.parse({"name": "recognition"})
    with pytest.raises(InputError, match=r"task\.name: recognition is for data sets of speech"):
        build_task(options, dataset=object(), decode=None, spec_augment=None)


@pytest.mark.parametrize(
    ("case", "task", "targets"),
    [
        ("image_folder", "regression", r"int64 \[4\]"),
        ("table", "regression", r"int64 \[12\]"),
        ("table of numbers", "classification", r"float32 \[12, 2\]"),
        ("text", "classification", r"int64 \[\d+, 16\]"),
        ("table", "next_token", "float32"),
    ],
)
def test_data_of_another_kind_end_a_run_before_it_begins(
    case, task, targets, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    WRITERS[case](tmp_path / "data")
    config = parse_config({**document_of(case), "task": {"name": task}})
    with pytest.raises(InputError, match=rf"{task} .*{targets}"):
        prepare(config)
