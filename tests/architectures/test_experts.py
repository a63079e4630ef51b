"""The expert layer: token by token, against a dense network and Switch's layer, in a model, and what it costs."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from effnlp_lessons.architectures.experts import (
    Experts,
    MoEFeedForward,
    SwitchFeedForward,
    auxiliary_loss,
    moe_mixers,
)
from effnlp_lessons.architectures.gshard import gshard_routing, mix_by_einsum, mix_by_index, switch_routing
from effnlp_lessons.measure import count_macs, count_parameters
from effnlp_lessons.transformer import Decoder, Encoder, FeedForward, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=30, max_length=40, d_model=12, layers=4, heads=3, d_ff=16, segments=0, pooler=False, dropout=0.0
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fill_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Large random numbers in all parameters, in float64; in evaluation."""
    module.double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=1000 * seed + number))
    return module.eval()


def layer(experts: int = 4, **settings: object) -> MoEFeedForward:
    return fill_(MoEFeedForward(CONFIG, experts, **settings))


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def expert(experts: Experts, number: int, x: Tensor) -> Tensor:
    hidden = experts.activation(x @ experts.expand[number] + experts.expand_bias[number])
    return hidden @ experts.contract[number] + experts.contract_bias[number]


# ----------------------------------------------------------------------------- the layer's definition


@pytest.mark.parametrize("kind", [MoEFeedForward, SwitchFeedForward])
@given(st.data())
@settings(max_examples=40)
def test_the_layer_is_a_loop_over_groups_and_tokens(kind, data):
    batch, length, experts = (data.draw(st.integers(a, b)) for a, b in [(1, 3), (1, 9), (2, 5)])
    group = data.draw(st.none() | st.integers(1, 12))
    factor = data.draw(st.sampled_from([0.3, 1.0, 2.0, math.inf]))
    seed = data.draw(st.integers(0, 99))
    module = fill_(kind(CONFIG, experts, capacity_factor=factor, group=group), seed)
    x = random(length, batch, CONFIG.d_model, seed=seed).transpose(0, 1)  # not contiguous
    mask = data.draw(st.none() | st.just(random(batch, length, seed=seed) > -0.3))
    if mask is not None:
        mask[0] = data.draw(st.booleans())
    real = [(b, i) for b in range(batch) for i in range(length) if mask is None or mask[b, i]]
    wanted, choices = torch.zeros_like(x), kind.choices
    groups = -(-len(real) // (group or max(1, len(real))))
    size = -(-len(real) // groups) if groups else 0
    for first in range(0, len(real), max(1, size)):
        members = real[first : first + size]
        tokens = torch.stack([x[place] for place in members])
        capacity = min(size, math.ceil(choices * size * factor / experts)) if factor < math.inf else size
        logits = (tokens @ module.router)[None]
        routing = switch_routing(logits, capacity) if choices == 1 else gshard_routing(logits, capacity, policy="all")
        for token, place in enumerate(members):
            for choice in range(choices):
                weight = routing.weights[token, choice]
                wanted[place] += weight * expert(module.experts, routing.experts[token, choice], tokens[token])
    y = module(x, mask)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)
    assert len(module.last_routing.weights) == max(1, groups) * max(1, size)
    if mask is not None:
        assert y[~mask].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_experts_with_room_for_all_are_the_dense_network(dtype):
    dense = fill_(FeedForward(CONFIG)).to(dtype)
    x, mask = random(3, 7, 12, dtype=dtype).requires_grad_(), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = mask[2] = False
    module = layer(5, policy="all", capacity_factor=math.inf, group=6).to(dtype)
    module.experts.copy_dense_(dense)
    wanted = dense(x) * mask[..., None]
    y = module(x, mask)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    upstream = random(3, 7, 12, seed=1, dtype=dtype)
    (ours,), (theirs,) = (torch.autograd.grad(out, x, upstream) for out in (y, wanted))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_experts_are_networks_of_their_own():
    experts, x = fill_(Experts(CONFIG, 3)), random(5, 3, 12).transpose(0, 1)
    for number in range(3):
        torch.testing.assert_close(experts(x)[number], expert(experts, number, x[number]), rtol=0, atol=1e-10)
    assert experts(x[:, :0]).shape == (3, 0, 12) and len(experts) == 3


@pytest.mark.parametrize("capacity", [1, 3, 9])
def test_the_top_1_layer_is_switchs(capacity):
    theirs = SwitchTransformersSparseMLP(
        SwitchTransformersConfig(
            d_model=12, d_ff=16, num_experts=4, expert_capacity=capacity, router_jitter_noise=0.0, dropout_rate=0.0
        )
    ).eval()
    # a group is one of their texts; 9 tokens for 4 experts, rounded up
    ours = SwitchFeedForward(replace(CONFIG, activation="relu"), 4, capacity_factor=(capacity - 0.5) * 4 / 9, group=9)
    with torch.no_grad():
        ours.router.copy_(3 * random(12, 4)).double()
        ours.experts.expand.copy_(random(4, 12, 16, seed=1))
        ours.experts.contract.copy_(random(4, 16, 12, seed=2))
        theirs.router.classifier.weight.copy_(ours.router.T)
        for number, network in enumerate(theirs.experts.values()):
            network.wi.weight.copy_(ours.experts.expand[number].T)
            network.wo.weight.copy_(ours.experts.contract[number].T)
    x = random(3, 9, 12, dtype=torch.float32)
    y = ours(x)
    assert ours.last_routing.capacity == capacity
    # float32 sums of 16 products of about 10
    torch.testing.assert_close(y, theirs(x), rtol=1e-5, atol=1e-4)
    dropped = (ours.last_routing.positions < 0).view(3, 9)
    assert dropped.any() == (capacity < 9) and y[dropped].eq(0).all()


def test_gradients_of_input_router_and_experts():
    module = layer(3, policy="all").train()
    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    names = [name for name, _ in module.named_parameters()]
    x = random(1, 5, 12).requires_grad_()

    def both(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))
        return y[..., :3], module.auxiliary_loss

    assert torch.autograd.gradcheck(both, (x, *parameters), atol=1e-7, fast_mode=True)


