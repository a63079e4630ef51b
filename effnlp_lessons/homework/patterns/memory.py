"""Exercise 2 of notebook 08: which keys a query of local attention may see.

Image Transformer (Parmar et al. 2018, arXiv 1802.05751, sec. 3.3): the queries of a block share a memory block.
"""

from collections.abc import Callable

from torch import Generator

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def memory_block(query: int, length: int, block: int, flange: int, causal: bool) -> tuple[int, int]:
    """First and last key position, both included, that `query` may attend to.

    The memory is the query's block of `block` tokens and `flange` tokens on each side of it. With `causal`
    no key after the query is seen.
    """
    start = query // block * block
    first = max(0, start - flange)
    last = query if causal else min(length - 1, start + block - 1 + flange)
    return first, last


def _exchange(
    first: Callable[[int, int, int, int], int] | None = None,
    last: Callable[[int, int, int, int, int], int] | None = None,
    last_if_causal: Callable[[int, int, int, int, int], int] | None = None,
) -> Answer:
    """The answer with an end exchanged, for the mistakes.

    `first` gets (start of the query's block, query, block, flange); the others also the length, after the query.
    """

    def answer(query: int, length: int, block: int, flange: int, causal: bool) -> tuple[int, int]:
        right = memory_block(query, length, block, flange, causal)
        start = query // block * block
        change = last_if_causal if causal else last
        return (
            first(start, query, block, flange) if first else right[0],
            change(start, query, length, block, flange) if change else right[1],
        )

    return answer


def _moved(start_of: Callable[[int, int], int]) -> Answer:
    """The answer with a block that starts at `start_of(query, block)`, for the mistakes."""

    def answer(query: int, length: int, block: int, flange: int, causal: bool) -> tuple[int, int]:
        start = start_of(query, block)
        return max(0, start - flange), query if causal else min(length - 1, start + block - 1 + flange)

    return answer


def _window(query: int, length: int, block: int, flange: int, causal: bool) -> tuple[int, int]:
    return max(0, query - flange), query if causal else min(length - 1, query + flange)


