"""Exercise 5 of notebook 11: bytes between slow and fast memory (FlashAttention-2, Dao 2023, arXiv 2307.08691)."""

from collections.abc import Callable
from math import ceil

from torch import Generator

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def bytes_moved(
    queries: int, keys: int, d_head: int, itemsize: int, block_queries: int, block_keys: int, causal: bool
) -> int:
    """Bytes that the tiled forward loads and stores for one head.

    Q and the output once, the LSE once (4 bytes a query), and for each block of queries the keys and values of every
    tile that is not skipped. The last tile ends with the keys.
    """
    return _bytes()(queries, keys, d_head, itemsize, block_queries, block_keys, causal)


def _last_seen(block: int, block_queries: int, queries: int, keys: int) -> int:
    """The last key that a query of this block sees, causal; below 0 if none."""
    return min((block + 1) * block_queries, queries) - 1 + keys - queries


def _rows(
    queries: int, keys: int, block_queries: int, block_keys: int, causal: bool, clipped: bool = True, whole: bool = True
) -> int:
    """Keys loaded by all blocks of queries together. `whole` False: only those that a query may see."""
    rows = 0
    for block in range(ceil(queries / block_queries)):
        end = max(0, _last_seen(block, block_queries, queries, keys) + 1) if causal else keys
        end = ceil(end / block_keys) * block_keys if whole else end
        rows += min(end, keys) if clipped else end
    return rows


def _bytes(
    rows: Callable[[int, int, int, int, bool], int] = _rows,
    of_lse: Callable[[int], int] = lambda itemsize: 4,
    tensors: int = 2,
    outputs: int = 1,
) -> Answer:
    """The answer with one count exchanged.

    Args:
        rows: keys loaded by all blocks of queries together, of (queries, keys, block_queries, block_keys, causal).
        of_lse: bytes of one LSE, of the itemsize.
        tensors: how many tensors have these rows: K and V.
        outputs: how often the output moves.
    """

    def answer(
        queries: int, keys: int, d_head: int, itemsize: int, block_queries: int, block_keys: int, causal: bool
    ) -> int:
        loaded = tensors * rows(queries, keys, block_queries, block_keys, causal)
        return itemsize * d_head * ((1 + outputs) * queries + loaded) + of_lse(itemsize) * queries

    return answer


