"""BigBird: every block of queries sees its neighbours, two global blocks, and a few random ones.

A window alone carries a word n / window layers to cross a text. A few random long edges make the graph of who
sees whom a small world, and two global blocks make every path two steps long. The cost stays linear: a block
of queries reads 5 + r blocks of keys whatever the length.
Zaheer et al. 2020, arXiv 2007.14062, sec. 2 and appendix D (the ITC variant: global tokens are tokens of the text).

With blocks 0 .. m - 1 of b tokens, query block i (0 < i < m - 1) sees the blocks

    {0, m - 1}  and  {i - 1, i, i + 1}  and  r random ones, different in every head,

and query blocks 0 and m - 1 see everything. The keys of one block are copied into one compact tensor
(appendix D), and all blocks are dense attentions in one call.

NOTE the plan of random blocks is drawn once from a seed and is the same in training and evaluation. In
transformers' class evaluation replaces every random block by block 0, which then counts 1 + r times.
NOTE our random blocks are drawn from all blocks that are neither global nor in the window. The released code
draws from the first blocks of a long text only (the first 1,024 tokens at length 4,096), and there may pick a
block of the window again. Such a plan can be given as `plan`; what it lists twice counts twice.
NOTE the paper's blocks divide the length. Here the last block may be partly filled; it is global all the same.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from effnlp_lessons.attention.blocks import (
    attend,
    check_inputs,
    check_not_negative,
    check_positive,
    pad_to_multiple,
    real_tokens,
    without_padding,
)

# ------------------------------------------------------------------------------------- which blocks, by number


def _fixed_blocks(blocks: int) -> tuple[Int[Tensor, "middle 5"], Bool[Tensor, "middle 5"]]:
    """For query blocks 1 .. blocks - 2: first, last, and the window; False where a block stands there again."""
    block = torch.arange(1, max(1, blocks - 1))
    first, last = torch.zeros_like(block), torch.full_like(block, blocks - 1)
    fixed = torch.stack([first, last, block - 1, block, block + 1], dim=1)
    new = torch.ones_like(fixed, dtype=torch.bool)
    new[:, 2], new[:, 4] = block - 1 > 0, block + 1 < blocks - 1
    return fixed, new


@lru_cache(maxsize=64)
def _cached_plan(heads: int, blocks: int, random_blocks: int, seed: int) -> Int[Tensor, "heads blocks random_blocks"]:
    generator = torch.Generator().manual_seed(seed)
    plan = torch.full((heads, blocks, random_blocks), -1)
    for i, fixed in enumerate(_fixed_blocks(blocks)[0].tolist(), start=1):
        candidates = torch.tensor([j for j in range(blocks) if j not in fixed], dtype=torch.long)
        # the order of random numbers is a random order, drawn for every head
        order = torch.rand(heads, len(candidates), generator=generator).argsort(dim=1)[:, :random_blocks]
        plan[:, i, : order.shape[1]] = candidates[order]
    return plan


def random_plan(heads: int, blocks: int, random_blocks: int, seed: int) -> Int[Tensor, "heads blocks random_blocks"]:
    """Numbers of the random blocks of keys that every block of queries sees, drawn from `seed` alone.

    Those of one row are distinct and neither global nor in the window. Where there are fewer such blocks than
    `random_blocks`, all are taken and the rest is -1; the rows of the first and last block, which see
    everything, are -1.

    Raises:
        ValueError: heads or blocks that are not integers >= 1, random_blocks that is not an integer >= 0.
    """
    check_positive(heads=heads, blocks=blocks)
    check_not_negative(random_blocks=random_blocks)
    return _cached_plan(heads, blocks, random_blocks, seed).clone()


def _check_plan(plan: Tensor, blocks: int, heads: int | None = None) -> None:
    if plan.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"plan must hold integers, got {plan.dtype}")
    wanted = ("heads" if heads is None else heads, blocks, "random_blocks")
    if plan.ndim != 3 or plan.shape[1] != blocks or heads not in (None, plan.shape[0]):
        raise ValueError(f"plan must have shape ({', '.join(map(str, wanted))}), got {tuple(plan.shape)}")
    if plan.numel() and not (plan.min() >= -1 and plan.max() < blocks):
        raise ValueError(f"plan must hold -1 .. {blocks - 1}, got {int(plan.min())} .. {int(plan.max())}")


# ----------------------------------------------------------------------------------------------- the definition


def bigbird_multiplicity(
    length: int, block: int, plan: Int[Tensor, "heads blocks random_blocks"]
) -> Int[Tensor, "heads length length"]:
    """How often key j stands in the list of query i: 0 hidden, 1 seen, more where `plan` lists a block again.

    The softmax runs over a list, so a key that stands in it m times gets m times its weight: exactly dense
    attention with log(m) added to its score. Global and window blocks that coincide (near the ends) count once;
    every entry of the plan adds one. Entries of -1, and the rows of the two global query blocks, are ignored.

    Raises:
        ValueError: sizes that are not integers >= 1, a plan of another shape or with blocks that do not exist.
    """
    check_positive(length=length, block=block)
    blocks = -(-length // block)
    _check_plan(plan, blocks)
    i, j = torch.arange(blocks)[:, None], torch.arange(blocks)
    everything = (i == 0) | (i == blocks - 1)
    fixed = everything | (j == 0) | (j == blocks - 1) | ((i - j).abs() <= 1)
    again = (plan.cpu()[..., None] == j).sum(dim=2).masked_fill(everything, 0)
    per_block = fixed + again
    block_of = torch.arange(length) // block
    return per_block[:, block_of[:, None], block_of]


def bigbird_mask(
    length: int, block: int, plan: Int[Tensor, "heads blocks random_blocks"]
) -> Bool[Tensor, "heads length length"]:
    """True where a query may attend: `bigbird_multiplicity` > 0 (sec. 2, figure 1d)."""
    return bigbird_multiplicity(length, block, plan) > 0


# ------------------------------------------------------------------------------------------------ the fast path


def bigbird_attention(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_head"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    block: int,
    random_blocks: int = 3,
    seed: int = 0,
    plan: Int[Tensor, "heads blocks random_blocks"] | None = None,
) -> Float[Tensor, "batch heads length d_head"]:
    """Block-sparse attention of BigBird, 5 + random_blocks blocks of keys for each block of queries (app. D).

    Equal to dense attention with log(`bigbird_multiplicity`) added to the scores. Padded rows give zeros.

    Args:
        block: tokens in a block, b; both global blocks and the window's three have this size.
        random_blocks: r, random blocks of keys for each block of queries and head.
        seed: of `random_plan`. The same in training and evaluation; take another for every layer if wanted.
        plan: a plan of your own (heads, ceil(length / block), any number), instead of random_blocks and seed.

    Raises:
        ValueError: inputs that do not fit together, a block that is not an integer >= 1, a plan that does not
            fit the length or names blocks that do not exist.
    """
    check_inputs(q, k, v, key_padding_mask)
    check_positive(block=block)
    check_not_negative(random_blocks=random_blocks)
    batch, heads, length = q.shape[:3]
    blocks = -(-length // block)
    if plan is None:
        plan = _cached_plan(heads, blocks, random_blocks, seed)
    else:
        _check_plan(plan, blocks, heads)
    real = pad_to_multiple(real_tokens(key_padding_mask, length, q.device), block, dim=1)
    q, k, v = (pad_to_multiple(x, block) for x in (q, k, v))

    # first and last block of queries: every key, 2 b x n pairs
    ends = q if blocks <= 2 else torch.cat([q[:, :, :block], q[:, :, -block:]], dim=2)
    ends = attend(ends[:, :, None], k[:, :, None], v[:, :, None], real[:, None, None, None, :])[:, :, 0]
    if blocks <= 2:
        output = ends
    else:
        middle = _attend_middle(q, k, v, real, block, plan.to(q.device)[:, 1:-1])
        output = torch.cat([ends[:, :, :block], middle, ends[:, :, block:]], dim=2)
    return without_padding(output[:, :, :length], key_padding_mask)


def _attend_middle(
    q: Tensor, k: Tensor, v: Tensor, real: Bool[Tensor, "batch_or_1 length"], block: int, plan: Tensor
) -> Float[Tensor, "batch heads middle_length d_head"]:
    """All query blocks but the first and last, each with its compact tensor of keys."""
    batch, heads, length = q.shape[:3]
    blocks, middle = length // block, length // block - 2
    fixed, new = (x.to(q.device)[:, None].expand(-1, heads, -1) for x in _fixed_blocks(blocks))
    plan = plan.transpose(0, 1)
    numbers = torch.cat([fixed, plan.clamp(min=0)], dim=2)  # (middle, heads, 5 + r)
    listed = torch.cat([new, plan >= 0], dim=2)
    # blocks of all texts and heads stand in one long row; (batch, middle, heads) is the order that `attend`
    # works in, so that the copy made here is the only one
    begin = torch.arange(batch * heads, device=q.device).view(batch, 1, heads, 1) * blocks
    rows = (begin + numbers).flatten()

    def compact(x: Tensor) -> Float[Tensor, "batch heads middle keys d_head"]:
        chosen = x.reshape(-1, block * x.shape[-1]).index_select(0, rows)
        return chosen.view(batch, middle, heads, -1, x.shape[-1]).transpose(1, 2)

    allowed = real.unflatten(1, (blocks, block))[:, numbers] & listed[..., None]
    allowed = allowed.flatten(3).transpose(1, 2)[..., None, :]  # (batch or 1, heads, middle, 1, keys)
    queries = q[:, :, block:-block].unflatten(2, (middle, block))
    return attend(queries, compact(k), compact(v), allowed).flatten(2, 3)
