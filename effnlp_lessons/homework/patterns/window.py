"""Exercise 1 of notebook 08: the mask of a dilated sliding window. Blanks in a worked example.

Longformer (Beltagy et al. 2020, arXiv 2004.05150, sec. 3.1), with the window counted on one side.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def window_mask(length: int, window: int, dilation: int) -> Bool[Tensor, "length length"]:
    """True where query i may attend to key j: j is i, or up to `window` steps of `dilation` tokens away."""
    position = torch.arange(length)
    distance = (position[:, None] - position[None, :]).abs()
    return (distance <= window * dilation) & (distance % dilation == 0)


def _rule(allowed: Callable[[Tensor, Tensor, int, int], Tensor]) -> Answer:
    """The mask by another rule of (query - key, key, window, dilation), for the mistakes."""

    def mask(length: int, window: int, dilation: int) -> Tensor:
        position = torch.arange(length)
        return allowed(position[:, None] - position[None, :], position[None, :], window, dilation)

    return mask


def _draw(windows: tuple[int, int], dilations: tuple[int, int]) -> Callable[[Generator], tuple]:
    """A text long enough for the whole window of its middle token."""

    def draw(generator: Generator) -> tuple:
        window, dilation = whole_number(*windows, generator), whole_number(*dilations, generator)
        return 2 * window * dilation + whole_number(2, 6, generator), window, dilation

    return draw


def _wider_than_the_text(generator: Generator) -> tuple:
    length = whole_number(3, 8, generator)
    return length, length + whole_number(0, 3, generator), whole_number(1, 2, generator)


WINDOW_MASK = Exercise(
    id="patterns.window_mask",
    title="a dilated window as a mask",
    minutes=10,
    difficulty=1,
    reference=window_mask,
    properties=(
        Property("by hand: 3 tokens, window 1, no gaps", lambda generator: (3, 1, 1), times=1),
        Property("without gaps (dilation 1) it is a band", _draw((3, 5), (1, 1))),
        Property("with gaps every dilation-th token of a wider band is left", _draw((2, 4), (2, 3))),
        Property("window 0: every token sees itself alone", _draw((0, 0), (2, 5)), times=1),
        Property("a window that is wider than the text", _wider_than_the_text),
    ),
    mistakes=(
        Mistake(
            "The window is read as two-sided",
            "You see window / 2 tokens on each side. In this course window counts one side: 2 * window + 1 "
            "keys in all. Libraries differ here, so look it up for each.",
            lambda length, window, dilation: window_mask(length, window // 2, dilation),
        ),
        Mistake(
            "One token too few on each side",
            "The token at a distance of exactly window * dilation still belongs to the window: <=, not <.",
            _rule(lambda gap, key, window, dilation: (gap.abs() < window * dilation) & (gap % dilation == 0)),
        ),
        Mistake(
            "Only the tokens before the query",
            "This is the causal window. Take the distance without its sign: tokens on both sides.",
            _rule(lambda gap, key, window, dilation: (gap >= 0) & (gap <= window * dilation) & (gap % dilation == 0)),
        ),
        Mistake(
            "Dilation is ignored",
            "Your mask is a plain band. With dilation d the steps are d tokens long, so the band is d times as wide.",
            _rule(lambda gap, key, window, dilation: gap.abs() <= window),
        ),
        Mistake(
            "The band is wide, but has no gaps",
            "Every token within window * dilation is seen. Keep those whose distance is a multiple of dilation.",
            _rule(lambda gap, key, window, dilation: gap.abs() <= window * dilation),
        ),
        Mistake(
            "The band has gaps, but is not wider",
            "Gaps alone make the window smaller. Its keys are as many as before, so the farthest is "
            "window * dilation away.",
            _rule(lambda gap, key, window, dilation: (gap.abs() <= window) & (gap % dilation == 0)),
        ),
        Mistake(
            "Dilation is read as the number of tokens left out",
            "Your steps are dilation + 1 tokens long. Here dilation is the step itself: 1 means no gaps.",
            lambda length, window, dilation: window_mask(length, window, dilation + 1),
        ),
        Mistake(
            "The gaps are the same for all queries",
            "You keep keys whose position is a multiple of dilation. The distance to the query must be one: "
            "the gaps move along with the query.",
            _rule(lambda gap, key, window, dilation: (gap.abs() <= window * dilation) & (key % dilation == 0)),
        ),
        Mistake(
            "A token does not see itself",
            "The distance 0 belongs to every window.",
            _rule(
                lambda gap, key, window, dilation: (gap != 0) & (gap.abs() <= window * dilation) & (gap % dilation == 0)
            ),
        ),
    ),
    hints=(
        "The table of distances is there. Two things must hold for a distance: it is not too large, and it "
        "does not fall into a gap.",
        "How far away is the last key, after `window` steps of `dilation` tokens? And which distances can be "
        "reached in steps of `dilation`? The remainder, %, tells.",
        "A neighbour: the cells of a chessboard row that a piece reaches from cell 4 in at most 2 jumps of 3.\n"
        "  cell = torch.arange(12)\n"
        "  far = (cell - 4).abs()        4 3 2 1 0 1 2 3 4 5 6 7\n"
        "  far <= 2 * 3                  all but the last cell\n"
        "  far % 3 == 0                  cells 1, 4, 7, 10\n"
        "  both                          cells 1, 4, 7, 10\n"
        "With one jump only, `far <= 1 * 3` leaves cells 1, 4 and 7.",
    ),
)
