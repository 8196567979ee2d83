"""A small folder of made-up images in MNIST's format, written byte by byte."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

WRITERS = np.repeat([7, 3, 11, 2000, 42, 5, 9, 13, 95, 21], [4, 7, 6, 5, 6, 4, 5, 6, 4, 13])
"""The writer of each of the 60 training images."""


def idx_bytes(array: np.ndarray) -> bytes:
    code, dtype = (0x08, ">u1") if array.dtype == np.uint8 else (0x0C, ">i4")
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(dtype).tobytes()


def write_split(folder: Path, split: str, labels: np.ndarray) -> None:
    """Every pixel of image i is i, so that an image can be told from its pixels."""
    images = np.tile(np.arange(len(labels), dtype=np.uint8)[:, None, None], (1, 4, 6))
    (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx_bytes(labels.astype(np.uint8)))


@pytest.fixture
def labels() -> np.ndarray:
    return np.arange(60) % 10


@pytest.fixture
def split_writer(tmp_path: Path) -> Callable[[str, np.ndarray], Path]:
    def write(split: str, labels: np.ndarray) -> Path:
        write_split(tmp_path, split, labels)
        return tmp_path

    return write


@pytest.fixture
def mnist_folder(tmp_path: Path, labels: np.ndarray) -> Path:
    """60 training and 20 test images of 4x6 pixels, with writers as QMNIST gives them."""
    write_split(tmp_path, "train", labels)
    write_split(tmp_path, "t10k", labels[:20])
    rows = np.zeros((60, 8), dtype=np.int32)
    rows[:, 0], rows[:, 2] = labels, WRITERS
    (tmp_path / "qmnist-train-labels-idx2-int").write_bytes(idx_bytes(rows))
    return tmp_path


@pytest.fixture
def writers() -> np.ndarray:
    return WRITERS
