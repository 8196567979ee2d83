import math

import pytest
import torch
from torch import nn

from fedpriv.data.federated import Examples
from fedpriv.tasks.regression import Regression

TASK = Regression()


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("flat", [True, False])
def test_losses_are_mean_squared_errors(outputs, flat):
    torch.manual_seed(1)
    model = nn.Linear(4, outputs)
    targets = torch.randn(5) if flat and outputs == 1 else torch.randn(5, outputs)
    batch = Examples(torch.randn(5, 4), targets)
    found = TASK.losses(model, batch)
    for row in range(5):
        errors = model(batch.inputs[row]) - targets[row]
        assert float(found[row]) == pytest.approx(float((errors**2).mean()), rel=1e-5)


def test_measures_are_those_of_all_examples_together():
    torch.manual_seed(2)
    model = nn.Linear(2, 1)
    parts = [Examples(torch.randn(n, 2), torch.randn(n)) for n in (3, 5)]
    measured = TASK.measure(model, parts, batch_size=2)
    errors = torch.cat([model(part.inputs)[:, 0] - part.targets for part in parts]).double()
    assert measured["mae"] == pytest.approx(float(errors.abs().mean()))
    assert measured["rmse"] == pytest.approx(math.sqrt(float((errors**2).mean())))
    assert TASK.quality.text(measured) == f"RMSE {measured['rmse']:.4g}"
    assert not TASK.quality.higher_is_better


def test_another_number_of_outputs_than_targets_is_no_broadcast():
    with pytest.raises(RuntimeError):
        TASK.losses(nn.Linear(2, 3), Examples(torch.zeros(4, 2), torch.zeros(4)))
