"""The picture of `three_views_explorer`: signal and remembered past, kernel and state, the output in three views.

Each view has a mark of its own in the lowest chart: a line, circles, crosses. All places are in pixels from the upper
left corner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from effnlp_lessons.widgets.memory_picture import box
from effnlp_lessons.widgets.style import BLACK, GREEN, GREY, PURPLE, SKY, VERMILION
from effnlp_lessons.widgets.three_views_numbers import LENGTH, PIECES

WIDTH, HEIGHT = 900, 640
SIGNAL = (56, 64, 832, 112)  # left, top, width, height
KERNEL = (56, 270, 540, 104)
STATE = (660, 270, 228, 104)
OUTPUT = (56, 468, 832, 134)
NOW = {"color": GREY, "linewidth": 1.2, "linestyle": (0, (4, 3))}
CURVES = {  # of the lowest chart, lowest first
    "continuous": ("continuous, off by", {"color": SKY, "linewidth": 3.5}),
    "full": ("full rate's answer, off by", {"color": "#3A3A3A", "linewidth": 1.4, "linestyle": (0, (5, 3))}),
    "recurrent": (
        "recurrent, to k, off by",
        {"color": VERMILION, "linestyle": "none", "marker": "o", "markersize": 7, "markerfacecolor": "none"},
    ),
    "convolution": ("convolution", {"color": BLACK, "linestyle": "none", "marker": "+", "markersize": 5}),
}
_BOLD = {"fontsize": 9.5, "weight": "bold"}


def round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 1.5, 2, 3, 5, 10) if factor * power >= value * (1 - 1e-9))


class ThreeViewsPicture:
    """The artists of the picture. `numbers` are those of `ThreeViewsExplorer.numbers`."""

    def draw_static(self, figure: Figure) -> list[Artist]:
        figure.set_layout_engine("none")
        self._figure = figure
        self._plain = figure.add_axes((0, 0, 1, 1))
        self._plain.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self._plain.set_axis_off()
        self._heading = self._write(12, 18, fontsize=11, weight="bold")
        self._amounts: dict[str, Artist] = {}
        panels = [self._heading, *self._draw_signal(), *self._draw_kernel(), *self._draw_state(), *self._draw_output()]
        return [*panels, *self._amounts.values()]

    def _write(self, x: float, y: float, words: str = "", **style: Any) -> Artist:
        return self._plain.text(x, y, words, **{"va": "center_baseline", "fontsize": 9, "parse_math": False, **style})

    def _axes(self, left: float, top: float, width: float, height: float, words: str = "") -> Axes:
        axes = self._figure.add_axes((left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT))
        axes.set(xlim=(0, LENGTH), ylim=(-1.15, 1.15), yticks=(-1, 0, 1), xticks=range(0, LENGTH + 1, 16))
        axes.axhline(0, color=GREY, linewidth=0.8)
        if words:
            self._write(left + width, top + height + 29, words, ha="right", fontsize=8.5, color=GREY)
        return axes

    def _keys(
        self, x: float, y: float, keys: dict[str, dict[str, Any]], amounts: Mapping[str, str] | None = None
    ) -> None:
        """A row of marks with their names, and behind those in `amounts` (name -> key of `words`) room for a number."""
        for name, look in keys.items():
            dot = look.get("linestyle") == "none"
            self._plain.plot([x + 9] if dot else [x, x + 20], [y] if dot else [y, y], **look)
            x = self._write(x + (19 if dot else 26), y, name, fontsize=8.5).get_window_extent().x1 + 22
            if amounts and name in amounts:
                self._amounts[amounts[name]] = self._write(x - 16, y, fontsize=8.5, weight="bold")
                x += 58

    # ------------------------------------------------------------------------ what stays, panel by panel

    def _draw_signal(self) -> list[Artist]:
        left, top, _, _ = SIGNAL
        line, dots = {"color": GREY, "linewidth": 1.2}, {"color": BLACK, "linestyle": "none", "marker": "o"}
        past, read = {"color": PURPLE, "linewidth": 2}, {"color": PURPLE, "linestyle": "none", "marker": "D"}
        self._write(12, top - 22, "Signal u", **_BOLD)
        self._keys(
            left + 30,
            top - 22,
            {
                "in continuous time": line,
                "its samples (means)": dots | {"markersize": 3.5},
                "the past as state x remembers it": past,
                "y: one unit of the model's time ago": read | {"markersize": 6},
            },
        )
        axes = self._axes(*SIGNAL, "time (samples of the full rate)")
        axes.set(ylim=(-1.4, 1.4))
        self._signal = axes.plot([], [], **line)[0]
        self._samples = axes.plot([], [], **dots, markersize=3)[0]
        self._past = axes.plot([], [], **past)[0]
        self._read = axes.plot([], [], **read, markersize=7)[0]
        self._nows = [axes.axvline(0, **NOW)]
        return [self._signal, self._nows[0], self._samples, self._past, self._read]

    def _draw_kernel(self) -> list[Artist]:
        left, top, width, _ = KERNEL
        dots = {"linestyle": "none", "marker": "o", "color": GREEN, "markersize": 4}
        hollow, unit = dots | {"markerfacecolor": "white"}, NOW | {"color": PURPLE}
        self._write(12, top - 40, "Kernel K of the convolution", **_BOLD)
        self._keys(
            left - 40, top - 17,
            {"lags with a sample so far": dots, "not yet": hollow, "one unit of the model's time:": unit},
            {"one unit of the model's time:": "unit"},
        )  # fmt: skip
        axes = self._axes(*KERNEL, "lag (samples of the full rate)")
        axes.set_yticks((0,), ("0",))
        self._kernel_note = self._write(left + width, top - 40, ha="right", color=GREEN)
        self._unit = axes.axvline(0, **unit)
        self._kernel_line = axes.plot([], [], color=GREEN, linewidth=0.8)[0]
        self._unused = axes.plot([], [], **hollow)[0]
        self._used = axes.plot([], [], **dots)[0]
        return [self._kernel_note, self._unit, self._kernel_line, self._unused, self._used]

    def _draw_state(self) -> list[Artist]:
        left, top, width, _ = STATE
        self._write(left - 20, top - 40, "State x after sample k", **_BOLD)
        self._write(left - 20, top - 17, "one bar a number", fontsize=8.5, color=GREY)
        axes = self._axes(*STATE)
        axes.set(xlim=(0, 1), xticks=[], yticks=[])
        axes.spines["bottom"].set_visible(False)
        axes.grid(False)
        self._bars = axes.add_collection(PolyCollection([], facecolors=VERMILION, linewidths=0), autolim=False)
        self._state_note = self._write(left + width, top - 17, ha="right", color=VERMILION)
        return [self._bars, self._state_note]

    def _draw_output(self) -> list[Artist]:
        left, top, _, height = OUTPUT
        self._write(12, top - 40, "Output y in the three views", **_BOLD)
        names = {CURVES[name][0]: name for name in ("convolution", "recurrent", "continuous", "full")}
        looks = {words: CURVES[name][1] for words, name in names.items()}
        self._keys(left - 40, top - 17, looks, {words: name for words, name in names.items() if words.endswith("by")})
        axes = self._axes(*OUTPUT, "time (samples of the full rate)")
        axes.set_yticks((-1, 0, 1), ("", "0", ""))
        self._curves = {name: axes.plot([], [], **look)[0] for name, (_, look) in CURVES.items()}
        middle, unit = top + height / 2, height / 2.3
        self._limits = [self._write(left - 7, middle - sign * unit, ha="right") for sign in (1, -1)]
        self._nows.append(axes.axvline(0, **NOW))
        return [self._nows[1], *self._curves.values(), *self._limits]

    # ------------------------------------------------------------------------ what moves

    def draw(self, numbers: dict[str, Any], words: Mapping[str, str]) -> None:
        """`words`: "heading", "kernel", "state", "unit", and how far "recurrent", "continuous" and "full" are off."""
        self._heading.set_text(words["heading"])
        self._kernel_note.set_text(words["kernel"])
        self._state_note.set_text(words["state"])
        for name, amount in self._amounts.items():
            amount.set_text(words[name])
        every, position, time = numbers["every"], numbers["position"], numbers["time"]
        for line in self._nows:
            line.set_xdata([time, time])
        width = LENGTH / PIECES
        self._signal.set_data((np.arange(PIECES) + 0.5) * width, numbers["pieces"])
        ends = every * np.arange(1, len(numbers["samples"]) + 1)
        self._samples.set_data(ends - every / 2, numbers["samples"])
        self._past.set_data(*numbers["past"])
        seen = int(time >= numbers["delay"])  # one unit ago the signal had begun
        self._read.set_data([time - numbers["delay"]][:seen], [numbers["recurrent"][position - 1]][:seen])

        kernel, lags = numbers["kernel"] / abs(numbers["kernel"][numbers["peak"]]), ends - every
        self._kernel_line.set_data(lags, kernel)
        self._used.set_data(lags[:position], kernel[:position])
        self._unused.set_data(lags[position:], kernel[position:])
        self._unit.set_xdata([numbers["delay"]] * 2)
        self._unit.set_visible(numbers["delay"] <= LENGTH)

        heights = numbers["x"] / max(np.abs(numbers["x"]).max(), 1e-12)
        room = 1 / len(heights)
        self._bars.set_verts([box(room * (n + 0.12), room * (n + 0.88), x, 0) for n, x in enumerate(heights)])

        limit = round_up(max(np.abs(numbers[name]).max() for name in CURVES))
        shown = {
            "continuous": (width * np.arange(1, PIECES + 1), numbers["continuous"]),
            "recurrent": (ends[:position], numbers["recurrent"][:position]),
            "convolution": (ends, numbers["convolution"]),
            "full": (np.arange(1, LENGTH + 1), numbers["full"]),
        }
        for name, (x, y) in shown.items():
            self._curves[name].set_data(x, y / limit)
        self._curves["full"].set_visible(every > 1)
        for text, sign in zip(self._limits, ("", "\N{MINUS SIGN}"), strict=True):
            text.set_text(f"{sign}{limit:g}")
