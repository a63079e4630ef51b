"""Masks: exact counts as torch.nn.utils.prune, ties, and weights that stay away under every optimizer."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from effnlp_lessons.pruning.masks import (
    apply_masks_,
    block_sums,
    full_masks,
    global_masks,
    keep_top,
    local_masks,
    magnitudes,
    masked,
    masked_product,
    n_of_m,
    prunable,
    share_left,
    shares_left,
    spread_blocks,
)
from effnlp_lessons.training import TrainingPlan, train
from effnlp_lessons.transformer import Encoder, TransformerConfig

CONFIG = TransformerConfig(vocab_size=20, max_length=8, d_model=8, layers=2, heads=2, d_ff=12)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_network():
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 3))


# ----------------------------------------------------------------------------------- which weights go


@given(st.integers(1, 9), st.integers(1, 11), st.floats(0, 1), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_a_mask_is_torchs(rows, columns, rate, seed):
    weight = normal(rows, columns, seed=seed)
    layer = nn.Linear(columns, rows)
    layer.weight.data = weight.clone()
    expected = prune.l1_unstructured(layer, "weight", amount=rate).weight_mask.bool()
    found = keep_top(weight.abs(), rate)
    assert torch.equal(found, expected)
    assert (~found).sum() == round(rate * rows * columns)


@pytest.mark.parametrize("rates", [(0.2, 0.2, 0.2), (0.5, 0.3), (0.01, 0.99)])
def test_repeated_global_pruning_is_torchs(rates):
    model = a_network()
    theirs = copy.deepcopy(model)
    places = [(layer, "weight") for layer in theirs if isinstance(layer, nn.Linear)]
    masks = None
    for rate in rates:
        masks = global_masks(magnitudes(model), rate, masks)
        prune.global_unstructured(places, prune.L1Unstructured, amount=rate)
    for mask, (layer, _) in zip(masks.values(), places, strict=True):
        assert torch.equal(mask, layer.weight_mask.bool())


def test_a_rate_is_of_what_is_still_there():
    masks, left = None, []
    scores = {"w": normal(1000)}
    for _ in range(3):
        masks = local_masks(scores, 0.2, masks)
        left.append(share_left(masks))
    assert left == [0.8, 0.64, 0.512]
    masks = None
    for done in range(9):  # a tenth of the original every round
        masks = local_masks(scores, 1 / (10 - done), masks)
    assert share_left(masks) == pytest.approx(0.1, abs=1e-12)


def test_of_equal_scores_exactly_as_many_go_as_were_asked():
    scores = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0])
    assert keep_top(scores, 0.4).tolist() == [False, False, True, True, True]
    assert keep_top(torch.zeros(4), 0.25).sum() == 3


def test_pruned_weights_are_no_candidates():
    scores, mask = torch.tensor([0.0, 0.0, 3.0, 1.0, 2.0]), torch.tensor([False, False, True, True, True])
    assert keep_top(scores, 1 / 3, mask).tolist() == [False, False, True, False, True]
    assert mask.tolist() == [False, False, True, True, True]
    worst = torch.tensor([math.nan, math.inf, 3.0, 1.0, 2.0])  # where the mask is False, nothing is looked at
    assert keep_top(worst, 1 / 3, mask).tolist() == [False, False, True, False, True]


def test_global_takes_from_the_matrix_of_small_weights():
    scores = {"small": torch.full((2, 5), 0.1), "large": torch.ones(2, 5)}
    masks = global_masks(scores, 0.5)
    assert not masks["small"].any() and masks["large"].all()
    assert all(mask.float().mean() == 0.5 for mask in local_masks(scores, 0.5).values())
    rates = local_masks(scores, {"small": 0.2, "large": 0.6})
    assert [int(mask.sum()) for mask in rates.values()] == [8, 4]


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_nothing_and_everything(rate):
    assert keep_top(normal(3, 4), rate).all() if rate == 0 else not keep_top(normal(3, 4), rate).any()
    assert keep_top(torch.zeros(0, 3), rate).shape == (0, 3)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (0, 3), (3, 3)])
def test_n_of_m_keeps_the_n_largest_of_each_group(n, m):
    scores = normal(5, 12).abs()
    mask = n_of_m(scores, n, m)
    for row in range(5):
        for start in range(0, 12, m):
            group, kept = scores[row, start : start + m], mask[row, start : start + m]
            assert set(group[kept].tolist()) == set(group.sort(descending=True).values[:n].tolist())


def test_two_of_four_is_torchs_sparsifier():
    from torch.ao.pruning import WeightNormSparsifier

    layer = nn.Linear(16, 6, bias=False)
    expected = nn.Sequential(copy.deepcopy(layer))
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(expected, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(layer.weight * n_of_m(layer.weight.detach().abs()), expected[0].weight)


def test_ties_in_a_group_still_leave_two():
    assert n_of_m(torch.ones(3, 8)).unflatten(1, (-1, 4)).sum(-1).eq(2).all()


def test_blocks_are_summed_and_spread():
    scores = normal(6, 8)
    sums = block_sums(scores, (3, 2))
    assert sums.shape == (2, 4)
    torch.testing.assert_close(sums[1, 2], scores[3:6, 4:6].sum())
    kept = sums > 0
    mask = spread_blocks(kept, (3, 2))
    assert mask.shape == (6, 8) and torch.equal(mask[3:6, 4:6], kept[1, 2].expand(3, 2))


# ------------------------------------------------------------------------------------ how they stay away


def test_the_definition():
    weight, mask, x = normal(4, 3), normal(4, 3, seed=1) > 0, normal(2, 5, 3, seed=2)
    torch.testing.assert_close(masked_product(weight, mask, x), F.linear(x, torch.where(mask, weight, 0.0)))
    with pytest.raises(ValueError, match="mask must be bool"):
        masked_product(weight, mask.float(), x)
    with pytest.raises(ValueError, match="mask must be bool"):
        masked_product(weight, mask[:1], x)


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, 1e-2),
    "AdamW with decay": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=1e-2),
    "Nesterov": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True),
}


def a_step(model, optimizer, seed):
    optimizer.zero_grad()
    F.cross_entropy(model(normal(16, 6, seed=seed)), torch.arange(16) % 3).backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_once_weights_grow_again_and_held_they_do_not(name):
    model = a_network()
    optimizer = OPTIMIZERS[name](model.parameters())
    for seed in range(3):  # the optimizer has momentum on every weight
        a_step(model, optimizer, seed)
    masks = local_masks(magnitudes(model), 0.4)
    grown = copy.deepcopy(model)
    their = OPTIMIZERS[name](grown.parameters())
    their.load_state_dict(optimizer.state_dict())

    apply_masks_(grown, masks)
    a_step(grown, their, 3)
    parameters = dict(grown.named_parameters())
    back = sum(int((parameters[key][~mask] != 0).sum()) for key, mask in masks.items())
    assert back == sum(int((~mask).sum()) for mask in masks.values())  # all of them

    with masked(model, masks) as keep:
        for seed in range(3, 8):
            a_step(model, optimizer, seed)
            for key, parameter in model.named_parameters():
                if key in masks:
                    assert not parameter.grad[~masks[key]].any() and parameter.grad[masks[key]].any()
            keep(model, seed)
            for key, parameter in model.named_parameters():
                if key in masks:
                    assert not parameter[~masks[key]].any() and (parameter[masks[key]] != 0).all()


def test_the_hooks_leave_with_the_context():
    model = a_network()
    masks = local_masks(magnitudes(model), 0.4)
    with pytest.raises(RuntimeError, match="stop"), masked(model, masks):
        raise RuntimeError("stop")
    model(normal(4, 6)).square().sum().backward()
    assert any(p.grad[~masks[n]].any() for n, p in model.named_parameters() if n in masks)


class Points:
    lengths = [1] * 32

    def batch(self, indices):
        return normal(len(indices), 6, seed=indices[0]), torch.tensor(indices) % 3


def test_the_courses_loop_holds_the_masks():
    model = a_network()
    masks = global_masks(magnitudes(model), 0.7)
    before = copy.deepcopy(model)
    with masked(model, masks) as keep:
        plan = TrainingPlan(epochs=3, batch_size=8, learning_rate=1e-2)
        train(model, Points(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), plan, after_step=keep, progress=False)
    parameters, old = dict(model.named_parameters()), dict(before.named_parameters())
    for name, mask in masks.items():
        assert not parameters[name][~mask].any()
        assert (parameters[name] != old[name])[mask].all()


def test_nothing_but_zero_is_left_of_a_pruned_weight():
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[-1.0, math.inf], [math.nan, 2.0]])
    apply_masks_(layer, {"weight": torch.tensor([[False, False], [False, True]])})
    assert layer.weight.tolist() == [[0, 0], [0, 2]] and not torch.signbit(layer.weight).any()


# ---------------------------------------------------------------------------------------------- counting


def test_prunable_are_the_blocks_matrices_and_no_others():
    model = Encoder(CONFIG)
    names = set(prunable(model))
    assert len(names) == 12 and all(name.endswith("weight") and "blocks." in name for name in names)
    assert set(prunable(a_network())) == {"0.weight", "2.weight", "4.weight"}
    assert set(prunable(nn.Linear(2, 2))) == {"weight"}
    assert set(prunable(a_network(), ["2"])) == {"2.weight"}


def test_the_denominator_matters():
    model = Encoder(CONFIG)
    masks = local_masks(magnitudes(model), 0.9)
    shares = shares_left(model, masks)
    gone = sum(int((~m).sum()) for m in masks.values())
    total = sum(p.numel() for p in model.parameters())
    assert shares["masked matrices"] == pytest.approx(share_left(masks)) == pytest.approx(0.1, abs=0.01)
    assert shares["whole model"] == pytest.approx(1 - gone / total)
    assert shares["masked matrices"] < shares["blocks, with biases and norms"] < shares["whole model"]
    assert share_left(full_masks(model)) == 1


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: keep_top(torch.ones(3), 1.5), "rate must be in 0 .. 1, got 1.5"),
        (lambda: keep_top(torch.tensor([1.0, math.nan]), 0.5), "scores must be finite"),
        (lambda: keep_top(torch.ones(3), 0.5, torch.ones(2, dtype=torch.bool)), "mask must be bool of shape"),
        (lambda: local_masks({"a": torch.ones(3)}, {"b": 0.5}), "rate has no entry for a"),
        (lambda: n_of_m(torch.ones(2, 6)), "multiple of m, got 2:4"),
        (lambda: n_of_m(torch.ones(2, 8), 5, 4), "got 5:4"),
        (lambda: block_sums(torch.ones(4, 6), (3, 2)), r"block must tile the matrix \(4, 6\), got \(3, 2\)"),
        (lambda: prunable(nn.ReLU()), "no linear layer"),
        (lambda: prunable(a_network(), ["1"]), "'1' is no nn.Linear"),
        (lambda: apply_masks_(a_network(), {"9.weight": torch.ones(1, dtype=torch.bool)}), "no entry for 9.weight"),
        (lambda: apply_masks_(a_network(), {"0.weight": torch.ones(2, dtype=torch.bool)}), "0.weight must be bool"),
        (lambda: share_left({}), "at least one weight"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()
