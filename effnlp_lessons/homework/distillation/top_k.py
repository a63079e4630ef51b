"""Exercise 6 of notebook 01: soft targets of which only the k largest are stored. The library does not have it.

A masked-language model's distribution has 30,522 numbers for each token. Few of them carry nearly all of it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number

Targets = tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]


def top_k_targets(teacher_logits: Float[Tensor, "rows classes"], k: int, temperature: float) -> Targets:
    """The k largest softened probabilities of every row, largest first, made to sum to 1; and their classes, int64."""
    logits, classes = teacher_logits.topk(k, dim=-1)
    return (logits / temperature).softmax(dim=-1), classes


def _kept(change: Callable[[Tensor, Tensor, Tensor], Tensor], temperature: float | None = None) -> Answer:
    """The k largest, changed by `change(kept, classes, all probabilities)`, for the mistakes."""

    def answer(teacher_logits: Tensor, k: int, temperature_given: float) -> Targets:
        p = (teacher_logits / (temperature or temperature_given)).softmax(-1)
        kept, classes = p.topk(k, dim=-1)
        return change(kept, classes, p), classes

    return answer


def _renormalised(kept: Tensor, classes: Tensor, p: Tensor) -> Tensor:
    return kept / kept.sum(-1, keepdim=True)


def _reordered(order: Callable[[Tensor, Tensor], Tensor]) -> Answer:
    """The right pairs in another order, `order(probabilities, classes)`: places along each row."""

    def answer(teacher_logits: Tensor, k: int, temperature: float) -> Targets:
        probabilities, classes = top_k_targets(teacher_logits, k, temperature)
        places = order(probabilities, classes)
        return probabilities.gather(-1, places), classes.gather(-1, places)

    return answer


def _smallest(teacher_logits: Tensor, k: int, temperature: float) -> Targets:
    logits, classes = teacher_logits.topk(k, dim=-1, largest=False)
    return (logits / temperature).softmax(-1), classes


def _one_choice_for_all_rows(teacher_logits: Tensor, k: int, temperature: float) -> Targets:
    p = (teacher_logits / temperature).softmax(-1)
    classes = p.mean(0).topk(k).indices.expand(len(p), k)
    kept = p.gather(-1, classes)
    return kept / kept.sum(-1, keepdim=True), classes.clone()


def _over_the_batch(teacher_logits: Tensor, k: int, temperature: float) -> Targets:
    p = (teacher_logits / temperature).softmax(-1)
    kept, places = p.flatten().topk(k)
    return kept / kept.sum(), places % p.shape[-1]


def _positions(teacher_logits: Tensor, k: int, temperature: float) -> Targets:
    probabilities, classes = top_k_targets(teacher_logits, k, temperature)
    return probabilities, torch.arange(k).expand_as(classes).clone()


def _full_width(teacher_logits: Tensor, k: int, temperature: float) -> Targets:
    probabilities, classes = top_k_targets(teacher_logits, k, temperature)
    return torch.zeros_like(teacher_logits).scatter(-1, classes, probabilities), classes


def _draw(
    sizes: tuple[int, int], k: str, temperatures: tuple[float, ...] = (2.0, 3.0, 5.0), dtype: torch.dtype | None = None
) -> Callable[[Generator], tuple]:
    """Random logits with `sizes` classes; k is "one", "some" of the classes, or "all"."""

    def draw(generator: Generator) -> tuple:
        rows, classes = whole_number(2, 3, generator), whole_number(*sizes, generator)
        logits = 3 * torch.randn(rows, classes, generator=generator, dtype=dtype or torch.float64)
        size = {"one": 1, "some": whole_number(2, min(5, classes - 2), generator), "all": classes}[k]
        return logits, size, temperatures[whole_number(0, len(temperatures) - 1, generator)]

    return draw


TOP_K_TARGETS = Exercise(
    id="distillation.top_k_targets",
    title="targets with k classes",
    minutes=20,
    difficulty=3,
    reference=top_k_targets,
    properties=(
        Property("k = 1: the best class has all of it", _draw((6, 9), "one"), times=1),
        Property("k is the number of classes: the softened distribution, sorted", _draw((6, 9), "all"), times=1),
        Property("some of the classes, temperature 1", _draw((6, 9), "some", (1.0,))),
        Property("some of the classes, another temperature", _draw((6, 9), "some")),
        Property("a vocabulary of 30,522 words", _draw((30_522, 30_522), "some"), times=1),
        Property("float32 stays float32", _draw((6, 9), "some", dtype=torch.float32), times=1),
    ),
    mistakes=(
        Mistake(
            "The probabilities do not sum to 1",
            "What was cut off is missing. Divide by the sum of the k that are kept, for each row.",
            _kept(lambda kept, classes, p: kept),
        ),
        Mistake(
            "All rows are divided by one sum",
            "Each row has a distribution of its own: divide it by its own sum (dim=-1, keepdim=True).",
            _kept(lambda kept, classes, p: kept / kept.sum()),
        ),
        Mistake(
            "What was cut off is shared out evenly",
            "The rows sum to 1, but the ratios between the classes have changed. Divide by the sum instead.",
            _kept(lambda kept, classes, p: kept + (1 - kept.sum(-1, keepdim=True)) / kept.shape[-1]),
        ),
        Mistake(
            "What was cut off goes to the best class",
            "The rows sum to 1, but the ratios between the classes have changed. Divide by the sum instead.",
            _kept(lambda kept, classes, p: torch.cat([1 - kept[:, 1:].sum(-1, keepdim=True), kept[:, 1:]], dim=-1)),
        ),
        Mistake(
            "Probabilities go through a second softmax",
            "A softmax takes scores. Take the softmax of the k logits, or divide the k probabilities by their sum.",
            _kept(lambda kept, classes, p: kept.softmax(-1)),
        ),
        Mistake(
            "The temperature is ignored",
            "These are the targets at temperature 1. Dividing probabilities by the temperature softens nothing: it "
            "cancels when they are made to sum to 1. Divide the logits.",
            _kept(_renormalised, temperature=1.0),
        ),
        Mistake(
            "The k smallest",
            "Keep the classes that the teacher finds most likely.",
            _smallest,
        ),
        Mistake(
            "One choice of classes for all rows",
            "Each row keeps its own k classes: topk along dim=-1 of the whole table.",
            _one_choice_for_all_rows,
        ),
        Mistake(
            "The k largest of the whole batch",
            "You kept k numbers in all. Each row keeps k: topk(k, dim=-1).",
            _over_the_batch,
        ),
        Mistake(
            "Places in the sorted list instead of classes",
            "0, 1, 2, ... says nothing about which classes were kept. topk returns their numbers as its second value.",
            _positions,
        ),
        Mistake(
            "A table as wide as all classes",
            "The values stand at the right places, and nothing is saved. Return k numbers for each row.",
            _full_width,
        ),
        Mistake(
            "Sorted by class",
            "The pairs are right; asked is the most likely class first.",
            _reordered(lambda probabilities, classes: classes.argsort(-1)),
        ),
        Mistake(
            "The smallest of the k first",
            "The pairs are right; asked is the most likely class first.",
            _reordered(lambda probabilities, classes: probabilities.argsort(-1)),
        ),
    ),
    hints=(
        "Three steps: soften, keep, make each row sum to 1. torch has a function for the second that returns both "
        "the values and where they stood.",
        "`values, places = x.topk(k, dim=-1)`, the largest first. A softmax is powers divided by their sum: what "
        "becomes of that sum if you take the softmax over the k kept logits alone?",
        "A neighbour: of four parties only the two largest enter parliament. Who has which share of its seats?\n"
        "  votes = torch.tensor([[10., 50., 5., 35.]])\n"
        "  kept, party = votes.topk(2, dim=-1)              -> [[50., 35.]], [[1, 3]]\n"
        "  kept / kept.sum(dim=-1, keepdim=True)            -> [[0.5882, 0.4118]], [[1, 3]]\n"
        "50 to 35 was their ratio before, and still is.",
    ),
)
