"""The picture of `lottery_ticket_explorer`: what the mask leaves of every pixel, and how the nets under it learn.

Left the 28 x 28 pixels of a digit, dark where many of a pixel's 300 weights are left, with the shares of the layers
below. Right above a measure against the share of the weights left, the mean over the seeds with a band from the lowest
to the highest; right below the test accuracy during training at the round chosen. Places are in pixels of the whole
picture from its upper left corner.
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
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from effnlp_lessons.studies.lottery_tickets import REDRAWN, SHUFFLED, TICKET
from effnlp_lessons.widgets.style import BLACK, BLUE, GREEN, GREY, VERMILION

SIDE = 28
DIGIT = (30, 64, 280, 280)  # left, top, width, height of the picture of the pixels
CHART = (418, 58, 460, 176)  # of the chart against the weights left
TRAINING = (418, 312, 460, 134)  # of the chart during training
AREA = [*CHART]  # takes the pointer
LOOK = {TICKET: (BLUE, "o", "-"), REDRAWN: (VERMILION, "s", "--"), SHUFFLED: (GREEN, "^", ":")}
AMOUNT = LinearSegmentedColormap.from_list("amount", ["#FFFFFF", "#9CC7E3", BLUE, "#002A44"])
LABELS = {"0.weight": "first", "2.weight": "second", "4.weight": "output"}


def x_of(left: float, leasts: float) -> float:
    """Where a share (per cent) lies in the chart, from 0 at 100 % to 1 at `leasts`, on a scale of logarithms."""
    return np.log(100 / left) / np.log(100 / leasts)


class LotteryTicketPicture:
    """The artists of the picture. `numbers` are those of `LotteryTicketExplorer.numbers`.

    Args:
        left: per cent of the weights left, by round.
        steps: of a training at which was measured.
        inked: (28, 28), which pixels have ink in some training digit; the others get a dot.
        bounds: lowest and highest accuracy of the chart during training.
    """

    def __init__(self, left: list[float], steps: list[int], inked: np.ndarray, bounds: tuple[float, float]) -> None:
        self._left, self._steps, self._inked, self._bounds = left, steps, inked, bounds

    # ------------------------------------------------------------------------ what stays

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        figure.set_layout_engine("none")
        self._width, self._height = figure.canvas.get_width_height()
        self._draw_digit(figure)
        self._draw_chart(self._axes(figure, *CHART), numbers)
        self._draw_training(self._axes(figure, *TRAINING))
        self._write(figure, CHART[0] - 46, 8, f"{numbers['title']}, mean and range of {numbers['seeds']} seeds",
                    weight="bold", fontsize=11)  # fmt: skip
        self._head = self._write(figure, 12, 8, weight="bold", fontsize=11)
        self._whose = self._write(figure, 12, 30, fontsize=10)
        self._darkest = self._write(figure, DIGIT[0], DIGIT[1] + DIGIT[3] + 12, fontsize=9)
        self._dotted = self._write(figure, DIGIT[0], DIGIT[1] + DIGIT[3] + 30, fontsize=9)
        self._layers = self._write(figure, DIGIT[0], DIGIT[1] + DIGIT[3] + 48, fontsize=9)
        self._during = self._write(figure, CHART[0] - 46, TRAINING[1] - 30, weight="bold", fontsize=11)
        hint = "Click the upper chart. By keyboard: left, right choose\na round; up, down choose what is trained."
        self._write(figure, DIGIT[0], 452, hint, color=GREY, fontsize=9, linespacing=1.4)
        words = [self._head, self._whose, self._darkest, self._dotted, self._layers, self._during]
        return [self._pixels, self._white, self._band, self._here, *self._lines.values(), *self._dots.values(), *words]

    def _write(self, figure: Figure, x: float, y: float, words: str = "", **style: Any) -> Artist:
        """Words at a place in pixels."""
        return figure.text(x / self._width, 1 - y / self._height, words, **{"va": "top", "parse_math": False, **style})

    def _axes(self, figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
        w, h = self._width, self._height
        return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))

    def _draw_digit(self, figure: Figure) -> None:
        axes = self._axes(figure, *DIGIT)
        axes.set_axis_off()
        self._pixels = axes.imshow(np.zeros((SIDE, SIDE)), cmap=AMOUNT, vmin=0, vmax=1, interpolation="nearest")
        rows, columns = np.nonzero(~self._inked)
        self._white = axes.plot(columns, rows, ".", color=VERMILION, markersize=2.5)[0]
        left, top, width, height = DIGIT
        outline = {"transform": None, "facecolor": "none", "edgecolor": GREY, "linewidth": 0.72}
        corner = left - 1.5, self._height - top - height - 1.5
        figure.add_artist(Rectangle(corner, width + 3, height + 3, **outline))

    def _draw_chart(self, axes: Axes, numbers: dict[str, Any]) -> None:
        least = self._left[-1]
        axes.set(xlim=(0, 1), xlabel="weights left (%)")
        shown = [share for share in (100, 50, 20, 10, 5, 2, 1) if share >= least]
        axes.xaxis.set(major_locator=FixedLocator([x_of(share, least) for share in shown]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda _, place: str(shown[place]) if place is not None else ""))
        values = numbers["along"]
        for kind, (colour, mark, line) in LOOK.items():
            x = [x_of(self._left[r], least) for r in values[kind]]
            low, mean, high = ([values[kind][r][name] for r in values[kind]] for name in ("lowest", "mean", "highest"))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, mean, line, color=colour, marker=mark, markersize=4, linewidth=1.6, label=kind)
        dense = values[TICKET][0]["mean"]
        axes.axhline(dense, color=GREY, linewidth=1)
        axes.margins(y=0.06)
        axes.set_ylim(axes.get_ylim())
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        axes.set_ylabel(numbers["unit"])
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.2}
        axes.legend(ncols=3, fontsize=9, columnspacing=1.5, **place)
        self._here = axes.vlines(0, *axes.get_ylim(), color=BLACK, linewidth=1.2)
        look = {"linestyle": "none", "markeredgecolor": "white", "clip_on": False}
        self._dots = {
            kind: axes.plot([], [], marker=mark, color=colour, **look)[0] for kind, (colour, mark, _) in LOOK.items()
        }

    def _draw_training(self, axes: Axes) -> None:
        axes.set(xlim=(0, self._steps[-1]), ylim=self._bounds, xlabel="training steps", ylabel="test digits right (%)")
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
        axes.xaxis.set_minor_locator(NullLocator())
        self._band = axes.fill_between(self._steps, 0, 1, alpha=0.15, linewidth=0)
        self._lines = {
            kind: axes.plot(self._steps, np.zeros(len(self._steps)), line, color=colour)[0]
            for kind, (colour, _, line) in LOOK.items()
        }

    # ------------------------------------------------------------------------ what moves

    def draw(self, numbers: dict[str, Any], words: Mapping[str, str]) -> None:
        """Show the numbers under these words: "head", "whose", "darkest", "inked", "layers", "during"."""
        self._pixels.set_data(numbers["pixels"] / max(numbers["pixels"].max(), 1))
        for artist, name in (
            (self._head, "head"),
            (self._whose, "whose"),
            (self._darkest, "darkest"),
            (self._dotted, "inked"),
            (self._layers, "layers"),
            (self._during, "during"),
        ):
            artist.set_text(words[name])
        place = x_of(self._left[numbers["round"]], self._left[-1])
        bottom, top = self._here.axes.get_ylim()
        self._here.set_segments([[(place, bottom), (place, top)]])
        shown = numbers["shown"]
        for kind, dot in self._dots.items():
            value = numbers["values"].get(kind)
            dot.set_data(*(([], []) if value is None else ([place], [value["mean"]])))
            dot.set_markersize(12 if kind == shown else 7)
        for kind, line in self._lines.items():
            curve = numbers["curves"].get(kind)
            line.set_visible(curve is not None)
            if curve is not None:
                line.set_ydata(curve["mean"])
                line.set_linewidth(2.4 if kind == shown else 1.2)
        curve = numbers["curves"].get(shown)
        self._band.set_visible(curve is not None)
        if curve is not None:
            there, back = (list(zip(self._steps, curve[name], strict=True)) for name in ("lowest", "highest"))
            self._band.set_verts([there + back[::-1]])
            self._band.set_facecolor(LOOK[shown][0])
