"""Reversible layers: the plain residual loop with dropout on, transformers' encoder, and a memory flat in depth."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import ReformerEncoder

from effnlp_lessons.attention.lsh import LSHSelfAttention
from effnlp_lessons.attention.reversible import (
    Branch,
    ChunkedFeedForward,
    ReversibleBlock,
    ReversibleStack,
    chunked_feed_forward,
    reversible_transformer,
)
from effnlp_lessons.transformer import FeedForward, SelfAttention, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=50, max_length=0, d_model=12, layers=3, heads=2, d_ff=20, segments=0, pooler=False, dropout=0.3
)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def attention_mixer(config: TransformerConfig, layer: int) -> nn.Module:
    return SelfAttention(config)


def lsh_mixer(config: TransformerConfig, layer: int) -> nn.Module:
    return LSHSelfAttention(config, chunk=4, hashes=2, buckets=6, seed=layer)


def chunked_mixer(config: TransformerConfig, layer: int) -> nn.Module:
    return ChunkedFeedForward(nn.Sequential(nn.Linear(12, 20), nn.Dropout(0.2), nn.ReLU(), nn.Linear(20, 12)), 3)


def streams(dtype: torch.dtype = torch.float32, length: int = 19) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, length, 12, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]


def plain(stack: ReversibleStack, x1: Tensor, x2: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    for block in stack.blocks:
        x1, x2 = block(x1, x2, real)
    return x1, x2


def outputs_and_gradients(call, stack: ReversibleStack, inputs: list[Tensor], real: Tensor | None) -> list[Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        y1, y2 = call(*inputs, real)
        after = torch.rand(1)  # as many random numbers were drawn
    direction = torch.randn(2, *y1.shape, dtype=y1.dtype, generator=torch.Generator().manual_seed(2))
    loss = (y1 * direction[0] + y2.square() * direction[1]).sum()
    return [y1, y2, after, *torch.autograd.grad(loss, [*inputs, *stack.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("token_mixer", "channel_mixer"), [(attention_mixer, None), (lsh_mixer, None), (attention_mixer, chunked_mixer)]
)
def test_it_is_the_plain_residual_loop_with_dropout(token_mixer, channel_mixer, padded, dtype):
    stack = reversible_transformer(CONFIG, token_mixer, channel_mixer).to(dtype).train()
    inputs = streams(dtype)
    real = torch.arange(19) < torch.tensor([[19], [8]]) if padded else None
    ours = outputs_and_gradients(stack, stack, inputs, real)
    truth = outputs_and_gradients(lambda *args: plain(stack, *args), stack, inputs, real)
    assert torch.equal(ours[2], truth[2])
    for mine, theirs in zip(ours, truth, strict=True):
        # of size 1 at most: sums over batch and length
        scale = theirs.abs().max().clamp(min=1)
        torch.testing.assert_close(mine / scale, theirs / scale, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_dropout_was_on_and_differs_from_call_to_call():
    stack = reversible_transformer(CONFIG, attention_mixer).train()
    x1, x2 = streams()
    assert not torch.equal(stack(x1, x2)[0], stack(x1, x2)[0])
    stack.eval()
    assert torch.equal(stack(x1, x2)[0], stack(x1, x2)[0])


def test_backward_leaves_the_random_numbers_of_others_alone():
    stack = reversible_transformer(CONFIG, lsh_mixer).train()
    y1, y2 = stack(*streams())
    before = torch.get_rng_state()
    (y1 + y2).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse(dtype):
    stack = reversible_transformer(CONFIG, attention_mixer).to(dtype).eval()
    inputs = streams(dtype, length=1)
    with torch.no_grad():
        for ours, truth in zip(stack.inverse(*stack(*inputs)), inputs, strict=True):
            torch.testing.assert_close(ours, truth, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert not torch.allclose(stack(*inputs)[0], inputs[0], atol=1e-2)


def saved_elements(call, *inputs: Tensor) -> int:
    """Numbers that autograd keeps for backward, each storage once, parameters left out."""
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = call(*inputs)
    del output
    return sum(x.untyped_storage().nbytes() // x.itemsize for x in kept.values())


def test_activation_memory_is_flat_in_depth():
    def kept(layers: int, reversible: bool) -> int:
        config = TransformerConfig(max_length=0, d_model=12, layers=layers, heads=2, d_ff=20, dropout=0.3)
        stack = reversible_transformer(config, attention_mixer).train()
        call = stack if reversible else lambda x1, x2: plain(stack, x1, x2, None)
        return saved_elements(call, *streams())

    assert kept(1, True) == kept(8, True) == 2 * 2 * 19 * 12  # the last Y1 and Y2
    assert kept(8, False) > 6 * kept(1, False) > 6 * kept(1, True)


def test_buckets_are_hashed_once_and_used_again(monkeypatch):
    import effnlp_lessons.attention.lsh as lsh

    hashed, used = [], []
    original_hash, original_attention = lsh.lsh_buckets, lsh.lsh_attention

    def counting_hash(*args):
        hashed.append(original_hash(*args))
        return hashed[-1]

    def watching_attention(*args, buckets, **settings):
        used.append(buckets)
        return original_attention(*args, buckets=buckets, **settings)

    monkeypatch.setattr(lsh, "lsh_buckets", counting_hash)
    monkeypatch.setattr(lsh, "lsh_attention", watching_attention)
    stack = reversible_transformer(CONFIG, lsh_mixer).train()
    first, second = stack(*streams()), stack(*streams())  # another call between must not mix the choices up
    assert len(hashed) == len(used) == 6
    sum(y.sum() for y in first).backward()
    sum(y.sum() for y in second).backward()
    assert len(hashed) == 6
    assert [id(buckets) for buckets in used[6:]] == [id(hashed[i]) for i in (2, 1, 0, 5, 4, 3)]
    assert all(block.f.mixer.fixed_choice is None for block in stack.blocks)


def test_frozen_and_shared_parameters_and_a_part_that_ignores_its_input():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.ones(12))

        def forward(self, x, key_padding_mask=None):
            return self.bias.expand_as(x)

    shared = Branch(CONFIG, FeedForward(CONFIG))
    shared.norm.weight.requires_grad_(False)
    stack = ReversibleStack([ReversibleBlock(Constant(), shared), ReversibleBlock(shared, shared)]).train()
    results = []
    for call in (stack, lambda *args: plain(stack, *args, None)):
        stack.zero_grad()
        inputs = streams()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            y1, y2 = call(*inputs)
        (y1.square() + y2.sin()).sum().backward()
        results.append([parameter.grad for parameter in [*inputs, *stack.parameters()]])
    for ours, truth in zip(*results, strict=True):
        assert (ours is None) == (truth is None)
        if truth is not None:
            scale = truth.abs().max().clamp(min=1)
            torch.testing.assert_close(ours / scale, truth / scale, rtol=1e-5, atol=1e-5)


class TheirAttention(nn.Module):
    """transformers' sublayer, norm and output projection inside, as an f or g."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x, key_padding_mask=None):
        y = self.part(x)
        return y if isinstance(y, Tensor) else y.hidden_states


