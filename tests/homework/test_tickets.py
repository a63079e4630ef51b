"""The exercises of notebook 06: references against torch and by hand, wrong answers by name.

The wrong answers are written here anew, as a student would write them; none uses a `Mistake` of the exercise.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from effnlp_lessons.homework import HomeworkError, check
from effnlp_lessons.homework.second_order.magnitude import keep_top
from effnlp_lessons.homework.tickets.controls import controls, glorot
from effnlp_lessons.homework.tickets.masked import masked_training
from effnlp_lessons.homework.tickets.rewind import Adam, Net, rewind
from effnlp_lessons.homework.tickets.rounds import one_round


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------- references


def test_one_round_gives_the_papers_ladder_of_lenet():
    """266,200 weights: 51.3, 21.1, 13.5, 3.6, 1.9, 1.2 per cent are labels of the paper's figures."""
    shapes = {"first": (300, 784), "second": (100, 300), "output": (10, 100)}
    trained = {f"{name}.weight": normal(*shape, seed=len(name)).float() for name, shape in shapes.items()}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in trained.items()}
    trained |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    shares = []
    for _ in range(20):
        masks = one_round(trained, masks, 0.2, "output.weight")
        shares.append(100 * sum(int(mask.sum()) for mask in masks.values()) / 266_200)
    wanted = {1: 80.04, 3: 51.28, 7: 21.07, 9: 13.52, 15: 3.58, 18: 1.85, 20: 1.19}
    assert {number: round(shares[number - 1], 2) for number in wanted} == wanted


def test_one_round_is_torchs_pruning_layer_by_layer():
    net = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5))
    for number, layer in enumerate(net):
        layer.weight.data = normal(*layer.weight.shape, seed=number).float()
    masks = {f"{n}.weight": torch.ones_like(layer.weight, dtype=torch.bool) for n, layer in enumerate(net)}
    trained = {name: values.detach().clone() for name, values in net.state_dict().items()}
    for _ in range(3):
        masks = one_round(trained, masks, 0.3, "1.weight")
        for layer, rate in zip(net, (0.3, 0.15), strict=True):
            prune.l1_unstructured(layer, "weight", rate)
    for number, layer in enumerate(net):
        assert torch.equal(masks[f"{number}.weight"], layer.weight_mask.bool())


def a_trained_net(seed=0, steps=4):
    model = Net(3, 4, 2)
    for number, parameter in enumerate(model.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed + number)
    theta_0 = {name: values.clone() for name, values in model.state_dict().items()}
    optimizer = Adam(model.parameters(), lr=0.1)
    x, y = normal(6, 3, seed=seed + 20), normal(6, 2, seed=seed + 21)
    step(model, optimizer, x, y, steps)
    masks = {name: normal(*values.shape, seed=seed + 30) > 0 for name, values in theta_0.items() if values.ndim == 2}
    return model, optimizer, theta_0, masks, x, y


def step(model, optimizer, x, y, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


def test_a_rewound_net_trains_bit_for_bit_like_one_that_was_never_trained():
    model, optimizer, theta_0, masks, x, y = a_trained_net()
    fresh = copy.deepcopy(model)
    fresh.load_state_dict({name: values * masks.get(name, 1) for name, values in theta_0.items()})
    kept = {name: values.clone() for name, values in theta_0.items()}
    optimizer = rewind(model, optimizer, theta_0, masks)
    for (name, ours), new in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, new), name
    step(model, optimizer, x, y, 3)
    step(fresh, torch.optim.Adam(fresh.parameters(), lr=0.1), x, y, 3)
    assert all(torch.equal(ours, new) for ours, new in zip(model.parameters(), fresh.parameters(), strict=True))
    assert all(torch.equal(theta_0[name], values) for name, values in kept.items())


