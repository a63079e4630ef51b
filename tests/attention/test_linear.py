"""Linear attention: parallel, chunked, recurrent and quadratic are one function; the backward is the right one."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.attention.linear import (
    CausalProduct,
    LinearSelfAttention,
    LinearState,
    causal_linear_attention,
    feature_map,
    linear_attention,
    linear_step,
)
from effnlp_lessons.transformer import Decoder, DecoderState, Encoder, SelfAttention, TransformerConfig

HEADS, D_HEAD, D_VALUE = 3, 5, 4
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
CONFIG = TransformerConfig(
    vocab_size=50, max_length=0, d_model=12, layers=2, heads=HEADS, d_ff=16, segments=0, dropout=0.0
)
lengths = st.integers(1, 40)
paddings = st.sampled_from(["none", "end", "anywhere", "a whole text"])


def draw_inputs(length, padding="none", dtype=torch.float64, seed=0):
    """q, k, v that are not contiguous, values of another size than keys, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, length, HEADS, 2 * D_HEAD + D_VALUE, generator=generator, dtype=dtype).transpose(1, 2)
    if padding == "none":
        return *x.split([D_HEAD, D_HEAD, D_VALUE], dim=-1), None
    real = torch.arange(length) < torch.randint(1, length + 1, (2, 1), generator=generator)
    if padding == "anywhere":
        real = real[:, torch.randperm(length, generator=generator)]
    if padding == "a whole text":
        real[1] = False
    return *x.split([D_HEAD, D_HEAD, D_VALUE], dim=-1), real


def quadratic(q, k, v, real=None, causal=False):
    """The definition: a table of all weights, elu as torch has it."""
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)
    if causal:
        weights = weights.tril()
    if real is not None:
        weights = weights * real[:, None, None, :]
    total = weights.sum(dim=-1, keepdim=True)
    output = weights / torch.where(total > 0, total, 1.0) @ v  # a query without a key has no weights
    return output if real is None else output * real[:, None, :, None]


def recurrent(q, k, v, real=None):
    """One token at a time through `linear_step`."""
    outputs, state = [], None
    for t in range(q.shape[2]):
        now = slice(t, t + 1)
        seen = None if real is None else real[:, now]
        y, state = linear_step(q[:, :, now], k[:, :, now], v[:, :, now], state, seen)
        outputs.append(y)
    return torch.cat(outputs, dim=2)


# ------------------------------------------------------------------------------------------------ identities


@given(length=lengths, padding=paddings, chunk=st.integers(1, 50), dtype=st.sampled_from(list(TOLERANCE)))
@settings(max_examples=40)
def test_chunked_recurrent_and_quadratic_are_one_function(length, padding, chunk, dtype):
    q, k, v, real = draw_inputs(length, padding, dtype, seed=length)
    truth = quadratic(q, k, v, real, causal=True)
    bound = TOLERANCE[dtype]
    chunked = causal_linear_attention(q, k, v, real, chunk=chunk)
    assert chunked.dtype == dtype
    torch.testing.assert_close(chunked, truth, rtol=bound, atol=bound)
    torch.testing.assert_close(recurrent(q, k, v, real), truth, rtol=bound, atol=bound)


@given(length=lengths, padding=paddings, dtype=st.sampled_from(list(TOLERANCE)))
@settings(max_examples=40)
def test_the_parallel_form_is_the_quadratic_one(length, padding, dtype):
    q, k, v, real = draw_inputs(length, padding, dtype, seed=length)
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(linear_attention(q, k, v, real), quadratic(q, k, v, real), rtol=bound, atol=bound)


def test_the_last_query_of_the_causal_form_sees_all_keys_as_every_query_of_the_other_does():
    q, k, v, _ = draw_inputs(37)
    torch.testing.assert_close(
        causal_linear_attention(q, k, v)[:, :, -1], linear_attention(q, k, v)[:, :, -1], rtol=0, atol=1e-10
    )


