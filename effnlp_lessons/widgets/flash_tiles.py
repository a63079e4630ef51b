"""The square of tiles in the picture of `flash_explorer`: all pairs of queries and keys, in pixels.

Numbers and names are put into the pixels too, and what belongs to a setting is kept: so a step takes a millisecond.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import font_manager

from effnlp_lessons.widgets.flash_trace import Span
from effnlp_lessons.widgets.pattern_picture import Pixels, grow, packed

LEFT, TOP, SIDE = 92, 92, 256  # of the square of pairs; it may be smaller
MARGIN_LEFT, MARGIN_TOP, MARGIN = 80, 14, 1  # names stand left of it and above
FILLS = {
    "read": (138, 187, 219),
    "now": (240, 178, 51),
    "to come": (218, 233, 245),
    "skipped": (228, 228, 228),
    "masked": (218, 233, 245),
}
BACKGROUND, LINE, SKIPPED, FIRST = 0, 1, 2, 3  # codes of pixels; from FIRST on tiles in their order
STRIPE_EVERY, STRIPE_INK, NAME_INK = 5, 0.5, 0.65


class Words(NamedTuple):
    """A number or name in the pixels: its upper left corner and its size."""

    text: str
    left: int
    top: int
    width: int
    height: int
    size: float


@functools.cache
def ink_of(text: str, size: float) -> UInt8[np.ndarray, "height width"]:
    """How dark each pixel of the text is, 0 to 255, cut to what is not empty."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    font.set_size(size, 100)
    font.set_text(text, 0.0)
    font.draw_glyphs_to_bitmap(antialiased=True)
    ink = np.array(font.get_image())
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _fitting(room: tuple[float, float], *choices: tuple[str, float]) -> tuple[str, float] | None:
    """The first (text, size) that fits into this width and height, with a pixel to spare at each side."""
    for text, size in choices:
        height, width = ink_of(text, size).shape
        if width + 2 <= room[0] and height + 2 <= room[1]:
            return text, size
    return None


def words_of(numbers: Mapping[str, Any], cell: int) -> list[Words]:
    """The numbers of the tiles and the names of programs and keys, from the corner of the square; none where no room.

    A tile that is partly masked has its number where the pairs are that are seen: lower left.
    """
    words = []

    def put(x: float, y: float, chosen: tuple[str, float] | None, at: float = 0.5) -> None:
        """With the middle of its height at `y`, and of its width, or another part `at` of it, at `x`."""
        if chosen:
            height, width = ink_of(*chosen).shape
            words.append(Words(chosen[0], round(x - at * width), round(y - height / 2), width, height, chosen[1]))

    for place, ((a, b), (c, d)) in enumerate(numbers["tiles"], 1):
        high, wide = cell * (b - a), cell * (d - c)
        text = str(place)
        chosen = _fitting((wide, high), *((text, size) for size in (11, 8, 6.5) if min(high, wide) > 3.5 * size))
        across, down = (0.5, 0.5) if numbers["visible"][a:b, c:d].all() else (0.3, 0.7)
        put(cell * c + across * wide, cell * a + down * high, chosen)
    put(-6, -7, ("keys →", 8.5), at=1)
    for program, (a, b) in enumerate(numbers["query blocks"], 1):
        name = f"program {program}"
        put(-6, cell * (a + b) / 2, _fitting((MARGIN_LEFT, cell * (b - a)), (name, 8.5)), at=1)
    for span in numbers["key blocks"]:
        (c, d), name = span, _name(span)
        put(cell * (c + d) / 2, -7, _fitting((cell * (d - c), MARGIN_TOP), (name, 6.5), (name, 6), (str(c), 6)))
    return words


def _name(span: Span) -> str:
    first, end = span
    return f"{first}–{end - 1}" if end - first > 1 else str(first)


class FlashTiles(Pixels):
    """The artist: `show` puts the tiles of `FlashExplorer.numbers` into its pixels.

    Args:
        shape: (queries, keys).
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(LEFT - MARGIN_LEFT, TOP - MARGIN_TOP)
        self.cell, self._shape = SIDE // max(shape), shape
        self._settings: dict[tuple[int, int, bool], tuple[np.ndarray, np.ndarray]] = {}

    def show(self, numbers: Mapping[str, Any]) -> None:
        setting = tuple(numbers[name] for name in ("block_queries", "block_keys", "causal"))
        if setting not in self._settings:
            self._settings[setting] = self._draw_setting(numbers)
        codes, light = self._settings[setting]
        colours = np.empty((FIRST + 1 + len(numbers["tiles"]), 3))
        colours[[BACKGROUND, LINE, SKIPPED]] = (255, 255, 255), (255, 255, 255), FILLS["skipped"]
        colours[FIRST:] = FILLS["to come"]
        step = numbers["step"]
        colours[FIRST + 1 : FIRST + 1 + step] = FILLS["read"]
        if step:
            colours[FIRST + step] = FILLS["now"]
        self.pixels = packed(np.round(colours[codes] * light[..., None]).astype(np.uint8))

    def _draw_setting(
        self, numbers: Mapping[str, Any]
    ) -> tuple[Int[np.ndarray, "height width"], Float[np.ndarray, "height width"]]:
        """Which tile a pixel belongs to, and how light it is: less under stripes and letters."""
        cell, (queries, keys) = self.cell, self._shape
        codes = np.full((MARGIN_TOP + cell * queries + MARGIN, MARGIN_LEFT + cell * keys + MARGIN), BACKGROUND)
        light = np.ones(codes.shape)
        square = np.s_[MARGIN_TOP : MARGIN_TOP + cell * queries, MARGIN_LEFT : MARGIN_LEFT + cell * keys]
        of_pair = np.full(self._shape, SKIPPED)
        for place, (rows, columns) in enumerate(numbers["tiles"], 1):
            of_pair[slice(*rows), slice(*columns)] = FIRST + place
        codes[square] = grow(of_pair, cell)
        for axis, every in enumerate((numbers["block_queries"], numbers["block_keys"])):
            np.moveaxis(codes[square], axis, 0)[every * cell - 1 :: every * cell] = LINE
        masked = grow((of_pair != SKIPPED) & ~numbers["visible"], cell)
        rows, columns = np.indices(masked.shape)
        light[square][masked & ((rows + columns) % STRIPE_EVERY < 2)] = 1 - STRIPE_INK
        frame = np.s_[MARGIN_TOP - 1 : MARGIN_TOP + cell * queries + 1, MARGIN_LEFT - 1 : MARGIN_LEFT + cell * keys + 1]
        for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
            codes[frame][edge], light[frame][edge] = BACKGROUND, 0.42
        for words in words_of(numbers, cell):
            top, left = MARGIN_TOP + words.top, MARGIN_LEFT + words.left
            inked = light[top : top + words.height, left : left + words.width]
            strength = 1.0 if words.text.isdigit() and words.top >= 0 else NAME_INK
            inked *= 1 - strength * ink_of(words.text, words.size) / 255
        return codes, light
