"""Time and memory of each pattern's fast path against the length, beside dense attention, on one thread.

Dense attention is timed as torch's fused kernel, which never keeps the scores, and written out, which does.
Each fast path runs forward, and forward with backward. Four heads of 64 channels, batch 1, float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effnlp_lessons.attention.bigbird import bigbird_attention
from effnlp_lessons.attention.blockwise import blockwise_attention, shifted_permutations
from effnlp_lessons.attention.local import local_attention
from effnlp_lessons.attention.longformer import window_attention
from effnlp_lessons.attention.sparse_transformer import fixed_attention, strided_attention
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.measure import latencies, peak_memory
from effnlp_lessons.studies.runner import Outcome, Study

HEADS, D_HEAD = 4, 64
FUSED, WRITTEN_OUT = "dense, fused", "dense, written out"

SETTINGS = {  # of `methods`, in words
    "window": "128 tokens to each side",
    "dilated": "128 steps of two to each side",
    "own block": "blocks of 256",
    "local": "blocks of 128, 64 more at each side",
    "strided": "a stride of the square root",
    "fixed": "a stride of the square root",
    "BigBird": "blocks of 64, three random ones",
}


def methods(length: int) -> dict[str, Callable[..., Tensor]]:
    """The timed methods for one length: windows and blocks of fixed size, strides of about the square root."""
    stride = round(length**0.5)
    blocks = max(1, length // 256)
    return {
        FUSED: F.scaled_dot_product_attention,
        WRITTEN_OUT: dense_attention,
        "window": partial(window_attention, window=128),
        "dilated": partial(window_attention, window=128, dilation=2),
        "own block": partial(blockwise_attention, permutations=shifted_permutations(HEADS, blocks, HEADS)),
        "local": partial(local_attention, block=128, flange=64),
        "strided": partial(strided_attention, stride=stride),
        "fixed": partial(fixed_attention, stride=stride, summary=1),
        "BigBird": partial(bigbird_attention, block=64, random_blocks=3),
    }


def forward_and_backward_seconds(method: Callable[..., Tensor], inputs: list[Tensor], runs: int) -> float:
    """Median wall-clock seconds of one call with its gradients."""
    inputs, seconds = [x.clone().requires_grad_() for x in inputs], []
    for turn in range(runs + 1):
        start = perf_counter()
        torch.autograd.grad(method(*inputs).sum(), inputs)
        if turn > 0:  # the first warms up
            seconds.append(perf_counter() - start)
    return median(seconds)


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Time every method at each of `setting["lengths"]`. Dense written out stops at `setting["written_out"]` tokens.

    Numbers: "lengths" (tokens); per method "seconds" (forward, median), "backward" (with backward, median) and
    "bytes" (peak memory, forward), each a list as long as "lengths", None where a method was left out.
    """
    generator = torch.Generator().manual_seed(seed)
    columns: dict[str, dict[str, list]] = {"seconds": {}, "backward": {}, "bytes": {}}
    for length in setting["lengths"]:
        inputs = torch.randn(3, 1, HEADS, length, D_HEAD, generator=generator).unbind()
        chosen = methods(length)
        if length > setting["written_out"]:
            del chosen[WRITTEN_OUT]
        calls = {name: partial(method, *inputs) for name, method in chosen.items()}
        timings = latencies(calls, runs=setting["runs"], warmup=1)
        for name in methods(length):
            there = name in chosen
            row = {
                "seconds": timings[name].median if there else None,
                "backward": forward_and_backward_seconds(chosen[name], list(inputs), setting["runs"])
                if there
                else None,
                "bytes": peak_memory(calls[name]) if there else None,
            }
            for column, value in row.items():
                columns[column].setdefault(name, []).append(value)
    return Outcome({"lengths": list(setting["lengths"])} | columns)


def times_in_words(summary: dict[str, Any], length: int) -> dict[str, str]:
    """What the pattern explorer says of each pattern's recorded time, with the setting it was timed at (medians)."""
    at = summary["runs"][0]["lengths"].index(length)
    dense, *others = (1e3 * median(run["seconds"][name][at] for run in summary["runs"]) for name in (FUSED, *SETTINGS))
    return {
        name: f"Recorded at {length:,} tokens with {words}: {own:.0f} ms, fused dense {dense:.0f} ms."
        for (name, words), own in zip(SETTINGS.items(), others, strict=True)
    }


STUDY = Study(
    name="pattern_speed",
    question="From which length is each pattern faster than dense attention, and what memory does it take?",
    run=run,
    recorded=({"lengths": [256, 512, 1024, 2048, 4096, 8192], "runs": 5, "written_out": 2048},),
    full=({"lengths": [2**i for i in range(8, 16)], "runs": 15, "written_out": 4096},),
    seeds=(0, 1, 2),
    minutes=6,
    threads=1,
    timed=True,
)
