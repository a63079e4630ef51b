"""One head of MiniLM under a mask: what the allowed pairs cost, what they keep, how far they reach (notebook 08).

A pattern of attention saves work by leaving pairs (query, key) out. Two questions about a trained head: how
much of its attention weight falls on the pairs that stay, and how far does its output move without the others?
The two need not agree: a pair may have much weight and little to say. The numbers are those of
`effnlp_lessons.attention.patterns`; the masks are the papers' (`attention.gallery`) or the student's own,
painted on the head under a budget of pairs.

The model runs once for every text that is submitted; every other control looks up what it gave.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from typing import Any

import torch
from ipywidgets import HTML, Button, HBox, IntSlider, Layout, Text, ToggleButtons
from jaxtyping import Bool
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from effnlp_lessons.attention.gallery import PATTERNS, size_for
from effnlp_lessons.attention.patterns import captured_mass, output_error, pairs, reach
from effnlp_lessons.widgets.cost_explorer import format_seconds, percent
from effnlp_lessons.widgets.painted_image import PaintedImage
from effnlp_lessons.widgets.pattern_picture import LEFT, TOP, PatternPicture, cell_at, cell_pixels
from effnlp_lessons.widgets.picture import Explorer, in_turn
from effnlp_lessons.widgets.reading import Reading, read_text

TEXT = (
    "The first hour is slow and the jokes are old, but when the two sisters finally meet in the empty theatre, "
    "nobody around me moved. I cried, I laughed, and I will see it again."
)
PAINTED = "painted"
BRUSHES, SHAPES = ("paint", "erase"), ("cell", "row", "column", "diagonal")
STEPS = {"ArrowLeft": (0, -1), "ArrowRight": (0, 1), "ArrowUp": (-1, 0), "ArrowDown": (1, 0)}

Mask = Bool[Tensor, "length length"]
Times = dict[str, str | tuple[float, float, int]]  # words, or seconds dense, seconds of the pattern, tokens


def check_times(times: Times) -> None:
    """Raise a ValueError unless `times` has patterns of the gallery with words or three positive numbers."""
    for name, record in times.items():
        if name not in PATTERNS:
            raise ValueError(f"times must have patterns among {sorted(PATTERNS)}, got {name!r}")
        if not isinstance(record, str) and (len(record) != 3 or not min(record) > 0):
            raise ValueError(f"times[{name!r}] must be words or (seconds dense, seconds, tokens), got {record!r}")


def brush_cells(shape: str, query: int, key: int, length: int) -> Mask:
    """The cells that one dab of the brush covers: a cell, its row, its column or its diagonal."""
    rows, columns = torch.arange(length)[:, None], torch.arange(length)[None, :]
    if shape == "diagonal":
        return columns - rows == key - query
    in_row, in_column = (rows == query).expand(length, length), (columns == key).expand(length, length)
    return {"cell": in_row & in_column, "row": in_row, "column": in_column}[shape]


class PatternExplorer(Explorer):
    """Choose or paint a mask over one head and see pairs, MACs, captured mass, output error and reach.

    Args:
        text: 10 to 48 tokens with [CLS] and [SEP].
        pattern: a name in `PATTERNS`, or "painted", at first an empty sheet.
        size: of the pattern; None: the one that uses the budget best.
        layer, head: of MiniLM, from 0.
        layers: how many layers of this mask are stacked for the reach, 1 to 6.
        budget: share of all pairs that may be painted, above 0, at most 1.
        times: what is recorded of a pattern's speed: words, or (seconds dense, seconds of the pattern, tokens).
        read: gives the `Reading` of a text, or raises a ValueError with a sentence for the student.

    Raises:
        ValueError: a choice that is not offered; a text that `read` refuses; times of another shape.
    """

    size = (9.0, 5.5)
    scene = ("text",)

    def __init__(
        self,
        text: str = TEXT,
        pattern: str = "window",
        size: int | None = None,
        layer: int = 1,
        head: int = 9,
        layers: int = 2,
        budget: float = 0.12,
        times: Times | None = None,
        read: Callable[[str], Reading] = read_text,
    ) -> None:
        if not 0 < budget <= 1:
            raise ValueError(f"budget must be a share above 0 and at most 1, got {budget!r}")
        check_times(times or {})
        self._times, self._share, self._message = times or {}, budget, ""
        self._read = functools.lru_cache(maxsize=16)(read)
        self._reading, self._cursor = self._read(text), None
        self._sheets: dict[int, list[Mask]] = {}  # length -> the painted mask after every stroke
        self._stroke = False  # whether the stroke that goes on has changed the sheet
        self._picture = PatternPicture()
        depth, heads, length, _ = self._reading.values.shape
        sizes = PATTERNS[pattern].sizes(length) if pattern in PATTERNS else range(1, 2)
        for name, value, allowed in (
            ("pattern", pattern, (*PATTERNS, PAINTED)),
            ("size", size, (None,) if pattern == PAINTED else (None, *sizes)),
            ("layer", layer, range(depth)),
            ("head", head, range(heads)),
            ("layers", layers, range(1, 7)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")
        self.note = HTML()
        self.undo, self.clear = (Button(description=name, layout=Layout(width="70px")) for name in ("undo", "clear"))
        self.controls = {
            "pattern": _buttons((*PATTERNS, PAINTED), pattern),
            "size": _slider("size", 1, range(1, length), "210px"),
            "layer": _slider("layer", layer, range(depth), "205px"),
            "head": _slider("head", head, range(heads), "205px"),
            "layers": _slider("stacked layers", layers, range(1, 7), "255px"),
            "brush": _buttons(BRUSHES, "paint"),
            "shape": _buttons(SHAPES, "cell"),
            "text": Text(
                text,
                description="text",
                placeholder="a sentence of your own, then Enter",
                continuous_update=False,
                layout=Layout(width="890px", height="28px"),
                style={"description_width": "initial"},
            ),
        }
        self._choose_size(size)
        super().__init__(self.controls)
        self.undo.on_click(lambda _: self._change_sheets(list.pop))
        self.clear.on_click(lambda _: self._change_sheets(lambda sheets: sheets.append(self._empty())))

    def arrange(self) -> list[HBox]:
        name = self.controls
        rows = (
            (name["pattern"],),
            (name["size"], name["layer"], name["head"], name["layers"]),
            (name["brush"], name["shape"], self.undo, self.clear),
            (name["text"],),
            (self.note,),  # above the picture, so that a refusal is seen in a low window too
        )
        return [HBox(row, layout=Layout(flex_flow="row wrap")) for row in rows]

    def make_image(self, width: int, height: int) -> PaintedImage:
        return PaintedImage(width, height, "mask over the head: arrows move, space paints or erases", self.paint)

    # ------------------------------------------------------------------------ text, size, painted sheets

    @property
    def length(self) -> int:
        return len(self._reading.tokens)

    @property
    def budget(self) -> int:
        """Pairs that may be painted on this text."""
        return int(self._share * self.length**2)

    @property
    def mask(self) -> Mask:
        """The mask shown."""
        pattern = self.controls["pattern"].value
        if pattern == PAINTED:
            return self._drawn()[-1]
        return PATTERNS[pattern].mask(self.length, self.controls["size"].value)

    def _empty(self) -> Mask:
        return torch.zeros(self.length, self.length, dtype=torch.bool)

    def _drawn(self) -> list[Mask]:
        """The sheets for texts of this length, the first empty, the last the one that counts."""
        return self._sheets.setdefault(self.length, [self._empty()])

    @in_turn
    def _change_sheets(self, change: Callable[[list[Mask]], Any]) -> None:
        change(self._drawn())
        self._message = ""
        self.refresh()

    def settle(self, name: str) -> None:
        self._message = ""
        if name == "pattern":
            self._choose_size()
        elif name == "text":
            before = self.length
            try:
                self._reading = self._read(self.controls["text"].value)
            except ValueError as problem:
                self._message = f"{problem} The picture keeps the text before it."
                return
            self._cursor = None
            if self.length != before:
                self._choose_size()
                if self.controls["pattern"].value == PAINTED:
                    self._message = "A text of another length has a sheet of its own."

    def _choose_size(self, size: int | None = None) -> None:
        """Give the slider the pattern's sizes, at `size`, or where it uses the budget best, or else fewest pairs."""
        name, slider = self.controls["pattern"].value, self.controls["size"]
        if name == PAINTED:
            return
        sizes = PATTERNS[name].sizes(self.length)
        if size is None:
            size = size_for(name, self.length, self.budget)
        if size is None:
            size = min(sizes, key=lambda size: pairs(PATTERNS[name].mask(self.length, size)))
            self._message = f"No size of {name} fits the budget at {self.length} tokens: it is made for longer texts."
        with slider.hold_sync():
            slider.min = min(slider.min, sizes[0])  # in this order the smallest is never above the largest
            slider.max = sizes[-1]
            slider.min, slider.value = sizes[0], size

    # ------------------------------------------------------------------------ painting

    @in_turn
    def paint(self, events: list[list[Any]]) -> None:
        """What happened on the square, as `PaintedImage` reports it: strokes of the brush, keys at the cursor."""
        self._message = ""
        for kind, *what in events:
            if kind in ("down", "move"):
                self._move(kind == "down", *what)
            elif self._cursor is None:
                self._cursor = 0, 0
            elif kind == "key" and what[0] in STEPS:
                moved = zip(self._cursor, STEPS[what[0]], strict=True)
                self._cursor = tuple(min(max(place + step, 0), self.length - 1) for place, step in moved)
            elif kind == "key":
                self._stroke = False
                self._dab(*self._cursor, "erase" if self.mask[self._cursor] else "paint")
        self.refresh()
        if self._cursor is not None:
            self.image.spoken = self._speak()

    def _move(self, press: bool, x: float, y: float) -> None:
        """Paint from the last place of the pointer to (x, y), every cell on the way."""
        here = cell_at(x, y, self.length)
        if press:
            self._stroke, self._last = False, here
        start, self._last = self._last, here
        steps = max(abs(here[0] - start[0]), abs(here[1] - start[1]), 1)
        for step in range(steps + 1):
            query, key = (round(a + (b - a) * step / steps) for a, b in zip(start, here, strict=True))
            if 0 <= query < self.length and 0 <= key < self.length:
                self._cursor = query, key
                self._dab(query, key, self.controls["brush"].value)

    def _dab(self, query: int, key: int, brush: str) -> None:
        """One dab of the brush, done whole or refused. On a paper's pattern it begins a sheet from that pattern."""
        shape, pattern = self.controls["shape"].value, self.controls["pattern"]
        cells, before = brush_cells(shape, query, key, self.length), self.mask
        after = before | cells if brush == "paint" else before & ~cells
        more, left = pairs(after) - pairs(before), max(self.budget - pairs(before), 0)
        if more > left:
            way_out = "Erase first." if pattern.value == PAINTED else f'Erase first, or choose "{PAINTED}".'
            needs = f"this {shape} needs {more:,} more, the budget leaves {left:,}"
            self._message = f"Not painted: {needs}. {way_out}"
        elif more:
            if self._stroke:
                self._drawn().pop()
            self._drawn().append(after)
            self._stroke = True
            with self.still():
                pattern.value = PAINTED

    # ------------------------------------------------------------------------ numbers

    def numbers(self, pattern: str, size: int, layer: int, head: int, layers: int, **_: str) -> dict[str, Any]:
        """What the mask costs, keeps and reaches on this head. Masks and weights are arrays (queries, keys)."""
        mask, reading = self.mask, self._reading
        weights, values = reading.weights[layer, head][None], reading.values[layer, head][None]
        reached, d_head = reach([mask] * layers), values.shape[-1]
        return {
            "tokens": reading.tokens,
            "pattern": pattern,
            "size": None if pattern == PAINTED else size,
            "layer": layer,
            "head": head,
            "layers": layers,
            "weights": weights[0].numpy(),
            "mask": mask.numpy(),
            "pairs": pairs(mask),
            "all_pairs": mask.numel(),
            "share": pairs(mask) / mask.numel(),
            "budget": self.budget,
            "macs": 2 * d_head * pairs(mask),  # d_head for the score, d_head for the value that it weighs
            "dense_macs": 2 * d_head * mask.numel(),
            "mass": captured_mass(weights, mask).item(),
            "error": output_error(weights, values, mask).item(),
            "reached": reached.numpy(),
            "reach_share": pairs(reached) / mask.numel(),
            "cursor": self._cursor,
            "message": self._message,
        }

    def idle(self, numbers: dict[str, Any]) -> set[str]:
        painted = numbers["pattern"] == PAINTED
        self.undo.disabled = not painted or len(self._drawn()) == 1
        self.clear.disabled = not painted or numbers["pairs"] == 0
        return {"size"} if painted else set()

    # ------------------------------------------------------------------------ picture and words

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        side = cell_pixels(self.length) * self.length
        self.image.area = [LEFT, TOP, side, side]
        return self._picture.draw_static(figure, numbers)

    def draw(self, numbers: dict[str, Any]) -> None:
        self.note.value = f"<b>{html.escape(numbers['message'])}</b>" if numbers["message"] else ""
        self._picture.draw(numbers, f"layer {numbers['layer']}, head {numbers['head']}: {self._name(numbers)}")

    def _name(self, numbers: dict[str, Any]) -> str:
        return "painted by you" if numbers["pattern"] == PAINTED else f"{numbers['pattern']}, size {numbers['size']}"

    def _time(self, name: str) -> str:
        """What is recorded of the speed, in words; nothing where nothing is recorded."""
        if name == PAINTED:
            return "A painted mask has no fast path of its own: put over dense attention it takes as long as dense."
        record = self._times.get(name, "")
        if isinstance(record, str):
            return record
        dense, fast, tokens = record
        ratio = f"{dense / fast:.1f} times as fast" if fast <= dense else f"{fast / dense:.1f} times as slow"
        both = f"dense {format_seconds(dense)}, {name} {format_seconds(fast)}"
        return f"Recorded at {tokens:,} tokens: {both}, {ratio}."

    def _speak(self) -> str:
        """The cell at the cursor, for a screen reader."""
        (query, key), tokens = self._cursor, self._numbers["tokens"]
        allowed = "allowed" if self._numbers["mask"][query, key] else "left out"
        weight = self._numbers["weights"][query, key]
        return f"{self._message} Query {tokens[query]}, key {tokens[key]}: weight {weight:.2f}, {allowed}.".strip()

    def summary(self, numbers: dict[str, Any]) -> str:
        knob = "" if numbers["pattern"] == PAINTED else f" ({PATTERNS[numbers['pattern']].knob})"
        within = "within" if numbers["pairs"] <= numbers["budget"] else "over"
        sentences = (
            numbers["message"],
            f"{self._name(numbers)}{knob}: {numbers['pairs']:,} of {numbers['all_pairs']:,} pairs "
            f"({percent(numbers['share'])}, {within} the budget of {numbers['budget']:,}), {numbers['macs']:,} of "
            f"{numbers['dense_macs']:,} MACs.",
            f"They capture {percent(numbers['mass'])} of the head's mass; the output error is {numbers['error']:.2f}.",
            f"Through {numbers['layers']} such layer{'s' * (numbers['layers'] > 1)} "
            f"{percent(numbers['reach_share'])} of all pairs are reached.",
            self._time(numbers["pattern"]),
        )
        return " ".join(filter(None, sentences))

    def describe(self, numbers: dict[str, Any]) -> str:
        return (
            f"A square of {self.length} queries by {self.length} keys with the weights of layer {numbers['layer']}, "
            f"head {numbers['head']}: allowed pairs blue, the others grey and striped. Beside it bars for pairs, "
            f"mass and error, and a small square of the reach. {self.summary(numbers)}"
        )


def _slider(name: str, value: int, values: range, width: str) -> IntSlider:
    layout = Layout(width=width, margin="2px 8px 2px 0")
    style = {"description_width": "initial"}
    return IntSlider(value, values[0], values[-1], description=name, layout=layout, style=style)


def _buttons(options: tuple[str, ...], value: str) -> ToggleButtons:
    layout = Layout(width="max-content", max_width="100%", margin="2px 16px 2px 0")
    return ToggleButtons(options=options, value=value, style={"button_width": "auto"}, layout=layout)
