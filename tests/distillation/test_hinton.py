"""Hinton's losses against loops, autograd, F.kl_div and finite differences; and the digit that no student was shown."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnlp_lessons.classification import ReviewExamples
from effnlp_lessons.datasets import reviews
from effnlp_lessons.datasets.digits import load_digits
from effnlp_lessons.distillation.hinton import (
    WithTeacherLogits,
    distil,
    distillation_loss,
    ensemble_logits,
    hard_cross_entropy,
    label_objective,
    logit_matching_loss,
    objective,
    soft_cross_entropy,
    soft_divergence,
    soft_gradient,
    softened_probabilities,
    teacher_logits_of,
)
from effnlp_lessons.distillation.omitted_digit import DigitExamples, digit_network, rows_without, shift_bias_
from effnlp_lessons.training import TrainingPlan, train


def random_logits(rows=7, classes=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(rows, classes, generator=generator, dtype=dtype) for _ in "sv")
    return student.requires_grad_(), teacher


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


def looped_cross_entropy(student, teacher, temperature):
    """C of the paper, class by class, before the factor T^2; mean over rows."""
    total = 0.0
    for z, v in zip(student.tolist(), teacher.tolist(), strict=True):
        z_sum, v_sum = (sum(math.exp(x / temperature) for x in row) for row in (z, v))
        for z_i, v_i in zip(z, v, strict=True):
            total -= math.exp(v_i / temperature) / v_sum * math.log(math.exp(z_i / temperature) / z_sum)
    return total / len(student)


# ---------------------------------------------------------------------------------------------- soft loss


@pytest.mark.filterwarnings("ignore:reduction")  # torch warns of its "mean" as well
@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(1, 8), st.sampled_from([0.5, 1.0, 2.0, 4.0, 20.0]), st.integers(0, 2**16))
def test_soft_losses_equal_loops_and_kl_div(rows, classes, temperature, seed):
    student, teacher = random_logits(rows, classes, seed)
    expected = looped_cross_entropy(student, teacher, temperature)
    plain = soft_cross_entropy(student, teacher, temperature, rescale=False)
    assert plain.item() == pytest.approx(expected)
    assert soft_cross_entropy(student, teacher, temperature).item() == pytest.approx(temperature**2 * expected)
    log_q, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    kl = F.kl_div(log_q, p, reduction="batchmean") * temperature * temperature
    torch.testing.assert_close(soft_divergence(student, teacher, temperature), kl)
    # reduction="mean" divides by the classes as well
    per_element = F.kl_div(log_q, p, reduction="mean") * temperature * temperature
    torch.testing.assert_close(kl / classes, per_element)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0, 20.0])
def test_gradient_is_the_closed_form(temperature):
    student, teacher = random_logits()
    log_q, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    autograd = gradient(-(p * log_q).sum(-1).mean(), student)  # the definition, differentiated by torch
    closed = soft_gradient(student, teacher, temperature)
    torch.testing.assert_close(closed, autograd, rtol=0, atol=1e-14)
    for loss in (soft_cross_entropy, soft_divergence):
        ours = gradient(loss(student, teacher, temperature, rescale=False), student)
        torch.testing.assert_close(ours, closed, rtol=0, atol=1e-15)
        ours = gradient(loss(student, teacher, temperature), student)
        torch.testing.assert_close(ours, temperature**2 * closed)


def test_written_backward_passes_gradcheck_twice():
    student, teacher = random_logits(3, 4)
    for loss in (soft_cross_entropy, partial(distillation_loss, labels=torch.tensor([2, -1, 0]))):
        function = partial(loss, teacher_logits=teacher, temperature=2.5)
        assert torch.autograd.gradcheck(function, (student,))
        assert torch.autograd.gradgradcheck(function, (student,))


def test_cross_entropy_and_divergence_differ_by_the_entropy_of_the_teacher():
    student, teacher = random_logits()
    for temperature in (1.0, 4.0):
        p = torch.distributions.Categorical(logits=teacher / temperature)
        difference = soft_cross_entropy(student, teacher, temperature) - soft_divergence(student, teacher, temperature)
        torch.testing.assert_close(difference, temperature**2 * p.entropy().mean())
        other = soft_cross_entropy(-student, teacher, temperature) - soft_divergence(-student, teacher, temperature)
        torch.testing.assert_close(other, difference)  # the same for every student


def test_high_temperature_is_logit_matching():
    """T^2 times the gradient tends to (z - v) / N, and what is left falls like 1/T (sec. 2.1)."""
    student, teacher = random_logits(1, 10)
    student, teacher = (x.detach() - x.detach().mean(-1, keepdim=True) for x in (student, teacher))
    limit = (student - teacher) / 10
    left = {
        t: (t * t * soft_gradient(student, teacher, t) - limit).abs().max().item() for t in (1, 2, 5, 20, 100, 1000)
    }
    assert list(left.values()) == sorted(left.values(), reverse=True)
    # what is left falls like 1 / T, with terms in 1 / T² that are not gone yet: a fifth at 20, a twentieth at 100
    assert left[20] / left[100] == pytest.approx(5, rel=0.2)
    assert left[100] / left[1000] == pytest.approx(10, rel=0.05)
    assert left[1] > 0.1 * limit.abs().max()  # at T = 1 the two differ a lot
    # so do the losses; logits that have no mean of zero are taken as if they had
    shifted, teacher = (student + 3).requires_grad_(), teacher - 1
    matching = logit_matching_loss(shifted, teacher)
    torch.testing.assert_close(soft_divergence(shifted, teacher, 1e4), matching, rtol=1e-3, atol=0)
    torch.testing.assert_close(matching, 5 * limit.square().sum())  # N / 2 times the square of (z - v) / N
    torch.testing.assert_close(gradient(matching, shifted), limit)


def test_without_the_factor_the_soft_gradient_falls_like_the_square_of_the_temperature():
    student, teacher = random_logits()
    sizes = {
        (t, rescale): gradient(soft_divergence(student, teacher, t, rescale=rescale), student).norm().item()
        for t in (20.0, 40.0)
        for rescale in (True, False)
    }
    assert sizes[20, False] / sizes[40, False] == pytest.approx(4, rel=0.1)
    assert sizes[20, True] / sizes[40, True] == pytest.approx(1, rel=0.1)


def test_divergence_has_a_direction_and_is_zero_for_the_teacher_itself():
    student, teacher = random_logits()
    assert abs(soft_divergence(student, teacher, 1.0) - soft_divergence(teacher, student, 1.0)) > 0.01
    for dtype in (torch.float32, torch.float64):
        for seed in range(20):
            same = random_logits(9, 13, seed, dtype)[1]
            student = same.clone().requires_grad_()
            for loss in (soft_divergence, soft_cross_entropy):
                assert gradient(loss(student, same, 3.0), student).eq(0).all()  # to the last bit
            assert soft_divergence(student, same, 3.0).item() == 0


def test_teacher_gets_no_gradient():
    student, teacher = random_logits()
    teacher.requires_grad_()
    for loss in (
        soft_cross_entropy(student, teacher, 2.0),
        soft_divergence(student, teacher, 2.0),
        logit_matching_loss(student, teacher),
        distillation_loss(student, teacher, torch.zeros(7, dtype=torch.int64), temperature=2.0),
    ):
        student_gradient, teacher_gradient = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
        assert teacher_gradient is None and student_gradient.ne(0).any()


LOSSES = {
    "cross-entropy": partial(soft_cross_entropy, temperature=2.0),
    "divergence": partial(soft_divergence, temperature=2.0),
    "logit matching": logit_matching_loss,
    "whole": partial(distillation_loss, temperature=2.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_only_rows_that_count_count(name):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 4, 6, generator=generator, requires_grad=True)  # batch, length, vocab
    teacher = torch.randn(3, 4, 6, generator=generator)
    mask = torch.rand(3, 4, generator=generator) < 0.6
    spoiled = teacher.masked_fill(~mask[..., None], float("nan"))
    loss = LOSSES[name](student, spoiled, mask=mask)
    torch.testing.assert_close(loss, LOSSES[name](student[mask], teacher[mask]))
    gradients = gradient(loss, student)
    assert gradients[~mask].eq(0).all() and gradients[mask].ne(0).all()
    nothing = LOSSES[name](student, spoiled, mask=torch.zeros_like(mask))
    assert nothing.item() == 0 and gradient(nothing, student).eq(0).all()


def test_a_class_that_the_teacher_rules_out():
    student, teacher = random_logits()
    teacher[:, 1] = -float("inf")
    loss = soft_divergence(student, teacher, 2.0)
    kl = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean") * 4
    torch.testing.assert_close(loss, kl)
    assert gradient(soft_cross_entropy(student, teacher, 2.0), student).isfinite().all()


def test_half_precision_is_summed_in_float32():
    student, teacher = random_logits(6, 30_522, dtype=torch.float32)
    half = student.detach().bfloat16().requires_grad_()
    loss = soft_divergence(half, teacher.bfloat16(), 2.0)
    assert loss.dtype == torch.float32 and gradient(loss, half).dtype == torch.bfloat16
    torch.testing.assert_close(loss, soft_divergence(half.detach().float(), teacher.bfloat16().float(), 2.0))


# ---------------------------------------------------------------------------------------- with the labels


def test_labels_are_scored_at_temperature_one():
    student, teacher = random_logits()
    labels = torch.tensor([0, 4, 2, 1, 1, 3, 0])
    for temperature, weight in ((1.0, 0.5), (4.0, 0.9), (20.0, 0.3)):
        loss = distillation_loss(student, teacher, labels, temperature=temperature, soft_weight=weight)
        soft = temperature**2 * looped_cross_entropy(student, teacher, temperature)
        hard = F.cross_entropy(student, labels).item()
        assert loss.item() == pytest.approx(weight * soft + (1 - weight) * hard)
    for temperature in (1.0, 20.0):
        alone = distillation_loss(student, teacher, labels, temperature=temperature, soft_weight=0.0)
        torch.testing.assert_close(alone, F.cross_entropy(student, labels))
        torch.testing.assert_close(alone, hard_cross_entropy(student, labels))


def test_rows_without_a_label_have_the_soft_term_alone():
    student, teacher = random_logits()
    soft = soft_cross_entropy(student, teacher, 3.0)
    nowhere = torch.full((7,), -1)
    loss = partial(distillation_loss, student, teacher, temperature=3.0, soft_weight=0.25)
    torch.testing.assert_close(loss(), soft)
    torch.testing.assert_close(loss(nowhere), soft)
    labels = torch.tensor([0, -1, 2, -1, -1, 3, 0])
    rows = [
        distillation_loss(
            student[i : i + 1],
            teacher[i : i + 1],
            None if label < 0 else labels[i : i + 1],
            temperature=3.0,
            soft_weight=0.25,
        )
        for i, label in enumerate(labels.tolist())
    ]
    torch.testing.assert_close(loss(labels), torch.stack(rows).mean())
    counts = torch.tensor([True, True, False, False, True, False, True])
    torch.testing.assert_close(loss(labels, mask=counts), torch.stack(rows)[counts].mean())
    labelled = labels >= 0
    torch.testing.assert_close(
        hard_cross_entropy(student, labels), F.cross_entropy(student[labelled], labels[labelled])
    )
    assert hard_cross_entropy(student, nowhere).item() == 0


# ----------------------------------------------------------------------------------------------- teachers


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_ensembles_are_means_of_the_softened_distributions(temperature):
    members = torch.stack([random_logits(seed=seed)[1] for seed in range(3)])
    p = softened_probabilities(members, temperature)
    arithmetic = ensemble_logits(members, temperature)
    torch.testing.assert_close(softened_probabilities(arithmetic, temperature), p.mean(0))
    product = p.prod(0) ** (1 / 3)
    geometric = softened_probabilities(ensemble_logits(members, temperature, "geometric"), temperature)
    torch.testing.assert_close(geometric, product / product.sum(-1, keepdim=True))
    # it is one teacher: the soft loss of the mean is the mean of the members' losses
    student = random_logits(seed=9)[0]
    losses = [soft_cross_entropy(student, member, temperature) for member in members]
    torch.testing.assert_close(soft_cross_entropy(student, arithmetic, temperature), torch.stack(losses).mean())


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_an_ensemble_of_one_is_its_member(mean):
    student, member = random_logits()
    one = ensemble_logits(member[None], 4.0, mean)
    torch.testing.assert_close(softened_probabilities(one, 4.0), softened_probabilities(member, 4.0))
    torch.testing.assert_close(soft_gradient(student, one, 4.0), soft_gradient(student, member, 4.0))


def test_teachers_are_asked_in_evaluation_mode_and_keep_their_own():
    networks = [digit_network((16,), dropout=0.5, seed=seed) for seed in range(2)]
    networks[0].train()[0].eval()  # a part that its owner keeps in evaluation mode
    networks[1].eval()
    modes = [[module.training for module in network.modules()] for network in networks]
    pixels = torch.rand(6, 784, generator=torch.Generator().manual_seed(0))
    logits = teacher_logits_of(networks, pixels)
    assert logits.shape == (2, 6, 10) and not logits.requires_grad
    assert [[module.training for module in network.modules()] for network in networks] == modes
    assert not torch.equal(networks[0](pixels), logits[0])  # dropout is on again
    for network, member in zip(networks, logits, strict=True):
        torch.testing.assert_close(network.eval()(pixels), member)
    assert teacher_logits_of(nn.ModuleList(networks), pixels).equal(logits)


# ---------------------------------------------------------------------------------------------- training


def test_cached_logits_stay_with_their_sentences():
    examples = ReviewExamples(reviews.load_reviews().subset("dev"), limit=40)
    cached = torch.arange(80.0).view(40, 2)
    batch = WithTeacherLogits(examples, cached).batch([7, 31])
    for ours, theirs in zip(batch[:3], examples.batch([7, 31]), strict=True):
        assert torch.equal(ours, theirs)
    assert batch[3].tolist() == [[14, 15], [62, 63]]
    seen = []

    def student(token_ids, key_padding_mask):
        seen.append((token_ids, key_padding_mask))
        return torch.zeros(2, 2)

    value = objective(lambda s, t, labels: (s.sum() + t.sum(), labels))(student, batch)
    assert value[0] == 14 + 15 + 62 + 63 and torch.equal(value[1], batch[2])
    assert torch.equal(seen[0][0], batch[0]) and torch.equal(seen[0][1], batch[1])
    with pytest.raises(ValueError, match="a row for each of the 40 examples, got 39"):
        WithTeacherLogits(examples, cached[:39])


def test_networks_of_the_paper_repeat_from_their_seed():
    network = digit_network((800, 800), seed=3)
    assert sum(p.numel() for p in network.parameters()) == 784 * 800 + 800 + 800 * 800 + 800 + 800 * 10 + 10
    again, other = digit_network((800, 800), seed=3), digit_network((800, 800), seed=4)
    assert torch.equal(network[-1].weight, again[-1].weight) and not torch.equal(network[-1].weight, other[-1].weight)
    assert network[0].weight.std().item() == pytest.approx((2 / 784) ** 0.5, rel=0.01)
    assert isinstance(digit_network(())[-1], nn.Linear) and len(digit_network(())) == 1


def test_a_student_learns_a_digit_that_it_was_never_shown():
    """No three in the transfer set: labels teach nothing of it, soft targets do, once its bias is raised (sec. 3)."""
    omitted, data = 3, load_digits()
    train_set, test_set = DigitExamples(data.subset("train")), DigitExamples(data.subset("test"))
    plan = TrainingPlan(epochs=4, batch_size=64, learning_rate=3e-3)
    teacher = digit_network((100,), dropout=0.2, seed=1)
    train(teacher, train_set, label_objective, plan, progress=False)

    keep = rows_without(data.subset("train").labels, omitted)
    transfer_set = DigitExamples(data.subset("train"), keep)
    assert len(transfer_set.lengths) == 3_600 and omitted not in transfer_set.labels
    targets = teacher_logits_of([teacher], transfer_set.pixels)[0]

    def hard(student_logits, teacher_logits, labels):
        return hard_cross_entropy(student_logits, labels)

    threes = test_set.labels == omitted

    def right(network):
        with torch.no_grad():
            hits = network(test_set.pixels).argmax(-1) == test_set.labels
        return hits[threes].float().mean().item(), hits[~threes].float().mean().item()

    shares = {}
    for name, loss in {"hard": hard, "soft": partial(distillation_loss, temperature=10.0, soft_weight=1.0)}.items():
        student = digit_network((60,), seed=2)
        distil(student, transfer_set, targets, loss, plan)
        before = right(student)
        shift_bias_(student[-1], omitted, 2.0)
        shares[name] = (*before, *right(student))
    # right among the threes, among the others, and both again with the bias raised
    assert shares["hard"][0] == 0 and shares["hard"][1] > 0.85
    assert shares["soft"][2] > shares["soft"][0] > 0.3 > 0.05 > shares["hard"][2] and shares["soft"][3] > 0.8


def test_bias_shift_moves_one_logit_for_every_input():
    network, pixels = digit_network((8,)), torch.rand(5, 784, generator=torch.Generator().manual_seed(0))
    before = network(pixels)
    shift_bias_(network[-1], 3, 3.5)
    difference = network(pixels) - before
    torch.testing.assert_close(difference[:, 3], torch.full((5,), 3.5))
    assert difference[:, [0, 1, 2, 4, 5, 6, 7, 8, 9]].eq(0).all()
    assert network[-1].bias.requires_grad and network[-1].bias.is_leaf
    assert rows_without(torch.tensor([3, 1, 7, 3]), 3).tolist() == [False, True, True, False]
    assert rows_without(torch.tensor([3, 1, 7, 3]), 3, 7).tolist() == [False, True, False, False]


# ---------------------------------------------------------------------------------------------- bad input


def test_bad_arguments_are_named():
    student, teacher = random_logits()
    for temperature in (0, -1.0, float("inf"), float("nan")):
        for call in (soft_cross_entropy, soft_divergence, soft_gradient):
            with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
                call(student, teacher, temperature)
    with pytest.raises(ValueError, match=r"one shape \(rows, classes\), got \(7, 5\) and \(7, 1\)"):
        soft_cross_entropy(student, teacher[:, :1], 1.0)
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(7,\), got torch.int64 \(7,\)"):
        soft_divergence(student, teacher, 1.0, mask=torch.ones(7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(7,\), got torch.bool \(1,\)"):
        distillation_loss(student, teacher, temperature=1.0, mask=torch.ones(1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"soft_weight must be in \[0, 1\], got 1.5"):
        distillation_loss(student, teacher, temperature=1.0, soft_weight=1.5)
    with pytest.raises(ValueError, match=r"labels must be in 0 .. 4, or -1 for a row without one, got 5"):
        distillation_loss(student, teacher, torch.full((7,), 5), temperature=1.0)
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(7,\), got torch.float32 \(7,\)"):
        hard_cross_entropy(student, torch.zeros(7))
    with pytest.raises(ValueError, match="mean must be 'arithmetic' or 'geometric', got 'harmonic'"):
        ensemble_logits(teacher[None], 1.0, "harmonic")
    with pytest.raises(ValueError, match="got one Sequential: put it in a list"):
        teacher_logits_of(digit_network((4,)), torch.zeros(1, 784))
    with pytest.raises(ValueError, match="at least one teacher, got none"):
        teacher_logits_of([])
    with pytest.raises(ValueError, match=r"index must be in 0 .. 9, got 10"):
        shift_bias_(digit_network((4,))[-1], 10, 1.0)
    with pytest.raises(ValueError, match="linear must have a bias"):
        shift_bias_(nn.Linear(3, 3, bias=False), 0, 1.0)
    with pytest.raises(ValueError, match=r"hidden must hold sizes >= 1, got \(8, 0\)"):
        digit_network((8, 0))
