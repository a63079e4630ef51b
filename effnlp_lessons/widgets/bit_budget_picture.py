"""The picture of `bit_budget_explorer`: six layers as stacks of bits, the bytes, and the accuracies of all choices.

Left the layers, each a stack of two or three cells, with the gauge of bytes below; between them, when the student asks,
the sensitivity of each layer. Right the 20 choices of equal size in the order of their accuracy, and all 64 against
their bytes. All places are in pixels from the upper left corner of the whole picture, so that a place of the picture is
a place of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from effnlp_lessons.studies.bit_budget import HIGH, LAYERS, LOW, Bits
from effnlp_lessons.widgets.style import BLACK, BLUE, GREEN, GREY, ORANGE, SKY, VERMILION

LEFT, COLUMN, WIDTH = 22, 52, 40  # the first layer's left edge, the way from layer to layer, width of a stack
BOTTOM, CELL = 178, 34  # lower edge of the stacks, height of a bit
AREA = [10, 46, LAYERS * COLUMN + 12, 168]  # takes the pointer: left, top, width, height
OMEGA_BOTTOM, OMEGA_HEIGHT = 330, 74  # where the bars of the sensitivities stand
GAUGE = (22, 392, 300, 18)  # left, top, width, height
FAINT = "#A6A6A6"  # dots of choices that are not shown


def column(layer: int) -> float:
    """Left edge of a layer's stack, layers from 1, in pixels."""
    return LEFT + COLUMN * (layer - 1)


def middle(layer: int) -> float:
    """Middle of a layer's stack from the left, in pixels."""
    return column(layer) + WIDTH / 2


def cell_top(bit: int) -> float:
    """Upper edge of the cell of a bit, bits from 1, in pixels from above."""
    return BOTTOM - CELL * bit


def layer_at(x: float, y: float) -> int | None:
    """The layer whose column holds this place; None outside of the area."""
    left, top, width, height = AREA
    if not (left <= x < left + width and top <= y < top + height):
        return None
    return min(max(math.floor((x - LEFT + (COLUMN - WIDTH) / 2) / COLUMN) + 1, 1), LAYERS)


