"""Exercise 1 of notebook 11: softmax and weighted mean in one pass over tiles.

Milakov, Gimelshein 2018 (arXiv 1805.02867) for the sum, FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 1) for
the output. NOTE the printed algorithm inverts the factor that rescales the output; right is exp(m_old - m_new).
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def online_softmax(
    scores: list[Float[Tensor, "queries keys_of_tile"]], values: list[Float[Tensor, "keys_of_tile d"]]
) -> tuple[Float[Tensor, "queries d"], Float[Tensor, " queries"], Float[Tensor, " queries"]]:
    """softmax(all scores) @ all values, the maximum of each row and its sum of exp(score - maximum).

    A score of -inf is a key that may not be seen. A row that sees none has output 0, maximum -inf and sum 0.
    """
    return _online()(scores, values)


def _finite(m: Tensor) -> Tensor:
    return m.masked_fill(m == -math.inf, 0)


def _factor(old: Tensor, new: Tensor) -> Tensor:
    return (old - _finite(new)).exp()


def _one(old: Tensor, new: Tensor) -> Tensor:
    return torch.ones_like(new)


def _inverse(old: Tensor, new: Tensor) -> Tensor:
    return 1 / _factor(old, new)


def _inverse_later(old: Tensor, new: Tensor) -> Tensor:
    return torch.where(old == -math.inf, 0, _inverse(old, new))


def _divide(o: Tensor, total: Tensor) -> Tensor:
    return torch.where(total[:, None] > 0, o / total[:, None], 0)


def _online(
    start: float = -math.inf,
    maximum: Callable[[Tensor, Tensor], Tensor] = torch.maximum,
    subtracted: Callable[[Tensor], Tensor] = _finite,
    rescale_sum: Callable[[Tensor, Tensor], Tensor] = _factor,
    rescale_output: Callable[[Tensor, Tensor], Tensor] = _factor,
    at_every_tile: Callable[[Tensor, Tensor], Tensor] = lambda o, total: o,
    at_the_end: Callable[[Tensor, Tensor], Tensor] = _divide,
) -> Answer:
    """The answer with one step exchanged. m, l, o: running maximum, sum and output, as in the paper."""

    def answer(scores: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        m = torch.full_like(scores[0][:, 0], start)
        l, o = torch.zeros_like(m), torch.zeros(len(m), values[0].shape[1], dtype=m.dtype)  # noqa: E741
        for s, v in zip(scores, values, strict=True):
            m_new = maximum(m, s.amax(dim=1))
            p = (s - subtracted(m_new)[:, None]).exp()
            l = rescale_sum(m, m_new) * l + p.sum(dim=1)  # noqa: E741
            o = at_every_tile(rescale_output(m, m_new)[:, None] * o + p @ v, l)
            m = m_new
        return at_the_end(o, l), m, l

    return answer


def _draw(kind: str) -> Callable[[Generator], tuple]:
    """Three or four tiles of different widths, with what `kind` says about their scores."""

    def draw(generator: Generator) -> tuple:
        queries, d = whole_number(3, 5, generator), whole_number(2, 3, generator)
        widths = [whole_number(1, 5, generator) for _ in range(whole_number(3, 4, generator))]
        scores = [2 * torch.randn(queries, width, generator=generator, dtype=torch.float64) for width in widths]
        values = [torch.randn(width, d, generator=generator, dtype=torch.float64) for width in widths]
        for number, tile in enumerate(scores):
            if kind == "falling":
                tile -= 9 * number
            elif kind == "rising":
                tile += 3 * number
            elif kind == "far below zero":
                tile += 2 * number - 1000
            elif kind == "hidden" and number != 1:
                tile[number % queries] = -math.inf  # another row in each tile
            elif kind == "nothing":
                tile[1] = -math.inf
        return scores, values

    return draw


def _by_hand(generator: Generator) -> tuple:
    scores = [torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 3.0, 0.0]])]
    return scores, [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0], [5.0]])]


ONLINE_SOFTMAX = Exercise(
    id="flash.online_softmax",
    title="softmax in one pass",
    minutes=20,
    difficulty=2,
    reference=online_softmax,
    properties=(
        Property("by hand: one query, tiles of two and of three keys", _by_hand, times=1),
        Property("the largest score comes in the first tile", _draw("falling"), times=1),
        Property("larger scores come later", _draw("rising"), times=1),
        Property("all scores are near -1000", _draw("far below zero"), times=1),
        Property("a row does not see a whole tile", _draw("hidden"), times=1),
        Property("a row that sees no key at all", _draw("nothing"), times=1),
    ),
    mistakes=(
        Mistake(
            "The output is not rescaled",
            "What was added under an older maximum is too large by exp(m_new - m_old). Multiply the output so far by "
            "exp(m_old - m_new), as you do with the sum.",
            _online(rescale_output=_one),
        ),
        Mistake(
            "The sum is not rescaled",
            "The sum so far was made with the older maximum. Multiply it by exp(m_old - m_new) before you add.",
            _online(rescale_sum=_one),
        ),
        Mistake(
            "Nothing is rescaled",
            "Sum and output so far were made with the older maximum. Multiply both by exp(m_old - m_new).",
            _online(rescale_sum=_one, rescale_output=_one),
        ),
        Mistake(
            "The factor is upside down",
            "The output is multiplied by exp(m_new - m_old), as the paper's algorithm prints it: a misprint. The "
            "maximum only grows, so the factor must be at most 1: exp(m_old - m_new). At the first tile it is 0.",
            _online(rescale_output=_inverse),
        ),
        Mistake(
            "The factor is upside down from the second tile on",
            "The output is multiplied by exp(m_new - m_old). The factor must be at most 1: exp(m_old - m_new).",
            _online(rescale_output=_inverse_later),
        ),
        Mistake(
            "-inf minus -inf",
            "While a row has seen no key its maximum is -inf, and -inf - (-inf) is NaN, which never leaves. Subtract a "
            "finite number there, such as 0.",
            _online(
                subtracted=lambda m: m,
                rescale_sum=lambda m, new: (m - new).exp(),
                rescale_output=lambda m, new: (m - new).exp(),
                at_the_end=lambda o, total: o / total[:, None],
            ),
        ),
        Mistake(
            "The maximum starts at 0",
            "If all scores are far below 0, every exp(score - 0) is 0. The maximum of nothing is -inf.",
            _online(start=0.0, at_the_end=lambda o, total: o / total[:, None]),
        ),
        Mistake(
            "The maximum of the tile alone",
            "The maximum must not fall when a later tile has smaller scores. Take the larger of old and new.",
            _online(maximum=lambda m, tile: tile),
        ),
        Mistake(
            "Divided at every tile",
            "The output of earlier tiles is divided again at each later one. Divide once, at the end.",
            _online(at_every_tile=_divide, at_the_end=lambda o, total: o),
        ),
        Mistake(
            "Never divided by the sum",
            "The weights do not sum to 1 yet. Divide the output by the sum at the end.",
            _online(at_the_end=lambda o, total: o),
        ),
        Mistake(
            "A row without a key is divided by 0",
            "Its sum is 0, and 0 / 0 is NaN. The output of such a row is 0.",
            _online(at_the_end=lambda o, total: o / total[:, None]),
        ),
    ),
    hints=(
        "Keep three things for each row: the largest score so far, the sum of exp(score - largest) and the sum of "
        "exp(score - largest) * value. What is wrong with the two sums when a larger score arrives?",
        "m_new = torch.maximum(m, s.amax(dim=1)); both sums are multiplied by exp(m - m_new), then the tile is added. "
        "Where m_new is -inf, subtract 0 instead. At the end the output is divided by the sum, where that is not 0.",
        "A neighbour: the sum of lengths read one by one, told in units of the longest so far.\n"
        "  longest, total = 2.0, 1.5                   3 metres in units of 2 metres\n"
        "  new = 4.0                                   a longer one: the unit changes\n"
        "  total = total * longest / new + new / new   1.75 units of 4 metres = 7 metres",
    ),
)
