"""Exercise 10 of notebook 08: a causal window with attention sinks, counted without a table.

StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): the first tokens of the text stay visible to every later one.
"""

from collections.abc import Callable

from torch import Generator

from effnlp_lessons.homework.exercise import Exercise, Mistake, Property, whole_number


def sink_pairs(length: int, window: int, sinks: int) -> int:
    """Allowed pairs (query, key): the query itself, the `window` tokens before it, and the first `sinks` tokens.

    Causal: no query sees a later token, a sink or not.
    """
    most = sinks + window + 1  # keys of a late query; query i has i + 1 keys until then
    growing = min(length, most)
    return growing * (growing + 1) // 2 + (length - growing) * most


def _pairs_up_to(length: int, most: int) -> int:
    """Sum of min(i + 1, most) over the queries i."""
    growing = min(length, most)
    return growing * (growing + 1) // 2 + (length - growing) * most


def _both_directions(length: int, window: int, sinks: int) -> int:
    """The window looks back and ahead, and every query sees every sink."""
    near = length + 2 * sum(length - distance for distance in range(1, min(window, length - 1) + 1))
    far_from_sink = sum(
        length - (min(length - 1, sink + window) - max(0, sink - window) + 1) for sink in range(min(sinks, length))
    )
    return near + far_from_sink


def _early_sinks(length: int, window: int, sinks: int) -> int:
    seen_too_early = min(sinks, length)
    return sink_pairs(length, window, sinks) + seen_too_early * (seen_too_early - 1) // 2


def _draw(texts: str) -> Callable[[Generator], tuple]:
    """Window and sinks of a few tokens; texts "long", "short" (shorter than what a query may see), "endless"."""

    def draw(generator: Generator) -> tuple:
        window, sinks = whole_number(2, 7, generator), whole_number(2, 5, generator)
        length = {
            "long": window + sinks + whole_number(5, 30, generator),
            "short": whole_number(1, window + sinks, generator),
            "endless": 20_000_000 + whole_number(0, 999_999, generator),
        }[texts]
        return length, window, sinks

    return draw


def _without_sinks(generator: Generator) -> tuple:
    window = whole_number(2, 7, generator)
    return window + whole_number(5, 30, generator), window, 0


SINK_PAIRS = Exercise(
    id="patterns.sink_pairs",
    title="a stream with sinks, counted",
    minutes=20,
    difficulty=3,
    reference=sink_pairs,
    properties=(
        Property("by hand: 6 tokens, window 1, 2 sinks", lambda generator: (6, 1, 2), times=1),
        Property("without sinks: a causal window", _without_sinks),
        Property("with sinks", _draw("long")),
        Property("a text so short that every query sees all before it", _draw("short")),
        Property("20 million tokens, which leaves no room for a table of pairs", _draw("endless"), times=1),
    ),
    mistakes=(
        Mistake(
            "Sinks inside the window are counted twice",
            "You count sinks and window apart and add. For the first queries they overlap: a sink that still "
            "lies in the window is one key.",
            lambda length, window, sinks: _pairs_up_to(length, sinks) + _pairs_up_to(length, window + 1),
        ),
        Mistake(
            "The first queries are counted in full",
            "Query i has only i + 1 tokens to see, itself included. Take the smaller of the two numbers.",
            lambda length, window, sinks: length * (sinks + window + 1),
        ),
        Mistake(
            "The query itself is left out",
            "A query sees itself, the window before it, and the sinks: sinks + window + 1 keys, and the first "
            "query sees 1.",
            lambda length, window, sinks: _pairs_up_to(length - 1, sinks + window),
        ),
        Mistake(
            "The query counts as one of the window",
            "Window counts the tokens before the query. With the query itself these are window + 1.",
            lambda length, window, sinks: _pairs_up_to(length, sinks + window),
        ),
        Mistake(
            "The window looks ahead",
            "A stream has no later tokens yet: the window looks back only, and a query before a sink does not see it.",
            _both_directions,
        ),
        Mistake(
            "A sink is seen before it comes",
            "Your window is causal and your sinks are not: query 0 sees itself alone, however many sinks there are.",
            _early_sinks,
        ),
        Mistake(
            "The sinks are left out",
            "This is the plain causal window. Every later query also sees the first `sinks` tokens.",
            lambda length, window, sinks: _pairs_up_to(length, window + 1),
        ),
        Mistake(
            "The first queries begin with no key",
            "Their numbers of keys are 1, 2, 3, ..., not 0, 1, 2, ...: m of them together have m (m + 1) / 2.",
            lambda length, window, sinks: sink_pairs(length, window, sinks) - min(length, sinks + window + 1),
        ),
        Mistake(
            "A short text is not thought of",
            "If the text ends before any query sees sinks + window + 1 keys, length minus this number is "
            "negative. Take the smaller of the two as the number of growing queries.",
            lambda length, window, sinks: (most := sinks + window + 1) * (most + 1) // 2 + (length - most) * most,
        ),
    ),
    hints=(
        "Write down the number of keys of query 0, 1, 2, ... for window 1 and 2 sinks. When does it stop growing?",
        "Query i has min(i + 1, most) keys. What is `most`? The sum falls into two parts: queries whose "
        "number still grows, and those that all have `most`. How many are in the first part if the text is short?",
        "A neighbour: a bus of 10 seats takes one more passenger at each of its stops until it is full, and "
        "nobody leaves. Passengers counted at every stop, over 25 stops:\n"
        "  stops 1 to 10:   1 + 2 + ... + 10 = 10 * 11 / 2 = 55\n"
        "  stops 11 to 25:  15 * 10                        = 150\n"
        "  together                                          205\n"
        "Over 4 stops: 1 + 2 + 3 + 4 = 10.",
    ),
)
