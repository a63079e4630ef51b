"""Exercise 3 of notebook 06, "find the bugs": two controls, without which a ticket shows nothing.

Frankle and Carbin (2019, arXiv 1803.03635) redraw the weights under the ticket's mask. Shuffling the mask within each
matrix asks the other half of the question: does it matter which weights are kept, or only how many in each layer?
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number

Weights = dict[str, Float[Tensor, "d_out d_in"]]
Masks = dict[str, Bool[Tensor, "d_out d_in"]]
Controls = dict[str, tuple[Weights, Masks]]


def glorot(shape: tuple[int, int], generator: Generator) -> Float[Tensor, "d_out d_in"]:
    """Random weights as the net had them at the start: normal, with variance 2 / (d_in + d_out)."""
    return math.sqrt(2 / sum(shape)) * torch.randn(shape, generator=generator)


def controls(theta_0: Weights, masks: Masks, generator: Generator) -> Controls:
    """Two nets to compare a ticket with: {"shuffled": (weights, masks), "redrawn": (weights, masks)}.

    "shuffled" has the weights of theta_0, and each mask is shuffled within its matrix; "redrawn" has the ticket's
    masks, and new weights from `glorot`. Pruned weights are 0.
    """
    return _controls(theta_0, masks, generator)


def _within(masks: Masks, generator: Generator) -> Masks:
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)
        for name, mask in masks.items()
    }


def _over_the_net(masks: Masks, generator: Generator) -> Masks:
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    parts = flat[torch.randperm(len(flat), generator=generator)].split([mask.numel() for mask in masks.values()])
    return {name: part.view(mask.shape) for (name, mask), part in zip(masks.items(), parts, strict=True)}


def _whole_rows(masks: Masks, generator: Generator) -> Masks:
    return {name: mask[torch.randperm(len(mask), generator=generator)] for name, mask in masks.items()}


def _row_by_row(masks: Masks, generator: Generator) -> Masks:
    return {
        name: mask.gather(1, torch.rand(mask.shape, generator=generator).argsort(1)) for name, mask in masks.items()
    }


def _by_coin(masks: Masks, generator: Generator) -> Masks:
    return {
        name: torch.rand(mask.shape, generator=generator) < mask.float().mean().item() for name, mask in masks.items()
    }


def _one_permutation(masks: Masks, generator: Generator) -> Masks:
    seed = whole_number(0, 2**31, generator)
    return {name: _within({name: mask}, Generator().manual_seed(seed))[name] for name, mask in masks.items()}


def _new_glorot(theta_0: Weights, masks: Masks, generator: Generator) -> Weights:
    return {name: glorot(tuple(values.shape), generator) for name, values in theta_0.items()}


def _values_shuffled(theta_0: Weights, masks: Masks, generator: Generator) -> Weights:
    return {
        name: values.flatten()[torch.randperm(values.numel(), generator=generator)].view(values.shape)
        for name, values in theta_0.items()
    }


def _controls(
    theta_0: Weights,
    masks: Masks,
    generator: Generator,
    *,
    shuffle: Callable[[Masks, Generator], Masks] = _within,
    redraw: Callable[[Weights, Masks, Generator], Weights] = _new_glorot,
    redrawn_mask: Callable[[Masks, Masks], Masks] = lambda ticket, shuffled: ticket,
    together: bool = False,
    apply: bool = True,
) -> Controls:
    """The answer with one step exchanged.

    Args:
        together: shuffles the weights along with their mask.
        apply: whether the redrawn weights are masked.
    """
    new_masks = shuffle(masks, generator)
    shuffled = {name: values * new_masks[name] for name, values in theta_0.items()}
    if together:
        orders = {name: torch.randperm(mask.numel(), generator=generator) for name, mask in masks.items()}

        def move(values: Tensor, name: str) -> Tensor:
            return values.flatten()[orders[name]].view(values.shape)

        new_masks = {name: move(mask, name) for name, mask in masks.items()}
        shuffled = {name: move(values, name) * new_masks[name] for name, values in theta_0.items()}
    same = redrawn_mask(masks, new_masks)
    drawn = redraw(theta_0, masks, generator)
    redrawn = {name: values * same[name] if apply else values for name, values in drawn.items()}
    return {"shuffled": (shuffled, new_masks), "redrawn": (redrawn, same)}


def _exchange(**steps: object) -> Answer:
    return lambda theta_0, masks, generator: _controls(theta_0, masks, generator, **steps)


def _without_its_generator(theta_0: Weights, masks: Masks, generator: Generator) -> Controls:
    own = Generator()
    own.seed()
    return _controls(theta_0, masks, own)


# ------------------------------------------------------------- what is observed: facts that no draw changes


DRAWS = 12


@dataclass(frozen=True)
class Seed:
    """What an answer's generators are seeded with: each call gets a new one."""

    number: int

    def generator(self, step: int = 0) -> Generator:
        return Generator().manual_seed(self.number + step)

    def __repr__(self) -> str:
        return f"torch.Generator().manual_seed({self.number})"