def test_the_loss_teaches_the_router_alone_and_by_the_mean_gate():
    module, x = layer(4), random(2, 9, 12)
    module(x)
    module.auxiliary_loss.backward()
    assert module.experts.expand.grad is None
    # l_aux = 1/E sum_e (c_e / S) m_e by hand, the share of first choices taken for a constant
    router = module.router.detach().requires_grad_()
    gates = (x.flatten(0, 1) @ router).softmax(-1)
    share = gates.argmax(-1).bincount(minlength=4) / 18
    (share.double() * gates.mean(0)).mean().backward()
    torch.testing.assert_close(module.router.grad, router.grad, rtol=0, atol=1e-8)  # the share is float32 here


# ----------------------------------------------------------------------------- padding, modes, copies


@pytest.mark.parametrize("policy", ["random", "all", "none"])
def test_padding_takes_no_place_and_changes_no_bit(policy):
    module = layer(4, policy=policy, group=6).train()
    tokens = random(11, 12)
    module.generator.manual_seed(3)
    wanted, routing = module(tokens[None])[0], None
    for mask in (torch.ones(1, 11, dtype=torch.bool), torch.arange(35).view(5, 7) % 3 == 1):
        mask.view(-1)[mask.view(-1).nonzero()[11:]] = False
        assert mask.sum() == 11
        x = random(*mask.shape, 12, seed=4)
        x[mask] = tokens
        x[~mask] = math.nan
        module.generator.manual_seed(3)
        y = module(x, mask)
        assert torch.equal(y[mask], wanted) and y[~mask].eq(0).all()
        routing = routing or module.last_routing
        assert torch.equal(routing.positions, module.last_routing.positions)
        assert torch.equal(routing.auxiliary_loss, module.last_routing.auxiliary_loss)
    assert module.last_routing.counts.sum() == 11


