"""Every pattern of the lecture with one knob, its size, so that they can be compared at an equal number of pairs.

A gallery's masks are for one head of a bidirectional encoder. The Sparse Transformer's patterns are causal in the
paper; here they are mirrored to the future. ETC's global tokens come before the text in the paper; here the
first tokens of the text play their part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from effnlp_lessons.attention.bigbird import bigbird_mask, random_plan
from effnlp_lessons.attention.blockwise import blockwise_mask
from effnlp_lessons.attention.etc import etc_mask
from effnlp_lessons.attention.local import local_mask
from effnlp_lessons.attention.longformer import longformer_mask, window_mask
from effnlp_lessons.attention.patterns import pairs
from effnlp_lessons.attention.sparse_transformer import fixed_masks, strided_masks

Mask = Bool[Tensor, "length length"]


@dataclass(frozen=True)
class Pattern:
    """A paper's pattern, `mask(length, size)` for one head. Strided and fixed have fewest pairs at a middle size."""

    paper: str
    knob: str  # what the size means
    mask: Callable[[int, int], Mask]
    smallest: int = 1

    def sizes(self, length: int) -> range:
        """The sizes that make sense for a text of `length` tokens."""
        return range(self.smallest, max(self.smallest + 1, length))


def ends(length: int) -> Bool[Tensor, " length"]:
    """The first and the last token: in BERT's format [CLS] and [SEP]."""
    chosen = torch.zeros(length, dtype=torch.bool)
    chosen[[0, -1]] = True
    return chosen


def _blocks(length: int, size: int, shift: int) -> Mask:
    blocks = -(-length // size)
    order = (torch.arange(blocks)[None] + shift) % blocks
    return blockwise_mask(size * blocks, order)[0, :length, :length]  # the last block may be shorter


def _both_ways(causal: Mask) -> Mask:
    return causal | causal.T


def _bigbird(length: int, size: int) -> Mask:
    """One head with one random block a row. The block count of a short text may leave no block to choose from."""
    plan = random_plan(1, -(-length // size), 1, seed=0)
    return bigbird_mask(length, size, plan)[0]


PATTERNS: dict[str, Pattern] = {
    "window": Pattern("Beltagy et al. 2020", "tokens to each side", window_mask, smallest=0),
    "dilated": Pattern(
        "Beltagy et al. 2020", "steps of two to each side", lambda n, size: window_mask(n, size, dilation=2)
    ),
    "window + ends": Pattern(
        "Beltagy et al. 2020",
        "tokens to each side, first and last token global",
        lambda n, size: longformer_mask(n, size, ends(n)),
        smallest=0,
    ),
    "own block": Pattern("Qiu et al. 2019", "tokens in a block", lambda n, size: _blocks(n, size, 0)),
    "next block": Pattern("Qiu et al. 2019", "tokens in a block", lambda n, size: _blocks(n, size, 1)),
    "local": Pattern(
        "Parmar et al. 2018",
        "tokens in a block, half as many at each side",
        lambda n, size: local_mask(n, size, size // 2),
    ),
    "strided": Pattern("Child et al. 2019", "stride", lambda n, size: _both_ways(strided_masks(n, size).any(0))),
    "fixed": Pattern(
        "Child et al. 2019",
        "stride, last token of each block for all",
        lambda n, size: _both_ways(fixed_masks(n, size, 1).any(0)),
    ),
    "BigBird": Pattern("Zaheer et al. 2020", "tokens in a block, one random block", _bigbird),
    "ETC": Pattern(
        "Ainslie et al. 2020",
        "tokens to each side, the first eight global",
        lambda n, size: etc_mask(8, n - 8, size),
    ),
}


def size_for(name: str, length: int, budget: int) -> int | None:
    """The size of pattern `name` with most pairs of those within `budget` pairs; None if it has none so small."""
    pattern = PATTERNS[name]
    counted = {size: pairs(pattern.mask(length, size)) for size in pattern.sizes(length)}
    within = {size: count for size, count in counted.items() if count <= budget}
    return max(within, key=within.get) if within else None
