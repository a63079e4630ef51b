"""Exercise 7 of notebook 01: a training loop of one's own, judged by a digit that the student never saw.

Hinton, Vinyals, Dean 2015 (arXiv 1503.02531, sec. 3). The transfer set has no 3. Every student is judged by the same
test: it must agree with its teacher on the other digits, and find the threes when their bias is raised by 1.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from effnlp_lessons.datasets.digits import load_digits
from effnlp_lessons.distillation.hinton import label_objective, teacher_logits_of
from effnlp_lessons.distillation.omitted_digit import DigitExamples, digit_network, rows_without, shift_bias_
from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number
from effnlp_lessons.training import TrainingPlan, train

OMITTED = 3
ROWS = 300  # images of a transfer set
HIDDEN = 32  # units of a student
BIAS = 1.0  # added to the bias of the omitted digit before a student is judged

# Where a student is judged. Over many draws, distilled students and wrong ones stay well away from each bound.
LEAST_AGREEMENT = 0.84  # with the teacher, on digits that were shown
LEAST_FOUND = 0.4  # of the threes
MOST_TAKEN_FOR_IT = 0.07  # of the other digits, when the bias is raised
LARGEST_LOGITS = 3.0  # standard deviation over the teacher's

Loss = Callable[[Tensor, Tensor], Tensor]  # (student logits, teacher logits) -> scalar


def distil_digits(
    student: nn.Module, images: Float[Tensor, "rows 784"], teacher_logits: Float[Tensor, "rows 10"]
) -> nn.Module:
    """Train `student` in place on the teacher's soft targets for the images; return it in evaluation mode."""
    return _train(student, images, teacher_logits, _soft_loss)


def _soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    p = F.softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def _train(
    student: nn.Module,
    images: Tensor,
    teacher_logits: Tensor,
    loss: Loss,
    zero_gradients: bool = True,
    step: bool = True,
    evaluation: bool = True,
) -> nn.Module:
    """60 steps of Adam on the whole transfer set; the switches leave out one thing each, for the mistakes."""
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    student.train()
    for _ in range(60):
        if zero_gradients:
            optimizer.zero_grad()
        loss(student(images), teacher_logits).backward()
        if step:
            optimizer.step()
    return student.eval() if evaluation else student


def _with_loss(loss: Loss, **switches: bool) -> Answer:
    return lambda student, images, teacher_logits: _train(student, images, teacher_logits, loss, **switches)


# ----------------------------------------------------------------------------- the transfer set


class _Student(nn.Sequential):
    """A small network for digits that is printed on one line."""

    number: int  # tells one drawn student from another

    def __repr__(self) -> str:
        return f"network 784-{self[0].out_features}-10, number {self.number}"


@functools.cache
def _teacher_and_digits() -> tuple[DigitExamples, Tensor, DigitExamples, Tensor]:
    """Digits to learn from and digits to judge by, each with the logits of a teacher that learned all ten."""
    digits = load_digits()
    learn, judge = (DigitExamples(digits.subset(split)) for split in ("train", "test"))
    teacher = digit_network((100,), dropout=0.3, seed=1)
    plan = TrainingPlan(epochs=5, batch_size=100, learning_rate=3e-3, seed=0)
    train(teacher, learn, label_objective, plan, progress=False)
    logits = (teacher_logits_of([teacher], examples.pixels)[0] for examples in (learn, judge))
    return learn, next(logits), judge, next(logits)


def transfer_set(seed: int, rows: int = ROWS) -> tuple[nn.Module, Float[Tensor, "rows 784"], Float[Tensor, "rows 10"]]:
    """A fresh student, images without a 3, and their teacher's logits: what the exercise's function gets.

    Images of other digits that the teacher takes for a 3 are left out, too: 3 is never its best class.
    """
    return _draw_lesson(torch.Generator().manual_seed(seed), rows, HIDDEN)


def _draw_lesson(generator: Generator, rows: int, hidden: int) -> tuple[nn.Module, Tensor, Tensor]:
    learn, logits, _, _ = _teacher_and_digits()
    number = whole_number(0, 2**31 - 1, generator)
    student = _Student(*digit_network((hidden,), dropout=0.0, seed=number))
    student.number = number
    shown = rows_without(learn.labels, OMITTED) & rows_without(logits.argmax(-1), OMITTED)
    shown = shown.nonzero().flatten()
    chosen = shown[torch.randperm(len(shown), generator=generator)[:rows]]
    return student, learn.pixels[chosen], logits[chosen]