def _floor_rows(queries: int, keys: int, block_queries: int, block_keys: int, causal: bool) -> int:
    """Without the short last block of queries, and without the short last block of keys."""
    blocks = queries // block_queries
    ends = [
        min(_last_seen(block, block_queries, queries, keys) // block_keys + 1 if causal else keys, keys // block_keys)
        for block in range(blocks)
    ]
    return sum(max(0, end) * block_keys for end in ends)


def _without_short_queries(queries: int, keys: int, block_queries: int, block_keys: int, causal: bool) -> int:
    blocks = queries // block_queries
    ends = [_last_seen(block, block_queries, queries, keys) // block_keys + 1 for block in range(blocks)]
    return sum(min(max(0, end) * block_keys, keys) for end in ends) if causal else blocks * keys


def _draw(causal: bool, more: int = 0) -> Callable[[Generator], tuple]:
    def draw(generator: Generator) -> tuple:
        block_queries, block_keys = whole_number(9, 15, generator), whole_number(4, 8, generator)
        queries = block_queries * whole_number(2, 4, generator) + whole_number(1, block_queries - 1, generator)
        keys = queries + more * whole_number(3, 8, generator)
        keys += keys % block_keys == 0
        return (
            queries,
            keys,
            whole_number(5, 9, generator),
            2 * whole_number(1, 2, generator),
            *((block_queries, block_keys, causal)),
        )

    return draw


BYTES = Exercise(
    id="flash.bytes",
    title="count the bytes",
    minutes=20,
    difficulty=2,
    reference=bytes_moved,
    properties=(
        Property("by hand: four tokens in one tile", lambda g: (4, 4, 2, 2, 4, 4, False), times=1),
        Property("not causal, lengths that no block divides", _draw(False), times=2),
        Property("not causal, more keys than queries", _draw(False, 1), times=1),
        Property("causal", _draw(True), times=2),
        Property("causal, fewer keys than queries", _draw(True, -1), times=1),
    ),
    mistakes=(
        Mistake(
            "Only whole blocks are counted",
            "queries // block_queries and keys // block_keys lose the short last blocks. Round up.",
            _bytes(rows=_floor_rows),
        ),
        Mistake(
            "The short last block of queries is lost",
            "queries // block_queries loses the last block. It reads the keys once more: round up.",
            _bytes(rows=_without_short_queries),
        ),
        Mistake(
            "The last tile is counted whole",
            "Beyond the last key nothing is loaded, for the mask hides it. Clip the last tile to the keys.",
            _bytes(rows=lambda *sizes: _rows(*sizes, clipped=False)),
        ),
        Mistake(
            "Keys and values only once",
            "Every block of queries reads the keys and values again, for the fast memory does not keep them.",
            _bytes(rows=lambda queries, keys, *others: keys),
        ),
        Mistake(
            "Every query reads the keys",
            "A block of queries shares a tile of keys: that is what tiling saves. Count blocks, not queries.",
            _bytes(rows=lambda queries, keys, block_queries, *others: _rows(queries, keys, 1, *others)),
        ),
        Mistake(
            "The LSE is forgotten",
            "The backward pass needs one number for each query. It is stored once, in 4 bytes.",
            _bytes(of_lse=lambda itemsize: 0),
        ),
        Mistake(
            "The LSE in the inputs' type",
            "The LSE is kept in float32, 4 bytes, whatever the type of Q, K and V.",
            _bytes(of_lse=lambda itemsize: itemsize),
        ),
        Mistake(
            "block_keys in the place of block_queries",
            "How often the keys are read follows from the number of blocks of queries.",
            _bytes(
                rows=lambda queries, keys, block_queries, block_keys, causal: _rows(
                    queries, keys, block_keys, block_queries, causal
                )
            ),
        ),
        Mistake(
            "Causal is half",
            "On the diagonal whole tiles are read, though a part of them is hidden: more than half. Add up the tiles.",
            _bytes(
                rows=lambda queries, keys, block_queries, block_keys, causal: (
                    _rows(queries, keys, block_queries, block_keys, False) // (1 + causal)
                )
            ),
        ),
        Mistake(
            "Causal skips nothing",
            "A tile in which no query sees a key is skipped, and its keys are not read.",
            _bytes(rows=lambda *sizes: _rows(*sizes[:4], False)),
        ),
        Mistake(
            "Causal reads only visible keys",
            "A tile is read whole, up to the end of the keys, even if its last columns are hidden from all queries.",
            _bytes(rows=lambda *sizes: _rows(*sizes, whole=False)),
        ),
        Mistake(
            "The values are forgotten",
            "A tile needs the keys and the values: two tensors.",
            _bytes(tensors=1),
        ),
        Mistake(
            "The output is forgotten",
            "Each query is loaded once, and its output is stored once.",
            _bytes(outputs=0),
        ),
    ),
    hints=(
        "Follow one block of queries. What does it load once, what does it load for each tile, what does it store?",
        "For block b (counted from 0; ceil(queries / block_queries) of them) the last visible key is "
        "min((b + 1) * block_queries, queries) - 1 + keys - queries. Round up to whole tiles, but not beyond the keys. "
        "Add up these rows; K and V have d_head * itemsize bytes in each.",
        "A neighbour: 7 readers share a car of 3 seats to a library of 5 books, and may not take one home.\n"
        "  ceil(7 / 3) * 5     15 books carried to the desk: each carload reads all\n"
        "  5                   if one could remember them, 7 * 5 if each came alone",
    ),
)
