"""Step through the tiles of FlashAttention: who reads what when, the running softmax, bytes moved (notebook 11).

FlashAttention (Dao et al. 2022, arXiv 2205.14135; FlashAttention-2, Dao 2023, arXiv 2307.08691) never writes the
scores to the slow memory. A program keeps a block of queries in the fast memory and goes over blocks of keys; for each
row it keeps the maximum m of the scores so far and the sum l of exp(score - m). When m rises, what was summed before
is rescaled by exp(m before - m). Large tiles move fewer bytes, and need more fast memory.

The order of the tiles and the bytes are those that `flash_trace` recorded while the kernel ran, once for every setting
when the explorer is made; m and l are `attention.flash.online_softmax_step` of the same tiles. No kernel runs in a
handler.

NOTE in the interpreter one program runs after the other, so that bytes can be shown as they add up; on a GPU many
programs run at the same time, and part of what they ask for is in a cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ipywidgets import HBox, IntSlider, Layout, ToggleButtons, Widget
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from effnlp_lessons.attention.flash_costs import standard_attention_bytes
from effnlp_lessons.widgets.flash_picture import FlashPicture
from effnlp_lessons.widgets.flash_trace import (
    BLOCKS,
    BYTES,
    TENSORS,
    Head,
    Softmax,
    Span,
    check_head,
    fast_memory,
    made_up_head,
    made_up_traces,
    record_traces,
    run_softmax,
    visible_pairs,
)
from effnlp_lessons.widgets.picture import Explorer

SRAM = (8, 16, 32, 64)  # KiB
OFF, ON = "off", "on"


class FlashExplorer(Explorer):
    """Choose sizes of tiles and fast memory, and go through the tiles in the order in which the kernel reads them.

    Args:
        head: queries, keys and values, float32, 1 to 64 of them with 1 to 64 numbers; None: `made_up_head()`.
        block_queries, block_keys: rows of a tile of queries, and of keys: 8, 16, 32 or 64.
        sram: KiB of fast memory: 8, 16, 32 or 64.
        causal: whether a query sees no later key.
        step: the tile shown, from 1.
        run: "auto", "interpreter" or "torch", see `flash_trace.record_trace`.

    Raises:
        ValueError: a choice that is not offered; a head that `check_head` refuses.
    """

    size = (9.0, 6.1)
    setting = ("block_queries", "block_keys", "causal")  # of a trace

    def __init__(
        self,
        head: Head | None = None,
        block_queries: int = 16,
        block_keys: int = 16,
        sram: int = 16,
        causal: bool = False,
        step: int = 1,
        run: str = "auto",
    ) -> None:
        self._head = made_up_head() if head is None else head
        check_head(self._head)
        self._head = Head(*(part.detach() for part in self._head))
        for name, value, offered in (
            ("block_queries", block_queries, BLOCKS), ("block_keys", block_keys, BLOCKS), ("sram", sram, SRAM),
        ):  # fmt: skip
            if value not in offered:
                raise ValueError(f"{name} must be one of {', '.join(map(str, offered))}, got {value!r}")
        self._traces = made_up_traces(run) if head is None else record_traces(self._head, run)
        count = len(self._traces[block_queries, block_keys, causal].steps)
        if step not in range(1, count + 1):
            raise ValueError(f"step must be in 1 .. {count}, got {step!r}")
        self._softmaxes = {
            setting: run_softmax(self._head, trace, causal=setting[2]) for setting, trace in self._traces.items()
        }
        every = [part for softmaxes in self._softmaxes.values() for part in softmaxes]
        seen = np.concatenate([part.m[np.isfinite(part.m)] for part in every])
        self._standard = standard_attention_bytes(len(self._head.q), len(self._head.k), self._head.q.shape[1], BYTES)
        self._picture = FlashPicture(
            (len(self._head.q), len(self._head.k)),
            lowest=float(seen.min()),
            highest=float(seen.max()),
            largest_sum=float(max(part.l.max() for part in every)),
            most_bytes=max(self._standard, *(trace.steps[-1].moved.total() for trace in self._traces.values())),
        )
        super().__init__(
            {
                "step": IntSlider(
                    step, 1, count, description="tile number", style={"description_width": "initial"},
                    layout=Layout(width="520px", margin="2px 16px 2px 2px"),
                ),
                "causal": _buttons("causal", (OFF, ON), ON if causal else OFF),
                "block_queries": _buttons("queries a tile", BLOCKS, block_queries),
                "block_keys": _buttons("keys a tile", BLOCKS, block_keys),
                "sram": _buttons("SRAM (KiB)", SRAM, sram),
            }
        )  # fmt: skip

    def arrange(self) -> list[Widget]:
        rows = (("step", "causal"), ("block_queries", "block_keys", "sram"))
        wrap = Layout(flex_flow="row wrap")
        return [HBox([self.controls[name] for name in row], layout=wrap) for row in rows]

    def settle(self, name: str) -> None:
        # NOTE on the page (noUiSlider 15) the End key still goes to a slider's first largest value; all else follows
        if name in self.setting:  # who looks at the last tile stays there, so that totals can be compared
            slider, values = self.controls["step"], self.values
            trace = self._traces[values["block_queries"], values["block_keys"], values["causal"] == ON]
            at_the_end = slider.value == slider.max > 1
            slider.value = 1
            slider.max = len(trace.steps)
            slider.value = slider.max if at_the_end else min(self._numbers["chosen"], slider.max)

    def idle(self, numbers: dict[str, Any]) -> set[str]:
        return set() if numbers["fits"] else {"step"}

    # ------------------------------------------------------------------------ numbers

    def numbers(self, step: int, causal: str, block_queries: int, block_keys: int, sram: int) -> dict[str, Any]:
        """The tiles in their order, and what is known after the present one.

        "tiles": (rows of queries, rows of keys) as read; "order" by (query block, key block), from 1, 0 if skipped;
        "kinds": "full", "partial" (a pair is masked, or keys are missing at the end) or "skipped". "visible" pairs, and
        those "visited" in tiles. "fits": whether the tile does; if not, "step" is 0 and nothing is read. "chosen": what
        the slider says. "program" from 0; of its rows "m", "l", "m before", "l kept" and "l added", and "rose": whether
        m rose after something had been summed. "moved": bytes so far by tensor; "curve": all bytes after every tile;
        "standard": of standard attention. "needs": bytes of a tile by part; "sram": bytes. "suggestion": the tile that
        fits and moves least, or None.
        """
        hidden, d_head = causal == ON, self._head.q.shape[1]
        trace = self._traces[block_queries, block_keys, hidden]
        lengths = len(self._head.q), len(self._head.k)
        visible = visible_pairs(*lengths, causal=hidden)
        blocks = [
            [(start, min(start + size, length)) for start in range(0, length, size)]
            for size, length in zip((block_queries, block_keys), lengths, strict=True)
        ]
        order = np.zeros((len(blocks[0]), len(blocks[1])), int)
        kinds = np.full(order.shape, "skipped", object)
        visited = np.zeros(lengths, bool)
        for place, tile in enumerate(trace.steps, 1):
            at = tile.queries[0] // block_queries, tile.keys[0] // block_keys
            inside = visible[slice(*tile.queries), slice(*tile.keys)]
            order[at], visited[slice(*tile.queries), slice(*tile.keys)] = place, True
            kinds[at] = "full" if inside.all() and inside.shape[1] == block_keys else "partial"
        needs = fast_memory(block_queries, block_keys, d_head)
        fits = sum(needs.values()) <= 1024 * sram
        now = trace.steps[step - 1] if fits else None
        nothing = np.zeros(0)
        softmax = self._softmaxes[block_queries, block_keys, hidden][step - 1] if fits else Softmax(*[nothing] * 4)
        return {
            "source": f"{trace.source}; one head, {lengths[0]} queries, {lengths[1]} keys, d_head {d_head}, float32",
            "block_queries": block_queries,
            "block_keys": block_keys,
            "causal": hidden,
            "query blocks": blocks[0],
            "key blocks": blocks[1],
            "tiles": [(tile.queries, tile.keys) for tile in trace.steps],
            "order": order,
            "kinds": kinds,
            "visible": visible,
            "visited": visited,
            "fits": fits,
            "chosen": step,
            "step": step if fits else 0,
            "program": now.program if now else None,
            "m": softmax.m,
            "l": softmax.l,
            "m before": softmax.m_before,
            "l kept": softmax.kept,
            "l added": softmax.l - softmax.kept,
            "rose": np.isfinite(softmax.m_before) & (softmax.m > softmax.m_before),
            "moved": {name: now.moved[name] for name in TENSORS if now.moved[name]} if now else {},
            "curve": [tile.moved.total() for tile in trace.steps],
            "standard": self._standard,
            "needs": needs,
            "sram": 1024 * sram,
            "suggestion": self._suggest(1024 * sram, hidden),
        }

    def _suggest(self, sram: int, causal: bool) -> tuple[int, int] | None:
        """Of the tiles that fit those that move fewest bytes, and of them the fewest."""
        fitting = [
            (trace.steps[-1].moved.total(), len(trace.steps), (rows, columns))
            for (rows, columns, hidden), trace in self._traces.items()
            if hidden == causal and sum(fast_memory(rows, columns, self._head.q.shape[1]).values()) <= sram
        ]
        return min(fitting)[2] if fitting else None

    # ------------------------------------------------------------------------ picture and words

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        return self._picture.draw_static(figure, numbers)

    def draw(self, numbers: dict[str, Any]) -> None:
        words = {
            "heading": _heading(numbers),
            "rose": "",
            "first row": "",
            "last row": "",
            "moved": f"{_kib(sum(numbers['moved'].values()))} of {_kib(numbers['curve'][-1])}",
            "needs": f"{_kib(sum(numbers['needs'].values()))} of {_kib(numbers['sram'])}",
        }
        if numbers["fits"]:
            (first, end), _ = numbers["tiles"][numbers["step"] - 1]
            words["first row"] = f"query {first}"
            words["last row"] = f"query {end - 1}" if end - first > 1 else ""
            if np.isfinite(numbers["m before"]).any():
                words["rose"] = f"m rose in {numbers['rose'].sum()} of {end - first} rows"
        else:
            words["heading"] += f" {_advice(numbers)}"
        self._picture.draw(numbers, words)

    def summary(self, numbers: dict[str, Any]) -> str:
        needs, count = sum(numbers["needs"].values()), len(numbers["tiles"])
        skipped = int((numbers["order"] == 0).sum())
        partial = int((numbers["kinds"] == "partial").sum())
        memory = f"A tile needs {_kib(needs)} of {_kib(numbers['sram'])} KiB of fast memory"
        total = f"{_kib(numbers['curve'][-1])} KiB, standard attention {_kib(numbers['standard'])} KiB"
        grid = f"{count} tile{'s are' if count > 1 else ' is'} read, {partial} with a mask, and {skipped} skipped"
        if not numbers["fits"]:
            return f"{_heading(numbers)} {memory}. {_advice(numbers)} With room for it, {grid}; {total}."
        moved = ", ".join(f"{name} {_kib(amount)}" for name, amount in numbers["moved"].items())
        rows = f"Running maximum {_range(numbers['m'])}, running sum {_range(numbers['l'])}"
        return (
            f"{_heading(numbers)} {rows}; {_rescaled(numbers)}. "
            f"Moved so far {_kib(sum(numbers['moved'].values()))} KiB ({moved}); in all {total}. {grid}. {memory}."
        )

    def describe(self, numbers: dict[str, Any]) -> str:
        programs, columns = numbers["order"].shape
        return (
            f"Upper left a square of queries by keys in {programs} x {columns} tiles, numbered in the order in which "
            "they are read; the present one framed, skipped ones grey, masked pairs striped. Upper right bars of the "
            "running maximum and the running sum of the present program's rows. Lower left the bytes moved against "
            "the tiles read, and a level line for standard attention. Lower right what a tile takes of the fast "
            f"memory. {numbers['source'][0].upper() + numbers['source'][1:]}. {self.summary(numbers)}"
        )


def _kib(amount: int) -> str:
    return f"{amount / 1024:.1f}"


def _heading(numbers: dict[str, Any]) -> str:
    if not numbers["fits"]:
        return f"A tile of {numbers['block_queries']} x {numbers['block_keys']} does not fit into the fast memory."
    step, program = numbers["step"], numbers["program"]
    queries, keys = numbers["tiles"][step - 1]
    kind = numbers["kinds"][program, keys[0] // numbers["block_keys"]]
    masked = "partly masked" if kind == "partial" else "no mask"
    return (
        f"Tile {step} of {len(numbers['tiles'])}: program {program + 1} ({_rows('quer', 'y', 'ies', queries)}) reads "
        f"{_rows('key', '', 's', keys)}, {masked}."
    )


def _rows(stem: str, one: str, many: str, span: Span) -> str:
    first, end = span
    return f"{stem}{one} {first}" if end - first == 1 else f"{stem}{many} {first} to {end - 1}"


def _advice(numbers: dict[str, Any]) -> str:
    if numbers["suggestion"] is None:
        return "No tile that is offered fits."
    return "Fits, and moves least: {} x {}.".format(*numbers["suggestion"])


def _rescaled(numbers: dict[str, Any]) -> str:
    if not np.isfinite(numbers["m before"]).any():
        return "first tile of the program: nothing to rescale"
    rose, rows = int(numbers["rose"].sum()), len(numbers["rose"])
    if not rose:
        return f"m rose in none of {rows} rows: nothing to rescale"
    return f"m rose in {rose} of {rows} rows (orange): their l and O are rescaled"


def _range(values: np.ndarray) -> str:
    seen = values[np.isfinite(values)]  # -inf: no key yet
    return f"{seen.min():.2f} to {seen.max():.2f}"


def _buttons(words: str, options: tuple, value: Any) -> ToggleButtons:
    return ToggleButtons(
        options=[(str(option), option) for option in options],
        value=value,
        description=words,
        style={"button_width": "auto", "description_width": "initial"},
        layout=Layout(width="max-content", max_width="100%", margin="2px 16px 2px 0"),
    )
