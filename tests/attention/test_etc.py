"""ETC against its definition pair by pair, Pegasus-X and LongT5 of transformers, and its own promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LongT5Config
from transformers.models.longt5.modeling_longt5 import LongT5LocalAttention, _get_local_attention_mask
from transformers.models.pegasus_x.modeling_pegasus_x import PegasusXGlobalLocalAttention

from effnlp_lessons.attention.etc import ETCAttention, etc_mask, extra_labels, relative_labels
from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.transformer import Encoder, SelfAttention, TransformerConfig

CONFIG = TransformerConfig(d_model=12, heads=2)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(global_length, radius, max_distance=3, dtype=torch.float64, config=CONFIG, seed=0, **arguments):
    """A mixer in which every table and bias is different from zero."""
    mixer = ETCAttention(
        config, global_length=global_length, radius=radius, max_distance=max_distance, seed=seed, **arguments
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return mixer.to(dtype)


def label_of(i, j, g, k, context):
    """Label of key j for query i, by cases; positions count from the first global token."""
    if (i < g) != (j < g):
        return 2 * k + 2 if context[i] == context[j] else 2 * k + 1
    if i < g and context[i] != context[j]:
        return 2 * k + 3
    distance = j - i
    if distance >= 0:
        return min(distance, k)
    return k + min(-distance, k)


def may_attend(i, j, g, radius, context, real):
    if not real[j]:
        return False
    return i < g or j < g or (abs(i - j) <= radius and context[i] == context[j])


def by_definition(mixer, x, real, contexts):
    """The whole n x n table: scores of all pairs with their labels' vectors and biases, one softmax a row."""
    g, k, (batch, length) = mixer.global_length, mixer.max_distance, x.shape[:2]
    projections = (mixer.query, mixer.key, mixer.value)
    q, key, v = (project(x).unflatten(-1, (mixer.heads, -1)).transpose(1, 2) for project in projections)
    mixed = torch.zeros_like(q)
    for b in range(batch):
        context = contexts[b].tolist()
        labels = torch.tensor([[label_of(i, j, g, k, context) for j in range(length)] for i in range(length)])
        allowed = torch.tensor(
            [[may_attend(i, j, g, mixer.radius, context, real[b]) for j in range(length)] for i in range(length)]
        )
        is_global = (torch.arange(length) < g)[:, None, None, None]
        vectors = torch.where(is_global, mixer.global_labels[labels], mixer.long_labels[labels])  # (i, j, heads, d)
        bias = torch.where(is_global[..., 0], mixer.global_label_bias[labels], mixer.long_label_bias[labels])
        scores = torch.einsum("hid,hjd->hij", q[b], key[b]) + torch.einsum("hid,ijhd->hij", q[b], vectors)
        scores = (scores + bias.permute(2, 0, 1)) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~allowed, -1e30).softmax(-1).masked_fill(~allowed, 0)
        mixed[b] = (weights @ v[b]).masked_fill(~real[b][:, None], 0)
    merged = mixed.transpose(1, 2).flatten(2)
    return torch.cat([mixer.global_output(merged[:, :g]), mixer.output(merged[:, g:])], dim=1)


# ------------------------------------------------------------------------------------------- mask and labels


@given(g=st.integers(1, 5), long_length=st.integers(1, 12), radius=st.integers(1, 15))
@settings(max_examples=25)
def test_mask_is_a_band_with_a_cross(g, long_length, radius):
    mask = etc_mask(g, long_length, radius)
    n = g + long_length
    expected = [[may_attend(i, j, g, radius, [0] * n, [True] * n) for j in range(n)] for i in range(n)]
    assert mask.tolist() == expected


def test_labels_are_those_of_the_released_code():
    position = torch.arange(6)
    assert relative_labels(position, position, 3).tolist() == [  # its documented example
        [0, 1, 2, 3, 3, 3],
        [4, 0, 1, 2, 3, 3],
        [5, 4, 0, 1, 2, 3],
        [6, 5, 4, 0, 1, 2],
        [6, 6, 5, 4, 0, 1],
        [6, 6, 6, 5, 4, 0],
    ]
    assert extra_labels(3) == (7, 8, 9)


