"""Sparse Transformer against its sets as loops, torch's SDPA under those masks, flex_attention, and its claims."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.attention.patterns import pairs, reach
from effnlp_lessons.attention.sparse_transformer import (
    fixed_attention,
    fixed_masks,
    head_masks,
    strided_attention,
    strided_masks,
)
from effnlp_lessons.transformer import Decoder, Encoder, SelfAttention, TransformerConfig

COMBINATIONS = ("merged", "multi-head", "interleaved")
SMALL = TransformerConfig(vocab_size=50, max_length=32, d_model=16, layers=2, heads=4, d_ff=24, dropout=0.0)


def random_qkv(batch, heads, length, d_head, generator, dtype=torch.float64):
    """As a Transformer hands them over: heads split from the last dimension, so not contiguous."""
    return (torch.randn(batch, length, heads, d_head, generator=generator, dtype=dtype).transpose(1, 2) for _ in "qkv")


def loop_masks(length, first, second):
    """`first`, `second`: position -> the keys of A1 and A2, as the paper lists them; j <= i is added here."""
    masks = torch.zeros(2, length, length, dtype=torch.bool)
    for i in range(length):
        for keys, mask in ((first(i), masks[0]), (second(i), masks[1])):
            mask[i, [j for j in keys if 0 <= j <= i]] = True
    return masks


def loop_strided(length, stride, window):
    before = stride if window == "paper" else stride - 1
    return loop_masks(length, lambda i: range(max(0, i - before), i + 1), lambda i: range(i % stride, i + 1, stride))


def loop_fixed(length, stride, summary):
    ends = [end for end in range(stride, length + stride, stride)]
    summaries = [j for end in ends for j in range(end - summary, end)]
    return loop_masks(length, lambda i: range(i // stride * stride, i + 1), lambda i: summaries)


def loop_heads(masks, heads, combine, layer):
    if combine == "merged":
        return torch.stack([masks[0] | masks[1] for _ in range(heads)])
    return torch.stack([masks[head % 2 if combine == "multi-head" else layer % 2] for head in range(heads)])


def reference(q, k, v, mask, real):
    """torch's SDPA under the mask, with the rows of padded queries zeroed."""
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask & real[:, None, None, :])
    return output * real[:, None, :, None]


def assert_equal_forward_and_backward(method, mask, batch, padded, generator):
    heads, length, _ = mask.shape
    q, k, v = (x.requires_grad_() for x in random_qkv(batch, heads, length, 3, generator))
    real = torch.rand(batch, length, generator=generator) < 0.6 if padded else torch.ones(batch, length).bool()
    fast, slow = method(q, k, v, real if padded else None), reference(q, k, v, mask, real)
    torch.testing.assert_close(fast, slow)
    upstream = torch.randn(slow.shape, generator=generator, dtype=slow.dtype)
    gradients = torch.autograd.grad(fast, (q, k, v), upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(slow, (q, k, v), upstream))


@pytest.mark.parametrize("combine", COMBINATIONS)
@settings(max_examples=20)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 26), st.integers(1, 9), st.sampled_from(["paper", "code"]),
    st.integers(0, 3), st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_strided_equals_the_masks_of_a_loop(combine, batch, heads, length, stride, window, layer, padded, seed):
    masks = loop_strided(length, stride, window)
    assert torch.equal(strided_masks(length, stride, window), masks)
    mask = loop_heads(masks, heads, combine, layer)
    assert torch.equal(head_masks(masks, heads, combine, layer), mask)
    method = partial(strided_attention, stride=stride, window=window, combine=combine, layer=layer)
    assert_equal_forward_and_backward(method, mask, batch, padded, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("combine", COMBINATIONS)
@settings(max_examples=20)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 26),
    st.integers(1, 9).flatmap(lambda stride: st.tuples(st.just(stride), st.integers(1, stride))),
    st.integers(0, 3), st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_fixed_equals_the_masks_of_a_loop(combine, batch, heads, length, sizes, layer, padded, seed):
    stride, summary = sizes
    masks = loop_fixed(length, stride, summary)
    assert torch.equal(fixed_masks(length, stride, summary), masks)
    mask = loop_heads(masks, heads, combine, layer)
    method = partial(fixed_attention, stride=stride, summary=summary, combine=combine, layer=layer)
    assert_equal_forward_and_backward(method, mask, batch, padded, torch.Generator().manual_seed(seed))


