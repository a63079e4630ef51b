"""TinyBERT's losses against loops over transformers' queries and keys, its released rules restated, and identities."""

import copy
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel

from effnlp_lessons.distillation.tinybert import (
    LAYER_LOSSES,
    STAGES,
    TINYBERT_4,
    TINYBERT_6,
    Apprentice,
    LayerLosses,
    attention_loss,
    hidden_loss,
    layer_mapping,
    prediction_loss,
    stage_loss,
)
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.measure import count_parameters
from effnlp_lessons.pretrained import rename_bert_state
from effnlp_lessons.training import TrainingPlan, train
from effnlp_lessons.transformer import BERT_BASE, Encoder, EncoderOutput, TransformerConfig

TEACHER = TransformerConfig(vocab_size=50, max_length=24, d_model=16, layers=6, heads=4, d_ff=40, dropout=0.3)
STUDENT = TransformerConfig(**vars(TEACHER) | {"d_model": 8, "layers": 3, "d_ff": 20})


def encoder(config, seed=0, scale=0.3):
    """In float64, with all parameters random: scores and hidden states of ordinary size."""
    model, generator = Encoder(config, seed=seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


def padded_batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids * mask, mask


@pytest.fixture(scope="module")
def outputs():
    """(student output, teacher output, mask) of a batch with padding."""
    ids, mask = padded_batch([7, 4, 1])
    with torch.no_grad():
        student, teacher = (m(ids, mask, return_scores=True) for m in (encoder(STUDENT, 1), encoder(TEACHER, 2)))
    return student, teacher, mask


# ---------------------------------------------------------------------------------- counts and mapping


def test_parameter_counts():
    with torch.device("meta"):
        assert count_parameters(Encoder(TINYBERT_4)) == 14_350_248
        assert count_parameters(Encoder(TINYBERT_6)) == 66_955_008
        sizes = {"hidden_size": 312, "num_hidden_layers": 4, "intermediate_size": 1200}
        assert BertModel(BertConfig(**sizes)).num_parameters() == 14_350_248
        released = LayerLosses(TINYBERT_4, BERT_BASE, projection="released")
        assert count_parameters(released) + 14_350_248 == 14_590_632
        assert count_parameters(LayerLosses(TINYBERT_4, BERT_BASE)) == 2 * 312 * 768
        assert count_parameters(LayerLosses(TINYBERT_6, BERT_BASE)) == 0
        assert count_parameters(LayerLosses(TINYBERT_6, BERT_BASE, projection="released")) == 768 * 768 + 768


def test_mapping():
    assert layer_mapping(4, 12) == (0, 3, 6, 9, 12, 13)
    assert layer_mapping(6, 12) == (0, 2, 4, 6, 8, 10, 12, 13)
    assert layer_mapping(4, 12, "top") == (0, 9, 10, 11, 12, 13)
    assert layer_mapping(4, 12, "bottom") == (0, 1, 2, 3, 4, 13)
    for strategy in ("uniform", "top", "bottom"):
        assert layer_mapping(5, 5, strategy) == (0, 1, 2, 3, 4, 5, 6)
    for m, n in product(range(1, 13), (6, 12)):
        if n % m == 0:  # the released rules count from 0: hidden states i k, scores i k + k - 1
            k, mapping = n // m, layer_mapping(m, n)
            assert [mapping[i] for i in range(m + 1)] == [i * k for i in range(m + 1)]
            assert [mapping[i + 1] - 1 for i in range(m)] == [i * k + k - 1 for i in range(m)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 6), "student_layers must divide teacher_layers for a uniform mapping, got 4 and 6"),
        ((7, 6, "top"), r"student_layers must be in 1 .. 6 \(the teacher's\), got 7"),
        ((0, 6, "bottom"), "student_layers must be in 1 .. 6"),
        ((3, 6, "middle"), "strategy must be one of .*'bottom', 'top', 'uniform'.*, got 'middle'"),
    ],
)
def test_bad_mappings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        layer_mapping(*arguments)


