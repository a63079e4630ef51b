"""Exercise 7 of notebook 08: attention between permuted blocks.

BlockBERT (Qiu et al. 2019, arXiv 1911.02972, sec. 3): head h pairs every block of queries with one block of keys.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def block_permuted_attention(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_head"],
    permutations: Int[Tensor, "heads blocks"],
) -> Float[Tensor, "batch heads length d_head"]:
    """Block b of the queries of head h attends to block permutations[h, b] of keys and values, and to no other.

    `length` is a multiple of the number of blocks.
    """
    heads, blocks = permutations.shape
    # (batch, heads, blocks, size, d_head)
    q, k, v = (x.unflatten(2, (blocks, -1)) for x in (q, k, v))
    head = torch.arange(heads)[:, None]
    k, v = k[:, head, permutations], v[:, head, permutations]
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return (weights @ v).flatten(2, 3)


def _move(x: Tensor, permutations: Tensor) -> Tensor:
    """The blocks of `x` (batch, heads, length, d_head) in the order given for each head."""
    heads, blocks = permutations.shape
    cut = x.unflatten(2, (blocks, -1))
    return cut[:, torch.arange(heads)[:, None], permutations].flatten(2, 3)


def _within_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: int, scale: float | None = None, dim: int = -1) -> Tensor:
    """Every block attends to the keys that stand at its own place."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q, k, v = (x.unflatten(2, (blocks, -1)) for x in (q, k, v))
    return ((q @ k.mT * scale).softmax(dim=dim) @ v).flatten(2, 3)


def _moved(change: Callable[[Tensor], Tensor] = lambda permutations: permutations, **settings) -> Answer:
    """The answer with another permutation, scale, or dimension of the softmax, for the mistakes."""

    def answer(q: Tensor, k: Tensor, v: Tensor, permutations: Tensor) -> Tensor:
        used = change(permutations)
        return _within_blocks(q, _move(k, used), _move(v, used), permutations.shape[1], **settings)

    return answer


def _interleaved(q: Tensor, k: Tensor, v: Tensor, permutations: Tensor) -> Tensor:
    """Blocks of every blocks-th token instead of neighbours."""
    blocks = permutations.shape[1]
    q, k, v = (x.unflatten(2, (-1, blocks)).transpose(2, 3).flatten(2, 3) for x in (q, k, v))
    return block_permuted_attention(q, k, v, permutations).unflatten(2, (blocks, -1)).transpose(2, 3).flatten(2, 3)


def _draw(kind: str, dtype: torch.dtype = torch.float32) -> Callable[[Generator], tuple]:
    """Random q, k, v, and permutations: "one block", "own block", "shift", or "any", none of them its inverse."""

    def draw(generator: Generator) -> tuple:
        batch, heads, size, d_head = (whole_number(*bounds, generator) for bounds in ((1, 2), (2, 3), (2, 4), (2, 5)))
        blocks = 1 if kind == "one block" else whole_number(3, 4, generator)
        permutations = torch.arange(blocks).repeat(heads, 1)
        if kind == "shift":
            permutations = (permutations + 1) % blocks
        if kind == "any":
            shifts = torch.arange(1, heads + 1) % blocks
            names = torch.randperm(blocks, generator=generator)  # a shift among renamed blocks is a cycle, too
            permutations = names[(names.argsort() + shifts[:, None]) % blocks]
        shape = (batch, heads, blocks * size, d_head)
        return *(torch.randn(3, *shape, generator=generator, dtype=dtype)), permutations

    return draw


BLOCK_PERMUTED_ATTENTION = Exercise(
    id="patterns.block_permuted_attention",
    title="attention between permuted blocks",
    minutes=20,
    difficulty=3,
    reference=block_permuted_attention,
    properties=(
        Property("one block: plain attention", _draw("one block")),
        Property("every block paired with itself", _draw("own block")),
        Property("every block reads the next one, the last reads the first", _draw("shift")),
        Property("a permutation of its own for every head", _draw("any")),
        Property("float64 stays float64", _draw("any", torch.float64), times=1),
    ),
    mistakes=(
        Mistake(
            "The inverse permutation",
            "You send key block b to query block permutations[h, b]. Asked is the other direction: query "
            "block b reads key block permutations[h, b]. Index with the permutation; do not scatter by it.",
            _moved(lambda permutations: permutations.argsort(dim=1)),
        ),
        Mistake(
            "Queries and keys are permuted together",
            "Queries, keys and values move alike, so every block still meets itself, and the output stands "
            "in another order. Leave the queries where they are.",
            lambda q, k, v, permutations: _within_blocks(
                *(_move(x, permutations) for x in (q, k, v)), permutations.shape[1]
            ),
        ),
        Mistake(
            "Every block reads itself",
            "The permutation has no effect. Are queries and keys permuted together, and the output put back?",
            lambda q, k, v, permutations: _within_blocks(q, k, v, permutations.shape[1]),
        ),
        Mistake(
            "One permutation for all heads",
            "All heads use the permutation of head 0. Each head has its own row.",
            _moved(lambda permutations: permutations[:1].expand_as(permutations)),
        ),
        Mistake(
            "The values are not permuted with the keys",
            "The weights belong to the keys of another block, and they mix values of the own block. Move both.",
            lambda q, k, v, permutations: _within_blocks(q, _move(k, permutations), v, permutations.shape[1]),
        ),
        Mistake(
            "The scores are not scaled",
            "Divide the scores by the square root of d_head.",
            _moved(scale=1.0),
        ),
        Mistake(
            "The softmax runs over the queries",
            "Every query's weights sum to 1, over its keys: the last dimension of the scores.",
            _moved(dim=-2),
        ),
        Mistake(
            "The blocks are cut the wrong way",
            "Your block b holds every blocks-th token. A block is a run of neighbours: the length becomes "
            "(blocks, size), in this order.",
            _interleaved,
        ),
    ),
    hints=(
        "Cut the length into (blocks, size). Then the blocks are a dimension of their own, and the rest is "
        "plain attention with one dimension more. Which of q, k and v must be put into another order?",
        "k as (batch, heads, blocks, size, d_head) can be indexed with two index tensors in the second and "
        "third dimension: the number of the head, (heads, 1), and the permutation, (heads, blocks).",
        "A neighbour: three shelves with four boxes each, boxes of 2 numbers. Each shelf wants its boxes in "
        "an order of its own.\n"
        "  boxes = torch.randn(3, 4, 2)\n"
        "  order = torch.tensor([[1, 0, 3, 2], [0, 1, 2, 3], [3, 0, 1, 2]])\n"
        "  shelf = torch.arange(3)[:, None]          (3, 1), broadcasts to (3, 4)\n"
        "  boxes[shelf, order]                       (3, 4, 2); place 0 of shelf 2 now holds its box 3",
    ),
)
