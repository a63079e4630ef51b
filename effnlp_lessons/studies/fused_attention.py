"""Attention in one fused kernel and in separate steps, on a CPU: time, and the memory that the steps write down.

Forms of softmax(Q K^T / sqrt(d)) V: torch's fused kernel for CPUs, which works in tiles with an online softmax and
keeps one number a query for the backward pass (FlashAttention's algorithm); separate steps, which write the length x
length matrices to memory, as torch's "math" backend and as the course's `dense_attention`; and `flash.tiled_attention`,
tiles in plain PyTorch, which writes no such matrix but pays Python for every tile. Forward, and forward with backward;
full and causal. A fourth part, forward only: causal attention with a sliding window through compiled FlexAttention,
which skips the tiles that no query sees, beside the fused kernel with the same window as a mask.

One text, 4 heads of 64 channels, float32, one thread, whose own time is taken. Memory is what torch's allocator held at
most, beyond the inputs.

NOTE torch's separate steps do more than the textbook's, to be safe for rows without any key. For full attention
`dense_attention` is the faster of the two, and the rival that counts.
NOTE float32 only: with bfloat16 torch's separate steps compute in float32, and a ratio would compare two precisions.
NOTE FlexAttention has no backward pass on a CPU, and compiling it takes a C++ compiler: without one "not available".
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from effnlp_lessons.attention.flash import tiled_attention
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.measure import peak_memory
from effnlp_lessons.studies.pruning_costs import in_turns
from effnlp_lessons.studies.runner import Outcome, Study

HEADS, D_HEAD = 4, 64
TILE = 256  # rows and keys of a tile in plain PyTorch; smaller ones take longer, since each costs a dozen Python calls

FUSED, OURS = "fused kernel", "tiles in plain PyTorch"
UNFUSED, DENSE = "separate steps, torch's", "separate steps, dense_attention"
FLEX, MASKED = "FlexAttention, compiled", "fused kernel, window as a mask"
CAUSAL_ONLY = "fused kernel, causal, no window"
NOT_AVAILABLE = "not available"

FORWARD, BOTH = "forward", "forward and backward"
WINDOW = "forward, window"  # the column of the sliding window
COLUMNS = tuple(f"{part}, {mask}" for part in (FORWARD, BOTH) for mask in ("full", "causal"))

Vectors = Float[Tensor, "1 heads length d_head"]


# -------------------------------------------------------------------------------------------- the calls


def fused_attention(q: Vectors, k: Vectors, v: Vectors, causal: bool = False) -> Vectors:
    """torch's fused kernel, and an error instead of another backend."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def unfused_attention(q: Vectors, k: Vectors, v: Vectors, causal: bool = False) -> Vectors:
    """Scores, softmax and mixing one after the other, by the same library."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def plain_tiles(q: Vectors, k: Vectors, v: Vectors, causal: bool = False) -> Vectors:
    """`flash.tiled_attention` with tiles of `TILE`."""
    return tiled_attention(q, k, v, causal=causal, block_queries=TILE, block_keys=TILE)


FORMS = {FUSED: fused_attention, UNFUSED: unfused_attention, DENSE: dense_attention, OURS: plain_tiles}


def inputs(length: int, seed: int) -> list[Vectors]:
    """Queries, keys and values: standard normal, of which gradients can be asked."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, HEADS, length, D_HEAD, generator=generator).requires_grad_() for _ in range(3)]


def gradients(attention: Callable[..., Tensor], vectors: list[Vectors]) -> tuple[Tensor, ...]:
    """Forward and backward: gradients of the output's sum, also inside `inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        return torch.autograd.grad(attention(*vectors).sum(), vectors)


def calls_of(column: str, length: int, seed: int) -> dict[str, Callable[[], Any]]:
    """{form: a call} for a column of `COLUMNS`.

    Raises:
        ValueError: another column.
    """
    if column not in COLUMNS:
        raise ValueError(f"column must be one of {COLUMNS}, got {column!r}")
    part, mask = column.split(", ")
    vectors = inputs(length, seed)
    calls = {}
    for form, attention in FORMS.items():
        attention = partial(attention, causal=mask == "causal")
        calls[form] = partial(attention, *vectors) if part == FORWARD else partial(gradients, attention, vectors)
    return calls


def has_compiler() -> bool:
    """Whether a C++ compiler is there, which torch.compile needs on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


def sliding_window(length: int, window: int) -> Float[Tensor, "length length"]:
    """What is added to the scores: 0 where query i sees key j, that is i - window <= j <= i, elsewhere -inf.

    In float32, as the fused kernel takes it; a mask of booleans is converted at every call, which takes a fifth more.
    """
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return torch.zeros(length, length).masked_fill((distance < 0) | (distance > window), -math.inf)


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention through torch.compile, or an error; every length is compiled by itself, some seconds each."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@cache
def block_mask_of(length: int, window: int) -> BlockMask:
    """The same window for FlexAttention. One object for all seeds: another would be compiled again."""
    return create_block_mask(lambda b, h, i, j: (i >= j) & (i - j <= window), None, None, length, length, device="cpu")


