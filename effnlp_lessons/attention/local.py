"""Local attention, Image Transformer: the queries of a block share a memory block (Parmar et al. 2018, 1802.05751).

1D (sec. 3.3): the pixels in raster order are cut into query blocks. The memory block of a query block is the block
itself and a flange of positions before it (and after it, where the future may be seen). Every query of the block
attends to the same memory, so this is no sliding window: with `causal` the first query of a block sees flange + 1
keys and the last one flange + block.
2D: the query block is a rectangle of the image, its memory the rectangle with a flange above, left and right (and
below, where the future may be seen). The same number of keys lies more evenly around the query.

NOTE in 2D the paper generates the image one query block after another, so there "the past" is all earlier blocks.
Here the past is j <= i in the raster order of the whole image, the order in which a decoder of the course reads. A
query then does not see those rows of the left flange that lie below its own.
NOTE the released code (tensor2tensor) sees padding by its all-zero vectors, which hides a real key that is zero,
and falls back to one block for short sequences. Here padding is a mask and a short sequence needs no special case.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from effnlp_lessons.attention.blocks import (
    attend,
    check_inputs,
    check_not_negative,
    check_positive,
    neighbour_blocks,
    pad_to_multiple,
    real_tokens,
    without_padding,
)


def _check_rectangles(block: tuple[int, int], flange: tuple[int, int]) -> None:
    for name, sides in {"block": block, "flange": flange}.items():
        if not isinstance(sides, tuple | list) or len(sides) != 2:
            raise ValueError(f"{name} must be a pair (rows, columns), got {sides!r}")
    check_positive(**{"block[0]": block[0], "block[1]": block[1]})
    check_not_negative(**{"flange[0]": flange[0], "flange[1]": flange[1]})


def _in_memory(positions: int, block: int, before: int, after: int) -> Bool[Tensor, "positions positions"]:
    """True where position j lies in the memory block of i's block, along one axis."""
    i, j = torch.arange(positions)[:, None], torch.arange(positions)[None, :]
    start = i // block * block
    return (j >= start - before) & (j < start + block + after)


# ---------------------------------------------------------------------------------------- one dimension


def local_mask(length: int, block: int, flange: int, causal: bool = False) -> Bool[Tensor, "length length"]:
    """True where a query may attend: the key lies in its memory block and, if `causal`, not in its future.

    Raises:
        ValueError: a length or block that is no integer >= 1, a flange that is no integer >= 0.
    """
    check_positive(length=length, block=block)
    check_not_negative(flange=flange)
    mask = _in_memory(length, block, flange, 0 if causal else flange)
    return mask.tril() if causal else mask


def local_attention(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_head"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    block: int,
    flange: int,
    causal: bool = False,
) -> Float[Tensor, "batch heads length d_head"]:
    """Attention under `local_mask`: length * (block + 2 flange) scores a head, (block + flange) if `causal`.

    Args:
        key_padding_mask: True = a real token. Padded keys are never attended to.
        block: queries that share a memory block, l_q in the paper.
        flange: further positions on each side (`causal`: on the left) of it, l_m; no multiple of the block needed.

    Returns:
        Zeros for padded queries and for a query whose memory has no real token.

    Raises:
        ValueError: shapes that do not fit, a block that is no integer >= 1, a flange that is no integer >= 0.
    """
    check_inputs(q, k, v, key_padding_mask)
    check_positive(block=block)
    check_not_negative(flange=flange)
    length = q.shape[2]
    block, flange = min(block, length), min(flange, length)  # more would only be filling
    after = 0 if causal else flange
    q = pad_to_multiple(q, block).unflatten(2, (-1, block))
    k, v = (neighbour_blocks(x, block, flange, after) for x in (k, v))
    real = neighbour_blocks(real_tokens(key_padding_mask, length, q.device), block, flange, after, dim=1)
    allowed = real[:, None, :, None, :]  # (batch or 1, 1, blocks, 1, flange + block + after)
    if causal:
        # key m of the memory stands at start - flange + m, query r at start + r
        past = torch.arange(flange + block, device=q.device) - flange <= torch.arange(block, device=q.device)[:, None]
        allowed = allowed & past
    output = attend(q, k, v, allowed).flatten(2, 3)[:, :, :length]
    return without_padding(output, key_padding_mask)


