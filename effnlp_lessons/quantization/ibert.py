"""I-BERT: GELU, softmax and layer norm with integers alone (Kim et al. 2021, arXiv 2101.01321, sec. 3).

A polynomial of degree two needs an addition and a square, also on codes: with x = S q and whole numbers q_b, q_c,

    a (x + b)^2 + c  =  a S^2 [(q + q_b)^2 + q_c],     q_b = floor(b / S),  q_c = floor(c / (a S^2))          (Alg. 1)
    erf(x)   ~  sgn(x) [a (min(|x|, -b) + b)^2 + 1],   a = -0.2888, b = -1.769                               (Eq. 8)
    exp(x)    =  2^-z exp(p),  z = floor(-x / ln 2),  p = x + z ln 2 in (-ln 2, 0],  x <= 0                  (Eq. 11)
    exp(p)   ~  0.3585 (p + 1.353)^2 + 0.344                                                                 (Eq. 13)
    sqrt(n):    x <- floor((x + floor(n / x)) / 2), from a power of two not below sqrt(n), while it falls    (Alg. 4)

    q' = floor((q m + 2^(c-1)) / 2^c): from the scale S to S', with S / S' ~ m / 2^c, a "dyadic" number

A module knows its input's scale from the start and works with whole numbers that follow from it. `forward` takes and
gives integer codes and makes no float on the way; `dequantize` says what the result stands for.

NOTE the released code holds its integers in float tensors, clamps weights to -127 .. 126, rounds sqrt(2) to 1.4142,
shifts the erf by a constant 14 bits, which destroys it at coarse scales, and divides a norm's bias by its weight, which
may be 0. Here the codes are int32, shifts are chosen by the scale, and a bias is added on the output's scale.
NOTE a change of scale rounds once, as in the released code, and not twice as gemmlowp does (`fixed_point`).
NOTE the released code's exponential has finer coefficients than the paper prints; ours has them by default.
NOTE in 32 bits the softmax's reciprocal 2^32 / sum is 2^31 / sum. A norm's sum of squares and its reciprocal have 64
bits here: the paper shifts the numbers to the right until 32 are enough.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnlp_lessons.quantization.fixed_point import INT32_MAX, quantize_multiplier

ERF = (-0.2888, -1.769)  # a, b; c = 1
EXP_PRINTED = (0.3585, 1.353, 0.344)  # a (p + b)^2 + c as the paper prints it
# the released code's a p^2 + b p + 1, as a (p + b)^2 + c
EXP_RELEASED = (0.35815147, 0.96963238 / 0.35815147 / 2, 1 - 0.96963238**2 / 0.35815147 / 4)
FINEST = 1e-4  # squares of codes of a finer scale would leave 32 bits


def _check_scale(scale: float) -> float:
    scale = float(scale)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale}")
    return scale


def _check_codes(q: Tensor) -> None:
    if q.dtype != torch.int32:
        raise ValueError(f"codes must be int32, got {q.dtype}")


class IntegerModule(nn.Module):
    """An operation on integer codes whose constants are whole numbers, in buffers: a file holds all that it needs.

    Attributes:
        input_scale, output_scale: float64, what one unit of the codes is worth. They are for whoever reads the codes,
            and no part of `forward`.
    """

    def __init__(self, input_scale: float | Tensor, output_scale: float, **constants: int) -> None:
        super().__init__()
        self.register_buffer("input_scale", torch.as_tensor(input_scale, dtype=torch.float64).clone())
        self.register_buffer("output_scale", torch.as_tensor(output_scale, dtype=torch.float64).clone())
        for name, value in constants.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.int32))

    def dequantize(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The real numbers, float64, that the module's output stands for."""
        return codes * self.output_scale


def _coarser(scale: float) -> tuple[float, int]:
    """A scale of at least FINEST, and the bits by which codes are shifted to the right to have it."""
    down = max(0, math.ceil(math.log2(FINEST / _check_scale(scale))))
    if down > 31:
        raise ValueError(f"scale must be at least 5e-14, got {scale}")
    return scale * 2**down, down


