"""Exercise 2 of notebook 09: from buckets to chunks by a stable sort (Kitaev et al. 2020, arXiv 2001.04451, sec. 2)."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def sorted_chunks(
    buckets: Int[Tensor, " length"], chunk: int
) -> tuple[Int[Tensor, "chunks chunk"], Int[Tensor, " length"]]:
    """The tokens sorted by bucket, inside a bucket by position, cut into chunks; and the chunk of every token."""
    order = buckets.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return order.view(-1, chunk), place // chunk


def _with(order_of: Callable[[Tensor], Tensor]) -> Answer:
    def answer(buckets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        order = order_of(buckets)
        return order.view(-1, chunk), order.argsort() // chunk

    return answer


def _draw(kinds: int) -> Callable[[Generator], tuple]:
    """Chunks of 3 to 5 of a text with as many kinds of buckets as said."""

    def draw(generator: Generator) -> tuple:
        chunk = whole_number(3, 5, generator)
        length = chunk * whole_number(5, 7, generator)
        return torch.randint(kinds, (length,), generator=generator), chunk

    return draw


def _all_different(generator: Generator) -> tuple:
    return torch.randperm(12, generator=generator), 4


SORTED_CHUNKS = Exercise(
    id="buckets.sorted_chunks",
    title="sort by bucket, cut into chunks",
    minutes=15,
    difficulty=2,
    reference=sorted_chunks,
    properties=(
        Property(
            "by hand: six tokens, chunks of two", lambda generator: (torch.tensor([1, 0, 2, 0, 1, 0]), 2), times=1
        ),
        Property("every token in another bucket", _all_different, times=1),
        Property("many buckets", _draw(6)),
        Property("two buckets: ties are kept in the order of the text", _draw(2)),
    ),
    mistakes=(
        Mistake(
            "Ties in reverse order",
            "Inside a bucket the later token comes first. The sort must be stable: ties in the order of the text.",
            _with(lambda buckets: len(buckets) - 1 - buckets.flip(0).argsort(stable=True)),
        ),
        Mistake(
            "The sort is not stable",
            "Tokens of one bucket come in an order that depends on the sorting program. Ask for a stable sort.",
            _with(lambda buckets: torch.from_numpy(np.argsort(buckets.numpy(), kind="heapsort"))),
        ),
        Mistake(
            "The order is taken for the place",
            "order[p] is the token at place p. You need the other direction, the place of each token: the inverse.",
            lambda buckets, chunk: (
                (order := buckets.argsort(stable=True)).view(-1, chunk),
                order // chunk,
            ),
        ),
        Mistake(
            "The text is cut before it is sorted",
            "You sort inside pieces of the text. Sort the whole text, then cut, or tokens of one bucket never meet.",
            lambda buckets, chunk: (
                buckets.view(-1, chunk).argsort(dim=1, stable=True)
                + chunk * torch.arange(len(buckets) // chunk)[:, None],
                torch.arange(len(buckets)) // chunk,
            ),
        ),
        Mistake(
            "Buckets instead of tokens",
            "The chunks hold the sorted buckets. They must hold the tokens' positions, to gather queries and values.",
            lambda buckets, chunk: (buckets.sort(stable=True).values.view(-1, chunk), sorted_chunks(buckets, chunk)[1]),
        ),
        Mistake(
            "The chunk is taken to be the bucket",
            "A chunk has a fixed size, a bucket has not. The chunk of a token follows from its place in the sort.",
            lambda buckets, chunk: (sorted_chunks(buckets, chunk)[0], buckets.clone()),
        ),
    ),
    hints=(
        "Two questions: which token stands at each place of the sorted list, and at which place stands each token?",
        "argsort(stable=True) answers the first. For the second, write the numbers 0, 1, 2, ... to the places `order`: "
        "place[order] = torch.arange(...). The chunk is the place divided by the size, without rest.",
        "A neighbour: five runners with times, two on each row of a photograph.\n"
        "  times = torch.tensor([9, 7, 8, 7])\n"
        "  order = times.argsort(stable=True)     [1, 3, 2, 0]: runner 1 was first\n"
        "  rank = torch.empty_like(order)\n"
        "  rank[order] = torch.arange(4)          [3, 0, 2, 1]: runner 0 was last\n"
        "  rank // 2                              [1, 0, 1, 0]: their rows",
    ),
)
