"""The picture of `movement_explorer`: every weight before and after, and the accuracy of what is kept.

Left a point for each weight: from left to right its value before fine-tuning, upright its value after, or its score.
The colour says which criterion keeps it. Right above the accuracy against the share left; right below what is counted
among the points. Places are in pixels of the whole picture from its upper left corner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from effnlp_lessons.studies.movement import HARD, LEVELS, MAGNITUDE, METHODS, SOFT
from effnlp_lessons.widgets.style import BLACK, BLUE, GREEN, GREY, VERMILION

POINTS = (84, 56, 382, 372)  # left, top, width, height of the points
CHART = (556, 56, 322, 190)  # of the accuracy
TABLE = (512, 330)  # left, top of what is counted
ROW = 21
LOOK = {MAGNITUDE: (VERMILION, "s", "--"), HARD: (BLUE, "o", "-"), SOFT: (GREEN, "^", ":")}
NAMES = {MAGNITUDE: "magnitude", HARD: "movement, hard", SOFT: "movement, soft"}
NEITHER, ONLY_MAGNITUDE, ONLY_MOVEMENT, BOTH = "neither", "only magnitude", "only movement", "both"
# lowest first: the few that are kept lie above the many that are not
GROUPS = {NEITHER: ("#BDBDBD", ".", 2.5), ONLY_MAGNITUDE: (VERMILION, "s", 3.2), ONLY_MOVEMENT: (BLUE, "o", 3.4),
          BOTH: (BLACK, "D", 3.4)}  # fmt: skip
WIDEST, NARROWEST = 100.0, 0.9  # per cent, the ends of the chart


def x_of(left: float) -> float:
    """Where a share (per cent) lies in the chart, from 0 at the widest to 1 at the narrowest, on a log scale."""
    return float(np.log(WIDEST / left) / np.log(WIDEST / NARROWEST))


class MovementPicture:
    """The artists of the picture. `numbers` are those of `MovementExplorer.numbers`."""

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        figure.set_layout_engine("none")
        self._width, self._height = figure.canvas.get_width_height()
        self._draw_points(self._axes(figure, *POINTS), numbers)
        self._draw_chart(self._axes(figure, *CHART), numbers)
        self._title = self._write(figure, 12, 8, weight="bold", fontsize=11)
        self._kept = self._write(figure, 12, 30, fontsize=9.5)
        self._write(figure, CHART[0] - 46, 8, "Test sentences right", weight="bold", fontsize=11)
        return [*self._groups.values(), *self._limits, self._here, *self._dots.values(), self._title, self._kept,
                *self._draw_table(figure)]  # fmt: skip

    def _write(self, figure: Figure, x: float, y: float, words: str = "", **style: Any) -> Artist:
        """Words at a place in pixels."""
        return figure.text(x / self._width, 1 - y / self._height, words, **{"va": "top", "parse_math": False, **style})

    def _axes(self, figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
        w, h = self._width, self._height
        return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))

    def _draw_points(self, axes: Axes, numbers: dict[str, Any]) -> None:
        wide, (low, high) = numbers["bounds"]
        axes.set(xlim=(-wide, wide), ylim=(low, high), xlabel="weight before fine-tuning", ylabel=numbers["upright"])
        axes.yaxis.labelpad = 2
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 4, 5, 10)))
        if numbers["what"] in ("magnitude", "movement"):
            axes.plot([-wide, wide], [-wide, wide], color=GREY, linewidth=1, linestyle=":")  # has not moved
        else:
            axes.axhline(0, color=GREY, linewidth=1)
        if numbers["what"] == "change":
            for x, y, side in (
                (0.98, 0.97, "right"),
                (0.02, 0.03, "left"),
                (0.02, 0.97, "left"),
                (0.98, 0.03, "right"),
            ):
                words = "away from zero" if (x > 0.5) == (y > 0.5) else "towards zero"
                place = {"ha": side, "va": "center", "transform": axes.transAxes}
                axes.text(x, y, words, color=GREY, fontsize=9, **place)
        axes.axvline(0, color=GREY, linewidth=1)
        look = {"linestyle": "none", "markeredgecolor": "none"}
        self._groups = {
            name: axes.plot([], [], marker=mark, color=colour, markersize=size, **look)[0]
            for name, (colour, mark, size) in GROUPS.items()
        }
        self._limits = [axes.axhline(0, color=BLACK, linewidth=1, linestyle="--") for _ in range(2)]

    def _draw_chart(self, axes: Axes, numbers: dict[str, Any]) -> None:
        axes.set(xlim=(0, 1), xlabel="weights left (%), as counted", ylabel="per cent")
        shown = (100, *LEVELS, 1)
        axes.xaxis.set(major_locator=FixedLocator([x_of(share) for share in shown]), minor_locator=NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda _, place: str(shown[place]) if place is not None else ""))
        for method, (colour, mark, line) in LOOK.items():
            along = numbers["along"][method]
            x, mean = [x_of(value["left"]) for value in along.values()], [value["mean"] for value in along.values()]
            axes.plot(x, mean, line, color=colour, marker=mark, markersize=4, linewidth=1.6, label=NAMES[method])
            # a bar from the lowest to the highest seed, where there are several
            axes.vlines(x, [v["lowest"] for v in along.values()], [v["highest"] for v in along.values()], color=colour)
        axes.axhline(numbers["dense"]["mean"], color=GREY, linewidth=1)
        axes.margins(y=0.08)
        axes.set_ylim(axes.get_ylim())
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        place = {"loc": "lower left", "bbox_to_anchor": (-0.16, 1.0), "borderaxespad": 0.2}
        axes.legend(ncols=3, fontsize=8.5, columnspacing=1.0, handletextpad=0.4, **place)
        self._here = axes.vlines(0, *axes.get_ylim(), color=BLACK, linewidth=1.2)
        look = {"linestyle": "none", "markeredgecolor": "white", "markersize": 10, "clip_on": False}
        self._dots = {
            method: axes.plot([], [], marker=mark, color=colour, **look)[0]
            for method, (colour, mark, _) in LOOK.items()
        }

    def _draw_table(self, figure: Figure) -> list[Artist]:
        """The key to the colours, with what is counted: what stays is drawn here, what moves is returned."""
        left, top = TABLE
        moving = []
        columns = (left + 22, left + 216, left + 352)
        for x, words in zip(columns[1:], ("of the points", "mean |before|"), strict=True):
            self._write(figure, x, top - ROW, words, fontsize=9, color=GREY, ha="right")
        self._counts, self._sizes = {}, {}
        for row, name in enumerate(reversed(GROUPS)):
            colour, mark, size = GROUPS[name]
            y = top + row * ROW
            place = {"transform": None, "marker": mark, "linestyle": "none", "markeredgecolor": "none"}
            figure.add_artist(Line2D([left + 9], [self._height - y - 7], color=colour, markersize=size + 3, **place))
            self._write(figure, columns[0], y, name if name == NEITHER else f"kept by {name}", fontsize=9.5)
            self._counts[name] = self._write(figure, columns[1], y, fontsize=9.5, ha="right")
            self._sizes[name] = self._write(figure, columns[2], y, fontsize=9.5, ha="right")
            moving += [self._counts[name], self._sizes[name]]
        self._chance = self._write(figure, left, top + 4 * ROW + 4, fontsize=9.5)
        return [*moving, self._chance]

    # ------------------------------------------------------------------------ what moves

    def draw(self, numbers: dict[str, Any], words: Mapping[str, str]) -> None:
        """Show the numbers under these words: "title", "kept", "chance"."""
        for artist, name in ((self._title, "title"), (self._kept, "kept"), (self._chance, "chance")):
            artist.set_text(words[name])
        for name, group in self._groups.items():
            members = numbers["groups"][name]
            group.set_data(numbers["before"][members], numbers["height"][members])
            self._counts[name].set_text(f"{numbers['counts'][name]:,}")
            size = numbers["mean size"][name]
            self._sizes[name].set_text("–" if size is None else f"{size:.3f}")
        for place, line in enumerate(self._limits):
            line.set_visible(place < len(numbers["limits"]))
            if line.get_visible():
                line.set_ydata([numbers["limits"][place]] * 2)
        bottom, top = self._here.axes.get_ylim()
        x = x_of(numbers["level"])
        self._here.set_segments([[(x, bottom), (x, top)]])
        for method in METHODS:
            value = numbers["right"][method]
            self._dots[method].set_data([x_of(value["left"])], [value["mean"]])
