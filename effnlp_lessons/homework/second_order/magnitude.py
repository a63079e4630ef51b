"""Exercise 1 of notebook 05: which weights stay, with an exact count.

Magnitude pruning (Han et al. 2015, arXiv 1506.02626) with the rates of Frankle and Carbin (2019, arXiv 1803.03635): a
share of the weights that are still there.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def keep_top(
    scores: Float[Tensor, "rows columns"], rate: float, mask: Bool[Tensor, "rows columns"]
) -> Bool[Tensor, "rows columns"]:
    """The mask after the round(rate * n) lowest of the n scores that `mask` still keeps are removed.

    Of equal scores the first go, in reading order. What `mask` has removed stays removed.
    """
    there = scores[mask]
    kept = torch.ones_like(there, dtype=torch.bool)
    kept[there.argsort(stable=True)[: round(rate * len(there))]] = False
    new = mask.clone()
    new[mask] = kept
    return new


def _remove(candidates: Tensor, order: Tensor, count: int, mask: Tensor) -> Tensor:
    """The mask without the first `count` of the candidates (places in reading order) in this order."""
    new = mask.flatten().clone()
    new[candidates[order[: max(count, 0)]]] = False
    return new.view(mask.shape)


def _counted(
    count: Callable[[float, Tensor], int] = lambda rate, mask: round(rate * int(mask.sum())),
    order: Callable[[Tensor], Tensor] = lambda scores: scores.argsort(stable=True),
) -> Answer:
    """The answer with another number of weights to remove, of (rate, mask), or another order of the candidates."""

    def answer(scores: Tensor, rate: float, mask: Tensor) -> Tensor:
        candidates = mask.flatten().nonzero()[:, 0]
        return _remove(candidates, order(scores.flatten()[candidates]), count(rate, mask), mask)

    return answer


def _by_threshold(keep: Callable[[Tensor, Tensor], Tensor]) -> Answer:
    """Compares with the largest score that has to go."""

    def answer(scores: Tensor, rate: float, mask: Tensor) -> Tensor:
        there = scores[mask].sort().values
        count = round(rate * len(there))
        return mask & keep(scores, there[count - 1]) if count else mask.clone()

    return answer


def _by_quantile(scores: Tensor, rate: float, mask: Tensor) -> Tensor:
    return mask & (scores > torch.quantile(scores[mask], rate))


def _all_are_candidates(scores: Tensor, rate: float, mask: Tensor) -> Tensor:
    everything = torch.arange(mask.numel())
    return _remove(everything, scores.flatten().argsort(stable=True), round(rate * int(mask.sum())), mask)


def _from_the_start(scores: Tensor, rate: float, mask: Tensor) -> Tensor:
    return keep_top(scores, rate, torch.ones_like(mask))


def _row_by_row(scores: Tensor, rate: float, mask: Tensor) -> Tensor:
    return torch.cat([keep_top(scores[i : i + 1], rate, mask[i : i + 1]) for i in range(len(mask))])


def _pruned(generator: Generator, rows: int, columns: int, share: float) -> Tensor:
    """A mask with this share of its weights removed, exactly."""
    order = torch.randperm(rows * columns, generator=generator)
    return (order >= round(share * rows * columns)).view(rows, columns)


def _draw(gone: float = 0.0, scores: str = "magnitudes", rate: float | None = None) -> Callable[[Generator], tuple]:
    """Scores of a matrix that has lost the share `gone`; "magnitudes" (0 where pruned), "any" or "ties"."""

    def draw(generator: Generator) -> tuple:
        rows, columns = whole_number(3, 5, generator), whole_number(5, 9, generator)
        mask = _pruned(generator, rows, columns, gone)
        values = torch.randn(rows, columns, generator=generator)
        if scores == "ties":
            values = torch.randint(1, 5, (rows, columns), generator=generator).float() / 4
        if scores != "any":
            values = values.abs() * mask
        share = rate
        while share is None or abs(share * int(mask.sum()) % 1 - 0.5) < 0.05:  # how a half is rounded is not asked
            share = round(whole_number(15, 60, generator) / 100, 2)
        return values, share, mask

    return draw


def _by_hand(generator: Generator) -> tuple:
    weight = torch.tensor([[0.5, -0.1, 0.3, -0.3], [0.0, 0.3, -0.8, 0.2]])
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 0] = False
    return weight.abs(), 0.4, mask


KEEP_TOP = Exercise(
    id="second_order.keep_top",
    title="which weights stay",
    minutes=15,
    difficulty=1,
    reference=keep_top,
    properties=(
        Property("by hand: eight weights, one of them gone", _by_hand, times=1),
        Property("a matrix that has lost nothing", _draw(), times=2),
        Property("a matrix that has lost a third", _draw(1 / 3), times=2),
        Property("equal scores", _draw(0.25, "ties"), times=3),
        Property("scores of pruned weights are not looked at", _draw(1 / 2, "any"), times=2),
        Property("rate 0 removes nothing", _draw(1 / 3, rate=0.0), times=1),
        Property("rate 1 removes the rest", _draw(1 / 3, rate=1.0), times=1),
    ),
    mistakes=(
        Mistake(
            "All equal scores at the threshold go",
            "You keep what is larger than a threshold. If several scores equal it, more weights go than were asked "
            "for. Take the first so many of the sorted scores, and compare with no number.",
            _by_threshold(lambda scores, threshold: scores > threshold),
        ),
        Mistake(
            "All equal scores at the threshold stay",
            "You keep what is at least a threshold, and the threshold itself should have gone, too: fewer weights go "
            "than were asked for. Take the first so many of the sorted scores, and compare with no number.",
            _by_threshold(lambda scores, threshold: scores >= threshold),
        ),
        Mistake(
            "Of equal scores the last go",
            "The number is right. Of equal ones the first are to go, so that a mask can be repeated: a stable sort in "
            "rising order, of which the beginning is removed. topk promises no order among equals.",
            _counted(order=lambda scores: scores.flip(0).argsort(stable=True).neg() + len(scores) - 1),
        ),
        Mistake(
            "Pruned weights are candidates",
            "A pruned weight is 0 and has the lowest score of all: it is removed again, and nothing else goes. Sort "
            "the scores of the weights that are still there.",
            _all_are_candidates,
        ),
        Mistake(
            "Pruned weights come back",
            "The new mask does not know the old one. What is gone stays gone: change a copy of `mask`.",
            _from_the_start,
        ),
        Mistake(
            "The rate is taken of all weights, not of those still there",
            "In the second round more is removed than asked: 20 % of the original, where 20 % of the remaining 80 % "
            "are wanted. The number is round(rate * mask.sum()).",
            _counted(lambda rate, mask: round(rate * mask.numel())),
        ),
        Mistake(
            "The rate is taken for the share of all that is gone in the end",
            "You remove only what is missing up to this share. The rate counts anew in each call, of what is there.",
            _counted(lambda rate, mask: round(rate * mask.numel()) - int((~mask).sum())),
        ),
        Mistake(
            "The rate is taken for what stays",
            "`rate` is the share to remove: the lowest round(rate * n) go.",
            _counted(lambda rate, mask: int(mask.sum()) - round(rate * int(mask.sum()))),
        ),
        Mistake(
            "The largest go",
            "A low score means that a weight is not needed. Remove from the low end.",
            _counted(order=lambda scores: scores.argsort(stable=True, descending=True)),
        ),
        Mistake(
            "The number is rounded down",
            "int() and // round down. round() takes the nearest.",
            _counted(lambda rate, mask: int(rate * int(mask.sum()))),
        ),
        Mistake(
            "The number is rounded up",
            "ceil rounds up. round() takes the nearest.",
            _counted(lambda rate, mask: math.ceil(rate * int(mask.sum()))),
        ),
        Mistake(
            "One more goes",
            "sorted[count] is the first score that stays, and you remove it, too. A well-known code for lottery "
            "tickets does the same.",
            _counted(lambda rate, mask: round(rate * int(mask.sum())) + 1),
        ),
        Mistake(
            "The threshold is a quantile",
            "A quantile lies between two scores, and rounds the number in its own way; equal scores all go. Count.",
            _by_quantile,
        ),
        Mistake(
            "Each row loses its share",
            "There is one order for the whole matrix: a row of small weights may lose more than others.",
            _row_by_row,
        ),
        Mistake(
            "The mask is turned round",
            "True means kept. Yours is True where a weight goes.",
            lambda *inputs: ~keep_top(*inputs),
        ),
    ),
    hints=(
        "Which weights can go at all? scores[mask] is a list of their scores. How long is it, and how many of them go?",
        "argsort(stable=True) gives the places from the lowest score to the highest, equal ones in their order. The "
        "first so many are set to False in a list as long as the candidates, and new[mask] = kept puts it back.",
        "A neighbour: five runners, the second has given up; of the others the slowest half leaves.\n"
        "  speed   = torch.tensor([9., 0., 7., 8., 7.])\n"
        "  running = torch.tensor([True, False, True, True, True])\n"
        "  speed[running]                                     [9., 7., 8., 7.]\n"
        "  speed[running].argsort(stable=True)[:2]            [1, 3]: the two with 7\n"
        "  stays = torch.tensor([True, False, True, False])\n"
        "  new = running.clone(); new[running] = stays        [True, False, False, True, False]",
    ),
)
