"""Longformer: masks against loops, transformers' own class, reach, memory, the token mixer."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoConfig, LongformerConfig
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.attention.longformer import (
    LongformerAttention,
    extended_positions,
    longformer_mask,
    window_attention,
    window_mask,
)
from effnlp_lessons.attention.patterns import reach
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.transformer import Decoder, Encoder, TransformerConfig

CONFIG = TransformerConfig(vocab_size=60, max_length=64, d_model=12, layers=2, heads=3, d_ff=16, segments=0)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ----------------------------------------------------------------------------- the definitions


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "window", "dilation"), [(1, 0, 1), (7, 2, 1), (12, 3, 2), (9, 2, 4), (5, 9, 3)])
def test_window_mask_is_the_papers_list_of_keys(length, window, dilation, causal):
    mask = window_mask(length, window, dilation, causal)
    for i in range(length):
        steps = range(-window, 1 if causal else window + 1)
        keys = {i + r * dilation for r in steps} & set(range(length))
        assert set(mask[i].nonzero().flatten().tolist()) == keys


def test_longformer_mask_is_symmetric_in_its_global_tokens():
    chosen = torch.tensor([1, 0, 0, 0, 1, 0, 0], dtype=torch.bool)
    mask = longformer_mask(7, 1, chosen)
    assert mask[[0, 4]].all() and mask[:, [0, 4]].all()
    rest = ~chosen[:, None] & ~chosen
    assert torch.equal(mask & rest, window_mask(7, 1) & rest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, -1), "window must be an integer >= 0"),
        ((5, 2.0), "window must be an integer >= 0"),
        ((5, True), "window must be an integer >= 0"),
        ((5, 2, 0), "dilation must be an integer >= 1"),
        ((0, 2), "length must be an integer >= 1"),
    ],
)
def test_window_mask_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        window_mask(*arguments)


def test_one_dilation_a_head_or_one_for_all():
    x = random(1, 3, 8, 4)
    with pytest.raises(ValueError, match="dilation must be one number or 3, one per head, got 2"):
        window_attention(x, x, x, window=2, dilation=(1, 2))


# ----------------------------------------------------------------------------- transformers' classes


def theirs(window: int, d_model: int = 12, heads: int = 3) -> LongformerSelfAttention:
    torch.manual_seed(0)
    config = LongformerConfig(
        hidden_size=d_model, num_attention_heads=heads, attention_window=[2 * window], num_hidden_layers=1
    )
    return LongformerSelfAttention(config, 0).eval()


def ours_like(module: LongformerSelfAttention, window: int, config: TransformerConfig = CONFIG) -> LongformerAttention:
    """Our mixer with their weights, and nothing after the mixing: their class has no output projection."""
    mixer = LongformerAttention(config, window)
    missing = mixer.load_state_dict(module.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and missing.missing_keys == ["output.weight", "output.bias"]
    torch.nn.init.eye_(mixer.output.weight)
    torch.nn.init.zeros_(mixer.output.bias)
    return mixer


@pytest.mark.parametrize("globals_at", [[[], []], [[0], [0]], [[0, 5, 23], [2]], [[], [1, 2, 3, 4]]])
@pytest.mark.parametrize(("length", "window", "real"), [(24, 2, (24, 24)), (24, 4, (24, 17)), (40, 2, (33, 40))])
def test_equals_transformers_longformer(length, window, real, globals_at):
    module, x = theirs(window), random(2, length, 12, seed=length)
    padding = torch.arange(length) < torch.tensor(real)[:, None]
    is_global = torch.zeros(2, length, dtype=torch.bool)
    for row, positions in enumerate(globals_at):
        is_global[row, positions] = True
    # their mask: -10,000 padding, 0 a token, 10,000 a global token
    code = torch.zeros(2, length).masked_fill(~padding, -1e4).masked_fill(is_global & padding, 1e4)
    expected = module(
        x,
        attention_mask=code,
        is_index_masked=code < 0,
        is_index_global_attn=code > 0,
        is_global_attn=bool((code > 0).any()),
    )[0]
    got, state = ours_like(module, window)(x, padding, global_mask=is_global)
    assert state is None
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_our_window_is_half_of_theirs():
    module, x = theirs(window=4), random(1, 24, 12)
    code = torch.zeros(1, 24)
    expected = module(
        x, attention_mask=code, is_index_masked=code < 0, is_index_global_attn=code > 0, is_global_attn=False
    )[0]
    nobody = torch.zeros(1, 24, dtype=torch.bool)
    assert torch.allclose(ours_like(module, 4)(x, global_mask=nobody)[0], expected, atol=1e-5)
    assert not torch.allclose(ours_like(module, 8)(x, global_mask=nobody)[0], expected, atol=1e-2)


def test_causal_window_equals_gpt_neo():
    config = GPTNeoConfig(
        hidden_size=12, num_heads=3, window_size=5, num_layers=1, attention_types=[[["local"], 1]],
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    module, x = GPTNeoSelfAttention(config, "local", 0).eval(), random(2, 20, 12)
    q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    # GPT-Neo does not divide by sqrt(d_head), and its window of 5 has the token itself in it
    mixed = window_attention(q * 2.0, k, v, window=4, causal=True)
    torch.testing.assert_close(module.out_proj(mixed.transpose(1, 2).flatten(2)), module(x)[0], rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------- the mixer against its definition


def defined(mixer: LongformerAttention, x: torch.Tensor, real: torch.Tensor, is_global: torch.Tensor) -> torch.Tensor:
    """The paper's sentence, token by token: its keys, its projections, a softmax over them."""
    batch, length, _ = x.shape
    mixed = torch.zeros_like(x)
    for row in range(batch):
        for i in range(length):
            if not real[row, i]:
                continue
            if is_global[row, i]:
                names, keys = ("query_global", "key_global", "value_global"), range(length)
            else:
                names = ("query", "key", "value")
                keys = [j for j in range(length) if abs(i - j) <= mixer.window or is_global[row, j]]
            keys = [j for j in keys if real[row, j]]
            q, k, v = (getattr(mixer, name)(x[row]).unflatten(-1, (mixer.heads, -1)) for name in names)
            weights = torch.einsum("hd,khd->hk", q[i], k[keys]).div(q.shape[-1] ** 0.5).softmax(-1)
            mixed[row, i] = torch.einsum("hk,khd->hd", weights, v[keys]).flatten()
    return mixer.output(mixed)


