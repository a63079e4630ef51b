"""`make bench`: LSH attention beside transformers' class and dense attention.

One text, 4 heads of 64 channels, float32, one thread, chunks of 64 tokens, two rounds of 2 length / chunk buckets, all
in one run; hashing and sorting are in the times. The projections of transformers' class are taken out, so that
attention is compared with attention.
"""

import gc
from functools import partial
from statistics import median
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention as TheirLSHSelfAttention

from effnlp_lessons.attention.lsh import draw_rotations, lsh_attention, lsh_buckets
from effnlp_lessons.measure import latencies, peak_memory

HEADS, D_HEAD, CHUNK, HASHES = 4, 64, 64, 2
RUNS = 9


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    gc.collect()


def inputs(length: int) -> torch.Tensor:
    return torch.randn(1, HEADS, length, D_HEAD, generator=torch.Generator().manual_seed(0))


def as_hidden(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def buckets_for(length: int) -> int:
    return 2 * length // CHUNK


def our_lsh(x: torch.Tensor, rotations: torch.Tensor, causal: bool, count_duplicates: bool = True) -> torch.Tensor:
    buckets = lsh_buckets(x, rotations)
    return lsh_attention(x, x, buckets=buckets, chunk=CHUNK, causal=causal, count_duplicates=count_duplicates)


def their_lsh(length: int, causal: bool) -> nn.Module:
    config = ReformerConfig(
        hidden_size=HEADS * D_HEAD, num_attention_heads=HEADS, attention_head_size=D_HEAD, num_hashes=HASHES,
        num_buckets=buckets_for(length), lsh_attn_chunk_length=CHUNK, is_decoder=causal,
        lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module = TheirLSHSelfAttention(config, 0).eval()
    module.query_key, module.value = nn.Identity(), nn.Identity()
    return module


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1_024, 4_096, 8_192])
def test_lsh_forward(length, causal):
    x = inputs(length)
    hidden = as_hidden(x)
    rotations = draw_rotations(HASHES, D_HEAD, buckets_for(length), torch.Generator().manual_seed(1))
    module = their_lsh(length, causal)
    calls = {
        "LSH, ours": partial(our_lsh, x, rotations, causal),
        "LSH, ours, each key once": partial(our_lsh, x, rotations, causal, count_duplicates=False),
        "transformers' Reformer": lambda: module(hidden),
        "dense, fused (torch's SDPA)": partial(F.scaled_dot_product_attention, x, x, x, is_causal=causal),
    }
    with torch.random.fork_rng():  # transformers draws its rotations from the global generator
        theirs = module(hidden)
        same = as_hidden(lsh_attention(x, x, buckets=theirs.buckets, chunk=CHUNK, causal=causal))
        if not causal:  # where no token is alone; float32 sums in another order
            torch.testing.assert_close(same, theirs.hidden_states, rtol=1e-4, atol=1e-4)
        times = latencies(calls, runs=RUNS)
        memory = {name: peak_memory(call) for name, call in calls.items()}
    print(f"\nLSH{', causal' * causal}, forward, {length:,} tokens: median of {RUNS} turns, ratio to ours")
    for name, timing in times.items():
        ratio = timing.median / times["LSH, ours"].median
        print(f"  {name:30} {timing!s:>26}   {ratio:5.2f} x   {memory[name] / 1e6:6.1f} MB")
    if length == 4_096:
        assert times["LSH, ours"].median <= 0.75 * times["transformers' Reformer"].median
    if length == 8_192 and not causal:  # the causal dense kernel leaves out half of the work
        assert times["LSH, ours"].median < times["dense, fused (torch's SDPA)"].median


def test_lsh_forward_and_backward():
    x = inputs(4_096).requires_grad_()
    hidden = as_hidden(x.detach()).requires_grad_()
    rotations = draw_rotations(HASHES, D_HEAD, buckets_for(4_096), torch.Generator().manual_seed(1))
    module = their_lsh(4_096, False)
    calls = {
        "LSH, ours": lambda: our_lsh(x, rotations, False).sum().backward(),
        "transformers' Reformer": lambda: module(hidden).hidden_states.sum().backward(),
        "dense, fused (torch's SDPA)": lambda: F.scaled_dot_product_attention(x, x, x).sum().backward(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.random.fork_rng():
        for turn in range(RUNS + 2):  # two turns warm up; `latencies` runs without gradients, so not with it
            for name, call in calls.items():
                start = perf_counter()
                call()
                if turn >= 2:
                    seconds[name].append(perf_counter() - start)
    medians = {name: median(values) for name, values in seconds.items()}
    print(f"\nLSH, forward and backward, 4,096 tokens: median of {RUNS} turns, ratio to ours")
    for name, value in medians.items():
        print(f"  {name:30} {1e3 * value:8.1f} ms   {value / medians['LSH, ours']:5.2f} x")
    assert medians["LSH, ours"] <= 0.75 * medians["transformers' Reformer"]
