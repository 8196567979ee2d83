"""The examples in docstrings of the privacy package say what comes out."""

import doctest
import importlib

import pytest

EXAMPLES = {"accounting": 12, "calibration": 4, "charging": 10, "clipping": 3, "sampling": 4}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_come_out_as_written(name):
    module = importlib.import_module(f"fedpriv.privacy.{name}")
    assert doctest.testmod(module) == (0, EXAMPLES[name])
