"""Exercise 5 of notebook 08: the Sparse Transformer's strided and fixed masks, merged.

Child et al. 2019 (arXiv 1904.10509, sec. 4.3 and 5.1). Positions count from 0.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def strided_and_fixed(
    length: int, stride: int, summary: int
) -> tuple[Bool[Tensor, "length length"], Bool[Tensor, "length length"]]:
    """The strided and the fixed mask, each the union of its two sets, both causal.

    Strided: the last `stride` tokens, and every token a multiple of `stride` back. Fixed: the query's own
    block of `stride` tokens, and the last `summary` tokens of every block.
    """
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    strided = (query - key < stride) | ((query - key) % stride == 0)
    fixed = (query // stride == key // stride) | (key % stride >= stride - summary)
    causal = key <= query
    return strided & causal, fixed & causal


Rule = Callable[[Tensor, Tensor, int, int], Tensor]  # of (query, key, stride, summary)


def _near(query: Tensor, key: Tensor, stride: int, summary: int) -> Tensor:
    return (query - key < stride) & (key <= query)


def _every_stride(query: Tensor, key: Tensor, stride: int, summary: int) -> Tensor:
    return ((query - key) % stride == 0) & (key <= query)


def _own_block(query: Tensor, key: Tensor, stride: int, summary: int) -> Tensor:
    return (query // stride == key // stride) & (key <= query)


def _summaries(query: Tensor, key: Tensor, stride: int, summary: int) -> Tensor:
    return (key % stride >= stride - summary) & (key <= query)


def _not_far_back(query: Tensor, key: Tensor, stride: int, summary: int) -> Tensor:
    return query - key < stride


def _strides_both_ways(query: Tensor, key: Tensor, stride: int, summary: int) -> Tensor:
    return (query - key) % stride == 0


def _whole_block(query: Tensor, key: Tensor, stride: int, summary: int) -> Tensor:
    return query // stride == key // stride


def _all_summaries(query: Tensor, key: Tensor, stride: int, summary: int) -> Tensor:
    return key % stride >= stride - summary


def _exchange(
    near: Rule = _near,
    every_stride: Rule = _every_stride,
    own_block: Rule = _own_block,
    summaries: Rule = _summaries,
) -> Answer:
    """The two masks with one of the four sets exchanged, for the mistakes."""

    def masks(length: int, stride: int, summary: int) -> tuple:
        given = torch.arange(length)[:, None], torch.arange(length)[None, :], stride, summary
        return near(*given) | every_stride(*given), own_block(*given) | summaries(*given)

    return masks


def _nothing(query: Tensor, key: Tensor, stride: int, summary: int) -> Tensor:
    return (query < 0) & (key < 0)


def _from_one(rule: Rule) -> Rule:
    return lambda query, key, stride, summary: rule(query + 1, key + 1, stride, summary)


def _draw(whole_blocks: bool) -> Callable[[Generator], tuple]:
    def draw(generator: Generator) -> tuple:
        stride = whole_number(3, 5, generator)
        rest = 0 if whole_blocks else whole_number(1, stride - 1, generator)
        return stride * whole_number(3, 4, generator) + rest, stride, whole_number(1, stride - 1, generator)

    return draw


PARENTHESES = "A token sees the future. & binds tighter than |, so write (one | other) & causal, with the parentheses."

STRIDED_AND_FIXED = Exercise(
    id="patterns.strided_and_fixed",
    title="strided and fixed, merged",
    minutes=15,
    difficulty=2,
    reference=strided_and_fixed,
    properties=(
        Property("by hand: 3 tokens, stride 2, 1 summary token", lambda generator: (3, 2, 1), times=1),
        Property("a text of whole blocks", _draw(True)),
        Property("a text whose last block is cut off", _draw(False)),
        Property(
            "every token of a block is a summary: fixed is plain causal attention",
            lambda generator: (whole_number(5, 9, generator), stride := whole_number(2, 4, generator), stride),
        ),
        Property(
            "a stride that is longer than the text",
            lambda generator: (length := whole_number(3, 6, generator), length + whole_number(1, 4, generator), 1),
        ),
    ),
    mistakes=(
        Mistake(
            "The stride is not met with the causal mask",
            "In your strided mask a token sees tokens that come a multiple of stride later. Meet the union of "
            "both sets with key <= query, not the window alone.",
            _exchange(every_stride=_strides_both_ways),
        ),
        Mistake(
            "The summaries are not met with the causal mask",
            "In your fixed mask a token sees the summary tokens of blocks that are still to come. Meet the "
            "union of both sets with key <= query, not the own block alone.",
            _exchange(summaries=_all_summaries),
        ),
        Mistake(
            "The first set of each mask is not met with the causal mask",
            f"{PARENTHESES} Here the second set alone is cut.",
            _exchange(near=_not_far_back, own_block=_whole_block),
        ),
        Mistake(
            "The second set of each mask is not met with the causal mask",
            f"{PARENTHESES} Here the first set alone is cut.",
            _exchange(every_stride=_strides_both_ways, summaries=_all_summaries),
        ),
        Mistake(
            "Neither mask is causal",
            "Both patterns are for a model that writes: meet each with key <= query.",
            _exchange(_not_far_back, _strides_both_ways, _whole_block, _all_summaries),
        ),
        Mistake(
            "Only the window, no stride",
            "The strided mask is the union of two sets: the last stride tokens, and every token a multiple "
            "of stride back.",
            _exchange(every_stride=_nothing),
        ),
        Mistake(
            "Only the stride, no window",
            "The strided mask is the union of two sets: the last stride tokens, and every token a multiple "
            "of stride back.",
            _exchange(near=_nothing),
        ),
        Mistake(
            "The stride is counted from the start of the text",
            "You take keys whose position is a multiple of stride, the same for all queries. In the strided "
            "pattern the distance is a multiple of stride; columns that are the same for all belong to fixed.",
            _exchange(every_stride=lambda query, key, stride, summary: (key % stride == 0) & (key <= query)),
        ),
        Mistake(
            "Only the own block, no summaries",
            "With the own block alone no token ever hears of an earlier block. Add the summary tokens.",
            _exchange(summaries=_nothing),
        ),
        Mistake(
            "Only the summaries, no own block",
            "The first tokens of a text would see nothing at all. Add the query's own block.",
            _exchange(own_block=_nothing),
        ),
        Mistake(
            "The summaries stand at the beginning of a block",
            "A block is summed up where it ends: its last summary tokens, key % stride >= stride - summary.",
            _exchange(summaries=lambda query, key, stride, summary: (key % stride < summary) & (key <= query)),
        ),
        Mistake(
            "Positions are read from one",
            "Your blocks and summaries of the fixed mask lie one token too far to the left. Positions begin "
            "at 0 here: the first block is 0 .. stride - 1.",
            _exchange(own_block=_from_one(_own_block), summaries=_from_one(_summaries)),
        ),
        Mistake(
            "One summary token too few",
            "The last summary tokens of a block begin at stride - summary, counted from 0: >=, not >.",
            _exchange(summaries=lambda query, key, stride, summary: (key % stride > stride - summary) & (key <= query)),
        ),
        Mistake(
            "Remainder and quotient are mixed up",
            "query % stride == key % stride compares the place inside a block. The same block is // on both sides.",
            _exchange(own_block=lambda query, key, stride, summary: (query % stride == key % stride) & (key <= query)),
        ),
    ),
    hints=(
        "Four sets, two for each mask. Write each as a comparison of `query` and `key`, ignoring the future. "
        "Then join two sets with |, and meet the union with the causal mask.",
        "With distance = query - key the strided sets are `distance < stride` and a remainder of the "
        "distance. For fixed: // gives the number of a token's block, % its place in the block.",
        "A neighbour: seats in rows of 10, numbered from 0. A note may go to a later seat, from the seat "
        "directly before it, or from one of the two seats at the aisle (the last two) of any row.\n"
        "  before  = to - seat == 1\n"
        "  aisle   = seat % 10 >= 8\n"
        "  allowed = (before | aisle) & (seat < to)\n"
        "Seat 38 may write to seat 41 and seat 40 may, too; seat 38 may not write to seat 12.",
    ),
)
