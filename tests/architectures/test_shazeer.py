"""Noisy top-k gating: load against drawn noise, gates by definition, two levels against one, gradients, padding."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effnlp_lessons.architectures.shazeer import (
    HierarchicalMoE,
    NoisyTopKMoE,
    cv_squared,
    hierarchical_gating,
    importance_loss,
    kth_excluding,
    load_loss,
    noisy_top_k_gating,
    smooth_load,
)
from effnlp_lessons.transformer import Decoder, Encoder, FeedForward, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=30, max_length=0, d_model=12, layers=2, heads=3, d_ff=10, segments=0, pooler=False, dropout=0.0
)
GROUPS, EXPERTS = 3, 4


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gate_inputs(tokens: int = 7, experts: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, W_g, W_noise and noise, x not contiguous."""
    x = random(5, tokens, seed=seed, dtype=dtype).t()
    w_gate, w_noise, noise = (
        random(*shape, seed=seed + i, dtype=dtype)
        for i, shape in enumerate([(5, experts), (5, experts), (tokens, experts)], start=1)
    )
    return [x, w_gate, w_noise, noise]


def fill_(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random numbers in all parameters, the gates' among them, in float64."""
    module.double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=1000 * seed + number))
    return module


def flat(config: TransformerConfig = CONFIG, **choices: object) -> NoisyTopKMoE:
    return fill_(NoisyTopKMoE(config, **choices))


def hierarchical(config: TransformerConfig = CONFIG, **choices: object) -> HierarchicalMoE:
    return fill_(HierarchicalMoE(config, groups=GROUPS, experts=EXPERTS, **choices))


def expert_output(module: NoisyTopKMoE | HierarchicalMoE, number: int, x: Tensor) -> Tensor:
    """One expert by hand: two linear layers with the configured activation between."""
    experts = module.experts
    hidden = F.gelu(x @ experts.expand[number] + experts.expand_bias[number])
    return hidden @ experts.contract[number] + experts.contract_bias[number]


def dense_mixture(module: NoisyTopKMoE | HierarchicalMoE, x: Tensor, gates: Tensor) -> Tensor:
    """Every expert on every token, times its gate."""
    every = torch.stack([expert_output(module, i, x) for i in range(gates[0].numel())], dim=1)
    return (gates.flatten(1)[..., None] * every).sum(dim=1)


# ------------------------------------------------------------------------------------------------- the gate


@given(tokens=st.integers(0, 9), experts=st.integers(1, 9), data=st.data(), noisy=st.booleans())
@settings(max_examples=40)
def test_gates_are_the_softmax_of_the_k_largest_and_zero_elsewhere(tokens, experts, data, noisy):
    k = data.draw(st.integers(1, experts))
    x, w_gate, w_noise, noise = gate_inputs(tokens, experts, seed=tokens)
    gates, load = noisy_top_k_gating(x, w_gate, w_noise, k, noise if noisy else None)
    h = x @ w_gate
    if noisy:
        h = h + noise * (torch.log1p(torch.exp(x @ w_noise)) + 0.01)
    for row, values in zip(gates, h.tolist(), strict=True):
        largest = sorted(range(experts), key=lambda i: -values[i])[:k]
        total = sum(math.exp(values[i]) for i in largest)
        expected = [math.exp(values[i]) / total if i in largest else 0.0 for i in range(experts)]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=row.dtype), rtol=0, atol=1e-10)
    assert gates.shape == (tokens, experts) and (gates > 0).sum(dim=1).tolist() == [k] * tokens
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(tokens, dtype=gates.dtype), rtol=0, atol=1e-12)
    assert (load is None) == (not noisy)


