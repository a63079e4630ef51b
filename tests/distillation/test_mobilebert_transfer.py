"""MobileBERT's transfer: losses against loops, what padding may not do, which parameters a stage may move."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from effnlp_lessons.distillation.mobilebert import MobileBert, MobileBertConfig, MobileBertMaskedLM
from effnlp_lessons.distillation.mobilebert_stages import (
    STRATEGIES,
    MaskedBatch,
    Stage,
    copy_outer_layers_,
    enter_stage_,
    parameter_groups,
    part_of,
    released_schedule,
    stages,
    transfer,
    transfer_losses,
)
from effnlp_lessons.distillation.mobilebert_transfer import (
    IGNORE,
    attention_transfer,
    feature_map_transfer,
    pretraining_distillation,
    split_feature_map_transfer,
)

STUDENT = MobileBertConfig(
    vocab_size=40, max_length=16, d_embedding=8, d_model=24, d_bottleneck=8, layers=3, heads=2, d_ff=16, feed_forwards=2
)
TEACHER = replace(
    STUDENT, d_bottleneck=32, d_ff=48, feed_forwards=1, attention_input="block", activation="gelu", norm="layer_norm",
    dropout=0.1,
)  # fmt: skip
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def models():
    """A small student and teacher, both with weights large enough for maps that differ from text to text."""
    student = MobileBertMaskedLM(MobileBert(STUDENT, seed=1), seed=1)
    teacher = MobileBertMaskedLM(MobileBert(TEACHER, seed=2), seed=2)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    copy_outer_layers_(student, teacher)
    return student.eval(), teacher.eval()


def batch_at(step):
    generator = torch.Generator().manual_seed(step % 4)
    ids = torch.randint(2, 40, (4, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [6], [3], [8]])
    masked = (torch.rand(4, 9, generator=generator) < 0.3) & mask
    masked[0, 1] = True
    labels = ids.where(masked, IGNORE)
    return MaskedBatch(ids.masked_fill(masked, 1) * mask, mask, labels)


def parameters_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("mask", [None, MASK])
def test_feature_map_transfer_is_the_sum_of_the_paper(mask):
    student, teacher = random(3, 5, 7, seed=1), random(3, 5, 7, seed=2)
    total, tokens = 0.0, 0
    for text in range(3):
        for t in range(5):
            if mask is None or mask[text, t]:
                tokens += 1
                total += sum((float(teacher[text, t, n]) - float(student[text, t, n])) ** 2 for n in range(7)) / 7
    assert feature_map_transfer(student, teacher, mask).item() == pytest.approx(total / tokens, rel=1e-6)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("factors", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (100.0, 5000.0, 5.0)])
def test_split_transfer_is_its_three_terms(mask, factors):
    student, teacher = random(3, 5, 7, seed=1, dtype=torch.float64), 2 + 3 * random(3, 5, 7, seed=2).double()
    total, tokens = 0.0, 0
    for text in range(3):
        for t in range(5):
            if mask is None or mask[text, t]:
                tokens += 1
                rows = [x[text, t].tolist() for x in (student, teacher)]
                means = [sum(row) / 7 for row in rows]
                variances = [sum((v - m) ** 2 for v in row) / 7 for row, m in zip(rows, means, strict=True)]
                normed = [
                    [(v - m) / math.sqrt(s) for v in row] for row, m, s in zip(rows, means, variances, strict=True)
                ]
                total += factors[0] * sum((a - b) ** 2 for a, b in zip(*normed, strict=True)) / 7
                total += factors[1] * (means[0] - means[1]) ** 2 + factors[2] * abs(variances[0] - variances[1])
    got = split_feature_map_transfer(student, teacher, mask, factors)
    assert got.item() == pytest.approx(total / tokens, rel=1e-9)


def test_the_released_factors_are_the_default():
    student, teacher = random(1, 3, 5, seed=1), random(1, 3, 5, seed=2)
    wanted = split_feature_map_transfer(student, teacher, None, (100.0, 5_000.0, 5.0))
    assert torch.equal(split_feature_map_transfer(student, teacher), wanted)


@pytest.mark.parametrize("mask", [None, MASK])
def test_attention_transfer_is_the_sum_of_the_paper(mask):
    student, teacher = random(3, 2, 5, 5, seed=1), 2 * random(3, 2, 5, 5, seed=2)
    total, queries = 0.0, 0
    for text in range(3):
        keys = [j for j in range(5) if mask is None or mask[text, j]]
        for t in keys:
            queries += 1
            for head in range(2):
                p, q = (x[text, head, t, keys].double().softmax(-1) for x in (teacher, student))
                total += float((p * (p.log() - q.log())).sum()) / 2
    assert attention_transfer(student, teacher, mask).item() == pytest.approx(total / queries, rel=1e-5)


def test_attention_transfer_has_the_gradient_of_the_released_cross_entropy():
    student, teacher = random(2, 2, 5, 5, seed=1).requires_grad_(), random(2, 2, 5, 5, seed=2)
    (divergence,) = torch.autograd.grad(attention_transfer(student, teacher), student)
    cross_entropy = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()
    (wanted,) = torch.autograd.grad(cross_entropy, student)
    torch.testing.assert_close(divergence, wanted)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_pretraining_distillation_is_the_cross_entropy_with_the_mixed_target(alpha):
    student, teacher = random(3, 5, 11, seed=1), random(3, 5, 11, seed=2)
    labels = torch.full((3, 5), IGNORE)
    labels[0, 1], labels[0, 4], labels[2, 2] = 3, 10, 0
    total = 0.0
    for text, t in ((0, 1), (0, 4), (2, 2)):
        target = alpha * F.one_hot(labels[text, t], 11) + (1 - alpha) * teacher[text, t].softmax(-1)
        total += -float((target * student[text, t].log_softmax(-1)).sum())
    got = pretraining_distillation(student, teacher, labels, alpha)
    assert got.item() == pytest.approx(total / 3, rel=1e-6)
    if alpha == 1:
        assert got.item() == pytest.approx(F.cross_entropy(student.flatten(0, 1), labels.flatten()).item(), rel=1e-6)


@pytest.mark.parametrize("loss", [feature_map_transfer, split_feature_map_transfer, attention_transfer])
def test_what_stands_at_padding_does_not_count(loss):
    shape = (3, 2, 5, 5) if loss is attention_transfer else (3, 5, 6)
    student, teacher = random(*shape, seed=1).requires_grad_(), random(*shape, seed=2)
    padding = ~MASK[:, None, :, None] | ~MASK[:, None, None, :] if loss is attention_transfer else ~MASK[..., None]
    value = loss(student, teacher, MASK)
    changed = (x.masked_fill(padding, number) for x, number in ((student, 40.0), (teacher, -7.0)))
    assert torch.equal(loss(*changed, MASK), value)
    (gradient,) = torch.autograd.grad(value, student)
    assert (gradient[padding.expand(shape)] == 0).all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("loss", [feature_map_transfer, split_feature_map_transfer, attention_transfer])
def test_losses_of_equal_maps_of_nothing_and_of_the_teacher(loss):
    shape = (3, 2, 5, 5) if loss is attention_transfer else (3, 5, 6)
    student, teacher = random(*shape, seed=1).requires_grad_(), random(*shape, seed=2).requires_grad_()
    assert loss(student, student.detach(), MASK).item() == 0
    assert loss(student, teacher, MASK).item() > 0
    loss(student, teacher, MASK).backward()
    assert teacher.grad is None and student.grad is not None
    nothing = loss(student, teacher, torch.zeros_like(MASK))
    assert nothing.item() == 0
    assert (torch.autograd.grad(nothing, student)[0] == 0).all()


def test_pretraining_distillation_without_masked_words_and_without_gradient_for_the_teacher():
    student, teacher = random(2, 4, 6, seed=1).requires_grad_(), random(2, 4, 6, seed=2).requires_grad_()
    nothing = pretraining_distillation(student, teacher, torch.full((2, 4), IGNORE))
    assert nothing.item() == 0
    assert (torch.autograd.grad(nothing, student)[0] == 0).all()
    pretraining_distillation(student, teacher, torch.ones(2, 4, dtype=torch.long)).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_bad_losses_are_refused():
    maps, scores, logits = random(2, 5, 6), random(2, 3, 5, 5), random(2, 5, 9)
    labels = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="feature maps must have one shape of 3"):
        feature_map_transfer(maps, maps[..., :4])
    with pytest.raises(ValueError, match="feature maps must have one shape of 3"):
        split_feature_map_transfer(maps[:1], maps)
    with pytest.raises(ValueError, match="scores must have one shape of 4"):
        attention_transfer(scores, scores[:, :1])
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        feature_map_transfer(maps, maps, torch.ones(2, 5))
    with pytest.raises(ValueError, match="key_padding_mask must have shape"):
        attention_transfer(scores, scores, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="alpha must be in"):
        pretraining_distillation(logits, logits, labels, 1.5)
    with pytest.raises(ValueError, match="logits must have one shape"):
        pretraining_distillation(logits, logits, labels[:, :3])


# ------------------------------------------------------------------------------------------- the stages


def test_stages_of_the_three_strategies():
    steps = {"transfer_steps": 240_000, "distillation_steps": 500_000}
    plans = {strategy: stages(strategy, 24, **steps) for strategy in STRATEGIES}
    assert [len(plans[strategy]) for strategy in STRATEGIES] == [1, 2, 25]
    assert {sum(stage.steps for stage in plan) for plan in plans.values()} == {740_000}
    assert {stage.steps for stage in plans["progressive"][:-1]} == {10_000}
    for plan in plans.values():  # the last stage trains everything on the masked words
        assert plan[-1].pretraining and set(plan[-1].block_rates) == {1.0} and plan[-1].other_rate == 1
        assert all(not stage.pretraining and stage.other_rate == 0 for stage in plan[:-1])
    assert plans["auxiliary"][0].transfer_layers == plans["joint"][0].transfer_layers == tuple(range(24))
    assert plans["joint"][1].transfer_layers == plans["progressive"][24].transfer_layers == ()
    assert plans["joint"][0].block_rates == (1.0,) * 24


@pytest.mark.parametrize("lower_rate", [0.0, 0.1])
def test_a_progressive_stage_is_one_block(lower_rate):
    plan = stages("progressive", 4, transfer_steps=8, distillation_steps=1, lower_rate=lower_rate)
    for layer, stage in enumerate(plan[:-1]):
        assert stage.transfer_layers == (layer,)
        assert stage.block_rates == (lower_rate,) * layer + (1.0,) + (0.0,) * (3 - layer)
        assert stage.rate("embeddings") == stage.rate("head") == 0 and stage.rate(layer) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "all"}, "strategy must be one of"),
        ({"layers": 0}, "layers must be >= 1, got 0"),
        ({"transfer_steps": 0}, "transfer_steps must be >= 1"),
        ({"distillation_steps": 0}, "distillation_steps must be >= 1"),
        ({"transfer_steps": 7}, "multiple of layers=3, got 7"),
        ({"lower_rate": 1.5}, "lower_rate must be in"),
        ({"strategy": "joint", "lower_rate": 0.1}, "lower_rate is for the progressive strategy"),
    ],
)
def test_bad_stages_are_refused(change, message):
    given = {"strategy": "progressive", "layers": 3, "transfer_steps": 6, "distillation_steps": 1}
    with pytest.raises(ValueError, match=message):
        stages(**(given | change))


def test_released_schedule_rises_in_the_first_tenth_and_ends_at_nine_tenths():
    rates = [released_schedule(step, 10_000) for step in range(10_001)]
    assert rates[0] == 0 and rates[500] == pytest.approx(0.5) and rates[-1] == pytest.approx(0.9)
    assert rates.index(max(rates)) in range(990, 1_001) and max(rates) < 1
    assert rates[5_000] == pytest.approx(0.9 + 0.1 * math.sqrt(0.5))


# ------------------------------------------------------------------------------------------ what is on


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_only_the_stages_layer_has_a_loss(layer):
    student, teacher = models()
    plan = stages("progressive", 3, transfer_steps=3, distillation_steps=1)
    losses = transfer_losses(student, teacher, batch_at(0), plan[layer])
    for parts in (losses.feature_maps, losses.attention):
        assert [part.item() != 0 for part in parts] == [other == layer for other in range(3)]
    assert losses.pretraining.item() == 0
    assert losses.total().item() == (losses.feature_maps[layer] + losses.attention[layer]).item()


def test_each_layer_is_compared_with_its_counterpart():
    student, teacher = models()
    ids, mask, labels = batch_at(0)
    (everything,) = stages("auxiliary", 3, transfer_steps=1, distillation_steps=1)
    losses = transfer_losses(student, teacher, batch_at(0), everything, alpha=0.25)
    ours, theirs = (model.encoder(ids, mask, return_scores=True) for model in (student, teacher))
    for layer in range(3):
        maps = feature_map_transfer(ours.hidden[layer + 1], theirs.hidden[layer + 1], mask)
        torch.testing.assert_close(losses.feature_maps[layer], maps)
        attention = attention_transfer(ours.scores[layer], theirs.scores[layer], mask)
        torch.testing.assert_close(losses.attention[layer], attention)
    wanted = pretraining_distillation(student(ids, mask), teacher(ids, mask), labels, 0.25)
    torch.testing.assert_close(losses.pretraining, wanted)
    torch.testing.assert_close(losses.total(), sum(losses.feature_maps) + sum(losses.attention) + wanted)
    split = transfer_losses(student, teacher, batch_at(0), everything, feature_map_loss=split_feature_map_transfer)
    wanted = split_feature_map_transfer(ours.hidden[2], theirs.hidden[2], mask)
    torch.testing.assert_close(split.feature_maps[1], wanted)


def test_the_teacher_gets_no_gradient_and_must_not_drop_out():
    student, teacher = models()
    (everything,) = stages("auxiliary", 3, transfer_steps=1, distillation_steps=1)
    seen = []  # not even a graph, which would cost the memory of its activations
    teacher.transform.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    transfer_losses(student, teacher, batch_at(0), everything).total().backward()
    assert seen == [False]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    with pytest.raises(ValueError, match="teacher must be in evaluation mode"):
        transfer_losses(student, teacher.train(), batch_at(0), everything)


def test_models_that_do_not_fit_are_refused():
    _, teacher = models()
    (everything,) = stages("auxiliary", 3, transfer_steps=1, distillation_steps=1)
    for change in ({"heads": 4}, {"layers": 2}, {"d_model": 32}, {"vocab_size": 41}):
        other = MobileBertMaskedLM(MobileBert(replace(STUDENT, **change)))
        name, value = next(iter(change.items()))
        with pytest.raises(ValueError, match=f"the same {name}, got {value} and {getattr(TEACHER, name)}"):
            transfer_losses(other, teacher, batch_at(0), everything)
    student, teacher = models()
    with pytest.raises(ValueError, match=r"plan must be for 3 layers, got \[4\]"):
        transfer(
            student, teacher, batch_at, stages("joint", 4, transfer_steps=1, distillation_steps=1), learning_rate=1
        )


# ----------------------------------------------------------------------------------- what may move


def test_every_parameter_is_in_one_group_and_vectors_do_not_decay():
    student, _ = models()
    groups = parameter_groups(student, weight_decay=0.5)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(student.parameters()))
    assert {group["part"] for group in groups} == {0, 1, 2, "embeddings", "head"}
    for group in groups:
        assert all((parameter.ndim > 1) == (group["weight_decay"] == 0.5) for parameter in group["params"])
    assert part_of("encoder.blocks.11.bottleneck.norm.bias") == 11
    assert part_of("encoder.embeddings.tokens.weight") == "embeddings"
    assert part_of("extra.weight") == part_of("encoder.pooler.weight") == "head"


def moved(before, after):
    """The parts any of whose parameters changed."""
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("lower_rate", [0.0, 0.1])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_stage_moves_its_block_and_with_a_rate_the_lower_ones(layer, lower_rate):
    """After a stage that trained everything: Adam's moments and weight decay would move the others."""
    student, teacher = models()
    (everything,) = stages("auxiliary", 3, transfer_steps=1, distillation_steps=1)
    plan = stages("progressive", 3, transfer_steps=3, distillation_steps=1, lower_rate=lower_rate)
    states = []

    def watched(step):
        states.append(parameters_of(student))
        return batch_at(step)

    transfer(student, teacher, watched, [everything, plan[layer]], learning_rate=1e-2, weight_decay=0.1)
    states.append(parameters_of(student))
    first, second, before, after = states
    assert moved(first, second) == moved(second, before) == {0, 1, 2, "embeddings", "head"}
    assert moved(before, after) == {*(range(layer) if lower_rate else ()), layer}


