"""Local attention in 1D and 2D against its definition as loops, torch's SDPA under that mask, and flex_attention."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.attention.local import local_attention, local_attention_2d, local_mask, local_mask_2d
from effnlp_lessons.attention.patterns import pairs, reach
from effnlp_lessons.transformer import Decoder, TransformerConfig


def random_qkv(batch, heads, length, d_head, generator, dtype=torch.float64):
    """As a Transformer hands them over: heads split from the last dimension, so not contiguous."""
    return (torch.randn(batch, length, heads, d_head, generator=generator, dtype=dtype).transpose(1, 2) for _ in "qkv")


def loop_mask(length, block, flange, causal):
    mask = torch.zeros(length, length, dtype=torch.bool)
    for start in range(0, length, block):
        end = min(start + block, length)
        memory = range(max(start - flange, 0), end if causal else min(end + flange, length))
        for i in range(start, end):
            for j in memory:
                mask[i, j] = not causal or j <= i
    return mask


def loop_mask_2d(height, width, block, flange, causal):
    """Rectangle by rectangle: collect its pixels and those of its memory, then pair them."""
    mask = torch.zeros(height * width, height * width, dtype=torch.bool)
    for top in range(0, height, block[0]):
        for left in range(0, width, block[1]):
            below = 0 if causal else flange[0]
            queries = [
                (r, c)
                for r in range(top, min(top + block[0], height))
                for c in range(left, min(left + block[1], width))
            ]
            memory = [
                (r, c)
                for r in range(top - flange[0], top + block[0] + below)
                for c in range(left - flange[1], left + block[1] + flange[1])
                if 0 <= r < height and 0 <= c < width
            ]
            for r, c in queries:
                for row, column in memory:
                    if not causal or (row, column) <= (r, c):
                        mask[r * width + c, row * width + column] = True
    return mask


def reference(q, k, v, mask, real):
    """torch's SDPA under the mask, with the rows of padded queries zeroed."""
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask & real[:, None, None, :])
    return output * real[:, None, :, None]


def assert_equal_forward_and_backward(method, mask, batch, length, padded, generator):
    q, k, v = (x.requires_grad_() for x in random_qkv(batch, 2, length, 3, generator))
    real = torch.rand(batch, length, generator=generator) < 0.5 if padded else torch.ones(batch, length).bool()
    fast, slow = method(q, k, v, real if padded else None), reference(q, k, v, mask, real)
    torch.testing.assert_close(fast, slow)
    upstream = torch.randn(slow.shape, generator=generator, dtype=slow.dtype)
    gradients = torch.autograd.grad(fast, (q, k, v), upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(slow, (q, k, v), upstream))


@settings(max_examples=25)
@given(
    st.integers(1, 2), st.integers(1, 21), st.integers(1, 8), st.integers(0, 9), st.booleans(), st.booleans(),
    st.integers(0, 2**16),
)  # fmt: skip
def test_1d_equals_the_mask_of_a_loop(batch, length, block, flange, causal, padded, seed):
    mask = loop_mask(length, block, flange, causal)
    assert torch.equal(local_mask(length, block, flange, causal), mask)
    method = partial(local_attention, block=block, flange=flange, causal=causal)
    assert_equal_forward_and_backward(method, mask, batch, length, padded, torch.Generator().manual_seed(seed))


@settings(max_examples=25)
@given(
    st.integers(1, 6), st.integers(1, 7), st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)), st.booleans(), st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_2d_equals_the_mask_of_loops(height, width, block, flange, causal, padded, seed):
    mask = loop_mask_2d(height, width, block, flange, causal)
    assert torch.equal(local_mask_2d(height, width, block, flange, causal), mask)
    method = partial(local_attention_2d, width=width, block=block, flange=flange, causal=causal)
    assert_equal_forward_and_backward(method, mask, 2, height * width, padded, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "block", "flange"), [(8, 8, (4, 4), (2, 2)), (8, 8, (2, 4), (3, 1)), (7, 9, (3, 4), (2, 5))]
)
def test_2d_on_a_square_and_an_odd_grid(height, width, block, flange, causal):
    mask = loop_mask_2d(height, width, block, flange, causal)
    assert torch.equal(local_mask_2d(height, width, block, flange, causal), mask)
    method = partial(local_attention_2d, width=width, block=block, flange=flange, causal=causal)
    generator = torch.Generator().manual_seed(0)
    assert_equal_forward_and_backward(method, mask, 2, height * width, True, generator)
    # an image whose last row is unfinished is the same mask, cut
    cut = height * width - 4
    assert_equal_forward_and_backward(method, mask[:cut, :cut], 1, cut, False, generator)