def test_after_one_masking_every_pruned_weight_regrows_with_adam_and_none_with_the_reference():
    model, optimizer, _, masks, x, y = a_trained_net()
    other = copy.deepcopy((model, optimizer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(masks.get(name, 1))
    step(model, optimizer, x, y)
    parameters = dict(model.named_parameters())
    assert all((parameters[name][~mask] != 0).all() for name, mask in masks.items())
    masked_training(*other, masks, [(x, y)] * 3)
    parameters = dict(other[0].named_parameters())
    assert all((parameters[name][~mask] == 0).all() and (~mask).any() for name, mask in masks.items())


def test_masked_training_is_torchs_reparametrization_for_the_kept_weights():
    """torch.nn.utils.prune trains weight_orig * mask; without an old momentum the kept weights agree."""
    model, _, _, masks, x, y = a_trained_net(steps=0)
    theirs = copy.deepcopy(model)
    losses = masked_training(model, Adam(model.parameters(), lr=0.1), masks, [(x, y)] * 5)
    for name, mask in masks.items():
        prune.custom_from_mask(theirs.get_submodule(name.removesuffix(".weight")), "weight", mask)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.1)
    for loss in losses:
        assert F.mse_loss(theirs(x), y).item() == pytest.approx(loss, rel=1e-12)
        step(theirs, optimizer, x, y)
    theirs(x)  # makes weight = weight_orig * mask anew
    for name in ("0", "2"):
        weight, bias = theirs.get_submodule(name).weight, theirs.get_submodule(name).bias
        torch.testing.assert_close(model.get_submodule(name).weight, weight)
        torch.testing.assert_close(model.get_submodule(name).bias, bias)


def test_controls_keep_what_they_promise():
    generator = torch.Generator().manual_seed(3)
    theta_0 = {"a": glorot((20, 30), generator), "b": glorot((10, 20), generator)}
    masks = {"a": torch.rand(20, 30, generator=generator) > 0.3, "b": torch.rand(10, 20, generator=generator) > 0.8}
    both = controls(theta_0, masks, generator)
    for name, mask in masks.items():
        weights, shuffled = both["shuffled"][0][name], both["shuffled"][1][name]
        assert shuffled.sum() == mask.sum() and not torch.equal(shuffled, mask)
        assert torch.equal(weights, theta_0[name] * shuffled)
        weights, same = both["redrawn"][0][name], both["redrawn"][1][name]
        assert torch.equal(same, mask) and torch.equal(weights != 0, mask)
        assert not torch.isin(weights[mask], theta_0[name]).any()


# ----------------------------------------------------------------------------- wrong answers


def rounds(rate_of=lambda rate, name, output: rate / 2 if name == output else rate, choose=None, key=abs):
    """Counted in plain Python; `choose(values, mask, rate)` gives the places to remove."""

    def lowest(values, mask, rate):
        there = [place for place in range(len(mask)) if mask[place]]
        there.sort(key=lambda place: (key(values[place]), place))
        return there[: round(rate * len(there))]

    def answer(trained, masks, rate, output):
        new = {}
        for name, mask in masks.items():
            flat = mask.flatten().clone()
            places = (choose or lowest)(trained[name].flatten().tolist(), flat.tolist(), rate_of(rate, name, output))
            flat[places] = False
            new[name] = flat.view_as(mask)
        return new

    return answer


def share_of_all(values, mask, rate):
    there = sorted((place for place in range(len(mask)) if mask[place]), key=lambda place: abs(values[place]))
    return there[: round(rate * len(mask))]


def zeros_too(values, mask, rate):
    return sorted(range(len(mask)), key=lambda place: (abs(values[place]), place))[: round(rate * len(mask))]


def zeros_too_right_number(values, mask, rate):
    return sorted(range(len(mask)), key=lambda place: (abs(values[place]), place))[: round(rate * sum(mask))]


def full_mask_again(trained, masks, rate, output):
    full = {name: torch.ones_like(mask) for name, mask in masks.items()}
    return rounds()(trained, full, rate, output)


def global_threshold(trained, masks, rate, output):
    flat = torch.cat([trained[name].abs()[mask] for name, mask in masks.items()])
    count = round(rate * len(flat))
    threshold = flat.sort().values[count - 1] if count else -1.0
    return {name: mask & (trained[name].abs() > threshold) for name, mask in masks.items()}


def global_but_the_output(trained, masks, rate, output):
    hidden = {name: mask for name, mask in masks.items() if name != output}
    last = rounds()(trained, {output: masks[output]}, rate, output)
    new = global_threshold(trained, hidden, rate, output) | last
    return {name: new[name] for name in masks}


def with_biases(trained, masks, rate, output):
    all_ = {name: masks.get(name, torch.ones(values.shape, dtype=torch.bool)) for name, values in trained.items()}
    return rounds()(trained, all_, rate, output)


def back_to(source, mask=lambda values, mask: values * mask, bias=None, forget=True):
    """`source(theta_0, state)` gives the values of a parameter; written with load_state_dict."""

    def answer(model, optimizer, theta_0, masks):
        state, new = model.state_dict(), {}
        for name in state:
            values = source(theta_0[name], state[name])
            if name in masks:
                new[name] = mask(values, masks[name])
            else:
                new[name] = values if bias is None else bias(theta_0[name], state[name])
        model.load_state_dict(new)
        if forget:
            optimizer = torch.optim.Adam(model.parameters(), lr=optimizer.param_groups[0]["lr"])
        return optimizer

    return answer


def first_values(theta_0, state):
    return theta_0


def trained_values(theta_0, state):
    return state


def drawn_again(model, optimizer, theta_0, masks):
    model.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)
    return back_to(trained_values)(model, optimizer, theta_0, masks)


