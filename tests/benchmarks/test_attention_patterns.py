"""`make bench`: sliding window and BigBird beside dense attention, compiled flex_attention and transformers' classes.

One text, 4 heads of 64 channels, float32, one thread, windows of 128 tokens to each side, all in one run. The
projections of transformers' classes are taken out, so that attention is compared with attention. Without the
allocator settings of `make bench` the C library returns large buffers to the system at every step, which costs
all of them time, transformers' most. transformers' BigBird also fills a table of all n x n probabilities in
every pass; that is in its time.
"""

import gc
import shutil
from functools import partial
from statistics import median
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import BigBirdConfig, BigBirdModel, LongformerConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from effnlp_lessons.attention.bigbird import bigbird_attention
from effnlp_lessons.attention.longformer import window_attention
from effnlp_lessons.measure import latencies, peak_memory

HEADS, D_HEAD, WINDOW, BLOCK = 4, 64, 128, 64
RUNS = 9


class Untouched(nn.Module):
    """Stands for a projection; a new tensor, since transformers' Longformer changes its queries in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def without_projections(module: nn.Module) -> nn.Module:
    module.query, module.key, module.value = Untouched(), Untouched(), Untouched()
    return module


def inputs(length: int) -> list[torch.Tensor]:
    return list(torch.randn(3, 1, HEADS, length, D_HEAD, generator=torch.Generator().manual_seed(0)).unbind())


def as_hidden(x: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values are the same vectors there: (1, length, channels)."""
    return x.transpose(1, 2).flatten(2)


def longformer_call(x: torch.Tensor):
    config = LongformerConfig(
        hidden_size=HEADS * D_HEAD, num_attention_heads=HEADS, attention_window=[2 * WINDOW], num_hidden_layers=1
    )
    module = without_projections(LongformerSelfAttention(config, 0)).eval()
    hidden, nothing = as_hidden(x), torch.zeros(1, x.shape[2])
    no = nothing > 0
    return lambda hidden=hidden: module(
        hidden, attention_mask=nothing, is_index_masked=no, is_index_global_attn=no, is_global_attn=False
    )[0]


def bigbird_call(x: torch.Tensor):
    config = BigBirdConfig(hidden_size=HEADS * D_HEAD, num_attention_heads=HEADS, block_size=BLOCK, num_random_blocks=3)
    module = without_projections(BigBirdBlockSparseAttention(config, seed=0)).eval()
    blocked, band, row, column = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, x.shape[2]), BLOCK)
    hidden = as_hidden(x)
    return lambda: module(hidden, band, row, column, blocked, blocked)[0]


def print_table(title: str, times: dict, ours: str, memory: dict | None = None) -> None:
    print(f"\n{title}: median of {RUNS} turns, ratio to ours")
    for name, timing in times.items():
        line = f"  {name:30} {timing!s:>26}   {timing.median / times[ours].median:5.2f} x"
        print(line + (f"   {memory[name] / 1e6:6.1f} MB" if memory else ""))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    gc.collect()


@pytest.mark.parametrize("length", [1_024, 2_048, 4_096, 8_192])
def test_sliding_window_forward(length):
    q, k, v = inputs(length)
    ours = "window, ours"
    calls = {
        ours: partial(window_attention, q, k, v, window=WINDOW),
        "transformers' Longformer": longformer_call(q),
        "dense, fused (torch's SDPA)": partial(F.scaled_dot_product_attention, q, k, v),
    }
    if length == 4_096 and shutil.which("g++"):  # compiling takes a minute
        block_mask = create_block_mask(
            lambda batch, head, i, j: (i - j).abs() <= WINDOW, None, None, length, length, device="cpu"
        )
        compiled = torch.compile(flex_attention, dynamic=False)
        calls["flex_attention, compiled"] = partial(compiled, q, k, v, block_mask=block_mask)
        # float32 sums in another order
        torch.testing.assert_close(calls["flex_attention, compiled"](), calls[ours](), rtol=1e-4, atol=1e-4)
    same = window_attention(q, q, q, window=WINDOW)
    # the same: float32 sums in another order
    torch.testing.assert_close(as_hidden(same), calls["transformers' Longformer"](), rtol=1e-4, atol=1e-4)
    times = latencies(calls, runs=RUNS)
    memory = {name: peak_memory(call) for name, call in calls.items()}
    print_table(f"sliding window, forward, {length:,} tokens", times, ours, memory)
    if length >= 2_048:
        assert times[ours].median < times["dense, fused (torch's SDPA)"].median
    if length == 4_096:
        assert times[ours].median <= 0.6 * times["transformers' Longformer"].median
        if "flex_attention, compiled" in times:
            assert times[ours].median <= times["flex_attention, compiled"].median
    if length == 8_192:
        assert memory[ours] < 60e6


def test_sliding_window_forward_and_backward():
    q, k, v = (x.requires_grad_() for x in inputs(4_096))
    hidden = as_hidden(q.detach()).requires_grad_()
    theirs = longformer_call(q.detach())
    calls = {
        "window, ours": lambda: window_attention(q, k, v, window=WINDOW).sum().backward(),
        "transformers' Longformer": lambda: theirs(hidden).sum().backward(),
        "dense, fused (torch's SDPA)": lambda: F.scaled_dot_product_attention(q, k, v).sum().backward(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(RUNS + 2):  # two turns warm up; `latencies` runs without gradients, so not with it
        for name, call in calls.items():
            start = perf_counter()
            call()
            if turn >= 2:
                seconds[name].append(perf_counter() - start)
    medians = {name: median(values) for name, values in seconds.items()}
    print(f"\nsliding window, forward and backward, 4,096 tokens: median of {RUNS} turns, ratio to ours")
    for name, value in medians.items():
        print(f"  {name:30} {1e3 * value:8.1f} ms   {value / medians['window, ours']:5.2f} x")
    assert medians["window, ours"] <= 0.6 * medians["transformers' Longformer"]


@pytest.mark.parametrize("length", [1_024, 4_096])
def test_bigbird_forward(length):
    q, k, v = inputs(length)
    ours = "BigBird, ours"
    calls = {
        ours: partial(bigbird_attention, q, k, v, block=BLOCK, random_blocks=3),
        "transformers' BigBird": bigbird_call(q),
        "dense, fused (torch's SDPA)": partial(F.scaled_dot_product_attention, q, k, v),
    }
    times = latencies(calls, runs=RUNS)
    memory = {name: peak_memory(call) for name, call in calls.items()}
    print_table(f"BigBird, forward, {length:,} tokens", times, ours, memory)
    if length == 4_096:
        assert times[ours].median <= 0.8 * times["transformers' BigBird"].median
