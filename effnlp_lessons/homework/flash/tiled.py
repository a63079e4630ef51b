"""Exercise 3 of notebook 11: attention tile by tile (FlashAttention-2, Dao 2023, arXiv 2307.08691, algorithm 1)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def flash_forward(
    q: Float[Tensor, "queries d_head"],
    k: Float[Tensor, "keys d_head"],
    v: Float[Tensor, "keys d_head"],
    block_queries: int,
    block_keys: int,
    causal: bool,
) -> tuple[Float[Tensor, "queries d_head"], Float[Tensor, " queries"]]:
    """Attention of one head and the natural log-sum-exp of each query's scores, by tiles of block_queries x block_keys.

    Scores are scaled by 1 / sqrt(d_head). Causal: query i sees key j if j <= i + keys - queries. A query that sees no
    key has output 0 and log-sum-exp -inf.
    """
    return _forward()(q, k, v, block_queries, block_keys, causal)


def _divide(o: Tensor, total: Tensor) -> Tensor:
    return torch.where(total[:, None] > 0, o / total[:, None], 0)


def _cut(x: Tensor, block: int) -> list[Tensor]:
    return list(x.split(block))


def _cut_whole(x: Tensor, block: int) -> list[Tensor]:
    return list(x[: len(x) // block * block].split(block))


def _fill(x: Tensor, block: int) -> list[Tensor]:
    """Tiles of one size: the last one is filled up with zeros."""
    return list(F.pad(x, (0, 0, 0, -len(x) % block)).split(block))


def _view(x: Tensor, block: int) -> list[Tensor]:
    return list(x.view(-1, block, x.shape[1]))


def _forward(
    cut_queries: Callable[[Tensor, int], list[Tensor]] = _cut,
    cut_keys: Callable[[Tensor, int], list[Tensor]] = _cut,
    scale: Callable[[int], float] = lambda d_head: d_head**-0.5,
    place: Callable[[int, int], int] | None = lambda queries, keys: keys - queries,
    finite: bool = True,
    at_every_tile: Callable[[Tensor, Tensor], Tensor] = lambda o, total: o,
    at_the_end: Callable[[Tensor, Tensor], Tensor] = _divide,
    lse: Callable[[Tensor, Tensor], Tensor] = lambda m, total: m + total.log(),
) -> Answer:
    """The answer with one step exchanged. m, l, o: running maximum, sum and output, as in the paper.

    Args:
        cut_queries, cut_keys: (tensor, block) to a list of tiles.
        place: the key at which query 0 stands, of (queries, keys); None hides nothing.
        finite: False subtracts a maximum of -inf.
    """

    def answer(q: Tensor, k: Tensor, v: Tensor, block_queries: int, block_keys: int, causal: bool):
        queries, d_head = q.shape
        outputs, sums, first_query = [], [], 0
        key_tiles = list(zip(cut_keys(k, block_keys), cut_keys(v, block_keys), strict=True))
        for q_tile in cut_queries(q, block_queries):
            m = q_tile.new_full((len(q_tile),), -math.inf)
            l, o, first_key = torch.zeros_like(m), torch.zeros_like(q_tile), 0  # noqa: E741
            for k_tile, v_tile in key_tiles:
                s = q_tile @ k_tile.T * scale(d_head)
                if causal and place is not None:
                    own = torch.arange(first_query, first_query + len(q_tile)) + place(queries, len(k))
                    s = s.masked_fill(torch.arange(first_key, first_key + len(k_tile)) > own[:, None], -math.inf)
                m_new = torch.maximum(m, s.amax(dim=1))
                subtracted = m_new.masked_fill(m_new == -math.inf, 0) if finite else m_new
                p, rescale = (s - subtracted[:, None]).exp(), (m - subtracted).exp()
                l = rescale * l + p.sum(dim=1)  # noqa: E741
                o = at_every_tile(rescale[:, None] * o + p @ v_tile, l)
                m, first_key = m_new, first_key + len(k_tile)
            outputs.append(at_the_end(o, l))
            sums.append(lse(m, l))
            first_query += len(q_tile)
        return torch.cat(outputs), torch.cat(sums)

    return answer


def _dense(q: Tensor, k: Tensor, v: Tensor, block_queries: int, block_keys: int, causal: bool):
    return flash_forward(q, k, v, len(q), len(k), causal)


def _draw(
    ragged: bool, causal: bool = False, more: int = 0, dtype: torch.dtype = torch.float64
) -> Callable[[Generator], tuple]:
    """Two blocks of queries, two to four of keys, the last ones short if `ragged`; `more` keys (1) or fewer (-1)."""

    def draw(generator: Generator) -> tuple:
        block_queries, block_keys = whole_number(3, 5, generator), whole_number(3, 4, generator)
        queries = block_queries + (whole_number(1, block_queries - 1, generator) if ragged else block_queries)
        keys = queries + more * whole_number(2, 3, generator) if causal else block_keys * whole_number(2, 3, generator)
        keys = max(2, keys)
        keys += ragged * (keys % block_keys == 0)
        d_head = whole_number(3, 6, generator)
        q, k, v = (
            torch.randn(length, d_head, generator=generator, dtype=torch.float64).to(dtype)
            for length in (queries, keys, keys)
        )
        return 2 * q, k, v, block_queries, block_keys, causal

    return draw


def _one_tile(generator: Generator) -> tuple:
    q, k, v = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
    return q, k, v, 4, 4, False


def _long(generator: Generator) -> tuple:
    # tensors of their own, not views of one: the largest memory counts
    q, k, v = (torch.randn(16, 1, generator=generator, dtype=torch.float64) for _ in range(3))
    return q, k, v, 8, 16, False


def _makes_no_table(fn: Answer, *inputs) -> bool:
    """Whether the largest tensor on the way is smaller than a table of all queries and keys."""
    q, k, v, *settings = inputs
    return largest_storage(lambda *x: fn(*x, *settings), q, k, v, backward=False) < len(q) * len(k)


FORWARD = Exercise(
    id="flash.forward",
    title="attention in tiles",
    minutes=35,
    difficulty=4,
    reference=flash_forward,
    properties=(
        Property("one tile holds everything", _one_tile, times=1),
        Property("lengths are multiples of the blocks", _draw(ragged=False), times=1),
        Property("lengths that no block divides", _draw(ragged=True), times=1),
        Property("causal, as many keys as queries", _draw(ragged=True, causal=True), times=1),
        Property("causal, more keys than queries", _draw(ragged=True, causal=True, more=1), times=1),
        Property("causal, fewer keys: the first queries see none", _draw(ragged=True, causal=True, more=-1), times=1),
        Property("float32 stays float32", _draw(ragged=True, dtype=torch.float32), times=1),
        Property("no table of all queries and keys is made", _long, _makes_no_table, times=1),
    ),
    mistakes=(
        Mistake(
            "The tail is not masked",
            "The last tile was filled up with zeros, and a score of 0 has the weight exp(0), not 0. Set the scores of "
            "keys that do not exist to -inf.",
            _forward(cut_keys=_fill),
        ),
        Mistake(
            "Works only for multiples of the block",
            "view and reshape need whole blocks. The last one may be short: use slices, split, or fill up and mask.",
            _forward(cut_queries=_view, cut_keys=_view),
        ),
        Mistake(
            "The short last tile of keys is lost",
            "length // block blocks leave keys out. Round up.",
            _forward(cut_keys=_cut_whole),
        ),
        Mistake(
            "The scale is missing",
            "Scores are divided by sqrt(d_head), before the maximum is taken.",
            _forward(scale=lambda d_head: 1.0),
        ),
        Mistake(
            "Divided at every tile",
            "The output so far is divided again at each later tile. Divide once, after the last one.",
            _forward(at_every_tile=_divide, at_the_end=lambda o, total: o),
        ),
        Mistake(
            "The log-sum-exp without the maximum",
            "The sum was made of exp(score - m). Add m to its logarithm.",
            _forward(lse=lambda m, total: total.log()),
        ),
        Mistake(
            "The log-sum-exp in base 2",
            "Kernels use exp2 for speed, but the log-sum-exp is a natural logarithm here.",
            _forward(lse=lambda m, total: (m + total.log()) / math.log(2)),
        ),
        Mistake(
            "Causal, aligned at the top left",
            "The last query sees the last key. Query i stands at key i + keys - queries, not at key i.",
            _forward(place=lambda queries, keys: 0),
        ),
        Mistake(
            "Causal off by one",
            "Query i sees its own place, key i + keys - queries, as well. You stop one key earlier.",
            _forward(place=lambda queries, keys: keys - queries - 1),
        ),
        Mistake(
            "The future is seen",
            "With causal=True, scores of keys after i + keys - queries must be -inf.",
            _forward(place=None),
        ),
        Mistake(
            "-inf minus -inf",
            "A query that has seen no key has the maximum -inf, and -inf - (-inf) is NaN. Subtract 0 there instead.",
            _forward(finite=False, at_the_end=lambda o, total: o / total[:, None]),
        ),
        Mistake(
            "A query without a key is divided by 0",
            "Its sum is 0, and 0 / 0 is NaN. Its output is 0.",
            _forward(at_the_end=lambda o, total: o / total[:, None]),
        ),
        Mistake(
            "All scores at once",
            "The result is right, but a table of all queries and keys was made. Hold one tile of scores at a time.",
            _dense,
        ),
    ),
    hints=(
        "Two loops: over blocks of queries, and inside it over blocks of keys. The inner one is exercise 1. What does "
        "a block of queries start with, and what is done once after its last tile?",
        "For first_query in range(0, queries, block_queries): q_tile = q[first_query : first_query + block_queries]; a "
        "slice ends with the text. A tile's scores are q_tile @ k_tile.T / sqrt(d_head); the places of its queries are "
        "arange(...) + keys - queries. After the keys: output o / l where l > 0, log-sum-exp m + log(l).",
        "A neighbour: the largest product of two lists, a tile at a time.\n"
        "  for i in range(0, len(a), 3):\n"
        "      best = torch.full_like(a[i : i + 3], -math.inf)      the last one may be short\n"
        "      for j in range(0, len(b), 2):\n"
        "          best = torch.maximum(best, (a[i : i + 3, None] * b[j : j + 2]).amax(dim=1))\n"
        "      results.append(best)                                 torch.cat(results) at the end",
    ),
)
