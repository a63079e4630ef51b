"""The picture of `linear_state_explorer`: the state as it grows, what is read out of it, weights beside the softmax's.

A number is a cell: vermilion above 0, blue below, white at 0. Beside the state stand the features that read it, one a
row, and under it what is read, one a column. All places are in pixels from the upper left corner of the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from effnlp_lessons.widgets.memory_picture import box, even_ticks
from effnlp_lessons.widgets.pattern_picture import EDGE, Pixels, grow, label, packed
from effnlp_lessons.widgets.style import BLACK, BLUE, VERMILION

STATE, SIDE = (62, 66), 256  # corner and largest side of S
UPDATE, UPDATE_SIDE = (424, 66), 160  # the same of the last token's part of it
STRIP = 10  # thickness of the strips beside them
CHART = (690, 84, 196, 170)  # bytes: left, top, width, height
BARS_LEFT, BARS_WIDTH, UPPER, LOWER, BAR = 96, 788, 408, 474, 52  # left, width, tops and height of both rows of bars
NAMES_TOP = 532
ABOVE, BELOW = np.array((213, 94, 0)), np.array((0, 114, 178))


def colours(values: Float[np.ndarray, "rows columns"], largest: float, cell: int) -> np.ndarray:
    """Packed pixels of signed numbers in cells, with a thin frame; `largest` has the full colour."""
    share = np.clip(values / max(largest, 1e-12), -1, 1)[..., None]
    full = np.where(share > 0, ABOVE, BELOW)
    # the root, so that small numbers can be told from 0
    cells = packed(255 + np.sqrt(np.abs(share)) * (full - 255))
    return np.pad(grow(cells, cell), 1, constant_values=EDGE)


def strip(values: Float[np.ndarray, " n"], largest: float, cell: int, upright: bool) -> np.ndarray:
    """The same of one row of numbers, `STRIP` pixels thick."""
    pixels = colours(values[None], largest, cell)
    pixels = pixels[[0, *[1] * STRIP, -1]]
    return pixels.T if upright else pixels


class LinearStatePicture:
    """The artists of the picture. `numbers` are those of `LinearStateExplorer.numbers`.

    Args:
        tokens: of the text.
        shape: of S, (features, values).
    """

    def __init__(self, tokens: list[str], shape: tuple[int, int]) -> None:
        self._tokens, self._shape = tokens, shape
        self._cell, self._small = SIDE // max(shape), UPDATE_SIDE // max(shape)

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        figure.set_layout_engine("none")
        self._width, self._height = figure.canvas.get_width_height()

        def write(x: float, y: float, words: str = "", **style: Any) -> Artist:
            style = {"va": "top", "fontsize": 9, "parse_math": False, **style}
            return figure.text(x / self._width, 1 - y / self._height, words, **style)

        self._heading = write(12, 8, fontsize=11, weight="bold")
        (x, y), (features, values) = STATE, self._shape
        high, wide = self._cell * features, self._cell * values
        self._words = {"state": write(x, y - 6, va="bottom", fontsize=9.5, weight="bold")}
        write(x - 22, y + high / 2, "φ(q), reads", rotation=90, ha="right", va="center")
        write(x + wide + 24, y + high / 2, "z: sum of φ(k)", rotation=90, ha="left", va="center")
        place = {name: figure.add_artist(Pixels(*corner)) for name, corner in (
            ("query", (x - STRIP - 5, y)), ("state", (x, y)), ("normaliser", (x + wide + 6, y)),
            ("linear", (x, y + high + 8)), ("softmax", (x, y + high + 28)),
        )}  # fmt: skip
        for row, words in ((8, "read out"), (28, "softmax")):
            write(x - 6, y + high + row + STRIP / 2, words, ha="right", va="center_baseline", fontsize=8.5)
        self._words["outputs"] = write(x + wide + 6, y + high + 8, linespacing=1.25)
        (x, y), high, wide = UPDATE, self._small * features, self._small * values
        write(x, y - 24, "this token adds φ(k) vᵀ", va="bottom", fontsize=9.5, weight="bold")
        place |= {
            "update": figure.add_artist(Pixels(x, y)),
            "key": figure.add_artist(Pixels(x - STRIP - 5, y)),
            "value": figure.add_artist(Pixels(x, y - STRIP - 5)),
        }
        write(x - 20, y + high / 2, "φ(k)", rotation=90, ha="right", va="center")
        write(x + wide + 6, y - STRIP / 2 - 4, "v", va="center_baseline")
        self._words["update"] = write(x, y + high + 8, linespacing=1.35)
        self._pixels = place
        self._chart_moves = self._draw_bytes(figure, numbers, write)
        bars = self._draw_bars(figure, numbers, write)
        return [self._heading, *self._words.values(), *place.values(), *self._chart_moves, *bars]

    def _draw_bytes(self, figure: Figure, numbers: dict[str, Any], write: Any) -> list[Artist]:
        """The bytes of the state and of a cache of keys and values against the tokens read."""
        left, top, width, height = CHART
        axes = figure.add_axes(
            (left / self._width, 1 - (top + height) / self._height, width / self._width, height / self._height)
        )
        tokens = len(self._tokens)
        read = np.array([0, tokens])
        cache, state = numbers["cache_bytes_per_token"] * read / 1_000, numbers["state_bytes"] / 1_000
        axes.plot(read, cache, color=BLUE)
        axes.plot(read, [state, state], color=VERMILION, linestyle=(0, (5, 2)))
        most = 1.12 * max(cache[1], state)
        axes.set(xlim=(0, tokens), ylim=(0, most))
        axes.set_xticks(range(0, tokens + 1, 10 if tokens > 12 else 2))
        axes.set_yticks(even_ticks(most))
        axes.set_xlabel("tokens read", fontsize=9)
        write(left - 34, top - 24, "kB of this head, float32", va="bottom", fontsize=9.5, weight="bold")
        for x, words, colour in ((left, "state", VERMILION), (left + 60, "keys and values", BLUE)):
            write(x, top - 8, words, va="bottom", color=colour)
        return [axes.plot([0], [0], marker, color=c, markersize=7, clip_on=False)[0] for marker, c in (
            ("o", VERMILION), ("s", BLUE))]  # fmt: skip

    def _draw_bars(self, figure: Figure, numbers: dict[str, Any], write: Any) -> list[Artist]:
        """Two rows of bars, one bar a token: the softmax's weights and those that linear attention implies."""
        count = len(self._tokens)
        self._rows, moving = {}, []
        for name, top, colour in (("softmax", UPPER, BLUE), ("linear", LOWER, VERMILION)):
            axes = figure.add_axes(
                (BARS_LEFT / self._width, 1 - (top + BAR) / self._height, BARS_WIDTH / self._width, BAR / self._height)
            )
            axes.set(xlim=(0, count), ylim=(0, 1.02), xticks=[], yticks=[])
            axes.grid(False)
            axes.spines["left"].set_visible(False)
            bars = axes.add_collection(PolyCollection([], facecolors=colour, linewidths=0), autolim=False)
            even = axes.add_collection(LineCollection([], colors=BLACK, linewidths=1), autolim=False)
            write(BARS_LEFT - 10, top + 6, name, ha="right", weight="bold", color=colour)
            largest = write(BARS_LEFT - 10, top + 22, ha="right", linespacing=1.3)
            self._rows[name] = bars, even, largest
            moving += [bars, even, largest]
        self._room = BARS_WIDTH / count
        style = {"rotation": 90, "ha": "center", "fontsize": min(9, 0.68 * self._room)}
        self._names = [label(token) for token in self._tokens]
        for place, name in enumerate(self._names):
            write(BARS_LEFT + (place + 0.5) * self._room, NAMES_TOP, name, **style)
        self._now = write(0, NAMES_TOP, **style, color=VERMILION)  # over the black one
        title = "Weight of each token so far for this query; each row to its own largest (line: all alike)"
        write(12, UPPER - 8, title, va="bottom", fontsize=9.5, weight="bold")
        return [*moving, self._now]

    # ------------------------------------------------------------------------ what moves

    def draw(self, numbers: dict[str, Any], words: Mapping[str, str]) -> None:
        """`words`: "heading", "state", "outputs", "update", and the largest weights, "softmax" and "linear"."""
        self._heading.set_text(words["heading"])
        for name, artist in self._words.items():
            artist.set_text(words[name])
        cell, small, scales = self._cell, self._small, numbers["scales"]
        self._pixels["state"].pixels = colours(numbers["state"], scales["state"], cell)
        self._pixels["query"].pixels = strip(numbers["query"], numbers["query"].max(), cell, True)
        normaliser = numbers["sums"] if numbers["normalised"] else np.zeros_like(numbers["sums"])
        self._pixels["normaliser"].pixels = strip(normaliser, scales["sums"], cell, True)
        for name in ("linear", "softmax"):
            self._pixels[name].pixels = strip(numbers["outputs"][name], scales[name], cell, False)
        self._pixels["update"].pixels = colours(numbers["update"], np.abs(numbers["update"]).max(), small)
        self._pixels["key"].pixels = strip(numbers["key"], numbers["key"].max(), small, True)
        self._pixels["value"].pixels = strip(numbers["value"], np.abs(numbers["value"]).max(), small, False)
        read = numbers["position"] + 1
        for dot, size in zip(self._chart_moves, (numbers["state_bytes"], numbers["cache_bytes"]), strict=True):
            dot.set_data([read], [size / 1_000])
        for name, (bars, even, largest) in self._rows.items():
            heights = numbers["weights"][name] / numbers["weights"][name].max()
            bars.set_verts([box(place + 0.12, place + 0.88, height, 0) for place, height in enumerate(heights)])
            even.set_segments([[(0, heights.mean()), (read, heights.mean())]])
            largest.set_text(words[name])
        self._now.set(text=self._names[read - 1], x=(BARS_LEFT + (read - 0.5) * self._room) / self._width)
