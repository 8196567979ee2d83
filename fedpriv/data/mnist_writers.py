"""MNIST with the people who wrote it: 539 NIST writers as users, by QMNIST's extended labels."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpriv.data.federated import PartitionedImages
from fedpriv.data.idx import read_idx
from fedpriv.data.idx_images import (
    DIGIT_LABELS,
    MNIST_HOME,
    MNIST_SCALE,
    MOST_WRONG,
    image_files,
    read_images,
    require_files,
)
from fedpriv.data.options import FolderOptions
from fedpriv.data.parts import require_path
from fedpriv.data.sources import ImageSource, federate
from fedpriv.errors import InputError

QMNIST_LABELS = "qmnist-train-labels-idx2-int"
WRITERS_HOMES = f"{MNIST_HOME}; QMNIST: github.com/facebookresearch/qmnist"
CLASS_COLUMN, WRITER_COLUMN = 0, 2

UNKNOWN = -1
"""The label of an image of which the files say different things."""


def build_mnist_writers(options: FolderOptions, seed: int) -> PartitionedImages:
    """Make each writer of MNIST's 60,000 training images a user; other partitions work too.

    `evaluation: test` evaluates on the 10,000 t10k images, of other writers. `evaluation:
    development` evaluates on every eighth training writer (ids ascending) and takes these out
    of the population, so that tuning sees neither the test images nor its own users.
    Raises InputError for a missing folder or file and for wrong content.
    """
    folder = require_path(options, WRITERS_HOMES)
    needed = [*image_files("train"), *image_files("t10k"), QMNIST_LABELS]
    require_files(folder, needed, WRITERS_HOMES)
    training = read_images(folder, "train", DIGIT_LABELS)
    writers, differing = read_writers(folder / QMNIST_LABELS, training.labels.numpy())
    training.labels[differing] = UNKNOWN
    source = ImageSource(
        title="mnist_writers (MNIST by NIST writer)",
        training=training,
        test=read_images(folder, "t10k", DIGIT_LABELS, most_wrong=0),
        classes=DIGIT_LABELS.classes,
        scale=MNIST_SCALE,
        writers=writers,
    )
    return federate(source, options, seed)


def read_writers(
    path: Path, labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read the NIST writer id of each training image, int64 `[n]`, and which classes differ.

    A class that is not the one in `labels` is one example's damage: nobody knows what is right.
    Raises InputError unless there is one row an image, and when most classes differ: rows in
    another order would give images to the wrong people.
    """
    rows = read_idx(path)
    if rows.ndim != 2 or len(rows) != len(labels) or rows.shape[1] <= WRITER_COLUMN:
        raise InputError(
            f"{path}: expected {len(labels)} rows of 8 columns, found shape {list(rows.shape)}"
        )
    differing = np.flatnonzero(rows[:, CLASS_COLUMN] != labels)
    if len(differing) > MOST_WRONG * len(labels):
        row = differing[0]
        raise InputError(
            f"{path}: QMNIST does not match MNIST: class {rows[row, CLASS_COLUMN]} at row {row} "
            f"where train-labels has {labels[row]} (rows that differ: {len(differing)})"
        )
    return rows[:, WRITER_COLUMN].astype(np.int64), differing
