"""Memory-compressed attention: the formula in loops, identities, causality by intervention, padding, the mixer."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.attention.memory_compressed import (
    MemoryCompressedAttention,
    compress,
    slot_attention,
    t_dmca,
    visible_slots,
)
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.transformer import Decoder, Encoder, SelfAttention, TransformerConfig

CONFIG = TransformerConfig(vocab_size=40, max_length=32, d_model=12, layers=2, heads=3, d_ff=16, segments=0)
OPTIONS = [
    {"visible": visible, "null": null, "reduction": reduction}
    for visible, null, reduction in product(("strict", "last"), ("x0", "learned"), ("convolution", "mean", "max"))
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options.values()))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixer(factor: int = 3, seed: int = 1, config: TransformerConfig = CONFIG, **options) -> MemoryCompressedAttention:
    """In float64, all its parameters random: a null slot of zeros would hide mistakes."""
    built = MemoryCompressedAttention(config, factor, seed=seed, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return built


def by_loops(layer: MemoryCompressedAttention, x: Tensor, real: Tensor) -> Tensor:
    """The definition, one query at a time: which blocks it may see, what each one is, one softmax."""
    batch, length, d_model = x.shape
    d_head, factor = d_model // layer.heads, layer.factor
    mixed = torch.zeros_like(x)
    for text in range(batch):
        q, k, v = layer.query(x[text]), layer.key(x[text]), layer.value(x[text])
        for i in range(length):
            if not real[text, i]:
                continue
            if layer.null == "learned":
                keys, values = [layer.null_key], [layer.null_value]
            else:
                first = real[text].nonzero()[0, 0]
                keys, values = [k[first]], [v[first]]
            for start in range(0, length, factor):
                end = start + factor  # of the whole block, though the text may be over before
                if layer.causal and not (end <= i if layer.visible == "strict" else end - 1 <= i):
                    continue
                block = [t for t in range(start, min(end, length)) if real[text, t]]
                if not block:
                    continue
                for memory, vectors, kernel in (
                    (keys, k, layer.key_kernel),
                    (values, v, layer.value_kernel),
                ):
                    if layer.reduction == "mean":
                        memory.append(vectors[block].mean(0))
                    elif layer.reduction == "max":
                        memory.append(vectors[block].max(0).values)
                    else:
                        memory.append(sum(kernel[:, :, t - start] @ vectors[t] for t in block))
            for head in range(layer.heads):
                own = slice(head * d_head, (head + 1) * d_head)
                scores = torch.stack(keys)[:, own] @ q[i, own] / d_head**0.5
                mixed[text, i, own] = scores.softmax(0) @ torch.stack(values)[:, own]
    return layer.output(mixed)


# ----------------------------------------------------------------------------- the definition


def test_visible_slots_by_hand():
    strict = visible_slots(7, 3).int().tolist()
    # slots: 0, then tokens 0-2, 3-5 and the unfinished 6-8
    assert strict == [[1, 0, 0, 0]] * 3 + [[1, 1, 0, 0]] * 3 + [[1, 1, 1, 0]]
    last = visible_slots(7, 3, "last").int().tolist()
    assert last == [[1, 0, 0, 0]] * 2 + [[1, 1, 0, 0]] * 3 + [[1, 1, 1, 0]] * 2
    assert visible_slots(7, 3, causal=False).all()


@every_option
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "factor"), [(1, 2), (11, 3), (5, 1)])
def test_mixer_and_its_gradients_are_the_definition(options, causal, length, factor):
    layer = mixer(factor, causal=causal, **options)
    real = torch.ones(3, length, dtype=torch.bool)
    real[1, length // 2 + 1 :] = False  # padding at the end
    real[2, : length // 2] = False  # and at the start
    results = []
    for path in (lambda x: layer(x, real)[0], lambda x: by_loops(layer, x, real)):
        x = random(3, length, 12, seed=length).requires_grad_()
        y = path(x)
        parameters = list(layer.parameters())
        direction = random(*y.shape, seed=5)
        gradients = torch.autograd.grad((y * direction).sum(), [x, *parameters], allow_unused=True)
        results.append([y, *(torch.zeros(()) if g is None else g for g in gradients)])
    for fast, truth in zip(*results, strict=True):
        torch.testing.assert_close(fast.double(), truth.expand_as(fast).double(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("visible", ["strict", "last"])
def test_factor_one_with_an_identity_kernel_is_causal_attention_with_a_slot_for_x0(visible):
    layer = mixer(1, visible=visible)
    with torch.no_grad():
        for kernel in (layer.key_kernel, layer.value_kernel):
            kernel.copy_(torch.eye(12)[:, :, None])
    x = random(2, 9, 12)
    split = SelfAttention(CONFIG).split_heads
    q, k, v = split(layer.query(x)), split(layer.key(x)), split(layer.value(x))
    k, v = torch.cat([k[:, :, :1], k], dim=2), torch.cat([v[:, :, :1], v], dim=2)
    # strict: earlier tokens only; last: the token itself too
    seen = torch.ones(9, 9, dtype=torch.bool).tril(-1 if visible == "strict" else 0)
    seen = torch.cat([torch.ones(9, 1, dtype=torch.bool), seen], dim=1)
    truth = layer.output(dense_attention(q, k, v, attention_mask=seen).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x)[0], truth, rtol=1e-10, atol=1e-10)


def test_convolution_is_torchs_and_pooling_too():
    x, kernel = random(2, 12, 6), random(5, 6, 3, seed=1)
    theirs = F.conv1d(x.transpose(1, 2), kernel, stride=3).transpose(1, 2)
    torch.testing.assert_close(compress(x, factor=3, kernel=kernel), theirs, rtol=1e-10, atol=1e-10)
    pooled = {"mean": F.avg_pool1d, "max": F.max_pool1d}
    for reduction, pool in pooled.items():
        theirs = pool(x.transpose(1, 2), 3).transpose(1, 2)
        torch.testing.assert_close(compress(x, factor=3, reduction=reduction), theirs, rtol=1e-10, atol=1e-10)


def test_mean_is_the_convolution_with_equal_weights():
    x = random(2, 11, 6)[:, :9]
    kernel = torch.eye(6, dtype=torch.float64)[:, :, None].expand(-1, -1, 3) / 3
    torch.testing.assert_close(
        compress(x, factor=3, reduction="mean"), compress(x, factor=3, kernel=kernel), rtol=1e-10, atol=1e-10
    )


# ----------------------------------------------------------------------------- causality, padding, numbers


@every_option
@pytest.mark.parametrize("factor", [1, 3, 20])
def test_strictly_causal_by_intervention(options, factor):
    layer, x = mixer(factor, **options), random(2, 13, 12)
    before = layer(x)[0]
    for moment in (1, 2, 3, 6, 11, 12):
        changed = x.clone()
        changed[:, moment:] += 1
        assert torch.equal(layer(changed)[0][:, :moment], before[:, :moment])


@pytest.mark.parametrize("visible", ["strict", "last"])
def test_first_query_that_reads_a_token(visible):
    """The end of a token's block shows it (last), or the query after that (strict); token 0 is always seen."""
    layer, x = mixer(4, visible=visible), random(1, 14, 12)
    before = layer(x)[0]
    for token in range(1, 11):
        changed = x.clone()
        changed[:, token] += 1
        moved = (layer(changed)[0] != before).any(-1)[0].nonzero().flatten().tolist()
        end = token // 4 * 4 + 4  # first position after the block
        first = end if visible == "strict" else end - 1
        # the token's own query is another one, which matters unless slot 0 is all that it sees
        own = {token} if visible_slots(14, 4, visible)[token].sum() > 1 else set()
        assert moved == sorted(own | set(range(first, 14)))