def test_gradients_equal_transformers_reversible_encoder():
    config = ReformerConfig(
        hidden_size=12, num_attention_heads=2, attention_head_size=6, attn_layers=["local"] * 2, feed_forward_size=20,
        local_attn_chunk_length=4, hidden_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0, is_decoder=True,
    )  # fmt: skip
    with torch.random.fork_rng():  # it draws its weights, and seeds, from the global generator
        torch.manual_seed(0)
        encoder = ReformerEncoder(config).double().train()
        x = streams(torch.float64, length=16)[0]
        theirs = encoder(x).hidden_states
        theirs.square().sum().backward()
    their_gradients = [x.grad, *(parameter.grad for parameter in encoder.parameters())]
    encoder = copy.deepcopy(encoder)
    encoder.zero_grad()
    stack = ReversibleStack(
        ReversibleBlock(TheirAttention(layer.attention), TheirAttention(layer.feed_forward)) for layer in encoder.layers
    )
    x = x.detach().requires_grad_()
    ours = encoder.layer_norm(torch.cat(stack(x, x), dim=-1))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    ours.square().sum().backward()
    for mine, other in zip(
        [x.grad, *(parameter.grad for parameter in encoder.parameters())], their_gradients, strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("length", "chunks"), [(19, 4), (19, 19), (5, 8), (1, 3), (7, 1)])
def test_chunked_feed_forward_equals_the_whole(length, chunks):
    whole = FeedForward(CONFIG).double()
    x = streams(torch.float64, length)[0]
    results = []
    for y in (whole(x), chunked_feed_forward(whole, x, chunks), ChunkedFeedForward(whole, chunks)(x)):
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *whole.parameters()])])
    for one, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


def test_chunked_feed_forward_never_holds_all_inner_values():
    from effnlp_lessons.attention.guard import largest_storage

    mixer = FeedForward(TransformerConfig(d_model=12, heads=2, d_ff=400))
    x = torch.randn(1, 64, 12, generator=torch.Generator().manual_seed(0))
    assert largest_storage(mixer, x) == 64 * 400
    assert largest_storage(lambda x: chunked_feed_forward(mixer, x, 8), x) == 12 * 400  # the weights' gradient
    assert saved_elements(lambda x: chunked_feed_forward(mixer, x, 8), x) <= 64 * 12


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="blocks must be one or more ReversibleBlock"):
        ReversibleStack([])
    with pytest.raises(ValueError, match="blocks must be one or more ReversibleBlock, got .'Linear'"):
        ReversibleStack([nn.Linear(2, 2)])
    stack = reversible_transformer(CONFIG, attention_mixer)
    with pytest.raises(ValueError, match="x1 and x2 must have one shape"):
        stack(torch.zeros(1, 3, 12), torch.zeros(1, 1, 12))
    with pytest.raises(ValueError, match="chunks must be an integer >= 1, got 0"):
        chunked_feed_forward(nn.Linear(2, 2), torch.zeros(1, 2, 2), 0)
    with pytest.raises(ValueError, match="chunks must be an integer >= 1, got 1.5"):
        ChunkedFeedForward(nn.Linear(2, 2), 1.5)
