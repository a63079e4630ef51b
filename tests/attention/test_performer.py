"""Performer: the features estimate the softmax kernel without bias, and attention with them is linear attention."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.attention.performer import draw_projections, favor_features, performer_attention
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.transformer import Decoder, Encoder, TransformerConfig

HEADS, D_HEAD = 3, 8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
lengths = st.integers(1, 40)
paddings = st.sampled_from(["none", "end", "anywhere", "a whole text"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


PROJECTIONS = draw_projections(20, D_HEAD, generator())  # two blocks and a half


def draw_inputs(length, padding="none", dtype=torch.float64, seed=0):
    """q, k, v that are not contiguous, and a mask."""
    x = torch.randn(2, length, HEADS, 3 * D_HEAD, generator=generator(seed), dtype=dtype).transpose(1, 2)
    if padding == "none":
        return *x.chunk(3, dim=-1), None
    real = torch.arange(length) < torch.randint(1, length + 1, (2, 1), generator=generator(seed))
    if padding == "anywhere":
        real = real[:, torch.randperm(length, generator=generator(seed))]
    if padding == "a whole text":
        real[1] = False
    return *x.chunk(3, dim=-1), real


def quadratic(q, k, v, real=None, causal=False, projections=PROJECTIONS):
    """The definition: a table of estimated softmax kernels, nothing subtracted from any exponent."""
    q, k = (x / D_HEAD**0.25 for x in (q, k))
    w = projections.to(q.dtype)
    phi_q, phi_k = (torch.exp(x @ w.T - (x**2).sum(-1, keepdim=True) / 2) / math.sqrt(len(w)) for x in (q, k))
    weights = phi_q @ phi_k.transpose(-2, -1)
    if causal:
        weights = weights.tril()
    if real is not None:
        weights = weights * real[:, None, None, :]
    total = weights.sum(dim=-1, keepdim=True)
    output = weights / torch.where(total > 0, total, 1.0) @ v
    return output if real is None else output * real[:, None, :, None]


# ---------------------------------------------------------------------------------------------- projections


def test_projections_are_orthogonal_in_blocks_and_have_normal_lengths():
    blocks = draw_projections(3 * 400 * 8, 8, generator()).view(-1, 8, 8)
    products = blocks @ blocks.transpose(1, 2)
    off = products - products.diagonal(dim1=1, dim2=2).diag_embed()
    assert off.abs().max() < 1e-4  # the products of vectors of length 3
    squares = blocks.square().sum(-1).flatten()  # chi squared: mean d, variance 2 d; 9,600 draws
    assert squares.mean() == pytest.approx(8, rel=0.03) and squares.var() == pytest.approx(16, rel=0.1)
    # every channel is normal(0, 1): mean, variance and fourth moment; no direction is preferred by QR's signs
    assert blocks.mean(0).abs().max() < 0.15
    assert blocks.var() == pytest.approx(1, rel=0.03) and (blocks**4).mean() == pytest.approx(3, rel=0.06)


def test_any_number_of_projections_from_a_generator_alone():
    for features in (1, 7, 8, 9, 20):
        w = draw_projections(features, 8, generator(3))
        assert w.shape == (features, 8) and w.dtype == torch.float32 and w.isfinite().all()
        assert torch.equal(w, draw_projections(features, 8, generator(3)))
    assert not torch.equal(w, draw_projections(20, 8, generator(4)))
    independent = draw_projections(16, 8, generator(3), orthogonal=False)
    products = independent[:8] @ independent[:8].T
    assert (products - products.diag().diag()).abs().max() > 0.5


# -------------------------------------------------------------------------------------------------- features


def kernel_estimates(orthogonal, draws=20_000, d=8):
    """The softmax kernel of six pairs, and estimates of it, each from d features. Long vectors need more draws."""
    q, k = 0.5 * torch.randn(2, 6, d, generator=generator(1), dtype=torch.float64)
    w = draw_projections(draws * d, d, generator(), orthogonal)
    products = favor_features(q, w, is_query=False) * favor_features(k, w, is_query=False)
    estimates = draws * products.unflatten(-1, (draws, d)).sum(-1)  # the features are divided by all of them
    return ((q * k).sum(-1) / math.sqrt(d)).exp(), estimates


@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_estimate_of_the_softmax_kernel_is_unbiased(orthogonal):
    truth, estimates = kernel_estimates(orthogonal)
    standard_error = estimates.std(1) / math.sqrt(estimates.shape[1])
    assert ((estimates.mean(1) - truth).abs() < 4 * standard_error).all()
    assert (standard_error < 0.015 * truth).all()  # a bias of 6 % would be seen
    assert (estimates > 0).all()


def test_the_variance_is_the_papers_and_orthogonal_rows_have_less():
    d = 8
    truth, independent = kernel_estimates(False)
    _, orthogonal = kernel_estimates(True)
    q, k = 0.5 * torch.randn(2, 6, d, generator=generator(1), dtype=torch.float64) / d**0.25
    together = (q + k).square().sum(-1).exp()
    expected = together * truth**2 * (1 - 1 / together) / d  # Eq. 8
    found = (independent - truth[:, None]).square().mean(1)
    short = together < 10  # the others' squares have too long a tail
    assert short.sum() >= 3
    # a variance estimated from a sample
    torch.testing.assert_close(found[short], expected[short], rtol=0.1, atol=0)
    # not the gain of Eq. 10, which as printed makes the variance negative for k = -q, where it is 0
    less = (orthogonal - truth[:, None]).square().mean(1)
    assert (less < found).all() and (less / found).mean() < 0.9


def test_a_query_may_lose_its_largest_exponent():
    x, *_ = draw_inputs(9)
    key, query = (favor_features(x, PROJECTIONS, is_query=q) for q in (False, True))
    torch.testing.assert_close(query, key / key.amax(-1, keepdim=True) / math.sqrt(20), rtol=1e-10, atol=0)
    assert favor_features(x.half(), PROJECTIONS, True).dtype == torch.float32


# -------------------------------------------------------------------------------------------------- attention


@given(length=lengths, padding=paddings, causal=st.booleans(), dtype=st.sampled_from(list(TOLERANCE)))
@settings(max_examples=40)
def test_it_is_the_quadratic_form(length, padding, causal, dtype):
    q, k, v, real = draw_inputs(length, padding, dtype, seed=length)
    output = performer_attention(q, k, v, real, projections=PROJECTIONS, causal=causal)
    assert output.dtype == dtype
    truth = quadratic(*(x.double() for x in (q, k, v)), real, causal).to(dtype)
    torch.testing.assert_close(output, truth, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_quadratic_form(causal):
    *vectors, real = draw_inputs(70, "end")
    inputs = [x.detach().requires_grad_() for x in vectors]
    output = performer_attention(*inputs, real, projections=PROJECTIONS, causal=causal)
    truth = quadratic(*inputs, real, causal)
    upstream = torch.randn(truth.shape, generator=generator(1), dtype=truth.dtype)
    ours, theirs = (torch.autograd.grad(x, inputs, upstream) for x in (output, truth))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_more_features_are_nearer_to_softmax_attention(causal):
    q, k, v, real = draw_inputs(50, "end")
    q, k = q / 2, k / 2
    truth = dense_attention(q, k, v, real, causal=causal) * real[:, None, :, None]
    errors = []
    for features in (8, 64, 512):
        draws = [draw_projections(features, D_HEAD, generator(seed)) for seed in range(8)]
        outputs = [performer_attention(q, k, v, real, projections=w, causal=causal) for w in draws]
        errors.append((torch.stack(outputs) - truth).square().mean().sqrt() / truth.square().mean().sqrt())
    # eight times the features: an error smaller by up to the square root of eight
    assert errors[1] < errors[0] / 1.6 and errors[2] < errors[1] / 2.2
    assert errors[2] < 0.15


@pytest.mark.parametrize("causal", [False, True])
def test_large_inputs_give_finite_numbers(causal):
    """Logits of some tens; exponents without the query's maximum would leave float32."""
    q, k, v, _ = draw_inputs(30, dtype=torch.float32)
    inputs = [x.detach().requires_grad_() for x in (40 * q, 4 * k, v)]
    output = performer_attention(*inputs, projections=PROJECTIONS, causal=causal)
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert all(x.isfinite().all() for x in (output, *gradients))
    assert output.abs().amax(dim=-1).min() > 0  # no query has vanished


