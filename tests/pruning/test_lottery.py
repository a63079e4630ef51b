"""Lottery tickets: the paper's ladder, torch's masks round by round, rewinding to the bit, masks that are held."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from effnlp_lessons.datasets.digits import load_digits
from effnlp_lessons.pruning.lottery import (
    RATES,
    SIZES,
    distances,
    find_tickets,
    ladder,
    lenet_300_100,
    magnitude_round,
    masks_after,
    overlap,
    overlap_by_chance,
    rate_of_the_original,
    regrown,
    removal_rounds,
    rewind_,
    shuffled,
)
from effnlp_lessons.pruning.lottery_training import (
    DigitSplits,
    Snapshot,
    TicketPlan,
    batch_order,
    digit_splits,
    snapshot,
    train_masked,
)
from effnlp_lessons.pruning.masks import apply_masks_, full_masks, global_masks, magnitudes, share_left

OPTIMIZERS = {
    "Adam": partial(torch.optim.Adam, lr=1e-2),
    "fused Adam": partial(torch.optim.Adam, lr=1e-2, fused=True),
    "AdamW": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
}
SMALL = {"0.weight": 0.3, "2.weight": 0.1}


def a_network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))


def some_digits(rows=50):
    generator = torch.Generator().manual_seed(1)

    def pair(n):
        return torch.rand(n, 9, generator=generator), torch.randint(3, (n,), generator=generator)

    return DigitSplits(pair(rows), pair(20), pair(20))


def half(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(m.shape, generator=generator) < 0.5 for n, m in full_masks(model).items()}


def plan_of(name="Adam", **given):
    return TicketPlan(**{"steps": 12, "batch_size": 7, "every": 5, "optimizer": OPTIMIZERS[name]} | given)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --------------------------------------------------------------------------------------- the net, the ladder


def test_the_net_is_the_papers():
    model = lenet_300_100(3)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    assert sizes == SIZES and sum(sizes.values()) == 266_200
    assert same(state_of(model), state_of(lenet_300_100(3))) and not same(state_of(model), state_of(lenet_300_100(4)))
    for layer in (model[0], model[2], model[4]):
        # Glorot normal: variance 2 / (inputs + outputs); 4 standard errors of a standard deviation of n draws
        expected = math.sqrt(2 / sum(layer.weight.shape))
        bound = 4 * expected / math.sqrt(2 * layer.weight.numel())
        assert layer.weight.std().item() == pytest.approx(expected, abs=bound)
        assert not layer.bias.any()
    assert abs(model[0].weight).max() > 4 * model[0].weight.std(), "not uniform"
    x = torch.rand(5, 784)
    hidden = F.relu(F.linear(F.relu(F.linear(x, model[0].weight, model[0].bias)), model[2].weight, model[2].bias))
    assert torch.equal(model(x), F.linear(hidden, model[4].weight, model[4].bias))


def test_drawing_a_net_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    lenet_300_100(0)
    assert torch.equal(before, torch.random.get_rng_state())


PAPER = [100, 80.04, 64.06, 51.28, 41.05, 32.87, 26.32, 21.07, 16.88, 13.52]
PAPER += [10.83, 8.68, 6.95, 5.57, 4.47, 3.58, 2.87, 2.31, 1.85, 1.49, 1.19]


def test_the_ladder_is_the_papers():
    assert [round(left, 2) for left in ladder(20)] == PAPER
    # 20 % in the output layer too would give other numbers
    everywhere = ladder(9, rates=dict.fromkeys(SIZES, 0.2))
    assert [round(everywhere[r], 2) for r in (3, 7, 9)] == [51.2, 20.97, 13.42]


def test_the_masks_climb_down_the_ladder_in_every_layer():
    model, shares, output = lenet_300_100(0), [], []
    masks = full_masks(model)
    for _ in range(21):
        shares.append(100 * share_left(masks))
        output.append(int(masks["4.weight"].sum()))
        masks = magnitude_round(model, masks)
    assert shares == pytest.approx(ladder(20), abs=1e-9)
    assert output[:4] == [1000, 900, 810, 729]
    assert ladder(4, {"a": 10}, {"a": 0.5}) == [100, 50, 30, 10, 10], "10 - 5 - 2 - 2 - 0"


def test_the_rate_of_the_original():
    assert [1 / rate_of_the_original(done) for done in range(10)] == pytest.approx(list(range(10, 0, -1)))
    left = 1000
    for done in range(9):
        left -= round(rate_of_the_original(done) * left)
        assert left == 1000 - 100 * (done + 1)
    for done, share in ((10, 0.1), (-1, 0.1), (2, 0.4), (0, 0.0), (0, 1.5)):
        with pytest.raises(ValueError, match="done and share must leave"):
            rate_of_the_original(done, share)


@pytest.mark.parametrize(("rounds", "rates", "message"), [(-1, RATES, "rounds"), (2, {"0.weight": 0.2}, "same names")])
def test_a_ladder_that_is_none(rounds, rates, message):
    with pytest.raises(ValueError, match=message):
        ladder(rounds, rates=rates)


# --------------------------------------------------------------------------------------- the loop of the paper


def test_masks_are_torchs_round_by_round():
    """The same training with torch's own pruning: parametrised layers, the loop written out."""
    digits, plan, model = some_digits(), plan_of("momentum"), a_network()
    start = snapshot(model)
    theirs = a_network()
    layers = {"0.weight": theirs[0], "2.weight": theirs[2]}
    for ticket in find_tickets(
        model, lambda m: train_masked(model, m, start, digits, plan), 4, partial(magnitude_round, rates=SMALL)
    ):
        for name, layer in layers.items():
            kept = layer.weight_mask.bool() if hasattr(layer, "weight_mask") else torch.ones_like(layer.weight) > 0
            assert torch.equal(ticket.masks[name], kept)
        # rewind: their values before masking are `weight_orig`
        with torch.no_grad():
            for name, layer in layers.items():
                getattr(layer, "weight_orig", layer.weight).copy_(start.weights[name])
                layer.bias.copy_(start.weights[name.replace("weight", "bias")])
        optimizer = plan.optimizer(list(theirs.parameters()))
        for rows in batch_order(50, 7, 12, plan.seed):
            optimizer.zero_grad()
            F.cross_entropy(theirs(digits.train[0][rows]), digits.train[1][rows]).backward()
            optimizer.step()
        for name, layer in layers.items():
            layer(torch.zeros(1, layer.in_features))  # the mask is applied in a forward pass
            torch.testing.assert_close(layer.weight, ticket.result[1].weights[name])
            prune.l1_unstructured(layer, "weight", amount=SMALL[name])
    assert ticket.round == 4