def test_the_optimizer_keeps_the_moments_of_what_rests():
    student, teacher = models()
    optimizer = torch.optim.AdamW(parameter_groups(student), lr=1e-2)
    (everything,) = stages("auxiliary", 3, transfer_steps=1, distillation_steps=1)
    plan = stages("progressive", 3, transfer_steps=3, distillation_steps=1)
    for stage in (everything, plan[1]):
        enter_stage_(optimizer, stage)
        kept = copy.deepcopy(optimizer.state_dict()["state"])
        before = parameters_of(student)
        transfer_losses(student, teacher, batch_at(0), stage).total().backward()
        optimizer.step()  # the rate of every group is still 1e-2: what rests does so for want of a gradient
    assert moved(before, parameters_of(student)) == {1}
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    for index, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], kept[index]["exp_avg"]) == (part_of(order[index]) != 1)


def test_lower_blocks_move_by_their_share_of_the_rate():
    """The first step of Adam moves a weight by its rate, whatever the gradient: so the rates can be read off."""
    student, teacher = models()
    plan = stages("progressive", 3, transfer_steps=3, distillation_steps=1, lower_rate=0.1)
    before = parameters_of(student)
    transfer(student, teacher, batch_at, plan[2:3], learning_rate=1e-3, weight_decay=0.0, clip=0.0)
    largest = [
        max((p - before[n]).abs().max().item() for n, p in student.named_parameters() if part_of(n) == layer)
        for layer in range(3)
    ]
    assert largest == pytest.approx([1e-4, 1e-4, 1e-3], rel=0.01)


