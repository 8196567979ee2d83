"""Folders of made-up MNIST images by named writers, for the data set `mnist_writers`."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def idx_file(path: Path, array: np.ndarray) -> None:
    """Write an array of bytes or of int32 as an idx file."""
    code, dtype = (0x08, ">u1") if array.dtype == np.uint8 else (0x0C, ">i4")
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(dtype).tobytes())


def images_of(writer: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A writer's images, 8 by 8, and labels: of any two counts the smaller is the beginning."""
    drawn = np.random.default_rng(writer)
    pairs = [(drawn.integers(0, 256, (8, 8)), drawn.integers(0, 10)) for _ in range(count)]
    images, labels = zip(*pairs, strict=True)
    return np.array(images, np.uint8), np.array(labels, np.uint8)


def write_writers(folder: Path, counts: Mapping[int, int], labels: Mapping[int, int] = {}) -> Path:
    """Write `counts[w]` images of each writer w; `labels` replaces the first label of some."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {writer: images_of(writer, count) for writer, count in counts.items()}
    for writer, label in labels.items():
        made[writer][1][0] = label
    images = np.concatenate([made[writer][0] for writer in counts])
    classes = np.concatenate([made[writer][1] for writer in counts])
    rows = np.zeros((len(classes), 8), np.int32)
    rows[:, 0], rows[:, 2] = classes, np.repeat(list(counts), list(counts.values()))
    idx_file(folder / "train-images-idx3-ubyte", images)
    idx_file(folder / "train-labels-idx1-ubyte", classes)
    idx_file(folder / "qmnist-train-labels-idx2-int", rows)
    test_images, test_labels = images_of(0, 40)
    idx_file(folder / "t10k-images-idx3-ubyte", test_images)
    idx_file(folder / "t10k-labels-idx1-ubyte", test_labels)
    return folder


def by_writers(folder: Path, **data: Any) -> dict[str, Any]:
    """What makes `small_config` read such a folder."""
    section = {"name": "mnist_writers", "partition": {"kind": "natural"}, "path": str(folder)}
    return {"data": {**section, **data}}
