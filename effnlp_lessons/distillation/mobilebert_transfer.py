"""MobileBERT's losses (Sun et al. 2020, arXiv 2004.02984, sec. 3.5): maps and attention of every block, masked words.

Teacher and student have equally many blocks, equally wide maps H between them and equally many attention heads, so
each block l has two losses that need no projection (Eq. 2 and 3), and the whole model a third one (Eq. 4):

    feature maps   L_FMT = 1/(T N) sum_t,n (H_teacher - H_student)²
    attention      L_AT  = 1/(T A) sum_t,a KL(softmax of the teacher's scores || of the student's)
    pre-training   L_PD  = alpha L_MLM + (1 - alpha) L_KD          alpha 0.5, temperature 1

NOTE L_PD of the paper also has the next-sentence loss. It is not taught here: the transfer does not touch it.
NOTE the released code takes its transfer losses over padding too, divides their sum by the number of layers, and uses
cross-entropy for L_AT, which has the same gradient. Here: real tokens only, the sum, and the divergence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from effnlp_lessons.dense_attention import check_key_padding_mask

IGNORE = -100  # the label of a position that is not masked

# -------------------------------------------------------------------------------------------- the losses


def _mean_over_tokens(values: Float[Tensor, "batch length"], key_padding_mask: Tensor | None) -> Float[Tensor, ""]:
    """Mean over the real tokens of a batch; 0 with a gradient path if there are none."""
    check_key_padding_mask(key_padding_mask, *values.shape)
    if key_padding_mask is None:
        return values.mean()
    return values.where(key_padding_mask, 0.0).sum() / key_padding_mask.sum().clamp(min=1)


def _check_same_shape(what: str, student: Tensor, teacher: Tensor, dims: int) -> None:
    if student.shape != teacher.shape or student.ndim != dims:
        got = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"student and teacher {what} must have one shape of {dims} dimensions, got {got}")


def feature_map_transfer(
    student: Float[Tensor, "batch length d_model"],
    teacher: Float[Tensor, "batch length d_model"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error between the maps after one block (Eq. 2): over the width, then over the real tokens.

    Raises:
        ValueError: maps of different shapes, a mask of another shape or dtype.
    """
    _check_same_shape("feature maps", student, teacher, 3)
    return _mean_over_tokens((student - teacher.detach()).square().mean(-1), key_padding_mask)


def split_feature_map_transfer(
    student: Float[Tensor, "batch length d_model"],
    teacher: Float[Tensor, "batch length d_model"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    factors: tuple[float, float, float] = (100.0, 5_000.0, 5.0),
) -> Float[Tensor, ""]:
    """The released code's feature-map loss: what remains after a layer norm, and the statistics it takes away.

    Weighted by `factors`: the squared error between the layer-normed maps (no parameters; mean over the width), the
    squared difference of every token's mean, the absolute difference of its variance; each a mean over real tokens.

    NOTE by a slip the released code computes the teacher's mean and variance from the list of all its maps,
    the embeddings included, so that a student's block is drawn towards the statistics of every block of the teacher.
    Here, as the paper says, a block is compared with its own counterpart.

    Raises:
        ValueError: maps of different shapes, a mask of another shape or dtype.
    """
    _check_same_shape("feature maps", student, teacher, 3)
    teacher = teacher.detach()
    width = student.shape[-1:]
    normed = (F.layer_norm(student, width, eps=1e-12) - F.layer_norm(teacher, width, eps=1e-12)).square().mean(-1)
    means = (student.mean(-1) - teacher.mean(-1)).square()
    variances = (student.var(-1, correction=0) - teacher.var(-1, correction=0)).abs()
    terms = zip(factors, (normed, means, variances), strict=True)
    return sum(factor * _mean_over_tokens(term, key_padding_mask) for factor, term in terms)


def attention_transfer(
    student: Float[Tensor, "batch heads length length"],
    teacher: Float[Tensor, "batch heads length length"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
) -> Float[Tensor, ""]:
    """KL(teacher || student) in nats between the attention of one block, from raw scores (Eq. 3).

    Softmax over the real keys; mean over the heads and the real queries.

    Raises:
        ValueError: scores of different shapes, a mask of another shape or dtype.
    """
    _check_same_shape("scores", student, teacher, 4)
    teacher = teacher.detach()
    if key_padding_mask is not None:
        check_key_padding_mask(key_padding_mask, student.shape[0], student.shape[-1])
        padding = ~key_padding_mask[:, None, None, :]
        student, teacher = (x.masked_fill(padding, torch.finfo(x.dtype).min / 2) for x in (student, teacher))
    log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)  # (batch, heads, queries)
    return _mean_over_tokens(divergence.mean(1), key_padding_mask)


def pretraining_distillation(
    student_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch vocab"],
    labels: Int[Tensor, "*batch"],
    alpha: float = 0.5,
) -> Float[Tensor, ""]:
    """alpha L_MLM + (1 - alpha) L_KD in nats (Eq. 4 without next sentences), mean over the masked positions.

    L_MLM is the cross-entropy with the true word, L_KD that with the teacher's distribution. Together they are the
    cross-entropy with the mixed target alpha * one-hot + (1 - alpha) * teacher, which is how the released code has it.

    Args:
        labels: the true word where a word was masked, `IGNORE` (-100) elsewhere.

    Raises:
        ValueError: shapes that do not fit, alpha outside [0, 1].

    NOTE temperature 1. The released flag of that name multiplies the teacher's last map instead of dividing logits.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if student_logits.shape != teacher_logits.shape or student_logits.shape[:-1] != labels.shape:
        got = f"{tuple(student_logits.shape)}, {tuple(teacher_logits.shape)}, {tuple(labels.shape)}"
        raise ValueError(f"logits must have one shape (..., vocab), and labels (...), got {got}")
    masked = labels != IGNORE
    count = masked.sum().clamp(min=1)
    log_student = student_logits[masked].log_softmax(-1)  # (rows, vocab)
    teacher = teacher_logits[masked].detach().softmax(-1)
    hard = F.nll_loss(log_student, labels[masked].long(), reduction="sum") / count
    soft = -(teacher * log_student).sum() / count
    return alpha * hard + (1 - alpha) * soft