# --------------------------------------------------------------------------------------- two dimensions


def local_mask_2d(
    height: int, width: int, block: tuple[int, int], flange: tuple[int, int], causal: bool = False
) -> Bool[Tensor, "length length"]:
    """True where a query pixel may attend; pixels in raster order, length = height * width.

    Args:
        block: rows and columns of a query block.
        flange: rows above and below, columns left and right of it that belong to its memory. With `causal` none
            below, and no key after the query in raster order.

    Raises:
        ValueError: sizes that are no integer >= 1, flanges that are no integer >= 0.
    """
    check_positive(height=height, width=width)
    _check_rectangles(block, flange)
    rows = _in_memory(height, block[0], flange[0], 0 if causal else flange[0])
    columns = _in_memory(width, block[1], flange[1], flange[1])
    # pixel = row * width + column: (height, 1, height, 1) & (1, width, 1, width)
    mask = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(height * width, height * width)
    return mask.tril() if causal else mask


def _rectangles(x: Tensor, block: tuple[int, int], above: int, below: int, side: int) -> Tensor:
    """(..., height, width, rest) -> (..., blocks, positions, rest): blocks with their flange, in raster order."""
    x = neighbour_blocks(x, block[0], above, below, dim=-3)  # (..., block rows, rows, width, rest)
    x = neighbour_blocks(x, block[1], side, side, dim=-2)  # (..., block rows, rows, block columns, columns, rest)
    return x.transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)


def local_attention_2d(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_head"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    width: int,
    block: tuple[int, int],
    flange: tuple[int, int],
    causal: bool = False,
) -> Float[Tensor, "batch heads length d_head"]:
    """Attention under `local_mask_2d` on an image in raster order, one small attention for every query block.

    A head has length * (rows + 2 flange rows) * (columns + 2 flange columns) scores; with `causal` the flange rows
    count once.

    Args:
        key_padding_mask: True = a real pixel. Padded keys are never attended to.
        width: pixels in a row of the image. The last row may be unfinished.
        block: rows and columns of a query block.
        flange: rows above and below (`causal`: above), columns left and right of it.

    Returns:
        Zeros for padded queries and for a query whose memory has no real pixel.

    Raises:
        ValueError: shapes that do not fit, sizes that are no integer >= 1, flanges that are no integer >= 0.
    """
    check_inputs(q, k, v, key_padding_mask)
    check_positive(width=width)
    _check_rectangles(block, flange)
    length = q.shape[2]
    height = -(-length // width)
    rows, columns = min(block[0], height), min(block[1], width)  # more would only be filling
    above, side = min(flange[0], height), min(flange[1], width)
    below = 0 if causal else above
    real = real_tokens(key_padding_mask, length, q.device)
    real = pad_to_multiple(real, width, dim=1).unflatten(1, (height, width))[..., None]
    q, k, v = (pad_to_multiple(x, width).unflatten(2, (height, width)) for x in (q, k, v))
    queries = _rectangles(q, (rows, columns), 0, 0, 0)
    k, v, real = (_rectangles(x, (rows, columns), above, below, side) for x in (k, v, real))
    allowed = real[:, None, :, None, :, 0]  # (batch or 1, 1, blocks, 1, keys)
    if causal:
        # inside a memory block: row and column of every query and key, counted from the corner of the query block
        row, column = torch.arange(rows, device=q.device), torch.arange(columns, device=q.device)
        key_row = torch.arange(-above, rows, device=q.device)
        key_column = torch.arange(-side, columns + side, device=q.device)
        earlier_row = key_row[:, None] < row[:, None, None, None]
        same_row = (key_row[:, None] == row[:, None, None, None]) & (key_column <= column[:, None, None])
        allowed = allowed & (earlier_row | same_row).flatten(2, 3).flatten(0, 1)
    output = attend(queries, k, v, allowed)
    # back to raster order: (block rows, block columns, rows, columns) -> (block rows, rows, block columns, columns)
    block_columns = -(-width // columns)
    output = output.unflatten(3, (rows, columns)).unflatten(2, (-1, block_columns)).transpose(3, 4)
    output = output.flatten(4, 5).flatten(2, 3)[:, :, :height, :width].flatten(2, 3)[:, :, :length]
    return without_padding(output, key_padding_mask)
