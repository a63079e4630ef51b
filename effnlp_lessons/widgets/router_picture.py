"""The picture of `router_explorer`: the tokens and their choices, the residual, the experts' buffers, bars beside them.

A choice is a cell: filled where it has a place, dark for a first and pale for a second choice; hollow and struck
through where it is refused. An empty place is striped, also where a second choice was not drawn, whose number it then
has. A token without an expert has a black number and an arrow down to the line of the residual. So nothing of it needs
colours. Cells and their numbers are put into the pixels, which takes a fraction of the time of letters. All places are
in pixels from the upper left corner.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.artist import Artist
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from effnlp_lessons.widgets.flash_tiles import ink_of
from effnlp_lessons.widgets.memory_picture import box
from effnlp_lessons.widgets.pattern_picture import Pixels, packed
from effnlp_lessons.widgets.style import BLACK, BLUE, GREY, ORANGE

WIDTH, HEIGHT = 900, 550
MOST_TOKENS = 48  # the grid has room for no more
TAKEN, REFUSED, NOT_DRAWN = 0, 1, 2
LEFT, CELL = 70, 12  # of the tokens and of the buffers; pixels from token to token, and from place to place
WALL = 3  # pixels between a buffer and what is refused
TOKENS_TOP, TOKEN_HEIGHT, CHOICE_TOPS, CHOICE_HEIGHT = 78, 13, (93, 109), 15
STEM_TOP, ARROW_TOP, RESIDUAL_TOP = 126, 138, 146  # from a lost token down to the residual
BUFFERS_TOP, BUFFERS_HEIGHT = 212, 256
HEIGHTS = {4: (60, 24), 8: (32, 22), 16: (16, 13)}  # by experts: pixels from row to row, and of a cell
FILLED_AT, REFUSED_AT = 676, 726  # middle of the numbers beside a buffer
BARS, BARS_WIDTH = 772, 112  # of shares from 0 to 1
NUMBER_SIZE, SMALL = 6.5, 8.5
STRIPE_EVERY = 5

Colour = tuple[int, int, int]
_WHITE, _BLACK, _GREY = (255, 255, 255), (0, 0, 0), (107, 107, 107)
_BLUE, _PALE, _VERMILION, _STRIKE = (0, 114, 178), (158, 208, 240), (213, 94, 0), (245, 190, 150)
_LIGHT, _STRIPES = (236, 236, 236), (195, 195, 195)
_BOLD = {"fontsize": 9.5, "weight": "bold"}
_NOTE = {"fontsize": 8.5, "color": GREY}


@functools.cache
def cell_look(kind: str, text: str, height: int) -> UInt8[np.ndarray, "height width 3"]:
    """A cell with a number: "token", "lost", "first", "second", "refused", "not drawn" or "empty"."""
    width, height = CELL - 1, height - 1
    fills = {"token": _LIGHT, "lost": _BLACK, "first": _BLUE, "second": _PALE}
    pixels = np.full((height, width, 3), fills.get(kind, _WHITE), np.uint8)
    rows, columns = np.indices((height, width))
    edge = (rows % (height - 1) == 0) | (columns % (width - 1) == 0)
    if kind in ("empty", "not drawn"):
        pixels[(rows + columns) % STRIPE_EVERY == 0] = _STRIPES
    if kind == "not drawn":
        pixels[edge] = _STRIPES
    if kind == "refused":
        from_strike = rows * (width - 1) + columns * (height - 1) - (width - 1) * (height - 1)
        pixels[np.abs(from_strike) <= height] = _STRIKE
        pixels[edge] = _VERMILION
    if text:
        colour = {"lost": _WHITE, "first": _WHITE, "not drawn": _GREY}.get(kind, _BLACK)
        put_ink(pixels, text, width / 2, height / 2, NUMBER_SIZE, colour)
    return pixels


def put_ink(pixels: np.ndarray, text: str, x: float, y: float, size: float, colour: Colour) -> None:
    """Put text with its middle at (x, y). Changes `pixels`."""
    ink = ink_of(text, size)
    height, width = ink.shape
    top, left = round(y - height / 2), round(x - width / 2)
    part = pixels[top : top + height, left : left + width]
    share = ink[..., None] / 255
    part[...] = np.round(part * (1 - share) + np.array(colour) * share)


def kind_of(status: int, choice: int) -> str:
    """The look of a choice, 0 the first one."""
    return {REFUSED: "refused", NOT_DRAWN: "not drawn"}.get(status, ("first", "second")[choice])


class _Canvas(Pixels):
    """An artist of pixels that are reached by places of the picture."""

    def __init__(self, left: int, top: int, right: int, bottom: int) -> None:
        super().__init__(left, top)
        self._shape = (bottom - top, right - left, 3)

    def clear(self) -> None:
        self.colours = np.full(self._shape, 255, np.uint8)

    def pack(self) -> None:
        self.pixels = packed(self.colours)

    def put(self, x: int, y: int, look: UInt8[np.ndarray, "height width 3"]) -> None:
        y, x = y - self.top, x - self.left
        self.colours[y : y + look.shape[0], x : x + look.shape[1]] = look

    def fill(self, x: int, y: int, width: int, height: int, colour: Colour) -> None:
        y, x = y - self.top, x - self.left
        self.colours[y : y + height, x : x + width] = colour

    def write(self, x: float, y: float, text: str, colour: Colour) -> None:
        put_ink(self.colours, text, x - self.left, y - self.top, SMALL, colour)


class RouterTokens(_Canvas):
    """The artist of the tokens, their choices, and the line of the residual; `show` takes the numbers."""

    def __init__(self) -> None:
        super().__init__(LEFT, TOKENS_TOP, LEFT + CELL * MOST_TOKENS, RESIDUAL_TOP + 3)

    def show(self, numbers: Mapping[str, Any]) -> None:
        self.clear()
        lost = set(numbers["lost"])
        for token in range(numbers["tokens"]):
            x = LEFT + CELL * token
            self.put(x, TOKENS_TOP, cell_look("lost" if token in lost else "token", str(token), TOKEN_HEIGHT))
            for choice, status in enumerate(numbers["status"][token]):
                text = str(numbers["chosen"][token, choice])
                self.put(x, CHOICE_TOPS[choice], cell_look(kind_of(status, choice), text, CHOICE_HEIGHT))
            if token in lost:
                self._show_arrow(x + CELL // 2 - 1)
        self.fill(LEFT, RESIDUAL_TOP, CELL * MOST_TOKENS, 3, _BLACK)
        self.pack()

    def _show_arrow(self, middle: int) -> None:
        """From below a token's choices down to the residual."""
        self.fill(middle, STEM_TOP, 2, ARROW_TOP - STEM_TOP, _VERMILION)
        for row in range(RESIDUAL_TOP - ARROW_TOP):
            half = 5 - row * 5 // 8
            self.fill(middle - half + 1, ARROW_TOP + row, 2 * half, 1, _VERMILION)


