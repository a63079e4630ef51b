"""What a layer with a memory still holds of a long text, and whether a repeat is in its reach (notebook 10).

Transformer-XL (Dai et al. 2019, arXiv 1901.02860) reads a text segment by segment and keeps the last tokens of the
segments before, as they were. The Compressive Transformer (Rae et al. 2019, arXiv 1911.05507) does not drop what leaves
this memory: each `rate` tokens become one slot of a second, compressed memory, and only what leaves that is forgotten.
So one layer looks back over memory + rate x compressed tokens before its segment. A deeper layer reads what the layer
below made of tokens that had a memory of their own, so that a stack of L layers reaches about L times as far.

Bookkeeping as in `attention.compressive` and `attention.transformer_xl`, in closed form: no model runs in a handler.
The losses, if there are any, are recorded ones.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from ipywidgets import HBox, IntSlider, Layout, Widget
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from effnlp_lessons.widgets.memory_picture import HEIGHT, HEIGHT_WITH_LOSSES, PALETTE, Losses, MemoryPicture
from effnlp_lessons.widgets.picture import Explorer

MOST_LAYERS = 4
MOST_RATE = 8
Span = tuple[int, int]  # first token and the one after the last


class Held(NamedTuple):
    """What a layer holds when a segment begins: compressed slots, oldest first, and the memory."""

    slots: list[Span]
    memory: Span


def held_after(segments: int, segment: int, memory: int, compressed: int, rate: int) -> Held:
    """Which tokens a layer holds after `segments` segments of `segment` tokens.

    The oldest tokens that do not fit into the memory go, `rate` at a time, into one compressed slot each; fewer than
    `rate` wait in the memory. With `compressed` = 0 there is no compression and the memory is Transformer-XL's.
    """
    start, slots = 0, []
    for end in range(segment, segment * segments + 1, segment):
        over = end - start - memory
        if compressed == 0:
            start = max(start, end - memory)
            continue
        for _ in range(max(over, 0) // rate):
            slots.append((start, start + rate))
            start += rate
        slots = slots[-compressed:]
    return Held(slots, (start, segment * segments))


def oldest_in_reach(layers: int, token: int, segment: int, memory: int, compressed: int, rate: int) -> list[int]:
    """The oldest token on which the output at `token` can depend through 1, 2, ... `layers` layers."""
    oldest = []
    for _ in range(layers):
        held = held_after(token // segment, segment, memory, compressed, rate)
        token = min([token // segment * segment, held.memory[0], *(start for start, _ in held.slots)])
        oldest.append(token)
    return oldest


def check_losses(losses: Losses) -> None:
    """Raise a ValueError unless every model has rising lags of 1 or more with finite losses, not below 0."""
    if not 1 <= len(losses) <= len(PALETTE):
        raise ValueError(f"losses must have 1 to {len(PALETTE)} models, got {len(losses)}")
    for name, points in losses.items():
        lags = [lag for lag, _ in points]
        if not lags or lags[0] < 1 or any(b <= a for a, b in zip(lags, lags[1:], strict=False)):
            raise ValueError(f"losses[{name!r}] must have rising lags of at least 1, got {lags}")
        if not all(math.isfinite(nats) and nats >= 0 for _, nats in points):
            raise ValueError(f"losses[{name!r}] must have finite losses, not below 0, got {list(points)}")


class MemoryExplorer(Explorer):
    """Move along a text and see what a layer holds of it, and what has become of a token that is repeated.

    The last token of the segment repeats the one `distance` before it.

    Args:
        losses: model -> [(lag, nats), ...], the recorded loss on the second copy of a passage, in rising order of the
            lag (tokens from the first copy to the second); None: no chart of losses.
        length: tokens of the text, 24 to 768; the sliders go as far as fits.
        segment: tokens of a segment, 2 to length / 6.
        memory: tokens of the memory, 0 to length / 4.
        compressed: slots of the compressed memory, 0 (Transformer-XL) to length / 8.
        rate: tokens that share a compressed slot, 1 to 8.
        passed: segments read before this one.
        distance: tokens from the first copy to the second, 1 to length - 1.
        layers: of the stack, 1 to 4.

    Raises:
        ValueError: a number that is not offered; losses that `check_losses` refuses.
    """

    def __init__(
        self,
        losses: Losses | None = None,
        length: int = 96,
        segment: int = 8,
        memory: int = 16,
        compressed: int = 6,
        rate: int = 3,
        passed: int = 0,
        distance: int = 1,
        layers: int = 2,
    ) -> None:
        if losses is not None:
            check_losses(losses)
        if length not in range(24, 769):
            raise ValueError(f"length must be in 24 .. 768, got {length!r}")
        most = {"compressed": length // 8, "memory": length // 4, "segment": length // 6}
        for name, value, least, largest in (
            ("segment", segment, 2, most["segment"]),
            ("memory", memory, 0, most["memory"]),
            ("compressed", compressed, 0, most["compressed"]),
            ("rate", rate, 1, MOST_RATE),
            ("passed", passed, 0, length // max(segment, 2) - 1),
            ("distance", distance, 1, length - 1),
            ("layers", layers, 1, MOST_LAYERS),
        ):
            if value not in range(least, largest + 1):
                raise ValueError(f"{name} must be in {least} .. {largest}, got {value!r}")
        self._length, self._losses = length, losses
        places = most | {"memory": most["memory"] + MOST_RATE - 1}  # with those that wait
        self._picture = MemoryPicture(length, places, MOST_LAYERS, losses)
        self.size = (9.0, (HEIGHT if losses is None else HEIGHT_WITH_LOSSES) / 100)
        super().__init__(
            {
                "passed": _slider("segments passed", passed, 0, length // segment - 1),
                "distance": _slider("distance of the repeat", distance, 1, length - 1),
                "segment": _slider("segment length", segment, 2, most["segment"]),
                "memory": _slider("memory", memory, 0, most["memory"]),
                "compressed": _slider("compressed slots", compressed, 0, most["compressed"]),
                "rate": _slider("compression rate", rate, 1, MOST_RATE),
                "layers": _slider("layers", layers, 1, MOST_LAYERS),
            }
        )

    def arrange(self) -> list[Widget]:
        rows = (("passed", "distance"), ("segment", "memory", "layers"), ("compressed", "rate"))
        wrap = Layout(flex_flow="row wrap")
        return [HBox([self.controls[name] for name in row], layout=wrap) for row in rows]

    def settle(self, name: str) -> None:
        # NOTE on the page (noUiSlider 15) the End key still goes to a slider's first largest value; all else follows
        if name == "segment":  # the reader stays where it is in the text, as near as whole segments allow
            passed, segment = self.controls["passed"], self.controls["segment"].value
            read = self._numbers["segment"][0]
            passed.value = 0  # below every largest value
            passed.max = self._length // segment - 1
            passed.value = min(round(read / segment), passed.max)

    def idle(self, numbers: dict[str, Any]) -> set[str]:
        return set() if numbers["room"]["compressed"] else {"rate"}

    # ------------------------------------------------------------------------ numbers

    def numbers(
        self, passed: int, distance: int, segment: int, memory: int, compressed: int, rate: int, layers: int
    ) -> dict[str, Any]:
        """Where every token is, and what has become of the one that is repeated.

        Spans are (first, one after the last): "segment", "memory", the compressed "slots", oldest first. "waiting": how
        many tokens of the memory, its oldest, are due and too few for a slot. "room": how many places each part has.
        "query": the token that reads, "first" the one it repeats, below 0 if the text began later. "form": "segment",
        "memory", "compressed", "deeper" (only layers above the first depend on it), "gone", or "none"; "place": (part,
        place) that holds it, or None. "oldest": the oldest token in reach of 1, 2, ... layers. "range" of one layer
        before its segment: memory + rate x compressed. "losses": by model (nats, whether it is interpolated), None
        beyond what is recorded.
        """
        start = passed * segment
        held = held_after(passed, segment, memory, compressed, rate)
        query = start + segment - 1
        first = query - distance
        oldest = oldest_in_reach(layers, query, segment, memory, compressed, rate)
        form, place = "none", None
        if first >= start:
            form, place = "segment", ("segment", first - start)
        elif first >= held.memory[0]:
            form, place = "memory", ("memory", first - held.memory[0])
        elif first >= 0:
            slots = [slot for slot, (begin, end) in enumerate(held.slots) if begin <= first < end]
            form = "compressed" if slots else "deeper" if first >= oldest[-1] else "gone"
            place = ("compressed", slots[0]) if slots else None
        return {
            "passed": passed,
            "distance": distance,
            "rate": rate,
            "segment": (start, start + segment),
            "memory": held.memory,
            "slots": held.slots,
            "waiting": max(0, _tokens(held.memory) - memory),
            "room": {"compressed": compressed, "memory": memory, "segment": segment},
            "forgotten": min([held.memory[0], *(begin for begin, _ in held.slots)]),
            "query": query,
            "first": first,
            "form": form,
            "place": place,
            "oldest": oldest,
            "range": memory + rate * compressed,
            "losses": {name: _loss_at(points, distance) for name, points in (self._losses or {}).items()},
        }

    # ------------------------------------------------------------------------ picture and words

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        return self._picture.draw_static(figure, numbers)

    def draw(self, numbers: dict[str, Any]) -> None:
        room, wait = numbers["room"], f", and {numbers['waiting']} that wait" if numbers["waiting"] else ""
        between = any(value and value[1] for value in numbers["losses"].values())
        words = {
            "heading": f"The token {numbers['distance']} back: {_form(numbers)}",
            "titles": {
                "compressed": f"compressed: {len(numbers['slots'])} of {room['compressed']}",
                "memory": f"memory: {_exact(numbers)} of {room['memory']}{wait}",
                "segment": f"segment: {room['segment']} tokens",
            },
            "reaches": [
                f"{_layers(layer)}: {numbers['query'] - oldest}" for layer, oldest in enumerate(numbers["oldest"], 1)
            ],
            "at": f"at {numbers['distance']} tokens" + " (≈ interpolated)" * between,
            "losses": {name: _nats(value) for name, value in numbers["losses"].items()},
        }
        self._picture.draw(numbers, words)

    def summary(self, numbers: dict[str, Any]) -> str:
        room, layers = numbers["room"], len(numbers["oldest"])
        reach, waiting = numbers["range"], numbers["waiting"]
        wait = f", {waiting} more that wait until they are {numbers['rate']}" if waiting else ""
        parts = [
            f"Segment {numbers['passed'] + 1} is read (tokens {numbers['segment'][0]} to {numbers['query']}). "
            f"The token {numbers['distance']} back: {_form(numbers)}.",
            f"Held: {_exact(numbers)} tokens in memory{wait}, {len(numbers['slots'])} compressed slots for "
            f"{sum(map(_tokens, numbers['slots']))} tokens; forgotten: {numbers['forgotten']}.",
            f"Before its segment, one layer looks back over memory + rate x slots = {room['memory']} + "
            f"{numbers['rate']} x {room['compressed']} = {reach} tokens, {_layers(layers)} over {layers} x {reach} = "
            f"{layers * reach}; of this text, now: {_reaches(numbers)}.",
        ]
        if numbers["losses"]:
            losses = "; ".join(f"{name} {_nats(value)}" for name, value in numbers["losses"].items())
            lag = f"{numbers['distance']} tokens (≈: interpolated)"
            parts.append(f"Recorded loss on the second copy at {lag}: {losses}.")
        return " ".join(parts)

    def describe(self, numbers: dict[str, Any]) -> str:
        slots = ", ".join(f"{begin} to {end - 1}" for begin, end in numbers["slots"]) or "none"
        begin, end = numbers["memory"]
        memory = f"{begin} to {end - 1}" if begin < end else "none"
        chart = "" if self._losses is None else " Below: recorded loss against distance, a line a model."
        return (
            f"A text of {self._length} tokens as cells and above it what a layer holds, with bands from each place to "
            f"its tokens. Compressed slots: tokens {slots}. Memory: {memory}. Segment: {numbers['segment'][0]} to "
            f"{numbers['query']}. Below the text: bars of how far back 1 to {len(numbers['oldest'])} layers reach."
            f"{chart} {self.summary(numbers)}"
        )


def _loss_at(points: Any, distance: int) -> tuple[float, bool] | None:
    """(nats, interpolated) at a distance, between recorded lags on a log axis; None outside them."""
    lags, nats = (np.array(column, float) for column in zip(*points, strict=True))
    if not lags[0] <= distance <= lags[-1]:
        return None
    return float(np.interp(math.log(distance), np.log(lags), nats)), distance not in lags


def _nats(value: tuple[float, bool] | None) -> str:
    if value is None:
        return "not recorded"
    return f"{'≈ ' if value[1] else ''}{value[0]:.2f}"


def _tokens(span: Span) -> int:
    return span[1] - span[0]


def _exact(numbers: dict[str, Any]) -> int:
    """Tokens of the memory, without those that wait."""
    return _tokens(numbers["memory"]) - numbers["waiting"]


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count > 1)}"


def _reaches(numbers: dict[str, Any]) -> str:
    return ", ".join(
        f"{_layers(layer)} {numbers['query'] - oldest} back" for layer, oldest in enumerate(numbers["oldest"], 1)
    )


def _form(numbers: dict[str, Any]) -> str:
    """What has become of the repeated token."""
    form = numbers["form"]
    if form == "compressed":
        slot, rate = numbers["place"][1] + 1, numbers["rate"]
        shared = f"one of {rate} tokens in one slot" if rate > 1 else "alone in its slot"
        return f"compressed, in slot {slot} of {len(numbers['slots'])}, {shared}"
    return {
        "segment": "exact, in the same segment",
        "memory": "exact, in the memory",
        "deeper": f"gone from this layer; {_layers(len(numbers['oldest']))} reach it through what others kept of it",
        "gone": "gone, out of reach",
        "none": "the text began later",
    }[form]


def _slider(words: str, value: int, least: int, most: int) -> IntSlider:
    return IntSlider(
        value,
        least,
        most,
        description=words,
        style={"description_width": "initial"},
        layout=Layout(
            width="290px" if words not in ("distance of the repeat", "segments passed") else "430px",
            margin="2px 12px 2px 2px",
        ),
    )
