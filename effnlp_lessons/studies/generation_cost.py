"""What one more token costs after a context of n tokens: linear attention's state beside softmax attention.

One attention layer with its projections, batch 1, float32, one thread. Softmax attention in three ways: a cache of
keys and values with room to spare, to which a token adds one row; the cache of the course's own decoder, which copies
all rows to add one; and everything computed again, which is what generation without any cache does. The comparison
that counts is with the first of them. Beside it the time of attention alone over a whole text, as in training or in
reading a prompt. Times are the thread's own, so that other work on the machine is not in them; each is a mean over a
few tokens in a row, and the layer's weights and small states stay in the processor's caches meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from effnlp_lessons.attention.linear import LinearSelfAttention, causal_linear_attention, linear_attention
from effnlp_lessons.measure import crossing
from effnlp_lessons.studies.pruning_costs import in_turns
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.transformer import SelfAttention, TransformerConfig, initialise_

CONFIG = TransformerConfig(max_length=0, d_model=256, heads=4)
TOKENS = 16  # in a row, for one time; computing everything again is timed for one token

LINEAR, CACHE = "linear, its state", "softmax, keys and values kept"
COPIED, AGAIN = "softmax, keys and values copied", "softmax, everything again"
CAUSAL_LINEAR, CAUSAL_SOFTMAX = "linear, causal", "softmax, causal, fused"
BOTH_WAYS = "linear, not causal"

Tokens = Float[Tensor, "1 length d_model"]


# ------------------------------------------------------------------------------------- four ways to go on


def one_by_one(layer: SelfAttention, state: Any, new: Tokens) -> Tokens:
    """The layer's outputs for tokens that come one at a time, with the state that the layer itself keeps."""
    outputs = []
    for x in new.split(1, dim=1):
        y, state = layer(x, None, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def heads_of(layer: SelfAttention, x: Tokens) -> list[Float[Tensor, "1 heads length d_head"]]:
    """Queries, keys and values."""
    return [layer.split_heads(project(x)) for project in (layer.query, layer.key, layer.value)]


def with_room(keys: Tensor, values: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """A cache: the earlier keys and values, and room for those of further tokens."""
    return tuple(F.pad(x, (0, 0, 0, tokens)) for x in (keys, values))


def with_cache_(layer: SelfAttention, keys: Tensor, values: Tensor, new: Tokens) -> Tokens:
    """The same for softmax attention with a cache of `with_room`, whose last rows are filled in place."""
    outputs, end = [], keys.shape[2] - new.shape[1]
    for x in new.split(1, dim=1):
        q, keys[:, :, end : end + 1], values[:, :, end : end + 1] = heads_of(layer, x)
        end += 1
        mixed = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end])
        outputs.append(layer.output(mixed.transpose(1, 2).flatten(2)))
    return torch.cat(outputs, dim=1)


def everything_again(layer: SelfAttention, whole: Tokens) -> Tokens:
    """The last token's output from the whole text; all others are computed too, as every layer but the last must."""
    mixed = F.scaled_dot_product_attention(*heads_of(layer, whole), is_causal=True)
    return layer.output(mixed.transpose(1, 2).flatten(2))[:, -1:]


