"""Lottery tickets (Frankle and Carbin 2019, arXiv 1803.03635): a sparse net that trains from its own first weights.

    theta_0 -> train -> theta_j -> remove the smallest |theta_j| -> set what is left to theta_0 -> train -> ...

`find_tickets` is this loop, iterative pruning with rewinding, for any model. The paper's net is LeNet-300-100 on
MNIST: 266,200 weights, of which each round removes 20 % of those still there, in the output layer 10 %, layer by
layer; biases stay. Two controls ask what makes a ticket: its mask with new first weights, and its first weights with
as many places drawn at random in each layer. `lottery_training` trains the net, and can rewind to a later step.

NOTE 10 % of the *original* weights a round, as is usual in Transformers, take a rate that grows from round to round:
`rate_of_the_original`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from effnlp_lessons.pruning.masks import Masks, apply_masks_, full_masks, local_masks

LAYERS = ("0.weight", "2.weight", "4.weight")
WIDTHS = (784, 300, 100, 10)
SIZES = {name: inputs * outputs for name, inputs, outputs in zip(LAYERS, WIDTHS[:-1], WIDTHS[1:], strict=True)}
RATES = {"0.weight": 0.2, "2.weight": 0.2, "4.weight": 0.1}  # of what is left, each round

Result = TypeVar("Result")


# --------------------------------------------------------------------------------------- the net, the ladder


def lenet_300_100(seed: int) -> nn.Sequential:
    """Pixels (batch, 784) to logits (batch, 10), ReLU between; Glorot normal weights from `seed`, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[nn.Module] = []
    for inputs, outputs in zip(WIDTHS[:-1], WIDTHS[1:], strict=True):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        nn.init.xavier_normal_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def ladder(rounds: int, sizes: Mapping[str, int] = SIZES, rates: Mapping[str, float] = RATES) -> list[float]:
    """Per cent of all weights left after 0 .. `rounds` rounds: 100, 80.04, 64.06, 51.28, ... for LeNet-300-100.

    Raises:
        ValueError: a negative number of rounds, or other names in `rates` than in `sizes`.
    """
    if rounds < 0:
        raise ValueError(f"rounds must be >= 0, got {rounds}")
    if set(sizes) != set(rates):
        raise ValueError(f"sizes and rates must have the same names, got {sorted(sizes)} and {sorted(rates)}")
    left, steps = dict(sizes), []
    for _ in range(rounds + 1):
        steps.append(100 * sum(left.values()) / sum(sizes.values()))
        left = {name: n - round(rates[name] * n) for name, n in left.items()}
    return steps


def rate_of_the_original(done: int, share: float = 0.1) -> float:
    """The rate that removes `share` of all weights once `done` rounds have removed as much: 1/10, 1/9, 1/8, ...

    Raises:
        ValueError: when less than `share` is left.
    """
    left = 1 - done * share
    if done < 0 or not 0 < share <= left + 1e-9:
        raise ValueError(f"done and share must leave at least one more share, got {done} and {share}")
    return min(share / left, 1.0)


# --------------------------------------------------------------------------------------- the loop of the paper


def rewind_(model: nn.Module, weights: Mapping[str, Tensor], masks: Masks) -> None:
    """Set the parameters of `model` to `weights` to the bit, and what is masked to 0, in place (the paper's step 4).

    Raises:
        RuntimeError: parameters of other names or shapes.
    """
    model.load_state_dict(weights)
    apply_masks_(model, masks)


@dataclass(frozen=True)
class Ticket(Generic[Result]):
    """One round: the masks it was trained under, what the training gave back, and the masks that follow from it."""

    round: int
    masks: Masks
    result: Result
    next_masks: Masks


