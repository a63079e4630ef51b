"""Where a block's time and memory go as the text grows: the same parts as `measure.block_macs`, on the clock.

MiniLM-L6 has positions for 512 tokens; its block has no such limit, so it is timed alone, on random
vectors, far beyond. Attention's n² part is timed twice: written out (`dense_attention`, every score in
memory) and fused (torch's own kernel, which never keeps the scores).
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.measure import crossing, latencies, peak_memory
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.transformer import MINILM_L6, FeedForward, SelfAttention

PARTS = ("attention projections", "attention scores and mixing", "feed-forward")
FUSED = "scores and mixing, fused"


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Time one MiniLM block's parts at each of `setting["lengths"]`, `setting["runs"]` times (float32, batch 1).

    Numbers: "lengths" (tokens), and per part "seconds" (median of the runs) and "bytes" (peak memory).
    """
    generator = torch.Generator().manual_seed(seed)
    config = MINILM_L6
    attention, feed_forward = SelfAttention(config), FeedForward(config)
    names = [*PARTS, FUSED]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, list[int]] = {name: [] for name in names}
    for length in setting["lengths"]:
        x = torch.randn(1, length, config.d_model, generator=generator)
        with torch.no_grad():
            q, k, v = (
                attention.split_heads(project(x)) for project in (attention.query, attention.key, attention.value)
            )

        def projections(x=x) -> list:
            return [project(x) for project in (attention.query, attention.key, attention.value, attention.output)]

        calls = {
            PARTS[0]: projections,
            PARTS[1]: lambda q=q, k=k, v=v: dense_attention(q, k, v),
            PARTS[2]: lambda x=x: feed_forward(x),
            FUSED: lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
        }
        for name, timing in latencies(calls, runs=setting["runs"]).items():
            seconds[name].append(timing.median)
            memory[name].append(peak_memory(calls[name]))
    return Outcome({"lengths": list(setting["lengths"]), "seconds": seconds, "bytes": memory})


def seconds_by_run(summary: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Seconds of every part in every recorded run: `{part: [run][length]}`, the parts that cross first."""
    return {part: [run["seconds"][part] for run in summary["runs"]] for part in (*PARTS[1:], PARTS[0], FUSED)}


def times_by_part(summary: dict[str, Any]) -> dict[str, tuple[list, list, list, list]]:
    """The recorded times of the three parts for the cost explorer: (lengths, median, smallest, largest) of the runs."""
    lengths, times = summary["runs"][0]["lengths"], {}
    for part in PARTS:
        by_length = list(zip(*seconds_by_run(summary)[part], strict=True))
        times[part] = (lengths, *([pick(seconds) for seconds in by_length] for pick in (median, min, max)))
    return times


def crossings(summary: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Length (tokens) from which attention takes longer than the feed-forward.

    "written out" and "fused" are scores and mixing alone; "whole" adds the projections to the written-out
    ones. Each is (where the medians cross, the smallest and the largest crossing of a single run).

    Raises:
        ValueError: recorded curves that do not cross.
    """
    lengths, seconds, found = summary["runs"][0]["lengths"], seconds_by_run(summary), {}
    both = zip(seconds[PARTS[0]], seconds[PARTS[1]], strict=True)
    whole = [[a + b for a, b in zip(*run, strict=True)] for run in both]
    for name, attention in (("written out", seconds[PARTS[1]]), ("fused", seconds[FUSED]), ("whole", whole)):
        pairs = list(zip(attention, seconds["feed-forward"], strict=True))
        medians = [[median(at) for at in zip(*runs, strict=True)] for runs in (attention, seconds["feed-forward"])]
        runs = [crossing(lengths, *pair) for pair in pairs]
        middle = crossing(lengths, *medians)
        if middle is None or None in runs:
            raise ValueError(f"the recorded curves of {name!r} and the feed-forward do not cross in every run")
        found[name] = (middle, min(runs), max(runs))
    return found


STUDY = Study(
    name="cost_by_length",
    question="From which length does attention cost more time than the feed-forward, and how much memory?",
    run=run,
    recorded=({"lengths": [32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096], "runs": 9},),
    full=({"lengths": [2**i for i in range(5, 15)], "runs": 30},),
    seeds=(0, 1, 2, 3, 4),
    minutes=8,
    threads=1,
    timed=True,
)
