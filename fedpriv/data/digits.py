"""scikit-learn's digits: 1,797 images of 8x8 pixels, carried by scikit-learn itself."""

import numpy as np
import torch

from fedpriv.data.federated import LabelledImages, PartitionedImages, PixelScale
from fedpriv.data.options import DealtOptions
from fedpriv.data.sources import ImageSource, federate

DIGITS_TEST = 297
DIGITS_SCALE = PixelScale(maximum=16, mean=0.3, std=0.4)
"""Pixels 0..16 become -0.75..1.75 with mean near 0: rounded constants of the public data set."""


def load_digits_pool() -> ImageSource:
    """Load the digits as 1,500 training and 297 test images `[n, 1, 8, 8]`, uint8 in 0..16.

    The split is fixed: with the images sorted by label (otherwise in their published order), the
    test images are 297 evenly spaced ones, so that each class gives its share to within one.
    """
    # Imported here because scikit-learn takes long to import and other data sets need none of it.
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images.astype(np.uint8)).unsqueeze(1)
    everything = LabelledImages(images, torch.from_numpy(raw.target.astype(np.int64)))
    by_label = np.argsort(raw.target, kind="stable")
    held = by_label[np.arange(DIGITS_TEST) * len(by_label) // DIGITS_TEST]
    return ImageSource(
        title="digits (scikit-learn, 8x8 pixels)",
        training=everything.take(np.setdiff1d(by_label, held)),
        test=everything.take(np.sort(held)),
        classes=10,
        scale=DIGITS_SCALE,
    )


def build_digits(options: DealtOptions, seed: int) -> PartitionedImages:
    """Deal the digits to made-up users: any partition but natural."""
    return federate(load_digits_pool(), options, seed)
