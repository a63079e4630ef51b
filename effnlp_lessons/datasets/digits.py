"""5,000 digits of MNIST (LeCun et al. 1998), 500 of each, with a fixed split into 4,000 and 1,000.

The split depends on the images alone: of each digit, the 100 images whose sha256 comes first are the test
set.
"""

import gzip
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from effnlp_lessons.datasets import sources

SPLITS = ("train", "test")
CLASSES = 10
TEST_PER_CLASS = 100


@dataclass(frozen=True)
class Digits:
    """Images and labels, row by row.

    Attributes:
        images: pixels from 0 (background) to 255 (ink).
        labels: the digit shown.
        split: "train" or "test"; str array (rows,).
    """

    images: UInt8[Tensor, "rows 28 28"]
    labels: Int64[Tensor, " rows"]
    split: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, split: str) -> "Digits":
        """Return the rows of one split, in file order.

        Raises:
            ValueError: if `split` is neither train nor test.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        rows = self.split == split
        chosen = torch.from_numpy(rows)
        return Digits(self.images[chosen], self.labels[chosen], self.split[rows])


def load_digits() -> Digits:
    """Return all 5,000 digits in the order of the file, sorted by label.

    Raises:
        SourceError: if the data have not been prepared.
    """
    with gzip.open(sources.path("mnist5k", "mnist_5k.csv.gz"), "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :-1], table[:, -1].astype(np.int64)
    split = _split(pixels, labels)
    return Digits(torch.from_numpy(pixels.reshape(-1, 28, 28).copy()), torch.from_numpy(labels), split)


def _split(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the split of each row; raise ValueError if equal images of a digit fall into both splits."""
    split = np.full(len(labels), "train")
    for digit in range(CLASSES):
        keyed = sorted((hashlib.sha256(pixels[row].tobytes()).digest(), row) for row in np.flatnonzero(labels == digit))
        if keyed[TEST_PER_CLASS - 1][0] == keyed[TEST_PER_CLASS][0]:
            raise ValueError(f"two equal images of the digit {digit} fall into train and test")
        split[[row for _, row in keyed[:TEST_PER_CLASS]]] = "test"
    return split
