"""Exercise 1 of notebook 09: the bucket of a vector (Kitaev et al. 2020, arXiv 2001.04451, sec. 2)."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Exercise, Mistake, Property, whole_number


def buckets(
    x: Float[Tensor, "length d_head"], rotations: Float[Tensor, "hashes d_head half_buckets"]
) -> Int[Tensor, "hashes length"]:
    """h(x) = argmax([xR; -xR]) for every round and every token: a number from 0 to 2 * half_buckets - 1."""
    rotated = x @ rotations  # (hashes, length, half_buckets)
    return torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1)


def _draw(hashes: int) -> Callable[[Generator], tuple]:
    def draw(generator: Generator) -> tuple:
        d_head, half = whole_number(3, 6, generator), whole_number(2, 5, generator)
        x = torch.randn(whole_number(9, 14, generator), d_head, generator=generator)
        return x, torch.randn(hashes, d_head, half, generator=generator)

    return draw


def _by_hand(generator: Generator) -> tuple:
    return torch.tensor([[2.0, 1.0], [1.0, 2.0], [-2.0, 1.0], [1.0, -2.0]]), torch.eye(2)[None]


def _of(scores: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, rotations: scores(x @ rotations).argmax(dim=-1)


HASH = Exercise(
    id="buckets.hash",
    title="the bucket of a vector",
    minutes=10,
    difficulty=1,
    reference=buckets,
    properties=(
        Property("by hand: four vectors in the plane, the two axes as directions", _by_hand, times=1),
        Property("one round", _draw(1)),
        Property("several rounds, each with its own rotation", _draw(3)),
    ),
    mistakes=(
        Mistake(
            "The negative half is missing",
            "You take the argmax of xR alone. Put -xR behind it: each direction counts twice, forwards and backwards.",
            _of(lambda rotated: rotated),
        ),
        Mistake(
            "The halves are exchanged",
            "xR comes first: buckets 0, 1, ... are the directions themselves, the later ones their negatives. "
            "(argmin instead of argmax makes the same mistake.)",
            _of(lambda rotated: torch.cat([-rotated, rotated], dim=-1)),
        ),
        Mistake(
            "A vector and its opposite get one bucket",
            "The absolute value forgets the sign, so opposite vectors, the least similar ones, meet.",
            _of(lambda rotated: rotated.abs()),
        ),
        Mistake(
            "The halves are joined along the tokens",
            "Join along the last dimension, the directions. You joined along the tokens, so each row saw one half.",
            lambda x, rotations: torch.cat([x @ rotations, -(x @ rotations)], dim=1).argmax(dim=-1)[:, : len(x)] * 2,
        ),
        Mistake(
            "All rounds use the first rotation",
            "Each round has a rotation of its own. With the same one, a second round finds nothing new.",
            lambda x, rotations: buckets(x, rotations[:1].expand_as(rotations)),
        ),
    ),
    hints=(
        "Which shape has x @ rotations? There is a row for each round and token: what are its numbers?",
        "The entry for direction m is how far the vector points along it, minus the entry how far it points the other "
        "way. Put both behind each other in the last dimension, then take the place of the largest.",
        "A neighbour: which of the four winds is nearest to a direction (x to the east, y to the north)?\n"
        "  d = torch.tensor([[3.0, -4.0]])\n"
        "  torch.cat([d, -d], dim=-1)                 [[3, -4, -3, 4]]: east, north, west, south\n"
        "  torch.cat([d, -d], dim=-1).argmax(dim=-1)  [3], south",
    ),
)
