"""The picture of `memory_explorer`: the text, what a layer holds of it, how far a stack reaches, recorded losses.

Blue is the segment, green the memory, orange the compressed memory: each has a place and a title of its own above the
text, and a band leads down from it to the tokens it holds, so that no colour alone says which is which. All places are
in pixels from the upper left corner of the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from effnlp_lessons.widgets.style import BLACK, BLUE, GREEN, ORANGE, PALETTE, PURPLE, VERMILION

Losses = Mapping[str, Sequence[tuple[int, float]]]

LEFT, WIDTH = 96, 792  # of the text and of what a layer holds
HELD, TEXT, CELL_HEIGHT = 56, 140, 22  # tops
DISTANCE = 178  # of the arrow between the two tokens
LANES, LANE = 202, 22  # top of the first bar of reach, and from one to the next
HEIGHT, CHART, CHART_SIZE = 300, 334, (440, 176)  # the losses stand below the rest
HEIGHT_WITH_LOSSES = 560
COLOURS = {"compressed": ORANGE, "memory": GREEN, "segment": BLUE}  # from left to right
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # so that lines can be told apart without colours
FORGOTTEN, FUTURE, LINE = "#D3D3D3", "#FFFFFF", "#9A9A9A"
NARROWEST = 5  # pixels of a cell that has an edge


def box(left: float, right: float, top: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def even_ticks(top: float) -> list[float]:
    """Round numbers from 0 to at most `top`, fixed, so that every drawing has the same."""
    return [tick for tick in MaxNLocator(4).tick_values(0, top) if 0 <= tick <= top]


class MemoryPicture:
    """The artists of the picture. `numbers` are those of `MemoryExplorer.numbers`.

    Args:
        length: tokens of the text.
        most: by part ("compressed", "memory", "segment") how many places it can have.
        layers: how many bars of reach there can be.
        losses: see `MemoryExplorer`.
    """

    def __init__(self, length: int, most: Mapping[str, int], layers: int, losses: Losses | None) -> None:
        self._length, self._most, self._layers, self._losses = length, most, layers, losses
        self._cell = WIDTH / length
        self._slot = WIDTH / (sum(most.values()) + 2)  # a place is left free between two parts
        self._lefts, left = {}, float(LEFT)
        for part, places in most.items():
            self._lefts[part] = left
            left += (places + 1) * self._slot

    def x_of(self, token: float) -> float:
        """The left edge of a token's cell."""
        return LEFT + token * self._cell

    def place_of(self, part: str, place: int) -> float:
        """The left edge of a place of what the layer holds."""
        return self._lefts[part] + place * self._slot

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        figure.set_layout_engine("none")
        self._width, self._height = figure.canvas.get_width_height()
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, self._width), ylim=(self._height, 0))
        axes.set_axis_off()

        def write(x: float, y: float, words: str = "", **style: Any) -> Artist:
            return axes.text(x, y, words, **{"va": "center_baseline", "fontsize": 9, "parse_math": False, **style})

        middle = CELL_HEIGHT / 2
        for y, words in ((HELD + middle, "layer holds"), (TEXT + middle, "text")):
            write(LEFT - 10, y, words, ha="right")
        self._heading = write(12, 16, fontsize=11, weight="bold")
        self._titles = {part: write(self._lefts[part], HELD - 11) for part in COLOURS}
        places = [
            box(x + 1, x + self._slot - 1, HELD, HELD + CELL_HEIGHT)
            for part, most in self._most.items()
            for x in (self.place_of(part, place) for place in range(most))
        ]
        self._places = axes.add_collection(PolyCollection(places, linewidths=0.8), autolim=False)
        cells = [box(self.x_of(token), self.x_of(token + 1), TEXT, TEXT + CELL_HEIGHT) for token in range(self._length)]
        edges = {"edgecolors": "white", "linewidths": 0.8} if self._cell >= NARROWEST else {"linewidths": 0}
        self._cells = axes.add_collection(PolyCollection(cells, **edges), autolim=False)
        self._bands = axes.add_collection(PolyCollection([], linewidths=0.6), autolim=False)
        self._borders = axes.add_collection(LineCollection([], colors=LINE, linewidths=1), autolim=False)
        self._outline = axes.plot([], [], color=BLACK, linewidth=1.4, solid_joinstyle="miter")[0]
        self._marks = axes.add_collection(
            PolyCollection([], facecolors="none", linewidths=2, edgecolors=(VERMILION, BLACK)), autolim=False
        )
        self._arrow = axes.plot([], [], color=VERMILION, linewidth=1.4)[0]
        self._head = axes.plot([], [], "<", color=VERMILION, markersize=6)[0]
        self._guide = axes.plot([], [], color=VERMILION, linewidth=1.2, linestyle=(0, (4, 3)))[0]
        self._distance = write(0, DISTANCE, color=VERMILION, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        self._bars = axes.add_collection(PolyCollection([], facecolors=PURPLE, linewidths=0), autolim=False)
        self._reaches = [write(LEFT - 10, LANES + LANE * layer + 7, ha="right") for layer in range(self._layers)]
        moving = [
            self._heading, *self._titles.values(), self._bands, self._cells, self._places, self._borders, self._bars,
            self._outline, self._marks, self._guide, self._arrow, self._head, self._distance, *self._reaches,
        ]  # fmt: skip
        return moving if self._losses is None else [*moving, *self._draw_losses(figure, write)]

    def _draw_losses(self, figure: Figure, write: Any) -> list[Artist]:
        """The recorded losses against the lag, with their names and values beside them."""
        width, height = CHART_SIZE
        axes = figure.add_axes(
            (LEFT / self._width, 1 - (CHART + height) / self._height, width / self._width, height / self._height)
        )
        lags = sorted({lag for points in self._losses.values() for lag, _ in points})
        top = max(nats for points in self._losses.values() for _, nats in points)
        axes.set(xscale="log", xlim=(lags[0] / 1.2, lags[-1] * 1.2), ylim=(0, 1.08 * top))
        axes.set_xticks(lags, [f"{lag:,}" for lag in lags])
        axes.minorticks_off()
        axes.set_yticks(even_ticks(1.08 * top))
        axes.set_xlabel("distance from the first copy to the second (tokens)", fontsize=9)
        write(LEFT, CHART - 16, "Recorded loss on the second copy (nats)", weight="bold", fontsize=9.5)
        x = LEFT + width + 40
        self._at = write(x, CHART - 16, weight="bold", fontsize=9.5)
        self._values, self._dots = {}, {}
        for row, (name, points) in enumerate(self._losses.items()):
            colour, marker = PALETTE[row % len(PALETTE)], MARKERS[row % len(MARKERS)]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5)
            y = CHART + 10 + 21 * row
            figure.axes[0].plot([x, x + 24], [y, y], color=colour, linewidth=2)
            figure.axes[0].plot([x + 12], [y], marker, color=colour, markersize=5)
            write(x + 32, y, name)
            self._values[name] = write(self._width - 14, y, ha="right", weight="bold")
        self._line = axes.axvline(1, color=VERMILION, linewidth=1.4, linestyle=(0, (4, 3)))
        return [self._line, self._at, *self._values.values()]

    # ------------------------------------------------------------------------ what moves

    def draw(self, numbers: dict[str, Any], words: Mapping[str, Any]) -> None:
        """`words`: "heading", the "titles" by part, "reaches" by layer; with losses "at" and "losses" by name."""
        self._heading.set_text(words["heading"])
        for part, title in self._titles.items():
            title.set_text(words["titles"][part])
        self._draw_text(numbers)
        self._draw_held(numbers)
        self._draw_repeat(numbers)
        self._draw_reach(numbers, words["reaches"])
        if self._losses is not None:
            self._line.set_xdata([numbers["distance"]] * 2)
            self._at.set_text(words["at"])
            for name, value in self._values.items():
                value.set_text(words["losses"][name])

    def _draw_text(self, numbers: dict[str, Any]) -> None:
        colours = np.tile(to_rgba(FUTURE), (self._length, 1))
        colours[: numbers["segment"][1]] = to_rgba(FORGOTTEN)
        for start, end in numbers["slots"]:
            colours[start:end] = to_rgba(ORANGE)
        for part in ("memory", "segment"):
            colours[slice(*numbers[part])] = to_rgba(COLOURS[part])
        self._cells.set_facecolors(colours)
        # the frame of the text, and a line before every segment
        bottom = TEXT + CELL_HEIGHT
        lines = [[(self.x_of(0), y), (self.x_of(self._length), y)] for y in (TEXT, bottom)]
        size = numbers["segment"][1] - numbers["segment"][0]
        for start in (*range(0, self._length, size), self._length):
            lines.append([(self.x_of(start), TEXT - 3), (self.x_of(start), bottom + 3)])
        self._borders.set_segments(lines)

    def _draw_held(self, numbers: dict[str, Any]) -> None:
        """The places of the layer, and bands from each part down to its tokens."""
        faces, edges, bands, shades = [], [], [], []
        held = {
            "compressed": numbers["slots"],
            "memory": [(token, token + 1) for token in range(*numbers["memory"])],
            "segment": [(token, token + 1) for token in range(*numbers["segment"])],
        }
        for part, most in self._most.items():
            used, room, colour = len(held[part]), numbers["room"][part], COLOURS[part]
            empty, waiting = max(room - used, 0), numbers["waiting"] if part == "memory" else 0
            absent = most - used - empty
            faces += [(colour, 0.4)] * waiting + [colour] * (used - waiting) + ["white"] * empty + ["none"] * absent
            edges += [colour] * used + [LINE] * empty + ["none"] * absent
            # one band for each compressed slot, one for all that is exact
            each = held[part] if part == "compressed" else [(held[part][0][0], held[part][-1][1])] if used else []
            wide = 1 if part == "compressed" else used
            for place, (start, end) in enumerate(each):
                left = self.place_of(part, place)
                bands.append(
                    [
                        (left + 1, HELD + CELL_HEIGHT),
                        (left + wide * self._slot - 1, HELD + CELL_HEIGHT),
                        (self.x_of(end), TEXT),
                        (self.x_of(start), TEXT),
                    ]
                )
                shades.append(colour)
        self._places.set_facecolors([to_rgba(face) for face in faces])
        self._places.set_edgecolors([to_rgba(edge) for edge in edges])
        self._bands.set_verts(bands)
        self._bands.set_facecolors([to_rgba(shade, 0.25) for shade in shades])
        self._bands.set_edgecolors([to_rgba(shade, 0.9) for shade in shades])
        # the place in which the repeated token is
        outline = []
        if numbers["place"] is not None:
            part, place = numbers["place"]
            left = self.place_of(part, place)
            outline = box(left, left + self._slot, HELD - 1, HELD + CELL_HEIGHT + 1)
            outline.append(outline[0])
        self._outline.set_data(*zip(*outline, strict=True) if outline else ([], []))

    def _draw_repeat(self, numbers: dict[str, Any]) -> None:
        """The token that reads, the one it repeats, and the way between them."""
        query, first = numbers["query"], numbers["first"]
        marks = [box(self.x_of(query), self.x_of(query + 1), TEXT, TEXT + CELL_HEIGHT)]
        there = first >= 0
        if there:
            marks.insert(0, box(self.x_of(first), self.x_of(first + 1), TEXT, TEXT + CELL_HEIGHT))
        self._marks.set_verts(marks)
        self._marks.set_edgecolors([VERMILION, BLACK] if there else [BLACK])
        x, end = self.x_of(first + 0.5), self.x_of(query + 0.5)
        for artist in (self._arrow, self._guide, self._distance):
            artist.set_visible(there)
        self._head.set_visible(there and end - x > 12)
        if there:
            self._arrow.set_data([x, end, end], [DISTANCE, DISTANCE, TEXT + CELL_HEIGHT + 4])
            self._head.set_data([x + 4], [DISTANCE])
            self._guide.set_data([x, x], [TEXT + CELL_HEIGHT + 2, LANES + LANE * len(numbers["oldest"]) - 4])
            self._distance.set_text(f"{numbers['distance']} back")
            inside = end - x > 90
            self._distance.set(x=(x + end) / 2 if inside else end + 8, ha="center" if inside else "left")
            if not inside and end > self._width - 80:
                self._distance.set(x=x - 8, ha="right")

    def _draw_reach(self, numbers: dict[str, Any], words: Sequence[str]) -> None:
        end = self.x_of(numbers["query"] + 1)
        bars = [
            box(self.x_of(oldest), end, LANES + LANE * layer, LANES + LANE * layer + 14)
            for layer, oldest in enumerate(numbers["oldest"])
        ]
        self._bars.set_verts(bars)
        for layer, reach in enumerate(self._reaches):
            reach.set_text(words[layer] if layer < len(words) else "")