def window_calls(length: int, window: int, seed: int) -> dict[str, Callable[[], Vectors]]:
    """{form: a call} for causal attention to the last `window` keys and oneself.

    Masks are made beforehand, and are inputs: the fused kernel's holds 4 length^2 bytes.
    """
    q, k, v = (x.detach() for x in inputs(length, seed))
    mask = sliding_window(length, window)

    def masked() -> Vectors:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    tiles = {"causal": True, "window": window, "block_queries": TILE, "block_keys": TILE}
    calls = {
        MASKED: masked,
        CAUSAL_ONLY: partial(fused_attention, q, k, v, causal=True),
        OURS: partial(tiled_attention, q, k, v, **tiles),
    }
    if has_compiler():
        calls[FLEX] = partial(compiled_flex(), q, k, v, block_mask=block_mask_of(length, window))
    return calls


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Time everything in turns at each of `setting["lengths"]`, `setting["runs"]` rounds, on one thread.

    Numbers: "seconds", {column: {form: [[median, lower quartile, upper quartile] at each length]}}, and "bytes",
    {column: {form: [largest number of bytes held at each length]}}, for the columns of `COLUMNS`; with
    `setting["window"]`, a number of keys, also for `WINDOW`, where FlexAttention may be "not available".
    """
    window = setting["window"]
    seconds: dict[str, dict[str, list]] = {}
    peaks: dict[str, dict[str, list[int]]] = {}

    def add(column: str, calls: Mapping[str, Callable[[], Any]]) -> None:
        timed = in_turns(calls, setting["runs"], seed, warmup=1)
        for form, timing in timed.items():
            times = [round(t, 7) for t in (timing.median, timing.low, timing.high)]
            seconds.setdefault(column, {}).setdefault(form, []).append(times)
            peaks.setdefault(column, {}).setdefault(form, []).append(peak_memory(calls[form]))

    for length in setting["lengths"]:
        for column in COLUMNS:
            add(column, calls_of(column, length, seed))
        if window is not None:
            add(WINDOW, window_calls(length, window, seed))
    if window is not None and FLEX not in seconds[WINDOW]:
        seconds[WINDOW][FLEX] = peaks[WINDOW][FLEX] = NOT_AVAILABLE
    return Outcome({"seconds": seconds, "bytes": peaks})


# ------------------------------------------------------------------------------------- what was recorded


def runs_of(summary: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    """The runs, each with this column.

    Raises:
        ValueError: a column that was not recorded.
    """
    runs = summary["runs"]
    if column not in runs[0]["seconds"]:
        raise ValueError(f"column must be one of {sorted(runs[0]['seconds'])}, got {column!r}")
    return runs


def lengths_of(summary: Mapping[str, Any]) -> list[int]:
    """The lengths that were measured."""
    return summary["runs"][0]["setting"]["lengths"]


def available(rows: Any) -> bool:
    """Whether a form was measured."""
    return rows != NOT_AVAILABLE


def seconds_of(summary: Mapping[str, Any], column: str) -> dict[str, list[float]]:
    """{form: seconds at each length}, the median of the runs' medians; without forms that were not available."""
    runs = [run["seconds"][column] for run in runs_of(summary, column)]
    return {
        form: [median(run[form][i][0] for run in runs) for i in range(len(rows))]
        for form, rows in runs[0].items()
        if all(available(run[form]) for run in runs)
    }


def bytes_of(summary: Mapping[str, Any], column: str) -> dict[str, list[int]]:
    """{form: most bytes held at each length}, the largest of the runs; without forms that were not available."""
    runs = [run["bytes"][column] for run in runs_of(summary, column)]
    return {
        form: [max(run[form][i] for run in runs) for i in range(len(rows))]
        for form, rows in runs[0].items()
        if all(available(run[form]) for run in runs)
    }


def ratios(
    summary: Mapping[str, Any], column: str, form: str, to: str, to_column: str | None = None
) -> list[tuple[float, float, float]]:
    """At each length, how many times as long as `to` a form takes: (median of the runs, smallest, largest).

    Both are of one run. `to` is in `to_column`, by default in the same column.

    Raises:
        ValueError: what was not recorded or not available.
    """
    found = []
    for run in runs_of(summary, column):
        first, second = run["seconds"][column].get(form, NOT_AVAILABLE), run["seconds"][to_column or column].get(to)
        if not available(first) or second is None or not available(second):
            raise ValueError(f"{form!r} and {to!r} must have been recorded for {column!r}")
        found.append([a[0] / b[0] for a, b in zip(first, second, strict=True)])
    return [(median(values), min(values), max(values)) for values in zip(*found, strict=True)]


def exponent(lengths: list[int], values: list[float]) -> float:
    """p of values ~ length^p between the last two lengths: 1 is linear, 2 quadratic."""
    return math.log(values[-1] / values[-2]) / math.log(lengths[-1] / lengths[-2])


LENGTHS = [256, 512, 1_024, 2_048, 4_096]
# a few seconds, for a notebook
LIVE = {"lengths": [256, 1_024], "runs": 3, "window": None}
STUDY = Study(
    name="fused_attention",
    question="What does one fused kernel save of attention's time and memory on a CPU, and what do skipped tiles save?",
    run=run,
    recorded=({"lengths": LENGTHS, "runs": 4, "window": 256},),
    full=({"lengths": [*LENGTHS, 8_192], "runs": 15, "window": 256},),
    seeds=(0, 1, 2),
    minutes=8,
    threads=1,
    timed=True,
)
