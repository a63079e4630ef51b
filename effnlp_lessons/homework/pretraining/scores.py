"""Exercise 2 of notebook 02: TinyBERT's loss on attention, taken from the raw scores of real tokens.

TinyBERT (Jiao et al. 2019, arXiv 1909.10351, sec. 3): mean squared error of the scores before the softmax.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def score_loss(
    student_scores: Float[Tensor, "batch heads length length"],
    teacher_scores: Float[Tensor, "batch heads length length"],
    key_padding_mask: Bool[Tensor, "batch length"],
) -> Float[Tensor, ""]:
    """Mean squared error of the scores over heads and all pairs of real tokens of the batch (mask True = real)."""
    real_pairs = key_padding_mask[:, None, :, None] & key_padding_mask[:, None, None, :]
    squared = (student_scores - teacher_scores).square()
    return squared[real_pairs.expand_as(squared)].mean()


def _pairs(key_padding_mask: Tensor) -> Tensor:
    """True = a pair of real tokens, (batch, 1, length, length)."""
    return key_padding_mask[:, None, :, None] & key_padding_mask[:, None, None, :]


def _keys(key_padding_mask: Tensor) -> Tensor:
    return key_padding_mask[:, None, None, :]


def _exchange(
    numerator: Callable[[Tensor], Tensor] = _pairs,
    denominator: Callable[[Tensor], Tensor] | None = None,
    error: Callable[[Tensor, Tensor], Tensor] = lambda student, teacher: (student - teacher).square(),
) -> Answer:
    """The answer with other pairs summed, other pairs counted (by default the same) or another error of a pair."""

    def answer(student_scores: Tensor, teacher_scores: Tensor, key_padding_mask: Tensor) -> Tensor:
        errors = error(student_scores, teacher_scores)
        summed = numerator(key_padding_mask).expand_as(errors)
        counted = summed if denominator is None else denominator(key_padding_mask).expand_as(errors)
        return (errors * summed).sum() / counted.sum()

    return answer


def _everything(key_padding_mask: Tensor) -> Tensor:
    return torch.ones_like(_pairs(key_padding_mask))


def _over_the_heads(change: Callable[[Tensor, Tensor], Tensor]) -> Answer:
    """`change(loss, number of heads)` of the right answer."""
    return lambda student, teacher, mask: change(score_loss(student, teacher, mask), student.shape[1])


def _probabilities(masked: bool) -> Answer:
    def answer(student_scores: Tensor, teacher_scores: Tensor, key_padding_mask: Tensor) -> Tensor:
        hidden = ~_keys(key_padding_mask) if masked else torch.zeros_like(_keys(key_padding_mask))
        smallest = torch.finfo(student_scores.dtype).min
        both = [scores.masked_fill(hidden, smallest).softmax(-1) for scores in (student_scores, teacher_scores)]
        return score_loss(*both, key_padding_mask)

    return answer


def _mean_of_means(student_scores: Tensor, teacher_scores: Tensor, key_padding_mask: Tensor) -> Tensor:
    texts = zip(student_scores, teacher_scores, key_padding_mask, strict=True)
    return torch.stack([score_loss(*(part[None] for part in text)) for text in texts if text[2].any()]).mean()


def _draw(padding: str, dtype: torch.dtype = torch.float32) -> Callable[[Generator], tuple]:
    """Random scores; padding "none", "end", "anywhere", "loud" (far larger scores there) or "a whole text"."""

    def draw(generator: Generator) -> tuple:
        batch, heads, length = (whole_number(*bounds, generator) for bounds in ((2, 3), (2, 4), (4, 7)))
        student, teacher = torch.randn(2, batch, heads, length, length, generator=generator, dtype=dtype)
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
            student = student.masked_fill(~_pairs(mask), 500.0)
        return student, teacher, mask

    return draw


SCORE_LOSS = Exercise(
    id="pretraining.score_loss",
    title="TinyBERT's loss on attention scores",
    minutes=15,
    difficulty=2,
    reference=score_loss,
    properties=(
        Property("no padding", _draw("none"), times=1),
        Property("padding at the end of a text", _draw("end"), times=2),
        Property("padding anywhere", _draw("anywhere"), times=1),
        Property("what stands in the padding does not matter", _draw("loud"), times=1),
        Property("a text of padding alone counts for nothing", _draw("a whole text"), times=1),
        Property("float64 stays float64", _draw("end", torch.float64), times=1),
    ),
    mistakes=(
        Mistake(
            "Probabilities are compared, not scores",
            "You take a softmax first. TinyBERT compares the raw scores q k / sqrt(d): the softmax hides a difference "
            "that all scores of a row share, and makes small probabilities equal.",
            _probabilities(masked=False),
        ),
        Mistake(
            "Probabilities over the real keys are compared",
            "The mask is right, but there is no softmax in this loss: compare the raw scores.",
            _probabilities(masked=True),
        ),
        Mistake(
            "Padding counts like text",
            "The mean runs over all pairs. Scores of padding say nothing, and nobody should learn them.",
            _exchange(_everything),
        ),
        Mistake(
            "Padding stays in the denominator",
            "You sum over the real pairs and divide by all of them: the same text gets a smaller loss in a longer "
            "batch. Divide by the number of pairs that you summed.",
            _exchange(_pairs, _everything),
        ),
        Mistake(
            "Padded queries still count",
            "You leave out the columns of padded keys. The rows of padded queries are no text either: a pair counts if "
            "both its tokens are real.",
            _exchange(_keys),
        ),
        Mistake(
            "Padded keys become zeros and are counted",
            "Scores of padded keys are set to 0 on both sides, and the mean runs over everything, the rows of padded "
            "queries too. The released code does so. Here only pairs of real tokens count, above and below the line.",
            _exchange(_keys, _everything),
        ),
        Mistake(
            "Padded keys still count",
            "You leave out the rows of padded queries, but their columns are there: a pair counts if both its tokens "
            "are real.",
            _exchange(lambda mask: mask[:, None, :, None].expand_as(_pairs(mask))),
        ),
        Mistake(
            "A pair counts if one of its tokens is real",
            "It counts if both are: & in place of |.",
            _exchange(lambda mask: mask[:, None, :, None] | _keys(mask)),
        ),
        Mistake(
            "The mask is read the wrong way round",
            "True means a real token. You keep the padding.",
            _exchange(lambda mask: _pairs(~mask)),
        ),
        Mistake(
            "The heads are summed",
            "The loss is a mean over the heads, too. Did you divide by the number of pairs in one head?",
            _over_the_heads(lambda loss, heads: loss * heads),
        ),
        Mistake(
            "Divided by the heads twice",
            "A mean over (batch, heads, length, length) is one over the heads already.",
            _over_the_heads(lambda loss, heads: loss / heads),
        ),
        Mistake(
            "The heads are averaged before they are compared",
            "Heads that err in opposite directions then cancel. Square first, then take the mean.",
            lambda student, teacher, mask: score_loss(
                student.mean(1, keepdim=True), teacher.mean(1, keepdim=True), mask
            ),
        ),
        Mistake(
            "A mean of every text, then the mean of these",
            "A pair of a short text then weighs more than one of a long text. Take one mean over the whole batch.",
            _mean_of_means,
        ),
        Mistake(
            "The absolute difference",
            "Asked is the mean of the squared differences.",
            _exchange(error=lambda student, teacher: (student - teacher).abs()),
        ),
        Mistake(
            "A square root at the end",
            "Mean squared error has none.",
            _over_the_heads(lambda loss, heads: loss.sqrt()),
        ),
    ),
    hints=(
        "First forget the mask: for two tables of scores this is one line. Then ask of each entry of a table, row i "
        "and column j, which two tokens it belongs to.",
        "The mask twice, once along the rows and once along the columns: mask[:, None, :, None] and "
        "mask[:, None, None, :]. Joined with & and `expand_as` it picks the real pairs. Divide by as many as you "
        "summed, heads included.",
        "A neighbour: distances between 3 towns by two maps; town 1 is missing.\n"
        "  here = torch.tensor([True, False, True])\n"
        "  both = here[:, None] & here[None, :]         True at (0, 0), (0, 2), (2, 0) and (2, 2)\n"
        "  one   = torch.tensor([[0., 9., 4.], [9., 0., 9.], [4., 9., 0.]])\n"
        "  other = torch.tensor([[0., 1., 6.], [1., 0., 1.], [5., 1., 0.]])\n"
        "  (one - other)[both]                          [0., -2., -1., 0.]\n"
        "  (one - other)[both].square().mean()          1.25: the 9s do not matter, and the mean is over 4",
    ),
)
