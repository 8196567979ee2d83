"""Compiled loops: where their machine code is kept, and which tensors they are given."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpriv import compilation
from fedpriv.compilation import compiled, is_compiled_for
from fedpriv.privacy import row_sums
from fedpriv.privacy.clipping import GlobalClipping, PerLayerClipping, clip_and_add
from fedpriv.privacy.moves import Moves

LOOP = """
def times(numbers, out):
    for i in range(len(numbers)):
        out[i] = {factor} * numbers[i]
"""


def doubled(numbers, out):
    for i in range(len(numbers)):
        out[i] = 2 * numbers[i]


def result_of(loop) -> list[float]:
    out = np.empty(3)
    compiled(loop)(np.arange(3.0), out)
    return out.tolist()


def written(path: Path, factor: int):
    """The loop of a file whose time stays the same whatever is written there."""
    path.write_text(LOOP.format(factor=factor))
    os.utime(path, (0, 0))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.times


@pytest.fixture
def caches(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


def test_machine_code_is_kept_and_found_again(caches):
    assert result_of(doubled) == [0, 2, 4]
    kept = {path: path.stat().st_mtime_ns for path in caches.rglob("*.nb?")}
    assert kept
    assert result_of(doubled) == [0, 2, 4]
    assert {path: path.stat().st_mtime_ns for path in caches.rglob("*.nb?")} == kept


def test_another_source_never_finds_the_old_machine_code(caches, tmp_path):
    results = [result_of(written(tmp_path / "loop_of_test.py", factor)) for factor in (2, 3)]
    assert results == [[0, 2, 4], [0, 3, 6]]
    assert len({path.parts[len(caches.parts) + 2] for path in caches.rglob("*.nbi")}) == 2


def test_a_loop_is_compiled_though_nothing_can_be_kept(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compilation._folder(doubled) is None
    assert result_of(doubled) == [0, 2, 4]


@pytest.mark.parametrize("users", [1, 2, 5])
def test_sums_are_only_ever_compiled_for_one_layout(users):
    """Two versions of one loop would lie side by side on the disk, each to be taken by its name."""
    blocks = [torch.ones(users, 3), torch.full((users, 2), 1e-3)]
    ends = torch.cat([block.flatten() for block in blocks])
    rule = PerLayerClipping(2.0**0.5, (1.0, 1.0))
    for updates in (blocks, Moves(torch.zeros(5), ends, [3, 2], users)):
        clip_and_add(updates, rule, torch.zeros(5, dtype=torch.float64))
    clip_and_add(blocks[:1], GlobalClipping(1.0), torch.zeros(3, dtype=torch.float64))
    for loop in (row_sums.square_sums, row_sums.add_weighted):
        assert len(loop.signatures) == 1


def test_only_contiguous_float32_on_a_processor_is_for_loops():
    x = torch.zeros(4, 6)
    assert is_compiled_for(x, x[1:])
    negated = torch.complex(x, x).conj().imag
    for other in (x.double(), x.bfloat16(), x.T, x[:, 1:], x.to("meta"), negated):
        assert not is_compiled_for(x, other)
