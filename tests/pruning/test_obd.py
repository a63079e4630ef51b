"""Optimal Brain Damage: the diagonal against autograd's Hessian, shared weights, and what is deleted."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from effnlp_lessons.pruning.logic_problems import (
    Patterns,
    every_mask,
    monk_training,
    sigmoid_network,
    squared_error,
    train_to_minimum_,
)
from effnlp_lessons.pruning.masks import full_masks, share_left
from effnlp_lessons.pruning.obd import (
    ScaledTanh,
    convolution_connections,
    damage_,
    in_rounds,
    saliencies,
    second_derivatives,
    slope_and_bend,
    sum_over_connections,
)
from effnlp_lessons.pruning.obs import output_gradients


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network_of(*parts):
    """Linear layers by their sizes; weights from torch's global generator, which each test begins anew."""
    return nn.Sequential(*(nn.Linear(*p, dtype=torch.float64) if isinstance(p, tuple) else p for p in parts))


def flat(network, values):
    return torch.cat([values[name].flatten() for name, _ in network.named_parameters()])


def exact_hessian(network, inputs, targets):
    """By autograd, for E summed over outputs and averaged over patterns."""
    shapes = {name: p.shape for name, p in network.named_parameters()}

    def error(vector):
        pieces = vector.split([shape.numel() for shape in shapes.values()])
        weights = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return ((targets - functional_call(network, weights, (inputs,))) ** 2).sum() / len(inputs)

    return hessian(error, torch.cat([p.detach().flatten() for p in network.parameters()]))


# ---------------------------------------------------------------------- the diagonal of second derivatives


@pytest.mark.parametrize("activation", [nn.Identity(), nn.Sigmoid(), nn.Tanh(), ScaledTanh(), ScaledTanh(0.7, 1.9)])
def test_slope_and_bend_are_autograds(activation):
    a = normal(23).mul(2).requires_grad_()
    slope = torch.autograd.grad(activation(a).sum(), a, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), a)[0] if slope.requires_grad else torch.zeros_like(a)
    found = slope_and_bend(activation, a.detach())
    torch.testing.assert_close(found[0], slope.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[1], bend, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "parts",
    [
        [(3, 4), nn.Sigmoid(), (4, 2), nn.Sigmoid()],
        [(5, 3), ScaledTanh(), (3, 1), ScaledTanh()],
        [(2, 6), nn.Tanh(), (6, 3)],  # a linear output
        [(3, 2), (2, 4), nn.Sigmoid()],  # a linear hidden layer
        [(4, 3), nn.Tanh()],  # no hidden layer
        [(3, 1), nn.Sigmoid(), (1, 1), nn.Tanh()],
    ],
)
def test_with_one_hidden_layer_the_diagonal_is_exact(parts):
    network = network_of(*parts)
    inputs, targets = normal(7, parts[0][0]), normal(7, network(normal(1, parts[0][0])).shape[1], seed=1)
    found = second_derivatives(network, inputs, targets)
    assert list(found) == [name for name, _ in network.named_parameters()]
    expected = exact_hessian(network, inputs, targets).diagonal()
    torch.testing.assert_close(flat(network, found), expected, rtol=0, atol=1e-12)


def test_a_layer_without_biases():
    network = nn.Sequential(nn.Linear(3, 4, bias=False, dtype=torch.float64), nn.Tanh(), *network_of((4, 2)))
    inputs, targets = normal(5, 3), normal(5, 2, seed=1)
    found = second_derivatives(network, inputs, targets)
    assert set(found) == {"0.weight", "2.weight", "2.bias"}
    expected = exact_hessian(network, inputs, targets).diagonal()
    torch.testing.assert_close(flat(network, found), expected, rtol=0, atol=1e-12)


