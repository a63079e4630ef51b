"""Exercise 4 of notebook 02: DistilBERT's loss on the distribution over words.

DistilBERT (Sanh et al. 2019, arXiv 1910.01108, sec. 2): L_ce, in the form of the released code: the divergence at a
temperature, over all real tokens, not only the masked ones.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def word_divergence(
    student_logits: Float[Tensor, "batch length vocab"],
    teacher_logits: Float[Tensor, "batch length vocab"],
    key_padding_mask: Bool[Tensor, "batch length"],
    temperature: float,
) -> Float[Tensor, ""]:
    """T^2 KL(teacher || student) in nats between softmax(logits / T), mean over the real tokens of the batch."""
    log_student = (student_logits[key_padding_mask] / temperature).log_softmax(dim=-1)
    log_teacher = (teacher_logits[key_padding_mask] / temperature).log_softmax(dim=-1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)
    return temperature**2 * divergence.mean()


def _divergences(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of every token, (batch, length)."""
    log_student, log_teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


def _exchange(
    soften: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = lambda student, teacher, t: (
        student / t,
        teacher / t,
    ),
    per_token: Callable[[Tensor, Tensor], Tensor] = _divergences,
    average: Callable[[Tensor, Tensor], Tensor] = lambda values, mask: values[mask].mean(),
    factor: Callable[[float], float] = lambda t: t**2,
) -> Answer:
    """The answer with one step exchanged, for the mistakes; `average` gets (values (batch, length), mask)."""

    def answer(student_logits: Tensor, teacher_logits: Tensor, key_padding_mask: Tensor, temperature: float) -> Tensor:
        values = per_token(*soften(student_logits, teacher_logits, temperature))
        return factor(temperature) * average(values, key_padding_mask)

    return answer


def _mean_over_the_vocabulary(student: Tensor, teacher: Tensor) -> Tensor:
    return _divergences(student, teacher) / student.shape[-1]


def _cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)


def _probabilities_for_logarithms(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p.log() - q)).sum(-1)


def _mean_of_means(values: Tensor, mask: Tensor) -> Tensor:
    return ((values * mask).sum(1) / mask.sum(1)).mean()


def _draw(padding: str, temperature: float | None = None, words: int | None = None) -> Callable[[Generator], tuple]:
    """Random logits, float64, few tokens if `words` is given; padding "none", "end", "anywhere" or "loud" (large)."""

    def draw(generator: Generator) -> tuple:
        batch, length = whole_number(2, 3, generator), whole_number(3, 6, generator)
        vocab = whole_number(4, 9, generator)
        if words:
            batch, length, vocab = 2, 2, words
        student, teacher = 2 * torch.randn(2, batch, length, vocab, generator=generator, dtype=torch.float64)
        mask = torch.ones(batch, length, dtype=torch.bool)
        if padding in ("end", "loud"):
            mask[0, -whole_number(1, length - 1, generator) :] = False
        if padding == "anywhere":
            mask[0, 1::2] = False
            mask[1, whole_number(0, length - 1, generator)] = False
        if padding == "loud":
            student = student.where(mask[:, :, None], 30 * student)
        t = whole_number(3, 10, generator) / 2 if temperature is None else temperature
        return student, teacher, mask, t

    return draw