def test_equal_values_go_to_the_lower_numbers():
    x, zeros = random(5, 4), torch.zeros(4, 40, dtype=torch.float64)  # torch sorts short rows in another way
    gates = noisy_top_k_gating(x, zeros, zeros, 3).gates
    torch.testing.assert_close(gates[:, :3], torch.full((5, 3), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (gates[:, 3:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_gated_in_float32(dtype):
    narrow = [part.to(dtype) for part in gate_inputs(50, 8, dtype=torch.float32)]
    wide = [part.float() for part in narrow]
    expected = noisy_top_k_gating(*wide[:3], 2, wide[3])
    ours = noisy_top_k_gating(*narrow[:3], 2, narrow[3])
    assert ours.gates.dtype == ours.load.dtype == torch.float32
    assert torch.equal(ours.gates, expected.gates) and torch.equal(ours.load, expected.load)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = noisy_top_k_gating(*wide[:3], 2, wide[3])
    assert torch.equal(inside.gates, expected.gates)


# -------------------------------------------------------------------------------------------------- the load


def test_kth_excluding_is_the_kth_of_the_others():
    values = random(20, 6)
    values[10:] = values[10:].round()  # with equal values
    values[0] = 1.0
    for k in range(1, 6):
        slow = [[sorted(row[:i] + row[i + 1 :])[-k] for i in range(6)] for row in values.tolist()]
        assert kth_excluding(values, k).tolist() == slow
    assert (kth_excluding(values, 6) == -math.inf).all()  # there are no six others


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_is_the_share_of_new_draws_that_choose_the_expert(k):
    """Only the expert's own noise is drawn anew: the definition of P(x, i), drawn instead of integrated."""
    draws, experts = 40_000, 5
    x, w_gate, w_noise, noise = gate_inputs(6, experts, seed=k)
    load = noisy_top_k_gating(x, w_gate, w_noise, k, noise).load
    clean, deviation = x @ w_gate, F.softplus(x @ w_noise) + 0.01
    for i in range(experts):
        h = (clean + noise * deviation).expand(draws, -1, -1).clone()
        h[..., i] = clean[:, i] + deviation[:, i] * random(draws, len(x), seed=100 + i)
        chosen = (h.topk(k, dim=-1).indices == i).any(dim=-1).double().mean(dim=0)  # P(x, i) of every token
        error = (chosen * (1 - chosen) / draws).sum().sqrt()  # standard error of their sum
        assert 0 < error < 0.01
        # four standard errors: one draw in 16,000 is farther away, and the seeds are fixed
        assert abs(load[i] - chosen.sum()) < 4 * error


def test_load_is_on_average_the_number_of_tokens():
    draws, k = 2_000, 2
    x, w_gate, w_noise, _ = gate_inputs(6, 5)
    gatings = [noisy_top_k_gating(x, w_gate, w_noise, k, random(6, 5, seed=s)) for s in range(draws)]
    counts = torch.stack([(gates > 0).sum(dim=0) for gates, _ in gatings]).double()
    difference = torch.stack([load for _, load in gatings]) - counts
    error = difference.std(dim=0) / math.sqrt(draws)
    assert (difference.mean(dim=0).abs() < 4 * error).all()
    assert (error > 0).all()


def test_every_expert_has_all_tokens_if_all_are_chosen():
    x, w_gate, w_noise, noise = gate_inputs(7, 4)
    assert noisy_top_k_gating(x, w_gate, w_noise, 4, noise).load.tolist() == [7] * 4
    assert noisy_top_k_gating(x[:0], w_gate, w_noise, 4, noise[:0]).load.tolist() == [0] * 4


@pytest.mark.parametrize("k", [1, 3])
def test_gradients_of_load_and_gates_are_the_derivatives(k):
    x, w_gate, w_noise, noise = gate_inputs(4, 5)
    inputs = [part.clone().requires_grad_() for part in (x, w_gate, w_noise)]
    assert torch.autograd.gradcheck(lambda *parts: noisy_top_k_gating(*parts, k, noise), inputs)
    load = noisy_top_k_gating(*inputs, k, noise).load
    gradients = torch.autograd.grad(load_loss(load), inputs)
    assert all((gradient != 0).all() for gradient in gradients)


def test_far_and_large_logits_give_no_nan():
    x, w_gate, w_noise, noise = gate_inputs(6, 5, dtype=torch.float32)
    inputs = [part.clone().requires_grad_() for part in (x, 1e4 * w_gate, 1e4 * w_noise)]
    gates, load = noisy_top_k_gating(*inputs, 2, noise)
    (importance_loss(gates) + load_loss(load)).backward()
    assert all(part.isfinite().all() for part in (gates, load, *(part.grad for part in inputs)))


# ------------------------------------------------------------------------------------------------ the losses


def test_cv_squared_is_population_variance_over_squared_mean():
    assert cv_squared(torch.tensor([1.0, 3.0])).item() == pytest.approx(1 / 4)
    assert cv_squared(torch.tensor([[0.0, 0.0], [0.0, 8.0]])).item() == pytest.approx(3)  # one of four: E - 1
    assert cv_squared(torch.full((5,), 7.0)).item() == 0
    assert cv_squared(torch.zeros(5)).item() == 0  # a batch without tokens
    assert cv_squared(torch.tensor([1e-5, 3e-5], dtype=torch.float64)).item() == pytest.approx(1e-10 / (4e-10 + 1e-10))
    assert cv_squared(torch.tensor([300.0, 900.0], dtype=torch.float16)).item() == pytest.approx(1 / 4)


def test_losses_are_weighted_and_of_sums_over_tokens():
    gates = torch.tensor([[0.75, 0.25, 0.0], [0.75, 0.0, 0.25]], dtype=torch.float64)
    expected = torch.tensor([1.5, 0.25, 0.25], dtype=torch.float64).var(correction=0) / (2 / 3) ** 2
    assert importance_loss(gates, 0.3).item() == pytest.approx(0.3 * expected.item())
    assert importance_loss(gates).item() == pytest.approx(0.1 * expected.item())
    load = torch.tensor([2.0, 1.0, 1.0])
    assert load_loss(load, 0.5).item() == pytest.approx(0.5 * (2 / 9) / (16 / 9))
    assert load_loss(load).item() == pytest.approx(0.1 / 8)


def test_zero_weights_start_in_balance_and_the_losses_restore_it():
    x, _, w_noise, _ = gate_inputs(512, 8, dtype=torch.float32)
    zeros = torch.zeros_like(w_noise)
    start = noisy_top_k_gating(x, zeros, zeros, 2, random(512, 8, dtype=torch.float32))
    assert cv_squared(start.load) < 0.01  # 8 counts of 128 tokens, each with a deviation of about 10: 0.006
    w_gate = random(5, 8, seed=9, dtype=torch.float32).requires_grad_()  # far from it
    with torch.no_grad():
        w_gate[:, 0] += 2 * x.mean(dim=0).sign()
    w_noise = zeros.clone().requires_grad_()
    optimizer, ratios = torch.optim.Adam([w_gate, w_noise], lr=0.05), []
    for step in range(100):
        gates, load = noisy_top_k_gating(x, w_gate, w_noise, 2, random(512, 8, seed=step, dtype=torch.float32))
        ratios.append(((gates > 0).sum(dim=0).max() / 128).item())
        optimizer.zero_grad()
        (importance_loss(gates) + load_loss(load)).backward()
        optimizer.step()
    assert ratios[0] > 1.5 and ratios[-1] < 1.2


# ------------------------------------------------------------------------------------------------ two levels


def two_levels(tokens: int = 9, seed: int = 0) -> tuple[Tensor, tuple, tuple, tuple]:
    x = random(tokens, 5, seed=seed)
    primary = random(5, GROUPS, seed=seed + 1), random(5, GROUPS, seed=seed + 2)
    secondary = random(GROUPS, 5, EXPERTS, seed=seed + 3), random(GROUPS, 5, EXPERTS, seed=seed + 4)
    noise = random(tokens, GROUPS, seed=seed + 5), random(tokens, GROUPS, EXPERTS, seed=seed + 6)
    return x, primary, secondary, noise


@pytest.mark.parametrize("k", [(1, 1), (2, 2), (2, 1), (3, 4)])
@pytest.mark.parametrize("noisy", [False, True])
def test_two_levels_are_products_of_one(k, noisy):
    """Token by token: a flat gate over the groups times a flat gate over each group's experts (Eqs. 12-14)."""
    x, primary, secondary, noise = two_levels()
    gates, load = hierarchical_gating(x, primary, secondary, k, noise if noisy else None)
    outer = noisy_top_k_gating(x, *primary, k[0], noise[0] if noisy else None)
    expected = torch.zeros(9, GROUPS, EXPERTS, dtype=torch.float64)
    expected_load = torch.zeros(GROUPS, EXPERTS, dtype=torch.float64)
    for i in range(GROUPS):
        inner_load, members = torch.zeros(EXPERTS, dtype=torch.float64), 0
        for t in range(9):
            own = noise[1][t : t + 1, i] if noisy else None
            inner = noisy_top_k_gating(x[t : t + 1], secondary[0][i], secondary[1][i], k[1], own)
            expected[t, i] = outer.gates[t, i] * inner.gates[0]
            if noisy and outer.gates[t, i] > 0:
                inner_load, members = inner_load + inner.load, members + 1
        if noisy:
            assert members > 0
            expected_load[i] = outer.load[i] * inner_load / members
    torch.testing.assert_close(gates, expected, rtol=0, atol=1e-10)
    assert ((gates > 0).sum(dim=(1, 2)) == k[0] * k[1]).all()
    torch.testing.assert_close(gates.sum(dim=(1, 2)), torch.ones(9, dtype=torch.float64), rtol=0, atol=1e-10)
    if noisy:
        torch.testing.assert_close(load, expected_load, rtol=0, atol=1e-10)
    else:
        assert load is None


def test_one_group_is_flat_gating():
    x, _, secondary, noise = two_levels()
    one = [part[:1] for part in secondary]
    column = torch.zeros(5, 1, dtype=torch.float64)
    gates, load = hierarchical_gating(x, (column, column), one, (1, 2), (noise[0][:, :1], noise[1][:, :1]))
    expected = noisy_top_k_gating(x, one[0][0], one[1][0], 2, noise[1][:, 0])
    torch.testing.assert_close(gates[:, 0], expected.gates, rtol=0, atol=1e-12)
    torch.testing.assert_close(load[0], expected.load, rtol=0, atol=1e-12)


def test_load_of_two_levels_has_gradients_for_both_gates():
    x, primary, secondary, noise = two_levels(4)
    inputs = [part.clone().requires_grad_() for part in (x, *primary, *secondary)]

    def gate(x, *weights):
        return hierarchical_gating(x, weights[:2], weights[2:], (2, 2), noise)

    assert torch.autograd.gradcheck(gate, inputs)
    gradients = torch.autograd.grad(load_loss(gate(*inputs).load), inputs)
    assert all((gradient != 0).any() for gradient in gradients)


def test_a_group_that_nobody_chose_is_called_back():
    x, _, secondary, noise = two_levels()
    x = x.abs()
    far = torch.zeros(5, GROUPS, dtype=torch.float64)
    far[:, 2] = -1.0
    primary = far.requires_grad_(), torch.zeros_like(far)
    gates, load = hierarchical_gating(x, primary, secondary, (1, 2), noise)
    assert (gates[:, 2] == 0).all() and (load[2] > 0).all() and (load[2] == load[2, 0]).all()
    assert load[2].sum().item() == pytest.approx(2 * noisy_top_k_gating(x, *primary, 1, noise[0]).load[2].item())
    (gradient,) = torch.autograd.grad(load_loss(load), far)
    assert (gradient[:, 2] < 0).all()  # a step downhill raises the group's logits


# ---------------------------------------------------------------------------------------- the channel mixers


@pytest.mark.parametrize("make", [flat, hierarchical])
@pytest.mark.parametrize("training", [False, True])
def test_output_is_the_dense_mixture_under_the_gates(make, training):
    mixer = make().train(training)
    x = random(3, 12, 7, seed=5).transpose(1, 2)
    y = mixer(x)
    expected = dense_mixture(mixer, x.flatten(0, 1), mixer.last_gating.gates)
    torch.testing.assert_close(y.flatten(0, 1), expected, rtol=0, atol=1e-10)
    single = x[:1, :1]  # one token
    assert mixer(single).shape == (1, 1, 12)


def test_all_experts_without_noise_are_the_dense_mixture_of_experts():
    x = random(2, 5, 12).requires_grad_()
    mixer = flat(experts=6, k=6).eval()
    dense = dense_mixture(mixer, x.flatten(0, 1), (x.flatten(0, 1) @ mixer.w_gate).softmax(dim=-1)).view_as(x)
    y = mixer(x)
    torch.testing.assert_close(y, dense, rtol=0, atol=1e-10)
    wanted = [x, mixer.w_gate, *mixer.experts.parameters()]
    upstream = random(2, 5, 12, seed=3)
    torch.testing.assert_close(*(torch.autograd.grad(out, wanted, upstream) for out in (y, dense)), rtol=0, atol=1e-10)
    two = hierarchical(k=(GROUPS, EXPERTS)).eval()
    outer = (x @ two.primary_gate).softmax(dim=-1)
    inner = torch.einsum("bld,gde->blge", x, two.secondary_gate).softmax(dim=-1)
    gates = (outer[..., None] * inner).flatten(0, 1)
    torch.testing.assert_close(two(x).flatten(0, 1), dense_mixture(two, x.flatten(0, 1), gates), rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [flat, hierarchical])
def test_equal_experts_are_one_feed_forward_network(make):
    mixer = make().train()
    dense = fill_(FeedForward(CONFIG), seed=7)
    mixer.experts.copy_dense_(dense)
    x = random(2, 9, 12)
    torch.testing.assert_close(mixer(x), dense(x), rtol=0, atol=1e-10)


def test_all_tokens_may_go_to_one_expert():
    mixer = flat(experts=5, k=1).eval()
    with torch.no_grad():
        mixer.w_gate.zero_()
        mixer.w_gate[:, 3] = 1.0
    x = random(2, 6, 12).abs()
    torch.testing.assert_close(mixer(x), expert_output(mixer, 3, x), rtol=0, atol=1e-10)  # a gate of exactly 1
    assert mixer.last_gating.gates.sum(dim=0).tolist() == [0, 0, 0, 12, 0]


@pytest.mark.parametrize("make", [flat, hierarchical])
def test_padding_reaches_no_expert_and_enters_no_loss(make):
    x = random(3, 7, 12)
    real = torch.arange(7) < torch.tensor([[7], [4], [0]])
    x = torch.where(real[..., None], x, math.nan)
    padded, plain = make(seed=3).train(), make(seed=3).train()
    y, alone = padded(x, real), plain(x[real][None])
    assert (y[~real] == 0).all()
    torch.testing.assert_close(y[real], alone[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(padded.auxiliary_loss, plain.auxiliary_loss, rtol=0, atol=1e-12)
    assert len(padded.last_gating.gates) == 11
    nothing = padded(x, torch.zeros_like(real))
    assert (nothing == 0).all() and padded.auxiliary_loss.item() == 0


@pytest.mark.parametrize("make", [flat, hierarchical])
def test_auxiliary_loss_is_both_losses_in_training_and_importance_alone_in_evaluation(make):
    mixer, x = make(importance_weight=0.3, load_weight=0.7).train(), random(2, 9, 12)
    mixer(x)
    gates, load = mixer.last_gating
    assert mixer.auxiliary_loss.item() == pytest.approx((importance_loss(gates, 0.3) + load_loss(load, 0.7)).item())
    mixer.auxiliary_loss.backward()
    gating = [parameter for name, parameter in mixer.named_parameters() if "experts" not in name]
    assert len(gating) in (2, 4) and all((parameter.grad != 0).any() for parameter in gating)
    assert all(parameter.grad is None for parameter in mixer.experts.parameters())
    mixer.eval()(x)
    assert mixer.last_gating.load is None
    assert mixer.auxiliary_loss.item() == pytest.approx(importance_loss(mixer.last_gating.gates, 0.3).item())
    mixer.zero_grad()
    mixer.auxiliary_loss.backward()
    for name, parameter in mixer.named_parameters():
        assert (parameter.grad is not None and (parameter.grad != 0).any()) == name.endswith("_gate")


@pytest.mark.parametrize("make", [flat, hierarchical])
def test_noise_is_drawn_in_training_alone_from_the_seed(make):
    x = random(2, 9, 12)
    one, same, other = make(seed=1).train(), make(seed=1).train(), make(seed=2).train()
    state = torch.get_rng_state()
    first, second = one(x), one(x)
    assert not torch.equal(first, second) and not torch.equal(first, other(x))
    assert torch.equal(first, same(x)) and torch.equal(second, same(x))
    one.eval()
    assert torch.equal(one(x), one(x)) and torch.equal(one(x), other.eval()(x))
    assert torch.equal(torch.get_rng_state(), state)
    one.train(), same.train()
    assert torch.equal(one(x), same(x))  # evaluation took nothing from the generator


@pytest.mark.parametrize("make", [NoisyTopKMoE, HierarchicalMoE])
def test_gates_are_zero_in_a_new_model_and_the_experts_are_not(make):
    model = Encoder(CONFIG, channel_mixer=lambda config, layer: make(config, seed=layer))
    for block in model.blocks:
        for name, parameter in block.channel_mixer.named_parameters():
            is_weight = not name.endswith("bias")
            assert (
                "experts" not in name and (parameter == 0).all() or "experts" in name and (parameter.any() == is_weight)
            )
    first, second = (block.channel_mixer.experts.expand for block in model.blocks)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])


@pytest.mark.parametrize("make", [flat, hierarchical])
def test_a_decoder_goes_on_token_by_token(make):
    model = fill_(Decoder(CONFIG, channel_mixer=lambda config, layer: make(config))).eval()
    ids = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(0))
    real = torch.arange(9) >= torch.tensor([[0], [3]])  # padding at the left
    whole, state, logits = model(ids, real).logits, None, []
    for t in range(9):
        out = model(ids[:, t : t + 1], real[:, : t + 1], state)
        state = out.state
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [NoisyTopKMoE, HierarchicalMoE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_and_out(make, dtype):
    mixer, x = make(CONFIG).train(), random(2, 5, 12, dtype=torch.float32)
    wide = make(CONFIG).train()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mixer(x)
    assert mixed.dtype == torch.bfloat16 and mixer.auxiliary_loss.dtype == torch.float32
    # a number has 8 bits in bfloat16, 11 in float16; outputs are sums of products of such numbers
    torch.testing.assert_close(mixed.float(), wide, rtol=0.02, atol=0.02 * wide.abs().max().item())
    half = make(CONFIG).to(dtype).train()
    y = half(x.to(dtype))
    y.float().square().mean().add(half.auxiliary_loss).backward()
    assert y.dtype == dtype and half.last_gating.gates.dtype == torch.float32
    torch.testing.assert_close(y.float(), wide, rtol=0.02, atol=0.02 * wide.abs().max().item())


@pytest.mark.parametrize("make", [flat, hierarchical])
def test_a_copy_after_a_training_step_draws_the_same_noise(make):
    mixer, x = make().train(), random(2, 5, 12)
    mixer(x)
    twin = copy.deepcopy(mixer)
    assert twin.auxiliary_loss is None and mixer.auxiliary_loss.requires_grad
    assert torch.equal(mixer(x), twin(x))


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("k", [0, 7, 1.0, True])
def test_k_out_of_range_is_refused(k):
    x, w_gate, w_noise, noise = gate_inputs()
    message = rf"k must be an integer from 1 to the 6 to choose from, got {k}"
    for call in (
        lambda: noisy_top_k_gating(x, w_gate, w_noise, k),
        lambda: kth_excluding(noise, k),
        lambda: smooth_load(noise, noise.abs(), noise, k),
        lambda: NoisyTopKMoE(CONFIG, experts=6, k=k),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for pair, name, choices in (((k, 1), r"k\[0\]", 6), ((1, k), r"k\[1\]", 6)):
        with pytest.raises(ValueError, match=f"{name} must be an integer from 1 to the {choices} to choose from"):
            HierarchicalMoE(CONFIG, groups=6, experts=6, k=pair)


def test_shapes_that_do_not_fit_are_refused():
    x, w_gate, w_noise, noise = gate_inputs()
    with pytest.raises(ValueError, match=r"got x \(7, 5\), w_gate \(4, 6\), w_noise \(4, 6\)"):
        noisy_top_k_gating(x, w_gate[:4], w_noise[:4], 2)
    with pytest.raises(ValueError, match=r"got x \(7, 5\), w_gate \(5, 6\), w_noise \(5, 5\)"):
        noisy_top_k_gating(x, w_gate, w_noise[:, :5], 2)
    with pytest.raises(ValueError, match=r"x must be \(tokens, d_model\)"):
        noisy_top_k_gating(x[None], w_gate, w_noise, 2)
    with pytest.raises(ValueError, match=r"noise must have shape \(7, 6\), got \(1, 6\)"):
        noisy_top_k_gating(x, w_gate, w_noise, 2, noise[:1])
    x, primary, secondary, noise = two_levels()
    with pytest.raises(
        ValueError, match=r"secondary must be two tensors \(groups, d_model, experts\), got \(2, 5, 4\)"
    ):
        hierarchical_gating(x, primary, [part[:2] for part in secondary], (1, 1))
    with pytest.raises(ValueError, match=r"noise\[1\] must have shape \(9, 3, 4\), got \(9, 4\)"):
        hierarchical_gating(x, primary, secondary, (1, 1), (noise[0], noise[1][:, 0]))
    with pytest.raises(ValueError, match=r"k\[1\] must be an integer from 1 to the 4 to choose from, got 5"):
        hierarchical_gating(x, primary, secondary, (1, 5))


@pytest.mark.parametrize("name", ["importance_weight", "load_weight"])
@pytest.mark.parametrize("make", [NoisyTopKMoE, HierarchicalMoE])
def test_negative_weights_are_refused(make, name):
    with pytest.raises(ValueError, match=f"{name} must be >= 0, got -0.1"):
        make(CONFIG, **{name: -0.1})


def test_masks_of_another_shape_are_refused():
    mixer, x = flat().eval(), random(2, 5, 12)
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 5\), got \(2, 4\)"):
        mixer(x, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        mixer(x, torch.ones(2, 5))
