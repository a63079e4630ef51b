"""Transformer-XL: the shift against a gather, XLNet's own code, segments against one pass, memory and gradients."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import XLNetConfig
from transformers.models.xlnet.modeling_xlnet import XLNetModel, XLNetRelativeAttention

from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.attention.transformer_xl import (
    TransformerXLAttention,
    relative_attention,
    relative_positions,
    relative_shift,
)
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.transformer import Decoder, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=30, max_length=0, d_model=12, layers=3, heads=3, d_ff=16, segments=0, pooler=False, dropout=0.0
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def fill_(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Large random numbers in all parameters, u and v among them, in float64."""
    module.double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=1000 * seed + number))
    return module


def mixer(memory_length: int, config: TransformerConfig = CONFIG, **settings: int) -> TransformerXLAttention:
    return fill_(TransformerXLAttention(config, memory_length, **settings))


def decoder(memory_length: int, **settings: object) -> Decoder:
    config = replace(CONFIG, **settings)
    return fill_(Decoder(config, token_mixer=lambda config, layer: TransformerXLAttention(config, memory_length)))


def in_segments(model: Decoder, ids: Tensor, cuts: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of the text cut into segments of these lengths, each with the state of the one before."""
    state, logits, end = None, [], 0
    for part in ids.split(cuts, dim=1):
        end += part.shape[1]
        out = model(part, None if mask is None else mask[:, :end], state)
        state = out.state
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


# ----------------------------------------------------------------------------- the equations


def test_relative_positions_are_all_sines_then_all_cosines_of_the_whole_width():
    positions = relative_positions(torch.tensor([3.0, 0.0], dtype=torch.float64), 6)
    angles = 3 * torch.tensor([1.0, 10_000 ** (-2 / 6), 10_000 ** (-4 / 6)], dtype=torch.float64)
    torch.testing.assert_close(positions[0], torch.cat([angles.sin(), angles.cos()]), rtol=0, atol=1e-12)
    assert positions[1].tolist() == [0, 0, 0, 1, 1, 1]


def test_relative_positions_are_xlnets():
    model = XLNetModel(XLNetConfig(vocab_size=5, d_model=8, n_layer=1, n_head=2, d_inner=8, attn_type="uni"))
    theirs = model.relative_positional_encoding(4, 9)[:, 0]
    torch.testing.assert_close(relative_positions(torch.arange(9.0, -1, -1), 8), theirs, rtol=0, atol=1e-6)


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 99))
@settings(max_examples=40)
def test_relative_shift_is_the_gather_by_distance(queries, earlier, seed):
    keys = earlier + queries
    x = random(2, 3, queries, keys, seed=seed)
    for either in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        shifted = relative_shift(either)
        for i in range(queries):
            for j in range(earlier + i + 1):
                distance = earlier + i - j
                assert torch.equal(shifted[:, :, i, j], x[:, :, i, keys - 1 - distance])


def explicit(q, k, v, mask, r, u, w) -> Tensor:
    """The definition, pair by pair: A_ij = [(q_i + u) k_j + (q_i + v) r_(i-j)] / sqrt(d_head)."""
    queries, keys, d_head = q.shape[2], k.shape[2], q.shape[3]
    distance = (torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)).clamp(min=0)
    by_pair = r.flip(1)[:, distance]  # (heads, queries, keys, d_head)
    content = torch.einsum("bhid,bhjd->bhij", q + u[:, None], k)
    position = torch.einsum("bhid,hijd->bhij", q + w[:, None], by_pair)
    allowed = torch.arange(keys - queries, keys)[:, None] >= torch.arange(keys)
    if mask is not None:
        allowed = allowed & mask[:, None, None]
    scores = (content + position) / d_head**0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num()
    output = weights @ v
    return output if mask is None else output * mask[:, None, keys - queries :, None]


@given(st.data(), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=40)
def test_relative_attention_is_the_definition(data, dtype):
    batch, heads, queries, earlier, d_head = (
        data.draw(st.integers(a, b)) for a, b in [(1, 3), (1, 3), (1, 7), (0, 9), (1, 4)]
    )
    keys = earlier + queries
    seed = data.draw(st.integers(0, 99))
    # not contiguous, as heads that were split off
    q = random(batch, queries, heads, d_head, seed=seed, dtype=dtype).transpose(1, 2)
    k, v = (random(batch, keys, heads, d_head, seed=seed + i, dtype=dtype).transpose(1, 2) for i in (1, 2))
    r = random(heads, keys, d_head, seed=seed + 3, dtype=dtype)
    u, w = random(heads, d_head, seed=seed + 4, dtype=dtype), random(heads, d_head, seed=seed + 5, dtype=dtype)
    mask = data.draw(st.none() | st.just(random(batch, keys, seed=seed) > -0.3))
    if mask is not None:
        mask[0] = data.draw(st.booleans())
    inputs = [x.requires_grad_() for x in (q, k, v, r, u, w)]
    settings = {"position_keys": r, "content_bias": u, "position_bias": w}
    output, weights = relative_attention(q, k, v, mask, return_weights=True, **settings)
    fused, wanted = relative_attention(q, k, v, mask, **settings), explicit(q, k, v, mask, r, u, w)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    for ours in (output, fused, weights @ v):
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)
    upstream = random(*wanted.shape, seed=7, dtype=dtype)
    reference = torch.autograd.grad(wanted, inputs, upstream)
    for ours in (output, fused):
        for gradient, theirs in zip(torch.autograd.grad(ours, inputs, upstream), reference, strict=True):
            torch.testing.assert_close(gradient, theirs, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(("queries", "earlier"), [(1, 0), (5, 0), (4, 7), (1, 6)])
def test_relative_attention_is_xlnets_unidirectional_core(queries, earlier):
    batch, heads, d_head = 2, 3, 4
    keys = earlier + queries
    theirs = XLNetRelativeAttention(
        XLNetConfig(
            vocab_size=5, d_model=heads * d_head, n_head=heads, n_layer=1, d_inner=8, attn_type="uni", dropout=0
        )
    )
    fill_(theirs)
    q, k, v = (
        random(n, batch, heads, d_head, seed=i, dtype=torch.float64) for i, n in enumerate([queries, keys, keys])
    )
    r = random(keys + 1, 1, heads, d_head, seed=4, dtype=torch.float64)  # the distances keys, ..., 0
    real = torch.ones(batch, keys, dtype=torch.bool)
    real[1, : keys // 2] = False
    hidden = torch.ones(queries, keys).triu(earlier + 1).bool()[:, :, None, None] | ~real.T[None, :, :, None]
    wanted = theirs.rel_attn_core(q, k, v, r.expand(-1, batch, -1, -1), attn_mask=hidden.double())
    ours = relative_attention(
        *(x.permute(1, 2, 0, 3) for x in (q, k, v)), real,
        position_keys=r[1:, 0].transpose(0, 1), content_bias=theirs.r_w_bias, position_bias=theirs.r_r_bias,
    )  # fmt: skip
    visible = real[:, None, earlier:, None]
    torch.testing.assert_close(ours * visible, wanted.permute(1, 2, 0, 3) * visible, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_near(dtype):
    module, x = mixer(5), random(2, 9, 12)
    wanted, state = module.float()(x)
    ours, _ = module.to(dtype)(x.to(dtype), torch.ones(2, 9, dtype=torch.bool))
    assert ours.dtype == dtype
    # bfloat16 keeps 8 bits; weights, inputs and three products are rounded to them
    torch.testing.assert_close(ours.float(), wanted, rtol=0.05, atol=0.1)


def test_without_positions_it_is_dense_causal_attention():
    module, x = mixer(0), random(2, 9, 12, dtype=torch.float64)
    for parameter in (module.position.weight, module.content_bias):
        torch.nn.init.zeros_(parameter)
    q, k, v = (module.split_heads(project(x)) for project in (module.query, module.key, module.value))
    wanted = module.output(dense_attention(q, k, v, causal=True).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x)[0], wanted, rtol=0, atol=1e-10)


# ----------------------------------------------------------------------------- segments and memory


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("cuts", [[6, 6, 6, 6], [1] * 24, [5, 1, 11, 7], [24]])
def test_segments_with_a_long_memory_are_one_long_causal_pass(cuts, norm_first):
    model, ids = decoder(24, norm_first=norm_first), random_ids(2, 24)
    torch.testing.assert_close(in_segments(model, ids, cuts), model(ids).logits, rtol=0, atol=1e-10)


def test_padded_tokens_change_nothing_in_any_segment():
    model, ids, mask = decoder(24), random_ids(3, 24), torch.ones(3, 24, dtype=torch.bool)
    mask[0, :7] = mask[1, 9:13] = mask[2] = False
    wanted = model(ids, mask).logits
    torch.testing.assert_close(in_segments(model, ids, [6, 6, 6, 6], mask)[mask], wanted[mask], rtol=0, atol=1e-10)
    others = torch.where(mask, ids, (ids + 1) % CONFIG.vocab_size)
    assert torch.equal(model(others, mask).logits[mask], wanted[mask])
    y, _ = mixer(4)(random(3, 24, 12, dtype=torch.float64), mask)
    assert y[~mask].eq(0).all() and y[mask].ne(0).all()
    # only the position within the text counts: padding on the left is as if the text began later
    alone = model(ids[:1, 7:]).logits
    torch.testing.assert_close(wanted[:1, 7:], alone, rtol=0, atol=1e-10)


def test_a_mask_may_cover_all_earlier_tokens_or_only_those_in_memory():
    module, x = mixer(4), random(2, 12, 12, dtype=torch.float64)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :7] = False
    _, state = module(x[:, :9], mask[:, :9])
    assert torch.equal(module(x[:, 9:], mask, state)[0], module(x[:, 9:], mask[:, 5:], state)[0])
    assert not torch.equal(module(x[:, 9:], mask, state)[0][0], module(x[:, 9:], None, state)[0][0])


@pytest.mark.parametrize("memory_length", [0, 1, 5, 100])
def test_the_memory_holds_the_last_inputs(memory_length):
    module, state, seen = mixer(memory_length), None, 0
    for length in (3, 1, 7, 2):
        tokens = torch.arange(seen, seen + length, dtype=torch.float64)[:, None].expand(1, length, 12)
        seen += length
        _, state = module(tokens, None, state)
        assert state[0, :, 0].tolist() == list(range(max(0, seen - memory_length), seen))


@pytest.mark.parametrize("memory_length", [1, 4])
def test_one_layer_reaches_exactly_the_memory(memory_length):
    module, x = mixer(memory_length), random(1, 10, 12, dtype=torch.float64)

    def first_of_last_segment(x: Tensor) -> Tensor:
        _, state = module(x[:, :6])
        return module(x[:, 6:], None, state)[0][:, 0]

    for token in range(6):
        other = x.clone()
        other[:, token] += 1
        changed = not torch.equal(first_of_last_segment(other), first_of_last_segment(x))
        assert changed == (6 - token <= memory_length)


def test_the_state_is_small_whatever_the_length_of_the_text():
    module, x = mixer(6), random(1, 4, 12, dtype=torch.float64)
    state, elements = None, []
    for _ in range(12):
        elements.append(largest_storage(lambda x, state=state: module(x, None, state)[0], x))
        _, state = module(x, None, state)
    assert len(set(elements[3:])) == 1


def test_no_gradient_flows_into_earlier_segments():
    module = mixer(8)
    first, second = (
        random(2, 5, 12, dtype=torch.float64).requires_grad_(),
        random(2, 5, 12, seed=1, dtype=torch.float64),
    )
    y, state = module(first)
    assert not state.requires_grad
    module(second.requires_grad_(), None, state)[0].sum().backward()
    assert first.grad is None and second.grad.abs().sum() > 0
    # within the segment there is one
    y.sum().backward()
    assert first.grad.abs().sum() > 0


def test_the_future_changes_no_bit_of_the_past():
    model, ids = decoder(5), random_ids(2, 20)
    before = in_segments(model, ids, [6, 6, 8])
    for first in (1, 8, 12, 19):
        changed = torch.cat([ids[:, :first], (ids[:, first:] + 1) % CONFIG.vocab_size], dim=1)
        after = in_segments(model, changed, [6, 6, 8])
        assert torch.equal(after[:, :first], before[:, :first])
        assert not torch.equal(after[:, first:], before[:, first:])


def test_distances_beyond_the_clamp_are_one_distance():
    x = random(1, 9, 12, dtype=torch.float64)
    clamped, free = mixer(0, clamp_length=3), mixer(0)
    # swapping two tokens that are both 3 or more away from the last is not seen, nearer ones are
    swapped = x[:, [1, 0, *range(2, 9)]]
    torch.testing.assert_close(clamped(swapped)[0][:, -1], clamped(x)[0][:, -1], rtol=0, atol=1e-12)
    assert (free(swapped)[0][:, -1] - free(x)[0][:, -1]).abs().max() > 1e-4
    torch.testing.assert_close(clamped(x[:, :4])[0], free(x[:, :4])[0], rtol=0, atol=1e-12)
    longer = mixer(0)
    longer.memory_length = 100  # as for evaluation
    assert longer(x)[1].shape[1] == 9


@pytest.mark.parametrize(("memory_length", "learned"), [(8, True), (0, False)])
def test_a_token_beyond_the_segment_is_copied_only_with_a_memory(memory_length, learned):
    # the token 6 back, in segments of 4
    lag, segment, vocab = 6, 4, 8
    config = replace(CONFIG, vocab_size=vocab, d_model=32, heads=2, layers=1, d_ff=32, norm_first=True)
    model = Decoder(config, token_mixer=lambda config, layer: TransformerXLAttention(config, memory_length))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    correct = []
    for step in range(60):
        ids = torch.randint(vocab, (8, 16), generator=generator)
        logits = in_segments(model, ids, [segment] * 4)[:, lag:]
        targets = ids[:, :-lag]
        optimiser.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        optimiser.step()
        if step >= 50:
            correct.append((logits.argmax(-1) == targets).float().mean())
    accuracy = torch.stack(correct).mean()
    assert accuracy > 0.95 if learned else accuracy < 0.25  # chance is 1 in 8


# ----------------------------------------------------------------------------- bad input


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="memory_length must be an integer >= 0, got -1"):
        TransformerXLAttention(CONFIG, -1)
    with pytest.raises(ValueError, match="clamp_length must be an integer >= 1, got 0"):
        TransformerXLAttention(CONFIG, 1, 0)
    with pytest.raises(ValueError, match="d_model must be even"):
        TransformerXLAttention(replace(CONFIG, d_model=9), 1)
    with pytest.raises(ValueError, match="d_model must be even"):
        relative_positions(torch.zeros(3), 5)
    with pytest.raises(ValueError, match="distances must be a float vector"):
        relative_positions(torch.arange(3), 4)
    with pytest.raises(ValueError, match="at least as many keys as queries, got 4 queries, 3 keys"):
        relative_shift(torch.zeros(1, 4, 3))
    module, x = TransformerXLAttention(CONFIG, 4), torch.zeros(2, 5, 12)
    _, state = module(x)
    with pytest.raises(ValueError, match=r"state must be \(1, rows, 12\)"):
        module(x[:1], None, state)
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 9\), got \(2, 5\)"):
        module(x, torch.ones(2, 5, dtype=torch.bool), state)
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 5\), got \(2, 7\)"):
        module(x, torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        module(x, torch.ones(2, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(1, 2, 3)}, r"must be \(batch, heads, length, d_head\)"),
        ({"k": torch.zeros(1, 2, 5, 3)}, "do not fit together"),
        ({"v": torch.zeros(1, 2, 4, 4)}, "do not fit together"),
        ({"q": torch.zeros(1, 2, 6, 4)}, "q must hold the last 1 to 5"),
        ({"position_keys": torch.zeros(2, 3, 4)}, r"position_keys must have shape \(2, 5, 4\)"),
        ({"content_bias": torch.zeros(4)}, r"content_bias must have shape \(2, 4\)"),
        ({"position_bias": torch.zeros(2, 3)}, r"position_bias must have shape \(2, 4\)"),
    ],
)
def test_relative_attention_refuses_shapes_that_do_not_fit(changes, message):
    good = {"q": torch.zeros(1, 2, 3, 4), "k": torch.zeros(1, 2, 5, 4), "v": torch.zeros(1, 2, 5, 4)}
    good |= {
        "position_keys": torch.zeros(2, 5, 4),
        "content_bias": torch.zeros(2, 4),
        "position_bias": torch.zeros(2, 4),
    }
    with pytest.raises(ValueError, match=message):
        relative_attention(**(good | changes))
