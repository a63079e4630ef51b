"""`make bench`: causal linear attention beside torch's fused softmax attention, and generation beside a KV cache.

One text, 4 heads of 64 channels, float32, one thread, all in one run. Times are the thread's own. Generation is one
attention layer with its projections; the cache has room to spare, so that softmax attention copies nothing.
"""

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from effnlp_lessons.attention.linear import LinearSelfAttention, causal_linear_attention, linear_attention
from effnlp_lessons.attention.performer import draw_projections, performer_attention
from effnlp_lessons.measure import peak_memory
from effnlp_lessons.studies.generation_cost import CACHE, CONFIG, LINEAR, TOKENS, token_calls
from effnlp_lessons.studies.pruning_costs import in_turns
from effnlp_lessons.transformer import SelfAttention, initialise_

HEADS, D_HEAD = 4, 64
RUNS = 9
OURS, SOFTMAX = "linear, causal", "softmax, causal, fused (torch's SDPA)"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    gc.collect()


def inputs(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, D_HEAD, generator=generator) for _ in "qkv"]


def print_table(title: str, times: dict, memory: dict | None = None) -> None:
    print(f"\n{title}: median of {RUNS} turns, ratio to ours")
    for name, timing in times.items():
        line = f"  {name:38} {timing!s:>26}   {timing.median / times[OURS].median:5.2f} x"
        print(line + (f"   {memory[name] / 1e6:6.1f} MB" if memory else ""))


@pytest.mark.parametrize("length", [1_024, 4_096, 8_192])
def test_forward(length):
    q, k, v = inputs(length)
    projections = draw_projections(128, D_HEAD, torch.Generator().manual_seed(0))
    calls = {
        OURS: partial(causal_linear_attention, q, k, v),
        SOFTMAX: partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
        "linear, not causal": partial(linear_attention, q, k, v),
        "Performer, 128 features, causal": partial(performer_attention, q, k, v, projections=projections, causal=True),
    }
    times = in_turns(calls, RUNS, seed=0)
    memory = {name: peak_memory(call) for name, call in calls.items()}
    print_table(f"forward, {length:,} tokens", times, memory)
    if length == 4_096:
        assert times[OURS].median <= 0.25 * times[SOFTMAX].median
    assert memory[OURS] <= 6 * q.nbytes  # some copies of the inputs, not a state for every token


def test_forward_and_backward():
    vectors = [x.requires_grad_() for x in inputs(4_096)]

    def call(attention):
        with torch.inference_mode(False), torch.enable_grad():
            torch.autograd.grad(attention(*vectors).sum(), vectors)

    calls = {
        OURS: partial(call, causal_linear_attention),
        SOFTMAX: partial(call, partial(F.scaled_dot_product_attention, is_causal=True)),
    }
    times = in_turns(calls, RUNS, seed=0)
    print_table("forward and backward, 4,096 tokens", times)
    assert times[OURS].median <= 0.5 * times[SOFTMAX].median


def test_a_token_costs_the_same_after_any_context_and_more_and_more_with_a_cache():
    dense, linear = SelfAttention(CONFIG, causal=True).eval(), LinearSelfAttention(CONFIG, causal=True).eval()
    generator = torch.Generator().manual_seed(0)
    for layer in (dense, linear):
        initialise_(layer, generator)
    calls, kept = {}, {}
    for length in (128, 1_024, 8_192):
        x = torch.randn(1, length + TOKENS, CONFIG.d_model, generator=generator)
        forms, sizes = token_calls(dense, linear, x[:, :length], x[:, length:])
        for form in (LINEAR, CACHE):
            calls[form, length], kept[form, length] = forms[form], sizes[form]
    times = in_turns(calls, RUNS, seed=0)
    print(f"\n{TOKENS} tokens after a context: median of {RUNS} turns, bytes kept")
    for (form, length), timing in times.items():
        print(f"  {form:28} {length:6,} {timing!s:>26}   {kept[form, length]:12,}")
    ours, theirs = ([times[form, n].median for n in (128, 1_024, 8_192)] for form in (LINEAR, CACHE))
    assert max(ours) <= 1.5 * min(ours)
    assert theirs[2] >= 3 * theirs[0] and theirs[2] >= 2 * ours[2]
