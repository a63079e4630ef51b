"""Exercise 2 of notebook 11: which tiles are skipped, and which need a mask (Dao 2023, arXiv 2307.08691, sec. 3.1)."""

from collections.abc import Callable

from torch import Generator

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def tile_kinds(queries: int, keys: int, block_queries: int, block_keys: int, causal: bool) -> list[list[str]]:
    """The kind of every tile, "skipped", "partial" or "full"; a row for each block of queries.

    Query i stands at key i + keys - queries. A tile is skipped if no query of it sees a key of it, and full if it has
    all `block_keys` keys and every query of it that exists sees each of them.
    """
    return _kinds()(queries, keys, block_queries, block_keys, causal)


def _blocks(length: int, block: int) -> range:
    return range(0, length, block)


def _floor(length: int, block: int) -> range:
    return range(0, length // block * block, block)


def _kinds(
    blocks: Callable[[int, int], range] = _blocks,
    offset: Callable[[int, int], int] = lambda queries, keys: keys - queries,
    skip_by: Callable[[int, int], int] = lambda first, last: last,
    full_by: Callable[[int, int], int] = lambda first, last: first,
    tail: bool = True,
    skipping: bool = True,
) -> Answer:
    """The answer with one step exchanged.

    Args:
        offset: at which key query 0 stands.
        skip_by, full_by: which query of a block, of (first, last), says whether a tile is skipped or full.
        tail: False takes a tile that reaches beyond the keys for full.
        skipping: False lists every tile as computed.
    """

    def answer(queries: int, keys: int, block_queries: int, block_keys: int, causal: bool) -> list[list[str]]:
        table = []
        for first_query in blocks(queries, block_queries):
            last_query = min(first_query + block_queries, queries) - 1
            sees = [by(first_query, last_query) + offset(queries, keys) for by in (skip_by, full_by)]
            row = []
            for first_key in blocks(keys, block_keys):
                last_key = min(first_key + block_keys, keys) - 1
                if causal and first_key > sees[0]:
                    row.append("skipped" if skipping else "partial")
                elif (tail and first_key + block_keys > keys) or (causal and last_key > sees[1]):
                    row.append("partial")
                else:
                    row.append("full")
            table.append(row)
        return table

    return answer


def _draw(causal: bool, more: int) -> Callable[[Generator], tuple]:
    """Ragged lengths; `more` 0 for as many keys as queries, 1 for more keys, -1 for fewer."""

    def draw(generator: Generator) -> tuple:
        block_queries = whole_number(3, 5, generator)
        block_keys = whole_number(2, block_queries - 1, generator)
        queries = 2 * block_queries + whole_number(1, block_queries - 1, generator)
        keys = queries + more * whole_number(1, 4, generator)
        keys += (keys % block_keys == 0) * (-1 if more < 0 else 1) * (more != 0)
        return queries, keys, block_queries, block_keys, causal

    return draw


def _wide(generator: Generator) -> tuple:
    """More keys in a tile than queries, so that several blocks of queries share the diagonal."""
    queries, keys, block_queries, block_keys, causal = _draw(True, 1)(generator)
    return queries, keys, block_keys, block_queries, causal


TILE_KINDS = Exercise(
    id="flash.tile_kinds",
    title="which tiles are computed",
    minutes=20,
    difficulty=3,
    reference=tile_kinds,
    properties=(
        Property("by hand: four queries, four keys, tiles of 2 x 2", lambda g: (4, 4, 2, 2, True), times=1),
        Property("not causal: only the tail needs a mask", _draw(False, 1), times=2),
        Property("causal, as many keys as queries", _draw(True, 0), times=2),
        Property("causal, more keys than queries", _draw(True, 1), times=2),
        Property("causal, fewer keys than queries", _draw(True, -1), times=2),
        Property("causal, tiles wider than high", _wide, times=2),
    ),
    mistakes=(
        Mistake(
            "Causal off by one",
            "Query i sees the key at its own place, too: key i + keys - queries. You stop one key earlier.",
            _kinds(offset=lambda queries, keys: keys - queries - 1),
        ),
        Mistake(
            "One key of the future",
            "Query i sees keys up to i + keys - queries. You go one key further.",
            _kinds(offset=lambda queries, keys: keys - queries + 1),
        ),
        Mistake(
            "Aligned at the top left",
            "The last query sees the last key: with more keys than queries the first query sees several. Query i "
            "stands at key i + keys - queries, not at key i.",
            _kinds(offset=lambda queries, keys: 0),
        ),
        Mistake(
            "Shifted the wrong way",
            "The shift has the wrong sign: query i stands at key i + keys - queries.",
            _kinds(offset=lambda queries, keys: queries - keys),
        ),
        Mistake(
            "The ragged tail is called full",
            "The last tile has fewer than block_keys keys. What lies behind them is loaded as zeros, and a score of 0 "
            "is a score: the tile needs a mask, so it is partial.",
            _kinds(tail=False),
        ),
        Mistake(
            "The tail is forgotten",
            "length // block blocks leave the rest out. Round up: the last block may be short.",
            _kinds(blocks=_floor),
        ),
        Mistake(
            "Skipped by the first query",
            "The last query of a block sees most. A tile may be skipped only if its first key is hidden from that one.",
            _kinds(skip_by=lambda first, last: first),
        ),
        Mistake(
            "Full by the last query",
            "The first query of a block sees least. A tile is full only if that one sees its last key.",
            _kinds(full_by=lambda first, last: last),
        ),
        Mistake(
            "Nothing is skipped",
            "A tile with no visible pair is computed and masked away. Skip it: that is half of the work.",
            _kinds(skipping=False),
        ),
        Mistake(
            "The block sizes are exchanged",
            "Queries come in blocks of block_queries, keys in blocks of block_keys.",
            lambda queries, keys, block_queries, block_keys, causal: tile_kinds(
                queries, keys, block_keys, block_queries, causal
            ),
        ),
    ),
    hints=(
        "Only two queries of a block matter: the first sees least, the last sees most. Only two keys of a block do.",
        "Skipped: the first key lies after last_query + keys - queries. Full: first_key + block_keys <= keys, and the "
        "last key lies at or before first_query + keys - queries. All else is partial. The last block of queries "
        "ends at queries - 1.",
        "A neighbour: a group of friends, aged 12 to 15, and films by minimum age, on a reel.\n"
        "  reel of films from 16 to 18      skip it: even the oldest may see none\n"
        "  reel of films from 6 to 12       no need to ask: even the youngest may see all\n"
        "  reel of films from 12 to 16      ask for each friend and film",
    ),
)
