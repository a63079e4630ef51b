"""Exercise 5 of notebook 01: the soft targets of several teachers.

Hinton, Vinyals, Dean 2015 (arXiv 1503.02531, sec. 1): an ensemble is distilled into one student. The paper allows the
arithmetic or the geometric mean of the members; here it is the arithmetic one.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def ensemble_targets(
    member_logits: Float[Tensor, "members rows classes"], temperature: float
) -> Float[Tensor, "rows classes"]:
    """Arithmetic mean of the members' softmaxes at the temperature."""
    return (member_logits / temperature).softmax(dim=-1).mean(dim=0)


def _of(targets: Callable[[Tensor], Tensor]) -> Answer:
    """Targets from the members' softened log-probabilities (members, rows, classes), for the mistakes."""
    return lambda member_logits, temperature: targets((member_logits / temperature).log_softmax(-1))


def _majority(member_logits: Tensor, temperature: float) -> Tensor:
    votes = torch.nn.functional.one_hot(member_logits.argmax(-1), member_logits.shape[-1])
    return votes.to(member_logits.dtype).mean(0)


def _softened_at_the_end(member_logits: Tensor, temperature: float) -> Tensor:
    mean = member_logits.softmax(-1).mean(0)
    return (mean.log() / temperature).softmax(-1)


def _softmax_of_the_mean(member_logits: Tensor, temperature: float) -> Tensor:
    return (member_logits.softmax(-1).mean(0) / temperature).softmax(-1)


def _draw(
    members: tuple[int, int], temperatures: tuple[float, ...], dtype: torch.dtype = torch.float64
) -> Callable[[Generator], tuple]:
    def draw(generator: Generator) -> tuple:
        shape = (whole_number(*members, generator), *(whole_number(*b, generator) for b in ((2, 4), (3, 5))))
        temperature = temperatures[whole_number(0, len(temperatures) - 1, generator)]
        return 2 * torch.randn(shape, generator=generator, dtype=dtype), temperature

    return draw


ABOVE_ONE = (2.0, 3.0, 5.0)

ENSEMBLE_TARGETS = Exercise(
    id="distillation.ensemble_targets",
    title="the targets of several teachers",
    minutes=10,
    difficulty=2,
    reference=ensemble_targets,
    properties=(
        Property("one member: its softmax", _draw((1, 1), (1.0,)), times=1),
        Property("one member at another temperature", _draw((1, 1), ABOVE_ONE), times=1),
        Property("several members at temperature 1", _draw((2, 5), (1.0,))),
        Property("several members at another temperature", _draw((2, 5), (0.5, *ABOVE_ONE))),
        Property("float32 stays float32", _draw((2, 5), ABOVE_ONE, torch.float32), times=1),
    ),
    mistakes=(
        Mistake(
            "The logits are averaged",
            "The softmax of mean logits is the geometric mean of the distributions, made to sum to 1: one member that "
            "finds a class impossible rules it out. Take each member's softmax first, then the mean.",
            _of(lambda log_p: log_p.mean(0).softmax(-1)),
        ),
        Mistake(
            "The logarithms are averaged, and the sum is not 1",
            "exp of the mean logarithm is a geometric mean, and its rows sum to less than 1. "
            "Average the probabilities themselves.",
            _of(lambda log_p: log_p.mean(0).exp()),
        ),
        Mistake(
            "The mean is softened, not the members",
            "You average at temperature 1 and soften the mean. That is another distribution: divide each member's "
            "logits by the temperature first.",
            _softened_at_the_end,
        ),
        Mistake(
            "The softmax is taken twice",
            "A mean of probabilities is a distribution already. It needs no second softmax.",
            _softmax_of_the_mean,
        ),
        Mistake(
            "The temperature is ignored",
            "These are the targets at temperature 1. Divide the logits by the temperature.",
            lambda member_logits, temperature: member_logits.softmax(-1).mean(0),
        ),
        Mistake(
            "A majority vote",
            "Each member's best class is all that is left. What it gives the other classes is what a student learns "
            "from: average the probabilities.",
            _majority,
        ),
        Mistake(
            "The members are summed",
            "Divide by their number, so that each row sums to 1.",
            _of(lambda log_p: log_p.exp().sum(0)),
        ),
        Mistake(
            "The mean runs over the rows",
            "The members are the first dimension. Average over dim=0 and keep rows and classes.",
            _of(lambda log_p: log_p.exp().mean(1)),
        ),
        Mistake(
            "The softmax runs over the members",
            "For each member the classes of a row sum to 1: dim=-1.",
            lambda member_logits, temperature: (member_logits / temperature).softmax(0).mean(0),
        ),
        Mistake(
            "The most certain member decides",
            "You keep the largest probability of each class. The rows then sum to more than 1. Take the mean.",
            _of(lambda log_p: log_p.exp().amax(0)),
        ),
    ),
    hints=(
        "What would you do with one member? Which of the three dimensions has to sum to 1 then?",
        "First a distribution for every member and row, then the mean over the members. The order matters: the mean "
        "of softmaxes is not the softmax of a mean.",
        "A neighbour: two thermometers give 1 and 100 degrees. Their arithmetic mean is (1 + 100) / 2 = 50.5, their "
        "geometric mean sqrt(1 * 100) = 10. A mean of logarithms is the logarithm of the geometric mean:\n"
        "  torch.tensor([1., 100.]).log().mean().exp()     -> 10.0\n"
        "  torch.tensor([1., 100.]).mean()                 -> 50.5\n"
        "Logits are logarithms of probabilities, up to a constant for each row.",
    ),
)