@given(
    queries=st.lists(st.integers(-30, 30), min_size=1, max_size=6),
    keys=st.lists(st.integers(-30, 30), min_size=1, max_size=6),
    max_distance=st.integers(0, 12),
)
@settings(max_examples=40)
def test_labels_by_cases(queries, keys, max_distance):
    labels = relative_labels(torch.tensor(queries), torch.tensor(keys), max_distance)
    for row, i in zip(labels.tolist(), queries, strict=True):
        assert row == [label_of(i, j, -99, max_distance, {i: 0, j: 0}) for j in keys]


# ------------------------------------------------------------------------------------------- the definition


@given(data=st.data())
@settings(max_examples=25)
def test_equals_the_definition_of_all_pairs(data):
    batch, g, long_length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 13))
    mixer = make(g, radius=data.draw(st.integers(1, 15)), max_distance=data.draw(st.integers(1, 5)))
    length = g + long_length
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(batch, length, 12, generator=generator, dtype=torch.float64)
    real = torch.rand(batch, length, generator=generator) < data.draw(st.sampled_from([0.6, 0.9, 1.1]))
    if data.draw(st.booleans()):
        real[-1] = False  # a text without any real token
    contexts = torch.randint(-1, 2, (batch, length), generator=generator) * data.draw(st.integers(0, 1))
    with torch.no_grad():
        expected = by_definition(mixer, x, real, contexts)
        assert torch.allclose(mixer(x, real, context_ids=contexts)[0], expected, rtol=1e-10, atol=1e-10)
        if (contexts == 0).all():
            assert torch.allclose(mixer(x, real)[0], expected, rtol=1e-10, atol=1e-10)
        single = mixer.float()(x.float(), real, context_ids=contexts)[0]
        assert torch.allclose(single.double(), expected, atol=1e-5)


@pytest.mark.parametrize("long_length", [1, 4, 17])
def test_gradients_equal_those_of_the_definition(long_length):
    g, length = 3, 3 + long_length
    mixer = make(g, radius=3)
    x = random(3, length, 12, dtype=torch.float64).requires_grad_()
    real = torch.arange(length) < torch.tensor([[length], [max(1, length - 6)], [0]])
    contexts = (random(3, length) > 0).long()
    inputs = [x, *mixer.parameters()]
    y, expected = mixer(x, real, context_ids=contexts)[0], by_definition(mixer, x, real, contexts)
    upstream = random(*y.shape, seed=1, dtype=torch.float64)
    ours = torch.autograd.grad(y, inputs, upstream)
    for a, b in zip(ours, torch.autograd.grad(expected, inputs, upstream), strict=True):
        assert torch.isfinite(a).all()
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_padded_rows_give_the_bias_of_their_output_projection():
    mixer = make(2, radius=2)
    real = torch.tensor([[True, False, True, True, False, False]])
    y = mixer(random(1, 6, 12, dtype=torch.float64), real)[0][0]
    assert torch.allclose(y[1], mixer.global_output.bias)
    assert torch.allclose(y[4:], mixer.output.bias.expand(2, -1))
    assert not torch.allclose(y[2], mixer.output.bias)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])  # rounding near 4
def test_half_precision(dtype, atol):
    mixer, x = make(2, radius=3, dtype=dtype), random(2, 15, 12, dtype=dtype)
    with torch.no_grad():
        half = mixer(x)[0]
        exact = mixer.float()(x.float())[0]
    assert half.dtype == dtype
    assert torch.allclose(half.float(), exact, atol=atol)


# --------------------------------------------------------------------------------------------- other models


def test_is_dense_attention_under_its_mask_with_the_weights_of_self_attention():
    dense = SelfAttention(CONFIG)
    g, long_length = 3, 14
    x = random(2, g + long_length, 12)
    for radius in (4, 100):  # 100: every pair, plain self-attention
        mixer = ETCAttention(CONFIG, global_length=g, radius=radius, label_std=0.0)
        missing, unexpected = mixer.load_state_dict(dense.state_dict(), strict=False)
        assert not unexpected
        assert {name.split(".")[0] for name in missing} == {
            "global_output", "long_labels", "long_label_bias", "global_labels", "global_label_bias",
        }  # fmt: skip
        mixer.global_output.load_state_dict(dense.output.state_dict())
        mask = etc_mask(g, long_length, radius)
        dense.attention = lambda q, k, v, real, mask=mask: dense_attention(q, k, v, real, attention_mask=mask)
        assert torch.allclose(mixer(x)[0], dense(x)[0], atol=1e-5)
    dense.attention = None
    assert torch.allclose(mixer(x)[0], dense(x)[0], atol=1e-5)


