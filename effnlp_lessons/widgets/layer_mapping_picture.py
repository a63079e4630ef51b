"""The picture of `layer_mapping_explorer`: lines from student to teacher layers, beside them the recorded scores.

Each measure has two panels: the seeds of every mapping in the order of their means, and the means against the training
loss. All dots stay, in grey; over them the mapping that is shown, blue, and its near ties, pale blue, move. All places
are in pixels from the upper left corner of the whole picture, so that a place of the picture is a place of a line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from effnlp_lessons.widgets.style import BLACK, BLUE, GREY, SKY, VERMILION

Layers = tuple[int, ...]  # g(1), g(2), g(3)
Standing = dict[str, Any]  # where a mapping stands in one measure, as `layer_mapping_explorer.standings` gives it
Table = Mapping[Layers, Standing]

STUDENT_LAYERS, TEACHER_LAYERS = 3, 6
MEASURES = {"agreement": "agreement with the teacher", "accuracy": "accuracy from 1,500 labels"}  # per cent
LOSS = "loss"  # of training, at the end

# the layers; layer 1 is at the bottom
STUDENT_LEFT, TEACHER_LEFT, BOX_WIDTH, BOX_HEIGHT = 12, 216, 100, 38
TOP_ROW, ROW = 96, 56  # middle of the teacher's last layer, and the way from layer to layer
AREA = [4, 62, 320, 350]  # takes the pointer: left, top, width, height
FAINT = "#A6A6A6"  # dots of mappings that are not chosen


def student_row(layer: int) -> float:
    """Middle of a student layer's box, in pixels from above."""
    return TOP_ROW + ROW * (TEACHER_LAYERS - 2 * layer + 0.5)


def teacher_row(layer: float) -> float:
    """Middle of a teacher layer's box, in pixels from above."""
    return TOP_ROW + ROW * (TEACHER_LAYERS - layer)


def teacher_layer_at(y: float) -> int:
    """The teacher layer whose row is nearest to this height; outside of the column below 1 or above the last."""
    return TEACHER_LAYERS - round((y - TOP_ROW) / ROW)