def test_not_causal_sees_the_future_and_the_unfinished_block():
    layer, x = mixer(3, causal=False), random(1, 10, 12)
    changed = x.clone()
    changed[:, 9] += 1
    assert (layer(changed)[0] != layer(x)[0]).any(-1).all()


@every_option
def test_padding_changes_nothing(options):
    layer, x = mixer(3, **options), random(2, 11, 12)
    real = torch.arange(11) < torch.tensor([[11], [7]])
    before = layer(x, real)[0]
    # the same as the shorter text alone, because blocks are counted from the left
    torch.testing.assert_close(before[1:, :7], layer(x[1:, :7])[0], rtol=1e-10, atol=1e-10)
    x[~real] = 1e4
    assert torch.equal(layer(x, real)[0], before)
    assert torch.equal(before[~real], layer.output.bias.expand(4, -1))


@every_option
@pytest.mark.parametrize("causal", [True, False])
def test_a_padded_text_gives_zeros_before_the_output_projection(options, causal):
    layer, real = mixer(3, causal=causal, **options), torch.zeros(2, 5, dtype=torch.bool)
    real[0] = True
    x = random(2, 5, 12).requires_grad_()
    y = layer(x, real)[0]
    assert torch.equal(y[1], layer.output.bias.expand(5, -1))
    y.sum().backward()
    assert x.grad.isfinite().all() and not x.grad[1].any()


