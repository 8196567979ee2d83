import pytest
import torch

from fedpriv.errors import InputError
from fedpriv.training.device import set_tf32


def test_tf32_is_refused_where_there_is_none():
    with pytest.raises(InputError, match="write float32 or bfloat16"):
        set_tf32(True, torch.device("cpu"))
    set_tf32(False, torch.device("cpu"))


@pytest.mark.parametrize(("wanted", "precision"), [(True, "tf32"), (False, "ieee")])
def test_tf32_is_a_setting_of_the_process(wanted, precision):
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        set_tf32(wanted, torch.device("cuda"))
        assert products.fp32_precision == precision
    finally:
        products.fp32_precision = before