# --------------------------------------------------------------------------------- scores, by brute force


def test_attention_loss_by_loops_over_transformers_queries_and_keys():
    """Softmax of our scores is transformers' attention; the loss is rebuilt number by number from hooked q and k."""
    ids, mask = padded_batch([5, 3])
    ours, raw = [], []
    for seed in (3, 4):
        torch.manual_seed(seed)
        theirs = BertModel(
            BertConfig(
                vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40,
                max_position_embeddings=24, initializer_range=0.5, attn_implementation="eager",
            )
        ).double().eval()  # fmt: skip
        seen, attention = {}, theirs.encoder.layer[0].attention.self
        for name in ("query", "key"):
            getattr(attention, name).register_forward_hook(lambda m, i, out, n=name, s=seen: s.__setitem__(n, out))
        model = Encoder(TransformerConfig(**vars(TEACHER) | {"layers": 1})).double().eval()
        model.load_state_dict(rename_bert_state(theirs.state_dict()))
        with torch.no_grad():
            expected = theirs(ids, attention_mask=mask.long(), output_attentions=True).attentions[0]
            scores = model(ids, mask, return_scores=True).scores[0]
        weights = scores.masked_fill(~mask[:, None, None, :], -math.inf).softmax(-1)
        torch.testing.assert_close(weights, expected, atol=1e-12, rtol=0)
        ours.append(scores)
        raw.append(seen)

    def score(q_and_k, b, h, i, j):
        q, k = (q_and_k[name][b].tolist() for name in ("query", "key"))
        return sum(q[i][d] * k[j][d] for d in range(4 * h, 4 * h + 4)) / 2  # sqrt(d_head) = 2

    clean, released, real = 0.0, 0.0, [5, 3]
    for b, h, i, j in product(range(2), range(4), range(5), range(5)):
        mine, teachers = (score(x, b, h, i, j) for x in raw)
        if i < real[b] and j < real[b]:
            clean += (mine - teachers) ** 2 / (4 * (25 + 9))
        if j < real[b]:  # rows of padded queries count, columns of padded keys are 0 on both sides
            released += (mine - teachers) ** 2 / (2 * 4 * 25)
    assert attention_loss(*ours, mask).item() == pytest.approx(clean, rel=1e-12)
    assert attention_loss(*ours, mask, "released").item() == pytest.approx(released, rel=1e-12)
    assert abs(clean - released) > 0.01 * clean


def test_released_rule_also_drops_very_low_scores_of_real_pairs():
    student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[-150.0, 3.0]]]])
    assert attention_loss(student, teacher, padding="released") == 9 / 2
    assert attention_loss(student, teacher) == (150**2 + 9) / 2


def test_hidden_loss_by_loops(outputs):
    _, teacher, mask = outputs
    a, b = teacher.hidden[1], teacher.hidden[4]
    rows = [(i, j) for i, length in enumerate([7, 4, 1]) for j in range(length)]
    squares = [(x - y) ** 2 for i, j in rows for x, y in zip(a[i, j].tolist(), b[i, j].tolist(), strict=True)]
    assert hidden_loss(a, b, mask).item() == pytest.approx(sum(squares) / len(squares), rel=1e-12)
    torch.testing.assert_close(hidden_loss(a, b, mask, "released"), F.mse_loss(a, b))
    torch.testing.assert_close(hidden_loss(a, b), F.mse_loss(a, b))
    torch.testing.assert_close(attention_loss(teacher.scores[0], teacher.scores[1]),
                               F.mse_loss(teacher.scores[0], teacher.scores[1]))  # fmt: skip