@pytest.mark.parametrize("causal", [False, True])
def test_flex_attention_agrees(causal):
    block, flange, length, width = 24, 20, 128, 16
    q, k, v = random_qkv(2, 2, length, 8, torch.Generator().manual_seed(0), torch.float32)

    def one(b, h, i, j):
        start, after = i // block * block, 0 if causal else flange
        inside = (j >= start - flange) & (j < start + block + after)
        return inside & (j <= i) if causal else inside

    def two(b, h, i, j):  # rectangles of 4 x 4 with a flange of 2 rows and 3 columns
        top, left = i // width // 4 * 4, i % width // 4 * 4
        row, column = j // width, j % width
        rows = (row >= top - 2) & (row < top + 4 + (0 if causal else 2))
        inside = rows & (column >= left - 3) & (column < left + 4 + 3)
        return inside & (j <= i) if causal else inside

    methods = [
        (one, partial(local_attention, block=block, flange=flange, causal=causal)),
        (two, partial(local_attention_2d, width=width, block=(4, 4), flange=(2, 3), causal=causal)),
    ]
    for definition, method in methods:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # flex_attention warns that it is not compiled
            block_mask = create_block_mask(definition, None, None, length, length, device="cpu")
            expected = flex_attention(q, k, v, block_mask=block_mask)
        torch.testing.assert_close(method(q, k, v), expected, atol=1e-5, rtol=1e-5)


def test_queries_of_a_block_share_their_memory_unlike_a_sliding_window():
    mask = local_mask(40, block=8, flange=5)
    for start in range(0, 40, 8):
        assert (mask[start : start + 8] == mask[start]).all()
    assert mask[16].nonzero().flatten().tolist() == list(range(11, 29))
    # causal: from flange + 1 keys for the first of a block to flange + block for the last
    causal = local_mask(40, block=8, flange=5, causal=True)
    assert causal[16:24].sum(1).tolist() == list(range(6, 14))
    assert causal[:8].sum(1).tolist() == list(range(1, 9))  # the first block has no flange


def test_special_cases():
    ones = torch.ones(30, 30, dtype=torch.bool)
    assert torch.equal(local_mask(30, block=30, flange=0), ones)
    assert torch.equal(local_mask(30, block=30, flange=0, causal=True), ones.tril())
    assert torch.equal(local_mask(30, block=1, flange=3), ones.tril(3).triu(-3))  # then it is a sliding window
    assert torch.equal(local_mask_2d(5, 6, (5, 6), (0, 0), causal=True), ones.tril())
    # an image of one row is one-dimensional, up to the flange on the right: raster order hides it
    assert torch.equal(local_mask_2d(1, 30, (1, 8), (2, 5)), local_mask(30, 8, 5))
    assert torch.equal(local_mask_2d(1, 30, (1, 8), (2, 5), causal=True), local_mask(30, 8, 5, causal=True))
    # a causal pixel in the last row of a block sees up and to the right, never below
    mask = local_mask_2d(8, 8, (4, 4), (2, 2), causal=True)
    seen = {divmod(j, 8) for j in mask[5 * 8 + 1].nonzero().flatten().tolist()}
    assert (2, 5) in seen and (4, 5) in seen and (5, 1) in seen
    assert (5, 2) not in seen and (6, 0) not in seen and (1, 0) not in seen and (2, 6) not in seen


METHODS = {
    "1d": partial(local_attention, block=5, flange=3, causal=True),
    "1d, flange > block": partial(local_attention, block=3, flange=7, causal=True),
    "2d": partial(local_attention_2d, width=7, block=(2, 3), flange=(1, 2), causal=True),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_future_changes_nothing_bit_for_bit(name):
    generator = torch.Generator().manual_seed(0)
    q, k, v = random_qkv(1, 2, 28, 4, generator, torch.float32)
    before = METHODS[name](q, k, v)
    for t in range(28):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t:] = torch.randn(x[:, :, t:].shape, generator=generator)
        after = METHODS[name](*changed)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.equal(after[:, :, t], before[:, :, t])


