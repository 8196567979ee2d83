import pytest
import torch

from fedpriv.errors import InputError
from fedpriv.training.device import set_tf32


def test_tf32_is_refused_where_there_is_none():
    with pytest.raises(InputError, match="write float32 or bfloat16"):
        set_tf32(True, torch.device("cpu"))
    set_tf32(False, torch.device("cpu"))


@pytest.mark.parametrize("wanted", [True, False])
def test_tf32_is_a_setting_of_the_process(wanted):
    """Of products and convolutions alike, and one that whoever exports a model can read."""
    settings = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [one.allow_tf32 for one in settings]
    try:
        set_tf32(wanted, torch.device("cuda"))
        assert [one.allow_tf32 for one in settings] == [wanted, wanted]
        rounded = (
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,
        )
        assert [each == "tf32" for each in rounded] == [wanted, wanted]
    finally:
        for one, value in zip(settings, before, strict=True):
            one.allow_tf32 = value
