"""The MNIST digits: counts, pixels and the split."""

import hashlib

import numpy as np
import pytest
import torch

from effnlp_lessons.datasets import digits


@pytest.fixture(scope="module")
def loaded() -> digits.Digits:
    return digits.load_digits()


def test_counts_and_types(loaded):
    assert len(loaded) == 5_000
    assert loaded.images.shape == (5_000, 28, 28) and loaded.images.dtype == torch.uint8
    assert loaded.labels.shape == (5_000,) and loaded.labels.dtype == torch.int64
    assert loaded.labels.bincount().tolist() == [500] * 10


def test_split_is_even_over_the_digits(loaded):
    train, test = loaded.subset("train"), loaded.subset("test")
    assert (len(train), len(test)) == (4_000, 1_000)
    assert train.labels.bincount().tolist() == [400] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    torch.testing.assert_close(train.images, loaded.images[torch.from_numpy(loaded.split == "train")])
    assert set(test.split) == {"test"}
    fingerprint = hashlib.sha256("\n".join(loaded.split).encode()).hexdigest()
    assert fingerprint[:16] == "b11a33a009060438"  # stored results rely on it
    with pytest.raises(ValueError, match="split must be one of train, test, got 'dev'"):
        loaded.subset("dev")


def test_no_image_is_in_both_splits(loaded):
    images = {split: {i.numpy().tobytes() for i in loaded.subset(split).images} for split in digits.SPLITS}
    assert not images["train"] & images["test"]


def test_images_stand_upright(loaded):
    """Ink lies in the middle; a one is higher than wide, and its rows and columns are not exchanged."""
    assert int(loaded.images.max()) == 255 and int(loaded.images.min()) == 0
    border = torch.ones(28, 28, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert (loaded.images[:, border] == 0).float().mean() > 0.99
    ink = loaded.images > 127
    ones = ink[loaded.labels == 1]
    height, width = ones.any(dim=2).sum(dim=1).float().mean(), ones.any(dim=1).sum(dim=1).float().mean()
    assert height > 1.5 * width


def test_equal_images_in_two_splits_are_refused():
    labels = np.repeat(np.arange(10), 101)
    pixels = np.arange(10 * 101, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    assert (digits._split(pixels, labels) == "test").sum() == 1_000
    with pytest.raises(ValueError, match="two equal images of the digit 0"):
        digits._split(np.zeros_like(pixels), labels)
