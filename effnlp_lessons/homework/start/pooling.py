"""Exercise 4 of notebook 00, "find the bug": a sentence vector that ignores padding."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def mean_pool(
    hidden: Float[Tensor, "batch length d_model"], key_padding_mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch d_model"]:
    """Sentence vectors: the mean over each row's real tokens (mask True); zeros for a row of padding."""
    mask = key_padding_mask.unsqueeze(-1)
    total = (hidden * mask).sum(dim=1)
    return total / mask.sum(dim=1).clamp(min=1)


def _gradient(fn: Answer, hidden: Tensor, key_padding_mask: Tensor) -> Tensor:
    """Gradient of a weighted sum of the sentence vectors with respect to `hidden`, same shape."""
    hidden = hidden.clone().requires_grad_()
    vectors = fn(hidden, key_padding_mask)
    weight = torch.linspace(-1, 2, vectors.numel(), dtype=vectors.dtype).view_as(vectors)
    return torch.autograd.grad((vectors * weight).sum(), hidden)[0]


def _draw_hidden(padding: str, dtype: torch.dtype = torch.float32) -> Callable[[Generator], tuple]:
    """Hidden vectors and a mask; padding "none", "end", "anywhere", or "row" ("end", one row all padding)."""

    def draw(generator: Generator) -> tuple:
        batch, length, d_model = (whole_number(low, high, generator) for low, high in ((1, 4), (3, 9), (2, 6)))
        hidden = torch.randn(batch, length, d_model, generator=generator, dtype=dtype)
        real = torch.tensor([whole_number(1, length - 1, generator) for _ in range(batch)])
        mask = torch.arange(length) < real.unsqueeze(-1)
        if padding == "none":
            mask = torch.ones(batch, length, dtype=torch.bool)
        if padding == "anywhere":
            mask = torch.stack([row[torch.randperm(length, generator=generator)] for row in mask])
        if padding == "row":
            mask[whole_number(0, batch - 1, generator)] = False
        return hidden, mask

    return draw


def _total_and_count(hidden: Tensor, key_padding_mask: Tensor) -> tuple[Tensor, Tensor]:
    mask = key_padding_mask.unsqueeze(-1)
    return (hidden * mask).sum(dim=1), mask.sum(dim=1)


def _divide_unguarded(hidden: Tensor, key_padding_mask: Tensor) -> Tensor:
    total, count = _total_and_count(hidden, key_padding_mask)
    return total / count


def _divide_by_padded_length(hidden: Tensor, key_padding_mask: Tensor) -> Tensor:
    return _total_and_count(hidden, key_padding_mask)[0] / hidden.shape[1]


def _divide_by_count_plus_one(hidden: Tensor, key_padding_mask: Tensor) -> Tensor:
    total, count = _total_and_count(hidden, key_padding_mask)
    return total / (count + 1)


def _divide_by_batch_count(hidden: Tensor, key_padding_mask: Tensor) -> Tensor:
    total, count = _total_and_count(hidden, key_padding_mask)
    return total / count.sum().clamp(min=1)


MEAN_POOL = Exercise(
    id="start.mean_pool",
    title="find the bug: a sentence vector that ignores padding",
    minutes=15,
    difficulty=2,
    reference=mean_pool,
    properties=(
        Property("without padding it is the plain mean", _draw_hidden("none")),
        Property("padding at the end changes nothing", _draw_hidden("end")),
        Property("padding anywhere changes nothing", _draw_hidden("anywhere")),
        Property("a row of padding alone gives zeros, not NaN", _draw_hidden("row")),
        Property("float64 stays float64", _draw_hidden("end", torch.float64), times=1),
        Property("gradients are finite, and zero at padding", _draw_hidden("row"), observe=_gradient),
    ),
    mistakes=(
        Mistake(
            "Padding is averaged in",
            "The mask is not used at all. Set the padded vectors to zero before you add.",
            lambda hidden, key_padding_mask: hidden.mean(dim=1),
        ),
        Mistake(
            "Divided by the padded length",
            "The sum is right. The mean needs the number of real tokens of each row, not the length of the "
            "tensor. Cosine similarity cannot see this bug; a dot product can.",
            _divide_by_padded_length,
        ),
        Mistake(
            "Zero divided by zero",
            "A row of padding alone has the sum 0 and the count 0, which gives NaN. Make the count at least 1.",
            _divide_unguarded,
        ),
        Mistake(
            "NaN is replaced after the division",
            "The vector is right and its gradient is NaN: the backward pass still divides by zero. Make "
            "the count at least 1 before you divide.",
            lambda hidden, key_padding_mask: torch.nan_to_num(_divide_unguarded(hidden, key_padding_mask)),
        ),
        Mistake(
            "One is added to every count",
            "That avoids 0 / 0 and makes every other mean too small. Only a count of 0 may change: clamp(min=1).",
            _divide_by_count_plus_one,
        ),
        Mistake(
            "The mask is upside down",
            "You average the padding. In this course True is a real token.",
            lambda hidden, key_padding_mask: mean_pool(hidden, ~key_padding_mask),
        ),
        Mistake(
            "The first token instead of the mean",
            "This is the vector of [CLS]. The mean takes every real token.",
            lambda hidden, key_padding_mask: hidden[:, 0] * 1,
        ),
        Mistake(
            "The sum instead of the mean",
            "The padding is gone, but nothing is divided. Divide by the number of real tokens of each row.",
            lambda hidden, key_padding_mask: _total_and_count(hidden, key_padding_mask)[0],
        ),
        Mistake(
            "One count for the whole batch",
            "You divide every row by the real tokens of all rows together. Each row has its own count: sum over dim=1.",
            _divide_by_batch_count,
        ),
    ),
    hints=(
        "The sum is right. By what should it be divided, for a row with 3 real tokens in a tensor of length 8?",
        "The count of a row is key_padding_mask.sum(dim=1), of shape (batch,). Give it a last dimension so "
        "that it divides (batch, d_model). Then think of a row whose count is 0.",
        "A neighbour: the mean price of the items in stock, for three shops.\n"
        "  price = [[4., 6., 9.], [5., 1., 1.], [7., 8., 9.]]\n"
        "  stock = [[1, 1, 0], [1, 0, 0], [0, 0, 0]]\n"
        "  total = (price * stock).sum(dim=1)       -> [10., 5., 0.]\n"
        "  items = stock.sum(dim=1)                 -> [2, 1, 0]\n"
        "  total / torch.maximum(items, one)        -> [5., 5., 0.]   with one = torch.tensor(1)",
    ),
)