class RouterBuffers(_Canvas):
    """The artist of the buffers and of the numbers beside them; `show` takes the numbers."""

    def __init__(self, experts: int) -> None:
        self.pitch, self.height = HEIGHTS[experts]
        super().__init__(LEFT - 2, BUFFERS_TOP - 2, BARS - 12, BUFFERS_TOP + experts * self.pitch)

    def show(self, numbers: Mapping[str, Any]) -> None:
        self.clear()
        width = CELL * numbers["capacity"]
        tops = [BUFFERS_TOP + self.pitch * expert for expert in range(numbers["experts"])]
        queued = np.zeros((numbers["experts"], MOST_TOKENS), bool)
        for (token, choice), status in np.ndenumerate(numbers["status"]):
            expert, place = numbers["chosen"][token, choice], numbers["places"][token, choice]
            queued[expert, place] = True
            x = LEFT + CELL * place + (WALL if place >= numbers["capacity"] else 0)
            self.put(x, tops[expert], cell_look(kind_of(status, choice), str(token), self.height))
        empty = cell_look("empty", "", self.height)
        for expert, place in np.argwhere(~queued[:, : numbers["capacity"]]):
            self.put(LEFT + CELL * place, tops[expert], empty)
        for expert, top in enumerate(tops):
            for y in (top - 2, top + self.height - 1):
                self.fill(LEFT - 2, y, width + WALL + 1, 1, _BLACK)
            self.fill(LEFT - 2, top - 2, 2, self.height + 2, _BLACK)
            self.fill(LEFT + width - 1, top - 2, WALL, self.height + 2, _BLACK)
            for x, name in ((FILLED_AT, "filled"), (REFUSED_AT, "refused")):
                count = numbers[name][expert]
                colour = _VERMILION if name == "refused" and count else _BLACK
                self.write(x, top + self.height / 2 - 1, str(count), colour)
        self.pack()