def _without_the_flange_before(query: int, length: int, block: int, flange: int, causal: bool) -> tuple[int, int]:
    first, last = memory_block(query, length, block, flange, causal)
    return (query // block * block, last) if causal else (first, last)


def _draw(place: str, causal: bool) -> Callable[[Generator], tuple]:
    """A query in the "first", a "middle" or the "last" block, which is cut off; nothing else touches an end."""

    def draw(generator: Generator) -> tuple:
        block = whole_number(3, 6, generator)
        flange = whole_number(1, block - 1, generator)
        rest = whole_number(2, block - 1, generator)
        length = 4 * block + rest
        start, width = {"first": (0, block), "middle": (2 * block, block), "last": (4 * block, rest)}[place]
        return start + whole_number(1, width - 1, generator), length, block, flange, causal

    return draw


def _no_flange(generator: Generator) -> tuple:
    block, length = whole_number(2, 5, generator), whole_number(12, 20, generator)
    return whole_number(0, length - 1, generator), length, block, 0, bool(whole_number(0, 1, generator))


def _one_block(generator: Generator) -> tuple:
    length = whole_number(4, 8, generator)
    return whole_number(1, length - 2, generator), length, length + whole_number(0, 3, generator), 2, False


NOT_INCLUDED = "The last key itself is asked for, not the end of a range:"

MEMORY_BLOCK = Exercise(
    id="patterns.memory_block",
    title="the memory that a block shares",
    minutes=10,
    difficulty=1,
    reference=memory_block,
    properties=(
        Property("by hand: query 6 of 10, blocks of 4, flange 1", lambda generator: (6, 10, 4, 1, False), times=1),
        Property("in the middle of a text", _draw("middle", False)),
        Property("in the middle, causal", _draw("middle", True)),
        Property("in the first block: nothing lies before the text", _draw("first", False)),
        Property("in the first block, causal", _draw("first", True)),
        Property("in the last block, which is cut off", _draw("last", False)),
        Property("in the last block, causal", _draw("last", True)),
        Property("flange 0: the block alone", _no_flange),
        Property("a block as long as the text or longer", _one_block),
    ),
    mistakes=(
        Mistake(
            "A window around the query",
            "You count the flange from the query, so the keys move along with it. In local attention all "
            "queries of a block share one memory: count from the ends of the block.",
            _window,
        ),
        Mistake(
            "The flange before the block is counted from the query",
            "All queries of a block share one memory, so it begins `flange` tokens before the block.",
            _exchange(first=lambda start, query, block, flange: max(0, query - flange)),
        ),
        Mistake(
            "Causal changes nothing",
            "You keep the flange behind the block when `causal` is True, and the rest of the block, too. "
            "No key may stand after the query.",
            lambda query, length, block, flange, causal: memory_block(query, length, block, flange, False),
        ),
        Mistake(
            "Causal takes away the flange only",
            "The keys of the query's own block that stand after the query are the future as well: with "
            "`causal` the last key is the query itself.",
            _exchange(
                last_if_causal=lambda start, query, length, block, flange: min(length - 1, start + block - 1),
            ),
        ),
        Mistake(
            "Causal takes away the flange before the block",
            "That flange is the past, and the past may be seen. Causal takes away keys after the query.",
            _without_the_flange_before,
        ),
        Mistake(
            "The flange before the block is forgotten",
            "The memory begins `flange` tokens before the block.",
            _exchange(first=lambda start, query, block, flange: start),
        ),
        Mistake(
            "The flange behind the block is forgotten",
            "Where the future may be seen, the memory ends `flange` tokens behind the block.",
            _exchange(last=lambda start, query, length, block, flange: min(length - 1, start + block - 1)),
        ),
        Mistake(
            "Keys before the text",
            "In the first block your first position is negative. The text begins at 0: take the larger of the two.",
            _exchange(first=lambda start, query, block, flange: start - flange),
        ),
        Mistake(
            "Keys behind the text",
            "In the last block your last position is length or more. The text ends at length - 1.",
            _exchange(last=lambda start, query, length, block, flange: start + block - 1 + flange),
        ),
        Mistake(
            "Keys on both sides of the text",
            "Your first position can be negative, and your last can be length or more. Clip both to 0 .. length - 1.",
            _exchange(
                first=lambda start, query, block, flange: start - flange,
                last=lambda start, query, length, block, flange: start + block - 1 + flange,
            ),
        ),
        Mistake(
            "The end of a range",
            f"{NOT_INCLUDED} one less, with `causal` and without.",
            _exchange(
                last=lambda start, query, length, block, flange: min(length, start + block + flange),
                last_if_causal=lambda start, query, length, block, flange: query + 1,
            ),
        ),
        Mistake(
            "One key too far where the future may be seen",
            f"{NOT_INCLUDED} start + block - 1 + flange, and length - 1 at the end of the text.",
            _exchange(last=lambda start, query, length, block, flange: min(length, start + block + flange)),
        ),
        Mistake(
            "The block is one token too long",
            "A block of 4 that starts at 8 holds 8, 9, 10 and 11: its last token is start + block - 1.",
            _exchange(last=lambda start, query, length, block, flange: min(length - 1, start + block + flange)),
        ),
        Mistake(
            "The start of the block is rounded up",
            "Your block starts behind the query. The block that the query lies in starts at or before it: round down.",
            _moved(lambda query, block: -(-query // block) * block),
        ),
        Mistake(
            "The number of the block is taken for its start",
            "query // block says which block it is: 0, 1, 2, ... Block number b starts at b * block.",
            _moved(lambda query, block: query // block),
        ),
        Mistake(
            "The flange is counted in blocks",
            "A flange of 2 is 2 tokens on each side, not 2 blocks. It need not be a multiple of the block.",
            lambda query, length, block, flange, causal: memory_block(query, length, block, flange * block, causal),
        ),
    ),
    hints=(
        "First forget flange, causal and the ends of the text. In which block does the query lie, and at which "
        "position does that block start?",
        "// rounds down: query // block is the number of the block. The memory begins `flange` before the block "
        "and ends `flange` behind it, but not outside 0 .. length - 1. What is the very last key that a causal "
        "query may see?",
        "A neighbour: the days of a year are numbered 0 .. 364, its weeks have 7 days. Which is the last day of "
        "the week that a day lies in?\n"
        "  day 17:   17 // 7 = 2, so week 2; it starts on day 2 * 7 = 14 and ends on day 14 + 7 - 1 = 20\n"
        "  day 364:  364 // 7 = 52; it starts on day 364 and would end on day 370\n"
        "  the year has no such day: min(364, 370) = 364",
    ),
)