def test_scores_are_matched_not_probabilities(outputs):
    """Scores that differ by a constant per query give the same probabilities; the loss sees the difference."""
    _, teacher, mask = outputs
    scores = teacher.scores[2]
    shifted = scores + 3.0
    torch.testing.assert_close(shifted.softmax(-1), scores.softmax(-1))
    assert attention_loss(shifted, scores, mask).item() == pytest.approx(9.0)
    other = teacher.scores[3]
    assert attention_loss(scores, other, mask) > 10 * F.mse_loss(scores.softmax(-1), other.softmax(-1))


# ------------------------------------------------------------------------------------ losses of all layers


def test_zero_when_the_student_is_a_part_of_the_teacher():
    ids, mask = padded_batch([7, 4, 1])
    teacher = encoder(TEACHER, 2)
    whole = teacher(ids, mask, return_scores=True)
    losses = LayerLosses(TEACHER, TEACHER)(teacher(ids, mask, return_scores=True), whole, mask)
    assert set(losses) == set(LAYER_LOSSES) and all(value == 0 for value in losses.values())
    bottom = copy.deepcopy(teacher)
    bottom.blocks = bottom.blocks[:3]
    config = TransformerConfig(**vars(TEACHER) | {"layers": 3})
    for strategy in ("bottom", "uniform", "top"):
        losses = LayerLosses(config, TEACHER, layer_mapping(3, 6, strategy))(
            bottom(ids, mask, return_scores=True), whole, mask
        )
        assert losses["embedding"] == 0
        assert (losses["hidden"] == 0) == (losses["attention"] == 0) == (strategy == "bottom")


@pytest.mark.parametrize("strategy", ["uniform", "top", "bottom"])
def test_every_layer_meets_the_teachers_layer_of_the_mapping(outputs, strategy):
    """A student put together from the mapped layers has loss 0; moved by one layer it has not."""
    teacher, mask = outputs[1], outputs[2]
    mapping = layer_mapping(3, 6, strategy)
    losses = LayerLosses(TransformerConfig(**vars(TEACHER) | {"layers": 3}), TEACHER, mapping)

    def student(layers):
        hidden = (teacher.hidden[0], *(teacher.hidden[g] for g in layers))
        return EncoderOutput(hidden[-1], hidden, None, tuple(teacher.scores[g - 1] for g in layers))

    layers = list(mapping[1:-1])
    assert all(value == 0 for value in losses(student(layers), teacher, mask).values())
    for i in range(3):
        moved = list(layers)
        moved[i] = moved[i] % 6 + 1
        values = losses(student(moved), teacher, mask)
        assert values["embedding"] == 0 and values["hidden"] > 0.01 and values["attention"] > 0.01


def test_losses_are_sums_over_layers_with_the_papers_projections(outputs):
    student, teacher, mask = outputs
    losses = LayerLosses(STUDENT, TEACHER, seed=5).double()
    w_e, w_h = losses.embedding_projection.weight, losses.hidden_projection.weight
    assert w_e.shape == w_h.shape == (16, 8) and not torch.equal(w_e, w_h)
    assert {name for name, _ in losses.named_parameters()} == {
        "embedding_projection.weight",
        "hidden_projection.weight",
    }
    real = [(x[mask], y[mask]) for x, y in zip(student.hidden, [teacher.hidden[g] for g in (0, 2, 4, 6)], strict=True)]
    expected = [F.mse_loss(x @ (w_e if m == 0 else w_h).T, y) for m, (x, y) in enumerate(real)]
    values = losses(student, teacher, mask)
    torch.testing.assert_close(values["embedding"], expected[0])
    torch.testing.assert_close(values["hidden"], sum(expected[1:]))
    attention = [attention_loss(student.scores[i], teacher.scores[j], mask) for i, j in ((0, 1), (1, 3), (2, 5))]
    torch.testing.assert_close(values["attention"], sum(attention))