def test_every_round_begins_at_theta_0_to_the_bit():
    model = a_network()
    start, seen = state_of(model), []

    def train(masks):
        rewind_(model, start, masks)
        seen.append(state_of(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        apply_masks_(model, masks)

    tickets = list(find_tickets(model, train, 5, partial(magnitude_round, rates=SMALL)))
    assert [t.round for t in tickets] == list(range(6)) and len(seen) == 6
    for ticket, weights in zip(tickets, seen, strict=True):
        for name, value in weights.items():
            kept = ticket.masks.get(name, torch.ones_like(value, dtype=torch.bool))
            assert torch.equal(value[kept].view(torch.int32), start[name][kept].view(torch.int32))
            assert not value[~kept].view(torch.int32).any(), "a masked weight is +0.0"
    for before, after in zip(tickets[:-1], tickets[1:], strict=True):
        assert same(before.next_masks, after.masks)
        assert all(not (after.masks[n] & ~before.masks[n]).any() for n in after.masks)


def test_the_masks_follow_from_the_trained_weights_even_if_the_model_is_used_in_between():
    model, digits, plan = a_network(), some_digits(), plan_of()
    start = snapshot(model)

    def train(masks):
        return train_masked(model, masks, start, digits, plan)

    plain = [t.masks for t in find_tickets(model, train, 3, partial(magnitude_round, rates=SMALL))]
    disturbed = []
    for ticket in find_tickets(model, train, 3, partial(magnitude_round, rates=SMALL)):
        disturbed.append(ticket.masks)
        nn.init.normal_(model[0].weight)
    assert all(same(a, b) for a, b in zip(plain, disturbed, strict=True))


def test_global_pruning_takes_the_same_loop():
    model, rates = a_network(), iter([rate_of_the_original(k) for k in range(4)])
    tickets = list(
        find_tickets(
            model,
            lambda masks: rewind_(model, state_of(model), masks),
            3,
            lambda model, masks: global_masks(magnitudes(model), next(rates), masks),
        )
    )
    assert [int(sum(m.sum() for m in t.masks.values())) for t in tickets] == [96, 86, 76, 66]
    only = next(find_tickets(model, lambda masks: None, 0, partial(magnitude_round, rates=SMALL), names=["2"]))
    assert list(only.masks) == ["2.weight"]


def test_a_training_that_lets_weights_grow_back_is_refused():
    model = a_network()

    def train(masks):
        nn.init.normal_(model[0].weight)

    with pytest.raises(ValueError, match="masked weights are not 0"):
        list(find_tickets(model, train, 1, partial(magnitude_round, rates=SMALL)))
    with pytest.raises(ValueError, match="rounds must be >= 0"):
        next(find_tickets(model, train, -1, magnitude_round))


def test_a_shuffled_mask_keeps_the_counts_of_every_layer():
    masks = {"a": torch.arange(77).view(7, 11) < 20, "b": torch.arange(6).view(2, 3) < 0, "c": torch.ones(3, 3) > 0}
    other = shuffled(masks, seed=2)
    assert {n: int(m.sum()) for n, m in other.items()} == {"a": 20, "b": 0, "c": 9}
    assert not torch.equal(other["a"], masks["a"]) and other["a"].shape == (7, 11)
    assert same(other, shuffled(masks, 2)) and not same(other, shuffled(masks, 3))
    # every place is as likely: 20 of 77 kept, over 400 draws within 5 standard deviations
    often = sum(shuffled(masks, seed)["a"].float() for seed in range(400))
    p = 20 / 77
    assert (often - 400 * p).abs().max() < 5 * math.sqrt(400 * p * (1 - p))


# --------------------------------------------------------------------------------------- training the small net


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_masked_weight_moves(name):
    model, digits = a_network(), some_digits()
    masks, start = half(model), snapshot(model)
    masks["2.weight"][0] = True  # no hidden unit without an output: its weights would have no gradient
    gradients = []

    def watched(parameters):
        optimizer = OPTIMIZERS[name](parameters)
        optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in parameters]))
        return optimizer

    _, end = train_masked(model, masks, start, digits, plan_of(optimizer=watched))
    assert regrown(model, masks) == 0
    for key, mask in masks.items():
        assert not end.weights[key][~mask].view(torch.int32).any()
        assert (end.weights[key][mask] != start.weights[key][mask]).all()
    places = {n: i for i, (n, _) in enumerate(model.named_parameters())}
    assert len(gradients) == 12
    for step in gradients:
        assert all(not step[places[key]][~mask].any() and step[places[key]][mask].any() for key, mask in masks.items())
    # the moments of a masked weight stay 0, and no hook is left behind
    for key, mask in masks.items():
        for moment, value in end.optimizer["state"][places[key]].items():
            assert moment == "step" or not value[~mask].any()
    model(digits.train[0]).sum().backward()
    assert model[0].weight.grad[~masks["0.weight"]].any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_that_are_applied_once_do_not_hold(name):
    model, digits = a_network(), some_digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model[0] = nn.Linear(9, 16)
        model[2] = nn.Linear(16, 3)
    # 56 of 144 weights of the first layer
    masks = {"0.weight": torch.randperm(144, generator=torch.Generator().manual_seed(0)).view(16, 9) >= 56}
    start = snapshot(model)
    train_masked(model, masks, start, digits, plan_of(name))
    assert regrown(model, masks) == 0
    apply_masks_(model, masks)
    optimizer = OPTIMIZERS[name](model.parameters())
    F.cross_entropy(model(digits.train[0]), digits.train[1]).backward()
    optimizer.step()
    assert regrown(model, masks) == 56


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("k", [1, 5, 8, 12])
def test_late_rewinding_with_nothing_pruned_repeats_the_run_to_the_bit(name, k):
    model, digits, plan = a_network(), some_digits(), plan_of(name, seed=3)
    full = full_masks(model)
    curve, end = train_masked(model, full, snapshot(model), digits, plan)
    early = train_masked(a_network(), full, snapshot(a_network()), digits, plan, until=k)[1]
    assert early.step == k and end.step == 12
    for _ in range(2):  # twice: a snapshot is not used up
        rest, again = train_masked(model, full, early, digits, plan)
        assert same(again.weights, end.weights)
        assert rest.accuracy == [a for a, step in zip(curve.accuracy, curve.step, strict=True) if step > k]
    # with a new optimizer, or with the first batches again, it is another run
    fresh = train_masked(model, full, Snapshot(k, early.weights), digits, plan)[1]
    shifted = train_masked(model, full, Snapshot(0, early.weights, early.optimizer), digits, plan, until=12 - k)[1]
    assert k == 12 or not (same(fresh.weights, end.weights) or same(shifted.weights, end.weights))


