"""The picture of `flash_explorer`: tiles in their order, the running softmax of a program, bytes moved, fast memory.

A tile has a number, its place in the order; one that is skipped has none and is grey, and pairs that are masked inside
of a tile are striped, so that neither needs colours. All places are in pixels from the upper left corner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from effnlp_lessons.widgets.flash_tiles import FILLS, LEFT, SIDE, TOP, FlashTiles
from effnlp_lessons.widgets.memory_picture import box, even_ticks
from effnlp_lessons.widgets.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, YELLOW

WIDTH, HEIGHT = 900, 610
ROWS_LEFT, ROWS_WIDTH, ROWS_HEIGHT = 440, 446, 88  # the bars of the running maximum and sum
MAXIMUM_TOP, SUM_TOP = 92, 240
CHART = (52, 452, 320, 106)  # bytes: left, top, width, height
MEMORY, MEMORY_HEIGHT = (410, 452, 476), 34  # left, top and width of the fast memory
PARTS = {"Q": BLUE, "K": GREEN, "V": SKY, "O": PURPLE, "scores": ORANGE, "m and l": YELLOW}
_BOLD = {"fontsize": 9.5, "weight": "bold"}
_NOTE = {"fontsize": 8.5, "color": GREY}


class FlashPicture:
    """The artists of the picture. `numbers` are those of `FlashExplorer.numbers`.

    What changes is kept short, because letters take most of the time of a drawing.

    Args:
        shape: (queries, keys) of the head.
        lowest, highest: of the running maximum, in any setting; `largest_sum` of the running sum.
        most_bytes: that any setting or standard attention moves.
    """

    def __init__(
        self, shape: tuple[int, int], lowest: float, highest: float, largest_sum: float, most_bytes: int
    ) -> None:
        self._shape, self._most_bytes = shape, most_bytes
        self._limits = {"m": (min(lowest, 0.0), max(1.05 * highest, 0.1)), "l": (0.0, 1.05 * largest_sum)}

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        axes.set_axis_off()
        self._plain = axes

        def write(x: float, y: float, words: str = "", **style: Any) -> Artist:
            return axes.text(x, y, words, **{"va": "top", "fontsize": 9, "parse_math": False, **style})

        self._heading = write(12, 8, fontsize=11, weight="bold")
        write(12, 28, numbers["source"], color=GREY)
        moving = self._draw_tiles(write)
        moving += self._draw_rows(figure, write)
        moving += self._draw_bytes(figure, numbers, write)
        moving += self._draw_memory(write)
        return [self._heading, *moving]

    def _draw_tiles(self, write: Any) -> list[Artist]:
        write(12, TOP - 40, "Tiles, numbered as they are read", **_BOLD)
        x, y = 12.0, TOP + SIDE + 10
        for words, colour in FILLS.items():
            hatch = "/////" if words == "masked" else None
            look = {"facecolors": [np.array(colour) / 255], "edgecolors": GREY, "linewidths": 0.6, "hatch": hatch}
            self._plain.add_collection(PolyCollection([box(x, x + 12, y, y + 12)], **look), autolim=False)
            x += 26 + write(x + 16, y + 6, words, va="center_baseline", fontsize=8.5).get_window_extent().width
        write(12, y + 18, "Here one program after the other; on a GPU side by side.", **_NOTE)
        self._tiles = self._plain.add_artist(FlashTiles(self._shape))
        frames = {VERMILION: 1.6, BLACK: 2.2}  # of the program and of the tile
        self._frames = [
            self._plain.plot([], [], color=colour, linewidth=width, solid_joinstyle="miter")[0]
            for colour, width in frames.items()
        ]
        return [self._tiles, *self._frames]

    def _axes(self, figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
        axes = figure.add_axes((left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT))
        axes.set(xlim=(0, 1), xticks=[])
        return axes

    def _draw_rows(self, figure: Figure, write: Any) -> list[Artist]:
        """Bars of the running maximum and of the running sum, a bar for each row of the present program."""
        drawn = {}
        maximum = "Running maximum m of the scores", "black: before; orange: m rose, so l and O are rescaled"
        total = "Running sum l of exp(score - m)", "blue: kept of before, rescaled; orange: added by this tile"
        for name, top, (title, note) in (("m", MAXIMUM_TOP, maximum), ("l", SUM_TOP, total)):
            axes = self._axes(figure, ROWS_LEFT, top, ROWS_WIDTH, ROWS_HEIGHT)
            low, high = self._limits[name]
            axes.set(ylim=(low, high), yticks=even_ticks(high))
            axes.axhline(0, color=GREY, linewidth=0.8)
            axes.spines["bottom"].set_visible(False)
            write(ROWS_LEFT - 30, top - 40, title, **_BOLD)
            write(ROWS_LEFT - 30, top - 22, note, **_NOTE)
            drawn[name] = [axes.add_collection(PolyCollection([], linewidths=0), autolim=False) for _ in range(2)]
        self._maximum, _ = drawn["m"]
        self._kept, self._added = drawn["l"]
        self._kept.set_facecolors(BLUE)
        self._added.set_facecolors(ORANGE)
        axes = self._maximum.axes
        self._before = axes.add_collection(LineCollection([], colors=BLACK, linewidths=1.5), autolim=False)
        self._rose = write(ROWS_LEFT + ROWS_WIDTH, MAXIMUM_TOP - 40, ha="right")
        self._row_names = [
            write(x, SUM_TOP + ROWS_HEIGHT + 4, ha=side, **_NOTE)
            for x, side in ((ROWS_LEFT, "left"), (ROWS_LEFT + ROWS_WIDTH, "right"))
        ]
        return [self._maximum, self._before, self._kept, self._added, self._rose, *self._row_names]

    def _draw_bytes(self, figure: Figure, numbers: dict[str, Any], write: Any) -> list[Artist]:
        """Bytes moved against the tile, all of this setting, and standard attention's as a level line."""
        left, top, width, height = CHART
        axes = self._axes(figure, *CHART)
        standard, most = numbers["standard"] / 1024, 1.06 * self._most_bytes / 1024
        axes.set(ylim=(0, most), yticks=even_ticks(most))
        axes.axhline(standard, color=VERMILION, linestyle=(0, (5, 2)), linewidth=1.6)
        write(12, top - 46, "Moved between the memories (KiB)", **_BOLD)
        words = write(left + width, top - 28, f"standard attention: {standard:.1f}", color=VERMILION, ha="right")
        x = left + width - words.get_window_extent().width - 6
        self._plain.plot([x - 20, x], [top - 21] * 2, color=VERMILION, linestyle=(0, (5, 2)), linewidth=1.6)
        words = write(12, top - 28, "in tiles:", color=BLUE)
        self._moved_words = write(12 + words.get_window_extent().width + 5, top - 28, color=BLUE, weight="bold")
        write(left + width / 2, top + height + 8, "tiles read", ha="center")
        write(left, top + height + 8, "0", ha="center")
        self._last = write(left + width, top + height + 8, ha="center")
        self._whole = axes.plot([], [], color="#9CC3E0", linewidth=1.5)[0]
        self._moved = axes.plot([], [], color=BLUE, linewidth=2.6)[0]
        self._dot = axes.plot([], [], "o", color=BLUE, markersize=6, clip_on=False)[0]
        return [self._moved_words, self._last, self._whole, self._moved, self._dot]

    def _draw_memory(self, write: Any) -> list[Artist]:
        left, top, width = MEMORY
        axes = self._plain
        words = write(left, top - 46, "Fast memory (KiB), a tile needs", **_BOLD)
        self._needs = write(left + words.get_window_extent().width + 5, top - 46, **_BOLD)
        write(left, top - 28, "frame: all of the fast memory", **_NOTE)
        self._parts = axes.add_collection(
            PolyCollection([], facecolors=list(PARTS.values()), edgecolors="white", linewidths=0.8), autolim=False
        )
        self._sram = axes.plot([], [], color=BLACK, linewidth=2, solid_joinstyle="miter")[0]
        self._amounts = {}
        for place, (name, colour) in enumerate(PARTS.items()):
            x, y = left + 150 * (place % 3), top + MEMORY_HEIGHT + 18 + 24 * (place // 3)
            axes.add_collection(PolyCollection([box(x, x + 12, y, y + 12)], facecolors=colour), autolim=False)
            words = write(x + 18, y + 6, name, va="center_baseline")
            x += 24 + words.get_window_extent().width
            self._amounts[name] = write(x, y + 6, va="center_baseline", weight="bold")
        return [self._needs, self._parts, self._sram, *self._amounts.values()]

    # ------------------------------------------------------------------------ what moves

    def draw(self, numbers: dict[str, Any], words: Mapping[str, str]) -> None:
        """`words`: "heading", "rose", "first row", "last row", "moved", "needs"."""
        colour = BLACK if numbers["fits"] else VERMILION
        self._heading.set(text=words["heading"], color=colour)
        self._tiles.show(numbers)
        self._show_frames(numbers)
        self._show_rows(numbers)
        self._rose.set_text(words["rose"])
        filled = ROWS_WIDTH * len(numbers["m"]) / numbers["block_queries"]
        self._row_names[0].set_text(words["first row"])
        self._row_names[1].set(text=words["last row"] if filled > 120 else "", x=ROWS_LEFT + filled)
        step, count, curve = numbers["step"], len(numbers["curve"]), [0, *np.array(numbers["curve"]) / 1024]
        x = np.arange(count + 1) / count
        self._whole.set_data(x, curve)
        self._moved.set_data(x[: step + 1], curve[: step + 1])
        self._dot.set_data([x[step]], [curve[step]])
        self._moved_words.set_text(words["moved"])
        self._last.set_text(str(count))
        self._needs.set(text=words["needs"], color=colour)
        self._show_memory(numbers, colour)

    def _show_frames(self, numbers: dict[str, Any]) -> None:
        if not numbers["step"]:
            for frame in self._frames:
                frame.set_data([], [])
            return
        (a, b), (c, d) = numbers["tiles"][numbers["step"] - 1]
        cell = self._tiles.cell
        for frame, (left, right) in zip(self._frames, ((0, self._shape[1]), (c, d)), strict=True):
            corners = box(LEFT + cell * left, LEFT + cell * right, TOP + cell * a, TOP + cell * b)
            frame.set_data(*_outline(corners))

    def _show_rows(self, numbers: dict[str, Any]) -> None:
        room = 1 / numbers["block_queries"]
        edges = [(room * (row + 0.1), room * (row + 0.9)) for row in range(len(numbers["m"]))]
        known = np.isfinite(numbers["m"])
        self._maximum.set_verts([box(*edges[row], numbers["m"][row], 0) for row in np.flatnonzero(known)])
        self._maximum.set_facecolors([ORANGE if rose else BLUE for rose in numbers["rose"][known]])
        earlier = zip(edges, numbers["m before"], strict=True)
        self._before.set_segments([[(a, m), (b, m)] for (a, b), m in earlier if np.isfinite(m)])
        sums = list(zip(edges, numbers["l kept"], numbers["l"], strict=True))
        self._kept.set_verts([box(*edge, kept, 0) for edge, kept, _ in sums])
        self._added.set_verts([box(*edge, total, kept) for edge, kept, total in sums])

    def _show_memory(self, numbers: dict[str, Any], colour: str) -> None:
        left, top, width = MEMORY
        scale = (width - 2) / max(numbers["sram"], sum(numbers["needs"].values()))
        ends = left + scale * np.cumsum([0, *numbers["needs"].values()])
        bottom = top + MEMORY_HEIGHT
        self._parts.set_verts([box(a, b, top, bottom) for a, b in zip(ends, ends[1:], strict=False)])
        self._sram.set_data(*_outline(box(left, left + numbers["sram"] * scale, top - 3, bottom + 3)))
        self._sram.set_color(colour)
        for name, text in self._amounts.items():
            text.set_text(f"{round(numbers['needs'][name] / 1024, 2):g}")


def _outline(corners: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    xs, ys = zip(*corners, corners[0], strict=True)
    return list(xs), list(ys)
