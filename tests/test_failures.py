"""What code from outside raises, in a line; what is not its fault passes as it is."""

import json

import pytest
import torch

from fedpriv.errors import BudgetError, InputError
from fedpriv.failures import failure_of, told_as


def test_a_failure_is_told_with_the_line_of_its_code():
    with (
        pytest.raises(
            InputError, match=r"^its key: mine fails: Expecting value: .* \(decoder\.py,"
        ),
        told_as("its key: mine fails"),
    ):
        json.loads("nothing")


def test_a_call_that_does_not_fit_has_no_line_of_ours():
    with pytest.raises(InputError) as told, told_as("its key: mine fails"):
        test_a_call_that_does_not_fit_has_no_line_of_ours(1)
    assert str(told.value).endswith("takes 0 positional arguments but 1 was given")
    assert isinstance(told.value.__cause__, TypeError)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("RAM"),
        torch.OutOfMemoryError("that of a GPU"),
        BudgetError("said already"),
        InputError("said already"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_not_its_fault_passes(error):
    with pytest.raises(type(error)) as passed, told_as("its key: mine fails"):
        raise error
    assert passed.value is error


def test_what_says_nothing_is_told_by_its_kind():
    with pytest.raises(ZeroDivisionError) as raised:
        raise ZeroDivisionError
    assert failure_of(raised.value).startswith("ZeroDivisionError (test_failures.py, line ")
