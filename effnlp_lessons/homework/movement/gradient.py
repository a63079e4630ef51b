"""Exercise 1 of notebook 07: what the scores of movement pruning learn from.

Sanh, Wolf and Rush (2020, arXiv 2005.07683): a = (W ⊙ M) x, M from the scores S; straight through the choice of M,
dL/dS = dL/dW' ⊙ W with W' = W ⊙ M, without the gate M. Lagunas et al. (2021, arXiv 2109.04838): one score for a block.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number

Gradients = tuple[Float[Tensor, "row_blocks column_blocks"], Float[Tensor, "d_out d_in"]]


def score_gradient(
    x: Float[Tensor, "batch length d_in"],
    upstream: Float[Tensor, "batch length d_out"],
    weight: Float[Tensor, "d_out d_in"],
    scores: Float[Tensor, "row_blocks column_blocks"],
    threshold: float,
) -> Gradients:
    """dL/dS and dL/dW of a = (W ⊙ M) x, with M = sigmoid(S) > threshold for each block; `upstream` is dL/da.

    A block's weights are those that its score stands for: d_out / row_blocks rows, d_in / column_blocks columns.
    """
    row_blocks, column_blocks = scores.shape
    mask = (torch.sigmoid(scores) > threshold).repeat_interleave(len(weight) // row_blocks, 0)
    mask = mask.repeat_interleave(weight.shape[1] // column_blocks, 1)
    product = torch.einsum("bto,bti->oi", upstream, x)  # dL/dW'
    movement = (product * weight).unflatten(1, (column_blocks, -1)).unflatten(0, (row_blocks, -1))
    return movement.sum(dim=(1, 3)), product * mask


def _mask(weight: Tensor, scores: Tensor, threshold: float) -> Tensor:
    rows, columns = len(weight) // scores.shape[0], weight.shape[1] // scores.shape[1]
    return (torch.sigmoid(scores) > threshold).repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _product(x: Tensor, upstream: Tensor) -> Tensor:
    return torch.einsum("bto,bti->oi", upstream, x)


def _blocks(values: Tensor, scores: Tensor) -> Tensor:
    """(row_blocks, rows, column_blocks, columns)."""
    return values.unflatten(1, (scores.shape[1], -1)).unflatten(0, (scores.shape[0], -1))


def _block_sums(values: Tensor, scores: Tensor) -> Tensor:
    return _blocks(values, scores).sum(dim=(1, 3))


def _wrong_axes(values: Tensor, scores: Tensor) -> Tensor:
    return _blocks(values, scores).sum(dim=(0, 2))


def _every_nth(values: Tensor, scores: Tensor) -> Tensor:
    return values.unflatten(1, (-1, scores.shape[1])).unflatten(0, (-1, scores.shape[0])).sum(dim=(0, 2))


def _exchange(
    of_weight: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda product, weight, mask: product * weight,
    gather: Callable[[Tensor, Tensor], Tensor] = _block_sums,
    finish: Callable[[Tensor, Tensor], Tensor] = lambda movement, scores: movement,
    gate: Callable[[Tensor, Tensor], Tensor] = lambda product, mask: product * mask,
    product: Callable[[Tensor, Tensor], Tensor] = _product,
) -> Answer:
    """The answer with one step exchanged.

    Args:
        of_weight: a weight's part of the score gradient, of (dL/dW', W, M).
        gather, finish: the sum over blocks, and what is done to it, of the scores.
        gate: the weight's gradient, of (dL/dW', M).
        product: dL/dW' of (x, upstream).
    """

    def answer(x: Tensor, upstream: Tensor, weight: Tensor, scores: Tensor, threshold: float) -> Gradients:
        full, mask = product(x, upstream), _mask(weight, scores, threshold)
        return finish(gather(of_weight(full, weight, mask), scores), scores), gate(full, mask)

    return answer


def _scores(fn: Answer, *inputs: Tensor) -> object:
    return fn(*inputs)[0]


def _weights(fn: Answer, *inputs: Tensor) -> object:
    return fn(*inputs)[1]


def _draw(block: tuple[int, int], grid: tuple[int, int] | None = None) -> Callable[[Generator], tuple]:
    """A layer with blocks of this shape, some of them pruned, and a batch of sequences."""

    def draw(generator: Generator) -> tuple:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        row_blocks, column_blocks = grid or (whole_number(2, 3, generator), whole_number(3, 4, generator))
        d_out, d_in = block[0] * row_blocks, block[1] * column_blocks
        batch, length = whole_number(2, 3, generator), whole_number(2, 4, generator)
        scores = normal(row_blocks, column_blocks)
        scores.view(-1)[:2] = torch.tensor([-1.5, 1.5])  # a pruned block and a kept one
        return normal(batch, length, d_in), normal(batch, length, d_out), normal(d_out, d_in), scores, 0.5

    return draw


def _by_hand(generator: Generator) -> tuple:
    x, upstream = torch.tensor([[[1.0, 2.0, 1.0]]]), torch.tensor([[[-2.0]]])
    return x, upstream, torch.tensor([[0.5, 1.5, -1.0]]), torch.tensor([[1.0, -1.0, -2.0]]), 0.5


SCORE_GRADIENT = Exercise(
    id="movement.score_gradient",
    title="what a score learns from",
    minutes=15,
    difficulty=2,
    reference=score_gradient,
    properties=(
        Property("by hand: a score for each of three weights", _by_hand, times=1),
        Property("the gradient of the weight", _draw((1, 1)), _weights, times=1),
        Property("the gradient of scores, one for each weight", _draw((1, 1)), _scores, times=2),
        Property("a score for each block of 2 x 3 weights", _draw((2, 3)), times=2),
        Property("as many blocks as a block has weights, both ways", _draw((2, 3), (2, 3)), times=1),
        Property("a score for each row", _draw((1, 5), (4, 1)), times=1),
    ),
    mistakes=(
        Mistake(
            "The score's gradient without its sign",
            "The sign is all that movement pruning knows: negative means that the weight is moving away from 0, and "
            "its score is to grow. With |dL/dW' W| every score falls.",
            _exchange(lambda product, weight, mask: (product * weight).abs()),
        ),
        Mistake(
            "The weight counts without its sign",
            "A negative weight that falls moves away from 0, just as a positive one that grows. Multiply by W, and not "
            "by |W|.",
            _exchange(lambda product, weight, mask: product * weight.abs()),
        ),
        Mistake(
            "The score's gradient has the other sign",
            "Return dL/dS = dL/dW' W. The minus comes from the optimizer: S <- S - lr dL/dS.",
            _exchange(lambda product, weight, mask: -product * weight),
        ),
        Mistake(
            "The score's gradient is gated by the mask",
            "A pruned weight would never learn whether it is missed, and could never come back. dL/dS takes W, and not "
            "W ⊙ M: the gate is left out on purpose.",
            _exchange(lambda product, weight, mask: product * weight * mask),
        ),
        Mistake(
            "The weight's gradient is not gated",
            "A pruned weight has no part in the output, so its gradient is 0: dL/dW = dL/dW' ⊙ M.",
            _exchange(gate=lambda product, mask: product),
        ),
        Mistake(
            "The gates are exchanged",
            "The weight's gradient has the gate M. The score's has not.",
            _exchange(
                lambda product, weight, mask: product * weight * mask,
                gate=lambda product, mask: product,
            ),
        ),
        Mistake(
            "The derivative of the sigmoid is in it",
            "Straight through means: as if M were S itself. The released code passes the gradient on unchanged.",
            _exchange(
                finish=lambda movement, scores: movement * torch.sigmoid(scores) * (1 - torch.sigmoid(scores)),
            ),
        ),
        Mistake(
            "Summed over the blocks, not within a block",
            "You add up the same place of all blocks. Of (row_blocks, rows, column_blocks, columns) the axes 1 and 3 "
            "are summed: the weights that one score stands for.",
            _exchange(gather=_wrong_axes),
        ),
        Mistake(
            "Every n-th row and column forms a block",
            "Neighbours belong to a block: unflatten to (row_blocks, rows), and not to (rows, row_blocks).",
            _exchange(gather=_every_nth),
        ),
        Mistake(
            "The mean over the block",
            "One score multiplies all weights of its block: its gradient is the sum of theirs.",
            _exchange(gather=lambda values, scores: _blocks(values, scores).mean(dim=(1, 3))),
        ),
        Mistake(
            "The weight is left out",
            "dL/dW' says where the weight is going. Whether that is away from 0 depends on where it stands: times W.",
            _exchange(lambda product, weight, mask: product),
        ),
        Mistake(
            "The mean over the batch",
            "`upstream` is dL/da of a loss that is a mean already, if it is one. Sum over batch and length.",
            _exchange(product=lambda x, upstream: _product(x, upstream) / len(x)),
        ),
        Mistake(
            "The mean over all tokens",
            "`upstream` is dL/da of a loss that is a mean already, if it is one. Sum over batch and length.",
            _exchange(product=lambda x, upstream: _product(x, upstream) / x[..., 0].numel()),
        ),
    ),
    hints=(
        "First dL/dW', the gradient as if W' were the weight: over all tokens, the sum of upstream times x. Both "
        "answers are made from it.",
        "Which of the two has the gate M? A pruned weight has no effect, so dL/dW is 0 there. But its score still "
        "wants to know what would happen. For blocks: unflatten both axes, and sum over the places within a block.",
        "A neighbour: 4 x 6 numbers, and the sum of each 2 x 3 block.\n"
        "  numbers = torch.arange(24.).reshape(4, 6)\n"
        "  numbers.reshape(2, 2, 2, 3)                        (row_blocks, rows, column_blocks, columns)\n"
        "  numbers.reshape(2, 2, 2, 3).sum(dim=(1, 3))        [[24., 42.], [96., 114.]]\n"
        "The first: 0 + 1 + 2 + 6 + 7 + 8 = 24.",
    ),
)
