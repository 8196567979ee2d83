import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpriv.data.federated import Examples
from fedpriv.training.evaluate import evaluate


@pytest.mark.parametrize("batch_size", [1, 7, 50, 1000])
def test_batches_do_not_change_the_measure(batch_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    examples = Examples(torch.randn(50, 4), torch.randint(0, 3, (50,)))
    with torch.no_grad():
        outputs = model[0](examples.inputs)
    measured = evaluate(model, examples, F.cross_entropy, batch_size)
    assert measured.loss == pytest.approx(float(F.cross_entropy(outputs, examples.targets)), 1e-5)
    right = int((outputs.argmax(1) == examples.targets).sum())
    assert measured.accuracy == right / 50