class RouterPicture:
    """The artists of the picture. `numbers` are those of `RouterExplorer.numbers`."""

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        axes.set_axis_off()

        def write(x: float, y: float, words: str = "", **style: Any) -> Artist:
            return axes.text(x, y, words, **{"va": "top", "fontsize": 9, "parse_math": False, **style})

        experts = numbers["experts"]
        self._tokens, self._buffers = axes.add_artist(RouterTokens()), axes.add_artist(RouterBuffers(experts))
        self._words = {"heading": write(12, 8, fontsize=11, weight="bold"), "capacity": write(12, 29)}
        write(12, TOKENS_TOP - 22, "Tokens in order, with the experts that they choose", **_BOLD)
        for y, words in (
            (TOKENS_TOP + 6, "token"), (CHOICE_TOPS[0] + 7, "first"), (RESIDUAL_TOP + 1, "residual"),
        ):  # fmt: skip
            write(LEFT - 6, y, words, ha="right", va="center_baseline", fontsize=8.5)
        self._second = write(LEFT - 6, CHOICE_TOPS[1] + 7, "second", ha="right", va="center_baseline", fontsize=8.5)
        self._draw_legend(axes, write)
        self._draw_beside(axes, write, experts)
        self._draw_totals(write, experts)
        return [self._tokens, self._buffers, self._second, *self._words.values(), *self._bars.values()]

    def _draw_legend(self, axes: Any, write: Any) -> None:
        for row, (kind, words) in enumerate(
            (
                ("first", "first choice, placed"),
                ("second", "second choice, placed"),
                ("refused", "refused: the buffer is full"),
                ("not drawn", "second choice, not drawn"),
                ("empty", "empty place: zeros are computed"),
                ("lost", "no expert: the residual alone"),
            )
        ):
            y = 56 + 17 * row
            cell = axes.add_artist(Pixels(WIDTH - 228, y))
            cell.pixels = packed(cell_look(kind, "" if kind == "empty" else "7", CHOICE_HEIGHT))
            write(WIDTH - 210, y + 7, words, va="center_baseline", fontsize=8.5)

    def _draw_beside(self, axes: Any, write: Any, experts: int) -> None:
        """Headings, names of the experts, and the scale of the bars."""
        write(
            12,
            BUFFERS_TOP - 44,
            "Buffers of the experts: first choices, then second ones, in the order of the tokens",
            **_BOLD,
        )
        write(12, BUFFERS_TOP - 25, "framed: the C places of an expert; the numbers are those of the tokens", **_NOTE)
        for x, words in ((FILLED_AT, "placed"), (REFUSED_AT, "refused")):
            write(x, BUFFERS_TOP - 25, words, ha="center", fontsize=8.5)
        top, bottom = BUFFERS_TOP - 3, BUFFERS_TOP + experts * self._buffers.pitch - 2
        for share in (0, 0.5, 1):
            x = BARS + BARS_WIDTH * share
            axes.plot([x, x], [top, bottom], color="#E3E3E3" if share else GREY, linewidth=0.8, zorder=0)
            write(x, bottom + 3, f"{share:g}", ha="center", **_NOTE)
        even = BARS + BARS_WIDTH / experts
        axes.plot([even, even], [top, bottom], color=BLACK, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        write(BARS + BARS_WIDTH / 2, bottom + 17, "dashed: an even share", ha="center", **_NOTE)
        for y, colour, words in ((BUFFERS_TOP - 44, BLUE, "first choices"), (BUFFERS_TOP - 25, ORANGE, "mean gate")):
            axes.add_collection(PolyCollection([box(BARS, BARS + 12, y + 2, y + 12)], facecolors=colour), autolim=False)
            write(BARS + 17, y, words, fontsize=8.5)
        for expert in range(experts):
            y = BUFFERS_TOP + self._buffers.pitch * expert + self._buffers.height / 2 - 1
            write(LEFT - 8, y, f"expert {expert}", ha="right", va="center_baseline", fontsize=8.5)
        self._bars = {
            name: axes.add_collection(PolyCollection([], facecolors=colour, linewidths=0), autolim=False)
            for name, colour in (("share", BLUE), ("mean gate", ORANGE))
        }

    def _draw_totals(self, write: Any, experts: int) -> None:
        top = BUFFERS_TOP + BUFFERS_HEIGHT + 32
        for x, name, title in (
            (12, "refused", "Refused choices"),
            (176, "lost", "Tokens without an expert"),
            (376, "wasted", "Empty places"),
            (516, "loss", f"Auxiliary loss (balanced: {1 / experts**2:.4f} and 1)"),
        ):
            write(x, top, title, **_BOLD)
            self._words[name] = write(x, top + 20, fontsize=10)

    # ------------------------------------------------------------------------ what moves

    def draw(self, numbers: dict[str, Any], words: Mapping[str, str]) -> None:
        """`words`: "heading", "capacity", "refused", "lost", "wasted", "loss"."""
        for name, text in words.items():
            self._words[name].set_text(text)
        self._second.set_visible(numbers["top k"] == 2)
        self._tokens.show(numbers)
        self._buffers.show(numbers)
        thick = (self._buffers.height - 3) / 2
        for place, (name, bars) in enumerate(self._bars.items()):
            tops = BUFFERS_TOP + self._buffers.pitch * np.arange(numbers["experts"]) + place * (thick + 1)
            bars.set_verts(
                [
                    box(BARS, BARS + BARS_WIDTH * value, top, top + thick)
                    for value, top in zip(numbers[name], tops, strict=True)
                ]
            )
