"""The 24 sizes against transformers' classes; the starts; the three steps, and what a step without data changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForPreTraining

from effnlp_lessons.datasets import tokenizer
from effnlp_lessons.distillation.hinton import label_objective
from effnlp_lessons.distillation.well_read import (
    NAMES,
    SIZES,
    Plans,
    distil_on_text,
    encoder_parameters,
    fine_tune,
    pretrain,
    pretrained_distillation,
    pretraining_parameters,
    pseudo_label_loss,
    soft_label_loss,
    student_config,
    truncated_encoder,
)
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.measure import count_parameters
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.training import TrainingPlan, train
from effnlp_lessons.transformer import Encoder, TransformerConfig

SMALL = TransformerConfig(vocab_size=40, max_length=16, d_model=16, layers=3, heads=2, d_ff=24)
PLANS = Plans(*(TrainingPlan(epochs=2, batch_size=4, learning_rate=1e-2, seed=seed) for seed in (5, 6, 7)))


class Sentences:
    """Random token ids with labels, as examples of unequal length."""

    def __init__(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.lengths = [3 + i % 5 for i in range(count)]
        self.token_ids = [torch.randint(1, 40, (n,), generator=generator).tolist() for n in self.lengths]
        self.labels = torch.tensor([ids[1] % 2 for ids in self.token_ids], dtype=torch.int64)

    def batch(self, indices):
        return *tokenizer.pad([self.token_ids[i] for i in indices]), self.labels[indices]


def masked_word_loss(model, batch):
    """The second word of every sentence is hidden and has to be found."""
    token_ids, key_padding_mask, _ = batch
    hidden = token_ids.clone()
    hidden[:, 1] = 39
    return F.cross_entropy(model(hidden, key_padding_mask)[:, 1], token_ids[:, 1])


def new_student(config=SMALL, seed=3):
    return SentenceClassifier(Encoder(config, seed=seed), classes=2, seed=seed)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---------------------------------------------------------------------------------------------- the sizes


def bert_for_pretraining(layers, width):
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    with torch.device("meta"):
        return BertForPreTraining(config)


@pytest.mark.parametrize(("layers", "width"), SIZES)
def test_every_size_has_the_parameters_of_transformers_bert(layers, width):
    config, theirs = SIZES[layers, width], bert_for_pretraining(layers, width)
    with torch.device("meta"):
        ours = Encoder(config)
    assert (len(ours.blocks), config.d_model, config.heads, config.d_ff) == (layers, width, width // 64, 4 * width)
    assert count_parameters(ours) == encoder_parameters(config) == count_parameters(theirs.bert)
    assert pretraining_parameters(config) == count_parameters(theirs)


def test_counts_are_the_published_ones():
    assert len(SIZES) == 24 and set(NAMES.values()) <= set(SIZES)
    exact = {
        "tiny": (4_385_920, 4_433_468),
        "mini": (11_170_560, 11_267_900),
        "small": (28_763_648, 29_058_876),
        "medium": (41_373_184, 41_668_412),
        "base": (109_482_240, 110_106_428),
    }
    for name, counts in exact.items():
        assert (encoder_parameters(SIZES[NAMES[name]]), pretraining_parameters(SIZES[NAMES[name]])) == counts
    # only the count with both heads rounds to the table of the released models, in millions
    published = {"tiny": 4.4, "mini": 11.3, "small": 29.1, "medium": 41.7, "base": 110.1}
    assert {name: round(pretraining_parameters(SIZES[size]) / 1e6, 1) for name, size in NAMES.items()} == published
    assert {name: round(encoder_parameters(SIZES[size]) / 1e6, 1) for name, size in NAMES.items()} != published


# --------------------------------------------------------------------------------------------- the starts


def test_truncated_student_begins_as_its_teacher():
    teacher = load_minilm()
    teacher.embeddings.requires_grad_(False)
    token_ids, mask = tokenizer.pad(tokenizer.encode(["A dull film.", "It is better than I had thought it would be."]))
    expected, before = teacher(token_ids, mask), weights(teacher)
    for layers in (0, 1, 3, 6):
        student = truncated_encoder(teacher, layers)
        output = student(token_ids, mask)
        assert student.config.layers == len(student.blocks) == layers and len(output.hidden) == layers + 1
        for ours, theirs in zip(output.hidden, expected.hidden, strict=False):
            assert torch.equal(ours, theirs)
        assert torch.equal(student.pooler.weight, teacher.pooler.weight)
        assert count_parameters(student) == encoder_parameters(student.config)
        assert all(p.requires_grad for p in student.parameters())
    assert torch.equal(output.pooled, expected.pooled)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert torch.equal(weights(teacher), before) and teacher.config.layers == 6  # the copies are its own
    assert not teacher.embeddings.tokens.weight.requires_grad


def test_truncation_keeps_the_exchanged_attention_and_the_last_norm():
    def one_token(q, k, v, key_padding_mask):
        return v

    config = TransformerConfig(vocab_size=40, max_length=16, d_model=16, layers=3, heads=2, d_ff=24, norm_first=True)
    teacher = Encoder(config, attention=one_token).eval()
    nn.init.uniform_(teacher.last_norm.weight, generator=torch.Generator().manual_seed(0))
    student = truncated_encoder(teacher, 2)
    ids = torch.arange(1, 9).view(2, 4)
    assert torch.equal(student(ids).last, teacher.last_norm(teacher(ids).hidden[2]))


def test_pretraining_repeats_from_the_seed_of_its_plan():
    first, second, other = (Encoder(SMALL, seed=1) for _ in range(3))
    torch.manual_seed(0)
    history = pretrain(first, Sentences(24), masked_word_loss, PLANS.pretrain)
    torch.manual_seed(1)
    pretrain(second, Sentences(24), masked_word_loss, PLANS.pretrain)
    pretrain(other, Sentences(24), masked_word_loss, PLANS.distil)
    assert torch.equal(weights(first), weights(second)) and not torch.equal(weights(first), weights(other))
    assert len(history.loss) == 12 and history.loss[-1] < history.loss[0]
    assert torch.equal(first.pooler.weight, Encoder(SMALL, seed=1).pooler.weight)  # masked words do not reach it


# ---------------------------------------------------------------------------------------- the later steps


def test_no_task_text_leaves_pretraining_and_fine_tuning_bit_for_bit():
    text, labelled = Sentences(24, seed=1), Sentences(16, seed=2)
    given = {"general_text": text, "masked_word_loss": masked_word_loss, "labelled": labelled}
    empty, without, by_hand, distilled = (new_student() for _ in range(4))
    histories = pretrained_distillation(empty, PLANS, task_text=Sentences(0), teacher_logits=torch.zeros(0, 2), **given)
    assert set(histories) == {"pretrain", "distil", "fine_tune"} and histories["distil"].loss == []
    assert set(pretrained_distillation(without, PLANS, **given)) == {"pretrain", "fine_tune"}
    pretrain(by_hand.encoder, text, masked_word_loss, PLANS.pretrain)
    train(by_hand, labelled, label_objective, PLANS.fine_tune, progress=False)
    assert torch.equal(weights(empty), weights(by_hand)) and torch.equal(weights(without), weights(by_hand))
    logits = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    pretrained_distillation(distilled, PLANS, task_text=text, teacher_logits=logits, **given)
    assert not torch.equal(weights(distilled), weights(by_hand))


def test_steps_without_data_give_the_other_ways_of_the_paper():
    text, labelled = Sentences(24, seed=1), Sentences(16, seed=2)
    logits = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    distilled, by_hand, tuned, only_tuned = (new_student() for _ in range(4))
    pretrained_distillation(distilled, PLANS, task_text=text, teacher_logits=logits)
    distil_on_text(by_hand, text, logits, PLANS.distil)
    assert torch.equal(weights(distilled), weights(by_hand)) and not distilled.training
    fine_tune(tuned, labelled, PLANS.fine_tune)
    pretrained_distillation(only_tuned, PLANS, labelled=labelled)
    assert torch.equal(weights(tuned), weights(only_tuned))
    untouched = new_student()
    distil_on_text(untouched, Sentences(0), torch.zeros(0, 2), PLANS.distil)
    assert torch.equal(weights(untouched), weights(new_student())) and not untouched.training


@pytest.mark.parametrize("loss", [soft_label_loss, pseudo_label_loss])
def test_distillation_does_not_read_the_labels(loss):
    text, wrong = Sentences(24), Sentences(24)
    wrong.labels = 1 - text.labels
    logits = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    first, second = new_student(), new_student()
    distil_on_text(first, text, logits, PLANS.distil, loss)
    distil_on_text(second, wrong, logits, PLANS.distil, loss)
    assert torch.equal(weights(first), weights(second))


def test_soft_labels_carry_more_than_the_pseudo_labels():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(9, 3, generator=generator), torch.randn(9, 3, generator=generator)
    p, log_q = teacher.softmax(-1), student.log_softmax(-1)
    torch.testing.assert_close(soft_label_loss(student, teacher), -(p * log_q).sum(-1).mean())
    torch.testing.assert_close(pseudo_label_loss(student, teacher), F.cross_entropy(student, teacher.argmax(-1)))
    surer = 5 * teacher  # the same classes first
    assert pseudo_label_loss(student, surer) == pseudo_label_loss(student, teacher)
    assert soft_label_loss(student, surer) != soft_label_loss(student, teacher)


def test_a_student_equal_to_its_teacher_gets_no_gradient_at_all():
    """To the last bit, and so no step of the optimizer either: Adam would make steps of rounding errors."""
    config = TransformerConfig(vocab_size=40, max_length=16, d_model=16, layers=3, heads=2, d_ff=24, dropout=0.0)
    teacher, student = new_student(config).eval(), new_student(config)
    examples = Sentences(24)
    token_ids, mask, _ = examples.batch(list(range(24)))
    soft_label_loss(student(token_ids, mask), teacher(token_ids, mask)).backward()
    reached = [p for p in student.parameters() if p.grad is not None]
    assert len(reached) == len(list(student.parameters())) and all(p.grad.eq(0).all() for p in reached)

    other = new_student(config, seed=4)
    soft_label_loss(other(token_ids, mask), teacher(token_ids, mask)).backward()
    assert other.head.weight.grad.ne(0).any() and other.encoder.embeddings.tokens.weight.grad.ne(0).any()

    class OwnTeacher(Sentences):
        def batch(self, indices):
            with torch.no_grad():
                token_ids, mask, labels = super().batch(indices)
                return token_ids, mask, teacher(token_ids, mask)

    def loss(model, batch):
        return soft_label_loss(model(batch[0], batch[1]), batch[2])

    plan = TrainingPlan(epochs=1, batch_size=4, learning_rate=1e-2, weight_decay=0.0)
    train(student, OwnTeacher(24), loss, plan, progress=False)
    assert torch.equal(weights(student), weights(teacher))


def test_distillation_brings_the_student_to_the_teacher():
    teacher, text = new_student(seed=8), Sentences(120, seed=1)
    plan = TrainingPlan(epochs=3, batch_size=8, learning_rate=1e-2)
    fine_tune(teacher, text, plan)
    token_ids, mask, _ = text.batch(list(range(120)))
    with torch.no_grad():
        logits = teacher(token_ids, mask)
    for loss in (soft_label_loss, pseudo_label_loss):
        student = new_student()
        before = (student.eval()(token_ids, mask).argmax(-1) == logits.argmax(-1)).float().mean()
        distil_on_text(student, text, logits, plan, loss)
        after = (student(token_ids, mask).argmax(-1) == logits.argmax(-1)).float().mean()
        assert after > 0.9 > 0.8 > before


def test_bad_arguments_are_named():
    for width in (96, 32, 0):
        with pytest.raises(ValueError, match=f"width must be a multiple of 64, got {width}"):
            student_config(2, width)
    for layers in (-1, 4):
        with pytest.raises(ValueError, match=f"layers must be in 0 .. 3, got {layers}"):
            truncated_encoder(Encoder(SMALL), layers)
    with pytest.raises(ValueError, match="general_text and masked_word_loss must be given together"):
        pretrained_distillation(new_student(), PLANS, general_text=Sentences(4))
    with pytest.raises(ValueError, match="task_text and teacher_logits must be given together"):
        pretrained_distillation(new_student(), PLANS, task_text=Sentences(4))
    with pytest.raises(ValueError, match="a row for each of the 0 examples, got 3"):
        distil_on_text(new_student(), Sentences(0), torch.zeros(3, 2), PLANS.distil)
