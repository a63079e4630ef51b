"""Exercise 5 of notebook 09: the tokens of a cluster (Roy et al. 2020, arXiv 2003.05997, sec. 4)."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Exercise, Mistake, Property, whole_number


def cluster_members(
    similarity: Float[Tensor, "clusters length"], real: Bool[Tensor, " length"], window: int
) -> Int[Tensor, "clusters window"]:
    """Each cluster's `window` most similar real tokens, in the order of the text."""
    return similarity.masked_fill(~real, -torch.inf).topk(window, dim=1).indices.sort(dim=1).values


def _draw(padding: bool) -> Callable[[Generator], tuple]:
    def draw(generator: Generator) -> tuple:
        length, window = whole_number(9, 14, generator), whole_number(3, 4, generator)
        similarity = torch.randn(whole_number(2, 4, generator), length, generator=generator)
        if not padding:
            return similarity, torch.ones(length, dtype=torch.bool), window
        real = torch.arange(length) < length - 1  # one padded token: no ties among several
        similarity[:, ~real] = similarity[:, ~real].abs() + 2  # padding that looks similar
        return similarity, real, window

    return draw


CLUSTER_MEMBERS = Exercise(
    id="buckets.cluster_members",
    title="the tokens of a cluster",
    minutes=10,
    difficulty=2,
    reference=cluster_members,
    properties=(
        Property(
            "by hand: one cluster, two of four tokens",
            lambda generator: (torch.tensor([[0.1, 0.9, 0.3, 1.0]]), torch.ones(4, dtype=torch.bool), 2),
            times=1,
        ),
        Property("several clusters take their tokens from the whole text", _draw(padding=False)),
        Property("padding is never taken", _draw(padding=True)),
    ),
    mistakes=(
        Mistake(
            "In the order of similarity",
            "Inside a cluster a causal mask compares places. Sort the chosen tokens by their position.",
            lambda similarity, real, window: similarity.masked_fill(~real, -torch.inf).topk(window, dim=1).indices,
        ),
        Mistake(
            "Padding is taken",
            "Give padded tokens a similarity of -inf before you choose.",
            lambda similarity, real, window: similarity.topk(window, dim=1).indices.sort(dim=1).values,
        ),
        Mistake(
            "Padding set to zero",
            "A similarity may be negative, so 0 is not small. Use -inf.",
            lambda similarity, real, window: (similarity * real).topk(window, dim=1).indices.sort(dim=1).values,
        ),
        Mistake(
            "The least similar tokens",
            "topk takes the largest, unless you ask otherwise. The largest similarity is the nearest token.",
            lambda similarity, real, window: (
                similarity.masked_fill(~real, torch.inf).topk(window, dim=1, largest=False).indices.sort(dim=1).values
            ),
        ),
        Mistake(
            "The same tokens for every cluster",
            "Each row of the similarity is one cluster and chooses for itself.",
            lambda similarity, real, window: cluster_members(similarity[:1].expand_as(similarity), real, window),
        ),
        Mistake(
            "The similarities instead of the tokens",
            "You return the values. The positions, `.indices`, are needed to gather queries, keys and values.",
            lambda similarity, real, window: (
                similarity.masked_fill(~real, -torch.inf).topk(window, dim=1).values.sort(dim=1).values.long()
            ),
        ),
    ),
    hints=(
        "Clusters choose tokens, not tokens clusters. Which tokens must nobody choose, and in which order are they?",
        "Fill the similarity of padding with -inf, take .topk(window, dim=1).indices, and sort each row.",
        "A neighbour: each of two teams takes the two best of four players, listed by shirt number; player 3 is ill.\n"
        "  skill = torch.tensor([[5.0, 7.0, 1.0, 9.0], [2.0, 1.0, 8.0, 9.0]])\n"
        "  skill[:, 3] = -torch.inf\n"
        "  skill.topk(2, dim=1).indices                       [[1, 0], [2, 0]]\n"
        "  skill.topk(2, dim=1).indices.sort(dim=1).values    [[0, 1], [0, 2]]",
    ),
)