def pruned_keep_trained(model, optimizer, theta_0, masks):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter[masks[name]] = theta_0[name][masks[name]]
            else:
                parameter.copy_(theta_0[name])
    optimizer.state.clear()
    return optimizer


def shared_biases(model, optimizer, theta_0, masks):
    for name, parameter in model.named_parameters():
        parameter.data = theta_0[name] * masks[name] if name in masks else theta_0[name]
    optimizer.state.clear()
    return optimizer


def lost_rate(model, optimizer, theta_0, masks):
    back_to(first_values)(model, optimizer, theta_0, masks)
    return torch.optim.Adam(model.parameters())


def optimizer_of_old_parameters(model, optimizer, theta_0, masks):
    for number in (0, 2):
        for kind in ("weight", "bias"):
            name = f"{number}.{kind}"
            values = theta_0[name] * masks[name] if name in masks else theta_0[name].clone()
            setattr(model[number], kind, nn.Parameter(values))
    optimizer.state.clear()
    return optimizer


def zero_out(model, masks):
    for name, parameter in model.named_parameters():
        if name in masks:
            parameter.data *= masks[name]


def nothing(model, masks):
    pass


def zero_gradients(model, masks):
    for name, parameter in model.named_parameters():
        if name in masks:
            parameter.grad[~masks[name]] = 0


def freeze_the_kept(model, masks):
    for name, parameter in model.named_parameters():
        if name in masks:
            parameter.grad[masks[name]] = 0


def zero_the_kept(model, masks):
    zero_out(model, {name: ~mask for name, mask in masks.items()})


def zero_the_first(model, masks):
    zero_out(model, {"0.weight": masks["0.weight"]})


def loop(start=zero_out, forward=nothing, gradients=nothing, after=zero_out, end=nothing, clear=True, late=False):
    def answer(model, optimizer, masks, batches):
        losses = []
        start(model, masks)
        for x, y in batches:
            forward(model, masks)
            loss = ((model(x) - y) ** 2).mean()
            if clear:
                model.zero_grad()
            loss.backward()
            gradients(model, masks)
            optimizer.step()
            after(model, masks)
            losses.append(((model(x) - y) ** 2).mean().item() if late else loss.item())
        end(model, masks)
        return losses

    return answer