def test_the_state_is_the_sums_over_the_real_keys():
    q, k, v, real = draw_inputs(23, "anywhere")
    _, state = linear_step(q, k, v, None, real)
    features = (F.elu(k) + 1) * real[:, None, :, None]
    torch.testing.assert_close(state.sums, torch.einsum("bhnd,bhnm->bhdm", features, v), rtol=0, atol=1e-10)
    torch.testing.assert_close(state.normaliser, features.sum(2), rtol=0, atol=1e-10)
    assert state.sums.shape == (2, HEADS, D_HEAD, D_VALUE)


@given(cut=st.integers(1, 22), padding=paddings)
@settings(max_examples=20)
def test_a_text_may_come_in_two_pieces_and_gradients_go_through_the_state(cut, padding):
    q, k, v, real = draw_inputs(23, padding)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]

    def pieces(q, k, v):
        masks = (None, None) if real is None else (real[:, :cut], real[:, cut:])
        first, state = linear_step(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], None, masks[0])
        second, _ = linear_step(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], state, masks[1])
        return torch.cat([first, second], dim=2)

    whole, truth = pieces(*inputs), quadratic(*inputs, real, causal=True)
    torch.testing.assert_close(whole, truth, rtol=0, atol=1e-10)
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=truth.dtype)
    ours, theirs = (torch.autograd.grad(x, inputs, upstream) for x in (whole, truth))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_torch_has_the_same_feature_map_and_ours_keeps_small_numbers():
    x = torch.cat([torch.linspace(-5, 5, 101, dtype=torch.float64), torch.zeros(1)]).requires_grad_()
    torch.testing.assert_close(feature_map(x), F.elu(x) + 1, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (feature_map(x), F.elu(x) + 1))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)  # 1 at zero, too
    small = torch.tensor([-18.0, -60.0])
    assert (F.elu(small) + 1 == 0).all()
    torch.testing.assert_close(feature_map(small).double(), small.double().exp(), rtol=1e-6, atol=0)
    assert feature_map(small.half()).dtype == feature_map(small.bfloat16()).dtype == torch.float32


def test_weights_sum_to_one_however_small_the_features_are():
    q, k, _, _ = draw_inputs(9, dtype=torch.float32)
    same = torch.full((2, HEADS, 9, 2), 3.0)
    for attention in (linear_attention, causal_linear_attention, recurrent):
        torch.testing.assert_close(attention(q - 12, k - 12, same), same, rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------- the gradients


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_the_written_backward_is_the_derivative(chunk, reverse):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, size, generator=generator, dtype=torch.float64) for size in (3, 3, 2))
    start = torch.randn(1, 2, 3, 2, generator=generator, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, start)]
    assert torch.autograd.gradcheck(lambda *x: CausalProduct.apply(*x, chunk, reverse), inputs)


def test_the_backward_has_a_derivative_too():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 5, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in "qkv")
    start = torch.randn(1, 1, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *x: CausalProduct.apply(*x, 2, False), (q, k, v, start))