def test_the_printed_minus_is_wrong():
    network = network_of((3, 4), nn.Sigmoid(), (4, 2), nn.Sigmoid())
    inputs, targets = 2 * normal(9, 3), normal(9, 2, seed=1)
    right = second_derivatives(network, inputs, targets)
    minus = second_derivatives(network, inputs, targets, printed_minus=True)
    expected = exact_hessian(network, inputs, targets).diagonal()
    assert (flat(network, minus) - expected).abs().max() > 1e-2 > (flat(network, right) - expected).abs().max()
    for name in ("2.weight", "2.bias"):  # the output layer's line is right in print
        assert torch.equal(minus[name], right[name])


def test_with_two_hidden_layers_the_first_is_approximate():
    errors, minus_errors = [], []
    for seed in range(10):
        network = sigmoid_network((3, 4, 5, 2), seed, spread=2.0)
        inputs, targets = normal(9, 3, seed=seed), normal(9, 2, seed=seed + 50)
        exact = exact_hessian(network, inputs, targets).diagonal()
        names = [name for name, p in network.named_parameters() for _ in range(p.numel())]
        first = torch.tensor([name.startswith("0.") for name in names])
        found, minus = (
            flat(network, second_derivatives(network, inputs, targets, printed_minus=m)) for m in (False, True)
        )
        torch.testing.assert_close(found[~first], exact[~first], rtol=0, atol=1e-12)
        largest = exact[first].abs().max()
        errors.append(((found - exact)[first].abs().max() / largest).item())
        minus_errors.append(((minus - exact)[first].abs().max() / largest).item())
    # measured 0.04 to 0.49 of the layer's largest entry, and 1.9 to 2.3 with the minus
    assert min(errors) > 0.01 and max(errors) < min(minus_errors)


def test_levenberg_marquardt_is_the_square_of_the_output_gradients():
    network = network_of((3, 4), nn.Sigmoid(), (4, 2), nn.Tanh())
    inputs, targets = normal(6, 3), 3 * normal(6, 2, seed=1)
    full, variant = (second_derivatives(network, inputs, targets, lm) for lm in (False, True))
    gradients = output_gradients(network, inputs, every_mask(network))
    expected = 2 * gradients.square().sum((0, 1)) / len(inputs)
    torch.testing.assert_close(flat(network, variant), expected, rtol=1e-12, atol=1e-15)
    assert (flat(network, variant) >= 0).all() and (flat(network, full) < 0).any()


def test_where_the_error_is_0_the_two_variants_agree():
    network, inputs = sigmoid_network((4, 3, 2), seed=0), normal(8, 4)
    targets = network(inputs).detach()
    full, variant = (flat(network, second_derivatives(network, inputs, targets, lm)) for lm in (False, True))
    torch.testing.assert_close(full, variant, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(3, 3), nn.ReLU()], "activation must be"),
        ([nn.Sigmoid(), (3, 3)], "has no place"),
        ([(3, 3), nn.Sigmoid(), nn.Tanh()], "has no place"),
        ([], "at least one linear layer"),
    ],
)
def test_networks_without_a_recursion(parts, message):
    with pytest.raises(ValueError, match=message):
        second_derivatives(network_of(*parts), normal(2, 3), normal(2, 3))


def test_targets_of_another_shape():
    with pytest.raises(ValueError, match="targets must have the shape"):
        second_derivatives(network_of((3, 2)), normal(4, 3), normal(4, 1))  # would broadcast


# ------------------------------------------------------------------------------------------ shared weights


def convolution(kernel, length):
    """The same map as a dense matrix, (d_out, length)."""
    weight_of = convolution_connections(length, len(kernel))
    return torch.where(weight_of >= 0, kernel[weight_of.clamp_min(0)], 0.0), weight_of


@pytest.mark.parametrize(("length", "width"), [(9, 3), (5, 5), (4, 1), (7, 2)])
def test_connections_are_those_of_a_convolution(length, width):
    kernel, inputs = normal(width), normal(3, length, seed=1)
    dense, weight_of = convolution(kernel, length)
    expected = nn.functional.conv1d(inputs[:, None], kernel[None, None])[:, 0]
    torch.testing.assert_close(inputs @ dense.T, expected)
    assert (weight_of >= 0).sum() == (length - width + 1) * width