def test_nothing_but_padding_gives_zeros_and_no_loss():
    module, x = layer(4).train(), random(2, 3, 12).requires_grad_()
    y = module(x, torch.zeros(2, 3, dtype=torch.bool))
    assert y.eq(0).all() and module.auxiliary_loss == 0
    (y.sum() + module.auxiliary_loss).backward()
    assert all(p.grad is None or p.grad.eq(0).all() for p in module.parameters())
    assert module(x[:, :0]).shape == (2, 0, 12)


def test_evaluation_draws_nothing_and_training_draws_anew():
    module, x = layer(4, capacity_factor=4.0), random(2, 20, 12)
    before = module.generator.get_state()
    evaluated = [module(x) for _ in range(2)]
    assert torch.equal(*evaluated) and torch.equal(module.generator.get_state(), before)
    assert (module.last_routing.positions >= 0).all()  # every second expert is asked
    module.train()
    trained = [module(x) for _ in range(2)]
    assert not torch.equal(*trained)
    state = torch.random.get_rng_state()
    again = layer(4, capacity_factor=4.0).train()
    assert torch.equal(again(x), trained[0]) and torch.equal(again(x), trained[1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_evaluation_may_have_more_room():
    module, x = layer(4, policy="all", capacity_factor=0.5, eval_capacity_factor=math.inf), random(1, 20, 12)
    module(x)
    assert module.last_routing.capacity == 20 and (module.last_routing.positions >= 0).all()
    module.train()(x)
    assert module.last_routing.capacity == 5 and (module.last_routing.positions < 0).any()


def test_a_layer_that_has_run_can_be_copied_and_pickled():
    module, x = layer(4).train(), random(1, 5, 12)
    module(x)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301 ours, just written
        assert again.last_routing is None and again.auxiliary_loss is None
        assert torch.equal(again.eval()(x), module.eval()(x))
    fresh = MoEFeedForward(CONFIG, 4, seed=9).double().eval()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), module(x))


def test_weights_start_from_their_seed_alone():
    a, b, c = (MoEFeedForward(CONFIG, 4, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.router, c.router) and not torch.equal(a.experts.expand, c.experts.expand)
    assert not torch.equal(a.experts.expand[0], a.experts.expand[1])
    for weight in (a.experts.expand, a.experts.contract):
        assert abs(weight.std().item() - 0.02) < 0.002  # 768 numbers: four standard errors
    assert a.experts.expand_bias.eq(0).all() and a.experts.contract_bias.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_and_routes_in_float32(dtype):
    module, x = layer(4).to(dtype), random(2, 9, 12).to(dtype)
    y, routing = module(x), module.last_routing
    wide = copy.deepcopy(module).float()
    wanted = wide(x.float())
    assert y.dtype == dtype and routing.weights.dtype == routing.auxiliary_loss.dtype == torch.float32
    assert torch.equal(routing.experts, wide.last_routing.experts)
    assert torch.equal(routing.weights, wide.last_routing.weights)
    # bfloat16 keeps 8 bits of hidden units and outputs of about 10
    torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.2)


def test_autocast_leaves_the_router_in_float32():
    module, x, mask = layer(4).float(), random(2, 9, 12, dtype=torch.float32), torch.ones(2, 9, dtype=torch.bool)
    mask[0, 3:] = False
    wanted, routing = module(x, mask), module.last_routing
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x, mask)
    assert torch.equal(module.last_routing.weights, routing.weights) and y.dtype == torch.float32
    torch.testing.assert_close(y, wanted, rtol=0.05, atol=0.2)  # as above
    assert not torch.equal(y, wanted)


# ----------------------------------------------------------------------------- in a model


