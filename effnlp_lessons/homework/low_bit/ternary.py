"""Exercise 4 of notebook 04: ternary weights with a scale for every row.

TWN (Li, Zhang and Liu 2016, arXiv 1605.04711), as TernaryBERT (Zhang et al. 2020, arXiv 2009.12812) uses it for the
rows of the word embeddings.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int8
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number

Ternary = tuple[Float[Tensor, " rows"], Int8[Tensor, "rows columns"]]


def ternary_scale(weight: Float[Tensor, "rows columns"]) -> Ternary:
    """alpha (rows,) and b in {-1, 0, 1}: b = sign(w) where |w| > 0.7 mean|w|, alpha = mean|w| over these; by row.

    A row of zeros has alpha 0.
    """
    size = weight.abs()
    kept = size > 0.7 * size.mean(dim=1, keepdim=True)
    alpha = (size * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
    return alpha, (weight.sign() * kept).to(torch.int8)


def _threshold(weight: Tensor) -> Tensor:
    return 0.7 * weight.abs().mean(dim=1, keepdim=True)


def _over_the_kept(weight: Tensor, kept: Tensor) -> Tensor:
    return (weight.abs() * kept).sum(1) / kept.sum(1).clamp(min=1)


def _exchange(
    threshold: Callable[[Tensor], Tensor] = _threshold,
    scale: Callable[[Tensor, Tensor], Tensor] = _over_the_kept,
    kept: Callable[[Tensor, Tensor], Tensor] = lambda weight, threshold: weight.abs() > threshold,
    codes: Callable[[Tensor, Tensor], Tensor] = lambda weight, kept: weight.sign() * kept,
) -> Answer:
    """The answer with one step exchanged: threshold (rows, 1), alpha of (weight, kept), what is kept, or the codes."""

    def answer(weight: Tensor) -> Ternary:
        chosen = kept(weight, threshold(weight))
        return scale(weight, chosen), codes(weight, chosen).to(torch.int8)

    return answer


def _one_scale(weight: Tensor, kept: Tensor) -> Tensor:
    return (_over_the_kept(weight.reshape(1, -1), kept.reshape(1, -1))).expand(len(weight)).clone()


def _draw(kind: str = "", dtype: torch.dtype = torch.float32) -> Callable[[Generator], tuple]:
    """Random weights, rows of different size; kind "shifted" (more of one sign), "zeros" or "steps" (ties)."""

    def draw(generator: Generator) -> tuple:
        rows, columns = whole_number(2, 4, generator), whole_number(6, 11, generator)
        weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
        if kind == "shifted":
            weight += 0.7
        if kind == "steps":  # a mean of 2.5, 5, ...; one number is the threshold exactly
            row = torch.tensor([1.75, -3.0, 2.25, -1.75, 4.25, -2.0], dtype=dtype)
            weight = row[torch.stack([torch.randperm(6, generator=generator) for _ in range(rows)])]
        weight *= 2.0 ** torch.arange(rows)[:, None]
        if kind == "zeros":
            weight[whole_number(0, rows - 1, generator)] = 0
        return (weight,)

    return draw


TERNARY_SCALE = Exercise(
    id="low_bit.ternary_scale",
    title="ternary weights, row by row",
    minutes=15,
    difficulty=2,
    reference=ternary_scale,
    properties=(
        Property("by hand: one row", lambda generator: (torch.tensor([[0.9, -0.3, -1.1, 0.1, 0.5, -0.7]]),), times=1),
        Property("rows of different size", _draw(), times=2),
        Property("rows with more numbers of one sign", _draw("shifted"), times=1),
        Property("a number on the threshold is not kept", _draw("steps"), times=1),
        Property("a row of zeros has the scale 0", _draw("zeros"), times=1),
        Property("float64 stays float64", _draw(dtype=torch.float64), times=1),
    ),
    mistakes=(
        Mistake(
            "0.7 of the largest, not of the mean",
            "Only the few largest weights are kept then, and one outlier can make a whole row 0. The threshold is 0.7 "
            "times the mean of |w|.",
            _exchange(lambda weight: 0.7 * weight.abs().amax(1, keepdim=True)),
        ),
        Mistake(
            "The threshold is the mean",
            "It is 0.7 times the mean of |w|.",
            _exchange(lambda weight: weight.abs().mean(1, keepdim=True)),
        ),
        Mistake(
            "The mean of the weights, not of their sizes",
            "Positive and negative weights cancel in it. The threshold is 0.7 times the mean of |w|.",
            _exchange(lambda weight: 0.7 * weight.mean(1, keepdim=True)),
        ),
        Mistake(
            "The root mean square",
            "The threshold is 0.7 times the mean of |w|; a standard deviation is larger.",
            _exchange(lambda weight: 0.7 * weight.square().mean(1, keepdim=True).sqrt()),
        ),
        Mistake(
            "One threshold and one scale for the whole matrix",
            "Rows of small weights then become 0. Take both means over each row.",
            _exchange(lambda weight: 0.7 * weight.abs().mean(), _one_scale),
        ),
        Mistake(
            "One threshold for the whole matrix",
            "Rows of small weights then become 0. Take the mean of |w| over each row.",
            _exchange(lambda weight: 0.7 * weight.abs().mean()),
        ),
        Mistake(
            "One scale for the whole matrix",
            "alpha is the mean of the kept |w| of each row.",
            _exchange(scale=_one_scale),
        ),
        Mistake(
            "The scale is a mean over all weights",
            "The weights that become 0 do not need alpha: it is the mean over the kept ones, and larger.",
            _exchange(scale=lambda weight, kept: weight.abs().mean(1)),
        ),
        Mistake(
            "The kept weights are divided by the number of all",
            "Divide the sum by the number of weights that are kept.",
            _exchange(scale=lambda weight, kept: (weight.abs() * kept).mean(1)),
        ),
        Mistake(
            "The scale is a mean of the weights, not of their sizes",
            "Positive and negative weights cancel. The sign is in b already: alpha is the mean of |w|.",
            _exchange(scale=lambda weight, kept: (weight * kept).sum(1) / kept.sum(1).clamp(min=1)),
        ),
        Mistake(
            "The scale is the largest weight",
            "alpha stands for all kept weights: their mean makes the squared error smallest.",
            _exchange(scale=lambda weight, kept: (weight.abs() * kept).amax(1)),
        ),
        Mistake(
            "The scale is the threshold",
            "alpha is the mean of the kept |w|, and all of them are larger than the threshold.",
            _exchange(scale=lambda weight, kept: _threshold(weight)[:, 0]),
        ),
        Mistake(
            "A row of zeros becomes NaN",
            "Nothing is kept there, and 0 / 0 is NaN. The row of [PAD] is such a row. Divide by at least 1.",
            _exchange(scale=lambda weight, kept: (weight.abs() * kept).sum(1) / kept.sum(1)),
        ),
        Mistake(
            "A number on the threshold is kept",
            "Kept is what is larger: > and not >=. A row of zeros would be kept as a whole.",
            _exchange(kept=lambda weight, threshold: weight.abs() >= threshold),
        ),
        Mistake(
            "Negative weights are never kept",
            "Compare |w| with the threshold, not w. b is -1 for a large negative weight.",
            _exchange(kept=lambda weight, threshold: weight > threshold),
        ),
        Mistake(
            "The sign is lost",
            "b is sign(w) where the weight is kept: -1 for a negative one.",
            _exchange(codes=lambda weight, kept: kept),
        ),
        Mistake(
            "Nothing becomes 0",
            "b is 0 where |w| is not above the threshold.",
            _exchange(codes=lambda weight, kept: weight.sign()),
        ),
    ),
    hints=(
        "For one row: the sizes |w|, their mean, 0.7 times that. Which weights are larger in size? Over these the "
        "second mean is taken.",
        "Keep (rows, 1) for the threshold, so that each row is compared with its own: mean(dim=1, keepdim=True). The "
        "mean over the kept ones is (size * kept).sum(1) / kept.sum(1). What if nothing is kept?",
        "A neighbour: bids of three people; those above half of the mean count, and the price is their mean.\n"
        "  bids = torch.tensor([[8., 1., 6.], [0., 0., 0.]])\n"
        "  counts = bids > 0.5 * bids.mean(dim=1, keepdim=True)        half of the mean: 2.5 and 0\n"
        "    [[True, False, True], [False, False, False]]\n"
        "  (bids * counts).sum(1) / counts.sum(1)                      [7., nan]\n"
        "  (bids * counts).sum(1) / counts.sum(1).clamp(min=1)         [7., 0.]",
    ),
)
