"""A data set from outside: a folder of PNG files for each person, `ann/7_3.png` being a seven."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fedpriv.data import PartitionedImages
from fedpriv.data.facts import DataFacts
from fedpriv.data.federated import LabelledImages, PixelScale

HELD_OUT = "held_out"


def people(path: Path, classes: int = 10) -> PartitionedImages:
    """Make each folder a user but `held_out`, whose images nobody holds."""
    files = {folder.name: sorted(folder.glob("*.png")) for folder in sorted(path.iterdir())}
    held_out = read(files.pop(HELD_OUT))
    pool = read([file for each in files.values() for file in each])
    sizes = [len(each) for each in files.values()]
    return PartitionedImages(
        pool=pool,
        parts=np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]),
        user_ids=tuple(files),
        held_out=held_out,
        scale=PixelScale(maximum=255, mean=0.5, std=0.5),
        classes=classes,
        description=f"PNG folders; {len(held_out)} held-out images",
        facts=DataFacts(users="person", example="image", held_out="unknown", public="none"),
    )


def read(files: list[Path]) -> LabelledImages:
    """Return the images in grey, `[n, 1, height, width]`, and the labels in their names."""
    grey = [np.asarray(Image.open(file).convert("L")) for file in files]
    labels = [int(file.name.split("_")[0]) for file in files]
    return LabelledImages(torch.from_numpy(np.stack(grey))[:, None], torch.tensor(labels))
