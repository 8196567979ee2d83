"""Tests of what a GPU does: on the device that FEDPRIV_TEST_DEVICE names, the CPU by default."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(os.environ.get("FEDPRIV_TEST_DEVICE", "cpu"))
