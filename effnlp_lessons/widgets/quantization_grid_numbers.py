"""The numbers of `quantization_grid_explorer`: the errors of a quantized matrix by block and kind, and its bytes.

Every squared error is of one of two kinds: clipping, where the clamp of q = clamp(round(z / S) + Z) changed the code,
and rounding, everywhere else. Signal to noise is 10 log10(sum z² / sum (z - z')²) in dB, z' the nearest level. Over a
whole block it is never below 0, since 0 is a level of every grid and no level is further from a weight than 0 is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from effnlp_lessons.quantization.packing import packed_bytes
from effnlp_lessons.quantization.quantizers import (
    Granularity,
    QuantizedMatrix,
    RangeRule,
    integer_range,
    min_max,
    quantize_matrix,
    to_blocks,
)


def share_of_range(share: float) -> RangeRule:
    """The rule of a range that reaches `share` (above 0, at most 1) of the way from 0 to both ends."""

    def ranges(values: Float[Tensor, "blocks numbers"]) -> tuple[Tensor, Tensor]:
        low, high = min_max(values)
        return share * low, share * high

    return ranges


def bytes_on_disk(numbers: int, bits: int, blocks: int, symmetric: bool) -> int:
    """Bytes of `numbers` codes and `blocks` grids, as `packing.save_quantized` writes them; a file adds a header.

    Codes and, unless the grid is symmetric, zero points take `bits` bits each, scales 4 bytes (float32).
    """
    zero_points = 0 if symmetric else packed_bytes(blocks, bits)
    return packed_bytes(numbers, bits) + zero_points + 4 * blocks


@dataclass(frozen=True)
class Errors:
    """What quantizing a matrix did to each of its blocks: arrays (row blocks, column blocks).

    Attributes:
        quantized: the matrix on its grids.
        signal: sum of the squared weights.
        rounding, clipping: sum of the squared errors of the weights whose code the clamp left, or changed.
        clipped: how many it changed.
    """

    quantized: QuantizedMatrix
    signal: np.ndarray
    rounding: np.ndarray
    clipping: np.ndarray
    clipped: np.ndarray

    def without(self, i: int, j: int) -> tuple[float, float, float, int]:
        """Signal, rounding, clipping and clipped of all blocks but one."""
        left = np.ones(self.signal.shape, dtype=bool)
        left[i, j] = False
        signal, rounding, clipping = (float(part[left].sum()) for part in (self.signal, self.rounding, self.clipping))
        return signal, rounding, clipping, int(self.clipped[left].sum())


def is_clipped(
    weights: Float[Tensor, "*shape"], scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool
) -> Bool[Tensor, "*shape"]:
    """Whether the code round(z / S) + Z is one that the clamp changes."""
    q_min, q_max = integer_range(bits, symmetric)
    code = (weights / scale).round_().add_(zero_point)
    return (code < q_min) | (code > q_max)


def measure(
    matrix: Float[Tensor, "rows columns"], bits: int, granularity: Granularity, symmetric: bool, share: float
) -> Errors:
    """Quantize a matrix with `quantize_matrix` and take the errors of its blocks apart; sums are in float64."""
    quantized = quantize_matrix(matrix, bits, granularity, symmetric, share_of_range(share))
    blocks = to_blocks(matrix, quantized.block)
    cut = is_clipped(blocks, quantized.scale[..., None], quantized.zero_point[..., None], bits, symmetric)
    squares = (to_blocks(quantized.dequantize(), quantized.block) - blocks).square_()
    total = squares.sum(-1, dtype=torch.float64)
    clipping = squares.mul_(cut).sum(-1, dtype=torch.float64)
    parts = blocks.square().sum(-1, dtype=torch.float64), total - clipping, clipping, cut.sum(-1)
    return Errors(quantized, *(part.numpy() for part in parts))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite without noise."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
