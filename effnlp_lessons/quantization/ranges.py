"""Which range a grid should reach: all numbers, or fewer with a finer step.

A grid of 2^k codes that reaches the largest number wastes its steps on a few outliers; one that clips them rounds the
rest more finely. A rule here takes values (blocks, numbers) and gives the lowest and highest number of each block, as
`ranges=` of `quantizers.quantize_matrix` expects. `quantizers.min_max` clips nothing. Then:

    percentile           the k-th largest and smallest number (I-BERT's rule; Q-BERT too clips at a percentile)
    mean_squared_error   the clipping with the least squared error, by trying
    aciq_laplace, aciq_gaussian   the same in closed form, if the numbers follow that distribution
                         (ACIQ: Banner, Nahshan, Hoffer and Soudry 2018, arXiv 1810.05723)
    MovingAverageRange   for activations: a running mean of each batch's minimum and maximum (Jacob et al. 2017, sec. 3)

With M bits and clipping at alpha around the mean, ACIQ expects

    Laplace(b):       MSE(alpha) = 2 b^2 e^(-alpha/b) + alpha^2 / (3 4^M)
    Gaussian(sigma):  MSE(alpha) = (alpha^2 + sigma^2) (1 - erf(alpha / sqrt(2) sigma)) + alpha^2 / (3 4^M)
                                   - sqrt(2/pi) alpha sigma e^(-alpha^2 / 2 sigma^2)

NOTE ACIQ's grid has 2^M steps of 2 alpha / 2^M, each number moved to the middle of its step; ours has 2^M - 1 steps
(affine) or 2^M - 2 (symmetric) and a point at 0. For few bits its alpha is therefore not quite the best for ours.
NOTE ACIQ's alpha may lie beyond all numbers of a small block. The range then ends at the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnlp_lessons.quantization.quantizers import (
    RangeRule,
    affine_quantizer,
    check_bits,
    min_max,
    symmetric_quantizer,
)


def percentile(share: float = 0.999) -> RangeRule:
    """The rule that clips on either side the outermost 1 - `share` of the numbers.

    high is the k-th smallest number and low the k-th largest, k = round(share n) of n numbers, at least 1. A symmetric
    grid reaches the larger of the two in absolute value. A block too small to lose a number keeps its minimum and
    maximum: with 0.999 all of up to 500 numbers.

    Raises:
        ValueError: unless 0.5 < share <= 1.
    """
    if not 0.5 < share <= 1:
        raise ValueError(f"share must be above 0.5 and at most 1, got {share}")

    def rule(values: Float[Tensor, "blocks numbers"]) -> tuple[Float[Tensor, " blocks"], Float[Tensor, " blocks"]]:
        k = max(1, round(share * values.shape[-1]))
        return -torch.kthvalue(-values, k, dim=-1).values, torch.kthvalue(values, k, dim=-1).values

    return rule


def mean_squared_error(bits: int, symmetric: bool = True, candidates: int = 100) -> RangeRule:
    """The rule that shrinks each block's range by the factor that leaves the least mean squared error.

    The factors i / candidates, i = 1 .. candidates, are all tried, with the grid that will be used: `bits` and
    `symmetric` as in `quantize_matrix`. Both ends shrink by one factor; of equal errors the widest range is taken.
    An expensive rule: it quantizes everything `candidates` times.

    Raises:
        ValueError: bits out of range, fewer than one candidate.
    """
    check_bits(bits)
    if candidates < 1:
        raise ValueError(f"candidates must be >= 1, got {candidates}")

    def rule(values: Float[Tensor, "blocks numbers"]) -> tuple[Float[Tensor, " blocks"], Float[Tensor, " blocks"]]:
        low, high = min_max(values)
        if symmetric:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        least = torch.full_like(high, math.inf)
        best = torch.ones_like(high)
        for i in range(candidates, 0, -1):
            factor = i / candidates
            if symmetric:
                quantizer = symmetric_quantizer(factor * high[:, None], bits)
            else:
                quantizer = affine_quantizer(factor * low[:, None], factor * high[:, None], bits)
            error = (quantizer(values) - values).square().mean(-1)
            best = torch.where(error < least, factor, best)
            least = torch.minimum(error, least)
        return best * low, best * high

    return rule


# ---------------------------------------------------------------------------------------------------- ACIQ


def _root(increasing: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function passes 0, by halving until the interval is two neighbouring floats."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if increasing(middle) > 0 else (middle, high)
    return high


def laplace_clipping(bits: int) -> float:
    """alpha / b with the least expected squared error for Laplace(b) numbers in `bits` bits (ACIQ).

    The derivative of MSE(alpha), with b = 1, is 2 alpha / (3 4^M) - 2 e^(-alpha), which increases.

    Raises:
        ValueError: if `bits` is not an integer from 2 to 8.
    """
    check_bits(bits)
    return _root(lambda alpha: alpha / (3 * 4**bits) - math.exp(-alpha), 0.0, 20.0)


def gaussian_clipping(bits: int) -> float:
    """alpha / sigma with the least expected squared error for Gaussian numbers in `bits` bits (ACIQ).

    The derivative of MSE(alpha), with sigma = 1, is 2 alpha / (3 4^M) - 4 (phi(alpha) - alpha P(z > alpha)), phi the
    density; it increases.

    Raises:
        ValueError: if `bits` is not an integer from 2 to 8.
    """
    check_bits(bits)

    def half_derivative(alpha: float) -> float:
        density = math.exp(-(alpha**2) / 2) / math.sqrt(2 * math.pi)
        beyond = math.erfc(alpha / math.sqrt(2)) / 2
        return alpha / (3 * 4**bits) - 2 * (density - alpha * beyond)

    return _root(half_derivative, 0.0, 20.0)


def _around_mean(values: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """mean - reach and mean + reach of every block, but not beyond its numbers."""
    low, high = min_max(values)
    mean = values.mean(-1)
    return torch.maximum(mean - reach, low), torch.minimum(mean + reach, high)


def aciq_laplace(bits: int) -> RangeRule:
    """ACIQ's rule for numbers that follow a Laplace distribution; b is estimated as mean |z - mean z|.

    Raises:
        ValueError: if `bits` is not an integer from 2 to 8.
    """
    ratio = laplace_clipping(bits)

    def rule(values: Float[Tensor, "blocks numbers"]) -> tuple[Float[Tensor, " blocks"], Float[Tensor, " blocks"]]:
        b = (values - values.mean(-1, keepdim=True)).abs().mean(-1)
        return _around_mean(values, ratio * b)

    return rule


def aciq_gaussian(bits: int) -> RangeRule:
    """ACIQ's rule for numbers that follow a Gaussian; sigma is their standard deviation (of the population).

    Raises:
        ValueError: if `bits` is not an integer from 2 to 8.
    """
    ratio = gaussian_clipping(bits)

    def rule(values: Float[Tensor, "blocks numbers"]) -> tuple[Float[Tensor, " blocks"], Float[Tensor, " blocks"]]:
        return _around_mean(values, ratio * values.std(-1, correction=0))

    return rule


# --------------------------------------------------------------------------------------------- activations


class MovingAverageRange(nn.Module):
    """The range of a tensor that changes with every batch: m <- m + c (m_batch - m), for minimum and maximum.

    The first batch sets both (an average that starts at 0 would take about 1 / c batches to arrive). `forward` gives
    its input back and updates in training mode only; `update` updates in any mode, so a caller decides when averaging
    starts. The state goes with the model's state dict.
    """

    low: Float[Tensor, ""]
    high: Float[Tensor, ""]
    started: Tensor

    def __init__(self, rate: float = 0.01) -> None:
        """`rate` is c: 0.01 forgets a batch after about 100 others. Raises ValueError unless 0 < rate <= 1."""
        super().__init__()
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, got {rate}")
        self.rate = rate
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def update(self, x: Float[Tensor, "*shape"]) -> None:
        """Take one batch into the average.

        Raises:
            ValueError: a batch without numbers, or with one that is not finite.
        """
        if not x.numel():
            raise ValueError("x must hold at least one number, got none")
        low, high = x.amin().to(self.low.dtype), x.amax().to(self.high.dtype)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError(f"x must hold finite numbers, got a range of {low.item()} to {high.item()}")
        if self.started:
            # m <- m + c (m_batch - m)
            low, high = self.low + self.rate * (low - self.low), self.high + self.rate * (high - self.high)
        self.low.copy_(low)
        self.high.copy_(high)
        self.started.fill_(True)

    def bounds(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The averages of minimum and maximum, for `affine_quantizer(low, high, bits)`.

        Raises:
            ValueError: before the first batch.
        """
        if not self.started:
            raise ValueError("no batch was seen yet: run the model in training mode, or call update")
        return self.low, self.high

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.training:
            self.update(x)
        return x
