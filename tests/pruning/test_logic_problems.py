"""XOR and the MONK's problems against the rules written out case by case, and the networks that learn them."""

import itertools

import pytest
import torch

from effnlp_lessons.pruning.logic_problems import (
    ATTRIBUTES,
    attributes_left,
    every_mask,
    monk_all,
    monk_cases,
    monk_rule,
    monk_training,
    one_hot,
    share_right,
    sigmoid_network,
    squared_error,
    train_to_minimum_,
    train_until_,
    xor,
)
from effnlp_lessons.pruning.masks import full_masks


def by_hand(problem, case):
    a1, a2, a3, a4, a5, a6 = case
    if problem == 1:
        return a1 == a2 or a5 == 1
    if problem == 2:
        return [a1, a2, a3, a4, a5, a6].count(1) == 2
    return (a5 == 3 and a4 == 1) or (a5 != 4 and a2 != 3)


# ---------------------------------------------------------------------------------------- the problems


def test_there_are_432_different_cases_with_17_inputs():
    cases = monk_cases()
    assert cases.shape == (432, 6) and len(cases.unique(dim=0)) == 432
    assert cases.min(0).values.tolist() == [1] * 6 and cases.max(0).values.tolist() == list(ATTRIBUTES)
    inputs = one_hot(cases)
    assert inputs.shape == (432, 17) and inputs.dtype == torch.float64
    for part, values in zip(inputs.split(ATTRIBUTES, dim=1), cases.unbind(1), strict=True):
        assert (part.sum(1) == 1).all() and torch.equal(part.argmax(1) + 1, values)


@pytest.mark.parametrize(("problem", "positives"), [(1, 216), (2, 142), (3, 228)])
def test_the_rules(problem, positives):
    expected = [by_hand(problem, case) for case in itertools.product(*(range(1, n + 1) for n in ATTRIBUTES))]
    assert monk_rule(problem, monk_cases()).tolist() == expected
    assert monk_all(problem).targets.sum() == sum(expected) == positives


@pytest.mark.parametrize(("problem", "count", "wrong"), [(1, 124, 0), (2, 169, 0), (3, 122, 6)])
def test_a_training_set(problem, count, wrong):
    train, everything = monk_training(problem, seed=4), monk_all(problem)
    assert train.inputs.shape == (count, 17) and train.targets.shape == (count, 1)
    assert len(train.inputs.unique(dim=0)) == count  # no case twice
    answer = {tuple(row.tolist()): target.item() for row, target in zip(*vars(everything).values(), strict=True)}
    turned = [answer[tuple(row.tolist())] != target for row, target in zip(train.inputs, train.targets, strict=True)]
    assert sum(turned) == wrong  # round(0.05 * 122)
    again, other = monk_training(problem, seed=4), monk_training(problem, seed=5)
    assert torch.equal(train.inputs, again.inputs) and torch.equal(train.targets, again.targets)
    assert not torch.equal(train.inputs, other.inputs)
    assert everything.targets.sum() == monk_rule(problem, monk_cases()).sum()  # noise has not come into the rule


def test_xor():
    patterns = xor()
    assert [int(a) ^ int(b) for a, b in patterns.inputs.tolist()] == patterns.targets.flatten().tolist()
    assert len(patterns) == 4 and xor(0.1, 0.9).targets.flatten().tolist() == pytest.approx([0.1, 0.9, 0.9, 0.1])


@pytest.mark.parametrize("problem", [0, 4])
def test_another_problem(problem):
    for function in (lambda: monk_rule(problem, monk_cases()), lambda: monk_training(problem, 0)):
        with pytest.raises(ValueError, match="problem must be 1, 2 or 3"):
            function()


def test_attributes_that_reach_the_output():
    masks = full_masks(sigmoid_network((17, 3, 1), seed=0))
    assert attributes_left(masks) == (1, 2, 3, 4, 5, 6)
    masks["0.weight"][:] = False
    assert attributes_left(masks) == ()
    masks["0.weight"][1, [2, 11, 16]] = True  # third value of a1, first of a5, last of a6
    masks["0.weight"][2, 8] = True  # first of a4, in a unit ...
    masks["2.weight"][0, 2] = False  # ... that the output does not read
    assert attributes_left(masks) == (1, 5, 6)