def token_calls(
    dense: SelfAttention, linear: LinearSelfAttention, context: Tokens, new: Tokens
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    """{form: a call that gives the outputs for `new` after `context`} and {form: bytes kept of the context}.

    `AGAIN` gives the first new token's output alone, and keeps the tokens' ids, 8 bytes each.
    """
    with torch.inference_mode():
        _, state = linear(context)
        _, *cache = heads_of(dense, context)
        cache = [x.contiguous() for x in cache]
        room = with_room(*cache, new.shape[1])
    calls = {
        LINEAR: partial(one_by_one, linear, state, new),
        CACHE: partial(with_cache_, dense, *room, new),
        COPIED: partial(one_by_one, dense, tuple(cache), new),
        AGAIN: partial(everything_again, dense, torch.cat([context, new[:, :1]], dim=1)),
    }
    state_bytes, cache_bytes = (sum(x.numel() * x.itemsize for x in kept) for kept in (state, cache))
    return calls, {LINEAR: state_bytes, CACHE: cache_bytes, COPIED: cache_bytes, AGAIN: 8 * context.shape[1]}


def whole_calls(length: int, generator: torch.Generator) -> dict[str, Callable[[], Tensor]]:
    """{form: attention over a whole text}, without projections."""
    q, k, v = torch.randn(3, 1, CONFIG.heads, length, CONFIG.d_head, generator=generator)
    return {
        CAUSAL_LINEAR: partial(causal_linear_attention, q, k, v),
        CAUSAL_SOFTMAX: partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
        BOTH_WAYS: partial(linear_attention, q, k, v),
    }


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Time everything at each of `setting["lengths"]`, `setting["runs"]` rounds in turns.

    Numbers: "token", {form: seconds for one more token}; "bytes", {form: bytes kept of the context}; "whole",
    {form: seconds of attention over a text}: each a list as long as "lengths", seconds as
    [median, lower quartile, upper quartile].
    """
    generator = torch.Generator().manual_seed(seed)
    dense, linear = SelfAttention(CONFIG, causal=True).eval(), LinearSelfAttention(CONFIG, causal=True).eval()
    for layer in (dense, linear):
        initialise_(layer, generator)
    columns: dict[str, dict[str, list]] = {"token": {}, "bytes": {}, "whole": {}}

    def add(column: str, calls: dict[str, Callable[[], Tensor]]) -> None:
        for form, timing in in_turns(calls, setting["runs"], seed, warmup=1).items():
            tokens = TOKENS if column == "token" and form != AGAIN else 1
            times = [round(t / tokens, 8) for t in (timing.median, timing.low, timing.high)]
            columns[column].setdefault(form, []).append(times)

    for length in setting["lengths"]:
        x = torch.randn(1, length + TOKENS, CONFIG.d_model, generator=generator)
        calls, kept = token_calls(dense, linear, x[:, :length], x[:, length:])
        add("token", calls)
        for form, size in kept.items():
            columns["bytes"].setdefault(form, []).append(size)
        add("whole", whole_calls(length, generator))
    return Outcome({"lengths": list(setting["lengths"])} | columns)


# ------------------------------------------------------------------------------------- what was recorded


def seconds_of(summary: Mapping[str, Any], column: str) -> dict[str, list[float]]:
    """{form: seconds at each length}, the median of the runs' medians; `column` is "token" or "whole".

    Raises:
        ValueError: another column.
    """
    if column not in ("token", "whole"):
        raise ValueError(f'column must be "token" or "whole", got {column!r}')
    runs = [run[column] for run in summary["runs"]]
    return {form: [median(run[form][i][0] for run in runs) for i in range(len(runs[0][form]))] for form in runs[0]}


def ratios(summary: Mapping[str, Any], column: str, form: str, to: str) -> list[tuple[float, float, float]]:
    """At each length, how many times as long as `to` a form takes: (median of the runs, smallest, largest)."""
    runs = [run[column] for run in summary["runs"]]
    found = []
    for i in range(len(summary["runs"][0]["lengths"])):
        values = [run[form][i][0] / run[to][i][0] for run in runs]
        found.append((median(values), min(values), max(values)))
    return found


def linear_wins_from(summary: Mapping[str, Any], column: str, form: str, linear: str) -> float | None:
    """Length in tokens from which `form` takes longer than `linear` (see `measure.crossing`)."""
    seconds = seconds_of(summary, column)
    return crossing(summary["runs"][0]["lengths"], seconds[form], seconds[linear])


LENGTHS = [2**i for i in range(7, 14)]
# a few seconds, for a notebook
LIVE = {"lengths": [128, 512, 2_048], "runs": 5}
STUDY = Study(
    name="generation_cost",
    question="What does one more token cost, in time and memory, with linear attention and with a softmax and a cache?",
    run=run,
    recorded=({"lengths": LENGTHS, "runs": 25},),
    full=({"lengths": [*LENGTHS, 16_384, 32_768], "runs": 50},),
    seeds=(0, 1, 2),
    minutes=2,
    threads=1,
    timed=True,
)