def dense_of(kernel, length, *above):
    dense, weight_of = convolution(kernel, length)
    network = nn.Sequential(nn.Linear(length, len(dense), bias=False, dtype=torch.float64), *above)
    network[0].weight.data.copy_(dense)
    return network, weight_of


def test_a_shared_weight_has_the_sum_over_its_connections():
    kernel, inputs = normal(3), normal(11, 8, seed=1)
    targets = normal(11, 6, seed=2)
    network, weight_of = dense_of(kernel, 8, ScaledTanh())
    found = sum_over_connections(second_derivatives(network, inputs, targets)["0.weight"], weight_of)

    def error(kernel):
        outputs = network[1](nn.functional.conv1d(inputs[:, None], kernel[None, None])[:, 0])
        return ((targets - outputs) ** 2).sum() / len(inputs)

    # no two connections of one weight meet above: each output reads each weight once
    torch.testing.assert_close(found, hessian(error, kernel).diagonal(), rtol=0, atol=1e-12)


def test_where_connections_meet_above_the_sum_is_approximate():
    kernel, inputs, targets = normal(3), normal(11, 8, seed=1), normal(11, 2, seed=2)
    above = network_of((6, 2))
    network, weight_of = dense_of(kernel, 8, nn.Tanh(), *above)
    found = sum_over_connections(second_derivatives(network, inputs, targets)["0.weight"], weight_of)

    def error(kernel):
        hidden = torch.tanh(nn.functional.conv1d(inputs[:, None], kernel[None, None])[:, 0])
        return ((targets - above(hidden)) ** 2).sum() / len(inputs)

    assert (found - hessian(error, kernel).diagonal()).abs().max() > 1e-3


def test_a_layer_that_stands_twice_has_the_sum_of_both():
    tied, act = nn.Linear(3, 3, dtype=torch.float64), nn.Tanh()
    network = nn.Sequential(tied, act, tied, act)
    apart = nn.Sequential(copy.deepcopy(tied), nn.Tanh(), copy.deepcopy(tied), nn.Tanh())
    inputs, targets = normal(6, 3), normal(6, 3, seed=1)
    found, separate = (second_derivatives(net, inputs, targets) for net in (network, apart))
    assert list(found) == ["0.weight", "0.bias"]
    for part in ("weight", "bias"):
        torch.testing.assert_close(found[f"0.{part}"], separate[f"0.{part}"] + separate[f"2.{part}"])


def test_one_activation_object_for_all_layers():
    act = nn.Sigmoid()
    network = network_of((3, 4), act, (4, 2), act)
    inputs, targets = normal(6, 3), normal(6, 2, seed=1)
    expected = exact_hessian(network, inputs, targets).diagonal()
    found = flat(network, second_derivatives(network, inputs, targets))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_bad_connections():
    with pytest.raises(ValueError, match=r"width must be in 1 \.\. length = 4"):
        convolution_connections(4, 5)
    for weight_of in (torch.zeros(2, 3, dtype=torch.long), torch.full((3, 3), -1), torch.full((3, 3), -2)):
        with pytest.raises(ValueError, match="weight_of must be"):
            sum_over_connections(normal(3, 3), weight_of)


# ------------------------------------------------------------------------------------------------- pruning


def at_a_minimum(small=1e-3):
    """A network whose error is exactly 0, with one small weight in each layer."""
    network, inputs = sigmoid_network((4, 3, 2), seed=0, spread=2.0), normal(30, 4)
    network[0].weight.data[1, 2], network[2].weight.data[0, 1] = small, -small
    return network, Patterns(inputs, network(inputs).detach())


