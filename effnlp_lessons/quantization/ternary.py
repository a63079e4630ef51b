"""Ternary weights: each is -alpha, 0 or alpha, with one alpha for a row or a whole matrix.

    w_hat = alpha b,   b in {-1, 0, 1}:   b = sign(w) where |w| > Delta, 0 elsewhere

TWN (Li, Zhang and Liu 2016, arXiv 1605.04711) looks for the smallest sum_i (alpha b_i - w_i)^2 by a rule of thumb:
    Delta = 0.7 mean|w|,   alpha = mean of |w| over the weights that are kept.
LAT (Hou and Kwok 2018, arXiv 1802.08635) weighs each error by the curvature d_i of the loss: smallest
sum_i d_i (alpha b_i - w_i)^2. For a kept set K the best alpha is sum_K d|w| / sum_K d, and for an alpha the best K is
{|w| > alpha / 2}. The best K is therefore the k largest weights for some k:
    exact: with c_k = sum_{i<=k} d|w| / (2 sum_{i<=k} d), |w| in falling order, the k with the largest
        c_k^2 sum_{i<=k} d; alpha = 2 c_k.
    approximate: b and alpha in turn, from TWN's start, until alpha stands still.

NOTE the exact algorithm of the paper looks only at k with |w|_(k) > c_k >= |w|_(k+1). The best k always is one of
them, so that the largest gain over all k finds the same one; here all k are compared.
NOTE 0.7 is a compromise. The best threshold of very many weights is 2/3 of mean|w| where they are uniform, 0.767 where
they are Gaussian (`best_threshold`).
NOTE only ratios of d count: d and 10 d give the same result, and d = 1 everywhere is the best TWN.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from effnlp_lessons.quantization.quantizers import Granularity, QuantizedMatrix, block_of, from_blocks, to_blocks

Method = Literal["twn", "lat", "lat exact"]
METHODS: tuple[Method, ...] = ("twn", "lat", "lat exact")
TWN_FACTOR = 0.7

Ternary = tuple[Float[Tensor, " blocks"], Int8[Tensor, "blocks numbers"]]  # alpha and b


def _finite_from(x: Tensor, lowest: float) -> bool:
    """Whether all numbers are finite and >= lowest."""
    low, high = torch.aminmax(x) if x.numel() else (x.new_zeros(()), x.new_zeros(()))  # NaN comes through
    return bool(low >= lowest and low.isfinite() and high.isfinite())


def _check(w: Tensor, d: Tensor | None = None) -> None:
    if w.ndim != 2 or not w.shape[1] or not w.is_floating_point():
        raise ValueError(f"w must be floats (blocks, numbers) with a number in each, got {w.dtype} {tuple(w.shape)}")
    if not _finite_from(w, -torch.inf):
        raise ValueError("w must be finite")
    if d is not None and d.shape != w.shape:
        raise ValueError(f"d must have the shape of w, {tuple(w.shape)}, got {tuple(d.shape)}")
    if d is not None and not _finite_from(d, 0):
        raise ValueError("d must be finite and >= 0")


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where the denominator is 0: nothing is kept, or nothing counts."""
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))


def _above(size: Tensor, threshold: Tensor) -> Tensor:
    """1 where |w| is above its block's threshold, 0 elsewhere, as floats: products with bools are slow."""
    return (size - threshold[:, None]).sign().clamp_(min=0)


def _codes(w: Tensor, kept: Tensor) -> Int8[Tensor, "blocks numbers"]:
    """b: sign(w) where `kept` is 1, 0 elsewhere."""
    return (w.sign() * kept).to(torch.int8)


def twn(w: Float[Tensor, "blocks numbers"]) -> Ternary:
    """TWN's alpha and codes of every block: Delta = 0.7 mean|w|, alpha = mean |w| over |w| > Delta.

    A block of zeros (the row of [PAD]) has alpha 0 and codes 0.

    Raises:
        ValueError: no floats (blocks, numbers), no numbers, numbers that are not finite.
    """
    _check(w)
    size = w.abs()
    kept = _above(size, TWN_FACTOR * size.mean(-1))
    alpha = _ratio((size * kept).sum(-1), kept.sum(-1))
    return alpha, _codes(w, kept)


def weighted_error(
    w: Float[Tensor, "blocks numbers"],
    d: Float[Tensor, "blocks numbers"] | None,
    alpha: Float[Tensor, " blocks"],
    codes: Int8[Tensor, "blocks numbers"],
) -> Float[Tensor, " blocks"]:
    """sum_i d_i (alpha b_i - w_i)^2 of every block; `d` None: all 1."""
    square = (alpha[:, None] * codes - w).square()
    return (square if d is None else d * square).sum(-1)


