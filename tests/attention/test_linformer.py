"""Linformer: the formula written out, sharing, identities, padding before the projection, no causality, memory."""

import pytest
import torch
from torch import Tensor

from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.attention.linformer import (
    LinformerAttention,
    draw_projections,
    linformer_attention,
    linformer_mixers,
    pooling_projection,
)
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.transformer import Decoder, Encoder, SelfAttention, TransformerConfig

CONFIG = TransformerConfig(vocab_size=40, max_length=16, d_model=12, layers=2, heads=3, d_ff=16, segments=0)
SHARING = ["none", "headwise", "key-value", "layerwise"]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vectors(batch: int, heads: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """q, k, v that are not contiguous."""
    return random(3, batch, length, heads, 4, dtype=dtype).transpose(2, 3)


def by_loops(q: Tensor, k: Tensor, v: Tensor, real: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """softmax(q (E k)ᵀ / sqrt(d)) (F v), text by text and head by head, real tokens picked out of E, F, k and v."""
    output = 0 * q
    for text in range(len(q)):
        places = real[text].nonzero().flatten()
        if len(places) == 0:
            continue
        for head in range(q.shape[1]):
            own_e, own_f = e[head % len(e)][:, places], f[head % len(f)][:, places]
            keys, values = own_e @ k[text, head, places], own_f @ v[text, head, places]
            weights = torch.exp(q[text, head, places] @ keys.T / q.shape[-1] ** 0.5)
            output[text, head, places] = weights / weights.sum(1, keepdim=True) @ values
    return output


# ----------------------------------------------------------------------------- the definition


@pytest.mark.parametrize(
    ("batch", "heads", "length", "shared", "projected"),
    [(1, 1, 1, True, 1), (2, 3, 7, False, 4), (3, 3, 9, True, 4), (3, 2, 5, False, 8), (2, 1, 11, False, 3)],
)
@pytest.mark.parametrize("padding", ["none", "end", "anywhere", "a whole text"])
def test_output_and_gradients_are_the_definition(batch, heads, length, shared, projected, padding):
    q, k, v = vectors(batch, heads, length)
    e, f = random(2, 1 if shared else heads, projected, 11, seed=1)  # longer than most of the texts
    generator, real = torch.Generator().manual_seed(length), torch.ones(batch, length, dtype=torch.bool)
    if padding != "none":
        real = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=generator)
    if padding == "anywhere":
        real = real[:, torch.randperm(length, generator=generator)]
    if padding == "a whole text":
        real[-1] = False
    direction = random(*q.shape, seed=2)
    results = []
    for path in (
        lambda q, k, v, e, f: linformer_attention(q, k, v, real, project_keys=e, project_values=f),
        lambda q, k, v, e, f: by_loops(q, k, v, real, e, f),
    ):
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v, e, f)]
        output = path(*inputs)
        results.append([output, *torch.autograd.grad((output * direction).sum(), inputs, materialize_grads=True)])
    for fast, truth in zip(*results, strict=True):
        torch.testing.assert_close(fast, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 6, 9])
def test_identity_projections_are_full_attention(length):
    q, k, v = vectors(2, 3, length)
    identity = torch.eye(length, dtype=torch.float64)[None]
    projections = {"project_keys": identity, "project_values": identity}
    truth = dense_attention(q, k, v)
    torch.testing.assert_close(linformer_attention(q, k, v, **projections), truth, rtol=1e-10, atol=1e-10)
    same = pooling_projection(length, length).double()
    assert torch.equal(same, identity)


def test_mean_pooling_is_torchs_and_any_length_is_cut_evenly():
    q, k, v = vectors(2, 3, 12)
    pooling = pooling_projection(12, 4).double()
    pooled = [torch.nn.functional.avg_pool1d(x.flatten(0, 1).mT, 3).mT.unflatten(0, (2, 3)) for x in (k, v)]
    found = linformer_attention(q, k, v, project_keys=pooling, project_values=pooling)
    torch.testing.assert_close(found, dense_attention(q, *pooled), rtol=1e-6, atol=1e-6)  # 1 / 3 in float32
    for length, projected in [(13, 5), (7, 6), (512, 48), (3, 1)]:
        rows = pooling_projection(length, projected)[0]
        torch.testing.assert_close(rows.sum(1), torch.ones(projected))
        sizes = (rows > 0).sum(1)
        assert sizes.sum() == length and sizes.max() - sizes.min() <= 1 and sizes.min() >= 1
        assert ((rows > 0).sum(0) == 1).all()  # every token in one stretch
        assert (rows > 0).int().argmax(0).diff().ge(0).all()  # and the stretches in order