# ----------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Verdict:
    """What became of a student, in words that are compared, and figures that are only shown."""

    words: str
    figures: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Verdict) and self.words == other.words

    __hash__ = None

    def __repr__(self) -> str:
        return f"{self.words} ({self.figures})" if self.figures else self.words


def judge(student: nn.Module) -> Verdict:
    """How the student does on the test digits: first as it is, then with the bias of the 3 raised by 1."""
    _, _, examples, teacher_logits = _teacher_and_digits()
    raised = copy.deepcopy(student).eval()
    shift_bias_(raised[-1], OMITTED, BIAS)
    with torch.no_grad():
        logits, after = copy.deepcopy(student).eval()(examples.pixels), raised(examples.pixels).argmax(-1)
    if not logits.isfinite().all():
        return Verdict("its logits are not numbers")
    threes = examples.labels == OMITTED
    agreement = (logits.argmax(-1) == teacher_logits.argmax(-1))[~threes].float().mean().item()
    found, taken = ((after == OMITTED)[rows].float().mean().item() for rows in (threes, ~threes))
    size = (_centred(logits).std() / _centred(teacher_logits).std()).item()
    figures = (
        f"agrees with the teacher on {agreement:.0%} of the other digits; with the bias raised it finds {found:.0%} of "
        f"the threes and takes {taken:.0%} of the others for one; its logits are {size:.2g} times the teacher's"
    )
    if size > LARGEST_LOGITS:
        return Verdict("its logits are far larger than the teacher's", figures)
    if agreement < LEAST_AGREEMENT:
        return Verdict("it has learned little of the digits that it was shown", figures)
    if taken > MOST_TAKEN_FOR_IT:
        return Verdict("it takes many other digits for a 3", figures)
    if found < LEAST_FOUND:
        return Verdict("it finds few of the threes", figures)
    return Verdict("it finds most of the threes", figures)


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def _seeded(fn: Answer, student: nn.Module, images: Tensor, teacher_logits: Tensor) -> nn.Module:
    """`fn`, which may draw batches at random, with the same draws every time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return fn(student, images, teacher_logits)


def _remembered(observe: Callable[..., Any]) -> Callable[..., Any]:
    """`observe`, which trains every listed mistake on a drawn student once, and not again to name a cause."""
    known: dict[tuple[Answer, int], Any] = {}

    def observe_once(fn: Answer, student: nn.Module, images: Tensor, teacher_logits: Tensor) -> Any:
        listed = fn is distil_digits or any(fn is mistake.answer for mistake in DISTIL_DIGITS.mistakes)
        if not listed:
            return observe(fn, student, images, teacher_logits)
        if (fn, student.number) not in known:
            known[fn, student.number] = observe(fn, student, images, teacher_logits)
        return known[fn, student.number]

    return observe_once


@_remembered
def _what_comes_back(fn: Answer, student: nn.Module, images: Tensor, teacher_logits: Tensor) -> dict[str, bool]:
    before = copy.deepcopy(student)
    given_back = _seeded(fn, student, images, teacher_logits)
    moved = any(not torch.equal(*pair) for pair in zip(before.parameters(), student.parameters(), strict=True))
    in_evaluation = not any(part.training for part in student.modules())
    other = _seeded(fn, before, images, _wrong_classes_turned_round(teacher_logits))
    with torch.no_grad():
        changes = (given_back.eval()(images) - other.eval()(images)).abs().amax()
    return {
        "it is the student that was given": given_back is student,
        "its weights have moved": moved,
        "its weights are numbers": all(bool(weight.isfinite().all()) for weight in student.parameters()),
        "it is in evaluation mode": in_evaluation,
        "what the teacher gives the wrong classes makes a difference": bool(changes > 1e-3),
    }


def _wrong_classes_turned_round(logits: Tensor) -> Tensor:
    """Each row's best logit stays; the others are dealt out in the opposite order."""
    ordered, classes = logits.sort(dim=-1, descending=True)
    turned = torch.cat([ordered[:, :1], ordered[:, 1:].flip(-1)], dim=-1)
    return torch.zeros_like(logits).scatter(-1, classes, turned)


@_remembered
def _verdict(fn: Answer, student: nn.Module, images: Tensor, teacher_logits: Tensor) -> Verdict:
    return judge(_seeded(fn, student, images, teacher_logits))


