"""Sparse Transformer: two sparse sets of keys, together a path to all of the past (Child et al. 2019, 1904.10509).

Every query i has two sets of keys, both in the past, j <= i (sec. 4.3). With a stride l near sqrt(n) a set has about
sqrt(n) keys, and the n² pairs become n sqrt(n).

    strided   A1 = the last l positions and i itself          A2 = every l-th position:       (i - j) mod l = 0
    fixed     A1 = i's block of l positions: j//l = i//l      A2 = the last c of each block:   j mod l >= l - c

Three ways to give them to heads (sec. 5.1): merged, every head attends to both sets (Eq. 7); multi-head, heads take
the sets in turn (Eq. 8); interleaved, layers take the sets in turn (Eq. 6).

Two layers reach all of the past. Strided: in either order. Fixed: only with A1 in the lower layer, which gathers a
block into its summary positions, and A2 above, which reads them; the query's own block then comes through the
residual sum. The other order reaches the summary positions and the own block, nothing else. With c < l the first
l - c rows have no key under fixed A2 alone: they get zeros.

NOTE strided A1 has l + 1 positions in the paper (t = max(0, i - l) .. i) and l in the released code: option `window`.
Merged, both are the same set: the one position that differs, i - l, is in A2.
NOTE the paper counts from 1 where it writes "j mod l in {l - c, .., l}"; we count from 0, c positions in each block.
NOTE the paper prefers fixed heads with distinct sub-blocks of c positions, and the released code gives head h its
own, counted from the end of the block, always merged with A1. Here all heads share the last c, as in the equation.
NOTE strided suits data with a period, as the rows of an image. On text the paper finds it poor and takes fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    softmax_over_parts,
    without_padding,
)
from effnlp_lessons.attention.longformer import window_attention
from effnlp_lessons.dense_attention import attention_scores

WINDOWS = ("paper", "code")
COMBINATIONS = ("merged", "multi-head", "interleaved")

# ---------------------------------------------------------------------------------------- the definitions


def _check_window(window: str) -> None:
    if window not in WINDOWS:
        raise ValueError(f"window must be one of {WINDOWS}, got {window!r}")


def _check_summary(stride: int, summary: int) -> None:
    check_positive(stride=stride, summary=summary)
    if summary > stride:
        raise ValueError(f"summary must be from 1 to stride={stride}, got {summary}")


def _check_combination(combine: str, layer: int) -> None:
    if combine not in COMBINATIONS:
        raise ValueError(f"combine must be one of {COMBINATIONS}, got {combine!r}")
    check_not_negative(layer=layer)


def strided_masks(length: int, stride: int, window: str = "paper") -> Bool[Tensor, "2 length length"]:
    """Sets A1 and A2 of strided attention, True where a query may attend (sec. 4.3).

    Args:
        window: "paper": A1 holds i - stride .. i; "code": one position less, i - stride + 1 .. i.

    Raises:
        ValueError: a length or stride that is no integer >= 1, an unknown window.
    """
    check_positive(length=length, stride=stride)
    _check_window(window)
    distance = torch.arange(length)[:, None] - torch.arange(length)  # i - j
    near = distance <= (stride if window == "paper" else stride - 1)
    return torch.stack([near, distance % stride == 0]) & (distance >= 0)


def fixed_masks(length: int, stride: int, summary: int) -> Bool[Tensor, "2 length length"]:
    """Sets A1 and A2 of fixed attention, True where a query may attend (sec. 4.3).

    Args:
        stride: positions in a block, l in the paper.
        summary: positions at the end of each block that all later queries see, c in the paper.

    Raises:
        ValueError: a length or stride that is no integer >= 1, a summary that is not from 1 to stride.
    """
    check_positive(length=length)
    _check_summary(stride, summary)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    block = i // stride == j // stride
    return torch.stack([block, (j % stride >= stride - summary).expand(length, length)]) & (j <= i)


def head_masks(
    masks: Bool[Tensor, "2 length length"], heads: int, combine: str = "merged", layer: int = 0
) -> Bool[Tensor, "heads length length"]:
    """What every head of a layer may attend to, from the two sets (sec. 5.1).

    Args:
        combine: "merged", each head has the union; "multi-head", head h has set h mod 2; "interleaved", all heads
            of layer r have set r mod 2.
        layer: r, counted from 0. Only "interleaved" reads it.

    Raises:
        ValueError: heads that is no integer >= 1, an unknown combination, a layer that is no integer >= 0.
    """
    check_positive(heads=heads)
    _check_combination(combine, layer)
    if combine == "merged":
        return masks.any(0).repeat(heads, 1, 1)
    if combine == "interleaved":
        return masks[layer % 2].repeat(heads, 1, 1)
    return masks[torch.arange(heads) % 2]


# ------------------------------------------------------------------------------- one set: (q, k, v, mask) -> output


def _own_residue(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, stride: int) -> Tensor:
    """Strided A2: positions that are equal modulo the stride form short texts of their own, each dense and causal."""
    length = q.shape[2]
    # (batch, heads, length, d) -> (batch, heads, stride, length / stride, d)
    q, k, v = (pad_to_multiple(x, stride).unflatten(2, (-1, stride)).transpose(2, 3) for x in (q, k, v))
    real = pad_to_multiple(real_tokens(key_padding_mask, length, q.device), stride, dim=1)
    real = real.unflatten(1, (-1, stride)).transpose(1, 2)
    past = torch.ones(q.shape[3], q.shape[3], dtype=torch.bool, device=q.device).tril()
    return attend(q, k, v, real[:, None, :, None, :] & past).transpose(2, 3).flatten(2, 3)[:, :, :length]


def _own_block(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, stride: int) -> Tensor:
    """Fixed A1: every block is dense and causal."""
    length = q.shape[2]
    block = min(stride, length)
    q, k, v = (pad_to_multiple(x, block).unflatten(2, (-1, block)) for x in (q, k, v))
    real = pad_to_multiple(real_tokens(key_padding_mask, length, q.device), block, dim=1).unflatten(1, (-1, block))
    past = torch.ones(block, block, dtype=torch.bool, device=q.device).tril()
    return attend(q, k, v, real[:, None, :, None, :] & past).flatten(2, 3)[:, :, :length]


def _summary_positions(length: int, stride: int, summary: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    return position[position % stride >= stride - summary]


def _summaries(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, stride: int, summary: int) -> Tensor:
    """Fixed A2: the summary keys, gathered once for all queries. The only table is (length, summaries)."""
    length = q.shape[2]
    chosen = _summary_positions(length, stride, summary, q.device)
    past = chosen <= torch.arange(length, device=q.device)[:, None]
    allowed = real_tokens(key_padding_mask, length, q.device)[:, None, None, None, chosen] & past
    k, v = k.index_select(2, chosen), v.index_select(2, chosen)
    return attend(q[:, :, None], k[:, :, None], v[:, :, None], allowed)[:, :, 0]  # all queries are one block


# ----------------------------------------------------------------------------------- both sets in one softmax


def _strided_merged(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, stride: int) -> Tensor:
    """A1 or A2, each key once: distances 0 .. stride - 1 from the window, stride, 2 stride, .. from the residues."""
    length = q.shape[2]
    real = real_tokens(key_padding_mask, length, q.device)
    near_k, near_v = (neighbour_blocks(x, stride, stride - 1, 0) for x in (k, v))
    near_real = neighbour_blocks(real, stride, stride - 1, 0, dim=1)
    # key column c of a block stands at distance r + stride - 1 - c from query row r
    row, column = torch.arange(stride, device=q.device)[:, None], torch.arange(2 * stride - 1, device=q.device)
    band = (column >= row) & (column <= row + stride - 1)
    q, far_k, far_v = (pad_to_multiple(x, stride).unflatten(2, (-1, stride)) for x in (q, k, v))
    far_k, far_v = far_k.transpose(2, 3), far_v.transpose(2, 3)  # (batch, heads, stride, blocks, d)
    far_real = pad_to_multiple(real, stride, dim=1).unflatten(1, (-1, stride)).transpose(1, 2)
    earlier = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril(-1)
    # both tables as (batch, heads, blocks, stride, keys)
    scores = [attention_scores(q, near_k), attention_scores(q.transpose(2, 3), far_k).transpose(2, 3)]
    allowed = [near_real[:, None, :, None, :] & band, far_real[:, None, None] & earlier[:, None]]
    near, far = softmax_over_parts(scores, allowed)
    output = near @ near_v + (far.transpose(2, 3) @ far_v).transpose(2, 3)
    return output.flatten(2, 3)[:, :, :length]


def _fixed_merged(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, stride: int, summary: int
) -> Tensor:
    """A1 or A2, each key once: the own block whole, and the summaries of earlier blocks only."""
    length = q.shape[2]
    block = min(stride, length)
    real = real_tokens(key_padding_mask, length, q.device)
    chosen = _summary_positions(length, stride, summary, q.device)
    queries, own_k, own_v = (pad_to_multiple(x, block).unflatten(2, (-1, block)) for x in (q, k, v))
    own_real = pad_to_multiple(real, block, dim=1).unflatten(1, (-1, block))
    blocks = queries.shape[2]
    # every block reads all summaries, without those that are its own or later
    keys, values = (
        torch.cat([own, x.index_select(2, chosen).unsqueeze(2).expand(-1, -1, blocks, -1, -1)], dim=3)
        for own, x in ((own_k, k), (own_v, v))
    )
    past = torch.ones(block, block, dtype=torch.bool, device=q.device).tril()
    earlier = chosen // stride < torch.arange(blocks, device=q.device)[:, None]  # (blocks, summaries)
    near = own_real[:, None, :, None, :] & past
    far = (real[:, None, chosen] & earlier)[:, None, :, None, :].expand(-1, -1, -1, block, -1)
    return attend(queries, keys, values, torch.cat([near, far], dim=-1)).flatten(2, 3)[:, :, :length]


# ------------------------------------------------------------------------------------------ the two attentions


def _combined(
    sets: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    merged: Callable[..., Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    key_padding_mask: Tensor | None,
    combine: str,
    layer: int,
) -> Tensor:
    if combine == "merged":
        output = merged(*inputs, key_padding_mask)
    elif combine == "interleaved":
        output = sets[layer % 2](*inputs, key_padding_mask)
    else:
        output = torch.empty_like(inputs[2])
        for first_head in range(min(2, output.shape[1])):
            part = (x[:, first_head::2] for x in inputs)
            output[:, first_head::2] = sets[first_head](*part, key_padding_mask)
    return without_padding(output, key_padding_mask)


def strided_attention(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_head"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    stride: int,
    window: str = "paper",
    combine: str = "merged",
    layer: int = 0,
) -> Float[Tensor, "batch heads length d_head"]:
    """Attention under `head_masks(strided_masks(...))`: at most about 2 stride + length / stride scores a query.

    Args:
        key_padding_mask: True = a real token. Padded keys are never attended to.
        stride: l in the paper, near sqrt(length).
        window: "paper" or "code", see `strided_masks`; it makes no difference to "merged".
        combine, layer: see `head_masks`.

    Returns:
        Zeros for padded queries and for a query whose keys are all padding.

    Raises:
        ValueError: shapes that do not fit, a stride that is no integer >= 1, an unknown window or combination,
            a layer that is no integer >= 0.
    """
    check_inputs(q, k, v, key_padding_mask)
    check_positive(stride=stride)
    _check_window(window)
    _check_combination(combine, layer)
    stride = min(stride, q.shape[2])  # all distances are smaller: more would only be filling
    near = partial(window_attention, window=stride if window == "paper" else stride - 1, causal=True)
    sets = (near, partial(_own_residue, stride=stride))
    return _combined(sets, partial(_strided_merged, stride=stride), (q, k, v), key_padding_mask, combine, layer)


def fixed_attention(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_head"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    stride: int,
    summary: int,
    combine: str = "merged",
    layer: int = 0,
) -> Float[Tensor, "batch heads length d_head"]:
    """Attention under `head_masks(fixed_masks(...))`: at most stride + summary * length / stride scores a query.

    Args:
        key_padding_mask: True = a real token. Padded keys are never attended to.
        stride: positions in a block, l in the paper.
        summary: positions at the end of each block that all later queries see, c in the paper.
        combine, layer: see `head_masks`.

    Returns:
        Zeros for padded queries and for a query without a real key, as the first stride - summary under A2 alone.

    Raises:
        ValueError: shapes that do not fit, a stride that is no integer >= 1, a summary that is not from 1 to stride,
            an unknown combination, a layer that is no integer >= 0.
    """
    check_inputs(q, k, v, key_padding_mask)
    _check_summary(stride, summary)
    _check_combination(combine, layer)
    sets = (partial(_own_block, stride=stride), partial(_summaries, stride=stride, summary=summary))
    merged = partial(_fixed_merged, stride=stride, summary=summary)
    return _combined(sets, merged, (q, k, v), key_padding_mask, combine, layer)