def find_tickets(
    model: nn.Module,
    train: Callable[[Masks], Result],
    rounds: int,
    prune: Callable[[nn.Module, Masks], Masks],
    names: Iterable[str] | None = None,
) -> Iterator[Ticket[Result]]:
    """Iterative pruning with rewinding: round 0 is dense, round r has been pruned r times. Trains `model` in place.

    Args:
        train: rewinds `model` to its start under these masks, trains it with them held, and returns a result.
        prune: the next masks from the trained model and the present ones, for example `magnitude_round`.
        names: linear layers to prune; None: as in `masks.prunable`.

    Raises:
        ValueError: a negative number of rounds; masked weights that are not 0 after `train`: they grew back.
    """
    if rounds < 0:
        raise ValueError(f"rounds must be >= 0, got {rounds}")
    masks = full_masks(model, names)
    for number in range(rounds + 1):
        result = train(masks)
        if regrown(model, masks):
            raise ValueError(f"train must hold the masks: {regrown(model, masks)} masked weights are not 0")
        following = prune(model, masks)
        yield Ticket(number, masks, result, following)
        masks = following


def magnitude_round(model: nn.Module, masks: Masks, rates: Mapping[str, float] = RATES) -> Masks:
    """Remove in each layer its rate of the weights still there, the smallest |w|."""
    scores = {name: parameter.detach().abs() for name, parameter in model.named_parameters() if name in masks}
    return local_masks(scores, rates, masks)


def shuffled(masks: Masks, seed: int) -> Masks:
    """The control of the structure: in each layer as many places, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)
        for name, mask in masks.items()
    }


def regrown(model: nn.Module, masks: Masks) -> int:
    """How many masked weights are not 0: 0 where a mask was held, nearly all where it was applied only once."""
    parameters = dict(model.named_parameters())
    return sum(int((parameters[name][~mask] != 0).sum()) for name, mask in masks.items())


# --------------------------------------------------------------------------------------- what is in a ticket


def removal_rounds(masks: Sequence[Masks]) -> dict[str, UInt8[Tensor, "*shape"]]:
    """In which round each weight was removed, one byte a weight, from the masks of rounds 0, 1, ...

    What the last masks still keep has their number plus one; `masks_after` gives the masks back.

    Raises:
        ValueError: no masks or more than 255; a weight that comes back; a first mask that is not full.
    """
    if not 1 <= len(masks) <= 255:
        raise ValueError(f"masks must be of 1 to 255 rounds, got {len(masks)}")
    if not all(mask.all() for mask in masks[0].values()):
        raise ValueError("masks must begin with full ones, those of round 0")
    for before, after in zip(masks[:-1], masks[1:], strict=True):
        if any((after[name] & ~before[name]).any() for name in before):
            raise ValueError("masks must only lose weights from round to round")
    return {name: torch.stack([m[name] for m in masks]).sum(0).to(torch.uint8) for name in masks[0]}


def masks_after(removed: Mapping[str, UInt8[Tensor, "*shape"]], round: int) -> Masks:
    """The masks of one round out of `removal_rounds`."""
    return {name: rounds > round for name, rounds in removed.items()}


def overlap(first: Masks, second: Masks) -> dict[str, float]:
    """Jaccard index of two masks, layer by layer: kept by both over kept by one of them; 1 where both keep nothing."""
    found = {}
    for name, mask in first.items():
        both, either = int((mask & second[name]).sum()), int((mask | second[name]).sum())
        found[name] = both / either if either else 1.0
    return found


def overlap_by_chance(first: float, second: float) -> float:
    """The Jaccard index to expect of independent masks that keep these shares: p q / (p + q - p q).

    Raises:
        ValueError: a share outside 0 .. 1, or two of 0.
    """
    if not (0 <= first <= 1 and 0 <= second <= 1 and first + second > 0):
        raise ValueError(f"shares must be in 0 .. 1 and not both 0, got {first} and {second}")
    return first * second / (first + second - first * second)


def distances(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], masks: Masks, next_masks: Masks
) -> dict[str, dict[str, float]]:
    """Mean |theta_end - theta_start| in each layer, of the weights that pruning keeps and of those that it removes.

    Only weights that `masks` held in the training count. NaN where there are none.
    """
    found = {}
    for name, mask in masks.items():
        moved = (end[name] - start[name]).abs()
        parts = {"kept": next_masks[name], "pruned": mask & ~next_masks[name]}
        found[name] = {part: moved[where].mean().item() for part, where in parts.items()}
    return found
