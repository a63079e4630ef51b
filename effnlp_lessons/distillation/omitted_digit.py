"""The experiment with a digit that the student never sees (Hinton, Vinyals, Dean 2015, 1503.02531, sec. 3).

One class is taken out of the transfer set. What the student knows of it comes from the soft targets of the others.
Its bias for that class is too low, since the class was never right; raising it shows what was learned.

NOTE the paper's teacher also had a bound on its weights and input images moved by up to two pixels; ours has dropout
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from effnlp_lessons.datasets.digits import CLASSES, Digits


class DigitExamples:
    """Digits as examples for `training.train`: a batch is (pixels in [0, 1] (batch, 784), labels).

    `keep` says which rows are there (True), by default all.
    """

    def __init__(self, digits: Digits, keep: Bool[Tensor, " rows"] | None = None) -> None:
        keep = torch.ones(len(digits), dtype=torch.bool) if keep is None else keep
        self.pixels = digits.images[keep].flatten(1).float() / 255
        self.labels = digits.labels[keep]
        self.lengths = [1] * len(self.labels)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.pixels[indices], self.labels[indices]


def digit_network(hidden: Sequence[int] = (800, 800), dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Pixels (batch, 784) to logits (batch, 10): linear layers with ReLU and dropout between; the last is `[-1]`.

    The paper's student has hidden layers (800, 800), its teacher (1200, 1200) with dropout (sec. 3). Weights are
    normal(0, 2 / inputs) from `seed`, biases zero.

    Raises:
        ValueError: a hidden size below 1.
    """
    if any(size < 1 for size in hidden):
        raise ValueError(f"hidden must hold sizes >= 1, got {tuple(hidden)}")
    generator = torch.Generator().manual_seed(seed)
    sizes, layers = [28 * 28, *hidden, CLASSES], []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        linear = nn.Linear(inputs, outputs)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


def rows_without(labels: Int[Tensor, " rows"], *omitted: int) -> Bool[Tensor, " rows"]:
    """True for the rows that stay in a transfer set from which the omitted classes are taken out (sec. 3)."""
    return ~torch.isin(labels, torch.tensor(omitted, dtype=labels.dtype))


def shift_bias_(linear: nn.Linear, index: int, amount: float) -> None:
    """Add `amount` to the bias of one class, in place: every logit of that class rises by it (sec. 3).

    Raises:
        ValueError: a layer without biases, or without this class.
    """
    if linear.bias is None:
        raise ValueError("linear must have a bias")
    if not 0 <= index < linear.out_features:
        raise ValueError(f"index must be in 0 .. {linear.out_features - 1}, got {index}")
    with torch.no_grad():
        linear.bias[index] += amount
