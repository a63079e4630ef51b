"""What holds for every pattern: its fast path equals dense attention under its mask, and keeps the course's rules.

A new pattern adds one row to `METHODS`. Settings are drawn by hypothesis, so that lengths shorter than a block,
lengths that are no multiple, padding and fully padded texts all occur.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effnlp_lessons.attention.bigbird import bigbird_attention, bigbird_mask, random_plan
from effnlp_lessons.attention.blockwise import blockwise_attention, blockwise_mask
from effnlp_lessons.attention.local import local_attention, local_mask
from effnlp_lessons.attention.longformer import window_attention, window_mask
from effnlp_lessons.attention.sparse_transformer import (
    fixed_attention,
    fixed_masks,
    head_masks,
    strided_attention,
    strided_masks,
)
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.transformer import Decoder, Encoder, TransformerConfig

HEADS = 3
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Case(NamedTuple):
    """One draw of a method's settings: the fast path, and its definition for a number of tokens."""

    attention: Callable[..., Tensor]
    mask: Callable[[int], Tensor]
    causal: bool = False


def small(largest: int, smallest: int = 1) -> st.SearchStrategy[int]:
    return st.integers(smallest, largest)


@st.composite
def window(draw) -> Case:
    chosen = {"window": draw(small(9, 0)), "dilation": draw(small(4)), "causal": draw(st.booleans())}
    return Case(partial(window_attention, **chosen), partial(window_mask, **chosen), chosen["causal"])


@st.composite
def window_dilated_by_head(draw) -> Case:
    size, gaps = draw(small(6, 0)), tuple(draw(small(3)) for _ in range(HEADS))
    return Case(
        partial(window_attention, window=size, dilation=gaps),
        lambda length: torch.stack([window_mask(length, size, gap) for gap in gaps]),
    )


@st.composite
def blockwise(draw) -> Case:
    blocks = draw(small(4))
    orders = torch.tensor([draw(st.permutations(range(blocks))) for _ in range(HEADS)])
    return Case(partial(blockwise_attention, permutations=orders), lambda length: blockwise_mask(length, orders))


@st.composite
def local(draw) -> Case:
    chosen = {"block": draw(small(9)), "flange": draw(small(11, 0)), "causal": draw(st.booleans())}
    return Case(partial(local_attention, **chosen), partial(local_mask, **chosen), chosen["causal"])


@st.composite
def strided(draw) -> Case:
    own = {"stride": draw(small(9)), "window": draw(st.sampled_from(["paper", "code"]))}
    heads = {"combine": draw(combinations), "layer": draw(small(3, 0))}
    return Case(
        partial(strided_attention, **own, **heads),
        lambda length: head_masks(strided_masks(length, **own), HEADS, **heads),
        True,
    )


@st.composite
def fixed(draw) -> Case:
    stride = draw(small(9))
    own = {"stride": stride, "summary": draw(small(stride))}
    heads = {"combine": draw(combinations), "layer": draw(small(3, 0))}
    return Case(
        partial(fixed_attention, **own, **heads),
        lambda length: head_masks(fixed_masks(length, **own), HEADS, **heads),
        True,
    )