def test_late_rewinding_holds_masks_against_old_moments():
    model, digits, masks = a_network(), some_digits(), half(a_network())
    early = train_masked(model, full_masks(model), snapshot(model), digits, plan_of("momentum"), until=4)[1]
    assert all(early.optimizer["state"][0]["momentum_buffer"][~masks["0.weight"]] != 0)
    moved = []

    def watched(parameters):
        optimizer = OPTIMIZERS["momentum"](parameters)
        optimizer.register_step_pre_hook(lambda *_: moved.append(regrown(model, masks)))
        return optimizer

    _, end = train_masked(model, masks, early, digits, plan_of(optimizer=watched))
    assert moved == [0] * 8 and regrown(model, masks) == 0
    for key, mask in masks.items():
        assert not end.weights[key][~mask].any()


def test_the_optimizer_is_new_in_every_round():
    model, digits, made = a_network(), some_digits(), []

    def counted(parameters):
        made.append(OPTIMIZERS["Adam"](parameters))
        assert not made[-1].state
        return made[-1]

    plan, start = plan_of(optimizer=counted), snapshot(model)
    tickets = list(
        find_tickets(
            model, lambda m: train_masked(model, m, start, digits, plan), 3, partial(magnitude_round, rates=SMALL)
        )
    )
    assert len(made) == 4
    assert all(t.result[1].optimizer["state"][0]["step"] == 12 for t in tickets)
    # a ticket trained on its own, in another model, is the same
    alone = train_masked(a_network(5), tickets[2].masks, start, digits, plan_of())[1]
    assert same(alone.weights, tickets[2].result[1].weights)


