"""BigBird against a loop over its lists of keys, transformers' block-sparse class, and its own promises."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BigBirdConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

from effnlp_lessons.attention.bigbird import bigbird_attention, bigbird_mask, bigbird_multiplicity, random_plan
from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.measure import count_macs
from effnlp_lessons.transformer import Encoder, SelfAttention, TransformerConfig


def qkv(batch, heads, length, d_head, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, length, d_head, generator=generator, dtype=torch.float64).to(dtype).unbind(0)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def any_plan(heads, blocks, random_blocks, seed):
    """A plan of a caller: repeats, -1 anywhere, blocks of the window and global ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, blocks, (heads, blocks, random_blocks), generator=generator)


def listed_blocks(i, blocks, row):
    """Blocks that query block i lists, as the paper says it: a set of fixed ones, and the row of its plan."""
    if i in (0, blocks - 1):
        return list(range(blocks))
    return sorted({0, blocks - 1, i - 1, i, i + 1}) + [j for j in row if j >= 0]


def by_lists(q, k, v, real, block, plan):
    """For each query: write down its list of keys, repeats and all, and take a softmax over the list."""
    batch, heads, length, d_head = q.shape
    blocks = -(-length // block)
    rows = []
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                i = t // block
                keys = [
                    j
                    for number in listed_blocks(i, blocks, plan[h, i].tolist())
                    for j in range(number * block, min((number + 1) * block, length))
                    if real[b, j]
                ]
                if not real[b, t] or not keys:
                    rows.append(torch.zeros(v.shape[-1], dtype=q.dtype))
                    continue
                weights = (k[b, h, keys] @ q[b, h, t] / d_head**0.5).softmax(0)
                rows.append(weights @ v[b, h, keys])
    return torch.stack(rows).view(batch, heads, length, -1)


def log_multiplicity_attention(q, k, v, multiplicity):
    """Dense attention with log(multiplicity) added to the scores."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=multiplicity.to(q.dtype).log())


# --------------------------------------------------------------------------------------------------- the plan


@given(heads=st.integers(1, 4), blocks=st.integers(1, 14), random_blocks=st.integers(0, 5), seed=st.integers(0, 50))
@settings(max_examples=40)
def test_plan_draws_distinct_blocks_outside_window_and_globals(heads, blocks, random_blocks, seed):
    plan = random_plan(heads, blocks, random_blocks, seed)
    assert plan.shape == (heads, blocks, random_blocks)
    for h in range(heads):
        for i in range(blocks):
            drawn = [j for j in plan[h, i].tolist() if j != -1]
            free = set(range(blocks)) - set(listed_blocks(i, blocks, []))
            assert len(drawn) == len(set(drawn)) == min(random_blocks, len(free))
            assert set(drawn) <= free


def test_plan_is_a_pure_function_of_its_seed_and_differs_between_heads_and_seeds():
    torch.manual_seed(1)
    plan = random_plan(4, 32, 3, seed=7)
    state = torch.get_rng_state()
    plan_again = random_plan(4, 32, 3, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(plan, plan_again)
    plan_again.zero_()  # a caller's own copy
    assert torch.equal(plan, random_plan(4, 32, 3, seed=7))
    assert not torch.equal(plan, random_plan(4, 32, 3, seed=8))
    assert all(not torch.equal(plan[0], plan[h]) for h in range(1, 4))


def test_every_free_block_is_drawn_equally_often():
    heads, blocks = 4_000, 9
    plan = random_plan(heads, blocks, 2, seed=0)[:, 4]  # free for block 4: 1, 2, 6, 7
    share = torch.bincount(plan.flatten(), minlength=blocks) / heads
    expected = torch.zeros(blocks).index_fill(0, torch.tensor([1, 2, 6, 7]), 0.5)
    assert torch.allclose(share, expected, atol=0.05)  # six standard errors of a share of 4,000


# ---------------------------------------------------------------------------------- the definition, written out


@given(data=st.data())
@settings(max_examples=30)
def test_multiplicity_counts_the_list(data):
    block, blocks, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7)), data.draw(st.integers(1, 2))
    length = blocks * block - data.draw(st.integers(0, block - 1))
    plan = any_plan(heads, blocks, data.draw(st.integers(0, 4)), data.draw(st.integers(0, 99)))
    multiplicity = bigbird_multiplicity(length, block, plan)
    for h in range(heads):
        for i in range(length):
            row = plan[h, i // block].tolist() if 0 < i // block < blocks - 1 else []
            blocks_listed = listed_blocks(i // block, blocks, row)
            assert multiplicity[h, i].tolist() == [blocks_listed.count(j // block) for j in range(length)]
    assert torch.equal(bigbird_mask(length, block, plan), multiplicity > 0)


def test_our_own_plan_never_counts_twice():
    assert bigbird_multiplicity(77, 4, random_plan(3, 20, 3, seed=0)).max() == 1


@given(data=st.data())
@settings(max_examples=25)
def test_equals_a_softmax_over_each_list(data):
    batch, heads, block = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    length = data.draw(st.integers(1, 9 * block))
    random_blocks = data.draw(st.integers(0, 3))
    blocks = -(-length // block)
    seed = data.draw(st.integers(0, 99))
    q, k, v = qkv(batch, heads, length, 4, torch.float64, seed)
    real = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < data.draw(
        st.sampled_from([0.0, 0.5, 0.9, 1.0])
    )
    if data.draw(st.booleans()):
        plan = any_plan(heads, blocks, random_blocks, seed)
        settings_ = {"plan": plan}
    else:
        plan = random_plan(heads, blocks, random_blocks, seed=5)
        settings_ = {"random_blocks": random_blocks, "seed": 5}
    ours = bigbird_attention(q, k, v, real, block=block, **settings_)
    assert torch.allclose(ours, by_lists(q, k, v, real, block, plan), rtol=1e-10, atol=1e-10)
    ours = bigbird_attention(q.float(), k.float(), v.float(), real, block=block, **settings_)
    assert torch.allclose(ours.double(), by_lists(q, k, v, real, block, plan), atol=1e-5)


@pytest.mark.parametrize(("length", "block"), [(1, 4), (3, 4), (4, 4), (8, 4), (9, 4), (16, 4), (41, 4), (40, 1)])
def test_equals_dense_attention_under_the_mask(length, block):
    heads, d_head = 2, 5
    q, k, _ = qkv(2, heads, length, d_head)
    v = random(2, length, heads, 3).transpose(1, 2)  # not contiguous, and of another width
    plan = random_plan(heads, -(-length // block), 3, seed=0)
    dense = dense_attention(q, k, v, attention_mask=bigbird_mask(length, block, plan))
    assert torch.allclose(bigbird_attention(q, k, v, block=block), dense, atol=1e-5)
    assert torch.equal(bigbird_attention(q, k, v, block=block), bigbird_attention(q, k, v, block=block))


def test_gradients_equal_those_of_dense_attention_and_stay_finite_without_any_real_token():
    length, block = 27, 3
    plan = random_plan(2, 9, 2, seed=1)
    plan[0, 4] = 4  # block 4 sees itself three times
    multiplicity = bigbird_multiplicity(length, block, plan)
    real = torch.arange(length) < torch.tensor([[length], [20], [0]])
    bias = multiplicity.double().log() + torch.where(real, 0.0, -torch.inf)[:, None, None, :]

    def dense(q, k, v):
        weights = (q @ k.transpose(-2, -1) / 2 + bias.nan_to_num(neginf=-1e30)).softmax(-1)
        return (weights @ v).masked_fill(~real[:, None, :, None], 0)

    inputs = [x.requires_grad_() for x in qkv(3, 2, length, 4, torch.float64)]
    ours = bigbird_attention(*inputs, real, block=block, plan=plan)
    theirs = dense(*inputs)
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    upstream = random(*ours.shape).double()
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        assert torch.isfinite(a).all()
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_half_precision():
    q, k, v = qkv(1, 2, 50, 8)
    exact = bigbird_attention(q, k, v, block=4)
    for dtype, atol in [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)]:  # their rounding of values around 1
        half = bigbird_attention(q.to(dtype), k.to(dtype), v.to(dtype), block=4)
        assert half.dtype == dtype
        assert torch.allclose(half.float(), exact, atol=atol)


# ------------------------------------------------------------------------------------------------ transformers


def reference_attention(heads, block, random_blocks, length, seed=0):
    """transformers' class with random weights and a list that receives every plan it makes."""
    config = BigBirdConfig(
        hidden_size=8 * heads, num_attention_heads=heads, block_size=block, num_random_blocks=random_blocks,
        max_position_embeddings=length, use_bias=True,
    )  # fmt: skip
    torch.manual_seed(3)
    attention, plans = BigBirdBlockSparseAttention(config, seed=seed), []

    def record(method, one_head):
        @functools.wraps(method)
        def recorded(*args, **kwargs):
            plan = method(*args, **kwargs)
            plans.extend([plan[: length // block - 2]] if one_head else plan)
            return plan

        return recorded

    attention._bigbird_block_rand_mask = record(attention._bigbird_block_rand_mask, True)
    attention._bigbird_block_rand_mask_with_head = record(attention._bigbird_block_rand_mask_with_head, False)
    return attention, plans


def run_both(reference, plans, x, mask, heads, block):
    """Outputs of transformers' class and of ours with its weights and its plan, and that plan."""
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(mask.float(), block)
    plans.clear()
    with torch.no_grad():
        theirs = reference(
            x, band_mask=band, from_mask=from_mask, to_mask=to_mask, from_blocked_mask=blocked, to_blocked_mask=blocked
        )[0]
    middle = torch.stack([torch.as_tensor(plan) for plan in plans]).long()
    plan = torch.nn.functional.pad(middle, (0, 0, 1, 1), value=-1)

    config = TransformerConfig(d_model=8 * heads, heads=heads)
    ours = SelfAttention(config, attention=functools.partial(bigbird_attention, block=block, plan=plan))
    ours.load_state_dict(reference.state_dict(), strict=False)  # query, key, value
    ours.output = torch.nn.Identity()
    with torch.no_grad():
        return theirs, ours(x, mask)[0], plan


@pytest.mark.parametrize(
    ("block", "length", "random_blocks"), [(4, 40, 2), (4, 60, 3), (2, 26, 3), (16, 1024, 3), (64, 1024, 3)]
)
def test_equals_transformers_in_training_mode(block, length, random_blocks):
    heads = 2
    reference, plans = reference_attention(heads, block, random_blocks, length)
    x = random(2, length, 8 * heads)
    real = torch.arange(length) < torch.tensor([[length], [length - block - block // 2]])
    theirs, ours, plan = run_both(reference.train(), plans, x, real, heads, block)
    assert plan.shape == (heads, length // block, random_blocks)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_transformers_plan_for_1024_tokens_counts_keys_twice_and_a_mask_would_be_wrong():
    heads, block, length = 4, 64, 1024
    reference, plans = reference_attention(heads, block, 3, length)
    x = random(1, length, 8 * heads)
    theirs, ours, plan = run_both(reference.train(), plans, x, torch.ones(1, length, dtype=torch.bool), heads, block)
    multiplicity = bigbird_multiplicity(length, block, plan)
    assert multiplicity.max() == 2
    q, k, v = (
        p(x).unflatten(-1, (heads, 8)).transpose(1, 2) for p in (reference.query, reference.key, reference.value)
    )
    exact = log_multiplicity_attention(q, k, v, multiplicity).transpose(1, 2).flatten(2)
    as_set = dense_attention(q, k, v, attention_mask=multiplicity > 0).transpose(1, 2).flatten(2)
    assert torch.allclose(theirs, exact, atol=1e-5)
    assert torch.allclose(ours, exact, atol=1e-5)
    assert (theirs - as_set).abs().max() > 1e-3


def test_transformers_evaluation_replaces_random_blocks_by_block_0_and_ours_does_not():
    heads, block, length, random_blocks = 2, 4, 60, 3
    reference, plans = reference_attention(heads, block, random_blocks, length)
    x, real = random(1, length, 8 * heads), torch.ones(1, length, dtype=torch.bool)
    trained, ours_trained, plan = run_both(reference.train(), plans, x, real, heads, block)
    evaluated, ours_zeros, zeros = run_both(reference.eval(), plans, x, real, heads, block)
    assert (zeros[:, 1:-1] == 0).all()
    middle = bigbird_multiplicity(length, block, zeros)[:, block:-block]
    assert (middle[..., :block] == 1 + random_blocks).all()
    assert (evaluated - trained).abs().max() > 1e-2
    assert torch.allclose(ours_zeros, evaluated, atol=1e-5)

    model = SelfAttention(
        TransformerConfig(d_model=16, heads=2),
        attention=functools.partial(bigbird_attention, block=block, random_blocks=random_blocks),
    )
    assert torch.equal(model.train()(x)[0], model.eval()(x)[0])


# ------------------------------------------------------------------------------------------------- cost, inputs


def test_never_makes_a_table_of_all_pairs():
    heads, ratios = 4, []
    for length in (1_024, 2_048):
        method = functools.partial(bigbird_attention, block=16, random_blocks=3)
        ratios.append(largest_storage(method, *qkv(1, heads, length, 16)) / (heads * length**2))
    assert ratios[0] < 0.5
    # not exactly half: what is added at the ends of the text does not grow with it
    assert ratios[1] == pytest.approx(ratios[0] / 2, rel=0.1)


def test_macs_are_those_of_the_listed_blocks():
    heads, length, block, random_blocks, d_head = 2, 256, 16, 3, 8
    q, k, v = qkv(1, heads, length, d_head)
    pairs = 2 * block * length + (length - 2 * block) * (5 + random_blocks) * block
    counted = count_macs(functools.partial(bigbird_attention, block=block, random_blocks=random_blocks), q, k, v)
    assert counted.total == 2 * d_head * heads * pairs


def test_a_plan_first_drawn_in_inference_mode_can_be_trained_with():
    q, k, v = qkv(1, 1, 60, 4)
    with torch.inference_mode():
        bigbird_attention(q, k, v, block=4, seed=987)
    bigbird_attention(q.requires_grad_(), k.requires_grad_(), v, block=4, seed=987).sum().backward()
    assert torch.isfinite(k.grad).all()


def test_serves_in_the_encoder():
    config = TransformerConfig(vocab_size=50, max_length=64, d_model=16, layers=2, heads=2, d_ff=32)
    sparse = Encoder(config, attention=functools.partial(bigbird_attention, block=4, random_blocks=2)).eval()
    ids = torch.arange(100).view(2, 50) * 7 % 50
    real = torch.arange(50) < torch.tensor([[50], [31]])
    out = sparse(ids, real).last
    changed = torch.where(real, ids, (ids + 1) % 50)
    assert torch.allclose(sparse(changed, real).last[real], out[real], atol=1e-6)
    few = Encoder(config, attention=functools.partial(bigbird_attention, block=64)).eval()  # one block: dense
    assert torch.allclose(few(ids, real).last[real], Encoder(config).eval()(ids, real).last[real], atol=1e-5)


def test_bad_input_is_named():
    q, k, v = qkv(1, 2, 20, 4)
    good = random_plan(2, 5, 1, seed=0)
    for match, arguments in [
        ("block must be an integer >= 1, got 0", {"block": 0}),
        ("random_blocks must be an integer >= 0, got -1", {"block": 4, "random_blocks": -1}),
        ("plan must hold integers, got torch.float32", {"block": 4, "plan": good.float()}),
        (r"plan must have shape \(2, 5, random_blocks\), got \(2, 3, 1\)", {"block": 4, "plan": good[:, 1:-1]}),
        (r"plan must have shape \(2, 5, random_blocks\), got \(1, 5, 1\)", {"block": 4, "plan": good[:1]}),
        (r"plan must hold -1 .. 4, got .* 5", {"block": 4, "plan": good.masked_fill(good == -1, 5)}),
    ]:
        with pytest.raises(ValueError, match=match):
            bigbird_attention(q, k, v, **arguments)
    with pytest.raises(ValueError, match="heads must be"):
        random_plan(0, 5, 1, seed=0)
    with pytest.raises(ValueError, match=r"plan must have shape \(heads, 6, random_blocks\)"):
        bigbird_multiplicity(21, 4, good)
