"""Exercise 7 of notebook 02: MiniLM's loss on the relations between values, which the library does not have.

MiniLM (Wang et al. 2020, arXiv 2002.10957, sec. 3): softmax(V V^T / sqrt(d_head)) of the last layer, teacher's against
student's. The widths may differ; the number of heads may not.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def relation_loss(
    student_values: Float[Tensor, "batch heads length d_student"],
    teacher_values: Float[Tensor, "batch heads length d_teacher"],
    key_padding_mask: Bool[Tensor, "batch length"],
) -> Float[Tensor, ""]:
    """KL(teacher || student) in nats between the rows of softmax(V V^T / sqrt(d)), over real tokens (mask True).

    d is each model's own width of a head. Mean over the heads and the real tokens of the batch.
    """

    def log_relations(values: Tensor) -> Tensor:
        scores = values @ values.mT / math.sqrt(values.shape[-1])
        hidden = ~key_padding_mask[:, None, None, :]
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min / 2).log_softmax(dim=-1)

    log_student, log_teacher = log_relations(student_values), log_relations(teacher_values)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)  # (batch, heads, length)
    return divergence.transpose(1, 2)[key_padding_mask].mean()


def _divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


def _real_mean(rows: Tensor, mask: Tensor) -> Tensor:
    """Mean of (batch, heads, length) over heads and real tokens."""
    return rows.transpose(1, 2)[mask].mean()


def _exchange(
    widths: Callable[[int, int], tuple[float, float]] = lambda student, teacher: (student, teacher),
    hide_keys: bool = True,
    fill: float | None = None,
    compare: Callable[[Tensor, Tensor], Tensor] = _divergence,
    average: Callable[[Tensor, Tensor], Tensor] = _real_mean,
) -> Answer:
    """The answer with one step exchanged, for the mistakes.

    Args:
        widths: what stands under the root for student and teacher, of their widths of a head.
        fill: the score of a padded key; half the smallest finite number if None.
        compare: (log student, log teacher) -> rows (batch, heads, length). average: (rows, mask).
    """

    def answer(student_values: Tensor, teacher_values: Tensor, key_padding_mask: Tensor) -> Tensor:
        logs = []
        own = student_values.shape[-1], teacher_values.shape[-1]
        for values, width in zip((student_values, teacher_values), widths(*own), strict=True):
            scores = values @ values.mT / math.sqrt(width)
            if hide_keys:
                low = torch.finfo(scores.dtype).min / 2 if fill is None else fill
                scores = scores.masked_fill(~key_padding_mask[:, None, None, :], low)
            logs.append(scores.log_softmax(-1))
        return average(compare(*logs), key_padding_mask)

    return answer


def _mean_of_means(rows: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([rows[text][:, mask[text]].mean() for text in range(len(rows)) if mask[text].any()]).mean()


def _raw(student_values: Tensor, teacher_values: Tensor, key_padding_mask: Tensor) -> Tensor:
    """The squared error of the relations before the softmax, over pairs of real tokens."""
    student, teacher = (v @ v.mT / math.sqrt(v.shape[-1]) for v in (student_values, teacher_values))
    pairs = key_padding_mask[:, None, :, None] & key_padding_mask[:, None, None, :]
    return (student - teacher).square()[pairs.expand_as(student)].mean()


def _heads_side_by_side(student_values: Tensor, teacher_values: Tensor, key_padding_mask: Tensor) -> Tensor:
    merged = (values.transpose(1, 2).flatten(2)[:, None] for values in (student_values, teacher_values))
    return relation_loss(*merged, key_padding_mask)


def _squared_probabilities(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    return (log_student.exp() - log_teacher.exp()).square().sum(-1)


def _draw(padding: str, equal_widths: bool = False) -> Callable[[Generator], tuple]:
    """Random values, float64; padding "none", "end", "anywhere", "loud" (larger values there) or "a whole text"."""

    def draw(generator: Generator) -> tuple:
        batch, heads, length, d_student = (
            whole_number(*bounds, generator) for bounds in ((2, 3), (2, 4), (4, 6), (2, 4))
        )
        d_teacher = d_student if equal_widths else d_student + whole_number(1, 4, generator)
        student, teacher = (
            torch.randn(batch, heads, length, width, generator=generator, dtype=torch.float64)
            for width in (d_student, d_teacher)
        )
        mask = torch.ones(batch, length, dtype=torch.bool)
        if padding in ("end", "loud"):
            mask[0, -whole_number(1, length - 2, generator) :] = False
        if padding == "anywhere":
            mask[0, 1::2] = False
            mask[1, whole_number(0, length - 1, generator)] = False
        if padding == "a whole text":
            mask[1, -1] = False
            mask[0] = False
        if padding == "loud":
            student = student.where(mask[:, None, :, None], 5 * student)
        return student, teacher, mask

    return draw


RELATION_LOSS = Exercise(
    id="pretraining.relation_loss",
    title="MiniLM's relations between values",
    minutes=25,
    difficulty=3,
    reference=relation_loss,
    properties=(
        Property("heads of equal width, no padding", _draw("none", equal_widths=True), times=1),
        Property("a narrower student, no padding", _draw("none"), times=1),
        Property("padding at the end of a text", _draw("end"), times=2),
        Property("padding anywhere", _draw("anywhere"), times=1),
        Property("what stands in the padding does not matter", _draw("loud"), times=1),
        Property("a text of padding alone counts for nothing", _draw("a whole text"), times=1),
    ),
    mistakes=(
        Mistake(
            "Padded tokens are related to",
            "They take a share of every softmax. Hide the columns of padded keys in both models before it.",
            _exchange(hide_keys=False),
        ),
        Mistake(
            "Rows of padded tokens count",
            "Padded keys are hidden, but a padded token still has a row, and it is in the mean. Count the rows of real "
            "tokens only.",
            _exchange(average=lambda rows, mask: rows.mean()),
        ),
        Mistake(
            "Padding counts like text",
            "Padded keys take a share of every softmax, and rows of padded tokens are in the mean. Hide the ones, "
            "leave out the others.",
            _exchange(hide_keys=False, average=lambda rows, mask: rows.mean()),
        ),
        Mistake(
            "Padding stays in the denominator",
            "Rows of padding are set to 0, and the mean runs over all rows: the same text gets a smaller loss in a "
            "longer batch. Divide by the number of real rows.",
            _exchange(average=lambda rows, mask: (rows * mask[:, None, :]).mean()),
        ),
        Mistake(
            "Minus infinity gives NaN",
            "A padded key then has probability 0 and log-probability -inf, and 0 times -inf is NaN. Hide it with a "
            "large negative finite number: torch.finfo(dtype).min / 2.",
            _exchange(fill=-math.inf),
        ),
        Mistake(
            "The teacher's width for both",
            "Each model is divided by the root of its own width: scores grow with the width of what is multiplied.",
            _exchange(lambda student, teacher: (teacher, teacher)),
        ),
        Mistake(
            "The student's width for both",
            "Each model is divided by the root of its own width: scores grow with the width of what is multiplied.",
            _exchange(lambda student, teacher: (student, student)),
        ),
        Mistake(
            "The widths are exchanged",
            "The student's scores are divided by the root of d_student, the teacher's by that of d_teacher.",
            _exchange(lambda student, teacher: (teacher, student)),
        ),
        Mistake(
            "The scores are not scaled",
            "Divide V V^T by the square root of the width of a head, each model by its own.",
            _exchange(lambda student, teacher: (1, 1)),
        ),
        Mistake(
            "Divided by the width, not by its root",
            "As in attention: the square root of the width of a head.",
            _exchange(lambda student, teacher: (student**2, teacher**2)),
        ),
        Mistake(
            "The direction is reversed",
            "The teacher's probabilities are the weights: sum p_teacher (log p_teacher - log p_student).",
            _exchange(compare=lambda student, teacher: _divergence(teacher, student)),
        ),
        Mistake(
            "Cross-entropy in place of the divergence",
            "The gradient is the same; the value is larger by the teacher's entropy. Subtract it.",
            _exchange(compare=lambda student, teacher: -(teacher.exp() * student).sum(-1)),
        ),
        Mistake(
            "A mean over the keys, too",
            "A divergence is a sum over all that is chosen from, here the keys of a row. The mean is over rows.",
            _exchange(compare=lambda student, teacher: (teacher.exp() * (teacher - student)).mean(-1)),
        ),
        Mistake(
            "Probabilities compared by their squared error",
            "MiniLM compares the rows by the divergence, which also sees small probabilities.",
            _exchange(compare=_squared_probabilities),
        ),
        Mistake(
            "The softmax is missing",
            "You compare V V^T / sqrt(d) by the squared error, as TinyBERT does with attention scores. MiniLM takes "
            "the softmax of every row first, then the divergence.",
            _raw,
        ),
        Mistake(
            "The heads are summed",
            "The mean is over the heads, too. Did you divide by the number of tokens alone?",
            lambda student, teacher, mask: relation_loss(student, teacher, mask) * student.shape[1],
        ),
        Mistake(
            "One relation for all heads",
            "You put the heads side by side, and make one table. Each head has a table of its own; that is why the "
            "numbers of heads must agree.",
            _heads_side_by_side,
        ),
        Mistake(
            "A mean of every text, then the mean of these",
            "A token of a short text then weighs more than one of a long text. Take one mean over all real tokens.",
            _exchange(average=_mean_of_means),
        ),
    ),
    hints=(
        "V V^T has the shape of attention scores, (batch, heads, length, length), whatever the width of a head is. So "
        "treat it like attention: scale, hide the padded keys, softmax. Do that for both models, each with its own "
        "width, then compare row by row.",
        "log_softmax of both, then (p_teacher * (log_teacher - log_student)).sum(-1): one number for each row, (batch, "
        "heads, length). Which of these rows belong to real tokens? `rows.transpose(1, 2)[key_padding_mask]` picks "
        "them, (real tokens, heads).",
        "A neighbour: how alike three cities are by two guide books, one with 2 marks a city, one with 4; city 2 is "
        "closed.\n"
        "  book = torch.tensor([[1., 0.], [0., 2.], [9., 9.]])\n"
        "  alike = book @ book.T / 2 ** 0.5                   3 x 3, for 4 marks / 4 ** 0.5, and 3 x 3 as well\n"
        "  alike[:, 2] = torch.finfo(alike.dtype).min / 2     nobody is like the closed one\n"
        "  alike.log_softmax(-1).exp()                        rows 0 and 1: [0.67, 0.33, 0], [0.06, 0.94, 0]\n"
        "Row 2 is there as well. It is a row of the closed city: leave it out when you take the mean.",
    ),
)