@pytest.mark.parametrize("width", [8, 16])
def test_released_projection_is_one_with_a_bias_at_any_width(outputs, width):
    teacher, mask = outputs[1], outputs[2]
    config = TransformerConfig(**vars(STUDENT) | {"d_model": width})
    losses = LayerLosses(config, TEACHER, projection="released", seed=5).double()
    assert losses.embedding_projection is losses.hidden_projection
    with torch.no_grad():
        losses.hidden_projection.bias += 0.5
    ids, _ = padded_batch([7, 4, 1])
    student = encoder(config, 1)(ids, mask, return_scores=True)
    values = losses(student, teacher, mask)
    weight, bias = losses.hidden_projection.weight, losses.hidden_projection.bias
    torch.testing.assert_close(
        values["embedding"], F.mse_loss(F.linear(student.hidden[0], weight, bias)[mask], teacher.hidden[0][mask])
    )
    # the released code has no difference between embeddings and layers: a sum over all M + 1 hidden states
    rows = [F.linear(x, weight, bias)[mask] for x in student.hidden]
    expected = sum(F.mse_loss(x, teacher.hidden[2 * m][mask]) for m, x in enumerate(rows))
    torch.testing.assert_close(values["embedding"] + values["hidden"], expected)
    assert LayerLosses(TEACHER, TEACHER).hidden_projection(student.hidden[0]) is student.hidden[0]


def test_released_losses_equal_the_released_computation(outputs):
    """The rule of the published script restated: masks added to scores, one mean over everything."""
    student, teacher, mask = outputs
    losses = LayerLosses(STUDENT, TEACHER, projection="released", padding="released", seed=5).double()
    bias = (1.0 - mask.double())[:, None, None, :] * -10_000.0
    zero = torch.zeros(())
    attention = hidden = 0.0
    for i in range(3):
        mine, theirs = student.scores[i] + bias, teacher.scores[2 * i + 1] + bias
        attention += F.mse_loss(torch.where(mine <= -1e2, zero, mine), torch.where(theirs <= -1e2, zero, theirs))
    for i in range(4):
        hidden += F.mse_loss(losses.hidden_projection(student.hidden[i]), teacher.hidden[2 * i])
    values = losses(student, teacher, mask)
    torch.testing.assert_close(values["attention"], attention)
    torch.testing.assert_close(values["embedding"] + values["hidden"], hidden)


