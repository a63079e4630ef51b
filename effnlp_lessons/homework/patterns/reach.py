"""Exercise 4 of notebook 08: which inputs of a stack of masked layers can influence which outputs."""

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Exercise, Mistake, Property, whole_number


def reach(masks: list[Bool[Tensor, "length length"]]) -> Bool[Tensor, "length length"]:
    """True at (i, j) where output i of the stack can depend on input j; `masks` are the layers', lowest first.

    Each layer adds its input to its output (the residual connection).
    """
    itself = torch.eye(len(masks[0]), dtype=torch.bool)
    reached = itself
    for mask in masks:
        # i depends on j if i reads some m, itself included, that depended on j one layer below
        reached = (mask | itself).float() @ reached.float() > 0
    return reached


def _steps(one: Tensor, other: Tensor) -> Tensor:
    """The pairs that are joined by a step in `one`, then a step in `other`."""
    return one.float() @ other.float() > 0


def _itself(masks: list) -> Tensor:
    return torch.eye(len(masks[0]), dtype=torch.bool)


def _without_residual(masks: list) -> Tensor:
    reached = _itself(masks)
    for mask in masks:
        reached = _steps(mask, reached)
    return reached


def _together(masks: list) -> Tensor:
    return torch.stack(masks).any(dim=0) | _itself(masks)


def _random_masks(layers: int, length: int, generator: Generator, share: float = 0.25) -> list[Tensor]:
    return [torch.rand(length, length, generator=generator) < share for _ in range(layers)]


def _draw_random(layers: tuple[int, int]) -> Callable[[Generator], tuple]:
    def draw(generator: Generator) -> tuple:
        return (_random_masks(whole_number(*layers, generator), whole_number(5, 8, generator), generator),)

    return draw


def _draw_windows(generator: Generator) -> tuple:
    """Causal windows of different widths, one per layer."""
    position = torch.arange(whole_number(9, 12, generator))
    distance = position[:, None] - position[None, :]
    widths = [whole_number(1, 2, generator) for _ in range(whole_number(2, 3, generator))]
    return ([(distance >= 0) & (distance <= width) for width in widths],)


def _draw_empty_layer(generator: Generator) -> tuple:
    masks = _random_masks(3, whole_number(5, 7, generator), generator)
    masks[whole_number(0, 2, generator)].zero_()
    return (masks,)


def _draw_chain(generator: Generator) -> tuple:
    """Layer 1 hands token 0 to token 1; layer 2 hands token 1 to token 2."""
    first, second = torch.zeros(2, 3, 3, dtype=torch.bool)
    first[1, 0] = second[2, 1] = True
    return ([first, second],)


REACH = Exercise(
    id="patterns.reach",
    title="how far a stack of masks reaches",
    minutes=15,
    difficulty=2,
    reference=reach,
    properties=(
        Property("one layer: its mask, and every token itself", _draw_random((1, 1))),
        Property("by hand: 0 is handed to 1, then 1 to 2, so 2 depends on 0", _draw_chain, times=1),
        Property("causal windows add up", _draw_windows),
        Property("two layers with any masks", _draw_random((2, 2))),
        Property("three or four layers with any masks", _draw_random((3, 4))),
        Property("a layer without any pair hands every token on", _draw_empty_layer),
    ),
    mistakes=(
        Mistake(
            "The residual connection is forgotten",
            "A layer adds its input to what attention returns. So output i depends on input i even if i may "
            "not attend to itself: add the diagonal to every mask.",
            _without_residual,
        ),
        Mistake(
            "The residual connection is added at the end only",
            "Every layer has one. A token may rest in some layers and move in others, so the diagonal "
            "belongs to every mask, before you multiply.",
            lambda masks: _without_residual(masks) | _itself(masks),
        ),
        Mistake(
            "The layers stand in the wrong order",
            "You let the top layer read first. Output i looks down: the top layer's mask stands on the left "
            "of the product, the lowest on the right.",
            lambda masks: reach(masks[::-1]),
        ),
        Mistake(
            "Only the last layer",
            "The top layer reads tokens that have already read others. Follow them down through all layers.",
            lambda masks: masks[-1] | _itself(masks),
        ),
        Mistake(
            "The top layer is left out",
            "One layer is missing. n masks are n steps; look at the last step of your loop.",
            lambda masks: reach(masks[:-1]) if len(masks) > 1 else _itself(masks),
        ),
        Mistake(
            "The lowest layer is left out",
            "One layer is missing. n masks are n steps; look at the first step of your loop.",
            lambda masks: reach(masks[1:]) if len(masks) > 1 else _itself(masks),
        ),
        Mistake(
            "Who is influenced by whom",
            "Your table is transposed. Rows are outputs, columns are inputs, as in a mask.",
            lambda masks: reach(masks).T,
        ),
        Mistake(
            "The masks are laid over each other",
            "A pair that some layer allows is one step. Layers also join steps: i reads m, and m has read j.",
            _together,
        ),
        Mistake(
            "Every layer gets the first layer's mask",
            "The layers differ. Use each one's own mask.",
            lambda masks: reach([masks[0]] * len(masks)),
        ),
    ),
    hints=(
        "Begin with what a stack of no layers does: output i depends on input i. Then add one layer at a time.",
        "After some layers you have `reached`. One layer more: i now depends on j if there is an m with "
        "(mask[i, m] or m == i) and reached[m, j]. That is a product of matrices, with `or` in place of the sum.",
        "A neighbour: flights. `monday[a, b]` is True if one flies from a to b on Monday; staying is allowed.\n"
        "  stay = torch.eye(4, dtype=torch.bool)\n"
        "  trips = (monday | stay).float() @ (tuesday | stay).float()      number of ways from a to b\n"
        "  trips > 0                                                       can one get from a to b?\n"
        "Here the first step stands on the left, because a row is where one starts. In a mask a row is an "
        "output, where one arrives.",
    ),
)