@pytest.mark.parametrize("kind", [Encoder, Decoder])
@pytest.mark.parametrize("norm_first", [False, True])
def test_every_other_layer_of_a_model_has_experts(kind, norm_first):
    model = kind(replace(CONFIG, layers=5, norm_first=norm_first), channel_mixer=moe_mixers(4, seed=3))
    kinds = [type(block.channel_mixer) for block in model.blocks]
    assert kinds == [FeedForward, MoEFeedForward, FeedForward, MoEFeedForward, FeedForward]
    first, second = (model.blocks[i].channel_mixer for i in (1, 3))
    assert not torch.equal(first.experts.expand, second.experts.expand)
    # initialise_ of the model has not touched them
    assert torch.equal(first.experts.expand, MoEFeedForward(CONFIG, 4, seed=3 * 1_003 + 1).experts.expand)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 5:] = mask[2] = False
    out = model(random_ids(3, 9), mask)
    loss = (out.last if kind is Encoder else out.logits)[mask].square().mean()
    torch.testing.assert_close(auxiliary_loss(model), first.auxiliary_loss + second.auxiliary_loss)
    assert first.last_routing.counts.sum() == second.last_routing.counts.sum() == 14
    (loss + 0.1 * auxiliary_loss(model)).backward()
    for module in (first, second):
        assert all(p.grad.isfinite().all() and p.grad.ne(0).any() for p in module.parameters())


def test_the_settings_of_all_layers_are_those_given():
    settings = {
        "capacity_factor": 1.5, "eval_capacity_factor": 3.0, "group": 7, "policy": "none", "aux_scale": "switch"
    }  # fmt: skip
    module = moe_mixers(6, **settings)(CONFIG, 1)
    assert {name: getattr(module, name) for name in settings} == settings and len(module.experts) == 6


def test_the_loss_of_a_model_is_the_sum_of_its_layers_not_that_of_all_tokens_together():
    # each layer sends everything to one expert, but not both to the same: badly balanced in each layer alone
    model = Encoder(CONFIG, channel_mixer=moe_mixers(2, aux_scale="switch"))
    for number, block in enumerate((1, 3)):
        model.blocks[block].channel_mixer.router.data.zero_()
        model.blocks[block].channel_mixer.router.data[0, number] = 1000.0
        model.blocks[block].channel_mixer.router.data[0, 1 - number] = -1000.0
        nn.init.zeros_(model.blocks[block].token_norm.weight)
        nn.init.ones_(model.blocks[block].token_norm.bias)
    model(random_ids(2, 5))
    assert auxiliary_loss(model).item() == pytest.approx(4, abs=1e-5)  # E each; together they would seem balanced, 1


def test_padding_changes_no_real_token_of_an_encoder():
    model = fill_(Encoder(CONFIG, channel_mixer=moe_mixers(4)))
    ids, mask = random_ids(3, 9), torch.ones(3, 9, dtype=torch.bool)
    mask[0, 4:] = mask[1] = False
    longer, longer_mask = (torch.cat([part, part[:, :5]], dim=1) for part in (ids, mask))
    longer_mask[:, 9:] = False
    wanted = model(ids, mask).last
    torch.testing.assert_close(model(longer, longer_mask).last[:, :9][mask], wanted[mask], rtol=0, atol=1e-10)
    others = torch.where(mask, ids, (ids + 1) % CONFIG.vocab_size)
    assert torch.equal(model(others, mask).last[mask], wanted[mask])


def decoder(**settings: object) -> Decoder:
    return fill_(Decoder(replace(CONFIG, norm_first=True), channel_mixer=moe_mixers(4, **settings)))


def test_with_room_for_all_generation_token_by_token_is_one_pass():
    model, ids, mask = decoder(eval_capacity_factor=math.inf), random_ids(2, 12), torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    wanted, state = model(ids, mask).logits, None
    for token in range(12):
        logits, state = model(ids[:, token : token + 1], mask[:, : token + 1], state)
        torch.testing.assert_close(logits[:, 0][mask[:, token]], wanted[:, token][mask[:, token]], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("factor", "looks"), [(math.inf, False), (1.0, True)])
