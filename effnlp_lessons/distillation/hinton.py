"""Distillation with soft targets: learn what the teacher gives every class (Hinton, Vinyals, Dean 2015, 1503.02531).

A softmax at temperature T shows how likely the teacher finds the wrong classes too (Eq. 1):
q_i = exp(z_i / T) / sum_j exp(z_j / T). The student is trained at the same T and used at T = 1. With p of the teacher's
logits v, q of the student's z and N classes, C = -sum_i p_i log q_i has the gradient dC/dz_i = (q_i - p_i) / T (Eq. 2).
For a high T it is about (z_i - v_i) / (N T^2) if the logits of each case have mean zero (Eq. 3 and 4). So the soft term
is multiplied by T^2 before the cross-entropy with the labels, at T = 1, is added (sec. 2).

NOTE the specialists of sec. 5 are left out.
NOTE the losses are means over rows. `F.kl_div(..., reduction="mean")` divides by the number of classes too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnlp_lessons.training import Examples, History, TrainingPlan, train

UNLABELLED = -1  # the label of a row without one, as in `datasets.reviews`

# (student logits, teacher logits, labels) -> scalar
LogitLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


# ------------------------------------------------------------------------------------------- soft targets


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}")


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _rows(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None
) -> tuple[Float[Tensor, "rows classes"], Float[Tensor, "rows classes"]]:
    """Both logits of the rows that count, the teacher's detached; half precision becomes float32."""
    if student_logits.shape != teacher_logits.shape or student_logits.ndim < 2:
        raise ValueError(
            "student_logits and teacher_logits must have one shape (rows, classes), "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    student, teacher = _at_least_float32(student_logits), _at_least_float32(teacher_logits.detach())
    teacher = teacher.to(student.dtype)
    if mask is None:
        return student.flatten(0, -2), teacher.flatten(0, -2)
    if mask.dtype != torch.bool or mask.shape != student_logits.shape[:-1]:
        expected = tuple(student_logits.shape[:-1])
        raise ValueError(f"mask must be bool of shape {expected}, got {mask.dtype} {tuple(mask.shape)}")
    return student[mask], teacher[mask]


def _mean(per_row: Float[Tensor, " rows"]) -> Float[Tensor, ""]:
    """Mean over the rows; 0 with a gradient path if there is none."""
    return per_row.sum() / max(len(per_row), 1)


def softened_probabilities(
    logits: Float[Tensor, "*rows classes"], temperature: float
) -> Float[Tensor, "*rows classes"]:
    """Softmax of logits / temperature (Eq. 1): one-hot as the temperature goes to 0, even as it grows.

    Raises:
        ValueError: a temperature that is not finite and > 0.
    """
    _check_temperature(temperature)
    return torch.softmax(logits / temperature, dim=-1)


class _SoftDivergence(torch.autograd.Function):
    """KL(p || q) of every row in nats, with Eq. 2 as its backward.

    What autograd derives from log_softmax is q sum(p) - p, and rounded probabilities do not quite sum to 1. A student
    equal to its teacher would get a gradient of rounding errors, and Adam makes steps of those. Eq. 2 gives 0.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor, temperature: float) -> Tensor:
        p = softened_probabilities(v, temperature)
        log_p, log_q = torch.log_softmax(v / temperature, -1), torch.log_softmax(z / temperature, -1)
        ctx.save_for_backward(z, p)
        ctx.temperature = temperature
        return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)  # 0 log 0 = 0

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        z, p = ctx.saved_tensors
        # dC/dz_i = (q_i - p_i) / T
        return upstream[:, None] * (softened_probabilities(z, ctx.temperature) - p) / ctx.temperature, None, None


def _soft_cross_entropy_rows(z: Tensor, v: Tensor, temperature: float) -> Float[Tensor, " rows"]:
    # -sum p log q = KL(p || q) - sum p log p
    entropy = torch.special.entr(softened_probabilities(v, temperature)).sum(-1)
    return _SoftDivergence.apply(z, v, temperature) + entropy


def soft_cross_entropy(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: float,
    mask: Bool[Tensor, "*rows"] | None = None,
    rescale: bool = True,
) -> Float[Tensor, ""]:
    """T^2 times the cross-entropy of q (student) under p (teacher) at one temperature (sec. 2): nats, mean over rows.

    Args:
        teacher_logits: never gets a gradient.
        mask: True = the row counts; by default all do. Without any the loss is 0.
        rescale: False leaves the factor T^2 out.

    Raises:
        ValueError: shapes that differ, a mask of another shape or dtype, a temperature that is not finite and > 0.
    """
    student, teacher = _rows(student_logits, teacher_logits, mask)
    return _mean(_soft_cross_entropy_rows(student, teacher, temperature)) * (temperature**2 if rescale else 1)


def soft_divergence(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: float,
    mask: Bool[Tensor, "*rows"] | None = None,
    rescale: bool = True,
) -> Float[Tensor, ""]:
    """T^2 KL(p || q): `soft_cross_entropy` less T^2 times the teacher's entropy, which no student changes.

    The gradient is the same; the value is 0 where the student equals the teacher. Arguments and errors as there.
    """
    student, teacher = _rows(student_logits, teacher_logits, mask)
    return _mean(_SoftDivergence.apply(student, teacher, temperature)) * (temperature**2 if rescale else 1)


def soft_gradient(
    student_logits: Float[Tensor, "*rows classes"], teacher_logits: Float[Tensor, "*rows classes"], temperature: float
) -> Float[Tensor, "*rows classes"]:
    """(q - p) / T over the number of rows (Eq. 2): the gradient of both soft losses without their T^2.

    Raises:
        ValueError: shapes that differ, a temperature that is not finite and > 0.
    """
    student, teacher = _rows(student_logits.detach(), teacher_logits, None)
    q, p = softened_probabilities(student, temperature), softened_probabilities(teacher, temperature)
    return ((q - p) / temperature / max(len(q), 1)).view(student_logits.shape)


def logit_matching_loss(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    mask: Bool[Tensor, "*rows"] | None = None,
) -> Float[Tensor, ""]:
    """sum_i (z_i - v_i)^2 / (2 N), each row's logits less their mean: mean over rows (sec. 2.1, Eq. 4).

    `soft_divergence` and its gradient tend to this as the temperature grows. Errors as there.
    """
    student, teacher = _rows(student_logits, teacher_logits, mask)
    difference = student - teacher
    difference = difference - difference.mean(-1, keepdim=True)
    return _mean(difference.square().mean(-1) / 2)


# ------------------------------------------------------------------------------------- labels and the sum


def _check_labels(labels: Tensor, rows: tuple[int, ...], classes: int) -> None:
    if labels.shape != rows or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape {tuple(rows)}, got {labels.dtype} {tuple(labels.shape)}")
    outside = labels[(labels < UNLABELLED) | (labels >= classes)]
    if len(outside):
        raise ValueError(f"labels must be in 0 .. {classes - 1}, or -1 for a row without one, got {int(outside[0])}")


def hard_cross_entropy(
    student_logits: Float[Tensor, "*rows classes"], labels: Int[Tensor, "*rows"]
) -> Float[Tensor, ""]:
    """Cross-entropy with the labels at temperature 1: nats, mean over the rows that have one (-1 = without).

    Raises:
        ValueError: labels that are not one int64 a row, or no class.
    """
    _check_labels(labels, student_logits.shape[:-1], student_logits.shape[-1])
    labelled = labels != UNLABELLED
    return _mean(F.cross_entropy(_at_least_float32(student_logits)[labelled], labels[labelled], reduction="none"))


def distillation_loss(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    labels: Int[Tensor, "*rows"] | None = None,
    *,
    temperature: float,
    soft_weight: float = 0.9,
    mask: Bool[Tensor, "*rows"] | None = None,
    rescale: bool = True,
) -> Float[Tensor, ""]:
    """The paper's loss (sec. 2): a T^2 CE(p, q at T) + (1 - a) CE(label, q at 1), a = `soft_weight`; mean over rows.

    Labels may be known for some of the transfer set only: a row without one has the soft term alone, at weight 1.

    Args:
        teacher_logits: never gets a gradient.
        labels: class of every row, -1 = without one. None: no row has one.
        soft_weight: in [0, 1]. The paper gives the labels much the smaller weight.
        mask: True = the row counts; by default all do. Without any the loss is 0.
        rescale: False leaves the factor T^2 out.

    Raises:
        ValueError: shapes that differ, labels that are no class, a mask of another shape or dtype, a temperature that
            is not finite and > 0, a weight outside [0, 1].
    """
    if not 0 <= soft_weight <= 1:
        raise ValueError(f"soft_weight must be in [0, 1], got {soft_weight}")
    student, teacher = _rows(student_logits, teacher_logits, mask)
    soft = _soft_cross_entropy_rows(student, teacher, temperature) * (temperature**2 if rescale else 1)
    if labels is None:
        return _mean(soft)
    _check_labels(labels, student_logits.shape[:-1], student_logits.shape[-1])
    labels = labels.flatten() if mask is None else labels[mask]
    hard = F.cross_entropy(student, labels, ignore_index=UNLABELLED, reduction="none")
    return _mean(torch.where(labels == UNLABELLED, soft, soft_weight * soft + (1 - soft_weight) * hard))


# ----------------------------------------------------------------------------------------------- teachers


@contextmanager
def _evaluation(model: nn.Module):
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def teacher_logits_of(models: Sequence[nn.Module], *inputs: Any) -> Float[Tensor, "members *rows classes"]:
    """`model(*inputs)` of every teacher, without dropout and without gradients; each keeps the mode that it had.

    Raises:
        ValueError: no model, or a model instead of a list of them.
    """
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        raise ValueError(f"models must be a list of modules, got one {type(models).__name__}: put it in a list")
    if not len(models):
        raise ValueError("models must hold at least one teacher, got none")
    logits = []
    for model in models:
        with torch.no_grad(), _evaluation(model):
            logits.append(model(*inputs))
    return torch.stack(logits)


def ensemble_logits(
    member_logits: Float[Tensor, "members *rows classes"], temperature: float = 1.0, mean: str = "arithmetic"
) -> Float[Tensor, "*rows classes"]:
    """Logits v whose softmax at `temperature` is the mean of the members' softened distributions (sec. 1).

    "arithmetic": softmax(v / T) = the mean of the members' p, so v = T log of it: good at this temperature only.
    "geometric": softmax(v / T) = their geometric mean, normalised: v = the mean of the logits, at any temperature.

    Raises:
        ValueError: no member, another mean, a temperature that is not finite and > 0.
    """
    _check_temperature(temperature)
    if member_logits.ndim < 2 or len(member_logits) == 0:
        raise ValueError(f"member_logits must be (members, rows, classes), got {tuple(member_logits.shape)}")
    if mean == "geometric":
        return member_logits.mean(0)
    if mean != "arithmetic":
        raise ValueError(f"mean must be 'arithmetic' or 'geometric', got {mean!r}")
    log_p = torch.log_softmax(member_logits / temperature, -1)
    return temperature * (log_p.logsumexp(0) - math.log(len(member_logits)))


# ----------------------------------------------------------------------------------------------- training


class WithTeacherLogits:
    """Examples beside their teacher's cached logits: a batch is (*inputs, labels, teacher_logits).

    `teacher_logits[i]` belongs to example i. For reviews: `ReviewExamples(data.subset("train"))` and
    `pretrained.teacher_logits()[data.split == "train"]`.
    """

    def __init__(self, examples: Examples, teacher_logits: Float[Tensor, "examples classes"]) -> None:
        if len(teacher_logits) != len(examples.lengths):
            raise ValueError(
                f"teacher_logits must have a row for each of the {len(examples.lengths)} examples, "
                f"got {len(teacher_logits)}"
            )
        self.examples, self.teacher_logits, self.lengths = examples, teacher_logits, examples.lengths

    def batch(self, indices: list[int]) -> tuple:
        return (*self.examples.batch(indices), self.teacher_logits[indices])


def objective(loss: LogitLoss) -> Callable[[nn.Module, tuple], Tensor]:
    """What `training.train` minimises, from a loss of logits; for batches of `WithTeacherLogits`."""

    def of_batch(student: nn.Module, batch: tuple) -> Tensor:
        *inputs, labels, teacher_logits = batch
        return loss(student(*inputs), teacher_logits, labels)

    return of_batch


def label_objective(model: nn.Module, batch: tuple) -> Tensor:
    """What `training.train` minimises without a teacher: `hard_cross_entropy` of a batch (*inputs, labels)."""
    *inputs, labels = batch
    return hard_cross_entropy(model(*inputs), labels)


def distil(
    student: nn.Module, examples: Examples, teacher_logits: Tensor, loss: LogitLoss, plan: TrainingPlan
) -> History:
    """Train `student` in place on `loss(student_logits, teacher_logits, labels)`; leaves it in evaluation mode.

    `loss` is for example `functools.partial(distillation_loss, temperature=4)`. Errors as in `WithTeacherLogits` and
    `training.train`.
    """
    return train(student, WithTeacherLogits(examples, teacher_logits), objective(loss), plan, progress=False)
