"""Exercise 3 of notebook 00: from which length does all of attention cost more than the feed-forward?

The page compares scores and mixing alone, for two feed-forward matrices; here the projections count, and a
gated feed-forward has three matrices.
"""

import math
from collections.abc import Callable

from torch import Generator

from effnlp_lessons.homework.exercise import Exercise, Mistake, Property, whole_number


def crossing_length(d_model: int, d_ff: int, matrices: int) -> int:
    """Smallest length (>= 1 tokens) at which all of attention costs strictly more MACs than the feed-forward.

    4 n d² + 2 n² d > m n d f, so n > (m f - 4 d) / 2; m: weight matrices of the feed-forward, 2 or (gated) 3.
    """
    return max(1, (matrices * d_ff - 4 * d_model) // 2 + 1)


def _draw_sizes(matrices: int, even: bool | None = None) -> Callable[[Generator], tuple]:
    """Sizes whose m f - 4 d is positive, and even or odd as asked."""

    def draw(generator: Generator) -> tuple:
        while True:
            d_model, d_ff = whole_number(3, 60, generator), whole_number(30, 300, generator)
            gap = matrices * d_ff - 4 * d_model
            if gap > 8 and (even is None or (gap % 2 == 0) == even):
                return d_model, d_ff, matrices

    return draw


CROSSING_LENGTH = Exercise(
    id="start.crossing_length",
    title="from which length does attention cost more?",
    minutes=15,
    difficulty=3,
    reference=crossing_length,
    properties=(
        Property(
            "MiniLM: 769 tokens",
            lambda generator: (384, 1536, 2),
            times=1,
        ),
        Property("two matrices in the feed-forward", _draw_sizes(2)),
        Property("three matrices, where the two sides meet at a whole length", _draw_sizes(3, even=True)),
        Property("three matrices, where the two sides meet between two lengths", _draw_sizes(3, even=False)),
        Property(
            "a feed-forward so narrow that attention costs more from the first token",
            lambda generator: (
                d_model := whole_number(20, 90, generator),
                whole_number(3, d_model, generator),
                3,
            ),
        ),
    ),
    mistakes=(
        Mistake(
            "The length where both cost the same",
            "At that length neither side costs more. The question asks for strictly more: one token further.",
            lambda d_model, d_ff, matrices: max(1, math.ceil((matrices * d_ff - 4 * d_model) / 2)),
        ),
        Mistake(
            "One token too far between two lengths",
            "You round up and then add one. Round down and add one.",
            lambda d_model, d_ff, matrices: max(1, math.ceil((matrices * d_ff - 4 * d_model) / 2) + 1),
        ),
        Mistake(
            "The projections are left out",
            "You compare scores and mixing alone, as the first widget does. All of attention has the four "
            "projections too, 4 n d²: it overtakes earlier.",
            lambda d_model, d_ff, matrices: matrices * d_ff // 2 + 1,
        ),
        Mistake(
            "Mixing is left out",
            "Scores and mixing cost n² d each, together 2 n² d. Your inequality has one n² d.",
            lambda d_model, d_ff, matrices: max(1, matrices * d_ff - 4 * d_model + 1),
        ),
        Mistake(
            "Three projections instead of four",
            "Query, key, value, and output: 4 n d².",
            lambda d_model, d_ff, matrices: max(1, (matrices * d_ff - 3 * d_model) // 2 + 1),
        ),
        Mistake(
            "The feed-forward always has two matrices",
            "A gated feed-forward has three. Use the argument `matrices`.",
            lambda d_model, d_ff, matrices: max(1, d_ff - 2 * d_model + 1),
        ),
        Mistake(
            "A length below one token",
            "When the feed-forward is narrow, attention costs more at every length. The smallest length is then 1.",
            lambda d_model, d_ff, matrices: (matrices * d_ff - 4 * d_model) // 2 + 1,
        ),
    ),
    hints=(
        "Write both costs for one layer and n tokens, with a greater-than sign between them. "
        "What stands in every term can be cancelled.",
        "4 n d² + 2 n² d > m n d f. Divide by n d. Solve for n. Then think of three things: strictly more, "
        "whole tokens, at least one token.",
        "A neighbour: plan A costs 7 for each page, plan B costs 20 and 2 for each page. From how many "
        "pages does A cost strictly more?\n"
        "  7 p > 20 + 2 p,  so p > 4: 5 pages. At 4 pages both cost 28.\n"
        "With 21 in place of 20: p > 4.2, again 5 pages.\n"
        "With -3 in place of 20: p > -0.6. No page is no print job, so 1 page.",
    ),
)
