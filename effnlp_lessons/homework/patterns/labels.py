"""Exercise 3 of notebook 08: labels for relative positions, clipped.

ETC (Ainslie et al. 2020, arXiv 2004.08483, sec. 3) after Shaw et al. 2018 (arXiv 1803.02155); the numbers of the
labels as in ETC's released code.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def relative_labels(
    query_positions: Int[Tensor, " queries"], key_positions: Int[Tensor, " keys"], max_distance: int
) -> Int[Tensor, "queries keys"]:
    """How each key lies to each query: 0 same position, 1 .. k to the right, k + 1 .. 2k to the left.

    k is `max_distance`; what is farther away has the label of distance k on its side.
    """
    distance = key_positions[None, :] - query_positions[:, None]
    clipped = distance.clamp(-max_distance, max_distance)
    return torch.where(clipped >= 0, clipped, max_distance - clipped)


def _rule(label: Callable[[Tensor, int], Tensor]) -> Answer:
    """The labels by another rule of (key - query, max_distance), for the mistakes."""

    def labels(query_positions: Tensor, key_positions: Tensor, max_distance: int) -> Tensor:
        return label(key_positions[None, :] - query_positions[:, None], max_distance)

    return labels


def _label(distance: Tensor, k: int) -> Tensor:
    """The right label of a distance that is clipped already."""
    return torch.where(distance >= 0, distance, k - distance)


def _places(query_positions: Tensor, key_positions: Tensor, max_distance: int) -> Tensor:
    places = torch.arange(len(query_positions)), torch.arange(len(key_positions))
    return relative_labels(*places, max_distance)


def _by_hand(generator: Generator) -> tuple:
    return torch.tensor([5]), torch.arange(2, 9), 2


def _draw(kind: str) -> Callable[[Generator], tuple]:
    """Positions of queries and of keys: "text" (the same), "window" (around a block), or "any" with gaps, unsorted."""

    def draw(generator: Generator) -> tuple:
        k = whole_number(2, 4, generator)
        if kind == "text":
            position = torch.arange(k + whole_number(3, 5, generator))
            return position, position, k
        if kind == "window":
            block, reach = whole_number(2, 4, generator), k + whole_number(1, 3, generator)
            start = reach + whole_number(1, 20, generator)
            return torch.arange(start, start + block), torch.arange(start - reach, start + block + reach), k
        queries, keys = whole_number(2, 4, generator), whole_number(5, 8, generator)
        drawn = torch.randperm(16, generator=generator)
        return drawn[:queries], torch.cat([drawn[:1], drawn[queries : queries + keys - 1]]), k

    return draw


def _near(generator: Generator) -> tuple:
    position = torch.arange(whole_number(3, 6, generator)) + whole_number(0, 9, generator)
    return position, position, len(position) + whole_number(0, 3, generator)


def _three_labels(generator: Generator) -> tuple:
    keys = torch.arange(whole_number(5, 8, generator))
    return keys[1:-1], keys, 1


RELATIVE_LABELS = Exercise(
    id="patterns.relative_labels",
    title="labels for relative positions",
    minutes=10,
    difficulty=1,
    reference=relative_labels,
    properties=(
        Property("by hand: a query at 5, keys at 2 .. 8, k = 2", _by_hand, times=1),
        Property("a short text with itself: nothing is clipped", _near, times=1),
        Property("a longer text with itself: distances beyond k are clipped", _draw("text"), times=1),
        Property("k = 1: same, right, left", _three_labels, times=1),
        Property("a block of queries and the keys around it", _draw("window"), times=2),
        Property("any positions, with gaps and in any order", _draw("any"), times=2),
    ),
    mistakes=(
        Mistake(
            "Left and right are exchanged",
            "1 .. k are for keys to the right of the query: key position minus query position is positive.",
            _rule(lambda distance, k: _label((-distance).clamp(-k, k), k)),
        ),
        Mistake(
            "Rows and columns are exchanged",
            "Queries are rows, keys are columns, as in a mask: query positions get a new dimension at the end, "
            "key positions one in front.",
            lambda queries, keys, k: relative_labels(queries, keys, k).T,
        ),
        Mistake(
            "Nothing is clipped",
            "Far keys get labels beyond 2k, for which the table of vectors has no row, and far keys to the right "
            "get labels of the left. All distances from k on share the label of k.",
            _rule(_label),
        ),
        Mistake(
            "The left side is not clipped",
            "A distance below -k counts as -k. Clip at both ends: clamp(-k, k).",
            _rule(lambda distance, k: _label(distance.clamp(max=k), k)),
        ),
        Mistake(
            "The right side is not clipped",
            "A distance above k counts as k. Otherwise its label k + 1, k + 2, ... is one of the left.",
            _rule(lambda distance, k: _label(distance.clamp(min=-k), k)),
        ),
        Mistake(
            "Clipped at 2k, after the left side was numbered",
            "A key k + 1 to the right then has the label k + 1, which says: one to the left. Clip the distance "
            "first, at -k and k.",
            _rule(lambda distance, k: _label(distance, k).clamp(max=2 * k)),
        ),
        Mistake(
            "Clipped one too early",
            "The labels k and 2k never come up in your table. Clip at k, not at k - 1.",
            _rule(lambda distance, k: _label(distance.clamp(1 - k, k - 1), k)),
        ),
        Mistake(
            "The labels of the left begin at k",
            "Label k is taken: it is the farthest to the right. One to the left is k + 1.",
            _rule(lambda distance, k: torch.where((near := distance.clamp(-k, k)) >= 0, near, k - 1 - near)),
        ),
        Mistake(
            "One label for both sides",
            "The absolute distance does not say on which side the key stands. The left has labels of its own, "
            "k + 1 .. 2k.",
            _rule(lambda distance, k: distance.abs().clamp(max=k)),
        ),
        Mistake(
            "The labels of the left are negative",
            "A label is the number of a row of a table. -1 is accepted there, and picks the last row. Give the "
            "left the labels k + 1 .. 2k.",
            _rule(lambda distance, k: distance.clamp(-k, k)),
        ),
        Mistake(
            "The distance is shifted by k",
            "Your labels run from 0, farthest left, to 2k, farthest right: a numbering that other models use. "
            "Here 0 is the same position.",
            _rule(lambda distance, k: distance.clamp(-k, k) + k),
        ),
        Mistake(
            "The same position gets the label k",
            "Distance 0 belongs to neither side, and its label is 0: >=, not >.",
            _rule(lambda distance, k: torch.where((near := distance.clamp(-k, k)) > 0, near, k - near)),
        ),
        Mistake(
            "Places in the list instead of positions",
            "You compare numbers of rows and columns. A query in row 0 can stand anywhere: use the positions given.",
            _places,
        ),
    ),
    hints=(
        "First make the table of distances, a row for each query, with a sign: positive if the key stands to the "
        "right. Clip it. Only then number it.",
        "`clamp(-k, k)` clips at both ends. After that the numbers are -k .. k. Those from 0 on are labels already. "
        "-1 must become k + 1, and -k must become 2k: which sum does that? torch.where chooses between the two.",
        "A neighbour: goal differences of three teams, clipped at 4, and numbered in zigzag: 0, 1, -1, 2, -2, ... "
        "become 0, 1, 2, 3, 4, ...\n"
        "  goals = torch.tensor([9, 2, 3])\n"
        "  ahead = goals[:, None] - goals[None, :]          row minus column: [[0, 7, 6], [-7, 0, -1], [-6, 1, 0]]\n"
        "  ahead = ahead.clamp(-4, 4)                       [[0, 4, 4], [-4, 0, -1], [-4, 1, 0]]\n"
        "  torch.where(ahead > 0, 2 * ahead - 1, -2 * ahead)\n"
        "  -> [[0, 7, 7], [8, 0, 2], [8, 1, 0]]",
    ),
)
