"""Exercise 1 of notebook 01: the loss with soft targets. Blanks in a worked example.

Hinton, Vinyals, Dean 2015 (arXiv 1503.02531, sec. 2), as a divergence: zero where the student equals its teacher.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def soft_loss(
    student_logits: Float[Tensor, "rows classes"], teacher_logits: Float[Tensor, "rows classes"], temperature: float
) -> Float[Tensor, ""]:
    """T^2 KL(p || q) in nats, mean over rows; p and q are the teacher's and the student's softmax at temperature T."""
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    p = F.softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), mean over rows."""
    return (log_p.exp() * (log_p - log_q)).sum() / len(log_p)


def _exchange(
    factor: Callable[[float], float] = lambda temperature: temperature**2,
    student: Callable[[float], float] = lambda temperature: temperature,
    teacher: Callable[[float], float] = lambda temperature: temperature,
    dim: int = -1,
    of: Callable[[Tensor, Tensor], Tensor] = _divergence,
) -> Answer:
    """The answer with one step exchanged, for the mistakes.

    Args:
        factor: what the mean is multiplied by.
        student, teacher: what each side's logits are divided by.
        dim: along which the softmax runs.
        of: the loss of both log-probabilities (teacher's, student's).
    """

    def answer(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        log_p = (teacher_logits / teacher(temperature)).log_softmax(dim)
        log_q = (student_logits / student(temperature)).log_softmax(dim)
        return factor(temperature) * of(log_p, log_q)

    return answer


def _twice(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Probabilities stand where scores are expected: each side goes through two softmaxes."""
    student, teacher = ((x / temperature).softmax(-1) for x in (student_logits, teacher_logits))
    return soft_loss(temperature * student, temperature * teacher, temperature)


def _gradient(fn: Answer, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The gradient that the student's logits get."""
    student_logits = student_logits.clone().requires_grad_()
    return torch.autograd.grad(fn(student_logits, teacher_logits, temperature), student_logits)[0]


def _draw(
    rows: tuple[int, int], temperatures: tuple[float, ...], dtype: torch.dtype = torch.float64, equal: bool = False
) -> Callable[[Generator], tuple]:
    """Random logits of both and one of the temperatures; `equal`: the student gives what the teacher gives."""

    def draw(generator: Generator) -> tuple:
        shape = whole_number(*rows, generator), whole_number(3, 6, generator)
        student, teacher = 2 * torch.randn(2, *shape, generator=generator, dtype=dtype)
        temperature = temperatures[whole_number(0, len(temperatures) - 1, generator)]
        return teacher.clone() if equal else student, teacher, temperature

    return draw


ABOVE_ONE = (2.0, 3.0, 4.0, 8.0)

SOFT_LOSS = Exercise(
    id="distillation.soft_loss",
    title="the loss with soft targets",
    minutes=10,
    difficulty=1,
    reference=soft_loss,
    properties=(
        Property("one row at temperature 1", _draw((1, 1), (1.0,))),
        Property("several rows at temperature 1: their mean", _draw((2, 5), (1.0,))),
        Property("a temperature above 1", _draw((2, 5), ABOVE_ONE)),
        Property("a temperature below 1", _draw((2, 5), (0.5, 0.25)), times=1),
        Property("a student that equals its teacher has nothing to learn", _draw((2, 5), ABOVE_ONE, equal=True)),
        Property("the gradient of the student's logits", _draw((2, 5), ABOVE_ONE), observe=_gradient, times=1),
        Property("float32 stays float32", _draw((2, 5), ABOVE_ONE, torch.float32), times=1),
    ),
    mistakes=(
        Mistake(
            "The divergence is taken the other way round",
            "You computed KL(q || p), which weighs the classes by the student's probabilities. Asked is KL(p || q): "
            "p, the teacher's, stands in front of the logarithm. F.kl_div takes log q first, then p.",
            _exchange(of=lambda log_p, log_q: _divergence(log_q, log_p)),
        ),
        Mistake(
            "The factor T squared is missing",
            "The gradient of a softened loss shrinks like 1 / T². Multiply by temperature ** 2, so that another "
            "temperature does not mean another learning rate.",
            _exchange(lambda temperature: 1.0),
        ),
        Mistake(
            "The factor is T and not T squared",
            "1 / T comes in twice: once from dividing the logits, once because the softened distributions are "
            "closer to each other. Multiply by temperature ** 2.",
            _exchange(lambda temperature: temperature),
        ),
        Mistake(
            "The mean runs over the classes, too",
            'F.kl_div(..., reduction="mean") divides by rows times classes. A divergence is a sum over the classes; '
            'only the rows are averaged: reduction="batchmean".',
            _exchange(of=lambda log_p, log_q: _divergence(log_p, log_q) / log_p.shape[-1]),
        ),
        Mistake(
            "The rows are summed",
            'Divide by the number of rows (reduction="batchmean"): the loss must not grow with the batch.',
            _exchange(of=lambda log_p, log_q: _divergence(log_p, log_q) * len(log_p)),
        ),
        Mistake(
            "Only the teacher is softened",
            "The student's logits must be divided by the temperature, too. As it is, the student has to give flat "
            "probabilities at temperature 1.",
            _exchange(student=lambda temperature: 1.0),
        ),
        Mistake(
            "Only the student is softened",
            "The teacher's logits must be divided by the temperature, too. As it is, the targets are hardly soft.",
            _exchange(teacher=lambda temperature: 1.0),
        ),
        Mistake(
            "The logits are multiplied by the temperature",
            "Divide. A high temperature makes the probabilities more even.",
            _exchange(student=lambda temperature: 1 / temperature, teacher=lambda temperature: 1 / temperature),
        ),
        Mistake(
            "F.kl_div gets the student's probabilities",
            "Its first argument holds log-probabilities: F.log_softmax. It does not take the logarithm for you.",
            _exchange(of=lambda log_p, log_q: (log_p.exp() * (log_p - log_q.exp())).sum() / len(log_p)),
        ),
        Mistake(
            "F.kl_div takes the teacher's log-probabilities for probabilities",
            "The second argument holds probabilities, F.softmax, unless you say log_target=True. "
            "The logarithm of a negative number is NaN.",
            _exchange(of=lambda log_p, log_q: (log_p * (log_p.log() - log_q)).sum() / len(log_p)),
        ),
        Mistake(
            "The softmax is taken twice",
            "Probabilities went where scores belong. F.log_softmax and F.softmax both take logits / temperature.",
            _twice,
        ),
        Mistake(
            "The softmax runs over the rows",
            "The classes of one row compete with each other: dim=-1.",
            _exchange(dim=0),
        ),
        Mistake(
            "The cross-entropy, not the divergence",
            "- sum p log q has the same gradient, but it is not zero for a student that equals its teacher. "
            "The divergence is smaller by the teacher's entropy, - sum p log p.",
            _exchange(of=lambda log_p, log_q: -(log_p.exp() * log_q).sum() / len(log_p)),
        ),
    ),
    hints=(
        "Follow the table above with one row. Which of its lines are done, and which line is missing?",
        "F.kl_div takes the student's log-probabilities first and the teacher's probabilities second, and returns "
        'KL(p || q). Which `reduction` divides the sum by the number of rows alone? "mean" does not.',
        "A neighbour: how far is a weather forecast from a better one, for two days with three kinds of weather?\n"
        "  better   = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])\n"
        "  forecast = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])\n"
        "  per_day = (better * (better.log() - forecast.log())).sum(dim=-1)      -> [0.0851, 0.0000]\n"
        "  per_day.sum() / len(per_day)                                          -> 0.0426 per day\n"
        '  F.kl_div(forecast.log(), better, reduction="batchmean")               -> 0.0426\n'
        "There the probabilities are given. Here they come from logits, divided by the temperature, and the mean "
        "is multiplied by temperature ** 2.",
    ),
)
