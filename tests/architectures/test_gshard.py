"""GShard's routing: Algorithm 1 one token at a time, NLLB's and Switch's routers, index against one-hot."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import NllbMoeConfig, SwitchTransformersConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
    load_balancing_loss_func,
)

from effnlp_lessons.architectures.gshard import (
    Routing,
    combine,
    dispatch,
    expert_capacity,
    gshard_routing,
    mix_by_einsum,
    mix_by_index,
    one_hot_masks,
    switch_routing,
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequential(
    logits: Tensor,
    capacity: int,
    policy: str = "all",
    draws: Tensor | None = None,
    mask: Tensor | None = None,
    count_undrawn: bool = True,
) -> tuple[Tensor, dict[tuple[int, int, int], int], list[float]]:
    """Algorithm 1 token by token: combine weights (groups, size, experts), the place of each, l_aux of each group.

    Without `count_undrawn`, a second choice that is not drawn does not raise the counter.
    """
    gates = logits.softmax(-1)
    groups, size, experts = gates.shape
    weights, places, losses = torch.zeros_like(gates), {}, []
    for g in range(groups):
        tokens = [s for s in range(size) if mask is None or mask[g, s]]
        counts = [0] * experts
        best = {}
        for s in tokens:
            order = sorted(range(experts), key=lambda e, s=s: (-gates[g, s, e].item(), e))
            best[s] = order[0], order[1]
            first = order[0]
            if counts[first] < capacity:
                weights[g, s, first] = gates[g, s, first] / (gates[g, s, order[0]] + gates[g, s, order[1]])
                places[g, s, first] = counts[first]
            counts[first] += 1
        means = sum((gates[g, s] for s in tokens), torch.zeros(experts, dtype=gates.dtype))
        share = max(1, len(tokens))
        losses.append(sum(counts[e] / share * means[e].item() / share for e in range(experts)) / experts)
        for s in tokens:
            first, second = best[s]
            weight = gates[g, s, second] / (gates[g, s, first] + gates[g, s, second])
            drawn = {"all": True, "none": False}.get(policy)
            if policy == "random":
                drawn = bool(2 * weight > draws[g, s])
            if drawn and counts[second] < capacity:
                weights[g, s, second] = weight
                places[g, s, second] = counts[second]
            if drawn or count_undrawn:
                counts[second] += 1
    return weights, places, losses


def as_table(routing: Routing) -> Tensor:
    """Combine weights (groups, size, experts)."""
    table = torch.zeros(len(routing.weights), len(routing.counts), dtype=routing.weights.dtype)
    return table.scatter_add(1, routing.experts, routing.weights).unflatten(0, (routing.groups, -1))


def as_places(routing: Routing) -> dict[tuple[int, int, int], int]:
    """(group, token, expert) -> place in the group's part of the expert's buffer."""
    size = len(routing.weights) // routing.groups
    found = {}
    for token, choice in (routing.positions >= 0).nonzero().tolist():
        group, row = token // size, routing.positions[token, choice].item()
        assert row // routing.capacity == group
        found[group, token % size, routing.experts[token, choice].item()] = row % routing.capacity
    return found


# ----------------------------------------------------------------------------- Algorithm 1


@pytest.mark.parametrize("policy", ["random", "all", "none"])
@given(st.data())
@settings(max_examples=60)
def test_routing_is_algorithm_1_one_token_at_a_time(policy, data):
    groups, size, experts = (data.draw(st.integers(a, b)) for a, b in [(1, 3), (1, 11), (2, 5)])
    seed = data.draw(st.integers(0, 999))
    logits = 2 * random(size, groups, experts, seed=seed).transpose(0, 1)  # not contiguous
    if data.draw(st.booleans()):
        logits = logits.round()  # ties
    draws = uniform(groups, size, seed=seed)
    draws[0, 0] = data.draw(st.sampled_from([0.0, 0.5, 1 - 1e-9]))
    mask = data.draw(st.none() | st.just(uniform(groups, size, seed=seed + 1) > 0.3))
    if mask is not None:
        mask[-1] = data.draw(st.booleans())
    for capacity in range(1, size + 1):
        ours = gshard_routing(logits, capacity, policy=policy, draws=draws, mask=mask)
        weights, places, losses = sequential(logits, capacity, policy, draws, mask)
        assert torch.equal(as_table(ours), weights)
        assert as_places(ours) == places
        sizes = torch.full((groups,), size) if mask is None else mask.sum(1)
        loss = (torch.tensor(losses, dtype=torch.float64) * sizes).sum() / sizes.sum().clamp(min=1)
        torch.testing.assert_close(ours.auxiliary_loss, loss, rtol=0, atol=1e-10)


def test_equal_gates_are_filled_in_the_order_of_experts_and_tokens():
    routing = gshard_routing(torch.zeros(1, 4, 3), 3, policy="all")
    assert routing.experts.tolist() == [[0, 1]] * 4
    assert routing.positions.tolist() == [[0, 0], [1, 1], [2, 2], [-1, -1]]
    assert routing.counts.tolist() == [4, 0, 0]


def test_a_router_that_is_sure_still_names_another_second_expert():
    routing = gshard_routing(torch.tensor([[[0.0, 500, 0], [500, 0, 0]]]), 2, policy="all")
    assert routing.experts.tolist() == [[1, 0], [0, 1]] and routing.weights.tolist() == [[1, 0], [1, 0]]
    assert routing.positions.tolist() == [[0, 1], [0, 1]]  # a place for nothing, as in the algorithm


def test_second_choices_stand_behind_all_first_choices_refused_ones_too():
    # three first choices of expert 0, one of expert 1 that has expert 0 as its second
    logits = torch.tensor([[[0.0, 1, -9], [1, -9, 0], [1, -9, 0], [1, -9, 0]]])
    assert gshard_routing(logits, 4, policy="all").positions[:, 1].tolist() == [3, 0, 1, 2]
    assert gshard_routing(logits, 3, policy="all").positions[:, 1].tolist() == [-1, 0, 1, 2]
    assert gshard_routing(logits, 2, policy="all").counts.tolist() == [3, 1, 0]


def test_an_undrawn_second_choice_takes_its_number():
    logits = torch.tensor([[[1.0, 0, -9], [1, 0, -9]]])
    routing = gshard_routing(logits, 2, policy="random", draws=torch.tensor([[0.99, 0.1]]))
    assert routing.positions.tolist() == [[0, -1], [1, 1]]
    assert gshard_routing(logits, 1, draws=torch.tensor([[0.99, 0.1]])).positions.tolist() == [[0, -1], [-1, -1]]


@pytest.mark.parametrize("capacity", [1, 2, 5, 40])
def test_weights_of_a_token_sum_to_one_of_four_numbers(capacity):
    logits = 2 * random(2, 40, 4)
    routing = gshard_routing(logits, capacity, draws=torch.Generator().manual_seed(0))
    best = logits.softmax(-1).topk(2).values.flatten(0, 1)
    allowed = best / best.sum(-1, keepdim=True)
    allowed = torch.cat([allowed, torch.ones(80, 1).double(), torch.zeros(80, 1).double()], dim=1)
    distance = (routing.weights.sum(1, keepdim=True) - allowed).abs().min(dim=1).values
    assert distance.max() < 1e-12
    assert torch.equal(routing.weights > 0, routing.positions >= 0)


def test_a_place_is_given_once_and_never_beyond_the_capacity():
    for seed in range(20):
        routing = gshard_routing(3 * random(3, 17, 4, seed=seed), 5, draws=torch.Generator().manual_seed(seed))
        assert routing.rows == 15 and routing.positions.max() < 15
        taken = routing.positions >= 0
        places = list(zip(routing.experts[taken].tolist(), routing.positions[taken].tolist(), strict=True))
        assert len(set(places)) == len(places)


def test_second_experts_are_drawn_as_often_as_twice_their_weight():
    logits = torch.tensor([1.0, 0.0]).expand(1, 20_000, 2)
    routing = gshard_routing(logits, 20_000, draws=torch.Generator().manual_seed(0))
    wanted = 2 / (1 + math.e)
    share = (routing.positions[:, 1] >= 0).double().mean()
    assert abs(share - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / 20_000)  # four standard deviations
    again = gshard_routing(logits, 20_000, draws=torch.Generator().manual_seed(0))
    assert torch.equal(routing.positions, again.positions)


def test_half_precision_logits_are_routed_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        logits = random(2, 9, 4).to(dtype)
        ours, wide = (gshard_routing(x, 3, policy="all") for x in (logits, logits.float()))
        assert ours.weights.dtype == ours.auxiliary_loss.dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(ours[:5], wide[:5], strict=True))
        outputs = random(4, 6, 5).to(dtype)
        total = combine(outputs, ours)
        assert total.dtype == dtype and torch.equal(total, combine(outputs.float(), ours).to(dtype))


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "top_k", "wanted"),
    [(1_024, 8, 1.0, 2, 256), (1_024, 8, 1.25, 1, 160), (10, 4, 1.0, 2, 5), (9, 4, 1.0, 2, 5), (1, 8, 1.0, 2, 1)]
    + [(7, 2, 2.0, 2, 7), (7, 4, math.inf, 2, 7), (1_000, 64, 0.01, 2, 1)],
)
def test_capacity_is_the_share_of_an_expert_rounded_up(tokens, experts, factor, top_k, wanted):
    assert expert_capacity(tokens, experts, factor, top_k) == wanted


# ----------------------------------------------------------------------------- the auxiliary loss


def test_both_scales_of_the_loss():
    # 4 experts, each the first choice of 2 of 8 tokens, with equal mean gates
    logits = 2 * torch.eye(4, dtype=torch.float64).repeat(2, 1)[None]
    paper, switch = (gshard_routing(logits, 8, policy="all", aux_scale=s).auxiliary_loss for s in ("paper", "switch"))
    assert paper.item() == pytest.approx(1 / 16, abs=1e-12) and switch.item() == pytest.approx(1, abs=1e-12)
    # all tokens on one expert, and sure of it: E times as much
    alone = 50 * torch.eye(4, dtype=torch.float64)[0].expand(1, 8, 4)
    assert gshard_routing(alone, 8, policy="all").auxiliary_loss.item() == pytest.approx(1 / 4, abs=1e-12)


def test_the_loss_counts_first_choices_without_a_place():
    logits = random(2, 15, 4)
    losses = [gshard_routing(logits, c, policy="all").auxiliary_loss for c in (1, 15)]
    assert torch.equal(*losses)


def test_the_gradient_of_the_loss_flows_only_through_the_mean_gate():
    logits, mask = random(3, 11, 4).requires_grad_(), uniform(3, 11) > 0.2
    loss = gshard_routing(logits, 2, policy="all", mask=mask).auxiliary_loss
    (ours,) = torch.autograd.grad(loss, logits)
    # l = sum over groups of S l_aux / tokens, so d l / d g_{s,e} = c_e / (E S tokens); then the softmax by hand
    gates = logits.detach().softmax(-1)
    counts = torch.nn.functional.one_hot(gates.argmax(-1), 4).mul(mask[..., None]).sum(1).double()
    by_gate = counts[:, None] / (4 * mask.sum()) / mask.sum(1)[:, None, None]
    by_gate = by_gate * mask[..., None]
    wanted = gates * (by_gate - (gates * by_gate).sum(-1, keepdim=True))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


def test_weights_learn_through_both_gates():
    logits = random(1, 6, 4)
    assert torch.autograd.gradcheck(
        lambda x: gshard_routing(x, 3, policy="all").weights, logits.requires_grad_(), atol=1e-8
    )


# ----------------------------------------------------------------------------- other people's routers


def nllb_router(experts: int, capacity: int, policy: str) -> NllbMoeTop2Router:
    config = NllbMoeConfig(
        d_model=6, num_experts=experts, expert_capacity=capacity, second_expert_policy=policy,
        normalize_router_prob_before_dropping=True, router_bias=False, router_ignore_padding_tokens=False,
    )  # fmt: skip
    return NllbMoeTop2Router(config).train()  # in evaluation it has another capacity


@pytest.mark.parametrize("capacity", [1, 2, 5, 8, 23])
def test_routing_of_all_second_experts_is_nllbs(capacity):
    logits = random(23, 4, dtype=torch.float32)
    padding = uniform(23) < 0.3
    for mask in (None, ~padding[None]):
        theirs = nllb_router(4, capacity, "all")
        top_1, weights = theirs.route_tokens(logits.clone(), padding_mask=None if mask is None else padding)
        ours = gshard_routing(logits[None], capacity, policy="all", mask=mask)
        torch.testing.assert_close(as_table(ours)[0], weights, rtol=0, atol=1e-6)
        placed = ours.positions[:, 0] >= 0
        assert torch.equal(top_1.argmax(-1)[placed], ours.experts[placed, 0]) and not top_1[~placed].any()


@pytest.mark.parametrize("capacity", [1, 2, 5, 8, 23])
def test_random_routing_is_nllbs_but_for_its_draw_its_second_weight_and_its_counter(capacity):
    logits, router = random(23, 4, dtype=torch.float32), nllb_router(4, capacity, "random")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, theirs = router.route_tokens(logits.clone())
        torch.manual_seed(0)
        draws = torch.rand(23)
    # NLLB draws with g2 and weighs by it, before it is divided by g1 + g2; the first weight is divided
    best = logits.softmax(-1).topk(2)
    both = best.values.sum(-1)
    theirs.scatter_(1, best.indices[:, 1:], theirs.gather(1, best.indices[:, 1:]) / both[:, None])
    draws = draws / both
    by_hand, _, _ = sequential(logits[None], capacity, "random", draws[None], count_undrawn=False)
    torch.testing.assert_close(by_hand[0], theirs, rtol=0, atol=1e-6)
    ours = as_table(gshard_routing(logits[None], capacity, policy="random", draws=draws[None]))[0]
    if capacity == 23:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    elif capacity == 8:
        assert (ours > 0).sum() < (theirs > 0).sum()
    assert ((theirs > 0) | (ours == 0)).all()  # a counter that runs ahead can only refuse more


@pytest.mark.parametrize("capacity", [1, 2, 5, 23])
def test_top_1_routing_is_switchs(capacity):
    router = SwitchTransformersTop1Router(
        SwitchTransformersConfig(d_model=6, num_experts=4, expert_capacity=capacity, router_jitter_noise=0.0)
    )
    x = random(3, 23, 6, dtype=torch.float32)
    with torch.no_grad():
        router.classifier.weight.copy_(random(4, 6, seed=1))
        dispatched, gate, logits = router(x)
    ours = switch_routing(logits, capacity)  # they count the capacity for each text
    torch.testing.assert_close(as_table(ours), dispatched * gate, rtol=0, atol=1e-6)
    loss = load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    torch.testing.assert_close(ours.auxiliary_loss, loss, rtol=0, atol=1e-6)
    gshard = gshard_routing(logits, capacity, policy="none", aux_scale="switch")
    torch.testing.assert_close(gshard.auxiliary_loss, loss, rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------- to the experts and back


def some_experts(x: Tensor) -> Tensor:
    """Expert e multiplies by a matrix of its own, adds e + 1 to empty rows too, and bends."""
    matrices = random(x.shape[0], x.shape[2], x.shape[2], seed=5, dtype=x.dtype)
    return torch.tanh(x @ matrices + torch.arange(1, x.shape[0] + 1, dtype=x.dtype)[:, None, None])


@given(st.data(), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=40)
def test_index_einsum_and_token_by_token_agree(data, dtype):
    groups, size, experts, width = (data.draw(st.integers(a, b)) for a, b in [(1, 3), (1, 9), (2, 5), (1, 4)])
    seed, capacity = data.draw(st.integers(0, 99)), data.draw(st.integers(1, size))
    x = random(width, groups * size, seed=seed, dtype=dtype).T.requires_grad_()
    logits = random(groups, size, experts, seed=seed + 1, dtype=dtype).requires_grad_()
    if data.draw(st.booleans()):
        routing = switch_routing(logits, capacity)
    else:
        routing = gshard_routing(logits, capacity, draws=uniform(groups, size, seed=seed))
    table = as_table(routing).flatten(0, 1)
    wanted = sum(table[:, e, None] * some_experts(x.expand(experts, -1, -1))[e] for e in range(experts))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    upstream = random(*wanted.shape, seed=3, dtype=dtype)
    reference = torch.autograd.grad(wanted, [x, logits], upstream, retain_graph=True)
    for mix in (mix_by_index, mix_by_einsum):
        ours = mix(x, routing, some_experts)
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)
        gradients = torch.autograd.grad(ours, [x, logits], upstream, retain_graph=True)
        for gradient, theirs in zip(gradients, reference, strict=True):
            torch.testing.assert_close(gradient, theirs, rtol=tolerance, atol=tolerance)


def test_dropped_tokens_give_exactly_zero_whatever_the_experts_say():
    x, logits = random(12, 3), torch.zeros(1, 12, 4)
    routing = gshard_routing(logits, 2, policy="all")  # all tokens ask for experts 0 and 1
    broken = torch.tensor([1, 1, math.nan, math.inf]).view(4, 1, 1)
    y = mix_by_index(x, routing, lambda buffers: some_experts(buffers) * broken)
    assert y[:2].ne(0).all() and y[2:].eq(0).all()
    assert mix_by_einsum(x, routing, some_experts)[2:].eq(0).all()


def test_buffers_hold_the_tokens_in_order_and_zeros():
    x = torch.arange(1.0, 5)[:, None]
    routing = gshard_routing(torch.tensor([[[1.0, 0], [1, 0]], [[0, 1], [1, 0]]]), 2, policy="all")
    buffers = dispatch(x, routing)
    # pass 1 of group 0 fills expert 0, so pass 2 finds room at expert 1 alone
    assert buffers[..., 0].tolist() == [[1, 2, 4, 3], [1, 2, 3, 4]]
    mask, weights = one_hot_masks(routing)
    assert mask.shape == (2, 2, 2, 2) and mask.dtype == torch.bool and torch.equal(mask, weights > 0)
    none = dispatch(x, gshard_routing(torch.zeros(1, 4, 2), 4, policy="none"))
    assert none[0, :, 0].tolist() == [1, 2, 3, 4] and none[1].eq(0).all()


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(5, 4)}, "logits must be floats of shape"),
        ({"logits": torch.zeros(2, 5, 4, dtype=torch.long)}, "logits must be floats"),
        ({"logits": torch.zeros(2, 5, 1)}, "at least 2 experts"),
        ({"capacity": 0}, "capacity must be an integer >= 1, got 0"),
        ({"capacity": 2.5}, "capacity must be an integer >= 1, got 2.5"),
        ({"policy": "sampling"}, "policy must be one of .*sampling"),
        ({"aux_scale": "mesh"}, "aux_scale must be one of .*mesh"),
        ({"policy": "random"}, "draws must have shape .* got None"),
        ({"policy": "random", "draws": torch.zeros(5)}, r"draws must have shape \(2, 5\)"),
        ({"mask": torch.ones(2, 5)}, "mask must be bool"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask must be bool of shape \(2, 5\)"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    settings = {"logits": torch.zeros(2, 5, 4), "capacity": 3, "policy": "all"} | change
    with pytest.raises(ValueError, match=message):
        gshard_routing(settings.pop("logits"), settings.pop("capacity"), **settings)


def test_bad_sizes_are_refused_by_name():
    routing = gshard_routing(torch.zeros(2, 5, 4), 3, policy="all")
    with pytest.raises(ValueError, match=r"x must be \(tokens=10, d_model\)"):
        dispatch(torch.zeros(9, 3), routing)
    with pytest.raises(ValueError, match=r"outputs must be \(4, 6, d_model\)"):
        combine(torch.zeros(4, 3, 3), routing)
    with pytest.raises(ValueError, match="capacity_factor must be > 0"):
        expert_capacity(8, 4, 0.0)
    with pytest.raises(ValueError, match="experts must be >= 1"):
        expert_capacity(8, 0)
