import numpy as np
import torch
from held_out import held_out
from schema import data_options
from sklearn.datasets import load_digits

from fedpriv.data import build_dataset
from fedpriv.data.digits import load_digits_pool


def as_rows(images: torch.Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in images.flatten(1)]


def test_split_sizes_and_classes():
    pool = load_digits_pool()
    assert (len(pool.training), len(pool.test)) == (1500, 297)
    expected = np.bincount(load_digits().target) * 297 / 1797
    held = np.bincount(pool.test.labels.numpy())
    assert np.abs(held - expected).max() <= 1


def test_training_and_test_images_are_the_published_ones_each_once():
    pool = load_digits_pool()
    both = torch.cat([pool.training.images, pool.test.images])
    published = torch.from_numpy(load_digits().images.astype(np.uint8)).unsqueeze(1)
    assert sorted(as_rows(both)) == sorted(as_rows(published))


def test_pixels_are_scaled_by_the_stated_constants():
    dataset = build_dataset(data_options(users=1), seed=0)
    inputs = torch.cat([dataset.user(0).inputs, held_out(dataset).inputs])
    torch.testing.assert_close(inputs.min(), torch.tensor(-0.75))
    torch.testing.assert_close(inputs.max(), torch.tensor(1.75))
    assert abs(inputs.mean()) < 0.05
    raw = load_digits().images
    torch.testing.assert_close(
        inputs.mean(), torch.tensor((raw.mean() / 16 - 0.3) / 0.4, dtype=torch.float32)
    )
