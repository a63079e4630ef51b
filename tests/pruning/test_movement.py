"""Movement pruning: the paper's gradients against autograd, where a weight moves, the schedule, the special cases."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from effnlp_lessons.classification import ReviewExamples
from effnlp_lessons.datasets import reviews
from effnlp_lessons.distillation.hinton import label_objective
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.pruning.masks import keep_top, share_left, shares_left
from effnlp_lessons.pruning.movement import (
    LEAST,
    MovementLinear,
    MovementPlan,
    above,
    cubic_level,
    masked_weight,
    movement_layers,
    movement_masks,
    prepare_movement,
    score_penalty,
    set_level_,
    to_dense,
    top_share,
    train_movement,
)
from effnlp_lessons.training import TrainingPlan, train
from effnlp_lessons.transformer import Encoder, TransformerConfig

SMALL = TransformerConfig(vocab_size=30_522, d_model=12, layers=2, heads=3, d_ff=20, max_length=64)


class Points:
    """Random inputs with a linear target: examples for a linear layer."""

    def __init__(self, d_in=6, d_out=5, number=64):
        self.x = torch.randn(number, d_in)
        self.y = self.x @ torch.randn(d_out, d_in).T
        self.lengths = [1] * number

    def batch(self, indices):
        return self.x[indices], self.y[indices]


def squared_error(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SentenceClassifier(Encoder(SMALL), classes=2, seed=0)


@pytest.fixture(scope="module")
def sentences():
    return ReviewExamples(reviews.load_reviews().subset("train"), 48)


# ---------------------------------------------------------------------------------------------- gradients


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_gradients_are_those_of_the_paper(d_out, d_in, batch, share, seed):
    generator = torch.Generator().manual_seed(seed)
    w, s, x, upstream = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((d_out, d_in), (d_out, d_in), (batch, d_in), (batch, d_out))
    )
    mask = top_share(s, share)
    weight, score, given_x = w.clone().requires_grad_(), s.clone().requires_grad_(), x.clone().requires_grad_()
    out = F.linear(given_x, masked_weight(weight, score, mask))
    assert torch.equal(out, x @ (w * mask).T)
    out.backward(upstream)
    # autograd of a surrogate in which M is a free tensor of numbers, a = (W ⊙ M) x: its dL/dM has no gate
    free_w, free_m = w.clone().requires_grad_(), mask.double().requires_grad_()
    F.linear(x, free_w * free_m).backward(upstream)
    torch.testing.assert_close(score.grad, free_m.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(weight.grad, free_w.grad, rtol=0, atol=1e-12)
    # dL/dS_ij = sum over the batch of (dL/da_i) W_ij x_j, by hand
    torch.testing.assert_close(score.grad, torch.einsum("bi,bj->ij", upstream, x) * w, rtol=0, atol=1e-12)
    assert (weight.grad[~mask] == 0).all()
    torch.testing.assert_close(given_x.grad, upstream @ (w * mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_a_masked_weight_is_still_judged_and_a_saturated_score_too(mode):
    layer = MovementLinear(nn.Linear(4, 3), mode)
    with torch.no_grad():
        layer.score.copy_(torch.linspace(-30, 30, 12).view(3, 4))  # sigmoid' is 0 in float32 at both ends
    set_level_(layer, 0.5)
    layer(torch.randn(5, 4)).square().sum().backward()
    mask = layer.mask()
    assert int(mask.sum()) == 6
    assert (layer.weight.grad[~mask] == 0).all() and (layer.score.grad != 0).all()


@pytest.mark.parametrize("weight", [0.7, -0.7])
@pytest.mark.parametrize("target", [2.0, -2.0])
@pytest.mark.parametrize("kept", [True, False])
def test_a_score_rises_where_the_weight_moves_away_from_zero(weight, target, kept):
    w, s = torch.tensor([[weight]], requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    out = masked_weight(w, s, torch.tensor([[kept]]))
    (out - target).square().sum().backward()
    # descent moves the output towards the target: away from zero if the target has the weight's sign
    away = weight * target > 0
    assert (-s.grad.item() > 0) == away
    if kept:
        assert (-w.grad.item() * weight > 0) == away
        assert s.grad.item() == pytest.approx(w.grad.item() * weight)
    else:
        assert w.grad.item() == 0


def test_a_score_is_minus_the_rate_times_the_sum_of_gradient_times_weight():
    points = Points()
    model = prepare_movement(nn.Linear(6, 5), "hard")
    set_level_(model, 0.4)
    optimizer = torch.optim.SGD(
        [{"params": [model.weight, model.bias], "lr": 0.05}, {"params": [model.score], "lr": 3.0}]
    )
    total = torch.zeros(5, 6)
    for _ in range(7):
        used = (model.weight.detach() * model.mask()).requires_grad_()
        error = F.mse_loss(F.linear(points.x, used, model.bias.detach()), points.y)
        total += torch.autograd.grad(error, used)[0] * model.weight.detach()
        optimizer.zero_grad()
        squared_error(model, (points.x, points.y)).backward()
        optimizer.step()
    torch.testing.assert_close(model.score.detach(), -3.0 * total, rtol=1e-5, atol=1e-6)


def test_weights_return_when_their_scores_do():
    # masked at first, but the data need it: its score rises until it is chosen
    layer = MovementLinear(nn.Linear(2, 1, bias=False), "hard")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, 0.5]]))
        layer.score.copy_(torch.tensor([[0.2, 0.0]]))
    set_level_(layer, 0.5)
    assert layer.mask().tolist() == [[True, False]]
    optimizer = torch.optim.SGD([layer.score], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(torch.tensor([[0.0, 1.0]])) - 1).square().sum().backward()
        optimizer.step()
    assert layer.mask().tolist() == [[False, True]]


# ------------------------------------------------------------------------------------------------- masks


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_top_share_is_torchs_magnitude_pruning_where_the_score_is_the_magnitude(shape, share, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    gone = round((1 - share) * weight.numel())
    torchs = prune.L1Unstructured(gone).compute_mask(weight, torch.ones_like(weight)).bool()
    kept = top_share(weight.abs(), share)
    assert torch.equal(kept, torchs) and int(kept.sum()) == weight.numel() - gone


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_top_share_with_ties(n, share, seed):
    generator = torch.Generator().manual_seed(seed)
    score, weight = torch.randint(0, 4, (n,), generator=generator).float(), torch.randn(n, generator=generator)
    kept = top_share(score, share, weight)
    # score first, |weight| second: the order of numpy's lexsort
    order = np.lexsort((weight.abs().numpy(), score.numpy()))
    expected = torch.zeros(n, dtype=torch.bool)
    expected[torch.from_numpy(order[round((1 - share) * n) :].copy())] = True
    assert torch.equal(kept, expected)
    assert torch.equal(top_share(score, share), keep_top(score, 1 - share))


def test_the_highest_scores_stay_not_the_largest_and_not_the_largest_weights():
    layer = MovementLinear(nn.Linear(4, 1), "hard")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[5.0, -6.0, 0.1, 0.2]]))
        layer.score.copy_(torch.tensor([[-3.0, -2.0, 0.0, 1.0]]))
    set_level_(layer, 0.5)
    assert layer.mask().tolist() == [[False, False, True, True]]


def test_before_any_score_has_moved_magnitude_decides():
    layer = MovementLinear(nn.Linear(7, 9), "hard")
    set_level_(layer, 0.3)
    assert torch.equal(layer.mask(), top_share(layer.weight.abs(), 0.3))


def test_a_view_that_is_not_contiguous():
    score = torch.randn(8, 6).T
    assert torch.equal(top_share(score, 0.4), top_share(score.contiguous(), 0.4))


def test_the_threshold_and_the_least_that_stays():
    score = torch.randn(40, 50)
    assert torch.equal(above(score, 0.4), torch.sigmoid(score) > 0.4)
    assert above(score, 0.0).all()
    # 0.5 % of 2,000 weights, the highest of them, where the threshold would leave none
    assert torch.equal(above(score - 50, 0.1), top_share(score, LEAST)) and int(above(score - 50, 0.1).sum()) == 10
    assert int(above(torch.full((3,), -9.0), 0.5).sum()) == 1
    # at the start all scores are equal: those that stay are the largest weights
    weight = torch.randn(40, 50)
    assert torch.equal(above(torch.zeros(40, 50), 0.6, weight), top_share(weight.abs(), LEAST))


def test_bad_input():
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match="share must be in 0 .. 1"):
            top_share(torch.zeros(3), share)
    with pytest.raises(ValueError, match="threshold must be in"):
        above(torch.zeros(3), 1.0)
    for choose in (top_share, above):
        with pytest.raises(ValueError, match="score must be finite"):
            choose(torch.tensor([1.0, math.nan, 0.0]), 0.5)
    with pytest.raises(ValueError, match="shape of score"):
        top_share(torch.zeros(3), 0.5, torch.zeros(4))
    with pytest.raises(ValueError, match="one shape"):
        masked_weight(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="one shape"):
        masked_weight(torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mode must be one of"):
        MovementLinear(nn.Linear(2, 2), "medium")
    for plan in ({"final": 0.0}, {"final": 1.1}, {"final": 0.1, "penalty": -1.0}, {"final": 0.1, "warm_up": 0.8},
                 {"final": 0.1, "score_learning_rate": 0.0}):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            MovementPlan(**plan)
    with pytest.raises(ValueError, match="prepare_movement"):
        movement_masks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must have scores"):
        score_penalty(prepare_movement(nn.Linear(2, 2), "magnitude"))
    with pytest.raises(ValueError, match="penalty must be 0"):
        train_movement(
            prepare_movement(nn.Linear(6, 5)), Points(), squared_error, TrainingPlan(), MovementPlan(0.1, penalty=1.0)
        )


# ---------------------------------------------------------------------------------------------- schedule


def test_the_schedule_is_the_cubic_of_the_paper():
    n, t_i, t_f, v_i, v_f = 100, 10, 20, 1.0, 0.15
    for t in range(n + 1):
        if t <= t_i:
            expected = v_i
        elif t >= n - t_f:
            expected = v_f
        else:
            expected = v_f + (v_i - v_f) * (1 - (t - t_i) / (n - t_i - t_f)) ** 3
        assert cubic_level(t, n, v_i, v_f, t_i, t_f) == pytest.approx(expected, abs=1e-15)
    assert cubic_level(45, n, v_i, v_f, t_i, t_f) == pytest.approx(
        0.15 + 0.85 / 8
    )  # half of the way, an eighth is left
    assert cubic_level(5, 10, 0.0, 0.1, 0, 0) == pytest.approx(0.1 * (1 - 1 / 8))  # a threshold rises by the same rule


def test_the_schedule_is_that_of_torch_ao_without_warm_up():
    from torch.ao.pruning import CubicSL, WeightNormSparsifier

    sparsifier = WeightNormSparsifier(sparsity_level=0.9)
    model = nn.Sequential(nn.Linear(4, 4))
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    scheduler = CubicSL(sparsifier, init_sl=0.0, init_t=0, delta_t=1, total_t=10)
    for step in range(1, 11):
        sparsifier.step()
        scheduler.step()
        level = sparsifier.groups[0]["sparsity_level"]
        assert 1 - cubic_level(scheduler.last_epoch, 10, 1.0, 0.1, 0, 0) == pytest.approx(level, abs=1e-9), step


def test_a_schedule_without_room():
    for warm_up, cool_down in ((-1, 0), (0, -1), (5, 5), (0, 10)):
        with pytest.raises(ValueError, match="leave steps between"):
            cubic_level(0, 10, 1.0, 0.1, warm_up, cool_down)


def test_training_follows_the_schedule_and_ends_at_its_end():
    seen = []

    def watching(model, batch):
        seen.append(model.level.item())
        return squared_error(model, batch)

    model = prepare_movement(nn.Linear(6, 5), "hard")
    train_movement(model, Points(), watching, TrainingPlan(epochs=5, batch_size=32), MovementPlan(0.2, 0.2, 0.3))
    assert seen == [cubic_level(t, 10, 1.0, 0.2, 2.0, 3.0) for t in range(10)]
    assert seen[:3] == [1.0] * 3 and seen[7:] == [0.2] * 3 and model.level.item() == 0.2 and not model.training
    assert share_left(movement_masks(model)) == 0.2


# ------------------------------------------------------------------------------------- models, and training


@pytest.mark.parametrize("mode", ["magnitude", "hard", "soft"])
def test_a_prepared_model_is_the_model_until_something_is_pruned(classifier, sentences, mode):
    model, batch = prepare_movement(classifier, mode), sentences.batch([0, 3, 5])
    assert len(movement_layers(model)) == 12  # six in each block; no pooler, no head
    assert share_left(movement_masks(model)) == 1
    torch.testing.assert_close(model.eval()(*batch[:2]), classifier.eval()(*batch[:2]), rtol=0, atol=0)
    theirs, ours = (dict(m.named_parameters()) for m in (classifier, model))
    assert not any(ours[name].data_ptr() == p.data_ptr() for name, p in theirs.items())
    assert set(ours) - set(theirs) == (set() if mode == "magnitude" else {f"{n}.score" for n in movement_layers(model)})


@pytest.mark.parametrize("mode", ["magnitude", "hard", "soft"])
def test_the_exported_model_has_the_same_logits_and_the_counted_zeros(classifier, sentences, mode):
    model = prepare_movement(classifier, mode)
    level = 0.45 if mode == "soft" else 0.17
    plan = MovementPlan(level, score_learning_rate=0.5, penalty=5.0 if mode == "soft" else 0.0)
    before = copy.deepcopy(model.state_dict())
    train_movement(model, sentences, label_objective, TrainingPlan(4, 16, 1e-3), plan)
    dense, masks, batch = to_dense(model), movement_masks(model), sentences.batch([1, 2, 7, 9])
    assert torch.equal(dense(*batch[:2]), model(*batch[:2]))
    assert not any(isinstance(part, MovementLinear) for part in dense.modules())
    assert set(dense.state_dict()) == set(classifier.state_dict())
    for name, mask in masks.items():
        weight = dense.state_dict()[name]
        assert (weight[~mask] == 0).all() and torch.equal(weight[mask], model.state_dict()[name][mask])
        if mode != "soft":
            assert int(mask.sum()) == mask.numel() - round((1 - level) * mask.numel())
    assert shares_left(dense, masks)["masked matrices"] == share_left(masks) < 1
    # the masks are saved with the model: scores, and the level that they are held against
    restored = prepare_movement(classifier, mode)
    restored.load_state_dict(model.state_dict())
    assert all(torch.equal(movement_masks(restored)[name], mask) for name, mask in masks.items())
    assert any(not torch.equal(before[name], model.state_dict()[name]) for name in masks)


def test_without_pruning_it_is_the_training_loop_of_the_course(classifier, sentences):
    plan = TrainingPlan(2, 16, 1e-3, seed=3)
    model, plain = prepare_movement(classifier, "magnitude"), copy.deepcopy(classifier)
    history = train_movement(model, sentences, label_objective, plan, MovementPlan(1.0))
    assert history.loss == train(plain, sentences, label_objective, plan, progress=False).loss
    dense = to_dense(model).state_dict()
    assert all(torch.equal(dense[name], tensor) for name, tensor in plain.state_dict().items())


def test_in_hard_mode_the_learning_rate_of_the_scores_changes_nothing():
    masks, points = [], Points(16, 12)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = nn.Linear(16, 12)
    for rate in (2.0**-10, 2.0**-4):  # a power of two, so that scaling rounds nothing
        model = prepare_movement(layer, "hard")
        plan = TrainingPlan(8, 8, 2.0**-8, clip=0.0)
        train_movement(model, points, squared_error, plan, MovementPlan(0.2, score_learning_rate=rate))
        masks.append(movement_masks(model)["weight"])
    assert torch.equal(*masks) and not torch.equal(masks[0], top_share(layer.weight.abs(), 0.2))


def test_scores_are_not_decayed_and_have_their_own_rate():
    # without a gradient only decay could move them: inputs of zeros give none
    class Zeros(Points):
        def batch(self, indices):
            return torch.zeros(len(indices), 6), torch.zeros(len(indices), 5)

    model = prepare_movement(nn.Linear(6, 5), "hard")
    with torch.no_grad():
        model.score.copy_(torch.randn(5, 6))
    score, weight = model.score.detach().clone(), model.weight.detach().clone()
    train_movement(model, Zeros(), squared_error, TrainingPlan(1, 8, 1e-2, weight_decay=0.5), MovementPlan(0.5))
    assert torch.equal(model.score, score) and (model.weight.abs() < weight.abs()).all()
    # Adam's first step is the learning rate
    moved = prepare_movement(nn.Linear(6, 5), "hard")
    first = moved.weight.detach().clone()
    plan = TrainingPlan(1, 64, 1e-3, weight_decay=0.0, warmup=0.0)
    train_movement(moved, Points(), squared_error, plan, MovementPlan(1.0, score_learning_rate=0.25))
    torch.testing.assert_close(moved.score.detach().abs(), torch.full((5, 6), 0.25), rtol=1e-3, atol=0)
    torch.testing.assert_close((moved.weight - first).abs(), torch.full((5, 6), 1e-3), rtol=1e-3, atol=0)


def test_the_penalty_is_the_mean_over_matrices_and_lets_scores_fall(classifier, sentences):
    model = prepare_movement(classifier, "soft")
    assert score_penalty(model).item() == 0.5
    layers = list(movement_layers(model).values())
    with torch.no_grad():
        layers[0].score.fill_(-80.0)
    assert score_penalty(model).item() == pytest.approx(0.5 * 11 / 12)  # by matrix, however large it is
    left = []
    for penalty in (0.0, 0.02, 1.0):
        model = prepare_movement(classifier, "soft")
        plan = MovementPlan(0.3, score_learning_rate=0.2, penalty=penalty)
        train_movement(model, sentences, label_objective, TrainingPlan(5, 16, 1e-3), plan)
        left.append(share_left(movement_masks(model)))
    assert left[0] > left[1] > left[2] >= LEAST, left
