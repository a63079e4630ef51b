"""Exercise 4 of notebook 07: masks from a threshold, and the share that is really left.

Sanh, Wolf and Rush (2020, arXiv 2005.07683), soft movement pruning: M = sigmoid(S) > tau with one tau for all matrices.
The released code keeps at least 0.5 % of each matrix. What is left is measured, and is not 1 - tau.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number

Scores = dict[str, Float[Tensor, "d_out d_in"]]
Masks = dict[str, Bool[Tensor, "d_out d_in"]]


def soft_masks(scores: Scores, threshold: float, min_keep: float) -> tuple[Masks, float]:
    """Masks sigmoid(S) > threshold of all matrices, and the share of all their weights that is left.

    A matrix of which fewer than ceil(min_keep * size) weights pass keeps that many: those with the highest scores, of
    equal ones the last.
    """
    masks = {name: _passes(values, threshold) | _highest(values, min_keep) for name, values in scores.items()}
    return masks, _share(masks)


def _passes(values: Tensor, threshold: float) -> Tensor:
    return torch.sigmoid(values) > threshold


def _first(values: Tensor, count: int, descending: bool = True) -> Tensor:
    """The `count` highest (or lowest) ones."""
    order = values.flatten().argsort(stable=True)
    chosen = order[len(order) - count :] if descending else order[:count]
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[chosen] = True
    return mask.view(values.shape)


def _highest(values: Tensor, min_keep: float) -> Tensor:
    return _first(values, math.ceil(min_keep * values.numel()))


def _share(masks: Masks) -> float:
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def _exchange(
    passes: Callable[[Tensor, float], Tensor] = _passes,
    at_least: Callable[[Tensor, float], Tensor] = _highest,
    join: Callable[[Tensor, Tensor], Tensor] = lambda passed, highest: passed | highest,
    share: Callable[[Masks], float] = _share,
) -> Answer:
    """The answer with another test, another set of weights that stay, another union, or another share."""

    def answer(scores: Scores, threshold: float, min_keep: float) -> tuple[Masks, float]:
        masks = {name: join(passes(values, threshold), at_least(values, min_keep)) for name, values in scores.items()}
        return masks, share(masks)

    return answer


def _before_the_floor(scores: Scores, threshold: float, min_keep: float) -> tuple[Masks, float]:
    masks, _ = soft_masks(scores, threshold, min_keep)
    return masks, _share({name: _passes(values, threshold) for name, values in scores.items()})


def _nominal(scores: Scores, threshold: float, min_keep: float) -> tuple[Masks, float]:
    return soft_masks(scores, threshold, min_keep)[0], 1 - threshold


def _as_a_share(scores: Scores, threshold: float, min_keep: float) -> tuple[Masks, float]:
    """Keeps the share 1 - threshold of each matrix."""
    masks = {name: _first(values, round((1 - threshold) * values.numel())) for name, values in scores.items()}
    return masks, _share(masks)


def _of_the_whole_net(scores: Scores, threshold: float, min_keep: float) -> tuple[Masks, float]:
    flat = torch.cat([values.flatten() for values in scores.values()])
    kept = (_passes(flat, threshold) | _highest(flat, min_keep)).split([values.numel() for values in scores.values()])
    masks = {name: part.view(values.shape) for (name, values), part in zip(scores.items(), kept, strict=True)}
    return masks, _share(masks)


def _floor_on_top(scores: Scores, threshold: float, min_keep: float) -> tuple[Masks, float]:
    masks = {}
    for name, values in scores.items():
        passed = _passes(values, threshold)
        masks[name] = passed | _highest(values.masked_fill(passed, -math.inf), min_keep)
    return masks, _share(masks)


def _masks(fn: Answer, *inputs: object) -> object:
    return fn(*inputs)[0]


def _left(fn: Answer, *inputs: object) -> object:
    return fn(*inputs)[1]


def _draw(floor: str = "", exact: bool = False) -> Callable[[Generator], tuple]:
    """Scores of three matrices of different size, the first of them low; with a floor that holds "one", or none."""

    def draw(generator: Generator) -> tuple:
        shapes = [(whole_number(4, 6, generator), whole_number(7, 9, generator)) for _ in range(2)]
        shapes.append((2, whole_number(3, 5, generator)))
        shifts = (-3.5 if floor == "one" else -0.5, 0.5, 0.0)
        scores = {}
        for name, shape, shift in zip(("query", "expand", "output"), shapes, shifts, strict=True):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            if exact:
                values = torch.randint(-1, 2, shape, generator=generator).double()  # sigmoid(0) is 0.5
            else:
                values += shift
            scores[name] = values
        threshold = 0.5 if exact else whole_number(35, 65, generator) / 100
        return scores, threshold, 0.0 if not floor else whole_number(5, 15, generator) / 100

    return draw


def _by_hand(generator: Generator) -> tuple:
    query, output = (
        torch.tensor([[-2.0, 1.0, 0.5, -0.9]]),
        torch.tensor([[-3.0, -1.0, -2.0, -4.0], [-5.0, -2.5, -6.0, -7.0]]),
    )
    return {"query": query, "output": output}, 0.4, 0.2


SOFT_MASKS = Exercise(
    id="movement.soft_masks",
    title="a threshold, and what is really left",
    minutes=20,
    difficulty=2,
    reference=soft_masks,
    properties=(
        Property("by hand: two small matrices", _by_hand, times=1),
        Property("masks, without a floor", _draw(), _masks, times=2),
        Property("the share that is left, without a floor", _draw(), _left, times=2),
        Property("a score at the threshold does not pass", _draw(exact=True), times=1),
        Property("a matrix that would be emptied", _draw("one"), times=3),
    ),
    mistakes=(
        Mistake(
            "The share is taken for 1 - threshold",
            "tau says how high a score must be, and not how many are: that depends on where training has driven the "
            "scores. Count the masks.",
            _nominal,
        ),
        Mistake(
            "The threshold is taken for a share of weights",
            "You keep the share 1 - tau of each matrix. tau is compared with sigmoid(S): a matrix whose scores are "
            "low loses more.",
            _as_a_share,
        ),
        Mistake(
            "The scores themselves are compared",
            "Compare sigmoid(S) with tau. S is any real number, and begins at 0.",
            _exchange(lambda values, threshold: values > threshold),
        ),
        Mistake(
            "A score at the threshold passes",
            "> and not >=.",
            _exchange(lambda values, threshold: torch.sigmoid(values) >= threshold),
        ),
        Mistake(
            "The low scores are kept",
            "A high score means that the weight stays.",
            _exchange(lambda values, threshold: torch.sigmoid(values) < threshold),
        ),
        Mistake(
            "The size of the score counts",
            "A very negative score is very low: no absolute value here. S is no weight.",
            _exchange(
                lambda values, threshold: torch.sigmoid(values.abs()) > threshold,
                lambda values, min_keep: _highest(values.abs(), min_keep),
            ),
        ),
        Mistake(
            "A matrix may be emptied",
            "The floor is missing: each matrix keeps at least ceil(min_keep * size) weights. An empty matrix cuts the "
            "net in two.",
            _exchange(join=lambda passed, highest: passed),
        ),
        Mistake(
            "The floor is a ceiling",
            "What passes stays, even if it is more than the floor: the union of both, and not the intersection.",
            _exchange(join=lambda passed, highest: passed & highest),
        ),
        Mistake(
            "Only the floor is kept",
            "What passes stays, even if it is more than the floor.",
            _exchange(join=lambda passed, highest: highest),
        ),
        Mistake(
            "The floor comes on top",
            "It is not a number of further weights. The highest scores are among those that pass: join the two masks.",
            _floor_on_top,
        ),
        Mistake(
            "The floor keeps the lowest scores",
            "Those with the highest scores stay.",
            _exchange(
                at_least=lambda values, min_keep: _first(values, math.ceil(min_keep * values.numel()), False),
                join=lambda passed, chosen: torch.where(passed.sum() < chosen.sum(), chosen, passed),
            ),
        ),
        Mistake(
            "The floor is rounded down",
            "At least the share min_keep stays: ceil.",
            _exchange(at_least=lambda values, min_keep: _first(values, int(min_keep * values.numel()))),
        ),
        Mistake(
            "The floor holds for the net, not for each matrix",
            "The net may be far above it while one matrix is empty. Each matrix has its floor.",
            _of_the_whole_net,
        ),
        Mistake(
            "The share is the mean over matrices",
            "A small matrix then counts as much as a large one. Kept weights over all weights.",
            _exchange(share=lambda masks: sum(mask.double().mean().item() for mask in masks.values()) / len(masks)),
        ),
        Mistake(
            "The share is measured before the floor",
            "Measure the masks that you return.",
            _before_the_floor,
        ),
        Mistake(
            "The share that is gone is returned",
            "Asked is the share that is left.",
            _exchange(share=lambda masks: 1 - _share(masks)),
        ),
    ),
    hints=(
        "Three steps: what passes the threshold; what the floor holds; and counting, over all matrices together.",
        "The floor's weights are the last ceil(min_keep * size) of scores.flatten().argsort(stable=True). What passes, "
        "or is held, stays: `|`. The share is a quotient of two sums over matrices.",
        "A neighbour: two teams; whoever is faster than 20 stays, but from each team at least the fastest third.\n"
        "  a, b = torch.tensor([22., 21., 12.]), torch.tensor([15., 11., 9., 18., 3., 7.])\n"
        "  a > 20                       [True, True, False]: the fastest third is among them\n"
        "  b > 20                       nobody; the fastest 2 of 6 stay: [True, False, False, True, False, False]\n"
        "  (2 + 2) / (3 + 6)            0.44 are left, and not the mean of 0.67 and 0.33",
    ),
)