def _counts(masks: Masks) -> list[int]:
    return [int(mask.sum()) for mask in masks.values()]


def _zero_where_pruned(weights: Weights, masks: Masks) -> bool:
    return all(bool(((weights[name] != 0) == mask).all()) for name, mask in masks.items())


def _shuffled(fn: Answer, theta_0: Weights, masks: Masks, seed: Seed) -> dict[str, bool]:
    """What holds for the shuffled masks in a number of draws."""
    results = [fn(theta_0, masks, seed.generator(draw))["shuffled"] for draw in range(DRAWS)]
    new = [result[1] for result in results]
    stack = {name: torch.stack([draw[name] for draw in new]) for name in masks}
    return {
        "the whole net keeps its number of weights": all(sum(_counts(draw)) == sum(_counts(masks)) for draw in new),
        "every matrix keeps its number of weights": all(_counts(draw) == _counts(masks) for draw in new),
        "every weight is sometimes kept, sometimes pruned": all(
            bool((draws.any(0) & ~draws.all(0)).float().mean() > 0.9) for draws in stack.values()
        ),
        "rows keep their numbers of weights": all(
            torch.equal(draw[name].sum(1), mask.sum(1)) for draw in new for name, mask in masks.items()
        ),
        "rows keep their numbers of weights, in another order": all(
            torch.equal(draw[name].sum(1).sort().values, mask.sum(1).sort().values)
            for draw in new
            for name, mask in masks.items()
        ),
        "two equal masks are shuffled alike": all(torch.equal(draw["first"], draw["second"]) for draw in new),
    }


def _shuffled_weights(fn: Answer, theta_0: Weights, masks: Masks, seed: Seed) -> dict[str, bool]:
    weights, new = fn(theta_0, masks, seed.generator())["shuffled"]
    return {
        "pruned weights are 0, and no others": _zero_where_pruned(weights, new),
        "kept weights are those of theta_0": all(
            torch.equal(weights[name][mask], theta_0[name][mask]) for name, mask in new.items()
        ),
    }


def _redrawn(fn: Answer, theta_0: Weights, masks: Masks, seed: Seed) -> dict[str, bool]:
    weights, same = fn(theta_0, masks, seed.generator())["redrawn"]
    spreads = {name: weights[name][mask].std().item() * math.sqrt(sum(mask.shape) / 2) for name, mask in same.items()}
    # a share, because two numbers of float32 may be equal by chance
    same_place = max((weights[name] == theta_0[name])[mask].float().mean().item() for name, mask in same.items())
    anywhere = max(torch.isin(weights[name], theta_0[name])[mask].float().mean().item() for name, mask in same.items())
    return {
        "the masks are those of the ticket": all(torch.equal(same[name], mask) for name, mask in masks.items()),
        "pruned weights are 0, and no others": _zero_where_pruned(weights, same),
        "most weights are those of theta_0": same_place > 0.5,
        "most weights are those of theta_0, in any order": anywhere > 0.5,
        "the weights have the spread of glorot": all(0.85 < spread < 1.15 for spread in spreads.values()),
    }


def _repeats(fn: Answer, theta_0: Weights, masks: Masks, seed: Seed) -> dict[str, bool]:
    first, again, other = (fn(theta_0, masks, seed.generator(step)) for step in (0, 0, 1))

    def equal(one: Controls, two: Controls, kind: str, part: int) -> bool:
        return all(torch.equal(one[kind][part][name], two[kind][part][name]) for name in masks)

    return {
        "the generator decides": equal(first, again, "shuffled", 1) and equal(first, again, "redrawn", 0),
        "another generator gives other masks": not equal(first, other, "shuffled", 1),
        "another generator gives other weights": not equal(first, other, "redrawn", 0),
    }