def test_causal_is_strict_and_bidirectional_is_not_causal_at_all():
    q, k, v, _ = draw_inputs(33)
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, :, 20:] *= 3
    run = partial(performer_attention, projections=PROJECTIONS)
    before, after = (run(*x, causal=True)[:, :, :20] for x in ((q, k, v), later))
    assert torch.equal(before, after)
    before, after = (run(*x)[:, :, :20] for x in ((q, k, v), later))
    assert (before - after).abs().amax(dim=(0, 1, 3)).min() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_not_read_and_its_output_is_zero(causal):
    q, k, v, real = draw_inputs(19, "a whole text")
    other = [torch.where(real[:, None, :, None], x, 3.0) for x in (q, k, v)]
    outputs = [
        performer_attention(*x, real, projections=PROJECTIONS, causal=causal) for x in ((q, k, v), other)
    ]  # fmt: skip
    assert torch.equal(*outputs)
    assert (outputs[0][~real[:, None, :, None].expand_as(outputs[0])] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(causal, dtype):
    q, k, v, real = draw_inputs(37, "end", dtype)
    output = performer_attention(q, k, v, real, projections=PROJECTIONS, causal=causal)
    assert output.dtype == dtype
    truth = quadratic(*(x.double() for x in (q, k, v)), real, causal)
    bound = 2e-2 if dtype == torch.bfloat16 else 3e-3  # the output is rounded to 2**-8 and 2**-11
    torch.testing.assert_close(output.double(), truth, rtol=bound, atol=bound)


@pytest.mark.parametrize("causal", [False, True])
def test_autocast_rounds_neither_features_nor_sums(causal):
    q, k, v, _ = draw_inputs(9, dtype=torch.float32)
    run = partial(performer_attention, projections=PROJECTIONS, causal=causal)
    outside = run(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(q, k, v), outside)


@pytest.mark.parametrize("causal", [False, True])
def test_no_tensor_of_all_pairs(causal):
    heads, d, projections = 4, 16, draw_projections(32, 16, generator())

    def largest(length):
        x = (torch.randn(1, heads, length, d, generator=generator()) for _ in "qkv")
        return largest_storage(partial(performer_attention, projections=projections, causal=causal), *x)

    assert largest(1_024) <= 1_024 * heads * 32  # the features of the queries
    assert largest(2_048) / 2_048**2 <= 0.51 * largest(1_024) / 1_024**2


@pytest.mark.parametrize("model", [Encoder, Decoder])
def test_it_is_the_attention_of_the_courses_transformer(model):
    config = TransformerConfig(vocab_size=50, max_length=24, d_model=24, layers=2, heads=HEADS, d_ff=16, segments=0)
    ids = torch.randint(50, (2, 19), generator=generator())
    real, causal = torch.arange(19) < torch.tensor([[19], [11]]), model is Decoder
    fast, slow = (
        model(config, attention=attention).eval()(ids, real)[0]
        for attention in (
            partial(performer_attention, projections=PROJECTIONS, causal=causal),
            partial(quadratic, causal=causal),
        )
    )
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_bad_input_is_refused_by_name():
    x = torch.zeros(2, HEADS, 7, D_HEAD)
    attention = partial(performer_attention, projections=PROJECTIONS)
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        attention(x, x, x, torch.ones(2, 7))
    with pytest.raises(ValueError, match="do not fit together"):
        attention(x, x[:, :, :5], x[:, :, :5])
    with pytest.raises(ValueError, match=r"projections must be \(features, 8\), got \(20, 9\)"):
        performer_attention(x, x, x, projections=torch.zeros(20, 9))
    for features in (0, 2.5):
        with pytest.raises(ValueError, match="features must be an integer >= 1"):
            draw_projections(features, 8, generator())