class LayerMappingPicture:
    """The artists of the picture. `numbers` are those of `LayerMappingExplorer.numbers`.

    Args:
        standings: the table of each measure and of the loss.
        lowest: the mapping of the lowest loss.
    """

    def __init__(self, standings: Mapping[str, Table], lowest: Layers) -> None:
        self._standings, self._lowest = standings, lowest

    def draw_static(self, figure: Figure) -> list[Artist]:
        figure.set_layout_engine("none")
        self._width, self._height = figure.canvas.get_width_height()
        moving = self._draw_layers(figure)
        self._panels: dict[str, dict[str, Any]] = {}
        for top, name in ((52, "agreement"), (274, "accuracy")):
            moving += self._draw_panel(figure, top, name, last=name == "accuracy")
        self._loss = self._write(figure, 768, 450, ha="center", fontsize=9)
        self._draw_legend(figure)
        return [*moving, self._loss]

    def _write(self, figure: Figure, x: float, y: float, words: str = "", **style: Any) -> Artist:
        """Words at a place in pixels."""
        style = {"va": "top", "parse_math": False, **style}
        return figure.text(x / self._width, 1 - y / self._height, words, **style)

    def _axes(self, figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
        w, h = self._width, self._height
        return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))

    def _draw_layers(self, figure: Figure) -> list[Artist]:
        axes = self._axes(figure, 0, 0, self._width, self._height)  # over all, in pixels
        axes.set(xlim=(0, self._width), ylim=(self._height, 0))
        axes.axis("off")

        students = range(1, STUDENT_LAYERS + 1)
        learning = {"facecolor": (*to_rgb(BLUE), 0.14), "edgecolor": BLUE}

        def box(left: float, middle: float, look: dict[str, Any]) -> Artist:
            corner, size = (left + 3, middle - BOX_HEIGHT / 2 + 3), (BOX_WIDTH - 6, BOX_HEIGHT - 6)
            return axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=3", **look))

        def write(left: float, middle: float, words: str, **style: Any) -> None:
            axes.text(left + BOX_WIDTH / 2, middle, words, ha="center", va="center", **style)

        for left, name in ((STUDENT_LEFT, "student"), (TEACHER_LEFT, "teacher")):
            write(left, 52, name, weight="bold")
        for m in students:
            box(STUDENT_LEFT, student_row(m), learning)
            write(STUDENT_LEFT, student_row(m), f"layer {m}")
        self._teacher = {}
        for n in range(1, TEACHER_LAYERS + 1):
            box(TEACHER_LEFT, teacher_row(n), {"facecolor": "white", "edgecolor": GREY})
            write(TEACHER_LEFT, teacher_row(n), f"layer {n}")
            self._teacher[n] = box(TEACHER_LEFT, teacher_row(n), learning)
        self._lines = [axes.plot([], [], color=BLUE, solid_capstyle="round")[0] for _ in students]
        self._ends = [axes.plot([], [], "o", markeredgecolor="white", markersize=13)[0] for _ in students]
        self._title = self._write(figure, 12, 6, weight="bold", fontsize=11)
        self._note = self._write(figure, 12, 416, color=VERMILION, fontsize=9, linespacing=1.4)
        hint = "Drag a line's end. By keyboard: left, right\nchoose a student layer; up, down move its line."
        self._write(figure, 12, 460, hint, color=GREY, fontsize=9, linespacing=1.4)
        return [*self._teacher.values(), *self._lines, *self._ends, self._title, self._note]

    def _draw_panel(self, figure: Figure, top: float, name: str, last: bool) -> list[Artist]:
        """One measure: the seeds of every mapping in the order of their means, and the means against the loss."""
        table, losses = self._standings[name], self._standings[LOSS]
        self._write(figure, 372, top - 46, MEASURES[name].capitalize(), weight="bold", fontsize=11)
        heading = self._write(figure, 886, top - 46, weight="bold", fontsize=11, ha="right")
        spread = self._write(figure, 372, top - 25, color=GREY, fontsize=9)
        strip, cloud = (self._axes(figure, left, top, width, 150) for left, width in ((372, 250), (650, 236)))
        for axes in (strip, cloud):
            axes.set_ylim(_limits(table))
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
            axes.tick_params(labelbottom=last)

        order = sorted(table, key=lambda g: -table[g]["mean"])
        strip.set(xlim=(0.3, len(order) + 0.7), xticks=(1, 5, 10, 15, 20))
        strip.grid(False, axis="x")
        if last:
            strip.set_xlabel(f"place among the {len(order)} mappings", fontsize=9)
        for place, g in enumerate(order, 1):
            seeds = table[g]["seeds"]
            strip.vlines(place, table[g]["low"], table[g]["high"], color=FAINT, linewidth=0.8)
            strip.plot([place] * len(seeds), seeds, "o", color=FAINT, markersize=3.2)
            strip.plot(place, table[g]["mean"], "_", color=GREY, markersize=7, markeredgewidth=1.4)

        cloud.set_xlim(_limits(losses))
        cloud.xaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
        cloud.tick_params(labelleft=False)
        cloud.plot(*_means(losses, table, list(table)), "o", color=FAINT, markersize=4.5)
        cloud.plot(*_means(losses, table, [self._lowest]), "D", color="none", markeredgecolor=VERMILION, markersize=12)
        moving = {
            "heading": heading,
            "spread": spread,
            "band": strip.axhspan(0, 1, color=BLUE, alpha=0.12, linewidth=0),
            "tied seeds": strip.plot([], [], "o", color=SKY, markersize=4)[0],
            "range": strip.vlines(1, 0, 1, color=BLUE, linewidth=1.6),
            "mean": strip.plot([], [], "_", color=BLACK, markersize=16, markeredgewidth=2)[0],
            "seeds": strip.plot([], [], "o", color=BLUE, markeredgecolor="white", markersize=6)[0],
            "tied means": cloud.plot([], [], "o", color=SKY, markersize=4.5)[0],
            "ranges": cloud.plot([], [], color=BLUE, linewidth=1.2)[0],
            "means": cloud.plot([], [], "o", color=BLUE, markeredgecolor="white", markersize=8.5)[0],
        }
        self._panels[name] = {"place": {g: place for place, g in enumerate(order, 1)}, **moving}
        return list(moving.values())

    def _draw_legend(self, figure: Figure) -> None:
        axes = self._axes(figure, 0, 472, self._width, 28)
        axes.set(xlim=(0, self._width), ylim=(28, 0))
        axes.axis("off")
        looks = (
            (380, "this mapping", {"color": BLUE, "marker": "o", "markersize": 7}),
            (492, "near tie: seeds overlap", {"color": SKY, "marker": "o", "markersize": 5}),
            (665, "other", {"color": FAINT, "marker": "o", "markersize": 4}),
            (730, "lowest loss of all", {"color": "none", "marker": "D", "markeredgecolor": VERMILION}),
        )
        for x, words, look in looks:
            axes.plot(x, 16, linestyle="none", **look)
            axes.text(x + 11, 16, words, va="center_baseline", fontsize=9)

    def draw(self, numbers: dict[str, Any], title: str, loss: str, scores: Mapping[str, tuple[str, str]]) -> None:
        """Show the numbers under these words: `scores` are, by measure, the heading of its panel and the line below."""
        mapping = numbers["mapping"]
        self._title.set_text(title)
        self._note.set_text(numbers["message"].replace(": ", ":\n"))
        for n, box in self._teacher.items():
            box.set_visible(n in mapping)
        for m, (g, line, end) in enumerate(zip(mapping, self._lines, self._ends, strict=True), 1):
            chosen = m == numbers["layer"]
            line.set_data((STUDENT_LEFT + BOX_WIDTH, TEACHER_LEFT), (student_row(m), teacher_row(g)))
            line.set(linewidth=4 if chosen else 2, color=BLACK if chosen else BLUE)
            end.set_data([TEACHER_LEFT], [teacher_row(g)])
            end.set_color(BLACK if chosen else BLUE)
            end.set_markeredgecolor("white")
        self._loss.set_text(loss)
        for name, (heading, spread) in scores.items():
            self._panels[name]["heading"].set_text(heading)
            self._panels[name]["spread"].set_text(spread)
            self._draw_scores(name, mapping, numbers[name], numbers[LOSS])

    def _draw_scores(self, name: str, mapping: Layers, own: Standing, loss: Standing) -> None:
        """Put one measure's standing of this mapping into its panel."""
        panel, table, ties = self._panels[name], self._standings[name], own["near_ties"]
        place, seeds = panel["place"][mapping], own["seeds"]
        panel["band"].set(y=own["low"], height=own["high"] - own["low"])
        tied = [(panel["place"][g], seed) for g in ties for seed in table[g]["seeds"]]
        panel["tied seeds"].set_data([x for x, _ in tied], [y for _, y in tied])
        panel["range"].set_segments([[(place, own["low"]), (place, own["high"])]])
        panel["mean"].set_data([place], [own["mean"]])
        panel["seeds"].set_data([place] * len(seeds), seeds)
        panel["tied means"].set_data(*_means(self._standings[LOSS], table, ties))
        gap = math.nan  # between the two bars of the cross
        panel["ranges"].set_data(
            (loss["low"], loss["high"], gap, loss["mean"], loss["mean"]),
            (own["mean"], own["mean"], gap, own["low"], own["high"]),
        )
        panel["means"].set_data([loss["mean"]], [own["mean"]])


def _limits(table: Table) -> tuple[float, float]:
    """All seeds, with a margin."""
    low, high = min(own["low"] for own in table.values()), max(own["high"] for own in table.values())
    margin = 0.1 * (high - low) or 1.0
    return low - margin, high + margin


def _means(losses: Table, table: Table, mappings: Sequence[Layers]) -> tuple[list[float], list[float]]:
    return [losses[g]["mean"] for g in mappings], [table[g]["mean"] for g in mappings]
