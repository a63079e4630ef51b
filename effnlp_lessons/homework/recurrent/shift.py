"""Exercise 4 of notebook 10: the relative shift (Dai et al. 2019, arXiv 1901.02860, appendix B)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Exercise, Mistake, Property, whole_number


def relative_shift(x: Float[Tensor, "queries keys"]) -> Float[Tensor, "queries keys"]:
    """Scores by distance become scores by key.

    Column c of `x` belongs to distance keys - 1 - c. Query i stands at key keys - queries + i, so its score with key j
    is that of distance keys - queries + i - j. What lies in the future of a query is 0.
    """
    queries, keys = x.shape
    column = torch.arange(keys) + (queries - 1 - torch.arange(queries))[:, None]
    return torch.where(column < keys, x.gather(1, column.clamp(max=keys - 1)), 0)


def _shifted(by: Callable[[Tensor, int, int], Tensor]) -> Callable[[Tensor], Tensor]:
    def answer(x: Tensor) -> Tensor:
        queries, keys = x.shape
        column = torch.arange(keys) + by(torch.arange(queries)[:, None], queries, keys)
        inside = (column >= 0) & (column < keys)
        return torch.where(inside, x.gather(1, column.clamp(0, keys - 1)), 0)

    return answer


def _draw(memory: bool) -> Callable[[Generator], tuple]:
    def draw(generator: Generator) -> tuple:
        queries = whole_number(4, 6, generator)
        keys = queries + (whole_number(2, 4, generator) if memory else 0)
        return (torch.randn(queries, keys, generator=generator, dtype=torch.float64),)

    return draw


RELATIVE_SHIFT = Exercise(
    id="recurrent.relative_shift",
    title="the relative shift",
    minutes=25,
    difficulty=3,
    reference=relative_shift,
    properties=(
        Property(
            "by hand: three queries, every entry is its distance",
            lambda generator: (torch.arange(3.0).flip(0).expand(3, 3).clone(),),
            times=1,
        ),
        Property("without memory", _draw(False)),
        Property("with memory: more keys than queries", _draw(True)),
    ),
    mistakes=(
        Mistake(
            "Off by one to the left",
            "The last query has distance 0 to the last key: its row stays as it is. Yours has moved by one.",
            _shifted(lambda i, queries, keys: queries - i),
        ),
        Mistake(
            "Off by one to the right",
            "The last query has distance 0 to the last key: its row stays as it is. Yours has moved by one.",
            _shifted(lambda i, queries, keys: queries - 2 - i),
        ),
        Mistake(
            "Shifted the other way",
            "The first query has the shortest past. Its row moves to the left, by queries - 1 places.",
            _shifted(lambda i, queries, keys: i - queries + 1),
        ),
        Mistake(
            "The first row stays and the last one moves",
            "It is the last query for which column c has distance keys - 1 - c. The first row moves most.",
            _shifted(lambda i, queries, keys: i),
        ),
        Mistake(
            "The future is left as it comes",
            "Right of a query's own key stands its future. Here it must be 0.",
            lambda x: x.gather(
                1,
                (torch.arange(x.shape[1]) + (len(x) - 1 - torch.arange(len(x)))[:, None]) % x.shape[1],
            ),
        ),
        Mistake(
            "Nothing is shifted",
            "A column of x is a distance. In the result a column is a key, at another distance from each row.",
            lambda x: x.clone(),
        ),
    ),
    hints=(
        "Write the distances of three queries to three keys as a table. Which entry of each row of x holds each?",
        "Row i moves to the left by queries - 1 - i places. Take an index table and gather, or pad a column of zeros "
        "at the left, view as (keys + 1, queries), drop the first row and view back; then cut the future with tril.",
        "A neighbour: a shelf with books by age in years, oldest first, and readers who came 0, 1 and 2 years later.\n"
        "  x = torch.tensor([[2, 1, 0]]).expand(3, 3)\n"
        "  column = torch.arange(3) + torch.tensor([[2], [1], [0]])\n"
        "  column.clamp(max=2)        [[2, 2, 2], [1, 2, 2], [0, 1, 2]]; where column > 2 there is nothing yet",
    ),
)