@given(length=lengths, padding=paddings, causal=st.booleans())
@settings(max_examples=30)
def test_gradients_are_those_of_the_quadratic_form(length, padding, causal):
    *vectors, real = draw_inputs(length, padding, seed=length)
    inputs = [x.detach().requires_grad_() for x in vectors]
    attention = partial(causal_linear_attention, chunk=8) if causal else linear_attention
    output, truth = attention(*inputs, real), quadratic(*inputs, real, causal)
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=truth.dtype)
    ours = torch.autograd.grad(output, inputs, upstream)
    torch.testing.assert_close(ours, torch.autograd.grad(truth, inputs, upstream), rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------------------------- time and memory


@pytest.mark.parametrize("attention", [linear_attention, causal_linear_attention])
def test_no_tensor_of_all_pairs_and_no_state_for_every_token(attention):
    heads, d = 4, 16

    def largest(length):
        generator = torch.Generator().manual_seed(0)
        return largest_storage(attention, *(torch.randn(1, heads, length, d, generator=generator) for _ in "qkv"))

    # forward and backward: no more than the values with their column of ones; n states would be n heads d (d + 1)
    assert largest(1_024) <= 1_024 * heads * (d + 1)
    assert largest(2_048) / 2_048**2 <= 0.51 * largest(1_024) / 1_024**2


def test_the_state_does_not_grow():
    q, k, v, _ = draw_inputs(40)
    sizes = set()
    for length in (1, 7, 40):
        _, state = linear_step(*(x[:, :, :length] for x in (q, k, v)))
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in state}
        sizes.add(sum(storages.values()))
    assert sizes == {2 * HEADS * D_HEAD * (D_VALUE + 1) * 8}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype, causal):
    """4,000 equal numbers: a sum in half precision would stop growing at 256 (bfloat16) or 2,048 (float16)."""
    length = 4_000
    q = k = torch.zeros(1, 1, length, 2, dtype=dtype)
    v = (torch.arange(length) >= length // 2).to(dtype)[None, None, :, None]
    output = (causal_linear_attention if causal else linear_attention)(q, k, v)
    assert output.dtype == dtype
    assert output[0, 0, -1].item() == 0.5
    if causal:
        _, state = linear_step(q, k, v)
        assert state.sums.dtype == state.normaliser.dtype == torch.float32
        assert state.normaliser[0, 0].tolist() == [length, length]


@given(length=lengths, causal=st.booleans(), dtype=st.sampled_from([torch.float16, torch.bfloat16]))
@settings(max_examples=20)
def test_half_precision_is_near_the_truth(length, causal, dtype):
    q, k, v, real = draw_inputs(length, "end", dtype, length)
    output = (causal_linear_attention if causal else linear_attention)(q, k, v, real)
    truth = quadratic(q.double(), k.double(), v.double(), real, causal)
    bound = 2e-2 if dtype == torch.bfloat16 else 3e-3  # the output is rounded to 2**-8 and 2**-11
    torch.testing.assert_close(output.double(), truth, rtol=bound, atol=bound)


# -------------------------------------------------------------------------------------------- causality, padding


def test_causal_is_strict_and_bidirectional_is_not_causal_at_all():
    q, k, v, _ = draw_inputs(33)
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, :, 20:] += 1
    before, after = (causal_linear_attention(*x, chunk=8)[:, :, :20] for x in ((q, k, v), later))
    assert torch.equal(before, after)
    before, after = (linear_attention(*x)[:, :, :20] for x in ((q, k, v), later))
    assert (before - after).abs().amax(dim=(0, 1, 3)).min() > 1e-3


@pytest.mark.parametrize("attention", [linear_attention, causal_linear_attention])
def test_padding_is_not_read_and_its_output_is_zero(attention):
    q, k, v, real = draw_inputs(19, "a whole text")
    other = [torch.where(real[:, None, :, None], x, 7.0) for x in (q, k, v)]
    output = attention(q, k, v, real)
    assert torch.equal(output, attention(*other, real))
    assert (output[~real[:, None, :, None].expand_as(output)] == 0).all()
    assert (output[1] == 0).all()
    if attention is causal_linear_attention:  # real tokens after padding at the start
        real = torch.arange(19).expand(2, -1) >= 6
        torch.testing.assert_close(
            attention(q, k, v, real)[:, :, 6:], attention(*(x[:, :, 6:] for x in (q, k, v))), rtol=0, atol=1e-12
        )


# ---------------------------------------------------------------------------------------------- in a Transformer


def token_ids(length=19, batch=2):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(0))


def decoder():
    return Decoder(CONFIG, token_mixer=lambda config, layer: LinearSelfAttention(config, causal=True)).eval().double()