@st.composite
def bigbird(draw) -> Case:
    block, count, seed = draw(small(5)), draw(small(3)), draw(small(9, 0))

    def mask(length: int) -> Tensor:
        return bigbird_mask(length, block, random_plan(HEADS, -(-length // block), count, seed))

    return Case(partial(bigbird_attention, block=block, random_blocks=count, seed=seed), mask)


combinations = st.sampled_from(["merged", "multi-head", "interleaved"])
METHODS = {
    "window": window(),
    "window, dilated by head": window_dilated_by_head(),
    "blockwise": blockwise(),
    "local": local(),
    "strided": strided(),
    "fixed": fixed(),
    "BigBird": bigbird(),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
lengths = st.integers(1, 40)


def draw_inputs(length: int, padding: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """q, k, v that are not contiguous, and a mask: "none", "end", "anywhere" or "a whole text"."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, length, HEADS, 5, generator=generator, dtype=dtype).transpose(2, 3)
    if padding == "none":
        return q, k, v, None
    real = torch.arange(length) < torch.randint(1, length + 1, (2, 1), generator=generator)
    if padding == "anywhere":
        real = real[:, torch.randperm(length, generator=generator)]
    if padding == "a whole text":
        real[1] = False
    return q, k, v, real


def defined(case: Case, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """Dense attention under the mask, and zeros at padded positions."""
    output = dense_attention(q, k, v, real, attention_mask=case.mask(q.shape[2]))
    return output if real is None else output * real[:, None, :, None]


@every_method
@given(
    data=st.data(),
    length=lengths,
    padding=st.sampled_from(["none", "end", "anywhere", "a whole text"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_fast_path_and_gradients_equal_the_definition(method, data, length, padding, dtype, seed):
    case = data.draw(method)
    *vectors, real = draw_inputs(length, padding, dtype, seed)
    direction = torch.randn(vectors[0].shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + 1))
    results = []
    for path in (case.attention, partial(defined, case)):
        inputs = [x.detach().clone().requires_grad_() for x in vectors]
        output = path(*inputs, real)
        results.append([output, *torch.autograd.grad((output * direction).sum(), inputs)])
    for fast, truth in zip(*results, strict=True):
        assert fast.shape == truth.shape and fast.dtype == dtype
        torch.testing.assert_close(fast, truth, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@every_method
@given(data=st.data(), length=lengths)
@settings(max_examples=20, deadline=None)
def test_what_stands_in_padding_changes_nothing_and_gets_zeros(method, data, length):
    attention = data.draw(method).attention
    *vectors, real = draw_inputs(length, "anywhere", torch.float32, length)
    before = attention(*vectors, real)
    assert not before.transpose(1, 2)[~real].any()
    for x in vectors:
        x.transpose(1, 2)[~real] = 1e4
    assert torch.equal(attention(*vectors, real), before)


@every_method
@given(data=st.data(), length=st.integers(2, 40), where=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_a_causal_pattern_cannot_see_the_future_and_the_others_can(method, data, length, where):
    case = data.draw(method)
    *vectors, _ = draw_inputs(length, "none", torch.float32, length)
    moment = 1 + round(where * (length - 2))
    before = case.attention(*vectors)
    for x in vectors:
        x[:, :, moment:] += 1
    after = case.attention(*vectors)
    seen = case.mask(length)[..., :moment, moment:].any()
    assert bool(seen) is not torch.equal(before[:, :, :moment], after[:, :, :moment])
    assert not (case.causal and seen)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(data=st.data(), length=lengths)
@settings(max_examples=10, deadline=None)
def test_half_precision(method, dtype, data, length):
    case = data.draw(method)
    *vectors, real = draw_inputs(length, "end", dtype, length)
    output = case.attention(*vectors, real)
    assert output.dtype == dtype
    truth = defined(case, *(x.double() for x in vectors), real)
    # numbers of size 3 stand 2**-9 (float16) and 2**-6 (bfloat16) apart; a few of them are added
    bound = 2e-2 if dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(output.double(), truth, rtol=bound, atol=bound)


@every_method
@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_bad_input_is_refused_by_name(method, data):
    attention = data.draw(method).attention
    x = torch.zeros(2, HEADS, 7, 4)
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        attention(x, x, x, torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 7\)"):
        attention(x, x, x, torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="do not fit together"):
        attention(x, x[:, :, :5], x[:, :, :5])
    with pytest.raises(ValueError, match="q, k, v must"):
        attention(x[0], x[0], x[0])
    with pytest.raises(ValueError, match="at least one token"):
        attention(x[:, :, :0], x[:, :, :0], x[:, :, :0])


@every_method
@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_it_is_the_attention_of_the_courses_transformer(method, data):
    case = data.draw(method)
    config = TransformerConfig(vocab_size=50, max_length=24, d_model=12, layers=2, heads=HEADS, d_ff=16, segments=0)
    model = Decoder if case.causal else Encoder
    token_ids = torch.randint(50, (2, 19), generator=torch.Generator().manual_seed(0))
    real = torch.arange(19) < torch.tensor([[19], [11]])
    fast, slow = (
        model(config, attention=attention).eval()(token_ids, real)[0]
        for attention in (case.attention, partial(defined, case))
    )
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    # the same model, whatever its attention: its parameters are those of a dense one
    model(config).load_state_dict(model(config, attention=case.attention).state_dict())
