"""Exercise 6 of notebook 09: which compressed slots a query may see.

Memory-compressed attention (Liu et al. 2018, arXiv 1801.10198, sec. 4.2.3), causal: slot 0 is the first token, slot
m >= 1 summarises the tokens (m - 1) * factor to m * factor - 1.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def visible_slots(length: int, factor: int) -> Bool[Tensor, "length slots"]:
    """True where query i may see slot m: slot 0 always, slot m when all its tokens come before query i.

    Slots of unfinished last blocks do not exist: there are 1 + length // factor.
    """
    query, slot = torch.arange(length)[:, None], torch.arange(1 + length // factor)
    return slot * factor <= query


def _with(rule: Callable[[Tensor, Tensor, int], Tensor]) -> Answer:
    return lambda length, factor: rule(torch.arange(length)[:, None], torch.arange(1 + length // factor)[None], factor)


def _draw(whole: bool) -> Callable[[Generator], tuple]:
    def draw(generator: Generator) -> tuple:
        factor = whole_number(3, 5, generator)
        return factor * whole_number(2, 5, generator) + (0 if whole else whole_number(1, factor - 1, generator)), factor

    return draw


VISIBLE_SLOTS = Exercise(
    id="buckets.visible_slots",
    title="compressed slots without the future",
    minutes=10,
    difficulty=2,
    reference=visible_slots,
    properties=(
        Property("by hand: 7 tokens, three to a slot", lambda generator: (7, 3), times=1),
        Property("a length that is a multiple of the factor", _draw(True)),
        Property("an unfinished last block gives no slot", _draw(False)),
        Property("a text shorter than one block", lambda generator: (2, 4), times=1),
        Property("factor 1: every token is a slot", lambda generator: (whole_number(3, 6, generator), 1), times=1),
    ),
    mistakes=(
        Mistake(
            "One token too early",
            "Slot m ends with token m * factor - 1, and a query must come after it: m * factor <= i.",
            _with(lambda query, slot, factor: (slot * factor - 1 <= query) | (slot == 0)),
        ),
        Mistake(
            "The own block is visible",
            "The own block holds later tokens than the query. Its slot must wait until the block is over.",
            _with(lambda query, slot, factor: ((slot - 1) * factor <= query) | (slot == 0)),
        ),
        Mistake(
            "One block too late",
            "The block just before the query's own is finished: its slot may be seen.",
            _with(lambda query, slot, factor: ((slot + 1) * factor <= query) | (slot == 0)),
        ),
        Mistake(
            "The first queries have no key",
            "Slot 0 is the first token, and every query sees it. Otherwise the first softmax has nothing.",
            _with(lambda query, slot, factor: (slot * factor <= query) & (slot > 0)),
        ),
        Mistake(
            "The unfinished block has a slot",
            "length // factor blocks are complete. The rest is dropped, as in a convolution without padding.",
            lambda length, factor: torch.arange(1 + -(-length // factor)) * factor <= torch.arange(length)[:, None],
        ),
        Mistake(
            "Slot 0 is not counted",
            "The first token has a slot of its own, in front: 1 + length // factor columns.",
            lambda length, factor: visible_slots(length, factor)[:, 1:],
        ),
        Mistake(
            "Everything is visible",
            "A slot holds later tokens for most queries. Compare the end of its block with the query.",
            _with(lambda query, slot, factor: (slot >= 0) & (query >= 0)),
        ),
    ),
    hints=(
        "Which is the last token inside slot m? When has a query this token behind itself?",
        "Slot m ends with token m * factor - 1, so query i sees it if m * factor <= i. What does this say for slot 0?",
        "A neighbour: reports appear after every week of 7 days. On day d (from 0), which can you read? Report m "
        "covers days 7(m-1) to 7m-1; report 0 is a welcome letter.\n"
        "  day 6: letter\n"
        "  day 7: letter, report 1\n"
        "  torch.arange(3) * 7 <= 7     [True, True, False]",
    ),
)