def test_depth_reaches_by_flanges():
    layer = local_mask(64, block=4, flange=4, causal=True)
    for depth in range(1, 6):
        assert int(reach([layer] * depth)[63].sum()) == 4 + 4 * depth


def test_a_decoder_of_the_course_stays_causal():
    config = TransformerConfig(vocab_size=50, max_length=24, d_model=16, layers=2, heads=4, d_ff=40, dropout=0.0)
    decoder = Decoder(config, attention=partial(local_attention, block=4, flange=3, causal=True)).eval()
    ids = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 11:] = (other[:, 11:] + 1) % 50
    assert torch.equal(decoder(ids).logits[:, :11], decoder(other).logits[:, :11])


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_finite_where_a_block_is_padding(causal):
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 2, 24, 4, torch.Generator().manual_seed(0), torch.float32))
    real = torch.arange(24)[None] >= 14  # the first block and its flange hold no real token
    for method in (
        partial(local_attention, block=8, flange=4, causal=causal),
        partial(local_attention_2d, width=6, block=(2, 3), flange=(0, 1), causal=causal),
    ):
        output = method(q, k, v, real)
        gradients = torch.autograd.grad(output.square().sum(), (q, k, v))
        assert output[:, :, :14].eq(0).all() and output[:, :, 14:].ne(0).all()
        assert all(x.isfinite().all() and x[:, :, :14].eq(0).all() for x in gradients)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_within_its_rounding(dtype, tolerance):
    q, k, v = random_qkv(2, 2, 35, 8, torch.Generator().manual_seed(0), dtype)
    for method in METHODS.values():
        output, exact = method(q, k, v), method(q.double(), k.double(), v.double())
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
def test_no_table_of_n_by_n(causal):
    heads, shares = 4, {"1d": [], "2d": []}
    for length in (1024, 2048):
        methods = {
            "1d": partial(local_attention, block=32, flange=40, causal=causal),
            "2d": partial(local_attention_2d, width=32, block=(8, 8), flange=(4, 4), causal=causal),
        }
        for name, method in methods.items():
            q, k, v = random_qkv(1, heads, length, 16, torch.Generator().manual_seed(0), torch.float32)
            shares[name].append(largest_storage(method, q, k, v) / (heads * length**2))
    for first, second in shares.values():
        # not exactly half: the flanges at the ends of the text do not grow with it
        assert first < 0.1 and second == pytest.approx(first / 2, rel=0.1)
    # away from the edges: block + 2 flange keys a query, (rows + 2 flange rows)(columns + 2 flange columns) in 2D
    assert pairs(local_mask(320, 32, 40)[128:192]) == 64 * (32 + 80)
    assert pairs(local_mask_2d(24, 24, (8, 8), (4, 4))[8 * 24 + 8 : 8 * 24 + 16]) == 8 * 16 * 16


def test_bad_arguments_are_named():
    q = torch.zeros(1, 2, 6, 3)
    with pytest.raises(ValueError, match="block must be an integer >= 1, got 0"):
        local_attention(q, q, q, block=0, flange=1)
    with pytest.raises(ValueError, match="flange must be an integer >= 0, got -1"):
        local_mask(6, 2, -1)
    with pytest.raises(ValueError, match=r"block must be a pair \(rows, columns\), got 2"):
        local_attention_2d(q, q, q, width=3, block=2, flange=(1, 1))
    with pytest.raises(ValueError, match=r"flange\[1\] must be an integer >= 0, got -2"):
        local_mask_2d(2, 3, (1, 1), (0, -2))
    with pytest.raises(ValueError, match=r"block\[0\] must be an integer >= 1, got 0"):
        local_mask_2d(2, 3, (0, 1), (0, 0))
    with pytest.raises(ValueError, match="width must be an integer >= 1, got 0"):
        local_attention_2d(q, q, q, width=0, block=(1, 1), flange=(1, 1))