@given(
    length=st.integers(1, 20),
    window=st.integers(0, 6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=40, deadline=None)
def test_mixer_and_its_gradients_equal_the_definition(length, window, dtype, share, seed):
    generator = torch.Generator().manual_seed(seed)
    mixer = LongformerAttention(CONFIG, window).to(dtype)
    x = random(3, length, 12, seed=seed, dtype=dtype).requires_grad_()
    real = torch.rand(3, length, generator=generator) < 0.8
    real[2] = False  # a text that is all padding
    is_global = torch.rand(3, length, generator=generator) < share
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    results = []
    for y in (mixer(x, real, global_mask=is_global)[0], defined(mixer, x, real, is_global & real)):
        wanted = [x, *mixer.parameters()]
        gradients = torch.autograd.grad((y * y.detach().cos()).sum(), wanted, allow_unused=True, materialize_grads=True)
        results.append([y, *gradients])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=bound, atol=bound)


def test_default_global_positions_and_a_text_shorter_than_they_are():
    mixer, x = LongformerAttention(CONFIG, 1, global_positions=(0, 9)), random(2, 12, 12)
    chosen = torch.zeros(2, 12, dtype=torch.bool)
    chosen[:, [0, 9]] = True
    assert torch.equal(mixer(x)[0], mixer(x, global_mask=chosen)[0])
    assert mixer(x[:, :4])[0].shape == (2, 4, 12)


def test_mixer_refuses():
    mixer, x = LongformerAttention(CONFIG, 1), random(2, 6, 12)
    with pytest.raises(ValueError, match="global_mask must be bool"):
        mixer(x, global_mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match="state must be None"):
        mixer(x, None, (x, x))
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        mixer(x, torch.ones(2, 6))
    with pytest.raises(ValueError, match="global_positions must be >= 0"):
        LongformerAttention(CONFIG, 1, global_positions=(-1,))


# ----------------------------------------------------------------------------- its place in the Transformer


