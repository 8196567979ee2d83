"""Image folders in MNIST's format: MNIST, Fashion-MNIST, EMNIST."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedpriv.data.federated import LabelledImages, PartitionedImages, PixelScale
from fedpriv.data.files import visible
from fedpriv.data.idx import find_idx, read_idx
from fedpriv.data.options import FolderOptions
from fedpriv.data.parts import named_path, require_folder
from fedpriv.data.sources import ImageSource, federate
from fedpriv.errors import InputError

MNIST_SCALE = PixelScale(maximum=255, mean=0.1307, std=0.3081)
"""MNIST's customary constants, used for every folder so that none is measured on users."""

MNIST_HOME = "MNIST: yann.lecun.com/exdb/mnist mirror"
IDX_HOMES = (
    f"{MNIST_HOME}; Fashion-MNIST: github.com/zalandoresearch/fashion-mnist; "
    "EMNIST: NIST special database 19 page"
)
TRAINING_IMAGES = "train-images-idx3-ubyte"

MOST_WRONG = 0.5
"""From more than this share of wrong training labels on they are another data set's."""


@dataclass(frozen=True)
class LabelRange:
    """Labels on file are `first` to `first + classes - 1`; targets count from 0."""

    first: int
    classes: int


DIGIT_LABELS = LabelRange(first=0, classes=10)
EMNIST_LABELS = {
    "emnist-byclass-": LabelRange(first=0, classes=62),
    "emnist-bymerge-": LabelRange(first=0, classes=47),
    "emnist-balanced-": LabelRange(first=0, classes=47),
    "emnist-letters-": LabelRange(first=1, classes=26),
    "emnist-digits-": DIGIT_LABELS,
    "emnist-mnist-": DIGIT_LABELS,
}


def build_idx_images(options: FolderOptions, seed: int) -> PartitionedImages:
    """Deal the images of the folder `data.path` to made-up users: any partition but natural.

    Where a folder holds several sets of files (EMNIST), the path names one of them by its
    prefix, as in `emnist/emnist-letters`; names without a prefix come first.
    Images are kept as distributed; EMNIST's are transposed.
    Raises InputError for a missing folder or file and for wrong content.
    """
    what = f"the folder of {options.name}, with {TRAINING_IMAGES} and the others ({IDX_HOMES})"
    folder, prefix = _locate(named_path(options.path, what))
    require_folder(folder, what)
    labels = EMNIST_LABELS.get(prefix, DIGIT_LABELS)
    test = f"{prefix}test" if prefix in EMNIST_LABELS else f"{prefix}t10k"
    splits = (f"{prefix}train", test)
    require_files(folder, [name for split in splits for name in image_files(split)], IDX_HOMES)
    source = ImageSource(
        title=f"{prefix.rstrip('-') or folder.resolve().name} (images in idx files)",
        training=read_images(folder, splits[0], labels),
        test=read_images(folder, splits[1], labels, most_wrong=0),
        classes=labels.classes,
        scale=MNIST_SCALE,
    )
    return federate(source, options, seed)


def require_files(folder: Path, names: list[str], homes: str) -> None:
    """Raise InputError, listing what is missing, unless the folder holds all the idx files."""
    missing = [name for name in names if find_idx(folder / name) is None]
    if missing:
        raise InputError(
            f"data.path: {folder} lacks {', '.join(missing)} "
            f"(each plain or .gz); publicly distributed at {homes}"
        )


def image_files(split: str) -> list[str]:
    """Name the image and the label file of a split, such as `train` or `t10k`."""
    return [f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"]


def read_images(
    folder: Path, split: str, labels: LabelRange, most_wrong: float = MOST_WRONG
) -> LabelledImages:
    """Read one split as uint8 images `[n, 1, height, width]` and int64 labels from 0.

    Labels outside the range are left to whoever builds a user: they belong to one person's
    examples. More than the share `most_wrong` of them belong to another data set.
    Raises InputError, naming the file, for malformed files, no images, unequally many images and
    labels, and too many wrong labels.
    """
    image_path, label_path = (folder / name for name in image_files(split))
    images, targets = read_idx(image_path), read_idx(label_path)
    if images.dtype != np.uint8 or images.ndim != 3 or images.size == 0:
        raise InputError(
            f"{image_path}: expected uint8 images [n, height, width], "
            f"found {images.dtype} {list(images.shape)}"
        )
    if targets.shape != images.shape[:1]:
        raise InputError(
            f"{label_path}: expected {len(images)} labels as in {image_path.name}, "
            f"found shape {list(targets.shape)}"
        )
    checked = _targets(label_path, targets.astype(np.int64), labels, most_wrong)
    return LabelledImages(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(checked))


def _targets(
    path: Path, on_file: NDArray[np.int64], labels: LabelRange, most_wrong: float
) -> NDArray[np.int64]:
    targets = on_file - labels.first
    wrong = np.flatnonzero((targets < 0) | (targets >= labels.classes))
    if len(wrong) > most_wrong * len(targets):
        raise InputError(
            f"{path}: wrong label {on_file[wrong[0]]} at example {wrong[0]}: labels are "
            f"{labels.first} to {labels.first + labels.classes - 1} (wrong ones: {len(wrong)})"
        )
    return targets


def _locate(path: Path) -> tuple[Path, str]:
    """Split the path into a folder and the prefix of its file names ("" for MNIST's own)."""
    if not path.is_dir():
        named = path.name + "-"
        known = named in EMNIST_LABELS or named in _prefixes(path.parent)
        return (path.parent, named) if known else (path, "")
    prefixes = _prefixes(path)
    if "" in prefixes or not prefixes:
        return path, ""
    if len(prefixes) > 1:
        choices = ", ".join(str(path / prefix.rstrip("-")) for prefix in prefixes)
        raise InputError(f"data.path: {path} holds several sets of images; name one: {choices}")
    return path, prefixes[0]


def _prefixes(folder: Path) -> list[str]:
    """List what stands before `train-images-idx3-ubyte` in the names of the folder's files."""
    names = {entry.name.removesuffix(".gz") for entry in visible(folder)}
    return sorted(n.removesuffix(TRAINING_IMAGES) for n in names if n.endswith(TRAINING_IMAGES))
