"""Quantization in general: any levels, any thresholds; the even grid is one special case.

    Q(z) = q_j   for z in (t_j, t_{j+1}],   j = 0 .. n - 1,   t_0 = -inf, t_n = +inf

n = 2^k levels q_j cost k bits a number, whatever they are; the table of levels is stored once. For given levels the
squared error is least with thresholds halfway between neighbours. For given thresholds it is least with each level at
the mean of the numbers in its cell. Doing both in turn is the method of Lloyd and Max, k-means in one dimension.

Levels to choose from: those of a linear quantizer (multiplying codes is multiplying numbers), powers of two
(multiplying is shifting), equal shares of the numbers in all cells (no code is wasted, and outliers are not fitted:
the idea of NF4, Dettmers et al. 2023, arXiv 2305.14314), or Lloyd-Max (the least squared error). With the last two a
product needs the level itself, by a look-up: storage shrinks, arithmetic does not.

NOTE a tie, z = t exactly, goes to the lower level here, for cells are closed on the right. torch.round, and so
`LinearQuantizer`, sends it to the even code: the two differ at half of all ties, and nowhere else.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from effnlp_lessons.quantization.quantizers import LinearQuantizer, check_bits


def _check_rising(name: str, numbers: Tensor, smallest: int) -> None:
    if numbers.ndim != 1 or len(numbers) < smallest or not (numbers[1:] >= numbers[:-1]).all():
        raise ValueError(f"{name} must be a vector of at least {smallest} rising numbers, got {numbers}")


def piecewise_constant(
    z: Float[Tensor, "*shape"], thresholds: Float[Tensor, " inner"], levels: Float[Tensor, " levels"]
) -> Float[Tensor, "*shape"]:
    """Q(z): the level of the cell (t_j, t_{j+1}] that each number lies in.

    Args:
        thresholds: the inner ones, t_1 .. t_{n-1}, rising.
        levels: q_0 .. q_{n-1}.

    Raises:
        ValueError: thresholds that fall, or not one fewer than levels; NaN in `z`.
    """
    _check_rising("thresholds", thresholds, 0)
    if levels.ndim != 1 or len(levels) != len(thresholds) + 1:
        raise ValueError(f"there must be one level more than thresholds, got {len(levels)} and {len(thresholds)}")
    if torch.isnan(z).any():
        raise ValueError("z must hold numbers, got NaN")
    return levels[torch.bucketize(z, thresholds)]  # right=False: the cell is closed on the right


def midpoints(levels: Float[Tensor, " levels"]) -> Float[Tensor, " inner"]:
    """The thresholds with the least squared error for these levels: halfway between neighbours.

    Raises:
        ValueError: levels that do not rise.
    """
    _check_rising("levels", levels, 1)
    return (levels[1:] + levels[:-1]) / 2


def nearest_level(z: Float[Tensor, "*shape"], levels: Float[Tensor, " levels"]) -> Float[Tensor, "*shape"]:
    """Each number moved to its nearest level; the lower one of two.

    Raises:
        ValueError: levels that do not rise, NaN in `z`.
    """
    return piecewise_constant(z, midpoints(levels), levels)


# ------------------------------------------------------------------------------------------------- levels


def linear_levels(quantizer: LinearQuantizer) -> Float[Tensor, " levels"]:
    """The levels of one linear quantizer, S (q - Z) for q = q_min .. q_max: evenly spaced.

    Raises:
        ValueError: a quantizer with more than one grid.
    """
    if quantizer.scale.numel() != 1:
        raise ValueError(f"quantizer must have one grid, got scales of shape {tuple(quantizer.scale.shape)}")
    q = torch.arange(quantizer.q_min, quantizer.q_max + 1, device=quantizer.scale.device)
    return quantizer.dequantize(q).flatten()


def power_of_two_levels(largest: float, bits: int) -> Float[Tensor, " levels"]:
    """0 and both signs of 2^(n - i), i = 0 .. 2^(k-1) - 2, where 2^n is the power of two nearest to `largest`.

    2^k - 1 levels, as in a symmetric grid; fine near 0 and coarse far out.

    Raises:
        ValueError: bits out of range, `largest` not positive and finite.
    """
    check_bits(bits)
    if not 0 < largest < math.inf:
        raise ValueError(f"largest must be positive and finite, got {largest}")
    # between 2^n and 2^(n + 1) the middle is 1.5 2^n
    n = math.floor(math.log2(largest / 1.5)) + 1
    positive = 2.0 ** (n - torch.arange(2 ** (bits - 1) - 1, dtype=torch.float64))
    return torch.cat([-positive, torch.zeros(1), positive.flip(0)]).to(torch.get_default_dtype())


def quantile_levels(values: Float[Tensor, "*shape"], bits: int) -> Float[Tensor, " levels"]:
    """The (j + 1/2) / 2^k quantiles of the numbers, j = 0 .. 2^k - 1: about an equal share is nearest to each.

    Raises:
        ValueError: bits out of range, no numbers, or numbers that are not finite.
    """
    check_bits(bits)
    ordered = _ordered(values)
    # between the two numbers around the place; torch.quantile takes no more than 16 million numbers
    place = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits * (len(ordered) - 1)
    below, above = ordered[place.floor().long()], ordered[place.ceil().long()]
    return (below + (place - place.floor()) * (above - below)).to(values.dtype)


def _ordered(values: Tensor) -> Float[Tensor, " numbers"]:
    if not values.numel() or not torch.isfinite(values).all():
        raise ValueError("values must hold at least one number, and finite ones only")
    return values.detach().flatten().double().sort().values


def lloyd_max(
    values: Float[Tensor, "*shape"],
    bits: int,
    start: Float[Tensor, " levels"] | None = None,
    iterations: int = 100,
) -> tuple[Float[Tensor, " levels"], list[float]]:
    """2^k levels with a small squared error: thresholds to midpoints, levels to means of their cells, in turn.

    The error never rises, and ends in a minimum that need not be the least: it depends on `start`, by default
    `quantile_levels`. An empty cell keeps its level. Stops when the error stands still.

    Returns:
        The levels, of the dtype of `values`, and the mean squared error before each iteration and at the end.

    Raises:
        ValueError: bits out of range, no numbers or such that are not finite, a start of another length or falling.
    """
    check_bits(bits)
    ordered = _ordered(values)
    levels = (quantile_levels(values, bits) if start is None else start).double()
    _check_rising("start", levels, 2**bits)
    if len(levels) != 2**bits:
        raise ValueError(f"start must hold {2**bits} levels for {bits} bits, got {len(levels)}")
    # with sums up to each place, a cell's count, sum and sum of squares are differences of two
    sums, squares = (torch.cat([ordered.new_zeros(1), part.cumsum(0)]) for part in (ordered, ordered**2))
    errors: list[float] = []
    while True:
        cuts = torch.searchsorted(ordered, midpoints(levels), right=True)  # how many lie at or below each threshold
        cuts = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(ordered))])
        counts, totals = cuts.diff(), sums[cuts].diff()
        # sum over cells of sum (z - q)^2 = sum z^2 - 2 q sum z + n q^2
        error = (squares[cuts].diff() - 2 * levels * totals + counts * levels**2).sum().item() / len(ordered)
        errors.append(max(error, 0.0))
        if len(errors) > iterations or (len(errors) > 1 and errors[-1] >= errors[-2] * (1 - 1e-9)):
            break
        levels = torch.where(counts > 0, totals / counts.clamp(min=1), levels)
    return levels.to(values.dtype), errors
