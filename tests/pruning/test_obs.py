"""Optimal Brain Surgeon: the inverse against numpy, deletions against a solved constrained problem, zeros that stay."""

import copy
import itertools

import numpy as np
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
    xor,
)
from effnlp_lessons.pruning.masks import full_masks
from effnlp_lessons.pruning.obd import damage_, second_derivatives
from effnlp_lessons.pruning.obs import (
    deletion,
    for_cross_entropy,
    inverse_hessian,
    inverted_hessian,
    operate,
    output_gradients,
    saliencies,
    surgery_,
    without,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def a_problem(size=8, rows=13, seed=0):
    """Weights and H of full rank."""
    x = normal(rows, size, seed=seed)
    return normal(size, seed=seed + 100), x.T @ x / rows + 1e-4 * torch.eye(size, dtype=torch.float64)


def solve_constrained(weights, hessian, gone):
    """min ½ δᵀ H δ with w + δ = 0 in `gone`, by its linear system with multipliers: δ and the minimum."""
    size, count = len(weights), len(gone)
    system = np.zeros((size + count, size + count))
    system[:size, :size] = hessian.numpy()
    for row, q in enumerate(gone):
        system[size + row, q] = system[q, size + row] = 1.0
    right = np.concatenate([np.zeros(size), -weights.numpy()[list(gone)]])
    delta = np.linalg.solve(system, right)[:size]
    return torch.from_numpy(delta), 0.5 * delta @ hessian.numpy() @ delta


# ------------------------------------------------------------------------------------- the inverse Hessian


def test_gradients_are_those_of_every_output():
    network, inputs = sigmoid_network((3, 4, 2), seed=0), normal(5, 3)
    found = output_gradients(network, inputs, every_mask(network))
    assert found.shape == (5, 2, 26)
    for pattern, output in itertools.product(range(5), range(2)):
        gradients = torch.autograd.grad(network(inputs)[pattern, output], list(network.parameters()))
        expected = torch.cat([gradient.flatten() for gradient in gradients])
        torch.testing.assert_close(found[pattern, output], expected, rtol=1e-12, atol=1e-15)


def test_gradients_of_what_is_there():
    network, inputs = sigmoid_network((3, 4, 2), seed=0), normal(5, 3)
    whole, masks = output_gradients(network, inputs, every_mask(network)), full_masks(network)
    masks["0.weight"][1, 2] = masks["2.weight"][0, 3] = False
    kept = [i for i in range(12) if i != 5] + [i for i in range(16, 24) if i != 19]  # biases at 12 .. 15 and 24, 25
    assert torch.equal(output_gradients(network, inputs, masks), whole[..., kept])


@pytest.mark.parametrize(("patterns", "outputs", "size"), [(4, 1, 9), (40, 3, 30), (1, 1, 5), (7, 2, 1)])
@pytest.mark.parametrize("function", [inverse_hessian, inverted_hessian])
def test_the_recursion_is_the_inverse(function, patterns, outputs, size):
    gradients = normal(patterns, outputs, size)
    rows = gradients.flatten(0, 1).numpy()
    expected = np.linalg.inv(1e-4 * np.eye(size) + rows.T @ rows / patterns)  # P, not the number of rows
    found = function(gradients, alpha=1e-4)
    assert np.abs(found.numpy() - expected).max() < 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("alpha", [1e-8, 1e-2, 3.0])
def test_the_recursion_at_other_alphas(alpha):
    gradients = normal(6, 2, 9)
    rows = gradients.flatten(0, 1)
    product = inverse_hessian(gradients, alpha) @ (rows.T @ rows / 6 + alpha * torch.eye(9, dtype=torch.float64))
    # rounding grows as 1/alpha: measured 4e-8 at 1e-8, where torch's own inverse leaves as much
    torch.testing.assert_close(product, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-6)


def test_xor_has_too_few_patterns_for_its_weights():
    network = sigmoid_network((2, 2, 1), seed=0)
    gradients = output_gradients(network, xor().inputs, every_mask(network))
    values = torch.linalg.eigvalsh(inverse_hessian(gradients, 1e-4))
    assert (values > 1e4 * (1 - 1e-6)).sum() == 5  # 1/alpha where none of the 4 gradients reaches


def test_with_weight_decay_alpha_is_part_of_the_second_derivative():
    network, inputs, alpha = sigmoid_network((3, 2, 2), seed=0), normal(9, 3), 1e-2
    targets = network(inputs).detach()  # no residuals, so nothing is left out
    shapes = {name: p.shape for name, p in network.named_parameters()}

    def objective(vector):
        pieces = vector.split([shape.numel() for shape in shapes.values()])
        weights = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        error = ((targets - functional_call(network, weights, (inputs,))) ** 2).sum() / len(inputs)
        return (error + alpha * vector.square().sum()) / 2

    expected = torch.linalg.inv(hessian(objective, weights_of(network)))
    found = inverse_hessian(output_gradients(network, inputs, every_mask(network)), alpha)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_cross_entropy_weights_the_gradients():
    network, inputs = sigmoid_network((4, 3), seed=0), normal(11, 4)
    targets = (normal(11, 3, seed=1) > 0).double()
    outputs = network(inputs).detach()

    def loss(vector):
        o = torch.sigmoid(inputs @ vector[:12].view(3, 4).T + vector[12:])
        return nn.functional.binary_cross_entropy(o, targets, reduction="sum") / len(inputs)

    rows = for_cross_entropy(output_gradients(network, inputs, every_mask(network)), outputs).flatten(0, 1)
    # one layer: nothing is left out, whatever the targets
    torch.testing.assert_close(rows.T @ rows / 11, hessian(loss, weights_of(network)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("function", [inverse_hessian, inverted_hessian])
def test_bad_gradients(function):
    for alpha in (0.0, -1e-4, float("nan")):
        with pytest.raises(ValueError, match="alpha must be above 0"):
            function(normal(3, 1, 4), alpha)
    for shape in ((3, 4), (0, 1, 4)):
        with pytest.raises(ValueError, match="gradients must be"):
            function(normal(*shape))


# ----------------------------------------------------------------------------------------------- surgery


@pytest.mark.parametrize("seed", range(3))
def test_a_deletion_solves_the_constrained_problem(seed):
    weights, h = a_problem(seed=seed)
    inverse = torch.linalg.inv(h)
    for q in range(len(weights)):
        delta, rise = solve_constrained(weights, h, [q])
        new = deletion(weights, inverse, q)
        torch.testing.assert_close(new, weights + delta, rtol=1e-10, atol=1e-12)
        assert new[q] == 0
        assert saliencies(weights, inverse)[q].item() == pytest.approx(rise, rel=1e-10)


def test_taking_a_weight_out_of_the_inverse():
    _, h = a_problem()
    found, rest = without(torch.linalg.inv(h), 3), [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(found[rest][:, rest], torch.linalg.inv(h[rest][:, rest]), rtol=1e-10, atol=1e-12)
    assert (found[3] == 0).all() and (found[:, 3] == 0).all()


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8])
def test_several_deletions_solve_the_problem_with_all_constraints(count):
    weights, h = a_problem(seed=count)
    new, kept, predicted = operate(weights, torch.linalg.inv(h), count)
    gone = (~kept).nonzero().flatten().tolist()
    assert len(gone) == count and (new[~kept] == 0).all()
    delta, rise = solve_constrained(weights, h, gone)
    torch.testing.assert_close(new, weights + delta, rtol=1e-9, atol=1e-10)
    assert predicted == pytest.approx(rise, rel=1e-9, abs=1e-15)


def test_the_first_to_go_is_the_cheapest_of_all():
    for seed in range(10):
        weights, h = a_problem(seed=seed)
        _, kept, predicted = operate(weights, torch.linalg.inv(h), 1)
        rises = [solve_constrained(weights, h, [q])[1] for q in range(len(weights))]
        assert not kept[int(np.argmin(rises))] and predicted == pytest.approx(min(rises), rel=1e-9)


def test_adjusting_never_costs_more_than_deleting():
    weights, h = a_problem()
    assert (saliencies(weights, torch.linalg.inv(h)) <= h.diagonal() * weights**2 / 2 * (1 + 1e-12)).all()


def test_with_a_diagonal_hessian_it_is_brain_damage():
    weights, diagonal = normal(7), normal(7, seed=1).square() + 0.1
    inverse = torch.diag(1 / diagonal)
    torch.testing.assert_close(saliencies(weights, inverse), diagonal * weights**2 / 2)
    new, expected = deletion(weights, inverse, 2), weights.clone()
    expected[2] = 0
    assert torch.equal(new, expected)


@pytest.mark.parametrize("count", [-1, 9])
def test_more_than_there_are(count):
    weights, h = a_problem()
    with pytest.raises(ValueError, match=r"count must be in 0 \.\. 8"):
        operate(weights, torch.linalg.inv(h), count)


def trained(problem=1, hidden=3, decay=1e-4):
    network, patterns = sigmoid_network((17, hidden, 1), seed=0), monk_training(problem, 0)
    train_to_minimum_(network, patterns, weight_decay=decay)
    return network, patterns


def test_surgery_on_a_network():
    network, patterns = trained()
    before, h_inverse = (
        weights_of(network),
        inverse_hessian(output_gradients(network, patterns.inputs, every_mask(network)), 1e-4),
    )
    masks, predicted = surgery_(network, patterns.inputs, every_mask(network), count=5)
    expected, kept, rise = operate(before, h_inverse, 5)
    assert torch.equal(torch.cat([mask.flatten() for mask in masks.values()]), kept)
    torch.testing.assert_close(weights_of(network), expected, rtol=1e-12, atol=0)
    assert predicted == rise and list(masks) == [name for name, _ in network.named_parameters()]


def test_what_is_deleted_stays_0_and_the_plain_update_would_move_it():
    network, patterns = trained()
    masks, _ = surgery_(network, patterns.inputs, every_mask(network), count=10)
    first = {name: ~mask for name, mask in masks.items()}
    weights = weights_of(network)
    whole = inverse_hessian(output_gradients(network, patterns.inputs, every_mask(network)), 1e-4)
    gone = torch.cat([mask.flatten() for mask in first.values()])
    q = int(saliencies(weights, whole).masked_fill(gone, torch.inf).argmin())
    assert (deletion(weights, whole, q)[gone] != 0).any()  # all of H: zeros move

    masks, _ = surgery_(network, patterns.inputs, masks, count=10)
    parameters = dict(network.named_parameters())
    assert sum(int((~mask).sum()) for mask in masks.values()) == 20
    for name, mask in masks.items():
        assert (parameters[name][~mask] == 0).all() and (first[name] & mask).sum() == 0
        assert (parameters[name][mask] != 0).all()


def test_only_what_the_masks_name_takes_part():
    network, patterns = trained()
    biases = network[0].bias.detach().clone()
    masks, _ = surgery_(network, patterns.inputs, full_masks(network), count=54)
    assert not any(mask.any() for mask in masks.values())
    assert torch.equal(network[0].bias, biases) and (network[0].weight == 0).all()
    again, predicted = surgery_(network, patterns.inputs, masks, count=0)  # nothing is left
    assert predicted == 0 and all(torch.equal(again[name], masks[name]) for name in masks)


def test_the_prediction_is_the_rise_of_the_error():
    network, inputs = sigmoid_network((4, 2, 2), seed=0, spread=2.0), normal(40, 4)
    network[0].weight.data[1, 2] = 1e-3
    patterns = Patterns(inputs, network(inputs).detach())  # the error is exactly 0
    h = second_derivatives(network, patterns.inputs, patterns.targets)["0.weight"][1, 2].item()
    masks, predicted = surgery_(network, patterns.inputs, every_mask(network), alpha=1e-10)
    assert not masks["0.weight"][1, 2]
    # E of the paper is half of ours; third order in a weight of 1e-3 is left out
    assert squared_error(network, patterns).item() == pytest.approx(2 * predicted, rel=1e-2)
    assert 2 * predicted < h * 1e-6 / 2  # cheaper than deleting it alone


def test_on_a_trained_network_the_adjustment_saves_most_of_the_damage():
    network, patterns = trained()
    rises = {}
    for name in ("surgery", "choice", "damage"):
        copied = copy.deepcopy(network)
        if name == "damage":
            damage_(copied, patterns.inputs, patterns.targets, every_mask(copied), 20)
        else:
            masks, _ = surgery_(copied, patterns.inputs, every_mask(copied), count=20)
        if name == "choice":
            copied = copy.deepcopy(network)
            for key, p in copied.named_parameters():
                p.data[~masks[key]] = 0.0
        rises[name] = (squared_error(copied, patterns) - squared_error(network, patterns)).item()
    assert 0 < rises["surgery"] < 0.5 * min(rises["choice"], rises["damage"]), rises