def polynomial_constants(a: float, b: float, c: float, scale: float) -> tuple[int, int, float]:
    """(q_b, q_c, output scale a S^2) of a (x + b)^2 + c for codes of the scale S (Alg. 1).

    Raises:
        ValueError: a scale that is not positive, or a = 0.
    """
    scale = _check_scale(scale)
    if a == 0:
        raise ValueError("a must not be 0: the polynomial has degree two")
    return math.floor(b / scale), math.floor(c / (a * scale**2)), a * scale**2


def integer_polynomial(q: Int[Tensor, "*shape"], q_b: int | Tensor, q_c: int | Tensor) -> Int[Tensor, "*shape"]:
    """(q + q_b)^2 + q_c, in q's dtype: the caller sees to it that it fits."""
    shifted = q + q_b
    return (shifted * shifted).add_(q_c)


def integer_sqrt(n: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """floor(sqrt(n)) of int32 or int64 by Newton's iteration (Alg. 4), the same dtype.

    From the power of two next above the root at most six steps are needed, even for 63 bits.

    Raises:
        ValueError: another dtype, or a negative number.
    """
    if n.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"n must be int32 or int64, got {n.dtype}")
    if (n < 0).any():
        raise ValueError("n must not be negative")
    powers = torch.tensor([4**k for k in range(4 * n.itemsize)], dtype=n.dtype, device=n.device)
    positive = n.clamp(min=1)
    x = torch.ones_like(n) << torch.bucketize(positive, powers).to(n.dtype)  # x^2 >= n
    while True:
        # x <- floor((x + floor(n / x)) / 2)
        following = (x + torch.div(positive, x, rounding_mode="trunc")) >> 1
        if not (following < x).any():
            return torch.minimum(x, n)  # 0 where n is 0
        x = torch.minimum(x, following)


def dyadic(
    multiplier: float | Float[Tensor, "*channels"],
) -> tuple[Int[Tensor, "*channels"], Int[Tensor, "*channels"]]:
    """M ~ m / 2^c as (m, c), both int64, m of 31 bits.

    Raises:
        ValueError: M that is not positive, not finite, or 2^31 and more.
    """
    m, shift = quantize_multiplier(multiplier)
    return m.to(torch.int64), shift.to(torch.int64) + 31


