"""The picture of `quantization_grid_explorer`: one weight on a long axis, the histograms with their levels, the errors.

Vermilion is the grid of the moved weight, blue a grid elsewhere; each has a panel and a lane of its own, so that no
colour alone says which is which. A level in use is a line of full height, one that no weight uses is a short one.
All places are in pixels from the upper left corner of the whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from effnlp_lessons.widgets.style import BLACK, BLUE, GREY, ORANGE, SKY, VERMILION

FARTHEST = 8  # the moved weight goes from -8 to 8 times the largest
LEFT, WIDTH, MARGIN = 84, 800, 0.4  # of the long axis; the margin is in multiples of the largest weight
AREA = [LEFT, 52, WIDTH, 124]  # takes the pointer: left, top, width, height
LOOK = {"held": VERMILION, "elsewhere": BLUE}
NAMES = {"held": "its grid", "elsewhere": "elsewhere"}
PANELS = {"held": 236, "elsewhere": 388}  # top of the axes
PANEL_HEIGHT = 100
BARS = {"matrix": "whole matrix", "rest": "rest of its block", "others": "other blocks"}
MOST_DECIBELS = 60
FILL, BEYOND = "#C4C4C4", 0.22  # of histograms; how strong the shade beyond a grid is


def multiple_at(x: float) -> float:
    """The place on the long axis, in multiples of the largest weight, at this pixel."""
    return (x - LEFT) / WIDTH * 2 * (FARTHEST + MARGIN) - (FARTHEST + MARGIN)


def pixel_of(multiple: float) -> float:
    """The inverse of `multiple_at`."""
    return LEFT + WIDTH * (multiple + FARTHEST + MARGIN) / (2 * (FARTHEST + MARGIN))


class QuantizationGridPicture:
    """The artists of the picture. `numbers` are those of `QuantizationGridExplorer.numbers`."""

    def draw_static(self, figure: Figure, numbers: dict[str, Any], weights: Tensor) -> list[Artist]:
        figure.set_layout_engine("none")
        self._width, self._height = figure.canvas.get_width_height()
        (rows, columns), (row, column) = numbers["shape"], numbers["weight"]
        name = f"{numbers['matrix'].capitalize()}, {rows:,} x {columns:,}"
        title = f"{name}. The weight that moves: row {row}, input {column}"
        self._write(figure, 12, 6, title, weight="bold", fontsize=11)
        self._words = {"weight": self._write(figure, 12, 29, fontsize=10)}
        moving = [self._words["weight"], *self._draw_axis(figure, numbers, weights)]
        self._all, self._counts = weights.numpy(), None  # of the whole matrix
        self._panels: dict[str, dict[str, Any]] = {}
        for part in LOOK:
            moving += self._draw_panel(figure, part, numbers["spread"])
        moving += self._draw_bars(figure, numbers["float_bytes"])
        self._draw_legend(figure)
        return moving

    def _write(self, figure: Figure, x: float, y: float, words: str = "", **style: Any) -> Artist:
        """Words at a place in pixels."""
        style = {"va": "top", "parse_math": False, **style}
        return figure.text(x / self._width, 1 - y / self._height, words, **style)

    def _axes(self, figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
        w, h = self._width, self._height
        return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))

    def _draw_axis(self, figure: Figure, numbers: dict[str, Any], weights: Tensor) -> list[Artist]:
        """The long axis: all weights (counts on a log scale), below them a lane of levels for each grid."""
        reach = (FARTHEST + MARGIN) * numbers["largest"]
        above, below = (self._axes(figure, LEFT, top, WIDTH, height) for top, height in ((56, 72), (132, 40)))
        counts, edges = np.histogram(weights.numpy(), bins=168, range=(-reach, reach))
        above.stairs(np.maximum(counts, 0.3), edges, baseline=0.3, fill=True, color=FILL)
        above.set(xlim=(-reach, reach), yscale="log", ylim=(0.3, 8 * counts.max()), xticks=[])
        decades = 10.0 ** np.arange(0, math.ceil(math.log10(counts.max())) + 1, 2)
        above.set_yticks(decades, [f"{count:,.0f}" for count in decades])
        above.minorticks_off()
        above.grid(False)
        below.set(xlim=(-reach, reach), ylim=(2, 0), yticks=[])
        below.set_yticks((0.5, 1.5), NAMES.values())
        below.tick_params(axis="y", length=0)
        below.spines[["left", "bottom"]].set_visible(False)
        below.grid(False, axis="y")
        below.xaxis.set_major_locator(MaxNLocator(9))
        words = "number of weights, log scale"
        above.text(0.008, 0.97, words, transform=above.transAxes, va="top", fontsize=9, color=GREY)
        for axes in (above, below):
            axes.axvspan(-numbers["spread"], numbers["spread"], color=SKY, alpha=0.22, linewidth=0)
        above.annotate(
            "shown below", (numbers["spread"], 0.86), (10, 0), xycoords=above.get_xaxis_transform(),
            textcoords="offset points", fontsize=9, color=GREY, va="center",
        )  # fmt: skip
        self._lanes = {
            part: below.add_collection(LineCollection([], colors=color), autolim=False) for part, color in LOOK.items()
        }
        transform = above.get_xaxis_transform()
        self._stem = above.plot([0, 0], [0, 0.55], color=BLACK, linewidth=1.6, transform=transform)[0]
        self._handle = above.plot(
            [0], [0.55], "o", color=VERMILION, markeredgecolor=BLACK, markersize=13, transform=transform
        )[0]
        return [*self._lanes.values(), self._stem, self._handle]

    def _draw_panel(self, figure: Figure, part: str, spread: float) -> list[Artist]:
        """The histogram of the weights of one grid, close to 0, with its levels."""
        top, last = PANELS[part], part == "elsewhere"
        axes = self._axes(figure, LEFT, top, 480, PANEL_HEIGHT)
        axes.set(xlim=(-spread, spread), ylim=(0, 1.12), yticks=[])
        axes.grid(False)
        axes.tick_params(labelbottom=last)
        if last:
            axes.set_xlabel("weight", fontsize=9)
        axes.set_ylabel(NAMES[part], fontsize=10, weight="bold", color=LOOK[part], labelpad=8)
        transform = axes.get_xaxis_transform()
        self._words[part] = self._write(figure, LEFT, top - 20, fontsize=9.5)
        self._panels[part] = {
            "bars": axes.stairs([0], [-spread, spread], baseline=0, fill=True, color=FILL),
            "outline": axes.stairs([0], [-spread, spread], baseline=0, color=BLACK, linewidth=0.9),
            "beyond": [axes.axvspan(0, 0, color=ORANGE, alpha=BEYOND, linewidth=0) for _ in range(2)],
            "unused": axes.add_collection(LineCollection([], colors=GREY, transform=transform), autolim=False),
            "used": axes.add_collection(LineCollection([], colors=LOOK[part], transform=transform), autolim=False),
        }
        bars, outline, beyond, *lines = self._panels[part].values()
        return [bars, *beyond, *lines, outline, self._words[part]]

    def _draw_bars(self, figure: Figure, float_bytes: int) -> list[Artist]:
        """Right: signal to noise, the two kinds of error, bytes."""
        left, width = 604, 280
        for top, words in ((215, "Signal to noise (dB)"), (347, "Squared error of the matrix"), (434, "Bytes")):
            self._write(figure, left, top, words, weight="bold", fontsize=9.5)
        ratios = self._axes(figure, left + 106, 236, width - 106, 84)
        ratios.set(xlim=(0, MOST_DECIBELS), ylim=(2.6, -0.6), xticks=range(0, MOST_DECIBELS + 1, 20))
        ratios.set_yticks(range(len(BARS)), BARS.values())
        ratios.tick_params(axis="y", length=0)
        ratios.grid(False, axis="y")
        self._ratios = list(ratios.barh(range(len(BARS)), 0, color=[BLACK, VERMILION, BLUE], height=0.55))
        self._amounts = [ratios.text(0, place, "", va="center_baseline", fontsize=9) for place in range(len(BARS))]
        parts = self._axes(figure, left, 368, width, 16)
        parts.set(xlim=(0, 1), ylim=(-0.5, 0.5))
        parts.axis("off")
        self._parts = [
            parts.barh(0, 0, color=color, height=1, hatch=hatch, edgecolor="white", linewidth=0)[0]
            for color, hatch in ((GREY, ""), (ORANGE, "///"))
        ]
        # words stay and only their numbers move: drawing letters takes most of the time of an event
        right = left + width
        for name, x, number, y, color in (
            ("rounding", left, left + 63, 398, BLACK),
            ("clipping", right, right - 56, 398, BLACK),
            ("weights clipped", right, right - 107, 415, GREY),
        ):
            style = {"va": "baseline", "fontsize": 9, "color": color}
            self._write(figure, x, y, name, ha="left" if x == left else "right", **style)
            self._words[name] = self._write(figure, number, y, ha="left" if x == left else "right", **style)
        sizes = self._axes(figure, left + 58, 454, width - 58, 58)
        sizes.set(xlim=(0, 1.42), ylim=(2.5, -0.5), xticks=[])
        sizes.set_yticks((0, 1, 2), ("float32", "stored", "of it grids"))
        sizes.tick_params(axis="y", length=0)
        sizes.spines["bottom"].set_visible(False)
        sizes.grid(False)
        sizes.barh(0, 1, color=FILL, height=0.62)
        sizes.text(1.03, 0, f"{float_bytes:,}", va="center_baseline", fontsize=9)
        self._sizes = list(sizes.barh((1, 2), 0, color=[BLACK, GREY], height=0.62))
        self._bytes = [sizes.text(0, place, "", va="center_baseline", fontsize=9) for place in (1, 2)]
        words = [self._words[name] for name in ("rounding", "clipping", "weights clipped")]
        return [*self._ratios, *self._amounts, *self._parts, *self._sizes, *self._bytes, *words]

    def _draw_legend(self, figure: Figure) -> None:
        axes = self._axes(figure, 0, 526, self._width, 22)
        axes.set(xlim=(0, self._width), ylim=(22, 0))
        axes.axis("off")
        axes.vlines((LEFT + 2, LEFT + 7), 3, 19, colors=list(LOOK.values()), linewidth=1.5)
        axes.vlines(LEFT + 112, 12, 19, colors=GREY, linewidth=1.5)
        axes.fill_between((LEFT + 268, LEFT + 286), 4, 19, color=ORANGE, alpha=BEYOND, linewidth=0)
        for x, words in ((13, "level in use"), (118, "level without weight"), (292, "beyond the grid: clipped")):
            axes.text(LEFT + x, 12, words, va="center_baseline", fontsize=9)
        hint = "Drag the round weight. By keyboard: arrows\nmove it, space puts it back."
        self._write(figure, 604, 518, hint, fontsize=9, color=GREY, linespacing=1.2)

    # ------------------------------------------------------------------------ what moves

    def draw(self, numbers: dict[str, Any], words: Mapping[str, str]) -> None:
        """Show the numbers, and words for "weight", "held" and "elsewhere"."""
        for name, text in words.items():
            self._words[name].set_text(text)
        self._stem.set_xdata([numbers["value"]] * 2)
        self._handle.set_xdata([numbers["value"]])
        for place, (part, lane) in enumerate(self._lanes.items()):
            grid = numbers[part]
            lane.set_segments(_lines(grid["levels"], place + 0.15, place + 0.85))
            lane.set_linewidth(_line_width(grid["scale"] * WIDTH / (2 * (FARTHEST + MARGIN) * numbers["largest"])))
            self._show_panel(part, grid, numbers)
        self._show_bars(numbers)

    def _show_panel(self, part: str, grid: dict[str, Any], numbers: dict[str, Any]) -> None:
        panel, spread, levels, used = self._panels[part], numbers["spread"], grid["levels"], grid["used"]
        counts, edges = self._histogram(grid["weights"], spread)
        for stairs in (panel["bars"], panel["outline"]):
            stairs.set_data(counts / max(counts.max(), 1), edges)
        half = grid["scale"] / 2
        ends = levels[0] - half, levels[-1] + half  # beyond these the clamp changes the code
        for span, start, end in zip(panel["beyond"], (-spread, ends[1]), (ends[0], spread), strict=True):
            span.set(x=start, width=max(end - start, 0))
        width = _line_width(grid["scale"] * 480 / (2 * spread))
        shown = abs(levels) <= spread
        panel["used"].set(segments=_lines(levels[shown & used], 0, 0.93), linewidth=width)
        panel["unused"].set(segments=_lines(levels[shown & ~used], 0, 0.3), linewidth=width)

    def _histogram(self, weights: np.ndarray, spread: float) -> tuple[np.ndarray, np.ndarray]:
        """Counts and edges; of the whole matrix those as trained, where one weight more or less is not seen."""
        if weights.size == self._all.size:
            weights = self._all
            if self._counts is not None:
                return self._counts
        bins = 101 if weights.size > 2_000 else 41 if weights.size > 200 else 25
        counts = np.histogram(weights, bins=bins, range=(-spread, spread))
        if weights is self._all:
            self._counts = counts
        return counts

    def _show_bars(self, numbers: dict[str, Any]) -> None:
        for name, bar, amount in zip(BARS, self._ratios, self._amounts, strict=True):
            ratio = numbers["sqnr"][name]
            length = 0 if ratio is None else min(max(ratio, 0), MOST_DECIBELS)
            bar.set_width(length)
            text = "none: one block" if ratio is None else "exact" if ratio == math.inf else f"{max(ratio, 0):.1f}"
            inside = length > 0.75 * MOST_DECIBELS
            amount.set(text=text, x=length + (-1.5 if inside else 1.5), ha="right" if inside else "left")
            amount.set_color("white" if inside else BLACK)
        error = numbers["mse"]
        rounding, clipping = (numbers[kind] / error if error else 0.0 for kind in ("rounding", "clipping"))
        self._parts[0].set_width(rounding)
        self._parts[1].set(x=rounding, width=clipping)
        self._words["rounding"].set_text(f"{100 * rounding:.1f} %")
        self._words["clipping"].set_text(f"{100 * clipping:.1f} %")
        self._words["weights clipped"].set_text(f"{numbers['clipped']:,}")
        ratio = numbers["float_bytes"] / numbers["bytes"]
        texts = f"{numbers['bytes']:,} ({ratio:.1f} x smaller)", f"{numbers['grid_bytes']:,}"
        for name, bar, amount, text in zip(("bytes", "grid_bytes"), self._sizes, self._bytes, texts, strict=True):
            share = numbers[name] / numbers["float_bytes"]
            bar.set_width(share)
            amount.set(text=text, x=share + 0.03)


def _lines(places: np.ndarray, low: float, high: float) -> np.ndarray:
    """Upright lines (lines, 2 ends, 2 coordinates)."""
    ends = np.empty((len(places), 2, 2))
    ends[:, :, 0], ends[:, 0, 1], ends[:, 1, 1] = places[:, None], low, high
    return ends


def _line_width(gap: float) -> float:
    """The width of lines that stand `gap` pixels apart: thinner where they are close."""
    return min(max(0.35 * gap, 0.35), 1.8)