def lat_exact(w: Float[Tensor, "blocks numbers"], d: Float[Tensor, "blocks numbers"] | None = None) -> Ternary:
    """The alpha and codes with the smallest sum_i d_i (alpha b_i - w_i)^2, by sorting each block (LAT, exact).

    The error is sum d w^2 - 4 c_k^2 sum_{i<=k} d. Sums are taken in float64. `d` None: all 1.

    Raises:
        ValueError: as `twn`; `d` of another shape, negative or not finite.
    """
    _check(w, d)
    size, order = w.abs().double().sort(dim=-1, descending=True)
    weights = torch.ones_like(size) if d is None else d.double().gather(-1, order)
    mass = weights.cumsum(-1)
    # c_k = sum_{i<=k} d|w| / (2 sum_{i<=k} d)
    c = _ratio((weights * size).cumsum(-1), 2 * mass)
    best = (c.square() * mass).argmax(-1, keepdim=True)
    threshold = c.gather(-1, best)[:, 0]
    kept = _above(w.abs().double(), threshold) * (threshold > 0)[:, None]
    return (2 * threshold).to(w.dtype), _codes(w, kept)


def lat_approximate(
    w: Float[Tensor, "blocks numbers"],
    d: Float[Tensor, "blocks numbers"] | None = None,
    iterations: int = 10,
    tolerance: float = 1e-6,
) -> Ternary:
    """LAT's alpha and codes by turns: alpha = sum_kept d|w| / sum_kept d, then b = sign(w) where |w| > alpha / 2.

    Starts from TWN. A block is done after `iterations`, or when its alpha moves by no more than `tolerance`. No step
    makes the error larger, so it ends in a minimum, which need not be the smallest. `d` None: all 1.

    Raises:
        ValueError: as `lat_exact`; `iterations` below 1, `tolerance` below 0.
    """
    _check(w, d)
    if iterations < 1 or not tolerance >= 0:
        raise ValueError(f"iterations must be >= 1 and tolerance >= 0, got {iterations} and {tolerance}")
    size = w.abs()
    weights = torch.ones_like(size) if d is None else d
    weighted = weights * size

    def best_alpha(kept: Tensor) -> Tensor:
        return _ratio((weighted * kept).sum(-1), (weights * kept).sum(-1))

    alpha, codes = twn(w)
    kept = codes.abs().to(w.dtype)
    moving = torch.ones_like(alpha, dtype=torch.bool)
    for _ in range(iterations):
        before, alpha = alpha, torch.where(moving, best_alpha(kept), alpha)
        kept = _above(size, alpha / 2)
        moving &= (alpha - before).abs() > tolerance
        if not moving.any():
            break
    alpha = best_alpha(kept)  # for the last kept set
    return alpha, _codes(w, kept * (alpha > 0)[:, None])


def ternarize_matrix(
    matrix: Float[Tensor, "rows columns"],
    method: Method = "twn",
    granularity: Granularity = "tensor",
    d: Float[Tensor, "rows columns"] | None = None,
) -> QuantizedMatrix:
    """A matrix as codes -1, 0, 1 (2 bits each) and one scale alpha for each block.

    Args:
        method: "twn" (does not read `d`), "lat" (approximate) or "lat exact".
        granularity: "tensor": one alpha ("layer-wise"); "row": one for each row; or a block, see `block_of`.
        d: the curvature at each weight, for LAT; None: all 1.

    Raises:
        ValueError: another word for `method`, a shape or granularity that does not fit, numbers that are not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    block = block_of(tuple(matrix.shape), granularity)
    tiles = to_blocks(matrix.detach(), block)
    w, grid = tiles.flatten(0, 1), tiles.shape[:2]
    curvature = None if d is None or method == "twn" else to_blocks(d.detach(), block).flatten(0, 1)
    if method == "twn":
        alpha, codes = twn(w)
    else:
        alpha, codes = (lat_approximate if method == "lat" else lat_exact)(w, curvature)
    codes = from_blocks(codes.unflatten(0, grid), block)
    alpha = alpha.unflatten(0, grid)
    return QuantizedMatrix(codes, alpha, torch.zeros_like(alpha, dtype=torch.int32), 2, True, block)


def best_threshold(distribution: Literal["gaussian", "uniform"]) -> tuple[float, float]:
    """The best threshold in units of mean|w|, and the share of weights it sets to 0, for endlessly many weights.

    The best threshold t is half of its alpha, 2 t = E[|w| given |w| > t]. Uniform: t = 1/3 of the largest weight,
    2/3 of mean|w|. Gaussian: t = 0.612 standard deviations, found by bisection.

    Raises:
        ValueError: another word for `distribution`.
    """
    if distribution == "uniform":
        return 2 / 3, 1 / 3
    if distribution != "gaussian":
        raise ValueError(f"distribution must be 'gaussian' or 'uniform', got {distribution!r}")
    low, high = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    root = torch.tensor(2.0, dtype=torch.float64).sqrt()
    mean = root / torch.pi**0.5  # E|w| = sqrt(2 / pi) at standard deviation 1
    for _ in range(60):
        middle = (low + high) / 2
        # E[|w| given |w| > t] = E|w| exp(-t^2 / 2) / erfc(t / sqrt 2)
        too_low = mean * (-middle.square() / 2).exp() / torch.erfc(middle / root) > 2 * middle
        low, high = (middle, high) if too_low else (low, middle)
    return (low / mean).item(), torch.erf(low / root).item()
