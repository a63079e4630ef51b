"""Exercises 1 to 3 of notebook 10: linear attention, whole, causal and step by step.

Katharopoulos et al. 2020, arXiv 2006.16236, Eq. 5, 9 and 16 to 20, with phi(x) = elu(x) + 1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def phi(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def linear_attention(
    q: Float[Tensor, "length d_head"],
    k: Float[Tensor, "length d_head"],
    v: Float[Tensor, "length d_value"],
    real: Bool[Tensor, " length"],
) -> Float[Tensor, "length d_value"]:
    """phi(Q)(phi(K)ᵀV) divided by phi(Q)(phi(K)ᵀ1), without padded keys."""
    keys = phi(k) * real[:, None]
    return phi(q) @ (keys.T @ v) / (phi(q) @ keys.sum(dim=0))[:, None]


def causal_linear_attention(
    q: Float[Tensor, "length d_head"], k: Float[Tensor, "length d_head"], v: Float[Tensor, "length d_value"]
) -> Float[Tensor, "length d_value"]:
    """The same over the keys j <= i of each query i, by running sums."""
    sums = (phi(k)[:, :, None] * v[:, None, :]).cumsum(dim=0)
    normaliser = phi(k).cumsum(dim=0)
    return (phi(q)[:, None, :] @ sums)[:, 0] / (phi(q) * normaliser).sum(dim=-1, keepdim=True)


def linear_step(
    q: Float[Tensor, " d_head"],
    k: Float[Tensor, " d_head"],
    v: Float[Tensor, " d_value"],
    sums: Float[Tensor, "d_head d_value"],
    normaliser: Float[Tensor, " d_head"],
) -> tuple[Float[Tensor, " d_value"], Float[Tensor, "d_head d_value"], Float[Tensor, " d_head"]]:
    """One token: add it to the state, read with its query; output, new sums, new normaliser."""
    sums = sums + torch.outer(phi(k), v)
    normaliser = normaliser + phi(k)
    return phi(q) @ sums / (phi(q) @ normaliser), sums, normaliser


def _vectors(generator: Generator, length: int) -> tuple[Tensor, Tensor, Tensor]:
    d_head, d_value = whole_number(3, 4, generator), whole_number(5, 6, generator)
    q, k = torch.randn(2, length, d_head, generator=generator, dtype=torch.float64)
    return q, k, torch.randn(length, d_value, generator=generator, dtype=torch.float64)


def _draw_masked(padding: bool) -> Callable[[Generator], tuple]:
    def draw(generator: Generator) -> tuple:
        length = whole_number(6, 9, generator)
        return *_vectors(generator, length), torch.arange(length) < length - 2 * padding

    return draw


def _draw_causal(length: int) -> Callable[[Generator], tuple]:
    return lambda generator: _vectors(generator, length + whole_number(0, 3, generator) * (length > 1))


def _whole(
    feature: Callable[[Tensor], Tensor] = phi,
    masked: Callable[[Tensor, Tensor], Tensor] = lambda keys, real: keys * real[:, None],
    divide: Callable[[Tensor, Tensor], Tensor] = lambda q, keys: (q @ keys.sum(dim=0))[:, None],
) -> Answer:
    def answer(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        keys = masked(feature(k), real)
        return feature(q) @ (keys.T @ v) / divide(feature(q), keys)

    return answer


LINEAR_ATTENTION = Exercise(
    id="recurrent.linear_attention",
    title="linear attention",
    minutes=15,
    difficulty=1,
    reference=linear_attention,
    properties=(
        Property(
            "values of 1 give 1: the weights sum to 1",
            lambda g: (*_vectors(g, 6)[:2], torch.ones(6, 2).double(), torch.ones(6, dtype=torch.bool)),
            times=1,
        ),
        Property("every key is real", _draw_masked(False)),
        Property("padded keys count nothing", _draw_masked(True)),
    ),
    mistakes=(
        Mistake(
            "The normaliser is forgotten",
            "Without the divisor the weights do not sum to 1, and the output grows with the text.",
            _whole(divide=lambda q, keys: torch.ones(len(q), 1, dtype=q.dtype)),
        ),
        Mistake(
            "Divided by the number of keys",
            "The divisor is the sum of the similarities of this query, not the number of keys.",
            _whole(divide=lambda q, keys: torch.full((len(q), 1), len(keys), dtype=q.dtype)),
        ),
        Mistake(
            "Padding counts",
            "Multiply phi(k) by the mask. phi(0) is 1, so zeros in k would not do.",
            _whole(masked=lambda keys, real: keys),
        ),
        Mistake(
            "Padding is zeroed before phi",
            "phi(0) = elu(0) + 1 = 1. The mask must come after phi.",
            lambda q, k, v, real: linear_attention(q, k * real[:, None], v, torch.ones_like(real)),
        ),
        Mistake(
            "elu without the 1",
            "elu is negative for negative inputs, and a sum of similarities can come near 0. Add 1.",
            _whole(feature=F.elu),
        ),
        Mistake(
            "Scaled by sqrt(d_head)",
            "Here nothing is scaled: phi is not linear, so a scale inside would be another phi.",
            _whole(feature=lambda x: phi(x / x.shape[-1] ** 0.5)),
        ),
        Mistake(
            "The softmax is still there",
            "This is attention by softmax. With phi(q).phi(k), keys and values can be multiplied first.",
            lambda q, k, v, real: (q @ k.T).masked_fill(~real, -torch.inf).softmax(dim=-1) @ v,
        ),
    ),
    hints=(
        "Which products have no query in them? Compute these two first. What are their shapes?",
        "keys = phi(k) * real[:, None]; then keys.T @ v is (d_head, d_value), keys.sum(0) is (d_head). Each query "
        "multiplies both, and divides.",
        "A neighbour: the mean price at shops, weighted by shelves times a customer's liking, the same for all.\n"
        "  shelves = torch.tensor([1.0, 3.0]); price = torch.tensor([2.0, 4.0]); liking = 5.0\n"
        "  liking * (shelves @ price) / (liking * shelves.sum())     3.5: both sums were made once",
    ),
)


def _causal(
    past: Callable[[Tensor], Tensor] = lambda x: x.cumsum(dim=0),
    past_normaliser: Callable[[Tensor], Tensor] | None = None,
    divide: bool = True,
) -> Answer:
    def answer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sums = past(phi(k)[:, :, None] * v[:, None, :])
        normaliser = (past_normaliser or past)(phi(k))
        mixed = torch.einsum("id,idm->im", phi(q), sums)
        return mixed / (phi(q) * normaliser).sum(-1, keepdim=True) if divide else mixed

    return answer


PREFIX_SUM = Exercise(
    id="recurrent.prefix_sum",
    title="linear attention by running sums",
    minutes=20,
    difficulty=2,
    reference=causal_linear_attention,
    properties=(
        Property("one token gives its own value", _draw_causal(1), times=1),
        Property("two tokens", _draw_causal(2)),
        Property("more tokens", _draw_causal(6)),
    ),
    mistakes=(
        Mistake(
            "The present is left out",
            "Query i sees the keys j <= i, itself included. The sum must take in token i before it is read.",
            _causal(past=lambda x: x.cumsum(dim=0) - x),
        ),
        Mistake(
            "The present is counted twice",
            "The running sum up to i holds token i already. Do not add it again.",
            _causal(past=lambda x: x.cumsum(dim=0) + x),
        ),
        Mistake(
            "The future is seen",
            "These are the sums over all keys. Query i may see those up to i only: running sums.",
            _causal(past=lambda x: x.sum(dim=0, keepdim=True).expand_as(x)),
        ),
        Mistake(
            "The sums run backwards",
            "Query i sees what came before it, not what comes after.",
            _causal(past=lambda x: x.flip(0).cumsum(dim=0).flip(0)),
        ),
        Mistake(
            "One token of the future is seen",
            "The sum for query i must end with token i, not with token i + 1.",
            _causal(past=lambda x: torch.cat([x.cumsum(dim=0)[1:], x.sum(dim=0, keepdim=True)])),
        ),
        Mistake(
            "The normaliser is forgotten",
            "Without the divisor the output grows from token to token.",
            _causal(divide=False),
        ),
        Mistake(
            "The normaliser sees all keys",
            "The divisor of query i sums over the same keys as its numerator: up to i.",
            _causal(past_normaliser=lambda x: x.sum(dim=0, keepdim=True).expand_as(x)),
        ),
    ),
    hints=(
        "Every token brings an outer product phi(k_j) v_j. Which function gives all running sums at once?",
        "phi(k)[:, :, None] * v[:, None, :] has an outer product for each token; cumsum(dim=0) adds them up. "
        "The same for phi(k) alone.",
        "A neighbour: the mean of all marks so far, weighted by effort.\n"
        "  effort = torch.tensor([1.0, 2.0, 1.0]); mark = torch.tensor([4.0, 1.0, 6.0])\n"
        "  (effort * mark).cumsum(0)                       [4, 6, 12]\n"
        "  (effort * mark).cumsum(0) / effort.cumsum(0)    [4, 2, 3]",
    ),
)


def _draw_step(empty: bool) -> Callable[[Generator], tuple]:
    def draw(generator: Generator) -> tuple:
        q, k, v = (x[0] for x in _vectors(generator, 1))
        sums = torch.rand(len(k), len(v), generator=generator, dtype=torch.float64) + 1
        normaliser = torch.rand(len(k), generator=generator, dtype=torch.float64) + 1
        return q, k, v, sums * (not empty), normaliser * (not empty)

    return draw


def _step(
    read_old: bool = False,
    divide: bool = True,
    feature_k: Callable[[Tensor], Tensor] = phi,
    feature_q: Callable[[Tensor], Tensor] = phi,
    keep: float = 1.0,
    add_to_normaliser: bool = True,
) -> Answer:
    def answer(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, normaliser: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        new_sums = keep * sums + torch.outer(feature_k(k), v)
        new_normaliser = keep * normaliser + feature_k(k) * add_to_normaliser
        s, z = (sums, normaliser) if read_old else (new_sums, new_normaliser)
        out = feature_q(q) @ s
        return out / (feature_q(q) @ z) if divide else out, new_sums, new_normaliser

    return answer


LINEAR_STEP = Exercise(
    id="recurrent.linear_step",
    title="one step of a recurrence",
    minutes=10,
    difficulty=2,
    reference=linear_step,
    properties=(
        Property("the first token, an empty state: the output is its value", _draw_step(True), times=1),
        Property("a state with a past", _draw_step(False)),
    ),
    mistakes=(
        Mistake(
            "Read before written",
            "A token sees itself: add it to the state first, then read.",
            _step(read_old=True),
        ),
        Mistake(
            "The normaliser is forgotten",
            "Divide by phi(q) @ normaliser, or the output grows with every token.",
            _step(divide=False),
        ),
        Mistake(
            "The normaliser is never moved",
            "It is part of the state: it takes phi(k) in at each step, as the sums take in phi(k) v.",
            _step(add_to_normaliser=False),
        ),
        Mistake(
            "The key without phi",
            "What goes into the state is phi(k), not k.",
            _step(feature_k=lambda k: k),
        ),
        Mistake(
            "The query without phi",
            "Read with phi(q), or similarities can be negative.",
            _step(feature_q=lambda q: q),
        ),
        Mistake(
            "The old state is thrown away",
            "The new token is added to what is there.",
            _step(keep=0.0),
        ),
    ),
    hints=(
        "Three lines: two that change the state, one that reads it. In which order, if a token may see itself?",
        "torch.outer(phi(k), v) has the shape of the sums, phi(k) that of the normaliser. Read with phi(q) and divide.",
        "A neighbour: a running mean of marks, weighted by effort, as two numbers.\n"
        "  total, weight = 6.0, 3.0              # so far\n"
        "  effort, mark = 1.0, 6.0               # now\n"
        "  total, weight = total + effort * mark, weight + effort\n"
        "  total / weight                        3.0",
    ),
)
