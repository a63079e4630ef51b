"""Linear quantization: real numbers on an even grid of 2^k integers, and how many numbers share a grid.

    z = S (q - Z)         S > 0: scale, real.   Z: zero point, an integer of q's type; q = Z stands for exactly 0.
    q = clamp(round(z / S) + Z, q_min, q_max)

The lecture's z = S (q - Z) is r = S (q - Z) of Jacob et al. 2017 (arXiv 1712.05877, Eq. 1): z and r are the same real
number, and the lecture's capital Z is their zero point, not a real number. Symmetric quantization has Z = 0. A grid
may serve a whole matrix, a row (output channel), a group of consecutive inputs, or any block of a matrix.

NOTE round is torch.round, half to even: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2. C's round() goes away from zero.
NOTE "symmetric" here is the restricted range -(2^(k-1) - 1) .. 2^(k-1) - 1, with S = max|z| / (2^(k-1) - 1), as in
Jacob et al. for weights. torch.ao's symmetric observer divides by (2^k - 1) / 2 instead and also uses -2^(k-1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Granularity = str | int | tuple[int, int]
# lowest and highest real number that a grid must reach, from values (blocks, numbers in a block); see `ranges`
RangeRule = Callable[[Float[Tensor, "blocks numbers"]], tuple[Float[Tensor, " blocks"], Float[Tensor, " blocks"]]]


def check_bits(bits: int) -> None:
    """Raises ValueError unless `bits` is an integer from 2 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code: 0 .. 2^k - 1, or symmetric -(2^(k-1) - 1) .. 2^(k-1) - 1.

    Raises:
        ValueError: if `bits` is not an integer from 2 to 8.
    """
    check_bits(bits)
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


@dataclass(frozen=True)
class LinearQuantizer:
    """An even grid, or many of them: z = S (q - Z) for q in q_min .. q_max.

    Attributes:
        scale: S, real and positive; broadcastable to what is quantized.
        zero_point: Z, int32, of the scale's shape, in q_min .. q_max.
    """

    scale: Float[Tensor, "*blocks"]
    zero_point: Int[Tensor, "*blocks"]
    q_min: int
    q_max: int

    def quantize(self, z: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The codes q = clamp(round(z / S) + Z, q_min, q_max), uint8 where q_min is 0, int8 otherwise.

        Raises:
            ValueError: if `z` holds NaN.
        """
        if torch.isnan(z).any():
            raise ValueError("z must hold numbers, got NaN")
        q = torch.clamp(torch.round(z / self.scale) + self.zero_point, self.q_min, self.q_max)
        return q.to(torch.uint8 if self.q_min >= 0 else torch.int8)

    def dequantize(self, q: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The real numbers S (q - Z) that the codes stand for, in the scale's dtype."""
        return self.scale * (q.to(torch.int32) - self.zero_point)

    def __call__(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Quantize and dequantize: `z` moved to the nearest point of the grid ("fake quantization")."""
        return self.dequantize(self.quantize(z))


def _check_range(low: Tensor, high: Tensor) -> None:
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("low and high must be finite")
    if (low > high).any():
        raise ValueError("low must not be above high")


def affine_quantizer(
    low: Float[Tensor, "*blocks"], high: Float[Tensor, "*blocks"], bits: int, signed: bool = False
) -> LinearQuantizer:
    """The grid of 2^k codes over [low, high], any zero point (Jacob et al. 2017, sec. 2.1 and 3).

    The range is first extended to contain 0, which must be exact: padding and ReLU give zeros. Then
    S = (high - low) / (2^k - 1) and Z = clamp(round(q_min - low / S)). A range of width 0 gets S = 1.

    Args:
        signed: codes -2^(k-1) .. 2^(k-1) - 1 instead of 0 .. 2^k - 1; the same grid, with Z shifted.

    Raises:
        ValueError: bits out of range, a range that is not finite or upside down.
    """
    check_bits(bits)
    low, high = torch.as_tensor(low), torch.as_tensor(high)
    _check_range(low, high)
    q_min, q_max = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else integer_range(bits, symmetric=False)
    low, high = low.clamp(max=0), high.clamp(min=0)
    # S = (b - a) / (2^k - 1)
    width, steps = high - low, q_max - q_min
    scale = width / steps
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # Z = q_min - a / S, in float64: a float32 quotient can fall on the wrong side of a half
    exact = low.double() * steps / torch.where(width > 0, width, torch.ones_like(width)).double()
    zero_point = torch.round(q_min - exact).clamp(q_min, q_max).to(torch.int32)
    return LinearQuantizer(scale, zero_point, q_min, q_max)


def symmetric_quantizer(largest: Float[Tensor, "*blocks"], bits: int) -> LinearQuantizer:
    """The grid of 2^k - 1 codes over [-largest, largest], Z = 0: S = largest / (2^(k-1) - 1).

    Raises:
        ValueError: bits out of range, `largest` that is not finite or negative.
    """
    q_min, q_max = integer_range(bits, symmetric=True)
    largest = torch.as_tensor(largest)
    _check_range(-largest, largest)
    scale = largest / q_max
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return LinearQuantizer(scale, torch.zeros_like(scale, dtype=torch.int32), q_min, q_max)


# -------------------------------------------------------------------------------------------- granularity


def block_of(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, int]:
    """Rows and columns of the block of a matrix (rows, columns) that shares one grid.

    `granularity`: "tensor", "row" (one output channel of a weight (out, in)), a whole number g (g consecutive inputs
    of one row), or the block itself, (rows, columns).

    Raises:
        ValueError: no matrix, another word, or a block that does not divide the matrix.
    """
    if len(shape) != 2:
        raise ValueError(f"a matrix (rows, columns) is needed, got shape {tuple(shape)}")
    rows, columns = shape
    if isinstance(granularity, str):
        blocks = {"tensor": (rows, columns), "row": (1, columns)}
        if granularity not in blocks:
            raise ValueError(f"granularity must be 'tensor', 'row', a group size or a block, got {granularity!r}")
        return blocks[granularity]
    block = (1, granularity) if isinstance(granularity, int) else tuple(granularity)
    if len(block) != 2 or min(block) < 1 or rows % block[0] or columns % block[1]:
        raise ValueError(f"granularity {granularity!r} does not divide a matrix of {rows} x {columns}")
    return block


def to_blocks(
    matrix: Float[Tensor, "rows columns"], block: tuple[int, int]
) -> Float[Tensor, "row_blocks column_blocks numbers"]:
    """The matrix cut into blocks, the numbers of each in one row; a copy where memory is laid out otherwise."""
    tiles = matrix.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    return tiles.transpose(1, 2).flatten(2)


def from_blocks(
    blocks: Float[Tensor, "row_blocks column_blocks numbers"], block: tuple[int, int]
) -> Float[Tensor, "rows columns"]:
    """The inverse of `to_blocks`."""
    return blocks.unflatten(2, block).transpose(1, 2).flatten(2).flatten(0, 1)


def min_max(values: Float[Tensor, "blocks numbers"]) -> tuple[Float[Tensor, " blocks"], Float[Tensor, " blocks"]]:
    """The smallest and the largest number of every block: the plainest rule for a range."""
    return values.amin(-1), values.amax(-1)


def block_quantizer(
    blocks: Float[Tensor, "row_blocks column_blocks numbers"], bits: int, symmetric: bool, ranges: RangeRule
) -> LinearQuantizer:
    """The grids of all blocks, (row_blocks, column_blocks, 1); arguments and errors as `quantize_matrix`."""
    low, high = (bound.unflatten(0, blocks.shape[:2])[..., None] for bound in ranges(blocks.flatten(0, 1)))
    if symmetric:
        return symmetric_quantizer(torch.maximum(low.abs(), high.abs()), bits)
    return affine_quantizer(low, high, bits)


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix as codes with the grids of its blocks.

    Attributes:
        codes: int8 or uint8 (rows, columns), one code a byte; `packing` makes them k bits.
        scale, zero_point: float and int32 (rows / block rows, columns / block columns).
        bits: k.
        symmetric: whether every zero point is 0 and the codes are signed.
        block: rows and columns of a block.
    """

    codes: Int[Tensor, "rows columns"]
    scale: Float[Tensor, "row_blocks column_blocks"]
    zero_point: Int[Tensor, "row_blocks column_blocks"]
    bits: int
    symmetric: bool
    block: tuple[int, int]

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        """The real matrix S (q - Z), in the scale's dtype."""
        q = to_blocks(self.codes.to(torch.int32), self.block)
        return from_blocks(self.scale[..., None] * (q - self.zero_point[..., None]), self.block)


def quantize_matrix(
    matrix: Float[Tensor, "rows columns"],
    bits: int,
    granularity: Granularity = "row",
    symmetric: bool = True,
    ranges: RangeRule = min_max,
) -> QuantizedMatrix:
    """Quantize a matrix, every block on a grid of its own.

    Args:
        granularity: see `block_of`.
        ranges: the rule that gives each block's lowest and highest number (`min_max`, or one of `ranges`); a
            symmetric grid reaches the larger of the two in absolute value.

    Raises:
        ValueError: bits, granularity or shape out of range, numbers that are not finite.
    """
    block = block_of(tuple(matrix.shape), granularity)
    blocks = to_blocks(matrix.detach(), block)
    quantizer = block_quantizer(blocks, bits, symmetric, ranges)
    codes = from_blocks(quantizer.quantize(blocks), block)
    return QuantizedMatrix(codes, quantizer.scale[..., 0], quantizer.zero_point[..., 0], bits, symmetric, block)