def test_a_window_that_covers_all_is_minilm_itself():
    dense = load_minilm()
    token_ids = torch.randint(1_000, 30_000, (2, 30), generator=torch.Generator().manual_seed(0))
    real = torch.arange(30) < torch.tensor([[30], [21]])
    longformer = load_minilm(token_mixer=lambda config, layer: LongformerAttention(config, window=29))
    for block in longformer.blocks:
        block.token_mixer.copy_local_to_global_()
    with torch.inference_mode():
        got, expected = longformer(token_ids, real).last, dense(token_ids, real).last
    # six layers of float32 sums in another order
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)


def test_windows_that_grow_with_depth():
    sizes = [1, 3, 6]
    config = replace(CONFIG, layers=3)
    encoder = Encoder(config, token_mixer=lambda config, layer: LongformerAttention(config, sizes[layer]))
    assert [block.token_mixer.window for block in encoder.blocks] == sizes


def test_positions_are_copied_one_table_after_another():
    table = random(5, 3)
    longer = extended_positions(table, 12)
    assert longer.shape == (12, 3)
    assert all(torch.equal(longer[i], table[i % 5]) for i in range(12))
    with pytest.raises(ValueError, match="length must be >= 5"):
        extended_positions(table, 4)


# ----------------------------------------------------------------------------- reach


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window", "dilation", "layers"), [(1, 1, 3), (2, 1, 2), (2, 3, 2)])
def test_reach_grows_by_window_times_dilation_a_layer(window, dilation, layers, causal):
    reached = reach([window_mask(21, window, dilation, causal)] * layers)
    assert torch.equal(reached, window_mask(21, window * layers, dilation, causal))


@pytest.mark.parametrize(("window", "layers"), [(1, 1), (1, 3), (2, 2)])
def test_reach_of_a_real_stack_by_changing_one_token(window, layers):
    config = replace(CONFIG, layers=layers)

    def attention(q, k, v, key_padding_mask):
        return window_attention(q, k, v, key_padding_mask, window=window, causal=True)

    decoder = Decoder(config, attention=attention).double().eval()  # float32 would round a small influence away
    token_ids = torch.randint(1, 60, (1, 14), generator=torch.Generator().manual_seed(0))
    expected = reach([window_mask(14, window, causal=True)] * layers)
    with torch.inference_mode():
        before = decoder(token_ids).logits[0]
        for j in range(14):
            changed = token_ids.clone()
            changed[0, j] = 0
            moved = (decoder(changed).logits[0] != before).any(-1)
            assert torch.equal(moved, expected[:, j])


def test_dilation_needs_other_heads_to_reach_all():
    """With one gap the text falls apart into `dilation` separate texts; one undilated layer joins them."""
    alone = reach([window_mask(24, 3, 4)] * 5)
    assert not alone[0, 1] and alone[0, 4]
    assert reach([window_mask(24, 3, 4), window_mask(24, 3), *[window_mask(24, 3, 4)] * 3]).all()


# ----------------------------------------------------------------------------- no n x n table


@pytest.mark.parametrize("settings", [{"window": 128}, {"window": 64, "dilation": 2}, {"window": 128, "causal": True}])
def test_window_makes_no_table_of_all_pairs(settings):
    shares = []
    for length in (1_024, 2_048):
        inputs = random(3, 1, 4, length, 8).unbind()
        largest = largest_storage(lambda *x: window_attention(*x, **settings), *inputs)
        shares.append(largest / (4 * length**2))
    assert shares[0] < 0.5
    # not exactly half: what is added at the ends of the text does not grow with it
    assert shares[1] == pytest.approx(shares[0] / 2, rel=0.1)


def test_mixer_makes_no_table_of_all_pairs():
    mixer, shares = LongformerAttention(replace(CONFIG, d_model=24, heads=4), window=64), []
    for length in (1_024, 2_048):
        largest = largest_storage(lambda x: mixer(x)[0], random(1, length, 24))
        shares.append(largest / (4 * length**2))
    assert shares[0] < 0.5
    # not exactly half: what is added at the ends of the text does not grow with it
    assert shares[1] == pytest.approx(shares[0] / 2, rel=0.1)


def test_the_guard_sees_a_masked_dense_table():
    def toy(q, k, v):
        return dense_attention(q, k, v, attention_mask=window_mask(q.shape[2], 8))

    inputs = random(3, 1, 4, 256, 8).unbind()
    assert largest_storage(toy, *inputs) >= 4 * 256**2
    assert largest_storage(toy, *inputs, backward=False) >= 4 * 256**2