def test_what_is_measured():
    model, digits = a_network(), some_digits()
    curve, end = train_masked(model, half(model), snapshot(model), digits, plan_of())
    assert curve.step == [5, 10, 12] and same(state_of(model), end.weights)
    loss = F.cross_entropy(model(digits.validation[0]), digits.validation[1]).item()
    right = (model(digits.test[0]).argmax(-1) == digits.test[1]).sum().item()
    assert curve.validation_loss[-1] == loss and curve.accuracy[-1] == pytest.approx(100 * right / 20)
    at_5 = train_masked(model, half(model), snapshot(a_network()), digits, plan_of(), until=5)[0]
    assert (at_5.step, at_5.validation_loss) == ([5], curve.validation_loss[:1])
    curve.validation_loss[:] = [0.4, 0.3, 0.3]
    assert curve.early_stop == 1


def test_the_order_of_the_batches():
    order = batch_order(23, 5, 11, seed=1)
    assert order.shape == (11, 5)
    for k in (0, 4):
        assert order[k : k + 4].flatten().unique().numel() == 20, "no digit twice in a pass"
    assert torch.equal(order[:6], batch_order(23, 5, 6, seed=1)), "a longer plan begins with the same batches"
    assert not torch.equal(order, batch_order(23, 5, 11, seed=2))
    assert batch_order(5, 5, 2, 0).sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_the_digits_are_held_out_evenly():
    splits, digits = digit_splits(), load_digits()
    assert [len(labels) for _, labels in (splits.train, splits.validation, splits.test)] == [3_500, 500, 1_000]
    for pixels, labels in (splits.train, splits.validation, splits.test):
        assert labels.bincount().unique().numel() == 1 and pixels.min() == 0 and pixels.max() == 1
    pixels, labels = (torch.cat(parts) for parts in zip(splits.train, splits.validation, strict=True))

    def rows(pixels, labels):
        return sorted(zip((255 * pixels).round().byte().tolist(), labels.tolist(), strict=True))

    expected = digits.subset("train")
    assert rows(pixels, labels) == rows(expected.images.flatten(1).float() / 255, expected.labels)
    assert torch.equal(splits.test[1], digits.subset("test").labels)
    for number in (0, 5, 4_000, -10):
        with pytest.raises(ValueError, match="validation must be a multiple of 10"):
            digit_splits(number)