@pytest.mark.parametrize("pieces", [[1] * 19, [7, 1, 1, 10], [18, 1]])
def test_a_decoder_generates_token_by_token_what_it_computes_at_once(pieces):
    model, ids = decoder(), token_ids()
    real = torch.arange(19) >= torch.tensor([[0], [4]])  # padding before the text, as in generation from a batch
    for mask in (None, real):
        whole = model(ids, mask).logits
        outputs, state, end = [], None, 0
        for piece in pieces:
            end += piece
            out = model(ids[:, end - piece : end], None if mask is None else mask[:, :end], state)
            outputs.append(out.logits)
            state = out.state
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=0, atol=1e-10)
        assert isinstance(state, DecoderState) and isinstance(state.layers[0], LinearState)
        assert state.layers[0].sums.shape == (2, HEADS, 4, 4)


def test_the_mixer_is_the_attention_between_the_layers_own_projections():
    x = torch.randn(2, 11, 12, generator=torch.Generator().manual_seed(0))
    real = torch.arange(11) < torch.tensor([[11], [6]])
    dense = SelfAttention(CONFIG)
    for causal in (False, True):
        mixer = LinearSelfAttention(CONFIG, causal)
        mixer.load_state_dict(dense.state_dict())  # weights of a dense layer fit
        q, k, v = (dense.split_heads(project(x)) for project in (dense.query, dense.key, dense.value))
        truth = dense.output(quadratic(q, k, v, real, causal).transpose(1, 2).flatten(2))
        y, state = mixer(x, real)
        torch.testing.assert_close(y, truth, rtol=0, atol=1e-5)
        assert (state is not None) == causal


@pytest.mark.parametrize("attention", [linear_attention, causal_linear_attention, recurrent])
def test_autocast_does_not_round_the_sums(attention):
    q, k, v, _ = draw_inputs(9, dtype=torch.float32)
    outside = attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v), outside)


@pytest.mark.parametrize("model", ["encoder", "decoder"])
def test_it_trains_under_bfloat16_autocast(model):
    if model == "encoder":
        net = Encoder(CONFIG, token_mixer=lambda config, layer: LinearSelfAttention(config))
    else:
        net = decoder().float()
    with torch.autocast("cpu", torch.bfloat16):
        output = net(token_ids())[0]
        loss = output.float().square().mean()
    loss.backward()
    exact = net(token_ids())[0]
    assert (output.float() - exact).norm() < 0.05 * exact.norm()  # bfloat16 projections
    assert all(p.grad.isfinite().all() for n, p in net.named_parameters() if p.grad is not None)
    assert net.blocks[0].token_mixer.key.weight.grad.abs().max() > 0


def test_bad_input_is_refused_by_name():
    x = torch.zeros(2, HEADS, 7, 4)
    for attention in (linear_attention, causal_linear_attention, linear_step):
        with pytest.raises(ValueError, match="key_padding_mask must be bool"):
            attention(x, x, x, key_padding_mask=torch.ones(2, 7))
        with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 7\)"):
            attention(x, x, x, key_padding_mask=torch.ones(2, 6, dtype=torch.bool))
        with pytest.raises(ValueError, match="do not fit together"):
            attention(x, x[:, :, :5], x[:, :, :5])
        with pytest.raises(ValueError, match="at least one token"):
            attention(x[:, :, :0], x[:, :, :0], x[:, :, :0])
    for chunk in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="chunk must be an integer >= 1"):
            causal_linear_attention(x, x, x, chunk=chunk)
    _, state = linear_step(x, x, x)
    with pytest.raises(ValueError, match=r"state.sums must have shape \(1, 3, 4, 4\)"):
        linear_step(x[:1], x[:1], x[:1], state)
    mixer, hidden = LinearSelfAttention(CONFIG), torch.zeros(2, 7, 12)
    with pytest.raises(ValueError, match="state needs causal"):
        mixer(hidden, None, state)
    mixer = LinearSelfAttention(CONFIG, causal=True)
    with pytest.raises(ValueError, match="key_padding_mask must have shape"):
        mixer(hidden, torch.ones(2, 6, dtype=torch.bool), state)
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        mixer(hidden, torch.ones(2, 9), state)
    with pytest.raises(ValueError, match="LinearSelfAttention has no scores"):
        Encoder(CONFIG, token_mixer=lambda config, layer: LinearSelfAttention(config))(token_ids(), return_scores=True)