def test_seed_decides_the_projections_and_leaves_the_callers_generator_alone():
    state = torch.random.get_rng_state()
    first, again, other = (LayerLosses(STUDENT, TEACHER, seed=s).hidden_projection.weight for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    big = LayerLosses(TINYBERT_4, BERT_BASE).hidden_projection.weight
    assert big.std().item() == pytest.approx(0.02, rel=0.02)


# ------------------------------------------------------------------------------------------------ padding


def all_losses(ids, mask, padding):
    student, teacher = encoder(STUDENT, 1), encoder(TEACHER, 2)
    losses = LayerLosses(STUDENT, TEACHER, padding=padding, seed=5).double()
    with torch.no_grad():
        values = losses(student(ids, mask, return_scores=True), teacher(ids, mask, return_scores=True), mask)
    return torch.stack(list(values.values()))


def test_losses_do_not_depend_on_what_stands_in_the_padding():
    """The released rule does: rows of padded queries and hidden states of padding count there."""
    ids, mask = padded_batch([7, 4, 1])
    other = torch.where(mask, ids, 37)
    wider, wider_mask = F.pad(other, (0, 3), value=11), F.pad(mask, (0, 3))
    expected = all_losses(ids, mask, "excluded")
    assert torch.equal(all_losses(other, mask, "excluded"), expected)
    torch.testing.assert_close(all_losses(wider, wider_mask, "excluded"), expected, atol=1e-12, rtol=0)
    released = all_losses(ids, mask, "released")
    assert (all_losses(other, mask, "released") - released).abs().min() > 1e-3
    # without padding the two rules are one
    full, everything = ids[:1], mask[:1]
    torch.testing.assert_close(all_losses(full, everything, "released"), all_losses(full, everything, "excluded"))


def test_nothing_real_gives_zero_with_a_gradient(outputs):
    _, teacher, mask = outputs
    for loss, x in ((attention_loss, teacher.scores), (hidden_loss, teacher.hidden)):
        student = x[0].clone().requires_grad_()
        value = loss(student, x[1], torch.zeros_like(mask))
        (gradient,) = torch.autograd.grad(value, student)
        assert value == 0 and torch.equal(gradient, torch.zeros_like(student))


def test_infinite_numbers_in_the_padding_stay_there(outputs):
    student, teacher, mask = outputs
    mine = student.scores[0].masked_fill(~mask[:, None, None, :], -math.inf).requires_grad_()
    theirs = teacher.scores[0].masked_fill(~mask[:, None, None, :], -math.inf)
    value = attention_loss(mine, theirs, mask)
    (gradient,) = torch.autograd.grad(value, mine)
    torch.testing.assert_close(value, attention_loss(student.scores[0], teacher.scores[0], mask))
    assert gradient.isfinite().all()


# --------------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_prediction_loss_equals_torchs(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in "st")
    expected = F.cross_entropy(student / temperature, (teacher / temperature).softmax(-1))
    torch.testing.assert_close(prediction_loss(student, teacher, temperature), expected, atol=1e-12, rtol=0)
    released = (-(teacher / temperature).softmax(-1) * (student / temperature).log_softmax(-1)).mean()
    torch.testing.assert_close(prediction_loss(student, teacher, temperature, "released"), released)
    torch.testing.assert_close(released * 5, expected)


# ------------------------------------------------------------------------------------------------- stages


def classifier(config, seed):
    model = SentenceClassifier(encoder(config, seed), 3, seed=seed).double().eval()
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
    return model


def apprentice(seed=1, **options):
    return Apprentice(classifier(STUDENT, seed), LayerLosses(STUDENT, TEACHER, **options).double())


def test_stages_add_up_what_they_say(outputs):
    ids, mask = padded_batch([7, 4, 1])
    teacher, pupil = classifier(TEACHER, 2), apprentice(seed=1).eval()
    student, target, _ = outputs
    values = pupil.layer_losses(student, target, mask)
    prediction = prediction_loss(pupil.student(ids, mask), teacher(ids, mask))
    assert "prediction" not in STAGES["general"] and STAGES["task, prediction"] == ("prediction",)
    for stage in ("general", "task, layers"):
        torch.testing.assert_close(stage_loss(teacher, STAGES[stage])(pupil, (ids, mask)), sum(values.values()))
    torch.testing.assert_close(stage_loss(teacher, STAGES["task, prediction"])(pupil, (ids, mask)), prediction)
    both = stage_loss(teacher, ("attention", "prediction"))(pupil, (ids, mask, "labels are not read"))
    torch.testing.assert_close(both, values["attention"] + prediction)
    # the general stage needs no head, on either side
    bare = Apprentice(pupil.student.encoder, pupil.layer_losses)
    torch.testing.assert_close(stage_loss(teacher.encoder)(bare, (ids, mask)), sum(values.values()))
    with pytest.raises(ValueError, match="needs a student and a teacher with a head"):
        stage_loss(teacher.encoder, ("prediction",))(pupil, (ids, mask))


def test_teacher_gets_no_gradient_and_no_dropout():
    ids, mask = padded_batch([7, 4, 1])
    teacher, pupil, with_graph = classifier(TEACHER, 2), apprentice().eval(), []
    teacher.encoder.register_forward_hook(lambda module, inputs, output: with_graph.append(output.last.requires_grad))
    loss = stage_loss(teacher, (*LAYER_LOSSES, "prediction"))
    expected = loss(pupil, (ids, mask))
    teacher.train()
    value = loss(pupil, (ids, mask))
    assert torch.equal(value, expected) and not teacher.training and not any(with_graph)
    value.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.any() for p in pupil.layer_losses.parameters())
    ours = torch.ones(1, 2, 3, 3)
    theirs = torch.zeros(1, 2, 3, 3, requires_grad=True)
    assert not attention_loss(ours, theirs).requires_grad and not hidden_loss(ours[0], theirs[0]).requires_grad
    assert not prediction_loss(ours[0, 0], theirs[0, 0]).requires_grad


