"""The picture of `hash_explorer`: vectors coloured by bucket, the sorted list cut into chunks, the pairs that are met.

On the circle each round has a ring of its own, the first one outside; real keys are shown once, coloured by the first
round, in their two directions of largest spread. A triangle marks a vector whose strongest key fell into another bucket
in the first round and shares one in a later round; a cross one that never shares a bucket with it. In the list a
white line parts two buckets and a black bar two chunks, so that neither needs colours. Places are in pixels from the
upper left corner.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt32
from matplotlib.artist import Artist
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from effnlp_lessons.widgets.pattern_picture import Pixels, cell_pixels, label, packed, square_pixels
from effnlp_lessons.widgets.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, YELLOW

VECTORS, VECTORS_SIDE = (52, 42), 300  # left and top of the vectors, and their side
LIST, ROW, CELL, GAP = (16, 384), 14, 8, 3  # left and top of the list, pixels of a round's row, a token, below a row
SQUARE = (458, 62)
RING, MARK = 0.085, 1.15  # from ring to ring, and where the marks of the circle stand
TOGETHER, RESCUED, APART = 0, 1, 2
_HOLLOW = {"fillstyle": "none", "markersize": 8, "markeredgewidth": 1.8}  # the bucket is seen inside
MARKS = {RESCUED: ("^", ORANGE), APART: ("x", VERMILION)}
_HUES = np.array([to_rgb(c) for c in (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, VERMILION, GREY)])
COLOURS = np.concatenate([_HUES, 0.55 * _HUES, 0.5 + 0.5 * _HUES, 0.75 + 0.25 * _HUES])  # of 32 buckets
WHITE, DARK = packed(np.array([(255, 255, 255), (0, 0, 0)]))


def bucket_pixels(colours: Float[np.ndarray, "*some 3"]) -> UInt32[np.ndarray, "*some"]:
    return packed(np.round(255 * colours).astype(np.uint8))


def list_pixels(
    buckets: Int[np.ndarray, "rounds length"], order: Int[np.ndarray, "rounds length"], chunk: int, rows: int
) -> UInt32[np.ndarray, "height width"]:
    """The list of all rounds, a row for each: cells coloured by bucket, white between buckets, black between chunks.

    `rows` rows are kept free; those without a round are white.
    """
    rounds, length = order.shape
    pixels = np.full((rows * (ROW + GAP), CELL * length + 2), WHITE)
    for row in range(rounds):
        sorted_buckets = buckets[row, order[row]]
        top = row * (ROW + GAP)
        cells = bucket_pixels(COLOURS[sorted_buckets]).repeat(CELL)
        starts = CELL * (np.flatnonzero(np.diff(sorted_buckets)) + 1)
        cells[starts] = cells[starts - 1] = WHITE
        pixels[top + 2 : top + ROW - 2, 1 : 1 + len(cells)] = cells
        first = -(-row * length // chunk) * chunk - row * length  # the first border of a chunk in this row
        for place in range(first, length, chunk):
            left = CELL * place
            pixels[top : top + ROW, left : left + 2] = DARK
        if row == rounds - 1:
            pixels[top : top + ROW, CELL * length :] = DARK
    return pixels


class HashPicture:
    """The artists of the picture. `numbers` are those of `HashExplorer.numbers`."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        figure.set_layout_engine("none")
        width, height = figure.canvas.get_width_height()

        def write(x: float, y: float, words: str = "", **style: Any) -> Artist:
            return figure.text(x / width, 1 - y / height, words, **{"va": "top", "parse_math": False, **style})

        self._circle = numbers["circle"]
        left, top = VECTORS
        axes = figure.add_axes(
            (left / width, 1 - (top + VECTORS_SIDE) / height, VECTORS_SIDE / width, VECTORS_SIDE / height)
        )
        reach = 1.25 if self._circle else 1.12
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[])
        axes.grid(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        heading = "vectors, a ring for each round" if self._circle else "keys, coloured by round 1"
        write(2, 6, heading, fontsize=11, weight="bold")
        write(2, 24, "a colour is a bucket", color=GREY, fontsize=9)
        for y, words, (mark, colour) in (
            (42, "rescued", MARKS[RESCUED]),
            (60, "apart", MARKS[APART]),
        ):
            axes_mark = figure.add_axes((4 / width, 1 - (y + 12) / height, 12 / width, 12 / height))
            axes_mark.set_axis_off()
            axes_mark.plot([0.5], [0.5], mark, color=colour, **_HOLLOW)
            axes_mark.set(xlim=(0, 1), ylim=(0, 1))
            write(20, y, words, fontsize=9)
        self._dots = axes.scatter([], [], s=30, linewidths=0.4, edgecolors="#262626")
        self._links = axes.add_collection(LineCollection([], linewidths=1.2))
        self._marks = {
            status: axes.plot([], [], mark, color=colour, **_HOLLOW)[0] for status, (mark, colour) in MARKS.items()
        }

        write(2, LIST[1] - 34, "sorted by bucket, cut into chunks", fontsize=11, weight="bold")
        self._list_words = write(2, LIST[1] - 16, color=GREY, fontsize=9)
        for row in range(self.rows):
            write(LIST[0] - 4, LIST[1] + row * (ROW + GAP), str(row + 1), ha="right", color=GREY, fontsize=8)
        self._list = figure.add_artist(Pixels(*LIST))

        length = numbers["length"]
        cell = cell_pixels(length)
        write(SQUARE[0] - 50, 6, "pairs that are met", fontsize=11, weight="bold")
        self._square_words = write(SQUARE[0] - 50, 24, color=GREY, fontsize=9)
        write(SQUARE[0], SQUARE[1] - 17, "keys →", color=GREY, fontsize=9)
        write(SQUARE[0] - 4, SQUARE[1] - 17, "queries ↓", color=GREY, fontsize=9, ha="right")
        for place, token in enumerate(numbers["tokens"]):
            y = SQUARE[1] + (place + 0.5) * cell
            write(SQUARE[0] - 3, y, label(token), ha="right", va="center_baseline", fontsize=min(6.5, 0.68 * cell))
        self._square = figure.add_artist(Pixels(*SQUARE))
        moving = [self._links, self._dots, *self._marks.values()]
        return [*moving, self._list_words, self._list, self._square_words, self._square]

    def draw(self, numbers: dict[str, Any]) -> None:
        points, buckets, status = numbers["points"], numbers["bucket of"], numbers["status"]
        rounds = len(buckets) if self._circle else 1
        radii = 1 - RING * np.arange(rounds)
        self._dots.set_offsets((radii[:, None, None] * points).reshape(-1, 2))
        self._dots.set_facecolors(COLOURS[buckets[:rounds].reshape(-1)])
        outside = MARK * points if self._circle else points
        ends = np.stack([outside, outside[numbers["strongest"]]], axis=1)
        self._links.set_segments(ends)
        colours = np.array([to_rgb("#B8B8B8"), *(to_rgb(colour) for _, colour in MARKS.values())])
        self._links.set_colors(colours[status])
        for kind, marks in self._marks.items():
            marks.set_data(*outside[status == kind].T)
        self._list.pixels = list_pixels(buckets, numbers["order"], numbers["chunk"], self.rows)
        self._list_words.set_text(f"{numbers['chunks']} chunks of {numbers['chunk']}; each also sees the one before it")
        self._square.pixels = square_pixels(numbers["weights"], numbers["met"] > 0, None)
        self._square_words.set_text(
            f"{numbers['pairs per query']:.1f} of {numbers['length'] - 1} keys a query, {100 * numbers['mass']:.1f} % "
            "of the weight; striped: not met"
        )
