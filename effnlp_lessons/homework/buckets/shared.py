"""Exercise 4 of notebook 09, find the bug: attention in one chunk with shared queries and keys.

Reformer (Kitaev et al. 2020, arXiv 2001.04451, sec. 2): keys are the queries at length 1; a token attends to
itself only if there is nothing else.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number

ITSELF = -1e5  # added to a token's score with itself


def shared_attention(
    qk: Float[Tensor, "length d_head"], v: Float[Tensor, "length d_head"]
) -> Float[Tensor, "length d_head"]:
    """Causal attention with keys qk / |qk| and no further scale; itself only for a token with nothing else."""
    scores = qk @ F.normalize(qk, dim=-1).T
    length = len(qk)
    scores = scores + ITSELF * torch.eye(length, dtype=qk.dtype)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v


def _with(
    keys: Callable[[Tensor], Tensor] = lambda qk: F.normalize(qk, dim=-1),
    itself: float = ITSELF,
    causal: bool = True,
    scale: Callable[[Tensor], float] = lambda qk: 1.0,
    queries: Callable[[Tensor], Tensor] = lambda qk: qk,
) -> Answer:
    def answer(qk: Tensor, v: Tensor) -> Tensor:
        scores = queries(qk) @ keys(qk).T * scale(qk)
        scores = (
            scores.masked_fill(torch.eye(len(qk), dtype=torch.bool), itself)
            if itself == -torch.inf
            else (scores + itself * torch.eye(len(qk), dtype=qk.dtype))
        )
        if causal:
            scores = scores.masked_fill(torch.ones(len(qk), len(qk), dtype=torch.bool).triu(1), -torch.inf)
        return scores.softmax(dim=-1) @ v

    return answer


def _draw(length: int) -> Callable[[Generator], tuple]:
    def draw(generator: Generator) -> tuple:
        tokens = length + whole_number(0, 4, generator) * (length > 1)
        return tuple(
            2 * torch.randn(2, tokens, whole_number(3, 6, generator), generator=generator, dtype=torch.float64)
        )

    return draw


SHARED_ATTENTION = Exercise(
    id="buckets.shared_attention",
    title="find the bug: shared queries and keys",
    minutes=20,
    difficulty=3,
    reference=shared_attention,
    properties=(
        Property("one token: it has nothing but itself", _draw(1), times=1),
        Property("two tokens: the second sees the first alone", _draw(2), times=1),
        Property("more tokens", _draw(5)),
    ),
    mistakes=(
        Mistake(
            "Itself is forbidden with -inf",
            "The first token then has no key at all, and softmax gives NaN. Subtract something large instead.",
            _with(itself=-torch.inf),
        ),
        Mistake(
            "Itself is allowed",
            "A token fits best to itself, so its weight would go there. Subtract something large from its own score.",
            _with(itself=0.0),
        ),
        Mistake(
            "The keys are not normalised",
            "Keys must have length 1, or long vectors win every softmax.",
            _with(keys=lambda qk: qk),
        ),
        Mistake(
            "The queries are normalised too",
            "Only keys have length 1. The length of the query sets how sharp its softmax is.",
            _with(queries=lambda qk: F.normalize(qk, dim=-1)),
        ),
        Mistake(
            "Scaled by sqrt(d_head) once more",
            "With keys of length 1 the scores do not grow with the width: no further scale.",
            _with(scale=lambda qk: qk.shape[-1] ** -0.5),
        ),
        Mistake(
            "The future is visible",
            "Scores with later tokens must be -inf before the softmax.",
            _with(causal=False),
        ),
        Mistake(
            "Normalised along the tokens",
            "Each key has length 1 over its own channels, the last dimension, not each channel over the tokens.",
            _with(keys=lambda qk: F.normalize(qk, dim=0)),
        ),
    ),
    hints=(
        "Run it with one token. Which scores does the softmax see, and what is the softmax of a row of -inf?",
        "Itself should be the last resort: allowed, but far below every other score. And compare the lengths of the "
        "keys with 1.",
        "A neighbour: choose a friend to dance with, yourself only if nobody is there.\n"
        "  liking = torch.tensor([9.0, 2.0, 1.0])              myself first\n"
        "  (liking + torch.tensor([-1e5, 0, 0])).softmax(0)    [0, 0.73, 0.27]\n"
        "  torch.tensor([9.0 - 1e5]).softmax(0)                [1]: alone, I dance with myself",
    ),
)
