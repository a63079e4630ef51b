"""A linear layer on integers alone: codes in, codes out (Jacob et al. 2017, arXiv 1712.05877, sec. 2).

With real numbers r = S (q - Z), the product r3 = r1 r2 of two matrices is, in codes (Eq. 4, 5, 7, 8),

    q3 = Z3 + M sum_j (q1 - Z1) (q2 - Z2),    M = S1 S2 / S3
    sum_j (q1 - Z1) (q2 - Z2) = N Z1 Z2 - Z1 a2 - Z2 a1 + sum_j q1 q2

a1 are the sums of the rows of q1, a2 those of the columns of q2: the zero points cost 2 N^2 additions, and the inner
loop is a product of plain codes. It is summed in int32. The bias is int32 with scale S1 S2 and zero point 0; M is
applied in fixed point (`fixed_point`), and the result is clamped, which is where a ReLU or ReLU6 costs nothing.

NOTE the paper has uint8 codes and one scale a matrix. Here codes are int8 (the same grid, q and Z lowered by 128), for
`torch._int_mm` takes int8; weights are symmetric, Z2 = 0, with one scale a row or one for all. Of the four terms
-Z1 a2 and the product remain, and the first does not depend on the input: it is added to the bias once, when the
layer is built.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor, nn

from effnlp_lessons.quantization.fixed_point import INT32_MAX, quantize_multiplier, requantize
from effnlp_lessons.quantization.quantizers import LinearQuantizer, block_of, integer_range, symmetric_quantizer

ACTIVATIONS = (None, "relu", "relu6")


def largest_inner_size(first: int, second: int) -> int:
    """How many products of integers up to `first` and `second` in absolute value always have a sum within int32.

    66,311 for 127 and 255 (a symmetric weight, a code less its zero point); 133,144 for 127 and 127.
    """
    if min(first, second) < 1:
        raise ValueError(f"first and second must be >= 1, got {first} and {second}")
    return INT32_MAX // (first * second)


def _check_inner_size(size: int, first: int, second: int) -> None:
    if size > (largest := largest_inner_size(first, second)):
        raise ValueError(
            f"sums of {size} products of integers up to {first} and {second} can exceed int32: at most {largest}"
        )


def _plain(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows or its columns lie in memory one after the other, else a copy whose rows do.

    NOTE torch 2.13's `_int_mm` on a CPU leaves its result unset, without an error, where a matrix of one row has the
    strides (1, 1), as a transposed column has. Such a matrix is copied.
    """
    (rows, columns), (down, along) = matrix.shape[-2:], matrix.stride()[-2:]
    if (along == 1 and down >= columns) or (down == 1 and along >= rows > 1):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def integer_product(
    a: Int8[Tensor, "*batch rows inner"], b: Int8[Tensor, "*batch inner columns"]
) -> Int32[Tensor, "*batch rows columns"]:
    """The matrix product of int8 codes, summed exactly in int32, by `torch._int_mm`: the CPU's int8 instructions.

    `b` has two dimensions, or the batch dimensions of `a`. A transposed view costs no copy.

    Raises:
        ValueError: codes that are not int8, shapes that do not fit, an inner size whose sums could exceed int32.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise ValueError(f"codes must be int8, got {a.dtype} and {b.dtype}")  # _int_mm reads uint8 as if it were int8
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2] or (b.ndim > 2 and a.shape[:-2] != b.shape[:-2]):
        raise ValueError(f"matrices {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied")
    _check_inner_size(a.shape[-1], 128, 128)
    a, b = _plain(a), _plain(b)
    if a.ndim == b.ndim == 2:
        return torch._int_mm(a, b)
    if b.ndim == 2:
        return torch._int_mm(_plain(a.flatten(0, -2)), b).view(*a.shape[:-1], b.shape[1])
    out = torch.empty(*a.shape[:-1], b.shape[-1], dtype=torch.int32, device=a.device)
    for i, j, result in zip(a.flatten(0, -3), b.flatten(0, -3), out.flatten(0, -3), strict=True):
        torch._int_mm(i, j, out=result)
    return out


def zero_point_product(
    q1: Int8[Tensor, "rows inner"], z1: int, q2: Int8[Tensor, "inner columns"], z2: int
) -> Int32[Tensor, "rows columns"]:
    """sum_j (q1 - Z1) (q2 - Z2) of int8 codes, in the form without subtractions in the inner loop (Eq. 7 and 8).

    Raises:
        ValueError: as `integer_product`; zero points that are not int8; an inner size whose sums could exceed int32.
    """
    if not (-128 <= z1 <= 127 and -128 <= z2 <= 127):
        raise ValueError(f"zero points must be in -128 .. 127, got {z1} and {z2}")
    _check_inner_size(q1.shape[-1], max(127 - z1, 128 + z1), max(127 - z2, 128 + z2))
    a1 = q1.sum(-1, keepdim=True, dtype=torch.int32)
    a2 = q2.sum(-2, keepdim=True, dtype=torch.int32)
    # N Z1 Z2 - Z1 a2 - Z2 a1 + sum_j q1 q2; int32 wraps, and the total is in range
    return integer_product(q1, q2) + (q1.shape[-1] * z1 * z2 - z1 * a2 - z2 * a1)


# ------------------------------------------------------------------------------------------------ the layer


def _grid(name: str, quantizer: LinearQuantizer) -> tuple[float, int]:
    """Scale and zero point of a grid for int8 activations, one for the tensor."""
    if quantizer.scale.numel() != 1 or quantizer.zero_point.numel() != 1:
        raise ValueError(f"{name} must have one scale for the tensor, got {tuple(quantizer.scale.shape)}")
    if not -128 <= quantizer.q_min <= quantizer.q_max <= 127:
        raise ValueError(f"{name} must have int8 codes, got {quantizer.q_min} .. {quantizer.q_max}")
    return quantizer.scale.double().item(), int(quantizer.zero_point.item())


def _bias_of(bias: Tensor | None, out_features: int) -> Float[Tensor, " out"]:
    bias = torch.zeros(out_features) if bias is None else bias.detach()
    if bias.shape != (out_features,) or not torch.isfinite(bias).all():
        raise ValueError(f"bias must be {out_features} finite numbers, got shape {tuple(bias.shape)}")
    return bias.double()


class IntegerLinear(nn.Module):
    """A linear layer whose forward pass touches integers only: int8 codes (..., in) to int8 codes (..., out).

    `build` makes it from real weights. It is for inference: nothing in it learns.

    Args:
        weight: codes that are quantized already, -127 .. 127, as quantization-aware training leaves them.
        scale: S2, (out,) or ().
        bias: real numbers.
        input, output: grids with int8 codes, one scale each; without `output`, forward gives the accumulators.
        activation: None, "relu" or "relu6", fused into the last clamp.

    Attributes:
        weight: int8 (out, in), symmetric.
        bias: int32 (out), round(b / (S1 S2)) - Z1 a2.
        multiplier, shift: int32 (out), M = S1 S2 / S3 of every row; absent without an output grid.
        accumulator_scale: float64 (out), S1 S2: what one unit of the int32 accumulator is worth. It is no buffer and
            no part of the forward pass: it is for whoever reads the accumulators.
        input, output: the grids that the codes belong to, for the same use.

    Raises:
        ValueError: as `build`.
    """

    weight: Int8[Tensor, "out in"]
    bias: Int32[Tensor, " out"]
    multiplier: Int32[Tensor, " out"] | None
    shift: Int32[Tensor, " out"] | None

    def __init__(
        self,
        weight: Int8[Tensor, "out in"],
        scale: Float[Tensor, "*out"],
        bias: Float[Tensor, " out"] | None,
        input: LinearQuantizer,
        output: LinearQuantizer | None,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS or (activation and output is None):
            raise ValueError(f"activation must be one of {ACTIVATIONS}, None without output, got {activation!r}")
        if weight.dtype != torch.int8 or weight.ndim != 2 or (weight == -128).any():
            raise ValueError(f"weight must be int8 codes (out, in) in -127 .. 127, got {weight.dtype}")
        if scale.shape not in ((), (len(weight),)) or not (torch.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"scale must be one or {len(weight)} positive numbers, got shape {tuple(scale.shape)}")
        s1, z1 = _grid("input", input)
        bias = _bias_of(bias, len(weight))
        _check_inner_size(weight.shape[1], 127, max(input.q_max - z1, z1 - input.q_min))
        self.input, self.output, self.activation = input, output, activation
        self.accumulator_scale = (s1 * scale.detach().double()).expand(len(weight)).clone()
        # the bias has scale S1 S2 and zero point 0; - Z1 a2 does not depend on the input
        bias_codes = torch.round(bias / self.accumulator_scale)
        largest = weight.abs().sum(1, dtype=torch.int64) * max(input.q_max - z1, z1 - input.q_min)
        if (bias_codes.abs() + largest > INT32_MAX).any():
            raise ValueError("bias is too large for its scale S1 S2: the int32 accumulator could overflow")
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("bias", (bias_codes.long() - z1 * weight.sum(1, dtype=torch.int64)).to(torch.int32))
        if output is None:
            self.multiplier = self.shift = None
            return
        s3, self.zero_point = _grid("output", output)
        multiplier, shift = quantize_multiplier(self.accumulator_scale / s3)
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("shift", shift)
        # a fused activation is a narrower clamp: 0 is the code Z3, 6 is Z3 + 6 / S3
        self.q_min = output.q_min if activation is None else max(output.q_min, self.zero_point)
        six = self.zero_point + round(6 / s3) if activation == "relu6" else output.q_max
        self.q_max = min(output.q_max, six)

    @classmethod
    def build(
        cls,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        input: LinearQuantizer,
        output: LinearQuantizer | None,
        weight_bits: int = 8,
        granularity: str = "row",
        activation: str | None = None,
    ) -> IntegerLinear:
        """Quantize a real linear layer: symmetric weights of `weight_bits`, one scale a row or one a tensor.

        A row of tiny weights with a large bias gets a larger scale than its weights need, such that the bias fits.

        Raises:
            ValueError: numbers that are not finite, shapes that do not fit, codes beyond int8, an accumulator that
                could overflow, another word for `granularity` or `activation`.
        """
        if granularity not in ("row", "tensor"):
            raise ValueError(f"granularity must be 'row' or 'tensor', got {granularity!r}")
        block_of(tuple(weight.shape), granularity)  # a matrix
        weight = weight.detach()
        if not torch.isfinite(weight).all():
            raise ValueError("weight must be finite")
        q_min, q_max = integer_range(weight_bits, symmetric=True)
        reach = _bias_of(bias, len(weight)).abs() / _grid("input", input)[0]
        largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
        if granularity == "tensor" and len(weight):
            largest, reach = largest.amax(), reach.amax()
        scale = symmetric_quantizer(largest, weight_bits).scale.double()
        scale = torch.where((largest == 0) & (reach > 0), reach / 2**16, scale)  # nothing but a bias
        scale = torch.maximum(scale, reach / 2**30)  # the bias, in units of S1 S2, is at most 2^30
        column = scale[:, None] if scale.ndim else scale
        codes = LinearQuantizer(column, torch.zeros_like(column, dtype=torch.int32), q_min, q_max).quantize(weight)
        return cls(codes, scale, bias, input, output, activation)

    def accumulate(self, codes: Int8[Tensor, "... in"]) -> Int32[Tensor, "... out"]:
        """The int32 accumulators with the bias, Z1 a2 already subtracted; each unit is worth `accumulator_scale`.

        Raises:
            ValueError: codes that are not int8, or not of width `in`.
        """
        return integer_product(codes[None], self.weight.t()).add_(self.bias)[0]

    def forward(self, codes: Int8[Tensor, "... in"]) -> Int8[Tensor, "... out"]:
        """Codes of the input grid to codes of the output grid; without an output grid, the accumulators.

        Raises:
            ValueError: codes that are not int8, or not of width `in`.
        """
        accumulator = self.accumulate(codes)
        if self.multiplier is None:
            return accumulator
        return requantize(accumulator, self.multiplier, self.shift, self.zero_point, self.q_min, self.q_max)

    def extra_repr(self) -> str:
        """Widths and activation."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, activation={self.activation}"