@pytest.mark.parametrize(("name", "place"), [("0.weight", (1, 2)), ("2.weight", (0, 1))])
def test_the_saliency_is_the_rise_of_the_error(name, place):
    network, patterns = at_a_minimum()
    predicted = saliencies(network, second_derivatives(network, patterns.inputs, patterns.targets))[name][place]
    dict(network.named_parameters())[name].data[place] = 0.0
    # of third order in a weight of 1e-3
    assert squared_error(network, patterns).item() == pytest.approx(predicted.item(), rel=5e-3)


def test_damage_deletes_the_lowest_saliencies_and_moves_nothing_else():
    network, patterns = sigmoid_network((17, 3, 1), seed=0), monk_training(1, 0)
    train_to_minimum_(network, patterns, weight_decay=1e-4)
    before = copy.deepcopy(network)
    scores = flat(network, saliencies(network, second_derivatives(network, *vars(patterns).values(), True)))
    masks, predicted = damage_(network, patterns.inputs, patterns.targets, every_mask(network), 7)
    gone = ~flat(network, masks)
    assert set(gone.nonzero().flatten().tolist()) == set(scores.argsort()[:7].tolist())
    assert predicted == pytest.approx(scores.sort().values[:7].sum().item(), rel=1e-12)
    for name, parameter in network.named_parameters():
        old = dict(before.named_parameters())[name]
        assert torch.equal(parameter, old.masked_fill(~masks[name], 0.0))


def test_only_what_the_masks_name_and_keep_is_deleted():
    network, patterns = sigmoid_network((17, 3, 1), seed=1), monk_training(1, 0)
    masks = full_masks(network)
    masks, _ = damage_(network, patterns.inputs, patterns.targets, masks, 20)
    masks, _ = damage_(network, patterns.inputs, patterns.targets, masks, 34)  # zeros are no candidates again
    assert share_left(masks) == 0.0 and set(masks) == {"0.weight", "2.weight"}
    assert (network[0].bias != 0).all() and (network[2].bias != 0).all()


def test_a_negative_saliency_goes_first():
    network = network_of((3, 4), nn.Sigmoid(), (4, 2), nn.Tanh())
    inputs, targets = normal(6, 3), 3 * normal(6, 2, seed=1)
    _, predicted = damage_(network, inputs, targets, every_mask(network), 1, levenberg_marquardt=False)
    assert predicted < 0


@pytest.mark.parametrize("count", [-1, 59])
def test_more_than_there_are(count):
    network, patterns = sigmoid_network((17, 3, 1), seed=0), monk_training(1, 0)
    with pytest.raises(ValueError, match=r"count must be in 0 \.\. 58"):
        damage_(network, patterns.inputs, patterns.targets, every_mask(network), count)


def test_masks_of_no_linear_layer():
    network, patterns = sigmoid_network((17, 3, 1), seed=0), monk_training(1, 0)
    with pytest.raises(ValueError, match="masks must name parameters of linear layers, got 5.weight"):
        damage_(network, *vars(patterns).values(), {"5.weight": torch.ones(2, dtype=torch.bool)}, 1)


def test_rounds_delete_and_retrain_in_turn():
    network, patterns = sigmoid_network((17, 3, 1), seed=0), monk_training(1, 0)
    before = train_to_minimum_(network, patterns, weight_decay=1e-4)
    bare, left = copy.deepcopy(network), []

    def rounds(model, retrain):
        return in_rounds(
            lambda masks, count: damage_(model, patterns.inputs, patterns.targets, masks, count),
            every_mask(model),
            [10, 10, 10],
            retrain,
        )

    for masks, _ in rounds(network, lambda masks: train_to_minimum_(network, patterns, masks, 1e-4, 60)):
        left.append(sum(int(mask.sum()) for mask in masks.values()))
        assert all((p[~masks[name]] == 0).all() for name, p in network.named_parameters())
    list(rounds(bare, None))
    assert left == [48, 38, 28]
    assert before < squared_error(network, patterns) < squared_error(bare, patterns)
