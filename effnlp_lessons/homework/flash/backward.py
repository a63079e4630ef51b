"""Exercise 4 of notebook 11: gradients from recomputed tiles.

Dao et al. 2022 (arXiv 2205.14135, algorithm 4), in the form of FlashAttention-2 (arXiv 2307.08691, algorithm 2): only
output and log-sum-exp are kept from the forward pass.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def flash_backward(
    q: Float[Tensor, "queries d_head"],
    k: Float[Tensor, "keys d_head"],
    v: Float[Tensor, "keys d_head"],
    output: Float[Tensor, "queries d_head"],
    lse: Float[Tensor, " queries"],
    grad_output: Float[Tensor, "queries d_head"],
    block_queries: int,
    block_keys: int,
    causal: bool,
) -> tuple[Float[Tensor, "queries d_head"], Float[Tensor, "keys d_head"], Float[Tensor, "keys d_head"]]:
    """Gradients at q, k and v, tile by tile. A query that sees no key (lse -inf) gives and gets 0.

    delta = rowsum(dO o O); P = exp(S - lse); dV += P^T dO; dP = dO V^T; dS = P o (dP - delta) scale; dQ += dS K;
    dK += dS^T Q.
    """
    return _backward()(q, k, v, output, lse, grad_output, block_queries, block_keys, causal)


def _weights(s: Tensor, lse: Tensor) -> Tensor:
    return (s - lse.masked_fill(lse == -math.inf, 0)[:, None]).exp()


def _subtract(p: Tensor, dp: Tensor, delta: Tensor) -> Tensor:
    return p * (dp - delta[:, None])


def _backward(
    weights: Callable[[Tensor, Tensor], Tensor] = _weights,
    scores_scale: Callable[[int], float] = lambda d_head: d_head**-0.5,
    masked: bool = True,
    top_left: bool = False,
    subtract: Callable[[Tensor, Tensor, Tensor], Tensor] = _subtract,
    scaled: str = "dq dk",
    value_weights: Callable[[Tensor], Tensor] = lambda p: p.T,
    add_q: bool = True,
    add_k: bool = True,
) -> Answer:
    """The answer with one step exchanged.

    Args:
        weights: P of a tile, of (scores, lse).
        masked, top_left: whether the causal mask is made again, and whether from the top left.
        subtract: dS before the scale, of (P, dP, delta).
        scaled: the gradients that are multiplied by the scale.
        value_weights: what is multiplied by dO for dV, of P.
        add_q, add_k: False keeps only the last tile's part of dQ, of dK and dV.
    """

    def answer(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        lse: Tensor,
        grad_output: Tensor,
        block_queries: int,
        block_keys: int,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, scale = len(q), len(k), q.shape[1] ** -0.5
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        delta = (output * grad_output).sum(dim=1)
        for first in range(0, queries, block_queries):
            rows = slice(first, first + block_queries)
            own = torch.arange(queries)[rows, None] + (0 if top_left else keys - queries)
            for start in range(0, keys, block_keys):
                columns = slice(start, start + block_keys)
                s = q[rows] @ k[columns].T * scores_scale(q.shape[1])
                if causal and masked:
                    s = s.masked_fill(torch.arange(keys)[columns] > own, -math.inf)
                p = weights(s, lse[rows])
                ds = subtract(p, grad_output[rows] @ v[columns].T, delta[rows])
                of_q, of_k = ds @ k[columns], ds.T @ q[rows]
                of_q, of_k = of_q * scale if "dq" in scaled else of_q, of_k * scale if "dk" in scaled else of_k
                of_v = value_weights(p) @ grad_output[rows]
                dq[rows] = dq[rows] * add_q + of_q
                dk[columns], dv[columns] = dk[columns] * add_k + of_k, dv[columns] * add_k + of_v
        return dq, dk, dv

    return answer


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    s = q @ k.T / math.sqrt(q.shape[1])
    if causal:
        own = torch.arange(len(q))[:, None] + len(k) - len(q)
        s = s.masked_fill(torch.arange(len(k)) > own, -math.inf)
    lse = s.logsumexp(dim=1)
    return _weights(s, lse) @ v, lse


def _inputs(generator: Generator, queries: int, keys: int, d_head: int, *settings) -> tuple:
    lengths = (queries, queries, keys, keys)
    # tensors of their own, not views of one: the largest memory counts in the last property
    q, grad_output, k, v = (torch.randn(n, d_head, generator=generator, dtype=torch.float64) for n in lengths)
    output, lse = _forward(q, k, v, settings[-1])
    return q, k, v, output, lse, grad_output, *settings


def _draw(causal: bool, more: int = 0) -> Callable[[Generator], tuple]:
    """Lengths that no block divides; `more` 1 for more keys than queries, -1 for fewer."""

    def draw(generator: Generator) -> tuple:
        block_queries, block_keys = whole_number(3, 5, generator), whole_number(3, 4, generator)
        queries = block_queries + whole_number(1, block_queries - 1, generator)
        keys = max(2, queries + more * whole_number(2, 3, generator))
        keys += keys % block_keys == 0
        return _inputs(generator, queries, keys, whole_number(3, 6, generator), block_queries, block_keys, causal)

    return draw


def _dense(*inputs) -> tuple[Tensor, Tensor, Tensor]:
    q, k, *others, causal = inputs
    return flash_backward(q, k, *others[:-2], len(q), len(k), causal)


def _makes_no_table(fn: Answer, *inputs) -> bool:
    """Whether the largest tensor on the way is smaller than a table of all queries and keys."""
    tensors, settings = inputs[:6], inputs[6:]
    return largest_storage(lambda *x: fn(*x, *settings), *tensors, backward=False) < len(inputs[0]) * len(inputs[1])


BACKWARD = Exercise(
    id="flash.backward",
    title="gradients from tiles made again",
    minutes=40,
    difficulty=4,
    reference=flash_backward,
    properties=(
        Property("one square tile", lambda g: _inputs(g, 4, 4, 3, 4, 4, False), times=1),
        Property("lengths that no block divides", _draw(False), times=1),
        Property("causal, as many keys as queries", _draw(True), times=1),
        Property("causal, more keys than queries", _draw(True, 1), times=1),
        Property("causal, fewer keys: a query that sees none gives and gets 0", _draw(True, -1), times=1),
        Property(
            "no table of all queries and keys is made",
            lambda g: _inputs(g, 16, 16, 1, 8, 16, False),
            _makes_no_table,
            times=1,
        ),
    ),
    mistakes=(
        Mistake(
            "The scale is missing in dk",
            "S = q k^T scale depends on k with the same factor as on q. Multiply dS by the scale, for both.",
            _backward(scaled="dq"),
        ),
        Mistake(
            "The scale is missing in dq",
            "S = q k^T scale depends on q with the same factor as on k. Multiply dS by the scale, for both.",
            _backward(scaled="dk"),
        ),
        Mistake(
            "The scale is missing in dq and dk",
            "dS / dq = k times the scale. Multiply dS by it once, after the softmax's gradient.",
            _backward(scaled=""),
        ),
        Mistake(
            "The scale is missing in the scores",
            "The lse was made from scaled scores, so exp(S - lse) needs them scaled, too.",
            _backward(scores_scale=lambda d_head: 1.0),
        ),
        Mistake(
            "delta is forgotten",
            "The weights of a row sum to 1: when one grows, the others fall. Subtract delta = rowsum(dO * O) from dP.",
            _backward(subtract=lambda p, dp, delta: p * dp),
        ),
        Mistake(
            "delta in the wrong place",
            "dS = P * (dP - delta). You subtract delta after the product with P.",
            _backward(subtract=lambda p, dp, delta: p * dp - delta[:, None]),
        ),
        Mistake(
            "P is not transposed in dV",
            "Value j is added to the output of query i with weight P[i, j]; its gradient sums over the queries: "
            "P^T dO. In a square tile the shapes hide this.",
            _backward(value_weights=lambda p: p),
        ),
        Mistake(
            "The causal mask is not made again",
            "The scores are computed anew, the hidden ones too. Hide them again, or a key learns from its past.",
            _backward(masked=False),
        ),
        Mistake(
            "The causal mask, aligned at the top left",
            "Query i stands at key i + keys - queries, not at key i.",
            _backward(top_left=True),
        ),
        Mistake(
            "A softmax of the tile alone",
            "A tile's own softmax does not know the other tiles. exp(S - lse) gives the weights among all keys.",
            _backward(weights=lambda s, lse: s.softmax(dim=1).nan_to_num()),
        ),
        Mistake(
            "-inf minus -inf",
            "A query that sees no key has lse -inf, and -inf - (-inf) is NaN. Subtract 0 there: exp(-inf) is 0.",
            _backward(weights=lambda s, lse: (s - lse[:, None]).exp()),
        ),
        Mistake(
            "dq is overwritten",
            "Every tile of keys adds a part to dq of the same queries. Add it: +=.",
            _backward(add_q=False),
        ),
        Mistake(
            "dk and dv are overwritten",
            "Every block of queries adds a part to dk and dv of the same keys. Add it: +=.",
            _backward(add_k=False),
        ),
        Mistake(
            "All scores at once",
            "The result is right, but a table of all queries and keys was made. Hold one tile of scores at a time.",
            _dense,
        ),
    ),
    hints=(
        "Write the backward pass of softmax(q k^T scale) v for whole matrices first. Which step needs a whole row? "
        "The lse and delta replace it.",
        "delta = (grad_output * output).sum(1) before the loops. In a tile: p = exp(s - lse), 0 where hidden; dv += "
        "p.T @ do; dp = do @ v.T; ds = p * (dp - delta) * scale; dq += ds @ k; dk += ds.T @ q.",
        "A neighbour: y = sum of w[j] * x[j], w = softmax(a), for one row.\n"
        "  w = a.softmax(0); y = w @ x\n"
        "  da = w * (x - y)              the gradient at a: x less its weighted mean\n"
        "  half = slice(0, 2)            a part of it needs y and lse, not the other half:\n"
        "  (a[half] - a.logsumexp(0)).exp() * (x[half] - y)",
    ),
)