def test_bad_plans_and_starts():
    model, digits = a_network(), some_digits()
    for bad in ({"steps": 0}, {"batch_size": 0}, {"every": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be >= 1"):
            TicketPlan(**bad)
    late = Snapshot(6, snapshot(model).weights)
    for until in (5, 13):
        with pytest.raises(ValueError, match="until must be in 6 .. 12"):
            train_masked(model, full_masks(model), late, digits, plan_of(), until)
    with pytest.raises(ValueError, match="rows must be at least"):
        train_masked(model, full_masks(model), snapshot(model), some_digits(6), plan_of())
    with pytest.raises(ValueError, match="validation loss is"):
        explode = partial(torch.optim.SGD, lr=1e38)
        train_masked(model, full_masks(model), snapshot(model), digits, plan_of(optimizer=explode))
    assert not model[0].weight._backward_hooks, "no hook is left behind an error"
    with pytest.raises(ValueError, match="mask must be|must be bool"):
        train_masked(model, {"0.weight": torch.ones(2, 2) > 0}, snapshot(model), digits, plan_of())


# --------------------------------------------------------------------------------------- what is in a ticket


def test_one_byte_a_weight_gives_the_masks_of_all_rounds_back():
    model, masks = a_network(), []
    for ticket in find_tickets(model, lambda m: apply_masks_(model, m), 6, partial(magnitude_round, rates=SMALL)):
        masks.append(ticket.masks)
    removed = removal_rounds(masks)
    assert all(r.dtype == torch.uint8 and r.min() >= 1 for r in removed.values())
    for number, expected in enumerate(masks):
        assert same(masks_after(removed, number), expected)
    with pytest.raises(ValueError, match="only lose"):
        removal_rounds([masks[0], masks[2], masks[1]])
    with pytest.raises(ValueError, match="begin with full"):
        removal_rounds(masks[1:])
    with pytest.raises(ValueError, match="1 to 255"):
        removal_rounds([])


def test_overlap_against_sets():
    first, second = half(a_network(), 1), half(a_network(), 2)
    found = overlap(first, second)
    for name, mask in first.items():
        ours, theirs = (set(m.flatten().nonzero().flatten().tolist()) for m in (mask, second[name]))
        assert found[name] == len(ours & theirs) / len(ours | theirs)
    assert overlap(first, first) == dict.fromkeys(first, 1.0)
    nothing = {"a": torch.zeros(2, 2) > 0}
    assert overlap(nothing, nothing) == {"a": 1.0} and overlap(nothing, {"a": torch.ones(2, 2) > 0}) == {"a": 0.0}


def test_overlap_by_chance():
    generator = torch.Generator().manual_seed(0)
    for p, q in ((0.5, 0.5), (0.1, 0.3), (1.0, 0.2)):
        masks = [{"a": torch.rand(600, 600, generator=generator) < share} for share in (p, q)]
        # 360,000 weights: the standard error is below 0.001
        assert overlap(*masks)["a"] == pytest.approx(overlap_by_chance(p, q), abs=0.005)
    for bad in ((0, 0), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="shares must be"):
            overlap_by_chance(*bad)


def test_distances_of_what_is_kept_and_what_is_pruned():
    start, end = {"a": torch.tensor([[1.0, 2, 3, 4]])}, {"a": torch.tensor([[2.0, 4, 0, 0]])}
    masks, following = (
        {"a": torch.tensor([[True, True, True, False]])},
        {"a": torch.tensor([[True, False, False, False]])},
    )
    assert distances(start, end, masks, following) == {"a": {"kept": 1.0, "pruned": 2.5}}
    assert math.isnan(distances(start, end, masks, copy.copy(masks))["a"]["pruned"])


def test_tickets_of_real_digits_beat_both_controls_when_few_weights_are_left():
    """10 rounds with a short training: at 10.8 % of the weights, after 60 steps, by more than three points."""
    digits, plan, model = digit_splits(), TicketPlan(steps=60, every=60), lenet_300_100(0)
    start = snapshot(model)
    *_, ticket = find_tickets(model, lambda m: train_masked(model, m, start, digits, plan), 10, magnitude_round)
    others = (snapshot(lenet_300_100(9)), ticket.masks), (start, shuffled(ticket.masks, 0))
    accuracy = ticket.result[0].accuracy[-1]
    for weights, masks in others:
        assert accuracy > train_masked(lenet_300_100(0), masks, weights, digits, plan)[0].accuracy[-1] + 3