class Sentences:
    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
        self.ids, self.mask = padded_batch(self.lengths)

    def batch(self, indices):
        return self.ids[indices], self.mask[indices]


def test_three_stages_of_training():
    """Each stage lowers its own loss; the first trains the projections too; the teacher stays as it was."""
    teacher, examples = classifier(TEACHER, 2), Sentences(32)
    before = copy.deepcopy(teacher.state_dict())
    pupil = apprentice()
    projection = pupil.layer_losses.hidden_projection.weight.detach().clone()
    plan = TrainingPlan(epochs=5, batch_size=8, learning_rate=1e-2, weight_decay=0.0)
    everything = (torch.arange(32).tolist(),)
    for stage, names in STAGES.items():
        loss = stage_loss(teacher if stage.startswith("task") else teacher.encoder, names)
        first = loss(pupil.eval(), examples.batch(*everything)).item()
        train(pupil, examples, loss, plan, progress=False)
        assert loss(pupil, examples.batch(*everything)).item() < 0.9 * first
    assert not torch.allclose(pupil.layer_losses.hidden_projection.weight, projection, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


# ---------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_named(outputs):
    student, teacher, mask = outputs
    scores, hidden = teacher.scores[0], teacher.hidden[0]
    with pytest.raises(ValueError, match="heads must be equal, to compare scores head by head: 12, 16"):
        LayerLosses(TINYBERT_4, TransformerConfig(**vars(BERT_BASE) | {"heads": 16}))
    with pytest.raises(ValueError, match="projection must be 'paper' or 'released', got 'none'"):
        LayerLosses(STUDENT, TEACHER, projection="none")
    for mapping in ((2, 4, 6), (0, 2, 4, 7), (0, 2, 4, 8, 7), (0, 0, 4, 6, 7), (1, 2, 4, 6, 7)):
        with pytest.raises(ValueError, match="mapping must be 0, then 3 layers in 1 .. 6, then 7, got"):
            LayerLosses(STUDENT, TEACHER, mapping)
    losses = LayerLosses(STUDENT, TEACHER).double()
    with pytest.raises(ValueError, match="teacher has no scores: call its encoder with return_scores=True"):
        losses(student, teacher._replace(scores=None), mask)
    with pytest.raises(ValueError, match="student must have 3 layers, got 6"):
        losses(teacher, teacher, mask)
    with pytest.raises(ValueError, match=r"student \(3, 4, 7, 7\) and teacher \(3, 2, 7, 7\) must have equal shapes"):
        attention_loss(scores, scores[:, :2], mask)
    with pytest.raises(ValueError, match="padding must be 'excluded' or 'released', got 'ignored'"):
        hidden_loss(hidden, hidden, mask, "ignored")
    for loss, x in ((attention_loss, scores), (hidden_loss, hidden)):
        with pytest.raises(ValueError, match="key_padding_mask must be bool"):
            loss(x, x, mask.long())
        with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(3, 7\), got \(3, 6\)"):
            loss(x, x, mask[:, :6])
    with pytest.raises(ValueError, match="average must be 'rows' or 'released', got 'mean'"):
        prediction_loss(hidden[0], hidden[0], average="mean")
    with pytest.raises(ValueError, match="temperature must be"):
        prediction_loss(hidden[0], hidden[0], temperature=0)
    for names in ((), "attention", ("attention", "cosine")):
        with pytest.raises(ValueError, match="names must be some of"):
            stage_loss(encoder(TEACHER), names)
