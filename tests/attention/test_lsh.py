"""LSH attention: dense attention under its definition, transformers' class, the statistics of the hash, causality."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention as TheirLSHSelfAttention

from effnlp_lessons.attention import lsh
from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.attention.lsh import (
    LSHSelfAttention,
    draw_rotations,
    lsh_attention,
    lsh_buckets,
    lsh_pairs,
    unit_keys,
)
from effnlp_lessons.transformer import Decoder, Encoder, TransformerConfig

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_inputs(length: int, padding: str, dtype: torch.dtype, seed: int, heads: int = 3) -> tuple:
    """qk, v that are not contiguous, and a mask: "none", "end", "anywhere" or "a whole text"."""
    generator = seeded(seed)
    qk, v = torch.randn(2, 2, length, heads, 5, generator=generator, dtype=dtype).transpose(2, 3)
    if padding == "none":
        return qk, v, None
    real = torch.arange(length) < torch.randint(1, length + 1, (2, 1), generator=generator)
    if padding == "anywhere":
        real = real[:, torch.randperm(length, generator=generator)]
    if padding == "a whole text":
        real[1] = False
    return qk, v, real


def hashed(qk: Tensor, hashes: int, buckets: int = 4, seed: int = 0) -> Tensor:
    return lsh_buckets(qk, draw_rotations(hashes, qk.shape[-1], buckets, seeded(seed)).to(qk.dtype))


def defined(qk: Tensor, v: Tensor, pairs: Tensor) -> Tensor:
    """One softmax over a multiset of keys: a key that is met N times has log N added to its score."""
    met = pairs > 0
    scores = qk @ unit_keys(qk).transpose(-2, -1) + pairs.clamp(min=1).to(qk.dtype).log()
    weights = scores.masked_fill(~met, torch.finfo(qk.dtype).min / 2).softmax(dim=-1)
    return (weights * met) @ v


# --------------------------------------------------------------------------------------------- the definition


def counted_by_hand(buckets: list[list[int]], chunk: int, causal: bool, real: list[bool], same_bucket_only: bool):
    """N_ij for one head, with lists: the sorted list of all rounds, its chunks, and what each of them looks at."""
    length = len(real)
    entries = []
    for r, row in enumerate(buckets):
        row = [bucket if is_real else max(map(max, buckets)) + 1 for bucket, is_real in zip(row, real, strict=True)]
        entries += [(r, row[i], i) for i in sorted(range(length), key=lambda i: (row[i], i))]
    if length <= chunk:
        chunks = [entries[:length]]
        windows = chunks
    else:
        chunks = [entries[start : start + chunk] for start in range(0, len(entries), chunk)]
        windows = [chunks[c - 1] + chunks[c] for c in range(len(chunks))]
    count = [[0] * length for _ in range(length)]
    for own, window in zip(chunks, windows, strict=True):
        for (r, bucket, i), (s, other, j) in product(own, window):
            same = length <= chunk or not same_bucket_only or (r, bucket) == (s, other)
            count[i][j] += same and real[i] and real[j] and (j < i if causal else j != i)
    for i in range(length):
        count[i][i] = int(real[i] and not any(count[i]))
    return torch.tensor(count)


@given(
    length=st.integers(1, 14),
    chunk=st.integers(1, 6),
    hashes=st.integers(1, 3),
    causal=st.booleans(),
    same_bucket_only=st.booleans(),
    padding=st.sampled_from(["none", "anywhere", "a whole text"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_pairs_are_counted_as_the_sorted_list_says(length, chunk, hashes, causal, same_bucket_only, padding, seed):
    qk, _, real = draw_inputs(length, padding, torch.float64, seed, heads=2)
    buckets = hashed(qk, hashes, seed=seed)
    pairs = lsh_pairs(buckets, chunk, causal, real, same_bucket_only=same_bucket_only)
    union = lsh_pairs(buckets, chunk, causal, real, same_bucket_only=same_bucket_only, count_duplicates=False)
    for text, head in product(range(2), range(2)):
        who = [True] * length if real is None else real[text].tolist()
        truth = counted_by_hand(buckets[text, head].tolist(), chunk, causal, who, same_bucket_only)
        assert torch.equal(pairs[text, head], truth)
    assert torch.equal(union, pairs.clamp(max=1))


# ---------------------------------------------------------------------------------------------- the fast path


def outputs_and_gradients(method, qk: Tensor, v: Tensor) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in (qk, v)]
    output = method(*inputs)
    direction = torch.randn(output.shape, dtype=output.dtype, generator=seeded(7))
    return [output, *torch.autograd.grad((output * direction).sum(), inputs)]


@given(
    length=st.integers(1, 40),
    chunk=st.integers(1, 9),
    hashes=st.integers(1, 3),
    causal=st.booleans(),
    count_duplicates=st.booleans(),
    same_bucket_only=st.booleans(),
    padding=st.sampled_from(["none", "end", "anywhere", "a whole text"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=120, deadline=None)
def test_fast_path_and_gradients_equal_the_definition(
    length, chunk, hashes, causal, count_duplicates, same_bucket_only, padding, dtype, seed
):
    qk, v, real = draw_inputs(length, padding, dtype, seed)
    buckets = hashed(qk, hashes, seed=seed)
    how = {"count_duplicates": count_duplicates, "same_bucket_only": same_bucket_only}
    fast = outputs_and_gradients(
        lambda qk, v: lsh_attention(qk, v, real, buckets=buckets, chunk=chunk, causal=causal, **how), qk, v
    )
    pairs = lsh_pairs(buckets, chunk, causal, real, **how)
    truth = outputs_and_gradients(lambda qk, v: defined(qk, v, pairs), qk, v)
    for ours, theirs in zip(fast, truth, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("causal", [False, True])
def test_the_path_without_the_cpu_kernel_is_the_same(monkeypatch, causal):
    qk, v, real = draw_inputs(23, "anywhere", torch.float64, 3)
    buckets = hashed(qk, 2)

    def method(qk, v):
        return lsh_attention(qk, v, real, buckets=buckets, chunk=4, causal=causal, count_duplicates=False)

    kernel = outputs_and_gradients(method, qk, v)
    monkeypatch.setattr(lsh, "_JoinedRounds", SimpleNamespace(apply=lsh._joined_rounds))
    for ours, truth in zip(outputs_and_gradients(method, qk, v), kernel, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [11, 50])
def test_a_text_of_one_chunk_is_full_attention_with_shared_queries_and_keys(chunk, causal):
    qk, v, _ = draw_inputs(11, "none", torch.float64, 1)
    allowed = torch.ones(11, 11, dtype=torch.bool).tril(-1) if causal else ~torch.eye(11, dtype=torch.bool)
    allowed[0, 0] = causal  # the first token has nothing else
    scores = (qk @ nn.functional.normalize(qk, dim=-1).transpose(-2, -1)).masked_fill(~allowed, -torch.inf)
    output = lsh_attention(qk, v, buckets=hashed(qk, 2), chunk=chunk, causal=causal)
    # `unit_keys` adds a little to the norm
    torch.testing.assert_close(output, scores.softmax(dim=-1) @ v, rtol=1e-5, atol=1e-5)


def their_attention(chunk: int, hashes: int, causal: bool, heads: int = 2, d_head: int = 8) -> nn.Module:
    config = ReformerConfig(
        hidden_size=heads * d_head, num_attention_heads=heads, attention_head_size=d_head, num_hashes=hashes,
        num_buckets=8, lsh_attn_chunk_length=chunk, is_decoder=causal, lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module = TheirLSHSelfAttention(config, 0).eval()
    module.query_key, module.value = nn.Identity(), nn.Linear(heads * d_head, heads * d_head, bias=False)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hashes", [1, 3])
def test_it_equals_transformers_given_its_buckets(hashes, causal, padded, dtype):
    x = torch.randn(2, 48, 16, generator=seeded(hashes), dtype=dtype)
    real = torch.arange(48) < torch.tensor([[48], [29]]) if padded else None
    with torch.random.fork_rng():  # weights and rotations come from the global generator
        torch.manual_seed(0)
        module = their_attention(8, hashes, causal).to(dtype)
        theirs = module(x, attention_mask=real)
    qk, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in (x, module.value(x)))
    ours = lsh_attention(qk, v, real, buckets=theirs.buckets, chunk=8, causal=causal)
    truth = theirs.hidden_states.unflatten(-1, (2, 8)).transpose(1, 2)
    compared = torch.ones(2, 2, 48, dtype=torch.bool) if real is None else real[:, None].expand(2, 2, 48)
    if dtype == torch.float32:
        # a token that is alone has scores of -1e5 there, known to 1/128 only: its weights sum to 1 within 1 %
        alone = lsh_pairs(theirs.buckets, 8, causal, real).diagonal(dim1=2, dim2=3) > 0
        torch.testing.assert_close(ours[compared & alone], truth[compared & alone], rtol=1e-2, atol=1e-2)
        compared = compared & ~alone
    torch.testing.assert_close(ours[compared], truth[compared], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("causal", [False, True])
@given(length=st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_what_stands_in_padding_changes_nothing_and_gets_zeros(causal, length):
    qk, v, real = draw_inputs(length, "anywhere", torch.float32, length)
    rotations = draw_rotations(2, 5, 4, seeded())
    before = lsh_attention(qk, v, real, buckets=lsh_buckets(qk, rotations), chunk=4, causal=causal)
    assert not before.transpose(1, 2)[~real].any()
    for x in (qk, v):
        x.transpose(1, 2)[~real] = torch.randn(5, generator=seeded()) * 1e4
    after = lsh_attention(qk, v, real, buckets=lsh_buckets(qk, rotations), chunk=4, causal=causal)
    assert torch.equal(after, before)


def test_a_token_without_others_gets_its_own_value_and_a_plain_gradient():
    qk, v, _ = draw_inputs(9, "none", torch.float32, 0)
    real = torch.zeros(2, 9, dtype=torch.bool)
    real[0, 5] = True
    output, grad_qk, grad_v = outputs_and_gradients(
        lambda qk, v: lsh_attention(qk, v, real, buckets=hashed(qk, 3), chunk=2), qk, v
    )
    assert torch.equal(output[0, :, 5], v[0, :, 5])
    assert int(output.count_nonzero()) == 3 * 5 == int(grad_v.count_nonzero())
    assert not grad_qk.any()


def test_zero_vectors_give_finite_gradients():
    for x in outputs_and_gradients(
        lambda qk, v: lsh_attention(qk, v, buckets=hashed(qk, 2), chunk=4), *torch.zeros(2, 1, 1, 10, 4)
    ):
        assert x.isfinite().all() and x.abs().max() < 1e4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    qk, v, real = draw_inputs(37, "end", dtype, 4)
    buckets = hashed(qk.double(), 2)
    output = lsh_attention(qk, v, real, buckets=buckets, chunk=6)
    assert output.dtype == dtype
    # computed in float32, rounded once
    assert torch.equal(output, lsh_attention(qk.float(), v.float(), real, buckets=buckets, chunk=6).to(dtype))
    truth = defined(qk.double(), v.double(), lsh_pairs(buckets, 6, False, real))
    # numbers of size 3 stand 2**-9 (float16) and 2**-6 (bfloat16) apart
    bound = 2e-2 if dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(output.double(), truth, rtol=bound, atol=bound)


@pytest.mark.parametrize("count_duplicates", [True, False])
def test_no_table_of_all_pairs(count_duplicates):
    def ratio(length: int) -> float:
        qk = torch.randn(1, 4, length, 16, generator=seeded())
        buckets = hashed(qk, 2, buckets=2 * length // 64)
        used = largest_storage(
            lambda qk, v: lsh_attention(qk, v, buckets=buckets, chunk=64, count_duplicates=count_duplicates), qk, qk
        )
        return used / (4 * length**2)

    assert ratio(1024) < 0.5
    assert ratio(2048) == pytest.approx(ratio(1024) / 2, rel=0.05)


# ---------------------------------------------------------------------------------------------- causality


def test_no_gradient_reaches_the_future():
    qk, v, _ = draw_inputs(60, "none", torch.float32, 2)
    qk, v = qk.clone().requires_grad_(), v.clone().requires_grad_()
    output = lsh_attention(qk, v, buckets=hashed(qk, 2, buckets=12), chunk=10, causal=True)
    for grad in torch.autograd.grad(output[:, :, :40].sum(), [qk, v]):
        assert not grad[:, :, 40:].any() and grad[:, :, :40].any()


def test_but_future_tokens_move_the_borders_of_the_past_s_chunks():
    """Not strictly causal: other tokens after 40 take other places in the sorted list, and the earlier ones shift."""
    qk, v, _ = draw_inputs(60, "none", torch.float32, 2)
    rotations = draw_rotations(2, 5, 12, seeded())
    changed = qk.clone()
    changed[:, :, 40:] = -changed[:, :, 40:]
    before, after = (
        lsh_attention(x, v, buckets=lsh_buckets(x, rotations), chunk=10, causal=True)[:, :, :40] for x in (qk, changed)
    )
    assert not torch.equal(before, after)
    # the values of the future are no part of it: only the places, and they come from the queries
    other_values = torch.cat([v[:, :, :40], v[:, :, 40:] + 1], dim=2)
    same = lsh_attention(qk, other_values, buckets=lsh_buckets(qk, rotations), chunk=10, causal=True)[:, :, :40]
    assert torch.equal(same, before)


# ------------------------------------------------------------------------------------------------ the hash


def test_buckets_are_the_argmax_of_both_signs_and_depend_on_the_direction_alone():
    x = torch.randn(2, 3, 17, 5, generator=seeded(), dtype=torch.float64)
    rotations = draw_rotations(4, 5, 6, seeded(1)).double()
    buckets = lsh_buckets(x, rotations)
    assert buckets.shape == (2, 3, 4, 17) and buckets.dtype == torch.int64
    for r, t in product(range(4), range(17)):
        both = torch.cat([x[1, 2, t] @ rotations[r], -(x[1, 2, t] @ rotations[r])])
        assert buckets[1, 2, r, t] == both.argmax()
    assert torch.equal(lsh_buckets(x * torch.rand(17, 1, generator=seeded()).add(0.01), rotations), buckets)
    assert torch.equal(lsh_buckets(-x, rotations), (buckets + 3) % 6)
    assert not lsh_buckets(x.requires_grad_(), rotations).requires_grad


def test_vectors_at_a_smaller_angle_share_a_bucket_more_often():
    """2,000 pairs at each cosine, 4 rounds: a share has a standard error of at most 0.006, less than half a step."""
    generator = seeded()
    first, second = torch.randn(2, 2000, 16, generator=generator)
    first = nn.functional.normalize(first, dim=-1)
    second = nn.functional.normalize(second - (second * first).sum(-1, keepdim=True) * first, dim=-1)
    rotations = draw_rotations(4, 16, 8, generator)
    shares = []
    for cosine in (-1.0, -0.5, 0.0, 0.5, 0.8, 0.95, 1.0):
        other = cosine * first + (1 - cosine**2) ** 0.5 * second
        same = lsh_buckets(first, rotations) == lsh_buckets(other, rotations)
        shares.append(same.double().mean().item())
    assert all(low + 0.012 < high for low, high in zip(shares, shares[1:], strict=False)), shares
    assert shares[0] == 0 and shares[-1] == 1
    assert shares[2] == pytest.approx(1 / 8, abs=0.02)  # at a right angle as if by chance, 1 of 8 buckets


def test_more_rounds_find_more_of_the_nearest_keys():
    qk = torch.randn(1, 4, 256, 16, generator=seeded(3))
    scores = qk @ unit_keys(qk).transpose(-2, -1)
    nearest = scores.masked_fill(torch.eye(256, dtype=torch.bool), -torch.inf).topk(8).indices
    recall = []
    for hashes in (1, 2, 4, 8):
        found = lsh_pairs(hashed(qk, hashes, buckets=32), 16, same_bucket_only=True) > 0
        recall.append(found.gather(3, nearest).double().mean().item())
    assert all(low + 0.05 < high for low, high in zip(recall, recall[1:], strict=False)), recall
    assert recall[0] > 0.05


def test_rotations_come_from_their_generator_alone():
    before = torch.get_rng_state()
    assert torch.equal(draw_rotations(2, 5, 6, seeded(1)), draw_rotations(2, 5, 6, seeded(1)))
    assert not torch.equal(draw_rotations(2, 5, 6, seeded(1)), draw_rotations(2, 5, 6, seeded(2)))
    assert draw_rotations(2, 5, 6, seeded(1)).shape == (2, 5, 3)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------- the token mixer

CONFIG = TransformerConfig(
    vocab_size=50, max_length=24, d_model=12, layers=2, heads=3, d_ff=16, segments=0, pooler=False
)


@pytest.mark.parametrize("causal", [False, True])
def test_the_mixer_is_the_definition_between_its_projections(causal):
    mixer = LSHSelfAttention(CONFIG, chunk=4, hashes=2, buckets=6, causal=causal).double()
    x = torch.randn(2, 19, 12, generator=seeded(), dtype=torch.float64)
    real = torch.arange(19) < torch.tensor([[19], [11]])
    y, state = mixer(x, real)
    qk, v = (part(x).unflatten(-1, (3, 4)).transpose(1, 2) for part in (mixer.query_key, mixer.value))
    buckets = lsh_buckets(qk, mixer.rotations)
    mixed = defined(qk, v, lsh_pairs(buckets, 4, causal, real))
    torch.testing.assert_close(y, mixer.output(mixed.transpose(1, 2).flatten(2)), rtol=1e-10, atol=1e-10)
    assert state is None and torch.equal(mixer.choice, buckets)
    assert torch.equal(mixer.train()(x, real)[0], mixer.eval()(x, real)[0])
    mixer.fixed_choice = buckets.flip(-1)
    assert not torch.equal(mixer.train()(x, real)[0], y) and mixer.choice is mixer.fixed_choice
    mixer.eval()(x, real)
    assert mixer.choice is None  # nothing is held for a backward pass that will not come


@pytest.mark.parametrize("model", [Encoder, Decoder])
def test_it_is_a_token_mixer_of_the_courses_transformer(model):
    def build(seed: int) -> nn.Module:
        return model(
            CONFIG, token_mixer=lambda config, layer: LSHSelfAttention(config, 4, 2, 6, model is Decoder, seed + layer)
        ).eval()

    token_ids = torch.randint(50, (2, 19), generator=seeded())
    real = torch.arange(19) < torch.tensor([[19], [11]])
    one, other = build(0), build(10)
    output = one(token_ids, real)[0]
    assert output.isfinite().all()
    assert not torch.equal(one.blocks[0].token_mixer.rotations, one.blocks[1].token_mixer.rotations)
    assert not torch.equal(other(token_ids, real)[0], output)
    other.load_state_dict(one.state_dict())  # the rotations are saved with the weights
    assert torch.equal(other(token_ids, real)[0], output)


def test_bad_input_is_refused_by_name():
    x, buckets = torch.zeros(2, 3, 7, 4), torch.zeros(2, 3, 1, 7, dtype=torch.int64)
    for settings_, message in [
        ({"buckets": buckets, "chunk": 0}, "chunk must be an integer >= 1, got 0"),
        ({"buckets": buckets.float(), "chunk": 2}, "buckets must be integers of shape"),
        ({"buckets": buckets[:, :, 0], "chunk": 2}, "buckets must be integers of shape"),
        ({"buckets": buckets[:, :, :0], "chunk": 2}, "buckets must be integers of shape"),
        ({"buckets": buckets[..., :6], "chunk": 2}, r"buckets must have shape \(2, 3, hashes, 7\)"),
        ({"buckets": buckets[:, :1], "chunk": 2}, r"buckets must have shape \(2, 3, hashes, 7\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            lsh_attention(x, x, **settings_)
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        lsh_attention(x, x, torch.ones(2, 7), buckets=buckets, chunk=2)
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 7\)"):
        lsh_pairs(buckets, 2, key_padding_mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="do not fit together"):
        lsh_attention(x, x[:, :, :5], buckets=buckets, chunk=2)
    with pytest.raises(ValueError, match="buckets must be even"):
        draw_rotations(1, 4, 3)
    with pytest.raises(ValueError, match="hashes must be an integer >= 1, got 0"):
        LSHSelfAttention(CONFIG, 4, 0, 6)
    with pytest.raises(ValueError, match="rotations must be"):
        lsh_buckets(x, torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match="state must be None"):
        LSHSelfAttention(CONFIG, 4, 1, 6)(torch.zeros(1, 5, 12), None, ())