def test_flex_attention_agrees():
    stride, summary, length = 12, 3, 128
    q, k, v = random_qkv(2, 4, length, 8, torch.Generator().manual_seed(0), torch.float32)

    def strided(b, h, i, j):
        return (j <= i) & ((i - j <= stride) | ((i - j) % stride == 0))

    def fixed_by_head(b, h, i, j):
        own, end = i // stride == j // stride, j % stride >= stride - summary
        return (j <= i) & torch.where(h % 2 == 0, own, end)

    methods = [
        (strided, partial(strided_attention, stride=stride)),
        (fixed_by_head, partial(fixed_attention, stride=stride, summary=summary, combine="multi-head")),
    ]
    for definition, method in methods:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # flex_attention warns that it is not compiled
            block_mask = create_block_mask(definition, None, 4, length, length, device="cpu")
            expected = flex_attention(q, k, v, block_mask=block_mask)
        torch.testing.assert_close(method(q, k, v), expected, atol=1e-5, rtol=1e-5)


def test_sets_written_out():
    strided = strided_masks(12, 4)
    assert strided[0, 9].nonzero().flatten().tolist() == [5, 6, 7, 8, 9]  # stride + 1 positions
    assert strided_masks(12, 4, "code")[0, 9].nonzero().flatten().tolist() == [6, 7, 8, 9]
    assert strided[1, 9].nonzero().flatten().tolist() == [1, 5, 9]
    fixed = fixed_masks(12, 4, 2)
    assert fixed[0, 9].nonzero().flatten().tolist() == [8, 9]
    assert fixed[1, 9].nonzero().flatten().tolist() == [2, 3, 6, 7]
    assert fixed[1, 10].nonzero().flatten().tolist() == [2, 3, 6, 7, 10]
    # the only position in which the windows differ, i - stride, is in the second set
    assert torch.equal(strided.any(0), strided_masks(12, 4, "code").any(0))


def test_two_layers_of_strided_reach_all_of_the_past_in_either_order():
    for length, stride in ((30, 5), (17, 4), (6, 9), (9, 1)):
        past = torch.ones(length, length).tril().bool()
        for window in ("paper", "code"):
            first, second = strided_masks(length, stride, window)
            assert torch.equal(reach([first, second]), past)
            assert torch.equal(reach([second, first]), past)
    first, second = strided_masks(30, 5)
    assert not torch.equal(reach([first, first]), torch.ones(30, 30).tril().bool())


@pytest.mark.parametrize(("length", "stride", "summary"), [(30, 5, 1), (30, 5, 3), (17, 4, 2), (23, 6, 6)])
def test_two_layers_of_fixed_reach_all_of_the_past_in_one_order_only(length, stride, summary):
    first, second = fixed_masks(length, stride, summary)
    past = torch.ones(length, length).tril().bool()
    assert torch.equal(reach([first, second]), past)  # A1 below: summaries hold their blocks; A2 above reads them
    # the other order reaches what a single merged layer reaches: the own block and the summary positions
    assert torch.equal(reach([second, first]), first | second)
    assert torch.equal(first | second, past) == (summary == stride)
    assert torch.equal(reach([first | second] * 2), past)
    # without the residual sum the right order misses the own block, up to its first summary position
    without = second.float() @ first.float() > 0
    for i in range(length):
        start = i // stride * stride
        has_own_summary = i >= start + stride - summary
        assert without[i, :start].all() and bool(without[i, start : i + 1].all()) == has_own_summary


@pytest.mark.parametrize("first_layer", [0, 1])
def test_gradients_of_an_interleaved_encoder_flow_exactly_where_reach_says(first_layer):
    length, stride, summary = 14, 4, 2

    def mixer(config, layer):
        settings = {"stride": stride, "summary": summary, "combine": "interleaved", "layer": layer + first_layer}
        return SelfAttention(config, attention=partial(fixed_attention, **settings))

    encoder = Encoder(SMALL, token_mixer=mixer, seed=1).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    output = x
    for block in encoder.blocks:
        output, _, _ = block(output)
    direction = torch.randn(16, generator=generator, dtype=torch.float64)
    rows = [torch.autograd.grad(output[0, i] @ direction, x, retain_graph=True)[0] for i in range(length)]
    depends = torch.stack([row[0].ne(0).any(-1) for row in rows])
    masks = fixed_masks(length, stride, summary)
    assert torch.equal(depends, reach([masks[first_layer % 2], masks[(first_layer + 1) % 2]]))


def test_pairs_of_strided_grow_with_n_sqrt_n():
    # length = stride², the released code's window, self counted in both sets: 3/2 stride + 1/(2 stride) keys a row
    for stride, mean in ((8, 12.1), (32, 48.0), (64, 96.0)):
        length = stride**2
        both = strided_masks(length, stride, "code")
        counts = both.sum(2)
        assert 2 * stride * int(counts.sum()) == length * (3 * stride**2 + 1)
        assert round(int(counts.sum()) / length, 1) == mean
        assert int(counts.sum(0).max()) == 2 * stride
        # merged, the query itself counts once: one pair less in each row
        assert pairs(both[0] | both[1]) == int(counts.sum()) - length
    for stride in (8, 32):
        # the paper's window has one position more in all rows but the first `stride`; merged, none
        paper, code = strided_masks(stride**2, stride), strided_masks(stride**2, stride, "code")
        assert pairs(paper) == pairs(code) + stride**2 - stride
        assert pairs(paper.any(0)) == pairs(code.any(0))


