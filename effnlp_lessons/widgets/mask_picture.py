"""The picture of `mask_explorer`: the mask of a matrix, a part of it weight by weight, and bars of bytes and time.

Left the whole matrix, in cells of so many weights that 96 cells or fewer make its longer side; the darker a cell, the
more of its weights are kept, white is none. The shade goes with the square root of the share kept, so that 1 % is still
seen. Beside it 64 x 64 weights, each a square: blue is kept. Right the bars, in per cent of the dense matrix; what is
longer than the axis ends there and bears its number inside. Red is more than the dense matrix, of times more by 5 % and
above: less is within the noise. Places are in pixels of the whole picture from its upper left corner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from effnlp_lessons.widgets.mask_numbers import OTHER
from effnlp_lessons.widgets.style import BLACK, BLUE, GREY, VERMILION

CELLS, LONGEST = 96, 288  # of the longer side of the matrix: cells at most, pixels at most
MATRIX = (20, 78)  # left and top of the whole matrix
LENS, DOT = 64, 3  # weights along a side of the magnified part, pixels of one
PART = (334, 78)  # left and top of it
BARS = (676, 204)  # left and width of the bars
BYTES_TOP, TIME_TOP, ROW = 52, 288, 25
MORE = {"bytes": 1.0, "time": 1.05}  # above this a bar is red
MOST = 320  # per cent at the end of the axes of the bars
DASH = "–"
AMOUNT = LinearSegmentedColormap.from_list("amount", ["#FFFFFF", "#9CC7E3", BLUE, "#002A44"])
LABELS = {
    "dense": "dense, with zeros",
    "csr64": "CSR, int64 places",
    "csr": "CSR, int32 places",
    "bit mask": "bit mask",
    "2:4": "2:4",
    "blocks": "32 x 32 blocks",
    "smaller dense": "smaller dense",
    "dense kernel": "dense kernel",
    "CSR kernel": "CSR kernel",
    "block kernel": "32 x 32 kernel",
}


def cell_of(shape: tuple[int, int]) -> int:
    """Weights along a side of a cell: the least power of two with at most `CELLS` cells on the longer side."""
    return next(side for side in (1, 2, 4, 8, 16, 32) if max(shape) <= CELLS * side)


def pixels_of(shape: tuple[int, int]) -> int:
    """Pixels along a side of a cell."""
    return LONGEST // (max(shape) // cell_of(shape))


def area_of(shape: tuple[int, int]) -> list[int]:
    """Left, top, width, height of the whole matrix: what takes the pointer."""
    side, pixels = cell_of(shape), pixels_of(shape)
    return [*MATRIX, shape[1] // side * pixels, shape[0] // side * pixels]


class MaskPicture:
    """The artists of the picture. `numbers` are those of `MaskExplorer.numbers`."""

    # ------------------------------------------------------------------------ what stays

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        figure.set_layout_engine("none")
        self._width, self._height = figure.canvas.get_width_height()
        shape = numbers["shape"]
        left, top, width, height = area_of(shape)
        self._cells = self._draw_grid(figure, (left, top, width, height), numbers["cells"].shape, AMOUNT)
        lens = numbers["part"].shape
        one = LinearSegmentedColormap.from_list("one", ["#FFFFFF", BLUE])
        self._part = self._draw_grid(figure, (*PART, DOT * lens[1], DOT * lens[0]), lens, one)
        scale = pixels_of(shape) / cell_of(shape)
        self._scale = scale
        self._frame = Rectangle(
            (0, 0), lens[1] * scale, lens[0] * scale, transform=None, fill=False, edgecolor=VERMILION, linewidth=1.6
        )
        figure.add_artist(self._frame)
        # words stay and only their numbers move: drawing letters takes most of the time of an event
        self._write(figure, 12, 10, f"{numbers['matrix']} ({shape[0]} x {shape[1]})", weight="bold", fontsize=11)
        self._words: dict[str, Artist] = {}
        below, side = PART[1] + DOT * LENS + 8, cell_of(shape)
        for name, words, x, y, gap in (
            ("left", "weights left", 12, 33, 84),
            ("squares", "squared weight left", 168, 33, 136),
            ("darkest", f"kept in the darkest {side} x {side} weights", MATRIX[0], top + LONGEST + 8, 240),
            ("rows", "rows", PART[0], below, 64),
            ("columns", "columns", PART[0], below + 18, 64),
            ("kept", "kept", PART[0], below + 36, 64),
        ):
            style = {"va": "baseline", "fontsize": 9}
            self._write(figure, x, y + 12, words, **style)
            self._words[name] = self._write(figure, x + gap, y + 12, **style)
        self._write(figure, MATRIX[0], 56, "the whole matrix", fontsize=9, color=GREY)
        self._write(figure, PART[0], 56, "in the frame, weight by weight", fontsize=9, color=GREY)
        hint = "Move the frame: click the matrix, or the arrow keys."
        self._write(figure, MATRIX[0], top + LONGEST + 30, hint, fontsize=9, color=GREY)
        self._write(figure, PART[0], below + 84, f"{DASH}  {OTHER}", fontsize=9, color=GREY)
        self._lines: list[Artist] = []  # at 100 %, over the bars, and so drawn with what moves
        sizes = self._draw_bars(figure, BYTES_TOP, numbers["bytes"], "Bytes, % of the dense matrix")
        seconds = self._draw_bars(figure, TIME_TOP, numbers["time"], "Time, % of the dense matrix")
        self._bars = {"bytes": sizes, "time": seconds}
        moving: list[Artist] = [self._cells, self._part, self._frame]
        for place in (0, 1):
            moving += [artists[place] for bars in self._bars.values() for artists in bars.values()]
            moving += self._lines * (place == 0)
        return [*moving, *self._words.values()]

    def _write(self, figure: Figure, x: float, y: float, words: str = "", **style: Any) -> Artist:
        """Words at a place in pixels."""
        return figure.text(x / self._width, 1 - y / self._height, words, **{"va": "top", "parse_math": False, **style})

    def _axes(self, figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
        w, h = self._width, self._height
        return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))

    def _draw_grid(
        self, figure: Figure, place: tuple[int, int, int, int], shape: tuple[int, int], colours: Any
    ) -> Artist:
        """A picture of a matrix with a thin outline around it."""
        axes = self._axes(figure, *place)
        axes.set_axis_off()
        left, top, width, height = place
        corner = left - 1.5, self._height - top - height - 1.5
        look = {"transform": None, "facecolor": "none", "edgecolor": GREY, "linewidth": 0.72}
        figure.add_artist(Rectangle(corner, width + 3, height + 3, **look))
        return axes.imshow(np.zeros(shape), cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect="auto")

    def _draw_bars(
        self, figure: Figure, top: int, values: Mapping[str, Any], title: str
    ) -> dict[str, tuple[Artist, Artist]]:
        left, width = BARS
        self._write(figure, left - 124, top - 26, title, weight="bold", fontsize=10)
        axes = self._axes(figure, left, top, width, ROW * len(values))
        axes.set(xlim=(0, MOST), ylim=(len(values) - 0.5, -0.5), xticks=range(0, MOST, 100))
        axes.set_yticks(range(len(values)), [LABELS[name] for name in values])
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        bars = axes.barh(range(len(values)), 0, color=BLUE, height=0.6)
        amounts = [axes.text(0, place, "", va="center_baseline", fontsize=9) for place in range(len(values))]
        for amount in amounts:
            amount.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        self._lines.append(axes.axvline(100, color=BLACK, linewidth=1.2))
        return dict(zip(values, zip(bars, amounts, strict=True), strict=True))

    # ------------------------------------------------------------------------ what moves

    def draw(self, numbers: dict[str, Any], words: Mapping[str, str]) -> None:
        """Show the numbers and words for "left", "squares", "darkest", "rows", "columns", "kept"."""
        self._cells.set_data(np.sqrt(numbers["cells"]))
        self._part.set_data(numbers["part"])
        row, column = numbers["corner"]
        lens = numbers["part"].shape[0] * self._scale
        x, y = MATRIX[0] + column * self._scale, self._height - MATRIX[1] - row * self._scale - lens
        self._frame.set_xy((x, y))
        for name, artist in self._words.items():
            artist.set_text(words[name])
        for kind, bars in self._bars.items():
            for name, (bar, amount) in bars.items():
                more = numbers[kind][name] is not None and numbers[kind][name] > MORE[kind]
                bar.set_facecolor(VERMILION if more else BLUE)
                self._show_bar(bar, amount, numbers[kind][name], numbers["how"][kind][name])

    def _show_bar(self, bar: Artist, amount: Artist, value: float | None, how: str) -> None:
        """A bar of `value` (1 is the dense matrix) with its number; without one the reason, or a dash for `OTHER`."""
        percent = 0.0 if value is None else min(100 * value, MOST)
        bar.set_width(percent)
        inside = percent > 0.7 * MOST
        amount.set_position((percent + (-5 if inside else 5), amount.get_position()[1]))
        number = "" if value is None else f"{100 * value:,.1f}" if value < 1.995 else f"{100 * value:,.0f}"
        amount.set_text(number or (DASH if how == OTHER else how))
        amount.set_horizontalalignment("right" if inside else "left")
        amount.get_bbox_patch().set_visible(not inside)
        amount.set_color("white" if inside else GREY if value is None else BLACK)