def test_one_row_of_equal_weights_is_the_mean_of_all_values():
    q, k, v = vectors(2, 3, 9)
    pooling = pooling_projection(9, 1).double()
    found = linformer_attention(q, k, v, project_keys=pooling, project_values=pooling)
    torch.testing.assert_close(found, v.mean(2, keepdim=True).expand_as(v), rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------- padding, causality, memory


def test_padding_is_zero_before_the_projections():
    """What stands in padding changes nothing, and the output is that of the shorter text alone."""
    q, k, v = vectors(2, 3, 9)
    e, f = random(2, 3, 4, 9, seed=1)
    real = torch.arange(9) < torch.tensor([[9], [5]])
    before = linformer_attention(q, k, v, real, project_keys=e, project_values=f)
    alone = linformer_attention(*(x[1:, :, :5] for x in (q, k, v)), project_keys=e, project_values=f)
    torch.testing.assert_close(before[1:, :, :5], alone, rtol=1e-10, atol=1e-10)
    assert not before[1, :, 5:].any()
    for x in (q, k, v):
        x.transpose(1, 2)[~real] = 1e4
    assert torch.equal(linformer_attention(q, k, v, real, project_keys=e, project_values=f), before)


def test_a_mask_over_the_projected_rows_would_come_too_late():
    """The mistake that the module's note names: after E every row holds some of the padding."""
    q, k, v = vectors(1, 1, 6)
    e = random(1, 3, 6, seed=1)
    real = torch.tensor([[True] * 4 + [False] * 2])
    right = linformer_attention(q, k, v, real, project_keys=e, project_values=e)[:, :, :4]
    late = dense_attention(q, e @ k, e @ v)[:, :, :4]  # all three rows are "real", so a mask hides none of them
    assert (right - late).abs().max() > 0.1


def test_not_causal_every_earlier_output_moves_with_a_later_token():
    q, k, v = vectors(1, 3, 9)
    e, f = random(2, 3, 4, 9, seed=1)
    before = linformer_attention(q, k, v, project_keys=e, project_values=f)
    for x in (q, k, v):
        x[:, :, 8] += 1
    after = linformer_attention(q, k, v, project_keys=e, project_values=f)
    assert (before[:, :, :8] != after[:, :, :8]).any(-1).all()


@pytest.mark.parametrize("diagonal", [0, 1])
def test_a_triangular_mask_over_the_projected_rows_is_not_causal_either(diagonal):
    """Query i sees the first rows only, yet the first row already holds the last token."""
    q, k, v = vectors(1, 1, 8)
    e, seen = random(1, 4, 8, seed=1), torch.ones(8, 4, dtype=torch.bool).tril(diagonal)
    before = dense_attention(q, e @ k, e @ v, attention_mask=seen)
    v[:, :, 7] += 1
    assert (dense_attention(q, e @ k, e @ v, attention_mask=seen)[:, :, :7] != before[:, :, :7]).any(-1).all()


@pytest.mark.parametrize("heads", [1, 4])
def test_memory_is_linear_in_the_length(heads):
    ratios = []
    for n in (1024, 2048):
        e, f = torch.zeros(2, heads, 64, n)
        ratios.append(
            largest_storage(
                lambda q, k, v, e, f: linformer_attention(q, k, v, project_keys=e, project_values=f),
                *torch.zeros(3, 2, 4, n, 16),
                e,
                f,
            )
            / (4 * n**2)
        )
    assert ratios[0] < 0.5 and ratios[1] == pytest.approx(ratios[0] / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision(dtype):
    q, k, v = vectors(2, 3, 9, dtype)
    e, f = random(2, 3, 4, 9, seed=1, dtype=dtype) / 3
    output = linformer_attention(q, k, v, project_keys=e, project_values=f)
    assert output.dtype == dtype
    truth = linformer_attention(*(x.double() for x in (q, k, v)), project_keys=e.double(), project_values=f.double())
    bound = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 1e-5}[dtype]  # keys are rounded once more
    torch.testing.assert_close(output.double(), truth, rtol=bound, atol=bound)


# ----------------------------------------------------------------------------- sharing, the mixer


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize(("sharing", "matrices"), list(zip(SHARING, [288, 24, 12, 1], strict=True)))
def test_the_papers_count_of_matrices_in_12_layers_of_12_heads(sharing, matrices):
    config = TransformerConfig(d_model=24, layers=12, heads=12, d_ff=8)
    projections = draw_projections(config, 5, 7, sharing)
    distinct = {id(p): p for pair in projections for p in pair}
    assert sum(len(p) for p in distinct.values()) == matrices
    assert all(tuple(p.shape[1:]) == (5, 7) for p in distinct.values())
    with torch.device("meta"):
        encoder = Encoder(config, token_mixer=linformer_mixers(config, 5, 7, sharing))
        dense = Encoder(config)
    assert count(encoder.parameters()) - count(dense.parameters()) == matrices * 5 * 7


@pytest.mark.parametrize("sharing", SHARING)
def test_an_encoder_is_the_formula_with_what_its_layers_share(sharing):
    encoder = Encoder(CONFIG, token_mixer=linformer_mixers(CONFIG, 5, 16, sharing)).double().eval()
    first, second = (block.token_mixer for block in encoder.blocks)
    assert (first.project_keys is first.project_values) == (sharing in ("key-value", "layerwise"))
    assert (first.project_keys is second.project_keys) == (sharing == "layerwise")
    assert not (sharing != "layerwise" and torch.equal(first.project_keys, second.project_keys))
    ids = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
    real = torch.arange(11) < torch.tensor([[11], [6]])
    dense = Encoder(CONFIG).double().eval()
    dense.load_state_dict({n: p for n, p in encoder.state_dict().items() if "project_" not in n})
    for block, mixer in zip(dense.blocks, (first, second), strict=True):
        e, f = mixer.project_keys, mixer.project_values
        block.token_mixer.attention = lambda q, k, v, real, e=e, f=f: by_loops(q, k, v, real, e, f)
    torch.testing.assert_close(encoder(ids, real).last, dense(ids, real).last, rtol=1e-10, atol=1e-10)
    encoder(ids, real).last.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in encoder.named_parameters() if "pooler" not in n
    )
    assert first.project_keys.grad.any()


