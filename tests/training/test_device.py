import os
import platform
import resource
import subprocess
import sys

import pytest
import torch

from fedpriv.errors import InputError
from fedpriv.training.device import set_tf32

USE_TWICE = """
import resource, sys, torch
from fedpriv.training.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2**20) for _ in range(40)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(), faults()
print(faults())
"""


def faults_of_use(keep: str) -> int:
    command = [sys.executable, "-c", USE_TWICE, keep]
    # Written down, glibc's own values no longer move with what a process happens to do.
    own = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **own}
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_what_was_freed_is_used_again_without_new_pages():
    pages = 40 * 2**22 // resource.getpagesize()
    assert faults_of_use("keep") < 0.2 * pages < 0.9 * pages < faults_of_use("give back")


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