WORD_DIVERGENCE = Exercise(
    id="pretraining.word_divergence",
    title="DistilBERT's loss on the words",
    minutes=15,
    difficulty=2,
    reference=word_divergence,
    properties=(
        Property("temperature 1, no padding", _draw("none", 1.0), times=1),
        Property("temperature 2, no padding", _draw("none", 2.0), times=1),
        Property("padding at the end of a text", _draw("end"), times=1),
        Property("padding anywhere", _draw("anywhere"), times=1),
        Property("what stands in the padding does not matter", _draw("loud"), times=1),
        Property("BERT's vocabulary of 30,522 words", _draw("end", words=30_522), times=1),
    ),
    mistakes=(
        Mistake(
            "The mean runs over the words of the vocabulary, too",
            'reduction="mean" divides by rows times words: with BERT\'s vocabulary the loss is 30,522 times too small, '
            'and the other losses drown it. Sum over the words, then take the mean over the tokens: "batchmean" on '
            "rows.",
            _exchange(per_token=_mean_over_the_vocabulary),
        ),
        Mistake(
            "The mean over everything, padding too",
            'reduction="mean" divides by all there is: padding, and the words of the vocabulary. Pick the real tokens, '
            "sum over the words, then take the mean over the tokens.",
            _exchange(per_token=_mean_over_the_vocabulary, average=lambda values, mask: values.mean()),
        ),
        Mistake(
            "batchmean on three dimensions",
            'reduction="batchmean" divides by the first dimension, which is the number of texts here; and padding is '
            "in the sum. Pick the real tokens first: logits[key_padding_mask] has the shape (tokens, vocab).",
            _exchange(average=lambda values, mask: values.sum() / len(values)),
        ),
        Mistake(
            "Divided by the number of texts",
            "The sum over the real tokens is right; divide it by their number, not by the number of texts.",
            _exchange(average=lambda values, mask: values[mask].sum() / len(values)),
        ),
        Mistake(
            "Padding counts like text",
            "The mean runs over all tokens of the batch. What the teacher says at padding is noise.",
            _exchange(average=lambda values, mask: values.mean()),
        ),
        Mistake(
            "Padding stays in the denominator",
            "You set padding to 0 and take a mean over everything: the same text gets a smaller loss in a longer "
            "batch. Divide by the number of real tokens.",
            _exchange(average=lambda values, mask: (values * mask).mean()),
        ),
        Mistake(
            "A mean of every text, then the mean of these",
            "A token of a short text then weighs more than one of a long text. Take one mean over all real tokens.",
            _exchange(average=_mean_of_means),
        ),
        Mistake(
            "The mask is read the wrong way round",
            "True means a real token. You keep the padding.",
            _exchange(average=lambda values, mask: values[~mask].mean()),
        ),
        Mistake(
            "The factor T² is missing",
            "At temperature T the gradient shrinks with 1 / T². Multiply the divergence by T², so that its weight "
            "beside the other losses does not depend on T.",
            _exchange(factor=lambda t: 1.0),
        ),
        Mistake(
            "Multiplied by T, not by T²",
            "One T stems from the derivative of z / T, the other from the softened probabilities, which lie closer "
            "together. The factor is T².",
            _exchange(factor=lambda t: t),
        ),
        Mistake(
            "The direction is reversed",
            "The teacher's probabilities are the weights: sum p_teacher (log p_teacher - log p_student). "
            "F.kl_div takes the student's log-probabilities first, then the teacher's probabilities.",
            _exchange(per_token=lambda student, teacher: _divergences(teacher, student)),
        ),
        Mistake(
            "Cross-entropy in place of the divergence",
            "The gradient is the same, the value is larger by the teacher's entropy, so that a perfect student would "
            "not have loss 0. Subtract it: sum p_teacher (log p_teacher - log p_student).",
            _exchange(per_token=_cross_entropy),
        ),
        Mistake(
            "Probabilities where log-probabilities are expected",
            "F.kl_div wants the logarithm of the student's probabilities as its first argument. No error is raised.",
            _exchange(per_token=_probabilities_for_logarithms),
        ),
        Mistake(
            "Only the teacher is softened",
            "Both logits are divided by the same temperature; otherwise an equal student would not have loss 0.",
            _exchange(soften=lambda student, teacher, t: (student, teacher / t)),
        ),
        Mistake(
            "Only the student is softened",
            "Both logits are divided by the same temperature; otherwise an equal student would not have loss 0.",
            _exchange(soften=lambda student, teacher, t: (student / t, teacher)),
        ),
        Mistake(
            "Logits are multiplied by the temperature",
            "A higher temperature makes the probabilities more even: divide the logits by it.",
            _exchange(soften=lambda student, teacher, t: (student * t, teacher * t)),
        ),
        Mistake(
            "Probabilities are divided by the temperature",
            "The temperature divides the logits, before the softmax.",
            _exchange(
                soften=lambda student, teacher, t: (student, teacher),
                per_token=_divergences,
                factor=lambda t: t,
            ),
        ),
    ),
    hints=(
        "Pick the real tokens of both models first: logits[key_padding_mask] has the shape (real tokens, vocab). After "
        "that there is no padding to think of.",
        "softmax(dim=-1) of teacher logits / T, log_softmax(dim=-1) of student logits / T. Sum over the words: that is "
        "one number a token. Then the mean over the tokens, then T². What must the loss of a student be that equals "
        "its teacher?",
        "A neighbour: how far a forecast q is from the weather p, on two of three days; day 1 was not recorded.\n"
        "  p = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.8, 0.2]])\n"
        "  q = torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.5, 0.5]])\n"
        "  recorded = torch.tensor([True, False, True])\n"
        "  p, q = p[recorded], q[recorded]\n"
        "  (p * (p.log() - q.log())).sum(-1)            [0.0000, 0.1927]: one number a day\n"
        "  (p * (p.log() - q.log())).sum(-1).mean()     0.0964, the mean over two days; .mean() alone gives 0.0482",
    ),
)
