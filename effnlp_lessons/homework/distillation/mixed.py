"""Exercise 3 of notebook 01: soft targets and labels in one loss, where some rows have no label.

Hinton, Vinyals, Dean 2015 (arXiv 1503.02531, sec. 2). That a row without a label has the soft term alone is this
course's rule.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def mixed_loss(
    student_logits: Float[Tensor, "rows classes"],
    teacher_logits: Float[Tensor, "rows classes"],
    labels: Int[Tensor, " rows"],
    temperature: float,
    soft_weight: float,
) -> Float[Tensor, ""]:
    """a T^2 CE(p, q at T) + (1 - a) CE(label, q at 1), mean over all rows; a row with label -1 has T^2 CE(p, q) alone.

    a: `soft_weight`. Both cross-entropies in nats.
    """
    soft, hard = _soft(student_logits, teacher_logits, temperature), _hard(student_logits, labels)
    both = soft_weight * soft + (1 - soft_weight) * hard
    return torch.where(labels == -1, soft, both).mean()


def _soft(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 CE(p, q at T) of every row."""
    p = (teacher_logits / temperature).softmax(dim=-1)
    return -(p * (student_logits / temperature).log_softmax(dim=-1)).sum(dim=-1) * temperature**2


def _hard(student_logits: Tensor, labels: Tensor) -> Tensor:
    """CE(label, q at 1) of every row, 0 without a label."""
    return F.cross_entropy(student_logits, labels, ignore_index=-1, reduction="none")


def _exchange(
    weights: Callable[[float], tuple[float, float]] = lambda weight: (weight, 1 - weight),
    soft_factor: Callable[[float], float] = lambda temperature: 1.0,
    hard_factor: Callable[[float], float] = lambda temperature: 1.0,
    hard_temperature: Callable[[float], float] = lambda temperature: 1.0,
    unlabelled: Callable[[float], float] = lambda weight: 1.0,
    entropy: bool = True,
) -> Answer:
    """The answer with one step exchanged, for the mistakes.

    Args:
        weights: of the soft and the hard term, from `soft_weight`.
        soft_factor, hard_factor: what each term is multiplied by beyond what is right.
        hard_temperature: what the logits of the hard term are divided by.
        unlabelled: the weight of the soft term in a row without a label.
        entropy: False takes the divergence for the cross-entropy.
    """

    def answer(
        student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, soft_weight: float
    ) -> Tensor:
        soft = _soft(student_logits, teacher_logits, temperature) * soft_factor(temperature)
        if not entropy:
            soft = soft - _soft(teacher_logits, teacher_logits, temperature)
        hard = _hard(student_logits / hard_temperature(temperature), labels) * hard_factor(temperature)
        first, second = weights(soft_weight)
        return torch.where(labels == -1, unlabelled(soft_weight) * soft, first * soft + second * hard).mean()

    return answer


def _as_class(number: int) -> Answer:
    """Rows without a label count as rows of this class."""

    def answer(
        student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, soft_weight: float
    ) -> Tensor:
        labels = labels.masked_fill(labels == -1, number % student_logits.shape[-1])
        return mixed_loss(student_logits, teacher_logits, labels, temperature, soft_weight)

    return answer


def _dropped(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, soft_weight: float
) -> Tensor:
    known = labels != -1
    return mixed_loss(student_logits[known], teacher_logits[known], labels[known], temperature, soft_weight)


def _means_apart(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, soft_weight: float
) -> Tensor:
    """The soft term a mean over all rows, the hard one over the rows that have a label (NaN if none has)."""
    hard = F.cross_entropy(student_logits, labels, ignore_index=-1)
    return soft_weight * _soft(student_logits, teacher_logits, temperature).mean() + (1 - soft_weight) * hard


def _draw(
    labelled: str, weights: tuple[float, ...] = (0.1, 0.3, 0.7, 0.9), temperatures: tuple[float, ...] = (2.0, 3.0, 4.0)
) -> Callable[[Generator], tuple]:
    """Random logits; labels of "all" rows, of "some" or of "none"."""

    def draw(generator: Generator) -> tuple:
        rows, classes = whole_number(4, 6, generator), whole_number(3, 6, generator)
        student, teacher = 2 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
        labels = torch.randint(classes, (rows,), generator=generator)
        without = {"all": 0, "some": whole_number(1, rows - 2, generator), "none": rows}[labelled]
        labels[torch.randperm(rows, generator=generator)[:without]] = -1
        temperature, weight = (x[whole_number(0, len(x) - 1, generator)] for x in (temperatures, weights))
        return student, teacher, labels, temperature, weight

    return draw


