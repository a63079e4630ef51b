"""What the fast paths of all patterns share: cut the sequence into blocks, gather keys for each, one softmax.

A pattern is fast when every block of queries needs only a few blocks of keys. Then the work is a batch of
small dense attentions, and no table of n x n numbers is ever made. The batch goes to torch's
`scaled_dot_product_attention`, whose CPU and GPU kernels read strided views: overlapping blocks
(`neighbour_blocks`) are not copied for a batch of one text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from effnlp_lessons.dense_attention import check_key_padding_mask, masked_softmax


def check_inputs(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> None:
    """Raise a ValueError unless q, k, v are (batch, heads, length, d_head) of self-attention and the mask fits."""
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k, v must be (batch, heads, length, d_head), got {q.ndim}, {k.ndim}, {v.ndim} dims")
    if q.shape != k.shape or k.shape[:3] != v.shape[:3]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"a pattern needs as many keys as queries: {shapes} do not fit together")
    if q.shape[2] == 0:
        raise ValueError("q, k, v must hold at least one token, got length 0")
    check_key_padding_mask(key_padding_mask, q.shape[0], q.shape[2])


def check_positive(**sizes: int) -> None:
    """Raise a ValueError naming the first argument that is not an integer >= 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {size!r}")


def check_not_negative(**sizes: int) -> None:
    """Raise a ValueError naming the first argument that is not an integer >= 0."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"{name} must be an integer >= 0, got {size!r}")


def pad_to_multiple(x: Tensor, multiple: int, dim: int = 2) -> Tensor:
    """`x` with zeros (False) appended along `dim` up to a multiple; `x` itself if it is one already."""
    missing = -x.shape[dim] % multiple
    if missing == 0:
        return x
    after = x.ndim - 1 - dim % x.ndim  # F.pad counts dimensions from the last
    return F.pad(x, (0, 0) * after + (0, missing))


def real_tokens(
    key_padding_mask: Bool[Tensor, "batch length"] | None, length: int, device: torch.device | None = None
) -> Bool[Tensor, "batch_or_1 length"]:
    """The mask itself, or (1, length) True: what `pad_to_multiple` then marks as not real is the filling."""
    if key_padding_mask is None:
        return torch.ones(1, length, dtype=torch.bool, device=device)
    return key_padding_mask


def without_padding(
    output: Float[Tensor, "batch heads length d_head"], key_padding_mask: Bool[Tensor, "batch length"] | None
) -> Float[Tensor, "batch heads length d_head"]:
    """The output with zeros at padded positions."""
    return output if key_padding_mask is None else output.masked_fill(~key_padding_mask[:, None, :, None], 0.0)


def neighbour_blocks(x: Tensor, block: int, before: int, after: int, dim: int = 2) -> Tensor:
    """Each block of `x` along `dim` with `before` positions to its left and `after` to its right.

    (..., length, rest) -> (..., blocks, before + block + after, rest), a view of one padded copy; the length
    is first filled up to a multiple of `block`, and what lies outside the sequence is zeros (False).
    """
    dim = dim % x.ndim
    missing = -x.shape[dim] % block
    padded = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (before, missing + after))
    return padded.unfold(dim, before + block + after, block).movedim(-1, dim + 1)


def attend(
    q: Float[Tensor, "batch heads blocks queries d_head"],
    k: Float[Tensor, "batch heads blocks keys d_head"],
    v: Float[Tensor, "batch heads blocks keys d_head"],
    allowed: Bool[Tensor, "#batch #heads #blocks queries keys"],
) -> Float[Tensor, "batch heads blocks queries d_head"]:
    """Dense attention inside every block, all blocks in one call; a query without an allowed key gets zeros."""
    batch, heads, blocks = q.shape[:3]
    # blocks join the batch: (batch * blocks, heads, ...)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    rows, columns = allowed.shape[-2:]
    shared = allowed.shape[1] == 1 and heads > 1
    allowed = allowed.expand(batch, 1 if shared else heads, blocks, rows, columns).transpose(1, 2).flatten(0, 1)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return mixed.unflatten(0, (batch, blocks)).transpose(1, 2)


def softmax_over_parts(scores: list[Tensor], allowed: list[Tensor]) -> list[Tensor]:
    """One softmax over keys that lie in several tables, for patterns whose keys are of several kinds.

    Args:
        scores: tables (..., keys_1), (..., keys_2), ... of the same queries.
        allowed: for each a bool mask that broadcasts to it. A key in two tables must be allowed in one only.

    Returns:
        The weights, cut into the same tables: together they sum to 1, or to 0 for a query without any key.
    """
    sizes = [table.shape[-1] for table in scores]
    rows = torch.broadcast_shapes(*(mask.shape[:-1] for mask in allowed))  # not more: heads may share a mask
    masks = [mask.expand(*rows, size) for mask, size in zip(allowed, sizes, strict=True)]
    return list(masked_softmax(torch.cat(scores, dim=-1), torch.cat(masks, dim=-1)).split(sizes, dim=-1))