def test_pairs_of_fixed():
    length, stride, summary = 1024, 32, 8
    first, second = fixed_masks(length, stride, summary)
    assert pairs(first) == length * (stride + 1) // 2
    blocks = length // stride
    # every summary is seen by all later blocks, and in its own block by itself and what follows it
    own = summary * (summary + 1) // 2
    assert pairs(second) == sum(summary * stride * (blocks - 1 - b) + own for b in range(blocks))


CASES = {
    f"{name}, {combine}, layer {layer}": partial(method, combine=combine, layer=layer)
    for name, method in {
        "strided": partial(strided_attention, stride=5),
        "strided, code": partial(strided_attention, stride=4, window="code"),
        "fixed": partial(fixed_attention, stride=5, summary=2),
    }.items()
    for combine, layer in (("merged", 0), ("multi-head", 0), ("interleaved", 0), ("interleaved", 1))
}


@pytest.mark.parametrize("name", CASES)
def test_the_future_changes_nothing_bit_for_bit(name):
    generator = torch.Generator().manual_seed(0)
    q, k, v = random_qkv(1, 2, 23, 4, generator, torch.float32)
    before = CASES[name](q, k, v)
    for t in range(23):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t:] = torch.randn(x[:, :, t:].shape, generator=generator)
        assert torch.equal(CASES[name](*changed)[:, :, :t], before[:, :, :t])


def test_a_decoder_of_the_course_stays_causal():
    ids = torch.randint(0, 50, (1, 29), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 17:] = (other[:, 17:] + 1) % 50
    for method in CASES.values():
        decoder = Decoder(SMALL, attention=method).eval()
        assert torch.equal(decoder(ids).logits[:, :17], decoder(other).logits[:, :17])


def test_fixed_second_set_gives_zeros_before_the_first_summary():
    stride, summary = 6, 2
    method = partial(fixed_attention, stride=stride, summary=summary, combine="interleaved", layer=1)
    for length in (3, 20):  # in the first there is no summary at all
        q, k, v = (x.requires_grad_() for x in random_qkv(2, 2, length, 4, torch.Generator().manual_seed(0)))
        output = method(q, k, v)
        gradients = torch.autograd.grad(output.square().sum(), (q, k, v))
        assert output[:, :, : stride - summary].eq(0).all() and output[:, :, stride - summary :].ne(0).all()
        assert all(x.isfinite().all() for x in gradients)
        assert gradients[0][:, :, : stride - summary].eq(0).all()


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite_where_only_padding_is_in_reach(name):
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 2, 24, 4, torch.Generator().manual_seed(0), torch.float32))
    real = torch.arange(24)[None] >= 13
    output = CASES[name](q, k, v, real)
    gradients = torch.autograd.grad(output.square().sum(), (q, k, v))
    assert output[:, :, :13].eq(0).all() and output[:, :, 13:].ne(0).any()
    assert all(x.isfinite().all() and x[:, :, :13].eq(0).all() for x in gradients)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_within_its_rounding(dtype, tolerance):
    q, k, v = random_qkv(2, 3, 35, 8, torch.Generator().manual_seed(0), dtype)
    for method in CASES.values():
        output, exact = method(q, k, v), method(q.double(), k.double(), v.double())
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_memory_grows_with_n_sqrt_n(pattern, combine):
    heads, shares = 4, []
    for stride in (32, 64):  # length 1024 and 4096
        length = stride**2
        q, k, v = random_qkv(1, heads, length, 16, torch.Generator().manual_seed(0), torch.float32)
        largest = 0
        for layer in (0, 1):
            if pattern == "strided":
                method = partial(strided_attention, stride=stride, combine=combine, layer=layer)
            else:
                method = partial(fixed_attention, stride=stride, summary=4, combine=combine, layer=layer)
            largest = max(largest, largest_storage(method, q, k, v))
        shares.append(largest / (heads * length**2))
    assert shares[0] < 0.2 and shares[1] < 0.51 * shares[0]


def test_bad_arguments_are_named():
    q = torch.zeros(1, 2, 6, 3)
    with pytest.raises(ValueError, match="stride must be an integer >= 1, got 0"):
        strided_attention(q, q, q, stride=0)
    with pytest.raises(ValueError, match="window must be one of .*, got 'both'"):
        strided_masks(6, 2, "both")
    with pytest.raises(ValueError, match="summary must be from 1 to stride=4, got 5"):
        fixed_attention(q, q, q, stride=4, summary=5)
    with pytest.raises(ValueError, match="combine must be one of .*, got 'sum'"):
        fixed_attention(q, q, q, stride=4, summary=1, combine="sum")
    with pytest.raises(ValueError, match="layer must be an integer >= 0, got -1"):
        head_masks(strided_masks(6, 2), 2, "interleaved", -1)
