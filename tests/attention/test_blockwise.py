"""Blockwise attention against its definition as a loop, torch's SDPA under that mask, and flex_attention."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from effnlp_lessons.attention.blockwise import blockwise_attention, blockwise_mask, shifted_permutations
from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.attention.patterns import pairs, reach
from effnlp_lessons.transformer import Encoder, TransformerConfig

SMALL = TransformerConfig(vocab_size=50, max_length=24, d_model=16, layers=2, heads=4, d_ff=40, dropout=0.0)


def random_permutations(heads, blocks, generator):
    return torch.stack([torch.randperm(blocks, generator=generator) for _ in range(heads)])


def random_qkv(batch, heads, length, d_head, generator, dtype=torch.float64):
    """As a Transformer hands them over: heads split from the last dimension, so not contiguous."""
    return (torch.randn(batch, length, heads, d_head, generator=generator, dtype=dtype).transpose(1, 2) for _ in "qkv")


def loop_mask(length, permutations):
    heads, blocks = permutations.shape
    block = (length + blocks - 1) // blocks
    mask = torch.zeros(heads, length, length, dtype=torch.bool)
    for h in range(heads):
        for b in range(blocks):
            source = int(permutations[h, b])
            mask[h, b * block : (b + 1) * block, source * block : (source + 1) * block] = True
    return mask


def reference(q, k, v, mask, real):
    """torch's SDPA under the mask, with the rows of padded queries zeroed."""
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask & real[:, None, None, :])
    return output * real[:, None, :, None]


@settings(max_examples=25)
@given(
    st.integers(1, 2), st.integers(1, 4), st.integers(1, 23), st.integers(1, 5), st.booleans(), st.integers(0, 2**16)
)
def test_equals_the_mask_of_a_loop_forward_and_backward(batch, heads, length, blocks, padded, seed):
    generator = torch.Generator().manual_seed(seed)
    permutations = random_permutations(heads, blocks, generator)
    q, k, v = (x.requires_grad_() for x in random_qkv(batch, heads, length, 3, generator))
    real = torch.rand(batch, length, generator=generator) < 0.6 if padded else torch.ones(batch, length).bool()
    mask = loop_mask(length, permutations)
    assert torch.equal(blockwise_mask(length, permutations), mask)
    fast = blockwise_attention(q, k, v, real if padded else None, permutations=permutations)
    slow = reference(q, k, v, mask, real)
    torch.testing.assert_close(fast, slow)
    upstream = torch.randn(slow.shape, generator=generator, dtype=slow.dtype)
    gradients = torch.autograd.grad(fast, (q, k, v), upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(slow, (q, k, v), upstream))


