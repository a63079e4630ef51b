"""Layer-wise OBS: the sweep against its definition, deletions against least squares, a model against a plain loop."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.pruning.layer_inputs import inputs_hessian
from effnlp_lessons.pruning.layerwise_obs import (
    calibration_batches,
    damped,
    greedy,
    inverse_of,
    layer_hessians,
    output_error,
    prune_layerwise,
    refit,
    right_factor,
    sweep,
)
from effnlp_lessons.pruning.masks import keep_top, magnitudes, n_of_m, share_left
from effnlp_lessons.pruning.obs import operate
from effnlp_lessons.transformer import Decoder, Encoder, TransformerConfig


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_layer(rows=5, columns=12, tokens=40, seed=0):
    """A weight, and inputs (tokens, columns) that depend on one another, as those of a real layer do."""
    inputs = normal(tokens, columns, seed=seed) + normal(tokens, 3, seed=seed + 1) @ normal(3, columns, seed=seed + 2)
    return normal(rows, columns, seed=seed + 3), inputs


def squared_error(weight, new, inputs):
    return (inputs @ (weight - new).T).square().sum().item()


def least_squares(weight, mask, inputs):
    """The best values for a mask, row by row, from the inputs themselves."""
    best = np.zeros(weight.shape)
    for i, kept in enumerate(mask.numpy()):
        best[i, kept] = np.linalg.lstsq(inputs.numpy()[:, kept], (inputs @ weight[i]).numpy(), rcond=None)[0]
    return torch.from_numpy(best)


# ----------------------------------------------------------------------------------------------- one matrix


def test_the_factor_holds_the_inverse_of_what_is_left_of_h_at_every_column():
    _, inputs = a_layer(columns=9)
    hessian = inputs_hessian(inputs)
    assert torch.allclose(hessian, 2 * inputs.T @ inputs, rtol=1e-12)
    factor, whole = right_factor(hessian, 0.01), damped(hessian, 0.01).numpy()
    assert torch.equal(factor, factor.triu())
    assert np.allclose(factor.T @ factor, np.linalg.inv(whole), rtol=1e-10)
    for j in range(9):
        smaller = np.linalg.inv(whole[j:, j:])
        assert np.allclose(factor[j, j] ** 2, smaller[0, 0], rtol=1e-10)
        assert np.allclose(factor[j, j] * factor[j, j:], smaller[0], rtol=1e-10, atol=1e-14)


def sweep_from_the_definition(weight, hessian, rate, block, damping):
    """Column by column with an inverse of H_j:,j: for each, no Cholesky factor and no blocks of updates; numpy."""
    w, h = weight.numpy().copy(), hessian.numpy()
    rows, columns = w.shape
    h = h + damping * np.diag(h).mean() * np.eye(columns)
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(columns)]
    gone = np.zeros(w.shape, dtype=bool)
    for j in range(columns):
        width = rate[1] if isinstance(rate, tuple) else block
        if j % width == 0:  # choose among these columns
            some = list(range(j, min(j + width, columns)))
            scores = np.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in some], axis=1)
            if isinstance(rate, tuple):
                for i in range(rows):
                    gone[i, j + np.argsort(scores[i])[: width - rate[0]]] = True
            else:
                count = round(rate * rows * (some[-1] + 1)) - gone.sum()
                lowest = np.argsort(scores, axis=None)[:count]
                gone[lowest // len(some), j + lowest % len(some)] = True
        for i in np.flatnonzero(gone[:, j]):
            w[i, j:] -= w[i, j] / inverses[j][0, 0] * inverses[j][0]  # OBS on the columns that are left
    w[gone] = 0.0
    return torch.from_numpy(w), torch.from_numpy(~gone)


@pytest.mark.parametrize("rate", [0.0, 0.37, 0.5, 0.9, 1.0, (2, 4), (1, 4), (3, 4), (1, 2)])
@pytest.mark.parametrize(
    ("block", "rows", "columns", "tokens"), [(4, 5, 12, 40), (8, 3, 20, 9), (128, 6, 16, 40), (8, 1, 4, 40)]
)
def test_the_sweep_is_its_definition(rate, block, rows, columns, tokens):
    weight, inputs = a_layer(rows, columns, tokens, seed=rows)
    hessian = inputs_hessian(inputs)
    new, mask = sweep(weight, hessian, rate, block, 0.01)
    expected, kept = sweep_from_the_definition(weight, hessian, rate, block, 0.01)
    assert torch.equal(mask, kept) and torch.allclose(new, expected, rtol=1e-9, atol=1e-12)
    assert (new[~mask] == 0).all() and new.is_contiguous()


def test_with_inputs_that_do_not_depend_on_one_another_it_is_magnitude_pruning():
    weight, identity = normal(7, 16), torch.eye(16)
    new, mask = sweep(weight, identity, 0.6, block=16)
    assert torch.equal(mask, keep_top(weight.abs(), 0.6)) and torch.equal(new[mask], weight[mask])
    new, mask = sweep(weight, identity, 0.5, block=4)  # in every block of columns
    assert torch.equal(mask, torch.cat([keep_top(part.abs(), 0.5) for part in weight.split(4, dim=1)], dim=1))
    new, mask = sweep(weight, identity, (2, 4))
    assert torch.equal(mask, n_of_m(weight.abs())) and torch.equal(new[mask], weight[mask])
    new, mask = greedy(weight, identity, 67)
    assert torch.equal(mask, keep_top(weight.abs(), 67 / 112)) and torch.equal(new[mask], weight[mask])


def test_inputs_of_unequal_size_are_weighed():
    # of inputs that do not depend on one another the small ones lose more weights: |w| |x| decides
    sizes = torch.tensor([0.1, 1.0, 10.0, 3.0, 0.5, 2.0, 0.2, 5.0], dtype=torch.float64)
    weight = normal(6, 8)
    _, mask = sweep(weight, torch.diag(sizes**2), 0.5, damping=0.0)
    assert torch.equal(mask, keep_top((weight * sizes).abs(), 0.5))
    assert not torch.equal(mask, keep_top(weight.abs(), 0.5))


@given(st.integers(1, 6), st.integers(1, 20), st.floats(0, 1), st.integers(1, 7), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_counts_are_exact_up_to_every_block(rows, columns, rate, block, seed):
    weight, inputs = a_layer(rows, columns, seed=seed)
    new, mask = sweep(weight.float(), inputs_hessian(inputs), rate, block)
    for end in (*range(0, columns, block), columns):
        assert int((~mask[:, :end]).sum()) == round(rate * rows * end)
    assert new.dtype == torch.float32 and (new[~mask] == 0).all() and torch.isfinite(new).all()


@pytest.mark.parametrize("rows", [5, 1])  # of one row the transpose is no other order in memory
def test_the_scale_of_h_does_not_matter_nor_how_a_weight_lies_in_memory_and_arguments_stay(rows):
    weight, inputs = a_layer(rows)
    hessian = inputs_hessian(inputs)
    before = weight.clone(), hessian.clone()
    new, mask = sweep(weight, hessian, 0.5, 4)
    scaled, again = sweep(weight, 1000 * hessian, 0.5, 4)
    assert torch.equal(mask, again) and torch.allclose(new, scaled, rtol=1e-10)
    assert torch.equal(sweep(weight.T.contiguous().T, hessian, 0.5, 4)[0], new)
    greedy(weight, hessian, 6)
    refit(weight, mask, hessian)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_one_deletion_is_the_constrained_least_squares_solution():
    weight, inputs = a_layer(rows=4, columns=7)
    new, mask = greedy(weight, inputs_hessian(inputs), 1, damping=0.0)
    errors = {}
    for place in itertools.product(range(4), range(7)):
        kept = torch.ones(4, 7, dtype=torch.bool)
        kept[place] = False
        errors[place] = squared_error(weight, least_squares(weight, kept, inputs), inputs)
    (chosen,) = (~mask).nonzero().tolist()
    assert tuple(chosen) == min(errors, key=errors.get)
    assert torch.allclose(new, least_squares(weight, mask, inputs), rtol=1e-9, atol=1e-11)
    # L = w² / (2 [H⁻¹]_qq) is ½ δᵀ H δ, and with H = 2 X Xᵀ that is |δ X|²
    saliency = weight[tuple(chosen)] ** 2 / (2 * torch.linalg.inv(inputs_hessian(inputs))[chosen[1], chosen[1]])
    assert saliency.item() == pytest.approx(min(errors.values()), rel=1e-9)


def test_a_deletion_of_the_sweep_is_least_squares_over_the_columns_to_its_right():
    weight, inputs = a_layer(rows=1, columns=9)
    new, mask = sweep(weight, inputs_hessian(inputs), 1 / 9, damping=0.0)
    q = int((~mask[0]).nonzero())
    assert 0 < q < 8  # there are columns on both sides
    assert torch.equal(new[0, :q], weight[0, :q])
    target = (inputs[:, q] * weight[0, q]).numpy()
    move = np.linalg.lstsq(inputs[:, q + 1 :].numpy(), target, rcond=None)[0]
    assert torch.allclose(new[0, q + 1 :] - weight[0, q + 1 :], torch.from_numpy(move), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [0, 5, 17, 30, 35])
def test_greedy_has_the_best_values_for_its_mask(count):
    weight, inputs = a_layer(rows=5, columns=7)
    new, mask = greedy(weight, inputs_hessian(inputs), count, damping=0.0)
    assert int((~mask).sum()) == count and (new[~mask] == 0).all()
    # the downdates of H⁻¹ add up their rounding
    assert torch.allclose(new, least_squares(weight, mask, inputs), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("count", [1, 4, 8])
def test_greedy_on_one_row_is_optimal_brain_surgeon(count):
    weight, inputs = a_layer(rows=1, columns=9)
    new, mask = greedy(weight, inputs_hessian(inputs), count)
    expected, kept, _ = operate(weight[0], torch.linalg.inv(damped(inputs_hessian(inputs))), count)
    assert torch.equal(mask[0], kept) and torch.allclose(new[0], expected, rtol=1e-9, atol=1e-12)


def test_refit_is_least_squares_and_leaves_an_empty_row_at_0():
    weight, inputs = a_layer(rows=4, columns=9)
    mask = keep_top(weight.abs(), 0.5)
    mask[2] = False
    new = refit(weight, mask, inputs_hessian(inputs), damping=0.0)
    assert torch.allclose(new, least_squares(weight, mask, inputs), rtol=1e-9, atol=1e-11)
    assert (new[2] == 0).all()
    assert torch.allclose(refit(weight, torch.ones_like(mask), inputs_hessian(inputs)), weight, rtol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_beats_the_best_of_all_masks_and_no_sweep_the_best_values_for_its_mask(seed):
    weight, inputs = a_layer(rows=1, columns=10, seed=10 * seed)
    hessian = inputs_hessian(inputs)
    best = min(
        squared_error(weight, least_squares(weight, mask, inputs), inputs)
        for gone in itertools.combinations(range(10), 5)
        for mask in [torch.tensor([[column not in gone for column in range(10)]])]
    )
    swept, mask = sweep(weight, hessian, 0.5, damping=0.0)
    one_by_one, _ = greedy(weight, hessian, 5, damping=0.0)
    assert best <= squared_error(weight, one_by_one, inputs) * (1 + 1e-9)
    freely = squared_error(weight, refit(weight, mask, hessian, 0.0), inputs)
    assert best <= freely * (1 + 1e-9) and freely <= squared_error(weight, swept, inputs) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_errs_less_than_the_sweep_and_the_sweep_less_than_magnitude(seed):
    # no theorem: a greedy choice of one row can be unlucky. Over 24 rows it holds on every seed
    weight, inputs = a_layer(rows=24, columns=32, tokens=200, seed=10 * seed)
    hessian = inputs_hessian(inputs)
    by_size = weight * keep_top(weight.abs(), 0.5)
    swept, mask = sweep(weight, hessian, 0.5)
    one_by_one, _ = greedy(weight, hessian, 384)
    errors = [output_error(weight, new, hessian) for new in (one_by_one, swept, weight * mask, by_size)]
    assert errors[0] < errors[1] < 0.8 * min(errors[2:])


def test_output_error_is_that_of_the_outputs():
    weight, inputs = a_layer()
    new = weight * keep_top(weight.abs(), 0.7)
    expected = squared_error(weight, new, inputs) / (inputs @ weight.T).square().sum().item()
    assert output_error(weight, new, inputs_hessian(inputs)) == pytest.approx(expected, rel=1e-10)
    assert output_error(weight, weight, inputs_hessian(inputs)) == 0
    assert output_error(weight, 0 * weight, inputs_hessian(inputs)) == 1


def test_weights_of_an_input_that_is_always_0_go_first():
    weight, inputs = a_layer(rows=3, columns=12)
    inputs[:, 4] = 0.0
    hessian, little = inputs_hessian(inputs), 1e-6  # damping: what they cost, as a share of the mean
    for new, mask in (sweep(weight, hessian, 1 / 12, damping=little), greedy(weight, hessian, 3, damping=little)):
        assert (~mask).nonzero().tolist() == [[0, 4], [1, 4], [2, 4]]
        assert torch.allclose(new[mask], weight[mask], rtol=1e-10)  # and no other has to make up for them


def test_fewer_tokens_than_inputs():
    weight, inputs = a_layer(rows=3, columns=12, tokens=5)
    new, mask = sweep(weight, inputs_hessian(inputs), 0.5)
    assert torch.isfinite(new).all() and int(mask.sum()) == 18
    with pytest.raises(ValueError, match="more tokens than inputs, or more damping"):
        inverse_of(damped(inputs_hessian(inputs), 0.0))


# ----------------------------------------------------------------------------------------------- whole models

CONFIG = TransformerConfig(vocab_size=50, max_length=20, d_model=8, layers=3, heads=2, d_ff=16)
SENTENCES = [[5, 9, 2], [7] * 6, [1, 2, 3, 4, 5, 6, 7, 8, 9], [30, 31], [11, 12, 13, 14], [40, 41, 42, 3]]
GROUPS = [  # in the order of computation; what stands together reads one tensor
    [f"encoder.blocks.{i}.{name}.weight" for name in group]
    for i in range(3)
    for group in (
        ["token_mixer.query", "token_mixer.key", "token_mixer.value"],
        ["token_mixer.output"],
        ["channel_mixer.expand"],
        ["channel_mixer.contract"],
    )
]


@pytest.fixture
def model():
    """float64, with larger weights than at initialisation: what one layer loses is seen by the next."""
    classifier = SentenceClassifier(Encoder(CONFIG), classes=2).double().eval()
    for i, parameter in enumerate(classifier.parameters()):
        parameter.data += 0.3 * normal(*parameter.shape, seed=i)
    return classifier


def test_batches_hold_every_sentence_once():
    batches = calibration_batches(SENTENCES, 4)
    assert [tuple(ids.shape) for ids, _ in batches] == [(4, 4), (2, 9)]
    rows = [ids[row][real[row]].tolist() for ids, real in batches for row in range(len(ids))]
    assert sorted(rows) == sorted(SENTENCES)


def test_h_of_a_model_is_that_of_the_real_tokens(model):
    together = layer_hessians(model, calibration_batches(SENTENCES, 6))
    assert list(together) == [name for group in GROUPS for name in group]
    alone = layer_hessians(model, calibration_batches(SENTENCES, 1))  # nothing is padded
    for name, hessian in together.items():
        assert torch.allclose(hessian, alone[name], rtol=1e-10, atol=1e-11)
    for i in range(3):  # by hand: what a block is given at the 28 real tokens
        hidden = [model.encoder(torch.tensor([ids])).hidden[i][0] for ids in SENTENCES]
        x = torch.cat(hidden).detach()
        name = f"encoder.blocks.{i}.token_mixer.query.weight"
        assert len(x) == 28 and torch.allclose(together[name], 2 * x.T @ x, rtol=1e-10, atol=1e-11)
        for other in ("key", "value"):
            assert together[name.replace("query", other)] is together[name]
        assert together[f"encoder.blocks.{i}.channel_mixer.contract.weight"].shape == (16, 16)


@pytest.mark.parametrize("rate", [0.4, (2, 4)])
def test_a_model_is_pruned_layer_after_layer(model, rate):
    batches = calibration_batches(SENTENCES, 3)
    pruned, masks = prune_layerwise(model, batches, rate, block=8)
    # the plain loop: for every group of layers the whole model from its start, with all that is pruned by then
    expected = copy.deepcopy(model)
    weights = dict(expected.named_parameters())
    for group in GROUPS:
        hessians = layer_hessians(expected, batches)
        for name in group:
            new, mask = sweep(weights[name], hessians[name], rate, 8)
            weights[name].data.copy_(new)
            assert torch.equal(masks[name], mask)
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(pruned.state_dict()[name], tensor, rtol=1e-9, atol=1e-11)
    # and that is not what each layer would be on its own
    dense, last = layer_hessians(model, batches), GROUPS[-1][0]
    assert not torch.allclose(sweep(dict(model.named_parameters())[last], dense[last], rate, 8)[0], weights[last])


def test_the_model_stays_and_only_masked_matrices_change(model):
    model.train()
    before = copy.deepcopy(model.state_dict())
    pruned, masks = prune_layerwise(model, calibration_batches(SENTENCES), 0.5)
    assert model.training and not pruned.training
    assert share_left(masks) == 0.5 and tuple(masks) == tuple(magnitudes(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        new = pruned.state_dict()[name]
        if name in masks:
            assert torch.equal(new == 0, ~masks[name]) and not torch.equal(new[masks[name]], tensor[masks[name]])
        else:
            assert torch.equal(new, tensor)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pruned.parameters())
    assert not any(part._forward_pre_hooks for part in [*model.modules(), *pruned.modules()])


def test_chosen_layers_and_layers_outside_of_blocks(model):
    batches = calibration_batches(SENTENCES)
    names = ["encoder.blocks.1.channel_mixer.expand", "encoder.blocks.1.token_mixer.key"]
    pruned, masks = prune_layerwise(model, batches, 0.5, names)
    assert list(masks) == [f"{name}.weight" for name in names]
    before = dict(model.named_parameters())
    assert {n for n, p in pruned.named_parameters() if not torch.equal(p, before[n])} == set(masks)
    # the pooler reads (batch, d_model): every row of it counts, none is padding
    pooled = torch.cat([model.encoder(torch.tensor([ids])).last[:, 0] for ids in SENTENCES]).detach()
    hessian = layer_hessians(model, batches, ["encoder.pooler"])["encoder.pooler.weight"]
    assert torch.allclose(hessian, 2 * pooled.T @ pooled, rtol=1e-10, atol=1e-11)
    _, masks = prune_layerwise(model, batches, 0.25, ["encoder.pooler", "encoder.blocks.0.token_mixer.query"])
    assert [int((~mask).sum()) for mask in masks.values()] == [16, 16]


def test_a_decoder_and_a_model_without_blocks():
    _, masks = prune_layerwise(Decoder(CONFIG), [(torch.tensor(SENTENCES[2:3]),)], (2, 4))
    assert len(masks) == 18
    assert all((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all() for mask in masks.values())
    chain, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double(), normal(30, 6)
    pruned, masks = prune_layerwise(chain, [(x[:11],), (x[11:],)], 0.4)
    first, kept = sweep(chain[0].weight, inputs_hessian(x), 0.4)
    assert torch.equal(masks["0.weight"], kept) and torch.allclose(pruned[0].weight, first, rtol=1e-10, atol=1e-13)
    middle = torch.relu(pruned[0](x)).detach()
    second, kept = sweep(chain[2].weight, inputs_hessian(middle), 0.4)
    assert torch.equal(masks["2.weight"], kept) and torch.allclose(pruned[2].weight, second, rtol=1e-10, atol=1e-13)


class Odd(nn.Module):
    """Calls one layer twice and another never."""

    def __init__(self):
        super().__init__()
        self.twice, self.never = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.twice(self.twice(x))


def test_hooks_are_gone_after_an_error():
    odd = Odd()
    with pytest.raises(ValueError, match="called once, not so: never.weight, twice.weight"):
        layer_hessians(odd, [(torch.ones(3, 4),)])
    with pytest.raises(RuntimeError):  # inputs that do not fit, torch's own words
        layer_hessians(odd, [(torch.ones(3, 5),)])
    assert not odd.twice._forward_pre_hooks and not odd.never._forward_pre_hooks


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: sweep(normal(2, 4), torch.eye(3), 0.5), r"hessian must be 4 x 4 for this weight, got \(3, 3\)"),
        (lambda: sweep(normal(2, 4), torch.eye(4), 1.5), "rate must be in 0 .. 1, got 1.5"),
        (lambda: sweep(normal(2, 4), torch.eye(4), float("nan")), "rate must be in 0 .. 1"),
        (lambda: sweep(normal(2, 4), torch.eye(4), 0.5, 0), "block must be >= 1, got 0"),
        (lambda: sweep(normal(2, 6), torch.eye(6), (2, 4)), "m a divisor of 6 and of block 128, got 2:4"),
        (lambda: sweep(normal(2, 8), torch.eye(8), (2, 4), 6), "m a divisor of 8 and of block 6, got 2:4"),
        (lambda: sweep(normal(2, 4), torch.eye(4), (5, 4)), "0 <= n <= m"),
        (lambda: sweep(normal(2, 4), torch.eye(4), (0, 0)), "0 <= n <= m"),
        (lambda: sweep(normal(2, 4), torch.zeros(4, 4), 0.5), "not 0 everywhere"),
        (lambda: sweep(normal(2, 4), torch.full((4, 4), torch.nan), 0.5), "hessian must be finite"),
        (lambda: sweep(normal(2, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.5), "positive definite"),
        (lambda: damped(torch.ones(2, 3)), "hessian must be square"),
        (lambda: damped(torch.eye(2), -1.0), "damping must be >= 0"),
        (lambda: greedy(normal(2, 4), torch.eye(4), 9), "count must be in 0 .. 8 weights, got 9"),
        (lambda: refit(normal(2, 4), torch.ones(2, 4), torch.eye(4)), "mask must be bool"),
        (lambda: calibration_batches([]), "there must be a sentence"),
        (lambda: prune_layerwise(nn.Linear(4, 4), [], 0.5), "at least one batch"),
        (lambda: prune_layerwise(nn.Linear(4, 4), [[1, 2]], 0.5), "tuples of tensors"),
        (lambda: prune_layerwise(nn.Linear(4, 4), [(torch.ones(3, 4),)], -0.1), "rate must be"),
        (lambda: prune_layerwise(nn.Linear(4, 4), [(torch.ones(3, 4),)], 0.5, ["x"]), "no nn.Linear"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()