# ----------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(("sizes", "weights", "all_of_them"), [((2, 2, 1), 6, 9), ((17, 3, 1), 54, 58), ((4, 1), 4, 5)])
def test_what_counts_as_a_weight(sizes, weights, all_of_them):
    network = sigmoid_network(sizes, seed=0)
    assert sum(mask.sum() for mask in every_mask(network).values()) == all_of_them
    assert sum(mask.sum() for mask in every_mask(network, biases=False).values()) == weights
    assert every_mask(network, biases=False).keys() == full_masks(network).keys()


def test_a_network_depends_on_its_seed_alone():
    state = torch.get_rng_state()
    first, again, other = (sigmoid_network((3, 5, 2), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0].weight, again[0].weight) and torch.equal(first[2].bias, again[2].bias)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert first(torch.zeros(7, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("sizes", [(3,), (3, 0, 1)])
def test_no_network(sizes):
    with pytest.raises(ValueError, match="sizes must be"):
        sigmoid_network(sizes, seed=0)


def test_errors_are_summed_over_outputs_and_averaged_over_patterns():
    network = sigmoid_network((2, 2, 3), seed=3)
    patterns = xor()
    patterns.targets.copy_(torch.rand(4, 1, generator=torch.Generator().manual_seed(0)))
    wide = type(patterns)(patterns.inputs, patterns.targets.expand(4, 3))
    rows = [((d - x) ** 2).sum().item() for d, x in zip(wide.targets, network(wide.inputs), strict=True)]
    assert squared_error(network, wide).item() == pytest.approx(sum(rows) / 4, rel=1e-12)


@pytest.mark.parametrize(("bias", "right"), [(9.0, 50.0), (-9.0, 50.0)])
def test_share_right(bias, right):
    network = sigmoid_network((2, 1), seed=0)
    network[0].weight.data.zero_(), network[0].bias.data.fill_(bias)
    assert share_right(network, xor()) == right


def test_training_ends_at_a_minimum_of_what_it_minimizes():
    network, patterns, decay = sigmoid_network((2, 2, 1), seed=0), xor(), 1e-5
    error = train_to_minimum_(network, patterns, weight_decay=decay)
    assert error == squared_error(network, patterns).item() < 5e-3
    gradients = torch.autograd.grad(squared_error(network, patterns) / 2, list(network.parameters()))
    for gradient, parameter in zip(gradients, network.parameters(), strict=True):
        # measured 4e-9 at most; the decay alone is 1e-4
        torch.testing.assert_close(gradient, -decay * parameter.detach(), rtol=0, atol=1e-7)


def test_training_leaves_what_was_pruned():
    network, masks = sigmoid_network((17, 3, 1), seed=0), every_mask(sigmoid_network((17, 3, 1), seed=0))
    masks["0.weight"][1, :] = False
    masks["2.bias"][:] = False
    before = network[0].weight.detach().clone()
    train_to_minimum_(network, monk_training(1, 0), masks, iterations=30)
    assert (network[0].weight[1] == 0).all() and network[2].bias == 0
    assert (network[0].weight[0] != before[0]).any()


def test_descent_stops_at_the_error_that_was_asked_for():
    network = sigmoid_network((2, 2, 1), seed=2)
    assert 0.04 < train_until_(network, xor(), 0.05) < 0.05
    before = network[0].weight.detach().clone()
    train_until_(network, xor(), 0.05)
    assert torch.equal(network[0].weight, before)  # there already


def test_bad_training():
    network = sigmoid_network((2, 1), seed=0)
    with pytest.raises(ValueError, match="weight_decay must be >= 0"):
        train_to_minimum_(network, xor(), weight_decay=-1.0)
    with pytest.raises(ValueError, match="iterations >= 1"):
        train_to_minimum_(network, xor(), iterations=0)
    with pytest.raises(ValueError, match="must be above 0"):
        train_until_(network, xor(), 0.0)