def _draw(rows: int, hidden: int) -> Callable[[Generator], tuple]:
    return lambda generator: _draw_lesson(generator, rows, hidden)


DISTIL_DIGITS = Exercise(
    id="distillation.distil_digits",
    title="a digit that the student never saw",
    minutes=30,
    difficulty=3,
    reference=distil_digits,
    properties=(
        Property(
            "the student that is given learns from all that the teacher says, and is given back",
            _draw(64, 8),
            _what_comes_back,
            times=1,
        ),
        Property(
            "no 3 was shown, and most are found when the bias of the 3 is raised by 1",
            _draw(ROWS, HIDDEN),
            _verdict,
            times=1,
        ),
    ),
    mistakes=(
        Mistake(
            "The student learns the teacher's best class alone",
            "After argmax the teacher is no more than a labeller. That an 8 looks a little like a 3 is lost, and with "
            "it all that the student could have known of threes. Train on the softened probabilities.",
            _with_loss(lambda z, v: F.cross_entropy(z, v.argmax(-1))),
        ),
        Mistake(
            "The teacher's side is softer than the student's",
            "The student learns to give flat probabilities at temperature 1, with logits far smaller than the "
            "teacher's, so that a bias of 1 outweighs them. Divide both by the same temperature, and take no second "
            "softmax of the teacher's probabilities.",
            _with_loss(lambda z, v: F.cross_entropy(z, (v / 4).softmax(-1))),
        ),
        Mistake(
            "The student's side is softer than the teacher's",
            "To give the teacher's sharp probabilities in spite of its own softening, the student needs far larger "
            "logits. Divide both by the same temperature. F.kl_div and F.cross_entropy also do this if the student's "
            "probabilities come in place of log-probabilities or of logits.",
            _with_loss(lambda z, v: F.cross_entropy(z / 8, v.softmax(-1))),
        ),
        Mistake(
            "The student hardly learns",
            "Usual reasons: the gradients of earlier steps are not set to zero (optimizer.zero_grad() in every step), "
            "or the steps are too few or too small (plain SGD without the factor T² makes tiny ones).",
            _with_loss(_soft_loss, zero_gradients=False),
        ),
        Mistake(
            "The weights never move",
            "backward() computes gradients and changes no weight. optimizer.step() does, if the optimizer was given "
            "this student's parameters.",
            _with_loss(_soft_loss, step=False),
        ),
        Mistake(
            "A copy is trained and given back",
            "The function is asked to train the student that it gets. The caller holds that one, and it is untrained.",
            lambda student, images, teacher_logits: distil_digits(copy.deepcopy(student), images, teacher_logits),
        ),
        Mistake(
            "The weights become NaN",
            "Usual reason: the arguments of F.kl_div are exchanged, and it takes the logarithm of negative numbers. "
            "First the student's log-probabilities, then the teacher's probabilities. A learning rate that is far too "
            "high can do it, too.",
            _with_loss(lambda z, v: F.kl_div(v.softmax(-1), z.log_softmax(-1), reduction="batchmean")),
        ),
        Mistake(
            "The student stays in training mode",
            "It has learned all that it should. With dropout in it, it would now give other answers every time: end "
            "with student.eval().",
            _with_loss(_soft_loss, evaluation=False),
        ),
    ),
    hints=(
        "Every step: zero the gradients, student logits, loss, backward, step. The loss is that of exercise 1; write "
        "it into this function. No label is needed.",
        "300 images are few: give the student all of them in each step. Adam with a learning rate of 5e-3 and 60 steps "
        "is enough, at temperature 4. Divide the logits of both by it. End with `student.eval()` and return the "
        "student.",
        "A neighbour: fit a line to four points.\n"
        "  line = torch.nn.Linear(1, 1)\n"
        "  x, y = torch.tensor([[0.], [1.], [2.], [3.]]), torch.tensor([[1.], [3.], [5.], [7.]])\n"
        "  optimizer = torch.optim.Adam(line.parameters(), lr=0.1)\n"
        "  for _ in range(200):\n"
        "      optimizer.zero_grad()\n"
        "      loss = (line(x) - y).square().mean()\n"
        "      loss.backward()\n"
        "      optimizer.step()\n"
        "  line.weight, line.bias          -> about 2 and 1\n"
        "There the target is a number for each point. Here it is a distribution for each image.",
    ),
)
