"""Blockwise attention, BlockBERT: every query block reads one key block, chosen per head (Qiu et al. 2019, 1911.02972).

The positions are cut into `blocks` blocks. A head has a permutation π of them, and a query in block b attends
to the keys of block π(b) and to nothing else:

    M[h, i, j] = 1  if  π_h(block of i) = block of j        output block b = softmax(Q_b K_π(b)ᵀ / sqrt(d_head)) V_π(b)

The identity reads the block itself. A cyclic shift reads another one, and lets information cross blocks. The n²
pairs of a head become n² / blocks. There is nothing to learn: the weights of a dense model fit unchanged.

NOTE the paper's length is a multiple of `blocks`. Here a block has ceil(length / blocks) positions, so the last
blocks may be shorter or empty; a query sent to an empty block gets zeros.
NOTE a head whose permutation moves a block never lets its tokens see themselves: only the residual sum keeps them.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from effnlp_lessons.attention.blocks import (
    attend,
    check_inputs,
    check_positive,
    pad_to_multiple,
    real_tokens,
    without_padding,
)


def check_permutations(permutations: Tensor) -> None:
    """Raise a ValueError unless every row is a permutation of 0 .. blocks - 1."""
    if permutations.ndim != 2 or permutations.is_floating_point() or permutations.dtype == torch.bool:
        got = f"{permutations.dtype} {tuple(permutations.shape)}"
        raise ValueError(f"permutations must be integers of shape (heads, blocks), got {got}")
    heads, blocks = permutations.shape
    check_positive(heads=heads, blocks=blocks)
    wanted = torch.arange(blocks, device=permutations.device)
    for head, row in enumerate(permutations):
        if not torch.equal(row.sort().values.long(), wanted):
            wrong = f"row {head} is {row.tolist()}"
            raise ValueError(f"permutations must have each of 0 .. {blocks - 1} once in every row, {wrong}")


def shifted_permutations(heads: int, blocks: int, identity_heads: int) -> Int[Tensor, "heads blocks"]:
    """Identity for the first `identity_heads` heads, cyclic shifts by 1, 2, .. blocks - 1 in turn for the others.

    Shift s sends block b to (b + s) mod blocks: the paper's σ = (2, 3, .., blocks, 1), applied s times. A single block
    has no shift: every head is the identity.

    Raises:
        ValueError: heads or blocks that are no integer >= 1, identity_heads that is not from 0 to heads.
    """
    check_positive(heads=heads, blocks=blocks)
    if not 0 <= identity_heads <= heads:
        raise ValueError(f"identity_heads must be from 0 to heads={heads}, got {identity_heads}")
    shifts = [0] * identity_heads + [1 + turn % max(blocks - 1, 1) for turn in range(heads - identity_heads)]
    return (torch.arange(blocks) + torch.tensor(shifts)[:, None]) % blocks


def blockwise_mask(length: int, permutations: Int[Tensor, "heads blocks"]) -> Bool[Tensor, "heads length length"]:
    """True where a query may attend: its block is sent to the key's block. The definition, n x n per head.

    Raises:
        ValueError: a length that is no integer >= 1, rows of `permutations` that are no permutations.
    """
    check_positive(length=length)
    check_permutations(permutations)
    block = -(-length // permutations.shape[1])  # ceil(length / blocks)
    block_of = torch.arange(length, device=permutations.device) // block
    return permutations[:, block_of, None] == block_of


def blockwise_attention(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_head"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    permutations: Int[Tensor, "heads blocks"],
) -> Float[Tensor, "batch heads length d_head"]:
    """Attention under `blockwise_mask`: heads * length² / blocks scores, one batched call.

    Args:
        key_padding_mask: True = a real token. Padded keys are never attended to.
        permutations: for each head and query block the block of its keys; see `shifted_permutations`.

    Returns:
        Zeros for padded queries and for a query whose key block has no real token.

    Raises:
        ValueError: shapes that do not fit, rows that are no permutations, or not one row for each head.
    """
    check_inputs(q, k, v, key_padding_mask)
    check_permutations(permutations)
    heads, length = q.shape[1], q.shape[2]
    if permutations.shape[0] != heads:
        raise ValueError(f"permutations must have one row for each of {heads} heads, got {permutations.shape[0]}")
    blocks = permutations.shape[1]
    permutations = permutations.to(q.device)
    real = pad_to_multiple(real_tokens(key_padding_mask, length, q.device), blocks, dim=1).unflatten(1, (blocks, -1))
    q, k, v = (pad_to_multiple(x, blocks).unflatten(2, (blocks, -1)) for x in (q, k, v))
    # Keys, values and the padding mask follow π. The queries stay: permuting both would change nothing.
    head = torch.arange(heads, device=q.device)[:, None]
    k, v = k[:, head, permutations], v[:, head, permutations]
    allowed = real[:, permutations][:, :, :, None, :]  # (batch or 1, heads, blocks, 1, block)
    output = attend(q, k, v, allowed).flatten(2, 3)[:, :, :length]
    return without_padding(output, key_padding_mask)
