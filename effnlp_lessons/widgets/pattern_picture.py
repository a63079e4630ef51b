"""The picture of `pattern_explorer`: a head's weights under a mask, bars of what it costs and keeps, its reach.

An allowed cell is blue, pale to dark with its weight; a forbidden one is grey under stripes, so that the two
can also be told apart without colours. All places are in pixels from the upper left corner; a cell has a whole
number of them, so that a place of the picture is a cell.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt32
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from effnlp_lessons.widgets.cost_explorer import percent
from effnlp_lessons.widgets.style import BLACK, BLUE, GREEN, GREY, VERMILION

LEFT, TOP, SIDE = 96, 102, 432  # the square of weights: its corner, and its largest side
PANEL, REACH_TOP, REACH_SIDE = 590, 350, 176  # what stands beside it
ALLOWED, FORBIDDEN = np.array([(197, 222, 240), (0, 40, 90)]), np.array([(255, 255, 255), (90, 90, 90)])
STRIPE_EVERY, STRIPE = 6, 55


def packed(colours: np.ndarray) -> UInt32[np.ndarray, "*cells"]:
    """Colours (..., 3) from 0 to 255, each in one number as it lies on the canvas, which saves time."""
    opaque = np.full((*np.shape(colours)[:-1], 4), 255, np.uint8)
    opaque[..., :3] = colours
    return opaque.view(np.uint32)[..., 0]


WHITE, EDGE, FRAME = packed([(255, 255, 255), (107, 107, 107), (213, 94, 0)])
REACHED = packed([(255, 255, 255), (160, 160, 160), (0, 114, 178)])  # not, indirectly, directly


def cell_pixels(length: int, side: int = SIDE) -> int:
    """Pixels along a cell's side when `length` cells share at most `side`."""
    return side // length