def test_flex_attention_agrees():
    generator = torch.Generator().manual_seed(0)
    permutations = random_permutations(4, 4, generator)
    q, k, v = random_qkv(2, 4, 128, 8, generator, torch.float32)
    table = permutations.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex_attention warns that it is not compiled
        block_mask = create_block_mask(lambda b, h, i, j: table[h, i // 32] == j // 32, None, 4, 128, 128, device="cpu")
        expected = flex_attention(q, k, v, block_mask=block_mask)
    torch.testing.assert_close(blockwise_attention(q, k, v, permutations=permutations), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 30, 257])
def test_one_block_is_full_attention_bit_for_bit(length, dtype):
    q, k, v = random_qkv(2, 3, length, 8, torch.Generator().manual_seed(0), dtype)
    output = blockwise_attention(q, k, v, permutations=shifted_permutations(3, 1, 1))
    assert torch.equal(output, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_within_its_rounding(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    q, k, v = random_qkv(2, 4, 50, 8, generator, dtype)
    permutations = random_permutations(4, 3, generator)
    output = blockwise_attention(q, k, v, permutations=permutations)
    exact = blockwise_attention(q.double(), k.double(), v.double(), permutations=permutations)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), exact, atol=tolerance, rtol=tolerance)


def test_query_block_b_reads_key_block_pi_of_b_and_not_its_inverse():
    # a shift by 1 of 3 blocks is not its own inverse; each value says in which block it stands
    v = torch.arange(3.0).repeat_interleave(2).view(1, 1, 6, 1)
    zeros = torch.zeros(1, 1, 6, 1)
    output = blockwise_attention(zeros, zeros, v, permutations=torch.tensor([[1, 2, 0]]))
    assert output.flatten().tolist() == [1, 1, 2, 2, 0, 0]


def test_gradients_are_finite_and_zero_for_queries_whose_key_block_is_padding():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 2, 12, 4, generator, torch.float32))
    real = torch.arange(12)[None] < 6  # the second block is padding
    output = blockwise_attention(q, k, v, real, permutations=torch.tensor([[0, 1], [1, 0]]))
    output.square().sum().backward()
    assert output[:, 1].eq(0).all()  # the shifted head finds no real key, or is padding itself
    assert output[:, 0, :6].ne(0).all() and output[:, 0, 6:].eq(0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert q.grad[:, 1].eq(0).all() and k.grad[:, :, 6:].eq(0).all() and v.grad[:, :, 6:].eq(0).all()


def test_shifts_in_turn_after_the_identity_heads():
    assert shifted_permutations(5, 3, 2).tolist() == [[0, 1, 2], [0, 1, 2], [1, 2, 0], [2, 0, 1], [1, 2, 0]]
    assert shifted_permutations(3, 2, 1).tolist() == [[0, 1], [1, 0], [1, 0]]
    assert shifted_permutations(2, 1, 0).tolist() == [[0], [0]]


def test_identity_heads_never_cross_blocks_and_shifts_reach_all_in_two_layers():
    identity = blockwise_mask(12, shifted_permutations(1, 2, 1))[0]
    assert torch.equal(reach([identity] * 6), identity)
    # heads of a layer together: what a token may learn from any of them
    layer = blockwise_mask(12, shifted_permutations(4, 2, 3)).any(0)
    assert layer.all()  # two blocks: one layer with both kinds of heads sees everything
    shifted = blockwise_mask(12, shifted_permutations(1, 2, 0))[0]
    assert not reach([shifted]).all() and reach([shifted] * 2).all()  # shifts alone: block -> other -> back
    assert reach([identity, shifted]).all() and reach([shifted, identity]).all()
    # three blocks and one shift: two layers do it, one does not
    layer = blockwise_mask(12, shifted_permutations(2, 3, 1)).any(0)
    assert not layer.all() and reach([layer] * 2).all()


@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_scores_are_one_over_blocks_of_the_table(blocks):
    heads, length = 4, 1024
    permutations = shifted_permutations(heads, blocks, 2)
    assert pairs(blockwise_mask(length, permutations)) == heads * length**2 // blocks
    q, k, v = random_qkv(1, heads, length, 16, torch.Generator().manual_seed(0), torch.float32)
    real = torch.arange(length)[None] < length - 100

    def method(q, k, v):
        return blockwise_attention(q, k, v, real, permutations=permutations)

    assert largest_storage(method, q, k, v) < 0.5 * heads * length**2 / blocks
    with sdpa_kernel(SDPBackend.MATH):  # the kernel that keeps its scores: nothing else is larger
        assert largest_storage(method, q, k, v) == heads * length**2 // blocks


def test_weights_of_a_dense_encoder_load_unchanged():
    dense = Encoder(SMALL, seed=1).eval()
    blocked = Encoder(SMALL, attention=partial(blockwise_attention, permutations=shifted_permutations(4, 3, 2)))
    blocked.load_state_dict(dense.state_dict(), strict=True)
    whole = Encoder(SMALL, attention=partial(blockwise_attention, permutations=shifted_permutations(4, 1, 4)))
    whole.load_state_dict(dense.state_dict(), strict=True)
    ids = torch.randint(1, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    real = torch.arange(20) < torch.tensor([[20], [13]])
    expected, got = dense(ids, real).last, whole.eval()(ids, real).last
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)
    other = blocked.eval()(ids, real).last
    assert other.isfinite().all() and not torch.allclose(other[real], expected[real], atol=1e-3)


def test_bad_arguments_are_named():
    q = torch.zeros(1, 2, 4, 3)
    with pytest.raises(ValueError, match="permutations must have one row for each of 2 heads, got 3"):
        blockwise_attention(q, q, q, permutations=shifted_permutations(3, 2, 1))
    with pytest.raises(ValueError, match=r"each of 0 .. 1 once in every row, row 1 is \[0, 0\]"):
        blockwise_attention(q, q, q, permutations=torch.tensor([[0, 1], [0, 0]]))
    with pytest.raises(ValueError, match=r"permutations must be integers of shape \(heads, blocks\)"):
        blockwise_mask(4, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="identity_heads must be from 0 to heads=2, got 3"):
        shifted_permutations(2, 2, 3)
    with pytest.raises(ValueError, match="blocks must be an integer >= 1, got 0"):
        shifted_permutations(2, 0, 1)
    with pytest.raises(ValueError, match="as many keys as queries"):
        blockwise_attention(q, q[:, :, :3], q[:, :, :3], permutations=shifted_permutations(2, 2, 1))