MIXED_LOSS = Exercise(
    id="distillation.mixed_loss",
    title="soft targets and labels in one loss",
    minutes=20,
    difficulty=2,
    reference=mixed_loss,
    properties=(
        Property("every row has a label, soft_weight 0: the labels alone", _draw("all", (0.0,)), times=1),
        Property("every row has a label, soft_weight 1: the teacher alone", _draw("all", (1.0,)), times=1),
        Property("every row has a label, temperature 1", _draw("all", temperatures=(1.0,)), times=1),
        Property("every row has a label, another temperature", _draw("all")),
        Property("no row has a label: the teacher alone, at weight 1", _draw("none"), times=1),
        Property("some rows have a label", _draw("some")),
    ),
    mistakes=(
        Mistake(
            "The hard term is softened, too",
            "The labels are compared with the student as it will be used: at temperature 1.",
            _exchange(hard_temperature=lambda temperature: temperature),
        ),
        Mistake(
            "The weights are exchanged",
            "soft_weight belongs to the soft term, 1 - soft_weight to the labels. The paper gives the labels much "
            "the smaller weight.",
            _exchange(lambda weight: (1 - weight, weight)),
        ),
        Mistake(
            "The factor T squared is missing",
            "Without it the soft term's gradient shrinks like 1 / T², and the labels decide alone.",
            _exchange(soft_factor=lambda temperature: 1 / temperature**2),
        ),
        Mistake(
            "T squared multiplies both terms",
            "It makes up for the temperature. The hard term has none, so it gets no factor.",
            _exchange(hard_factor=lambda temperature: temperature**2),
        ),
        Mistake(
            "The two terms are added without a weight on the labels",
            "Multiply the hard term by 1 - soft_weight.",
            _exchange(lambda weight: (weight, 1.0)),
        ),
        Mistake(
            "Rows without a label count as the last class",
            "labels[...] is -1 there, and as an index -1 means the last class. Leave the hard term of these rows out.",
            _as_class(-1),
        ),
        Mistake(
            "Rows without a label count as class 0",
            "clamp or max made a class out of -1. Leave the hard term of these rows out.",
            _as_class(0),
        ),
        Mistake(
            "Rows without a label are left out altogether",
            "The teacher says something about them: they count with their soft term. That is what they are there for.",
            _dropped,
        ),
        Mistake(
            "The soft term of rows without a label keeps the weight soft_weight",
            "A row without a label has the soft term alone, at weight 1.",
            _exchange(unlabelled=lambda weight: weight),
        ),
        Mistake(
            "Each term is a mean over its own rows",
            "The hard term is divided by the number of labels, so few labels weigh as much as many. Make one number "
            "of each row first, then take the mean over all rows.",
            _means_apart,
        ),
        Mistake(
            "The divergence, not the cross-entropy",
            "The soft term here is a cross-entropy, - sum p log q. The divergence is smaller by the teacher's entropy.",
            _exchange(entropy=False),
        ),
    ),
    hints=(
        "First forget the rows without a label. Write one soft and one hard number for each row; take no mean yet.",
        '`F.cross_entropy(..., reduction="none")` gives a number for each row; `ignore_index=-1` makes it 0 where the '
        "label is -1. `torch.where(condition, a, b)` picks row by row. Which weight has the soft term where there is "
        "no label?",
        "A neighbour: a grade is 0.7 times the exam plus 0.3 times the essay. Who wrote no essay (-1) is graded by "
        "the exam alone.\n"
        "  exam, essay = torch.tensor([80., 60., 90.]), torch.tensor([70., -1., 50.])\n"
        "  both = 0.7 * exam + 0.3 * essay                  -> [77.0, 41.7, 78.0]\n"
        "  torch.where(essay == -1, exam, both)             -> [77.0, 60.0, 78.0]\n"
        "  .mean()                                          -> 71.67, over all three",
    ),
)