def cell_at(x: float, y: float, length: int) -> tuple[int, int]:
    """(query, key) of the cell at this place of the picture; outside of the square below 0 or beyond its end."""
    cell = cell_pixels(length)
    return int((y - TOP) // cell), int((x - LEFT) // cell)


@functools.cache
def _font() -> Any:
    return font_manager.get_font(font_manager.findfont("DejaVu Sans"))


def label(token: str) -> str:
    """A token as it is written at the axes: cut if long, with a box for each character that the font lacks."""
    short = token if len(token) <= 11 else token[:10] + "…"
    return "".join(c if _font().get_char_index(ord(c)) else "□" for c in short)


@functools.cache
def _stripes_and_edges(length: int) -> tuple[np.ndarray, np.ndarray]:
    cell = cell_pixels(length)
    rows, columns = np.indices((cell * length, cell * length))
    edges = (rows % cell == cell - 1) | (columns % cell == cell - 1)
    return (rows + columns) % STRIPE_EVERY == 0, edges


def square_pixels(
    weights: Float[np.ndarray, "queries keys"], mask: Bool[np.ndarray, "queries keys"], cursor: tuple[int, int] | None
) -> UInt32[np.ndarray, "side side"]:
    """The square of weights under the mask, with lines along the row and the column of the cursor.

    A cell's depth is the root of its share in the largest weight, so that small weights can be told from none.
    """
    cell = cell_pixels(len(mask))
    stripes, edges = _stripes_and_edges(len(mask))
    depth = np.sqrt(weights / max(weights.max(), 1e-12))[..., None]
    low, high = np.where(mask[..., None, None], ALLOWED, FORBIDDEN).transpose(2, 0, 1, 3)
    colours = low + depth * (high - low)
    striped = colours + np.where(colours > 128, -STRIPE, STRIPE)
    under_stripes = stripes & grow(~mask, cell)
    square = np.where(under_stripes, grow(packed(striped), cell), grow(packed(colours), cell))
    square[edges & grow(mask, cell)] = WHITE
    if cursor is not None:
        for axis, place in enumerate(cursor):
            lines = np.moveaxis(square, axis, 0)
            lines[[max(place * cell - 1, 0), (place + 1) * cell - 1]] = FRAME
    return square


def reach_pixels(
    reached: Bool[np.ndarray, "queries keys"], mask: Bool[np.ndarray, "queries keys"]
) -> UInt32[np.ndarray, "side side"]:
    """The small square of the reach: blue where the mask itself allows the pair, grey where only the stack does."""
    kinds = grow(REACHED[reached.astype(int) + mask], cell_pixels(len(mask), REACH_SIDE))
    return np.pad(kinds, 1, constant_values=EDGE)


def grow(cells: np.ndarray, pixels: int) -> np.ndarray:
    return cells.repeat(pixels, 0).repeat(pixels, 1)


class Pixels(Artist):
    """Packed pixels put on the canvas as they are: a tenth of the time of an image that could be scaled."""

    def __init__(self, left: int, top: int) -> None:
        super().__init__()
        self.left, self.top = left, top

    def draw(self, renderer: Any) -> None:
        rows, columns = self.pixels.shape
        canvas = np.asarray(renderer.buffer_rgba()).view(np.uint32)[..., 0]
        canvas[self.top : self.top + rows, self.left : self.left + columns] = self.pixels


class PatternPicture:
    """The artists of the picture. `numbers` are those of `PatternExplorer.numbers`."""

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        figure.set_layout_engine("none")
        self.width, self.height = figure.canvas.get_width_height()

        def write(x: float, y: float, words: str = "", **style: Any) -> Artist:
            style = {"va": "top", "parse_math": False, **style}
            return figure.text(x / self.width, 1 - y / self.height, words, **style)

        def names(place: int, token: str, **style: Any) -> tuple[Artist, Artist]:
            """A token's name at its row and at its column."""
            at, style = (place + 0.5) * cell, {"fontsize": min(9, 0.68 * cell), **style}
            return (
                write(LEFT - 4, TOP + at, token, ha="right", **{**style, "va": "center_baseline"}),
                write(LEFT + at, TOP - 4, token, ha="center", rotation=90, **{**style, "va": "bottom"}),
            )

        length = len(numbers["tokens"])
        cell, self._labels = cell_pixels(length), [label(token) for token in numbers["tokens"]]
        for place, token in enumerate(self._labels):
            names(place, token)
        self._names = names(0, "", color=VERMILION)  # those of the cursor, over the black ones
        self._heading = write(2, 6, fontsize=11, weight="bold")
        self._darkest = write(2, TOP - 44, color=GREY, fontsize=9, va="bottom")
        write(2, TOP - 12, "keys →\nqueries ↓", color=GREY, fontsize=9, va="bottom", linespacing=1.3)
        for x, words, look in ((390, "allowed", {"facecolor": BLUE}), (465, "left out", {"hatch": "/////"})):
            write(x, 9, "   ", fontsize=8, bbox={"facecolor": "white", "edgecolor": GREY, "pad": 1, **look})
            write(x + 18, 9, words, fontsize=9)
        self._square = figure.add_artist(Pixels(LEFT, TOP))

        rows = (
            (52, f"pairs, budget {numbers['budget']:,}"),
            (72, f"MACs, dense {numbers['dense_macs']:,}"),
            (140, "mass captured"),
            (208, "output error (1: as bad as zeros)"),
            (REACH_TOP - 26, "pairs reached through the stack"),
        )
        for y, words in rows:
            write(PANEL, y, words)
        self._amounts = [write(PANEL + 300, y, ha="right", weight="bold") for y, _ in rows]
        bars = figure.add_axes((PANEL / self.width, 1 - 260 / self.height, 300 / self.width, 164 / self.height))
        bars.set(xlim=(0, 1.5), ylim=(164, 0), yticks=[], xticks=(0, 0.5, 1, 1.5))
        bars.grid(False)
        bars.spines["left"].set_visible(False)
        places = (10, 78, 146)
        bars.barh(places, 1, color="#EDEDED", height=20)
        self._bars = list(bars.barh(places, 0.5, color=(GREEN, BLUE, VERMILION), height=20))
        self._limit = bars.vlines(numbers["budget"] / numbers["all_pairs"], -2, 22, color=BLACK, linewidth=2)

        self._reach = figure.add_artist(Pixels(PANEL, REACH_TOP))
        x = PANEL + cell_pixels(length, REACH_SIDE) * length + 14
        for row, (words, colour) in enumerate((("directly", BLUE), ("indirectly", "#A0A0A0"), ("not at all", "white"))):
            y = REACH_TOP + 4 + 24 * row
            write(x, y, "   ", fontsize=8, bbox={"facecolor": colour, "edgecolor": GREY, "pad": 1})
            write(x + 20, y, words, fontsize=9)
        moving = [self._heading, self._darkest, self._square, *self._names, *self._bars, self._limit]
        return [*moving, *self._amounts, self._reach]

    def draw(self, numbers: dict[str, Any], heading: str) -> None:
        mask, cursor = numbers["mask"], numbers["cursor"]
        self._heading.set_text(heading)
        self._darkest.set_text(f"darkest: {numbers['weights'].max():.2f}")
        self._square.pixels = square_pixels(numbers["weights"], mask, cursor)
        for name in self._names:
            name.set_visible(cursor is not None)
        if cursor is not None:
            (query, key), cell = cursor, cell_pixels(len(mask))
            row, column = self._names
            row.set(text=self._labels[query], y=1 - (TOP + (query + 0.5) * cell) / self.height)
            column.set(text=self._labels[key], x=(LEFT + (key + 0.5) * cell) / self.width)
        for bar, share in zip(self._bars, (numbers["share"], numbers["mass"], numbers["error"]), strict=True):
            bar.set_width(min(share, 1.5))
        words = (
            f"{numbers['pairs']:,} ({percent(numbers['share'])})",
            f"{numbers['macs']:,}",
            percent(numbers["mass"]),
            f"{numbers['error']:.2f}",
            percent(numbers["reach_share"]),
        )
        for amount, text in zip(self._amounts, words, strict=True):
            amount.set_text(text)
        self._amounts[0].set_color(VERMILION if numbers["pairs"] > numbers["budget"] else BLACK)
        self._reach.pixels = reach_pixels(numbers["reached"], mask)