def test_equals_pegasus_x_when_contexts_are_its_blocks():
    heads, d_model, block, blocks, g = 3, 12, 4, 5, 2
    reference = PegasusXGlobalLocalAttention(d_model, heads, block, 0.0)
    mixer = ETCAttention(
        TransformerConfig(d_model=d_model, heads=heads), global_length=g, radius=block - 1, label_std=0.0
    )
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj", "global_output": "out_proj"}
    with torch.no_grad():
        for ours, theirs in names.items():  # no biases there, and one output projection
            getattr(mixer, ours).weight.copy_(getattr(reference, theirs).weight)
            getattr(mixer, ours).bias.zero_()
    tokens, global_tokens = random(2, block * blocks, d_model), random(2, g, d_model, seed=1)
    real = torch.arange(block * blocks) < torch.tensor([[block * blocks], [block * blocks - 6]])
    additive = torch.where(real, 0.0, torch.finfo(torch.float32).min)
    long_reference, global_reference, _ = reference(tokens, global_tokens, additive)
    contexts = torch.cat([torch.zeros(g, dtype=torch.long), torch.arange(block * blocks) // block]).expand(2, -1)
    y, _ = mixer(
        torch.cat([global_tokens, tokens], dim=1),
        torch.cat([torch.ones(2, g, dtype=torch.bool), real], dim=1),
        context_ids=contexts,
    )
    assert torch.allclose(y[:, :g], global_reference, atol=1e-5)
    assert torch.allclose(y[:, g:][real], long_reference[real], atol=1e-5)


@pytest.mark.parametrize(("length", "radius"), [(25, 4), (24, 3), (5, 7), (1, 2)])
def test_window_equals_long_t5_with_its_mask(length, radius):
    heads, d_model = 3, 12
    config = LongT5Config(d_model=d_model, d_kv=4, num_heads=heads, local_radius=radius, dropout_rate=0.0)
    reference = LongT5LocalAttention(config, has_relative_attention_bias=False)
    mixer = ETCAttention(TransformerConfig(d_model=d_model, heads=heads), global_length=1, radius=radius, label_std=0.0)
    with torch.no_grad():
        for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "o"}.items():
            getattr(mixer, ours).weight.copy_(getattr(reference, theirs).weight)
            getattr(mixer, ours).bias.zero_()
        mixer.query.weight.mul_(math.sqrt(4))  # T5 does not divide its scores
    x = random(2, length, d_model)
    real = torch.arange(length) < torch.tensor([[length], [max(1, length - 7)]])
    expected = reference(x, mask=_get_local_attention_mask(real, radius + 1, "cpu"))[0]
    hidden_global = torch.zeros(2, 1, dtype=torch.bool)  # a padded global token, which nobody sees
    y, _ = mixer(torch.cat([random(2, 1, d_model, seed=1), x], dim=1), torch.cat([hidden_global, real], dim=1))
    assert torch.allclose(y[:, 1:][real], expected[real], atol=1e-5)


# -------------------------------------------------------------------------------------------------- promises


def test_contexts_have_no_order():
    contexts, global_each, long_each = 3, 2, 5
    g, length = contexts * global_each, contexts * (global_each + long_each)
    mixer, x = make(g, radius=9), random(2, length, 12, dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    shuffled = torch.cat(
        [
            torch.arange(g).view(contexts, -1)[order].flatten(),
            torch.arange(g, length).view(contexts, -1)[order].flatten(),
        ]
    )
    ids = torch.cat(
        [torch.arange(contexts).repeat_interleave(global_each), torch.arange(contexts).repeat_interleave(long_each)]
    ).expand(2, -1)
    plain = mixer(x, context_ids=ids)[0]
    assert torch.allclose(mixer(x[:, shuffled], context_ids=ids)[0], plain[:, shuffled], rtol=1e-12, atol=1e-12)
    # without ids the order is seen
    assert (mixer(x[:, shuffled])[0] - mixer(x)[0][:, shuffled]).abs().max() > 1e-2


def test_a_word_reaches_the_whole_text_in_two_layers_and_its_window_in_one():
    mixer = make(1, radius=2)
    x = random(1, 21, 12, dtype=torch.float64)
    changed = x.clone()
    changed[:, 10] += 1
    seen = (mixer(changed)[0] != mixer(x)[0]).any(-1)[0]
    assert seen.nonzero().flatten().tolist() == [0, 8, 9, 10, 11, 12]
    twice = (mixer(mixer(changed)[0])[0] != mixer(mixer(x)[0])[0]).any(-1)
    assert twice.all()


def test_never_makes_a_table_of_all_pairs():
    config, ratios = TransformerConfig(d_model=32, heads=4), []
    for length in (1_024, 2_048):
        mixer = ETCAttention(config, global_length=8, radius=16)
        contexts = (torch.arange(length) // 100).expand(1, -1)
        real = torch.arange(length).expand(1, -1) < length - 5

        def method(x, mixer=mixer, contexts=contexts, real=real):
            return mixer(x, real, context_ids=contexts)[0]

        ratios.append(largest_storage(method, random(1, length, 32)) / (4 * length**2))
    assert ratios[0] < 0.5
    # not exactly half: what is added at the ends of the text does not grow with it
    assert ratios[1] == pytest.approx(ratios[0] / 2, rel=0.1)


def test_label_vectors_start_as_said():
    def labels(seed, **arguments):
        mixer = ETCAttention(TransformerConfig(), global_length=2, radius=4, seed=seed, **arguments)
        assert not mixer.long_label_bias.any()
        assert not mixer.global_label_bias.any()
        return torch.stack([mixer.long_labels, mixer.global_labels]).detach()

    drawn = labels(0)
    assert drawn.shape == (2, 2 * 12 + 4, 12, 32)
    assert drawn.abs().max() <= 1.0  # two standard deviations
    # a normal distribution cut at two standard deviations has 0.88 of its standard deviation
    assert drawn.std() == pytest.approx(0.5 * 0.8796, rel=0.02)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn, labels(0))
    assert not torch.equal(drawn, labels(1))
    assert not labels(0, label_std=0.0).any()


def test_serves_in_the_encoder():
    config = TransformerConfig(vocab_size=50, max_length=64, d_model=16, layers=2, heads=2, d_ff=32)
    encoder = Encoder(
        config, token_mixer=lambda config, layer: ETCAttention(config, global_length=4, radius=3, seed=layer)
    ).eval()
    ids = torch.arange(80).view(2, 40) * 7 % 50
    real = torch.arange(40) < torch.tensor([[40], [29]])
    out = encoder(ids, real).last
    changed = torch.where(real, ids, (ids + 1) % 50)
    assert torch.allclose(encoder(changed, real).last[real], out[real], atol=1e-6)
    encoder(ids, real).last.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.blocks.parameters())


def test_bad_input_is_named():
    for arguments in ({"global_length": 0, "radius": 2}, {"global_length": 2, "radius": 0}):
        with pytest.raises(ValueError, match="must be an integer >= 1, got 0"):
            ETCAttention(CONFIG, **arguments)
    with pytest.raises(ValueError, match="label_std must be >= 0, got -1"):
        ETCAttention(CONFIG, global_length=2, radius=2, label_std=-1)
    mixer, x = ETCAttention(CONFIG, global_length=3, radius=2), random(2, 8, 12)
    with pytest.raises(ValueError, match=r"x must be \(batch, length >= 4, d_model\): 3 global .*got \(2, 3, 12\)"):
        mixer(x[:, :3])
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        mixer(x, torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"context_ids must have shape \(2, 8\), got \(2, 5\)"):
        mixer(x, context_ids=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="context_ids must hold integers"):
        mixer(x, context_ids=torch.zeros(2, 8))
    with pytest.raises(ValueError, match="state must be None"):
        mixer(x, state=())
    with pytest.raises(ValueError, match="radius must be"):
        etc_mask(1, 5, 0)
