"""Exercise 2 of notebook 01: the gradient of the soft loss by hand.

Hinton, Vinyals, Dean 2015 (arXiv 1503.02531, Eq. 2): dC/dz_i = (q_i - p_i) / T for one row, without the factor T^2.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def soft_gradient(
    student_logits: Float[Tensor, "rows classes"], teacher_logits: Float[Tensor, "rows classes"], temperature: float
) -> Float[Tensor, "rows classes"]:
    """Gradient of the mean over rows of C = - sum_i p_i log q_i at the student's logits: (q - p) / T over the rows."""
    q = (student_logits / temperature).softmax(dim=-1)
    p = (teacher_logits / temperature).softmax(dim=-1)
    return (q - p) / temperature / len(q)


def _exchange(
    scale: Callable[[float, Tensor], float] = lambda temperature, q: 1 / (temperature * len(q)),
    student: Callable[[float], float] = lambda temperature: temperature,
    teacher: Callable[[float], float] = lambda temperature: temperature,
    dim: int = -1,
) -> Answer:
    """q - p with another factor `scale(T, q)`, other temperatures or another dimension, for the mistakes."""

    def answer(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        q = (student_logits / student(temperature)).softmax(dim)
        p = (teacher_logits / teacher(temperature)).softmax(dim)
        return (q - p) * scale(temperature, q)

    return answer


def _by_autograd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    student = student_logits.clone().requires_grad_()
    log_q = (student / temperature).log_softmax(-1)
    loss = -((teacher_logits / temperature).softmax(-1) * log_q).sum() / len(student)
    return torch.autograd.grad(loss, student)[0]


def _of_the_squared_difference(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The gradient of half the squared difference of the probabilities."""
    q, p = ((x / temperature).softmax(-1) for x in (student_logits, teacher_logits))
    return q * ((q - p) - (q * (q - p)).sum(-1, keepdim=True)) / temperature / len(q)


def _without_autograd(fn: Answer, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    with torch.inference_mode():
        return fn(student_logits, teacher_logits, temperature)


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


ABOVE_ONE = (2.0, 3.0, 5.0, 8.0)

SOFT_GRADIENT = Exercise(
    id="distillation.soft_gradient",
    title="the gradient by hand",
    minutes=15,
    difficulty=2,
    reference=soft_gradient,
    properties=(
        Property("one row at temperature 1", _draw((1, 1), (1.0,))),
        Property("several rows at temperature 1", _draw((2, 4), (1.0,))),
        Property("one row at another temperature", _draw((1, 1), ABOVE_ONE)),
        Property("several rows at another temperature", _draw((2, 4), (0.5, *ABOVE_ONE))),
        Property("a student that equals its teacher gets no gradient", _draw((2, 4), ABOVE_ONE, equal=True), times=1),
        Property("autograd is switched off", _draw((2, 4), ABOVE_ONE), observe=_without_autograd, times=1),
        Property("float32 stays float32", _draw((2, 4), ABOVE_ONE, torch.float32), times=1),
    ),
    mistakes=(
        Mistake(
            "The factor 1 / T is missing",
            "The loss sees the logits divided by T, so the chain rule gives one more factor 1 / T.",
            _exchange(lambda temperature, q: 1 / len(q)),
        ),
        Mistake(
            "1 / T comes in twice",
            "One factor 1 / T comes from the chain rule. The other 1 / T of the paper's limit for high temperatures "
            "is hidden in q - p already: softened probabilities lie closer together.",
            _exchange(lambda temperature, q: 1 / (temperature**2 * len(q))),
        ),
        Mistake(
            "The gradient of T squared times the loss",
            "The loss of this exercise has no factor T². With it the gradient is T² times as large, T (q - p).",
            _exchange(lambda temperature, q: temperature / len(q)),
        ),
        Mistake(
            "The sign is wrong",
            "This is p - q, the direction of a step downhill. The gradient points uphill: where the student gives a "
            "class more than the teacher does, a larger logit makes the loss larger. q - p.",
            _exchange(lambda temperature, q: -1 / (temperature * len(q))),
        ),
        Mistake(
            "The rows are not averaged",
            "The loss is a mean over the rows, so each row's gradient is divided by their number.",
            _exchange(lambda temperature, q: 1 / temperature),
        ),
        Mistake(
            "The mean runs over the classes, too",
            "Divide by the number of rows alone, not by rows times classes.",
            _exchange(lambda temperature, q: 1 / (temperature * q.numel())),
        ),
        Mistake(
            "The probabilities are those at temperature 1",
            "q and p are softmaxes of logits / T. Dividing the difference by T at the end does not soften them.",
            _exchange(student=lambda temperature: 1.0, teacher=lambda temperature: 1.0),
        ),
        Mistake(
            "Only the teacher is softened",
            "Divide the student's logits by the temperature, too.",
            _exchange(student=lambda temperature: 1.0),
        ),
        Mistake(
            "Only the student is softened",
            "Divide the teacher's logits by the temperature, too.",
            _exchange(teacher=lambda temperature: 1.0),
        ),
        Mistake(
            "The softmax is differentiated once more",
            "This is the gradient of a squared difference of probabilities. In the cross-entropy the logarithm "
            "cancels the softmax's derivative: q - p is all that is left.",
            _of_the_squared_difference,
        ),
        Mistake(
            "The softmax runs over the rows",
            "The classes of one row compete with each other: dim=-1.",
            _exchange(dim=0),
        ),
        Mistake(
            "Autograd does the work",
            "The values are right. The exercise asks for the formula: two softmaxes and a subtraction.",
            _by_autograd,
        ),
    ),
    hints=(
        "Begin with one row and T = 1, where C = - sum_i p_i log q_i. Write log q_i = z_i - log sum_j exp(z_j), and "
        "use that the p_i sum to 1.",
        "With T = 1: C = - sum_i p_i z_i + log sum_j exp(z_j). What is the derivative of each of the two terms? Then "
        "put z / T in place of z (chain rule), and remember that C is a mean over the rows.",
        "A neighbour: one class or none, with a sigmoid. C = - p log s - (1 - p) log (1 - s), s = sigmoid(z / T).\n"
        "  dC/d(z / T) = s - p            the logarithm cancels the derivative of the sigmoid\n"
        "  dC/dz       = (s - p) / T      chain rule\n"
        "For p = 0.3, z = 2 and T = 4: s = sigmoid(0.5) = 0.622, so dC/dz = 0.322 / 4 = 0.081.\n"
        "For the mean over 10 such rows, each row's derivative is a tenth of that.",
    ),
)
