"""Fixed point: multiply an int32 by a real number with integers alone (Jacob et al. 2017, arXiv 1712.05877, sec. 2.2).

    M = 2^-n M0,  M0 in [0.5, 1)              stored as the int32 round(2^31 M0) and the shift n
    acc M  ~  divide(high(acc, round(2^31 M0)), 2^n)

`high` is a 32 x 32 -> 64 bit product of which the upper 32 bits are kept after doubling; `divide` is a shift to the
right. Both round, and not alike: `high` takes a half up, towards +infinity; `divide` takes it away from zero. They are
the two operations of gemmlowp, the library that the paper describes.

NOTE rounding twice is not rounding once: the result differs from round(acc M) by one, never by more, in about one of
2^(n+1) random cases for n >= 1, a twelfth of all if M is uniform in (0, 1). An integer engine is therefore compared bit
by bit with this rule, and with real numbers only up to one code.
NOTE the paper has M in (0, 1). M >= 1 is met too (a row of weights larger than the output's scale allows for) and is
a shift to the left before the product; so is M so near 1 that M0 rounds to 1, with n = -1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def quantize_multiplier(
    multiplier: float | Float[Tensor, "*shape"],
) -> tuple[Int[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """M as (round(2^31 M0), n), both int32: M = 2^-n M0 with M0 in [0.5, 1), the first in 2^30 .. 2^31 - 1.

    n < 0 means M >= 1. M < 2^-32 takes every int32 to 0 and gives (0, 0).

    Raises:
        ValueError: M that is not finite, not positive, or 2^31 and more.
    """
    m = torch.as_tensor(multiplier, dtype=torch.float64)
    if not (torch.isfinite(m).all() and (m > 0).all() and (m < 2.0**31).all()):
        raise ValueError("multiplier must be positive, finite and below 2^31")
    m0, exponent = torch.frexp(m)  # m0 in [0.5, 1)
    q = torch.round(m0 * 2.0**31).long()
    too_large = q == 2**31
    q, shift = torch.where(too_large, 2**30, q), torch.where(too_large, -exponent - 1, -exponent)
    vanishes = shift > 31
    q, shift = q.masked_fill(vanishes, 0), shift.masked_fill(vanishes, 0)
    if (shift < -31).any():
        raise ValueError("multiplier must be positive, finite and below 2^31")  # it rounds to 2^31
    return q.to(torch.int32), shift.to(torch.int32)


def _check_int32(name: str, x: Tensor) -> None:
    if x.dtype != torch.int32:
        raise ValueError(f"{name} must be int32, got {x.dtype}")


def _high_mul(a: Int[Tensor, "*shape"], b: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """floor((a b + 2^30) / 2^31) of int32 tensors, int64: 2^31 where a = b = -2^31."""
    _check_int32("a", a)
    _check_int32("b", b)
    return torch.mul(a.to(torch.int64), b).add_(2**30).bitwise_right_shift_(31)


def saturating_rounding_doubling_high_mul(a: Int[Tensor, "*shape"], b: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """round(a b / 2^31) of int32 tensors, a half going up: floor((a b + 2^30) / 2^31), int32.

    Saturates in one case, a = b = -2^31, to 2^31 - 1. Shapes may broadcast.

    Raises:
        ValueError: a tensor that is not int32.
    """
    return _high_mul(a, b).clamp_(max=INT32_MAX).to(torch.int32)


def rounding_divide_by_pot(x: Int[Tensor, "*shape"], exponent: int | Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """round(x / 2^exponent) of an int32 tensor, a half going away from zero; int32. POT: a power of two.

    The bits shifted out are the remainder r >= 0, and x >> exponent is rounded down; 1 is added where r is more than
    a half, or is a half and x is positive. Shapes may broadcast.

    Raises:
        ValueError: `x` that is not int32, an exponent outside 0 .. 31.
    """
    _check_int32("x", x)
    exponent = torch.as_tensor(exponent, dtype=torch.int64, device=x.device)
    if ((exponent < 0) | (exponent > 31)).any():
        raise ValueError("exponent must be in 0 .. 31")
    mask = ((1 << exponent) - 1).to(torch.int32)
    # the largest r that is rounded down: x >> 31 is -1 where x is negative, and a half is not above it there
    threshold = (mask >> 1) - (x >> 31)
    above = threshold.sub_(x & mask).bitwise_right_shift_(31)  # -1 where r is above it, else 0: no comparison needed
    return (x >> exponent.to(torch.int32)).sub_(above)


def requantize(
    accumulator: Int[Tensor, "*shape"],
    multiplier: Int[Tensor, "*columns"],
    shift: Int[Tensor, "*columns"],
    zero_point: int,
    q_min: int,
    q_max: int,
) -> Int[Tensor, "*shape"]:
    """clamp(Z + M acc, q_min, q_max) with integers alone: from the scale of accumulators to that of codes.

    Args:
        accumulator: int32.
        multiplier, shift: int32 from `quantize_multiplier`, for all or for each of the last dimension.
        zero_point: Z of the result.
        q_min, q_max: the result's range, narrowed where an activation is fused (Z .. q_max is a ReLU).

    Returns:
        int8 where the range allows it, else uint8, else int32.

    Raises:
        ValueError: tensors that are not int32, a shift outside -31 .. 31, a zero point or range that is not sensible.
    """
    _check_int32("accumulator", accumulator)
    _check_int32("shift", shift)
    low, high = q_min - zero_point, q_max - zero_point
    if low > high or min(q_min, low) < INT32_MIN or max(q_max, high) > INT32_MAX:
        raise ValueError(f"{q_min} .. {q_max}, zero point {zero_point}: not a range of int32, before and after Z")
    if (shift < 0).any():
        if (shift < -31).any():
            raise ValueError("shift must be in -31 .. 31")
        left = accumulator.to(torch.int64) << (-shift).clamp(min=0)
        accumulator = left.clamp_(INT32_MIN, INT32_MAX).to(torch.int32)
        shift = shift.clamp(min=0)
    # the multiplier is not negative: nothing saturates
    q = rounding_divide_by_pot(_high_mul(accumulator, multiplier).to(torch.int32), shift)
    # clamped before Z is added: nothing can overflow
    q = q.clamp_(low, high).add_(zero_point)
    for dtype in (torch.int8, torch.uint8):
        if torch.iinfo(dtype).min <= q_min and q_max <= torch.iinfo(dtype).max:
            return q.to(dtype)
    return q