def test_two_encoders_of_one_factory_share_nothing_but_their_start():
    factory = linformer_mixers(CONFIG, 5, 16, "layerwise", seed=3)
    one, two = (Encoder(CONFIG, token_mixer=factory) for _ in range(2))
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}
    assert torch.equal(one.blocks[0].token_mixer.project_keys, two.blocks[1].token_mixer.project_keys)
    assert one.blocks[0].token_mixer.project_keys is one.blocks[1].token_mixer.project_keys
    other = draw_projections(CONFIG, 5, 16, "layerwise", seed=4)[0][0]
    assert not torch.equal(one.blocks[0].token_mixer.project_keys, other)


def test_start_keeps_the_size_of_independent_keys():
    e, f = draw_projections(CONFIG, 64, 400)[0]
    x = random(400, 200, dtype=torch.float32)
    assert not torch.equal(e, f)
    for projection in (e, f):
        assert (projection[0] @ x).std().item() == pytest.approx(1, rel=0.05)


def test_a_decoder_with_it_sees_the_future():
    decoder = Decoder(CONFIG, token_mixer=linformer_mixers(CONFIG, 5, 16)).eval()
    ids = torch.randint(40, (1, 9), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 40
    assert (decoder(changed).logits[:, :8] != decoder(ids).logits[:, :8]).any(-1).all()


def test_bad_input_is_refused_by_name():
    x, e = torch.zeros(2, 3, 7, 4), torch.zeros(3, 5, 7)
    for keys, values, message in [
        (e[:2], e, r"project_keys must have shape \(1 or 3 heads, projected, max_length\), got \(2, 5, 7\)"),
        (e, e[0], r"project_values must have shape \(1 or 3 heads"),
        (e[..., :6], e, "project_keys is for at most 6 tokens, got 7"),
        (e, e[..., :6], "project_values is for at most 6 tokens, got 7"),
        (e, e[:, :4], "project_keys and project_values must have as many rows, got 5 and 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            linformer_attention(x, x, x, project_keys=keys, project_values=values)
    both = {"project_keys": e, "project_values": e}
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        linformer_attention(x, x, x, torch.ones(2, 7), **both)
    with pytest.raises(ValueError, match="do not fit together"):
        linformer_attention(x, x[:, :, :5], x[:, :, :5], **both)
    with pytest.raises(ValueError, match="projected must be at most the length 4, got 5"):
        pooling_projection(4, 5)
    with pytest.raises(ValueError, match="projected must be an integer >= 1, got 0"):
        pooling_projection(4, 0)
    with pytest.raises(ValueError, match="sharing must be one of 'none', 'headwise', 'key-value', 'layerwise'"):
        linformer_mixers(CONFIG, 5, 16, "heads")
    with pytest.raises(ValueError, match="max_length must be an integer >= 1, got 0"):
        linformer_mixers(CONFIG, 5, 0)
    layer = LinformerAttention(CONFIG, *draw_projections(CONFIG, 5, 16)[0])
    with pytest.raises(ValueError, match="state must be None"):
        layer(torch.zeros(1, 3, 12), None, ())
    with pytest.raises(ValueError, match="project_keys is for at most 16 tokens, got 17"):
        layer(torch.zeros(1, 17, 12))
    with pytest.raises(ValueError, match="project_keys must have shape"):
        LinformerAttention(CONFIG, torch.nn.Parameter(e[:2]), torch.nn.Parameter(e))


def test_projection_matrices_are_all_that_is_added():
    layer = LinformerAttention(CONFIG, *draw_projections(CONFIG, 5, 16)[0])
    assert count(layer.parameters()) == count(SelfAttention(CONFIG).parameters()) + 2 * 3 * 5 * 16
