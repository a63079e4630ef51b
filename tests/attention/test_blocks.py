"""The shared machinery of the fast paths, and the guard that watches them."""

import pytest
import torch

from effnlp_lessons.attention.blocks import (
    attend,
    check_positive,
    neighbour_blocks,
    pad_to_multiple,
    real_tokens,
    softmax_over_parts,
)
from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.dense_attention import dense_attention


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize(
    ("length", "block", "before", "after"), [(10, 4, 2, 1), (3, 4, 0, 6), (8, 4, 5, 0), (1, 1, 1, 1)]
)
def test_neighbour_blocks_against_a_loop(dim, length, block, before, after):
    x = torch.arange(1, length + 1)[None]
    blocks = neighbour_blocks(x, block, before, after, dim)
    assert blocks.shape == (1, -(-length // block), before + block + after)
    for number, row in enumerate(blocks[0].tolist()):
        places = range(number * block - before, (number + 1) * block + after)
        assert row == [place + 1 if 0 <= place < length else 0 for place in places]


def test_neighbour_blocks_do_not_copy_what_overlaps():
    x = torch.randn(1, 2, 64, 4)
    blocks = neighbour_blocks(x, 8, 8, 8)
    assert blocks.shape == (1, 2, 8, 24, 4)
    assert blocks.untyped_storage().nbytes() == 4 * 2 * (64 + 16) * 4


def test_pad_to_multiple_fills_with_zeros_and_leaves_a_multiple_alone():
    x = torch.ones(2, 5, 3)
    padded = pad_to_multiple(x, 4, dim=1)
    assert padded.shape == (2, 8, 3) and torch.equal(padded[:, :5], x) and not padded[:, 5:].any()
    assert pad_to_multiple(x, 5, dim=1) is x
    assert not pad_to_multiple(torch.ones(1, 3, dtype=torch.bool), 4, dim=1)[0, 3]


def test_real_tokens_without_a_mask_are_all_real():
    assert real_tokens(None, 4).tolist() == [[True] * 4]
    mask = torch.tensor([[True, False]])
    assert real_tokens(mask, 2) is mask


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 3), (1, 4, 3), (2, 4, 3), (1, 1, 3)])
def test_attend_is_dense_attention_in_every_block(shape):
    q, k, v = torch.randn(3, 2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k, v = k[..., :4, :], v[..., :4, :]
    allowed = torch.rand(*shape, 5, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[..., 2, :] = False  # a query without any key
    got = attend(q, k, v, allowed)
    for block in range(3):
        mask = allowed[:, :, min(block, shape[2] - 1)]
        expected = dense_attention(q[:, :, block], k[:, :, block], v[:, :, block], attention_mask=mask)
        torch.testing.assert_close(got[:, :, block], expected)
    assert not got[..., 2, :].any()


def test_one_softmax_over_parts():
    first, second = torch.randn(2, 3, 4), torch.randn(2, 3, 2)
    masks = [torch.rand(2, 3, 4) < 0.5, torch.tensor([[True, False], [False, True], [False, False]])]
    masks[0][0, 2] = False  # with the second part's last row: no key at all
    parts = softmax_over_parts([first, second], masks)
    allowed = torch.cat([masks[0], masks[1].expand(2, 3, 2)], -1)
    expected = torch.cat([first, second], -1).masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(torch.cat(parts, -1), expected)
    assert [part.shape[-1] for part in parts] == [4, 2]


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "4"])
def test_check_positive_names_the_argument(size):
    with pytest.raises(ValueError, match="block must be an integer >= 1, got"):
        check_positive(stride=3, block=size)


def test_the_guard_counts_storage_and_not_the_size_of_a_view():
    x = torch.randn(10, 8)
    assert largest_storage(lambda x: x.unfold(0, 5, 1) * 1.0, x, backward=False) == 6 * 8 * 5  # the product is real
    assert largest_storage(lambda x: x.unfold(0, 5, 1).sum(), x, backward=False) == 80
    assert largest_storage(lambda x: x[:1, :1].expand(100, 100).sum(), x, backward=False) == 80


def test_the_guard_sees_the_backward_pass():
    class Wasteful(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x * 2

        @staticmethod
        def backward(context, gradient):
            return torch.zeros(500, 2).sum() * 0 + gradient * 2

    assert largest_storage(Wasteful.apply, torch.randn(3)) == 1_000
    assert largest_storage(Wasteful.apply, torch.randn(3), backward=False) == 3