def test_a_tight_capacity_lets_later_tokens_push_earlier_ones_out(factor, looks):
    ids = random_ids(1, 24)
    model = Decoder(CONFIG, channel_mixer=moe_mixers(4, eval_capacity_factor=factor)).double().eval()
    for block in model.blocks[1::2]:
        block.channel_mixer.router.data.mul_(50)
    later = torch.cat([ids[:, :12], (ids[:, 12:] + 1) % CONFIG.vocab_size], dim=1)
    same = torch.isclose(model(ids).logits[:, :12], model(later).logits[:, :12], rtol=0, atol=1e-10).all()
    assert same != looks


# ----------------------------------------------------------------------------- cost and learning


def test_products_do_not_grow_with_the_number_of_experts():
    x, counts = random(2, 64, 12, dtype=torch.float32), {}
    for experts in (2, 4, 8, 16, 32, 64):
        module = MoEFeedForward(CONFIG, experts).eval()
        counts[experts] = count_macs(module, x)
        assert count_parameters(module) == experts * (2 * 12 * 16 + 12 + 16) + 12 * experts
    dense = count_macs(FeedForward(CONFIG), x).total
    # the experts cost two dense networks, and the router d_model products a token and expert
    assert {count.by_module["experts"] for count in counts.values()} == {2 * dense}
    assert all(count.total == 2 * dense + 128 * 12 * experts for experts, count in counts.items())


def test_one_hot_masks_cost_products_of_tokens_and_buffer_rows():
    module, x = MoEFeedForward(CONFIG, 8, group=32).eval(), random(1, 64, 12, dtype=torch.float32)
    module(x)
    index, einsum = (
        count_macs(lambda x, mix=mix: mix(x, module.last_routing, module.experts), x[0]).total
        for mix in (mix_by_index, mix_by_einsum)
    )
    # two groups of 32 tokens, 8 experts with 8 rows each, there and back
    assert einsum - index == 2 * 2 * (32 * 8 * 8 * 12)


@pytest.mark.parametrize("k", [0.0, 0.1])
def test_the_loss_gets_a_router_out_of_one_expert(k):
    # no capacity: what is dropped would teach the router to spread the tokens, too
    module = MoEFeedForward(CONFIG, 4, aux_scale="switch", policy="all", capacity_factor=math.inf).train()
    with torch.no_grad():
        module.router[0, 0] += 2.0  # through the feature that is always 1, expert 0 is everyone's first choice
    optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    variation = []
    for _ in range(200):
        x = torch.randn(1, 128, CONFIG.d_model, generator=generator)
        x[..., 0] = 1
        loss = (module(x) - x.sin()).square().mean() + k * module.auxiliary_loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        counts = module.last_routing.counts.double()
        variation.append((counts.std(correction=0) / counts.mean()).item())
    assert variation[0] == pytest.approx(math.sqrt(3))
    assert variation[-1] < 0.4 if k else variation[-1] > 0.8


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 1}, "experts must be >= 2, got 1"),
        ({"group": 0}, "group must be >= 1 token, got 0"),
        ({"policy": "sampling"}, "policy must be one of .*sampling"),
        ({"aux_scale": "mesh"}, "aux_scale must be one of .*mesh"),
        ({"capacity_factor": 0.0}, "capacity_factor must be > 0, got 0.0"),
        ({"eval_capacity_factor": -1.0}, "capacity_factor must be > 0, got -1.0"),
    ],
)
def test_bad_settings_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        MoEFeedForward(CONFIG, **({"experts": 4} | change))


def test_bad_calls_are_refused_by_name():
    with pytest.raises(ValueError, match="experts must be >= 1, got 0"):
        Experts(CONFIG, 0)
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        layer()(random(2, 5, 12), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 5\)"):
        layer()(random(2, 5, 12), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="auxiliary_loss"):
        auxiliary_loss(Encoder(CONFIG))
