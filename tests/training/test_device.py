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
        assert settings[0].fp32_precision == ("tf32" if wanted else "ieee")
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == wanted
    finally:
        for one, value in zip(settings, before, strict=True):
            one.allow_tf32 = value