def test_a_learned_null_slot_is_seen_when_no_token_is():
    """Queries of the first block see slot 0 alone: their output is its value, whatever stands in the text."""
    layer = mixer(4, null="learned")
    y = layer(random(2, 9, 12))[0]
    torch.testing.assert_close(y[:, :4], layer.output(layer.null_value).expand(2, 4, -1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_and_strided_inputs(dtype):
    q = random(2, 10, 3, 8, dtype=dtype).transpose(1, 2)
    k, v = (random(2, 5, 3, 8, seed=seed, dtype=dtype).transpose(1, 2) for seed in (1, 2))
    output = slot_attention(q, k, v, factor=3)
    assert output.dtype == dtype
    truth = dense_attention(q.double(), k.double(), v.double(), attention_mask=visible_slots(10, 3))
    bound = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]  # spacing of numbers near 3
    torch.testing.assert_close(output.double(), truth, rtol=bound, atol=bound)


def test_memory_is_a_third_but_still_quadratic():
    """No n x n table: what is largest is the mask, n (n / 3 + 1), shared by the heads. It is not linear either."""
    sizes = []
    config = TransformerConfig(d_model=16, heads=4, d_ff=16)
    layer = MemoryCompressedAttention(config, 3)
    for n in (1024, 2048):
        sizes.append(largest_storage(lambda x: layer(x)[0], torch.zeros(1, n, 16)))
        assert sizes[-1] < 0.5 * 4 * n**2
    assert sizes[1] / sizes[0] == pytest.approx(4, rel=0.05)


# ----------------------------------------------------------------------------- in the course's models


def test_parameters_and_seed():
    counts = {
        (reduction, null): sum(
            p.numel() for p in MemoryCompressedAttention(CONFIG, 3, null=null, reduction=reduction).parameters()
        )
        for reduction, null in product(("convolution", "mean"), ("x0", "learned"))
    }
    dense = sum(p.numel() for p in SelfAttention(CONFIG).parameters())
    convolutions = 2 * 3 * 12 * 12
    assert counts == {
        ("convolution", "x0"): dense + convolutions,
        ("convolution", "learned"): dense + convolutions + 24,
        ("mean", "x0"): dense,
        ("mean", "learned"): dense + 24,
    }
    first, again, other = (MemoryCompressedAttention(CONFIG, seed=seed).key_kernel for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_t_dmca_alternates_and_the_decoder_cannot_see_the_future():
    decoder = Decoder(CONFIG, token_mixer=t_dmca(block=4, factor=3)).eval()
    kinds = [type(block.token_mixer) for block in decoder.blocks]
    assert kinds == [SelfAttention, MemoryCompressedAttention]
    ids = torch.randint(40, (2, 17), generator=torch.Generator().manual_seed(0))
    before = decoder(ids).logits
    for moment in (1, 5, 12):
        changed = ids.clone()
        changed[:, moment:] = (changed[:, moment:] + 1) % 40
        after = decoder(changed).logits
        assert torch.equal(after[:, :moment], before[:, :moment]) and not torch.equal(after, before)
    before.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    real = torch.arange(17) < torch.tensor([[17], [9]])
    torch.testing.assert_close(decoder(ids, real).logits[1:, :9], decoder(ids[1:, :9]).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="keeps no state"):
        decoder(ids[:, :1], state=decoder(ids).state)


def test_in_an_encoder():
    ids = torch.randint(40, (2, 10), generator=torch.Generator().manual_seed(0))
    encoder = Encoder(CONFIG, token_mixer=lambda config, layer: MemoryCompressedAttention(config, causal=False)).eval()
    assert encoder(ids).last.shape == (2, 10, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 0}, "factor must be an integer >= 1, got 0"),
        ({"visible": "own"}, "visible must be one of 'strict', 'last', got 'own'"),
        ({"null": "zero"}, "null must be one of 'x0', 'learned', got 'zero'"),
        ({"reduction": "sum"}, "reduction must be one of 'convolution', 'mean', 'max', got 'sum'"),
    ],
)
def test_constructor_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        MemoryCompressedAttention(CONFIG, **arguments)


def test_bad_input_is_refused_by_name():
    layer, x = mixer(), random(2, 7, 12)
    with pytest.raises(ValueError, match="state must be None"):
        layer(x, None, (x, x))
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        layer(x, torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 7\)"):
        layer(x, torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one token"):
        layer(x[:, :0])
    with pytest.raises(ValueError, match=r"kernel must be \(d_out, 12, 3\) for a convolution, got None"):
        compress(x, factor=3)
    with pytest.raises(ValueError, match=r"kernel must be \(d_out, 12, 3\) for a convolution, got \(12, 12, 2\)"):
        compress(x, factor=3, kernel=random(12, 12, 2))
    with pytest.raises(ValueError, match="kernel must be None for reduction 'max'"):
        compress(x, factor=3, reduction="max", kernel=random(12, 12, 3))
    with pytest.raises(ValueError, match=r"x must be \(batch, length, d_model\)"):
        compress(x[0], factor=3, reduction="mean")
    with pytest.raises(ValueError, match="block must be an integer >= 1, got 0"):
        t_dmca(block=0)
    q = random(2, 3, 7, 4)
    with pytest.raises(ValueError, match="must hold 4 slots for 7 queries and factor 3"):
        slot_attention(q, q, q, factor=3)
    with pytest.raises(ValueError, match=r"q, k, v must be \(batch, heads, length or slots, d_head\)"):
        slot_attention(q[0], q[0], q[0], factor=3)
