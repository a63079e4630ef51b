"""Training under masks with exact rewinding, for the small net of `lottery` on digits.

A `Snapshot` holds all that the rest of a run depends on: the weights, the number of the step, which says the next
batch (and the rate, if a schedule has one), and the optimizer's moments. Rewinding to step 0 is to theta_0 with a new
optimizer. Late rewinding (Frankle, Dziugaite, Roy and Carbin 2019, arXiv 1903.01611) is to theta_k, a step k early in
training: weights, place in the data and moments all go back. With nothing pruned it repeats the first run to the bit.

NOTE the paper on tickets (1803.03635) trains 50,000 steps on 55,000 digits, validates on 5,000 and measures every 100
steps. Here 3,500 digits train, 500 validate, and 1,400 steps are 24 passes; the paper's are 55. Batches of 60 and Adam
at 1.2e-3 are the paper's.
NOTE the early-stop step is read off afterwards, as in the paper: where the validation loss was lowest. Nothing stops.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnlp_lessons.datasets.digits import CLASSES, load_digits
from effnlp_lessons.pruning.lottery import rewind_
from effnlp_lessons.pruning.masks import Masks, apply_masks_

Pair = tuple[Float[Tensor, "rows 784"], Int[Tensor, " rows"]]
ADAM = partial(torch.optim.Adam, lr=1.2e-3, fused=True)


@dataclass(frozen=True)
class DigitSplits:
    """Pixels in [0, 1] (rows, 784) and labels (rows,) to train, to validate and to test on."""

    train: Pair
    validation: Pair
    test: Pair


def digit_splits(validation: int = 500) -> DigitSplits:
    """The course's digits: `validation` of the 4,000 training digits are held out, the same of each class.

    Raises:
        ValueError: a number that is no multiple of ten, or leaves a class without validation or training digits.
    """
    digits = load_digits()
    train, test = digits.subset("train"), digits.subset("test")
    each, rest = divmod(validation, CLASSES)
    if rest or not 1 <= each < len(train) // CLASSES:
        raise ValueError(f"validation must be a multiple of {CLASSES} in 10 .. {len(train) - 10}, got {validation}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held_out = torch.zeros(len(train), dtype=torch.bool)
    for digit in range(CLASSES):
        held_out[order[train.labels[order] == digit][:each]] = True
    pixels = train.images.flatten(1).float() / 255
    return DigitSplits(
        (pixels[~held_out], train.labels[~held_out]),
        (pixels[held_out], train.labels[held_out]),
        (test.images.flatten(1).float() / 255, test.labels),
    )


@dataclass(frozen=True)
class TicketPlan:
    """How to train: `every` is the number of steps between two measurements, `seed` that of the order of the digits."""

    steps: int = 1_400
    batch_size: int = 60
    every: int = 20
    seed: int = 0
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = ADAM

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Snapshot:
    """All that the rest of a run depends on: the step, the weights, the optimizer's state (None: a new optimizer)."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None = None


def snapshot(model: nn.Module, step: int = 0, optimizer: torch.optim.Optimizer | None = None) -> Snapshot:
    """A copy of where a run stands; without an optimizer a start, theta_0."""
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Snapshot(step, weights, None if optimizer is None else copy.deepcopy(optimizer.state_dict()))


@dataclass(frozen=True)
class Curve:
    """Measured at `step` (steps done): mean validation loss (nats), per cent of the test digits right."""

    step: list[int]
    validation_loss: list[float]
    accuracy: list[float]

    @property
    def early_stop(self) -> int:
        """The place in the lists where the validation loss is lowest, the first of equals."""
        return min(range(len(self.step)), key=self.validation_loss.__getitem__)


def batch_order(rows: int, batch_size: int, steps: int, seed: int) -> Int[Tensor, "steps batch_size"]:
    """Which rows are in the batch of every step; a pass that leaves less than a batch over leaves it out.

    Row k depends on the seed and k alone, so a run that is rewound to step k sees the batches that it saw before.

    Raises:
        ValueError: fewer rows than a batch.
    """
    if rows < batch_size:
        raise ValueError(f"rows must be at least a batch of {batch_size}, got {rows}")
    generator, batches = torch.Generator().manual_seed(seed), rows // batch_size
    passes = [
        torch.randperm(rows, generator=generator)[: batches * batch_size].view(batches, batch_size)
        for _ in range(-(-steps // batches))
    ]
    return torch.cat(passes)[:steps]


def train_masked(
    model: nn.Module,
    masks: Masks,
    start: Snapshot,
    digits: DigitSplits,
    plan: TicketPlan,
    until: int | None = None,
) -> tuple[Curve, Snapshot]:
    """Rewind `model` to `start`, train it in place with its masks held, and measure on the way.

    Args:
        start: where to begin; a later step than 0 goes on with its moments and with the batches of its place.
        until: the step to stop at, by default the plan's last; the snapshot returned is of this step.

    Raises:
        ValueError: `until` before the start or after the plan's end; a loss that is not finite.
    """
    until = plan.steps if until is None else until
    if not 0 <= start.step <= until <= plan.steps:
        raise ValueError(f"until must be in {start.step} .. {plan.steps}, got {until}")
    rewind_(model, start.weights, masks)
    optimizer = plan.optimizer(list(model.parameters()))
    if start.optimizer is not None:
        optimizer.load_state_dict(copy.deepcopy(start.optimizer))
    parameters = dict(model.named_parameters())
    # as products: on random masks a product is forty times faster than a fill, half of the time of a step
    factors = [(parameters[name], mask.to(parameters[name].dtype)) for name, mask in masks.items()]
    order = batch_order(len(digits.train[1]), plan.batch_size, plan.steps, plan.seed)
    curve = Curve([], [], [])
    hooks = [weight.register_hook(lambda gradient, factor=factor: gradient * factor) for weight, factor in factors]
    try:
        for step in range(start.step, until):
            pixels, labels = (part[order[step]] for part in digits.train)
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
            with torch.no_grad():
                for weight, factor in factors:
                    weight.mul_(factor)  # moments from before the rewinding may have moved it
            if (step + 1) % plan.every == 0 or step + 1 == until:
                _measure(model, digits, step + 1, curve)
    finally:
        for hook in hooks:
            hook.remove()
    apply_masks_(model, masks)
    return curve, snapshot(model, until, optimizer)


@torch.no_grad()
def _measure(model: nn.Module, digits: DigitSplits, step: int, curve: Curve) -> None:
    loss = F.cross_entropy(model(digits.validation[0]), digits.validation[1]).item()
    if not loss < float("inf"):
        raise ValueError(f"the validation loss is {loss} at step {step}; try a lower learning rate")
    curve.step.append(step)
    curve.validation_loss.append(loss)
    curve.accuracy.append(100 * (model(digits.test[0]).argmax(-1) == digits.test[1]).double().mean().item())