# ------------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_three_strategies_bring_the_student_nearer(strategy):
    student, teacher = models()
    start, teachers = copy.deepcopy(student), parameters_of(teacher)
    plan = stages(strategy, 3, transfer_steps=36, distillation_steps=12)
    losses = transfer(student, teacher, batch_at, plan, learning_rate=1e-2)
    assert [len(stage) for stage in losses] == [stage.steps for stage in plan]
    for stage in losses:
        assert sum(stage[-4:]) < sum(stage[:4])  # four steps are all the batches once
    (everything,) = stages("auxiliary", 3, transfer_steps=1, distillation_steps=1)
    with torch.no_grad():
        before, after = (transfer_losses(model, teacher, batch_at(0), everything) for model in (start, student))
    assert after.pretraining < before.pretraining
    assert sum(after.feature_maps) < sum(before.feature_maps)
    assert all(torch.equal(p, teachers[n]) and p.grad is None for n, p in teacher.named_parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_run_repeats_and_follows_its_schedule():
    plan = stages("progressive", 3, transfer_steps=6, distillation_steps=2, lower_rate=0.1)
    results = []
    for schedule in (released_schedule, released_schedule, lambda step, steps: 1.0):
        student, teacher = models()
        options = {"schedule": schedule, "feature_map_loss": split_feature_map_transfer}
        losses = transfer(student, teacher, batch_at, plan, learning_rate=1e-3, **options)
        results.append((losses, parameters_of(student)))
    assert results[0][0] == results[1][0] != results[2][0]
    assert not moved(results[0][1], results[1][1])


def test_a_loss_that_is_not_finite_stops_the_run_and_frees_the_student():
    student, teacher = models()
    with torch.no_grad():
        teacher.encoder.blocks[0].output_bottleneck.linear.bias[0] = float("nan")
    plan = stages("progressive", 3, transfer_steps=3, distillation_steps=1)
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        transfer(student, teacher, batch_at, plan, learning_rate=1e-3)
    assert all(parameter.requires_grad for parameter in student.parameters())


# ------------------------------------------------------------------------------------- where it begins


def test_the_student_starts_from_all_that_is_outside_the_blocks():
    student, teacher = models()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(3.0)
    copy_outer_layers_(student, teacher)
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if name.startswith("encoder.embeddings.norm."):  # no layer norm's weights in a NoNorm
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all()
        elif part_of(name) in ("embeddings", "head"):
            assert torch.equal(parameter, theirs[name])
        elif parameter.ndim > 1:
            assert parameter.shape != theirs.get(name, torch.empty(0)).shape or not torch.equal(parameter, theirs[name])
    normed = MobileBertMaskedLM(MobileBert(replace(STUDENT, norm="layer_norm")))
    copy_outer_layers_(normed, teacher)
    assert (normed.encoder.embeddings.norm.bias == 3).all()


def test_a_stage_is_what_its_fields_say():
    stage = Stage("one", 5, (1,), False, (0.0, 1.0), 0.5)
    assert [stage.rate(part) for part in (0, 1, "embeddings", "head")] == [0.0, 1.0, 0.5, 0.5]