def _draw(generator: Generator) -> tuple:
    """A net whose first two masks are equal, and lose little, and whose last loses much; rows of unlike numbers."""
    rows, columns = whole_number(28, 32, generator), whole_number(30, 36, generator)
    shapes = {"first": (rows, columns), "second": (rows, columns), "output": (columns, rows)}
    theta_0 = {name: glorot(shape, generator) for name, shape in shapes.items()}
    order = torch.rand(rows, columns, generator=generator) + torch.linspace(0, 1, rows)[:, None]
    loses = order.flatten().argsort()[: whole_number(30, 45, generator) * rows * columns // 100]
    mask = torch.ones(rows * columns, dtype=torch.bool)
    mask[loses] = False
    mask = mask.view(rows, columns)
    few = torch.rand(columns, rows, generator=generator) + torch.linspace(0, 1, columns)[:, None] > 1.2
    return theta_0, {"first": mask, "second": mask.clone(), "output": few}, Seed(whole_number(0, 10**6, generator))


CONTROLS = Exercise(
    id="tickets.controls",
    title="find the bugs: two controls",
    minutes=25,
    difficulty=3,
    reference=controls,
    properties=(
        Property("shuffled: the masks", _draw, _shuffled, times=1),
        Property("shuffled: the weights", _draw, _shuffled_weights, times=1),
        Property("redrawn: masks and weights", _draw, _redrawn, times=1),
        Property("all is drawn from the generator", _draw, _repeats, times=1),
    ),
    mistakes=(
        Mistake(
            "The mask is shuffled over the whole net, and old weights are used again",
            "Both bugs are still there. Shuffled over the net, a layer that was to lose little loses as much as the "
            "others: the control differs in two things, and says nothing about one. And weights out of theta_0 are no "
            "new weights.",
            _exchange(shuffle=_over_the_net, redraw=_values_shuffled),
        ),
        Mistake(
            "The mask is shuffled over the whole net",
            "A layer that was to lose little then loses as much as the others: the control differs in two things, and "
            "says nothing about one. Shuffle each mask within its matrix.",
            _exchange(shuffle=_over_the_net),
        ),
        Mistake(
            "The redrawn weights are those of theta_0 in another order",
            "They are not new, and their spread is that of one draw. Take glorot(shape, generator).",
            _exchange(redraw=_values_shuffled),
        ),
        Mistake(
            "The redrawn weights are those of theta_0",
            "That is the ticket itself. Take glorot(shape, generator).",
            _exchange(redraw=lambda theta_0, masks, generator: theta_0),
        ),
        Mistake(
            "The redrawn weights have another spread",
            "torch.randn alone has the variance 1. New weights must come from the distribution of the old: glorot.",
            _exchange(
                redraw=lambda theta_0, masks, generator: {
                    name: torch.randn(values.shape, generator=generator) for name, values in theta_0.items()
                }
            ),
        ),
        Mistake(
            "The redrawn weights get the shuffled mask",
            "Then both differ from the ticket, mask and weights. The redrawn net keeps the ticket's masks.",
            _exchange(redrawn_mask=lambda ticket, shuffled: shuffled),
        ),
        Mistake(
            "The redrawn weights are not masked",
            "The new net would begin with all of its weights. Multiply by the mask.",
            _exchange(apply=False),
        ),
        Mistake(
            "Only whole rows change places",
            "A neuron with few weights still has few, in another place. Shuffle the weights of the matrix: flatten it "
            "first.",
            _exchange(shuffle=_whole_rows),
        ),
        Mistake(
            "Every row is shuffled for itself",
            "Each neuron keeps its number of weights. Asked is a shuffle within the matrix: flatten it first.",
            _exchange(shuffle=_row_by_row),
        ),
        Mistake(
            "A coin decides for each weight",
            "The number of weights is then only about the same. A permutation keeps it exactly.",
            _exchange(shuffle=_by_coin),
        ),
        Mistake(
            "One permutation for all matrices",
            "Two matrices of the same shape are then shuffled in the same way. Draw a permutation for each.",
            _exchange(shuffle=_one_permutation),
        ),
        Mistake(
            "The weights are shuffled together with their mask",
            "Then the kept weights are still the chosen ones, in other places. theta_0 stays, and only the mask moves.",
            _exchange(together=True),
        ),
        Mistake(
            "The generator is not used",
            "A run can only be repeated if everything is drawn from `generator`.",
            _without_its_generator,
        ),
    ),
    hints=(
        "A control differs from the ticket in one thing. What does each of the two differ in? Count the weights of "
        "every matrix before and after.",
        "Shuffled: for each mask its own torch.randperm(mask.numel(), generator=generator). Redrawn: nothing of "
        "theta_0 may be used but its shapes.",
        "A neighbour: does it matter who plays, or only how many of each club? Two clubs with 3 and 1 players.\n"
        "  field = {'blue': [1, 1, 1, 0], 'red': [0, 0, 0, 1]}\n"
        "Mixed over both clubs there may be 2 blue and 2 red: another question. Within each club:\n"
        "  {club: [places[i] for i in torch.randperm(4).tolist()] for club, places in field.items()}",
    ),
)
