"""Where does a student's gain come from: soft targets, or the unlabelled text that the teacher has answered?

1,500 movie reviews have labels, 5,570 have none. A small student, an averaging network, learns from the labels; from a
teacher's soft targets on the same sentences; and from its soft targets on all sentences. Beside each soft target
stands the teacher's hard pseudo-label, the class that it finds likeliest. Every student takes as many steps.

Two teachers. The course's own has seen all 7,070 labels, so its answers on the "unlabelled" sentences hold what it
learned from their labels. The other is trained on the same 1,500 labels as the students: it is the honest case of a
task with few labels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from effnlp_lessons.classification import ReviewExamples, accuracy, logits_of
from effnlp_lessons.datasets import reviews
from effnlp_lessons.distillation.averaging import AveragingNetwork
from effnlp_lessons.distillation.hinton import LogitLoss, distil, distillation_loss, hard_cross_entropy
from effnlp_lessons.distillation.well_read import fine_tune, pseudo_label_loss
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.pretrained import load_minilm, load_teacher
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.training import TrainingPlan

SHIPPED, FEW = "the course's teacher", "a teacher from 1,500 labels"
LABELS, SAME, MORE = "labels", "same sentences", "with unlabelled"


def labelled_rows(number: int, seed: int, total: int) -> Tensor:
    """Which training sentences have a label: `number` of `total` rows, drawn from `seed`."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:number].sort().values


class Rows:
    """Some rows of other examples, for `training.train`."""

    def __init__(self, examples: Any, rows: Tensor) -> None:
        self.examples, self.rows = examples, rows.tolist()
        self.lengths = [examples.lengths[row] for row in self.rows]

    def batch(self, indices: list[int]) -> tuple:
        return self.examples.batch([self.rows[i] for i in indices])


def teacher_from(train: ReviewExamples, rows: Tensor, seed: int, epochs: int = 3) -> SentenceClassifier:
    """MiniLM fine-tuned on the labels of `rows`, its embeddings left as they are; in evaluation mode."""
    teacher = SentenceClassifier(load_minilm(), classes=2, seed=seed)
    teacher.encoder.embeddings.requires_grad_(False)
    fine_tune(teacher, Rows(train, rows), TrainingPlan(epochs, 32, learning_rate=1e-4, bfloat16=True, seed=seed))
    return teacher


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Numbers, per cent of the test sentences right: "teachers", and "students" by teacher, signal and sentences.

    "students" is `{LABELS: right, teacher: {"soft" or "pseudo-labels": {SAME: right, MORE: right}}}`, with a student
    of all labels beside. "right on unlabelled" is how often a teacher is right where the students have no label.
    """
    data = reviews.load_reviews()
    train, test = ReviewExamples(data.subset("train")), ReviewExamples(data.subset("test"))
    everything = torch.arange(len(train.lengths))
    rows = labelled_rows(setting["labels"], seed, len(everything))
    hidden = everything[~torch.isin(everything, rows)]
    teachers = {SHIPPED: load_teacher(), FEW: teacher_from(train, rows, seed, setting["teacher_epochs"])}

    def student_right(rows: Tensor, teacher_logits: Tensor, loss: LogitLoss) -> float:
        student, batch = AveragingNetwork(seed=seed), 64
        epochs = max(1, round(setting["steps"] / -(-len(rows) // batch)))
        plan = TrainingPlan(epochs, batch, learning_rate=setting["learning_rate"], seed=seed)
        distil(student, Rows(train, rows), teacher_logits[rows], loss, plan)
        return round(accuracy(student, test), 2)

    soft = partial(distillation_loss, temperature=setting["temperature"])
    signals: dict[str, LogitLoss] = {
        "soft": lambda student, teacher, labels: soft(student, teacher),
        "pseudo-labels": pseudo_label_loss,
    }
    hard: LogitLoss = lambda student, teacher, labels: hard_cross_entropy(student, labels)  # noqa: E731
    blank = torch.zeros(len(everything), 2)  # a student of labels has no teacher
    students: dict[str, Any] = {LABELS: student_right(rows, blank, hard)}
    students[f"all {len(everything):,} labels"] = student_right(everything, blank, hard)
    numbers: dict[str, Any] = {"teachers": {}, "right on unlabelled": {}}
    for name, teacher in teachers.items():
        logits = logits_of(teacher, train.token_ids)
        numbers["teachers"][name] = round(accuracy(teacher, test), 2)
        right = (logits.argmax(-1) == train.labels)[hidden].double().mean().item()
        numbers["right on unlabelled"][name] = round(100 * right, 2)
        students[name] = {
            signal: {SAME: student_right(rows, logits, loss), MORE: student_right(everything, logits, loss)}
            for signal, loss in signals.items()
        }
    return Outcome(numbers | {"students": students})


STUDY = Study(
    name="transfer_set",
    question="From 1,500 labels: do soft targets help a small student, or the unlabelled sentences?",
    run=run,
    recorded=({"labels": 1_500, "steps": 440, "learning_rate": 3e-3, "temperature": 2.0, "teacher_epochs": 3},),
    full=tuple(
        {"labels": n, "steps": 880, "learning_rate": 3e-3, "temperature": 2.0, "teacher_epochs": 3}
        for n in (500, 1_500, 3_000)
    ),
    seeds=(0, 1, 2),
    minutes=10,
)