def in_three_digits(value: float) -> str:
    """45.12 -> '45.1', 3 -> '3.00', 1234.5 -> '1,234'."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


class BitBudgetPicture:
    """The artists of the picture. `numbers` are those of `BitBudgetExplorer.numbers`.

    Args:
        accuracy: per cent of every choice.
        bytes_of: bytes of every choice.
        equal: the choices of equal size, that of the budget, best first.
        budget: bytes.
        omega: sensitivity of every layer.
        chosen, reverse: the Hessian's choice, and the one that gives more bits to the least sensitive.
    """

    def __init__(
        self,
        accuracy: Mapping[Bits, float],
        bytes_of: Mapping[Bits, int],
        equal: Sequence[Bits],
        budget: int,
        omega: Sequence[float],
        chosen: Bits,
        reverse: Bits,
    ) -> None:
        self._accuracy, self._bytes, self._equal, self._budget = accuracy, bytes_of, equal, budget
        self._omega, self._chosen, self._reverse = omega, chosen, reverse
        self._place = {bits: place for place, bits in enumerate(equal, 1)}

    # ------------------------------------------------------------------------ what stays

    def draw_static(self, figure: Figure) -> list[Artist]:
        figure.set_layout_engine("none")
        self._width, self._height = figure.canvas.get_width_height()
        page = self._axes(figure, 0, 0, self._width, self._height)  # over all, in pixels
        page.set(xlim=(0, self._width), ylim=(self._height, 0))
        page.axis("off")
        self._sensitivity: list[Artist] = []  # what is seen only when it is asked for
        moving = self._draw_layers(page) + self._draw_gauge(page) + self._draw_plots(figure)
        self._draw_sensitivities(page)
        self._title = self._write(figure, 12, 8, weight="bold", fontsize=11)
        self._heading = self._write(figure, 886, 8, weight="bold", fontsize=11, ha="right")
        self._spread = self._write(figure, 886, 28, color=GREY, fontsize=9, ha="right")
        self._write(figure, 372, 8, "Accuracy", weight="bold", fontsize=11)
        hint = "Click a layer. By keyboard: left, right choose\na layer; up, down or space change its bits."
        self._write(figure, 22, 458, hint, color=GREY, fontsize=9, linespacing=1.4)
        self._draw_legend(figure)
        return [*moving, *self._sensitivity, self._title, self._heading, self._spread]

    def _write(self, figure: Figure, x: float, y: float, words: str = "", **style: Any) -> Artist:
        """Words at a place in pixels."""
        return figure.text(x / self._width, 1 - y / self._height, words, **{"va": "top", "parse_math": False, **style})

    def _axes(self, figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
        w, h = self._width, self._height
        return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))

    def _draw_layers(self, page: Axes) -> list[Artist]:
        self._cells, self._words, self._frames = {}, {}, {}
        for layer in range(1, LAYERS + 1):
            x = column(layer)
            for bit in range(1, HIGH + 1):
                corner, size = (x, cell_top(bit) + 2), (WIDTH, CELL - 4)
                if bit > LOW:
                    page.add_patch(Rectangle(corner, *size, facecolor="none", edgecolor=GREY, linestyle=":"))
                    self._cells[layer] = page.add_patch(Rectangle(corner, *size, facecolor=BLUE, edgecolor=BLUE))
                else:
                    look = {"facecolor": (*to_rgb(BLUE), 0.35), "edgecolor": BLUE}
                    page.add_patch(Rectangle(corner, *size, **look))
            self._words[layer] = page.text(middle(layer), 62, "", ha="center", va="center", fontsize=9)
            page.text(middle(layer), BOTTOM + 14, f"layer {layer}", ha="center", va="center", fontsize=9)
            corner, size = (x - 5, cell_top(HIGH) - 3), (WIDTH + 10, CELL * HIGH + 6)
            self._frames[layer] = page.add_patch(Rectangle(corner, *size, facecolor="none", edgecolor=BLACK))
            self._frames[layer].set_linewidth(2)
        return [*self._cells.values(), *self._words.values(), *self._frames.values()]

    def _draw_sensitivities(self, page: Axes) -> None:
        tallest = max(*self._omega, 1e-300)
        self._sensitivity += [
            page.text(22, OMEGA_BOTTOM - OMEGA_HEIGHT - 34, "sensitivity: |mean| + std of the top eigenvalue",
                      fontsize=9, va="center"),
        ]  # fmt: skip
        for layer, omega in enumerate(self._omega, 1):
            height = OMEGA_HEIGHT * omega / tallest
            look = {"facecolor": ORANGE, "edgecolor": BLACK, "linewidth": 0.6}
            self._sensitivity += [
                page.add_patch(Rectangle((column(layer), OMEGA_BOTTOM - height), WIDTH, height, **look)),
                page.text(middle(layer), OMEGA_BOTTOM - height - 9, in_three_digits(omega), ha="center",
                          va="center", fontsize=8),
            ]  # fmt: skip

    def _draw_gauge(self, page: Axes) -> list[Artist]:
        left, top, width, height = GAUGE
        self._full = max(self._bytes.values())
        page.add_patch(Rectangle((left, top), width, height, facecolor="none", edgecolor=GREY))
        line = left + width * self._budget / self._full
        self._filled = page.add_patch(Rectangle((left, top), 0, height, facecolor=BLUE, edgecolor="none"))
        self._beyond = page.add_patch(Rectangle((line, top), 0, height, facecolor=VERMILION, hatch="///"))
        self._limit = page.plot([line, line], [top - 6, top + height + 6], color=BLACK, linewidth=2)[0]
        page.text(line, top - 14, "budget", ha="center", va="center", fontsize=9)
        self._bytes_words = page.text(left, top + height + 16, "", va="center", fontsize=9)
        self._budget_words = page.text(left, top + height + 33, "", va="center", fontsize=9, weight="bold")
        return [self._filled, self._beyond, self._limit, self._bytes_words, self._budget_words]

    def _draw_plots(self, figure: Figure) -> list[Artist]:
        strip, cloud = (self._axes(figure, left, 58, width, 336) for left, width in ((400, 246), (676, 210)))
        low, high = min(self._accuracy.values()), max(self._accuracy.values())
        margin = 0.06 * (high - low) or 1.0
        for axes in (strip, cloud):
            axes.set_ylim(low - margin, high + margin)
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        cloud.tick_params(labelleft=False)
        strip.set_ylabel("test sentences right (%)", fontsize=9)
        places = range(1, len(self._equal) + 1)
        values = [self._accuracy[bits] for bits in self._equal]
        strip.set(xlim=(0.2, len(values) + 0.8), xticks=(1, 5, 10, 15, 20))
        strip.set_xlabel("place among the 20 at the budget", fontsize=9)
        strip.grid(False, axis="x")
        strip.plot(places, values, "o", color=FAINT, markersize=5)
        mean = sum(values) / len(values)
        strip.axhline(mean, color=GREY, linewidth=1, linestyle="--")
        strip.text(0.5, mean, "mean", fontsize=8, color=GREY, va="bottom")
        megabytes = {bits: size / 1e6 for bits, size in self._bytes.items()}
        cloud.plot(list(megabytes.values()), [self._accuracy[bits] for bits in megabytes], "o", color=FAINT,
                   markersize=4)  # fmt: skip
        cloud.axvline(self._budget / 1e6, color=BLACK, linewidth=1.2, zorder=0)
        cloud.text(self._budget / 1e6 + 0.02, low, "budget", fontsize=8, va="center")
        cloud.set_xlabel("bytes of the six layers (millions)", fontsize=9)
        cloud.grid(False, axis="x")
        marks = {"color": "none", "markersize": 13, "markeredgewidth": 1.6}
        for bits, marker, colour in ((self._chosen, "D", VERMILION), (self._reverse, "s", GREEN)):
            for axes, x in ((strip, self._place[bits]), (cloud, megabytes[bits])):
                self._sensitivity += axes.plot(x, self._accuracy[bits], marker, markeredgecolor=colour, **marks)
        own = {"color": BLUE, "markeredgecolor": "white", "linestyle": "none", "marker": "o"}
        self._strip = {
            "band": strip.axhspan(0, 1, color=BLUE, alpha=0.12, linewidth=0),
            "ties": strip.plot([], [], "o", color=SKY, markersize=6)[0],
            "own": strip.plot([], [], markersize=10, **own)[0],
        }
        self._own = cloud.plot([], [], markersize=10, **own)[0]
        return [*self._strip.values(), self._own]

    def _draw_legend(self, figure: Figure) -> None:
        axes = self._axes(figure, 0, 440, self._width, 56)
        axes.set(xlim=(0, self._width), ylim=(56, 0))
        axes.axis("off")
        looks = (
            (408, 14, "this choice", {"color": BLUE, "marker": "o", "markersize": 8}),
            (520, 14, "near tie: within 2 standard errors", {"color": SKY, "marker": "o", "markersize": 6}),
            (776, 14, "another choice", {"color": FAINT, "marker": "o", "markersize": 5}),
        )
        asked = (
            (408, 38, "the Hessian's choice", {"color": "none", "marker": "D", "markeredgecolor": VERMILION}),
            (580, 38, "its reverse", {"color": "none", "marker": "s", "markeredgecolor": GREEN}),
        )
        for x, y, words, look in (*looks, *asked):
            artists = [
                *axes.plot(x, y, linestyle="none", **look),
                axes.text(x + 11, y, words, va="center_baseline", fontsize=9),
            ]
            if (x, y, words, look) in asked:
                self._sensitivity += artists

    # ------------------------------------------------------------------------ what moves

    def draw(self, numbers: dict[str, Any], words: Mapping[str, str]) -> None:
        """Show the numbers under these words: "title", "accuracy", "spread", "bytes", "budget"."""
        bits, size, own = numbers["bits"], numbers["bytes"], numbers["accuracy"]
        self._title.set_text(words["title"])
        self._heading.set_text(words["accuracy"])
        self._spread.set_text(words["spread"])
        for layer, cell in self._cells.items():
            cell.set_visible(bits[layer - 1] == HIGH)
            self._words[layer].set_text(f"{bits[layer - 1]} bits")
            self._frames[layer].set_visible(layer == numbers["layer"])
        left, _, width, _ = GAUGE
        self._filled.set_width(width * min(size, self._budget) / self._full)
        self._beyond.set_width(width * max(size - self._budget, 0) / self._full)
        self._bytes_words.set_text(words["bytes"])
        self._budget_words.set_text(words["budget"])
        self._budget_words.set_color(VERMILION if size > self._budget else BLACK)
        place = self._place.get(bits)
        self._strip["own"].set_data(*(([], []) if place is None else ([place], [own])))
        ties = numbers["near_ties"]
        self._strip["ties"].set_data([self._place[b] for b in ties], [self._accuracy[b] for b in ties])
        error = numbers["standard_error"]
        self._strip["band"].set(y=own - 2 * error, height=4 * error, visible=place is not None)
        self._own.set_data([size / 1e6], [own])
        for artist in self._sensitivity:
            artist.set_visible(numbers["sensitivity"] is not None)