def product_in_forward(model, optimizer, masks, batches):
    losses = []
    for x, y in batches:
        first, _, last = model
        hidden = torch.tanh(F.linear(x, first.weight * masks["0.weight"], first.bias))
        loss = F.mse_loss(F.linear(hidden, last.weight * masks["2.weight"], last.bias), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def zeros_for_the_mask(model, optimizer, masks, batches):
    zero_out(model, masks)
    found = {name: parameter.detach() != 0 for name, parameter in model.named_parameters() if parameter.ndim == 2}
    return loop()(model, optimizer, found, batches)


def with_a_new_optimizer(model, optimizer, masks, batches):
    optimizer = torch.optim.Adam(model.parameters(), lr=optimizer.param_groups[0]["lr"])
    return loop()(model, optimizer, masks, batches)


def permuted(mask, generator):
    order = torch.rand(mask.numel(), generator=generator).argsort()
    return mask.reshape(-1)[order].reshape(mask.shape)


def two_nets(shuffle=None, fresh=None, mask_of_redrawn=lambda old, new: old, mask_weights=True, weights=None):
    """`shuffle(masks, generator)` for all masks, `fresh(theta_0, generator)` for all weights."""

    def answer(theta_0, masks, generator):
        new = shuffle(masks, generator) if shuffle else {n: permuted(mask, generator) for n, mask in masks.items()}
        drawn = fresh(theta_0, generator) if fresh else {n: glorot(w.shape, generator) for n, w in theta_0.items()}
        same = mask_of_redrawn(masks, new)
        first = {name: (weights or (lambda w, *_: w))(theta_0[name], name) * new[name] for name in masks}
        second = {name: drawn[name] * same[name] if mask_weights else drawn[name] for name in masks}
        return {"shuffled": (first, new), "redrawn": (second, same)}

    return answer


def over_the_net(masks, generator):
    flat = permuted(torch.cat([mask.flatten() for mask in masks.values()]), generator)
    new, start = {}, 0
    for name, mask in masks.items():
        new[name] = flat[start : start + mask.numel()].view_as(mask)
        start += mask.numel()
    return new


def old_weights_in_another_order(theta_0, generator):
    return {name: permuted(values, generator) for name, values in theta_0.items()}


def rows_only(masks, generator):
    return {name: mask[torch.rand(len(mask), generator=generator).argsort()] for name, mask in masks.items()}


def each_row(masks, generator):
    return {name: torch.stack([permuted(row, generator) for row in mask]) for name, mask in masks.items()}


def coins(masks, generator):
    return {
        name: torch.bernoulli(torch.full(mask.shape, mask.float().mean()), generator=generator).bool()
        for name, mask in masks.items()
    }


def the_same_for_all(masks, generator):
    state = generator.get_state()
    new = {}
    for name, mask in masks.items():
        generator.set_state(state)
        new[name] = permuted(mask, generator)
    return new


def moved_together(theta_0, masks, generator):
    first, new = {}, {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator)
        new[name] = mask.flatten()[order].view_as(mask)
        first[name] = (theta_0[name] * mask).flatten()[order].view_as(mask)
    return {"shuffled": (first, new), "redrawn": two_nets()(theta_0, masks, generator)["redrawn"]}


def global_randomness(theta_0, masks, generator):
    return two_nets()(theta_0, masks, None)


ROUND, REWIND, TRAIN, CONTROLS = (f"tickets.{name}" for name in ("one_round", "rewind", "masked_training", "controls"))

WRONG_ANSWERS = [
    (ROUND, rounds(lambda rate, name, output: rate), "The output layer at the full rate"),
    (
        ROUND,
        rounds(lambda rate, name, output: 0 if name == output else rate),
        "The output layer is not pruned",
    ),
    (
        ROUND,
        rounds(lambda rate, name, output: rate if name == output else rate / 2),
        "Half the rate for the hidden layers",
    ),
    (
        ROUND,
        rounds(lambda rate, name, output: rate * (2 if name == output else 1)),
        "The output layer at twice the rate",
    ),
    (ROUND, rounds(choose=share_of_all), "The rate is taken of the original weights, not of the remaining ones"),
    (ROUND, rounds(choose=zeros_too), "Pruned weights are candidates"),
    (ROUND, rounds(choose=zeros_too_right_number), "Pruned weights are candidates, with the right number"),
    (ROUND, full_mask_again, "The round begins with a full mask"),
    (ROUND, global_threshold, "One threshold for all matrices"),
    (ROUND, global_but_the_output, "One threshold for the hidden matrices"),
    (ROUND, with_biases, "Biases are pruned"),
    (ROUND, rounds(key=lambda value: value), "The weights are sorted with their signs"),
    (ROUND, rounds(key=lambda value: -abs(value)), "The largest weights go"),
    (REWIND, back_to(trained_values), "The weights go on from where training ended"),
    (
        REWIND,
        back_to(trained_values, forget=False),
        "The weights and the optimizer go on from where training ended",
    ),
    (REWIND, drawn_again, "New weights are drawn"),
    (REWIND, back_to(first_values, forget=False), "The optimizer remembers the last training"),
    (REWIND, back_to(first_values, mask=lambda values, mask: values), "The mask is not applied"),
    (REWIND, back_to(first_values, mask=lambda values, mask: values * ~mask), "The mask is turned round"),
    (REWIND, pruned_keep_trained, "Pruned weights keep their trained values"),
    (REWIND, back_to(first_values, bias=lambda first, now: now), "Only the masked matrices are rewound"),
    (REWIND, back_to(first_values, bias=lambda first, now: 0 * first), "The biases are set to 0"),
    (REWIND, shared_biases, "theta_0 moves with the model"),
    (REWIND, lost_rate, "The learning rate is lost"),
    (REWIND, optimizer_of_old_parameters, "The optimizer holds the old parameters"),
    (TRAIN, loop(after=nothing), "Masked once, and then Adam goes on"),
    (TRAIN, loop(gradients=zero_gradients, after=nothing), "Only the gradient is masked after that"),
    (TRAIN, loop(start=nothing, forward=zero_out, after=nothing), "The last step is not masked"),
    (TRAIN, loop(forward=zero_out, after=nothing), "The last step is not masked"),
    (TRAIN, loop(start=nothing, after=nothing, end=zero_out), "The mask comes at the end only"),
    (TRAIN, loop(start=nothing), "The first forward pass has all weights"),
    (TRAIN, product_in_forward, "The product is masked, and the weights are not"),
    (TRAIN, loop(start=zero_the_kept, after=zero_the_kept), "The mask is turned round"),
    (TRAIN, loop(gradients=freeze_the_kept), "Kept weights are frozen"),
    (TRAIN, zeros_for_the_mask, "A kept weight of 0 is taken for a pruned one"),
    (TRAIN, loop(start=zero_the_first, after=zero_the_first), "Only the first matrix is masked"),
    (TRAIN, loop(clear=False), "Old gradients are still there"),
    (TRAIN, with_a_new_optimizer, "The optimizer's memory is cleared"),
    (TRAIN, loop(late=True), "The loss after the step is returned"),
    (
        CONTROLS,
        two_nets(over_the_net, old_weights_in_another_order),
        "The mask is shuffled over the whole net, and old weights are used again",
    ),
    (CONTROLS, two_nets(over_the_net), "The mask is shuffled over the whole net"),
    (
        CONTROLS,
        two_nets(fresh=old_weights_in_another_order),
        "The redrawn weights are those of theta_0 in another order",
    ),
    (CONTROLS, two_nets(fresh=lambda theta_0, generator: theta_0), "The redrawn weights are those of theta_0"),
    (
        CONTROLS,
        two_nets(
            fresh=lambda theta_0, generator: {n: torch.randn(w.shape, generator=generator) for n, w in theta_0.items()}
        ),
        "The redrawn weights have another spread",
    ),
    (
        CONTROLS,
        two_nets(mask_of_redrawn=lambda old, new: new),
        "The redrawn weights get the shuffled mask",
    ),
    (CONTROLS, two_nets(mask_weights=False), "The redrawn weights are not masked"),
    (CONTROLS, two_nets(rows_only), "Only whole rows change places"),
    (CONTROLS, two_nets(each_row), "Every row is shuffled for itself"),
    (CONTROLS, two_nets(coins), "A coin decides for each weight"),
    (CONTROLS, two_nets(the_same_for_all), "One permutation for all matrices"),
    (CONTROLS, moved_together, "The weights are shuffled together with their mask"),
    (CONTROLS, global_randomness, "The generator is not used"),
]


# ----------------------------------------------------------------------------- other right answers


def with_hooks(model, optimizer, masks, batches):
    """The library's own way."""
    from effnlp_lessons.pruning.masks import masked

    losses = []
    with masked(model, masks) as keep:
        for x, y in batches:
            losses.append(F.mse_loss(model(x), y).item())
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            keep()
    return losses


def local_masks_of_the_library(trained, masks, rate, output):
    from effnlp_lessons.pruning.masks import local_masks

    scores = {name: trained[name].abs() for name in masks}
    return local_masks(scores, {name: rate / 2 if name == output else rate for name in masks}, masks)


def test_other_right_answers_pass():
    check(ROUND, rounds())
    check(ROUND, local_masks_of_the_library)
    check(REWIND, back_to(first_values))
    check(TRAIN, loop())
    check(TRAIN, loop(gradients=zero_gradients))
    check(TRAIN, with_hooks)
    check(CONTROLS, two_nets())


def test_writing_into_theta_0_is_refused(capsys):
    def writes(model, optimizer, theta_0, masks):
        for name, parameter in model.named_parameters():
            parameter.data = theta_0[name]
            if name in masks:
                parameter.data *= masks[name]
        optimizer.state.clear()
        return optimizer

    with pytest.raises(HomeworkError):
        check(REWIND, writes, seed=0)
    assert "your function changes its input 'theta_0' in place" in capsys.readouterr().out


def test_a_failed_check_of_the_controls_says_in_words_what_does_not_hold(capsys):
    with pytest.raises(HomeworkError):
        check(CONTROLS, two_nets(over_the_net), seed=0)
    printed = capsys.readouterr().out
    assert "'every matrix keeps its number of weights': True" in printed
    assert "generator = torch.Generator().manual_seed(" in printed


def test_keep_top_is_the_one_of_the_homework_before():
    check("second_order.keep_top", keep_top)