class Rescale(IntegerModule):
    """int32 codes of one scale, or of one a channel, to clamped codes of another scale: clamp(Z + q m / 2^c).

    Args:
        scale: of the input, one or (channels,).
        output_scale, zero_point: of the output.
        q_min, q_max: the output's smallest and largest code; int8 where they allow it, else int32.

    Raises:
        ValueError: scales whose quotient is not positive, is 2^31 or more, or below 2^-23 with a zero point.
    """

    def __init__(
        self,
        scale: float | Float[Tensor, " channels"],
        output_scale: float,
        q_min: int,
        q_max: int,
        zero_point: int = 0,
    ) -> None:
        super().__init__(scale, output_scale, zero_point=zero_point)
        m, c = dyadic(torch.as_tensor(scale, dtype=torch.float64) / _check_scale(output_scale))
        if zero_point and (c > 54).any():
            raise ValueError(f"scale must be at least 2^-23 of output_scale with a zero point, got {scale}")
        self.register_buffer("multiplier", m)
        self.register_buffer("shift", c)
        # a half, so that the shift rounds, and the zero point
        self.register_buffer("offset", (torch.ones_like(c) << (c - 1)) + (zero_point << c))
        self.q_min, self.q_max = q_min, q_max
        self.dtype = torch.int8 if q_min >= -128 and q_max <= 127 else torch.int32

    def dequantize(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The real numbers, float64, that the module's output stands for."""
        return (codes.to(torch.int32) - self.zero_point) * self.output_scale

    def forward(self, q: Int[Tensor, "*rows channels"]) -> Int[Tensor, "*rows channels"]:
        """Codes of the output's scale.

        Raises:
            ValueError: codes that are not int32.
        """
        _check_codes(q)
        wide = q.to(torch.int64).mul_(self.multiplier).add_(self.offset).bitwise_right_shift_(self.shift)
        return wide.clamp_(self.q_min, self.q_max).to(self.dtype)


class IntegerGelu(IntegerModule):
    """GELU(x) = x / 2 (1 + erf(x / sqrt 2)) on int32 codes of the scale S within -65,535 .. 65,535 (Alg. 2).

    Largest error for a fine scale 0.018, near |x| = 2.5, and a root mean square of 0.0082 on [-4, 4]. The result has
    the size of x and up to 31 bits: it is meant to be requantized. Codes of a scale below 1e-4 lose their last bits.

    Raises:
        ValueError: a scale that is not positive, or above 1.
    """

    def __init__(self, scale: float) -> None:
        coarse, down = _coarser(scale)
        if coarse > 1:
            raise ValueError(f"scale must be at most 1, got {scale}")
        a, b = ERF
        # sgn(q) a S^2 [(|q| + q_b)^2 + q_c], with a < 0: one = -q_c stands for 1
        q_b, q_c, erf_scale = polynomial_constants(a, b, 1.0, coarse / math.sqrt(2))
        shift = max(0, (-q_c).bit_length() - 14)  # 16 bits times 2 * 14 bits: an int32
        # one_and_half: 1 for 1 + erf, and a half so that the shift rounds
        one_and_half = 2**shift // 2 - q_c
        output_scale = -coarse * erf_scale * 2**shift / 2
        super().__init__(scale, output_scale, down=down, q_b=q_b, q_c=q_c, one_and_half=one_and_half, shift=shift)

    def forward(self, q: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """int32 codes of the GELU, of `output_scale`.

        Raises:
            ValueError: codes that are not int32.
        """
        _check_codes(q)
        if self.down:
            q = q >> self.down
        magnitude = torch.minimum(q.abs(), -self.q_b)
        # a < 0: the polynomial is counted down
        erf = q.sign().mul_(integer_polynomial(magnitude, self.q_b, self.q_c))
        return (self.one_and_half - erf).bitwise_right_shift_(self.shift).mul_(q)


class IntegerExp(IntegerModule):
    """exp(x) of int32 codes x <= 0 of the scale S, as codes of 16 bits: 0 .. 65,535 (Alg. 3, i-exp).

    Codes above 0 have no meaning here. Codes of a scale below 1e-4 lose their last bits.

    Raises:
        ValueError: a scale that is not positive, or above ln 2.
    """

    def __init__(self, scale: float, coefficients: tuple[float, float, float] = EXP_RELEASED) -> None:
        coarse, down = _coarser(scale)
        q_b, q_c, exp_scale = polynomial_constants(*coefficients, coarse)
        q_ln2 = math.floor(math.log(2) / coarse)
        if q_ln2 < 1:
            raise ValueError(f"scale must be at most ln 2, got {scale}")
        left = 30 - (q_b**2 + q_c).bit_length()  # exp(0), the largest, fills 30 bits
        output_scale = exp_scale * 2.0 ** (14 - left)
        super().__init__(scale, output_scale, down=down, q_b=q_b, q_c=q_c, q_ln2=q_ln2, left=left)

    def forward(self, q: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """int32 codes of exp, of `output_scale`.

        Raises:
            ValueError: codes that are not int32.
        """
        _check_codes(q)
        if self.down:
            q = q >> self.down
        # z = floor(-x / ln 2), from 17 on the result is 0;  p = x + z ln 2
        z = torch.div(-q, self.q_ln2, rounding_mode="trunc").clamp_(max=17)
        p = torch.maximum(q + z * self.q_ln2, -self.q_ln2)
        return (integer_polynomial(p, self.q_b, self.q_c) << self.left) >> (z + 14)


class IntegerSoftmax(IntegerModule):
    """softmax over the last dimension of int32 codes of the scale S, as codes 0 .. 2^bits - 1 of the scale 2^-bits.

    A row's weights add up to less than 1: each is rounded down, and loses half a code in the mean.

    Raises:
        ValueError: a scale out of the range of `IntegerExp`, `output_bits` outside 2 .. 16.
    """

    def __init__(self, scale: float, output_bits: int = 8) -> None:
        if not 2 <= output_bits <= 16:
            raise ValueError(f"output_bits must be in 2 .. 16, got {output_bits}")
        super().__init__(scale, 2.0**-output_bits, shift=31 - output_bits)
        self.exp = IntegerExp(scale)

    def forward(
        self, q: Int[Tensor, "*rows keys"], allowed: Bool[Tensor, "*#rows keys"] | None = None
    ) -> Int[Tensor, "*rows keys"]:
        """int32 codes of the weights; exactly 0 where not `allowed`, and everywhere in a row that allows nothing.

        Codes must lie within -2^30 .. 2^30, and there may be 32,768 keys.

        Raises:
            ValueError: codes that are not int32.
        """
        _check_codes(q)
        lowest = -(2**30)
        masked = q if allowed is None else q.masked_fill(~allowed, lowest)
        exp = self.exp((masked - masked.amax(-1, keepdim=True)).clamp_(min=lowest))
        if allowed is not None:
            exp = exp.masked_fill_(~allowed, 0)
        total = exp.sum(-1, keepdim=True, dtype=torch.int32).clamp_(min=1)
        # exp <= total, so exp floor((2^31 - 1) / total) is an int32
        reciprocal = torch.div(torch.full_like(total, INT32_MAX), total, rounding_mode="trunc")
        return (exp * reciprocal) >> self.shift


class IntegerLayerNorm(IntegerModule):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, int32 codes to int32 codes.

    The input's scale cancels, except in eps. Weight and bias are put on the output's scale, one m / 2^c a channel.

    Args:
        weight, bias: the norm's parameters, float (d_model).
        eps: added to the variance, on the input's real scale.
        scale: S of the input codes, which must lie within -2^24 .. 2^24.
        output_scale: S of the result.

    Raises:
        ValueError: scales that are not positive, parameters that are no vectors of one length, or so large that they
            do not fit the output's scale.
    """

    def __init__(
        self,
        weight: Float[Tensor, " d_model"],
        bias: Float[Tensor, " d_model"],
        eps: float,
        scale: float,
        output_scale: float,
    ) -> None:
        super().__init__(_check_scale(scale), _check_scale(output_scale))
        if weight.ndim != 1 or weight.shape != bias.shape:
            got = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            raise ValueError(f"weight and bias must be vectors of one length, got {got}")
        width, weight, bias = len(weight), weight.detach().double(), bias.detach().double()
        codes = torch.round(bias / output_scale)
        if not (codes.abs() < 2**30).all():
            raise ValueError(f"bias must be finite and below 2^30 output_scale, got {bias.abs().max().item()}")
        # y / sqrt(sum y^2) has the scale 2^-31, and times sqrt(width) it is normal; the weight may be negative or 0
        factor = weight * math.sqrt(width) / 2**31 / output_scale
        multiplier, shift = dyadic(factor.abs().clamp(min=2.0**-40))
        self.register_buffer("multiplier", multiplier * factor.sign().to(torch.int64))
        self.register_buffer("shift", shift)
        self.register_buffer("offset", torch.ones_like(shift) << (shift - 1))  # a half
        self.register_buffer("bias", codes.to(torch.int64))
        self.register_buffer("eps", torch.tensor(math.floor(width * eps / scale**2), dtype=torch.int64))

    def forward(self, q: Int[Tensor, "*rows d_model"]) -> Int[Tensor, "*rows d_model"]:
        """int32 codes of `output_scale`. A constant row gives the bias.

        Raises:
            ValueError: codes that are not int32.
        """
        _check_codes(q)
        width, q = q.shape[-1], q.to(torch.int64)
        # mean = round(sum / width), a half going up
        y = q - torch.div(2 * q.sum(-1, keepdim=True) + width, 2 * width, rounding_mode="floor")
        root = integer_sqrt((y * y).sum(-1, keepdim=True) + self.eps).clamp_(min=1)  # sqrt(width) standard deviations
        # y / root in 31 bits, -1 .. 1 since |y| < root + 1; 47 bits on the way, for a root may have 30 itself
        y *= torch.div(torch.full_like(root, 2**47), root, rounding_mode="trunc")
        y = y.bitwise_right_shift_(16).mul_(self.multiplier).add_(self.offset)
        return y.bitwise_right_shift_(self.shift).add_(self.bias).to(torch.int32)
