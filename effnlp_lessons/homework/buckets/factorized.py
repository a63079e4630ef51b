"""Exercise 8 of notebook 09: scores from two short factors (Tay et al. 2020, arXiv 2005.00743, sec. 3.1.3)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def factorized_scores(
    first: Float[Tensor, "queries a"], second: Float[Tensor, "queries b"], length: int
) -> Float[Tensor, "queries length"]:
    """S[i, j] = first[i, j div b] * second[i, j mod b] for the keys j < length <= a * b."""
    a, b = first.shape[1], second.shape[1]
    return (first.repeat_interleave(b, dim=1) * second.repeat(1, a))[:, :length]


def _with(join: Callable[[Tensor, Tensor, int, int], Tensor]) -> Answer:
    return lambda first, second, length: join(first, second, first.shape[1], second.shape[1])[:, :length]


def _draw(whole: bool) -> Callable[[Generator], tuple]:
    def draw(generator: Generator) -> tuple:
        a, b = whole_number(3, 4, generator), whole_number(5, 6, generator)
        first, second = (torch.randn(4, size, generator=generator, dtype=torch.float64) for size in (a, b))
        return first, second, a * b if whole else a * b - whole_number(1, 5, generator)

    return draw


FACTORIZED_SCORES = Exercise(
    id="buckets.factorized_scores",
    title="scores from two short factors",
    minutes=10,
    difficulty=2,
    reference=factorized_scores,
    properties=(
        Property(
            "by hand: factors of two and three",
            lambda generator: (torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0, 2.0, 3.0]]), 6),
            times=1,
        ),
        Property("all columns", _draw(True)),
        Property("a text shorter than a * b", _draw(False)),
    ),
    mistakes=(
        Mistake(
            "Both factors are stretched alike",
            "Then column j uses the same place twice over, and columns are copies. One factor counts slowly (j div b), "
            "the other fast (j mod b).",
            _with(lambda first, second, a, b: first.repeat_interleave(b, dim=1) * second.repeat_interleave(a, dim=1)),
        ),
        Mistake(
            "Both factors are tiled",
            "Both count fast: that is j mod a and j mod b. The slow one is j div b: each entry stays for b columns.",
            _with(lambda first, second, a, b: first.repeat(1, b) * second.repeat(1, a)),
        ),
        Mistake(
            "The fast and the slow factor are exchanged",
            "first belongs to j div b, second to j mod b.",
            _with(lambda first, second, a, b: first.repeat(1, b) * second.repeat_interleave(a, dim=1)),
        ),
        Mistake(
            "Added instead of multiplied",
            "A score is the product of its two factors.",
            _with(lambda first, second, a, b: first.repeat_interleave(b, dim=1) + second.repeat(1, a)),
        ),
        Mistake(
            "Not cut to the length",
            "A text may be shorter than a * b: take the first `length` columns.",
            lambda first, second, length: factorized_scores(first, second, first.shape[1] * second.shape[1]),
        ),
        Mistake(
            "Cut at the end",
            "Keys count from 0: keep the first columns, not the last.",
            lambda first, second, length: factorized_scores(first, second, first.shape[1] * second.shape[1])[
                :, -length:
            ],
        ),
    ),
    hints=(
        "Write j, j div 3 and j mod 3 for j = 0 .. 5. Which of the two changes at every step?",
        "repeat_interleave repeats each entry in place (slow), repeat puts the whole row behind itself (fast).",
        "A neighbour: hours and minutes of a day, in order, for 2 hours of 3 minutes.\n"
        "  torch.tensor([0, 1]).repeat_interleave(3)     [0, 0, 0, 1, 1, 1]\n"
        "  torch.tensor([0, 1, 2]).repeat(2)             [0, 1, 2, 0, 1, 2]",
    ),
)
