"""Exercise 8 of notebook 08: sliding-window attention in chunks, without a table of n x n numbers.

The pattern is Longformer's (Beltagy et al. 2020, arXiv 2004.05150, sec. 3.1), the window counted on one side.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def window_attention(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_head"],
    key_padding_mask: Bool[Tensor, "batch length"],
    window: int,
) -> Float[Tensor, "batch heads length d_head"]:
    """Attention to the real tokens at most `window` away; zeros for padded queries (mask True = a real token)."""
    length, d_head = q.shape[2:]
    fill = -length % window
    # a chunk of queries, and its keys: one chunk to the left, its own, one to the right
    q = F.pad(q, (0, 0, 0, fill)).unflatten(2, (-1, window))
    k, v = (F.pad(x, (0, 0, window, fill + window)).unfold(2, 3 * window, window).mT for x in (k, v))
    real = F.pad(key_padding_mask, (window, fill + window)).unfold(1, 3 * window, window)
    distance = torch.arange(3 * window)[None, :] - window - torch.arange(window)[:, None]
    allowed = (distance.abs() <= window) & real[:, None, :, None, :]
    scores = q @ k.mT / math.sqrt(d_head)
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
    output = (weights @ v).flatten(2, 3)[:, :, :length]
    return output.masked_fill(~key_padding_mask[:, None, :, None], 0)


def _band(distance: Tensor, window: int) -> Tensor:
    return distance.abs() <= window


def _exchange(
    band: Callable[[Tensor, int], Tensor] = _band,
    outside: bool = False,
    padded_keys: bool = False,
    padded_rows: bool = False,
    scaled: bool = True,
    blocked: float | None = None,
) -> Answer:
    """The answer with one step exchanged, for the mistakes; `distance` is key minus query.

    Args:
        band: which distances a query sees; it gets (distance, window), for the places (window, 3 * window).
        outside, padded_keys: True lets what is filled in around the text, or padding, be attended to.
        padded_rows: True keeps what padded queries computed.
        blocked: the score of a pair that is not allowed; the smallest finite number if None.
    """

    def answer(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor, window: int) -> Tensor:
        length, d_head = q.shape[2:]
        fill = -length % window
        around = (window, fill + window)
        q = F.pad(q, (0, 0, 0, fill)).unflatten(2, (-1, window))
        k, v = (F.pad(x, (0, 0, *around)).unfold(2, 3 * window, window).mT for x in (k, v))
        visible = torch.ones_like(key_padding_mask) if padded_keys else key_padding_mask
        visible = F.pad(visible, around, value=outside).unfold(1, 3 * window, window)
        distance = torch.arange(3 * window)[None, :] - window - torch.arange(window)[:, None]
        allowed = band(distance, window) & visible[:, None, :, None, :]
        scores = q @ k.mT / (math.sqrt(d_head) if scaled else 1)
        hidden = torch.finfo(scores.dtype).min if blocked is None else blocked
        output = (scores.masked_fill(~allowed, hidden).softmax(dim=-1) @ v).flatten(2, 3)[:, :, :length]
        return output if padded_rows else output.masked_fill(~key_padding_mask[:, None, :, None], 0)

    return answer


def _place(distance: Tensor, window: int) -> Tensor:
    """Where a key stands among the 3 * window keys of its chunk."""
    return (torch.arange(3 * window)[None, :]).expand_as(distance)


def _dense(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor, window: int) -> Tensor:
    position = torch.arange(q.shape[2])
    near = (position[:, None] - position[None, :]).abs() <= window
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    allowed = near & key_padding_mask[:, None, None, :]
    output = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1) @ v
    return output.masked_fill(~key_padding_mask[:, None, :, None], 0)


def _all_finite(fn: Answer, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor, window: int) -> bool:
    """Whether the output and the gradients of q, k and v are all finite numbers."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    output = fn(*inputs, key_padding_mask, window)
    weight = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    gradients = torch.autograd.grad((output * weight).sum(), inputs)
    return all(bool(x.isfinite().all()) for x in (output, *gradients))


def _memory_grows_as_the_length(
    fn: Answer, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor, window: int
) -> bool:
    """Whether a text four times as long needs a largest tensor about four times as large, and not sixteen."""

    def largest(repeats: int) -> int:
        mask = key_padding_mask.repeat(1, repeats)
        longer = (x.repeat(1, 1, repeats, 1) for x in (q, k, v))
        return largest_storage(lambda q, k, v: fn(q, k, v, mask, window), *longer, backward=False)

    return largest(4) < 6 * largest(1)


def _draw(lengths: str, padding: str = "none", dtype: torch.dtype = torch.float32) -> Callable[[Generator], tuple]:
    """Random inputs; lengths "whole chunks", "any", "short" or "long"; padding "none", "end", "scattered" or "all".

    Except with "all", every padded token has a real one in its window: what it would compute is well defined.
    """

    def draw(generator: Generator) -> tuple:
        window = whole_number(2, 4, generator)
        length = {
            "whole chunks": window * whole_number(3, 4, generator),
            "any": window * whole_number(3, 4, generator) + whole_number(1, window - 1, generator),
            "short": whole_number(1, window - 1, generator),
            "long": whole_number(16, 20, generator),
        }[lengths]
        batch = 1 if lengths == "long" else 2
        heads, d_head = whole_number(1, 2, generator), whole_number(2, 5, generator)
        if lengths == "long":  # few and short vectors: the table of all pairs is by far the largest tensor
            heads, d_head = 1, 2
        q, k, v = torch.randn(3, batch, heads, length, d_head, generator=generator, dtype=dtype)
        mask = torch.ones(batch, length, dtype=torch.bool)
        if padding == "end":
            mask[0, -whole_number(1, window, generator) :] = False
        if padding == "scattered":
            mask[0, 1::2] = False
            mask[1, 2::3] = False
        if padding == "all":
            mask[whole_number(0, 1, generator)] = False
        return q, k, v, mask, window

    return draw


WINDOW_ATTENTION = Exercise(
    id="patterns.window_attention",
    title="window attention in chunks",
    minutes=30,
    difficulty=3,
    reference=window_attention,
    properties=(
        Property("a text of whole chunks, no padding", _draw("whole chunks"), times=1),
        Property("a text of any length, no padding", _draw("any"), times=2),
        Property("a text shorter than the window", _draw("short"), times=1),
        Property("padding at the end: its keys are not seen, its queries give zeros", _draw("any", "end"), times=1),
        Property("padding anywhere", _draw("any", "scattered"), times=1),
        Property("float64 stays float64", _draw("any", dtype=torch.float64), times=1),
        Property(
            "a text of padding alone: outputs and gradients are finite",
            _draw("any", "all"),
            observe=_all_finite,
            times=1,
        ),
        Property(
            "four times the text: the largest tensor grows about four times, not sixteen",
            _draw("long"),
            observe=_memory_grows_as_the_length,
            times=1,
        ),
    ),
    mistakes=(
        Mistake(
            "A table of n x n numbers",
            "The values are right, and nothing is saved: some tensor holds a number for every pair of tokens "
            "(the scores, or a mask). Give every chunk of queries the keys of three chunks only.",
            _dense,
        ),
        Mistake(
            "Places outside the text enter the softmax",
            "A key of zeros has the score 0, and exp(0) is 1: the zeros that you fill in before the first and "
            "behind the last token take weight from real keys. Fill the mask with False there.",
            _exchange(outside=True),
        ),
        Mistake(
            "Padded queries do not give zeros",
            "Padded keys are hidden, but a padded token as a query still mixes its neighbours. Set its row "
            "of the output to zero.",
            _exchange(padded_rows=True),
        ),
        Mistake(
            "Padded keys are attended to",
            "key_padding_mask must also hide keys: it is cut into the same chunks as k and v.",
            _exchange(padded_keys=True),
        ),
        Mistake(
            "Only the own chunk is seen",
            "The window of a chunk's first token lies almost wholly in the chunk to the left, and that of its "
            "last in the one to the right. Give every chunk its neighbours' keys.",
            _exchange(
                lambda distance, window: (
                    _band(distance, window)
                    & (_place(distance, window) >= window)
                    & (_place(distance, window) < 2 * window)
                )
            ),
        ),
        Mistake(
            "The chunk to the right is not seen",
            "The window has two sides. Take the keys of the chunk to the right, too.",
            _exchange(lambda distance, window: _band(distance, window) & (_place(distance, window) < 2 * window)),
        ),
        Mistake(
            "Only the tokens before the query",
            "This is the causal window. Take the distance without its sign.",
            _exchange(lambda distance, window: _band(distance, window) & (distance <= 0)),
        ),
        Mistake(
            "All keys of three chunks are seen",
            "Chunks are a way to compute. Inside the three chunks the window still holds for each query: "
            "mask the keys that are more than `window` away.",
            _exchange(lambda distance, window: torch.ones_like(distance, dtype=torch.bool)),
        ),
        Mistake(
            "One token too few on each side",
            "The token at a distance of exactly `window` still belongs to the window: <=, not <.",
            _exchange(lambda distance, window: distance.abs() < window),
        ),
        Mistake(
            "The window is read as two-sided",
            "You see window / 2 tokens on each side. In this course window counts one side.",
            _exchange(lambda distance, window: distance.abs() <= window // 2),
        ),
        Mistake(
            "The scores are not scaled",
            "Divide the scores by the square root of d_head.",
            _exchange(scaled=False),
        ),
        Mistake(
            "A query without any key gives NaN",
            "If all scores of a row are -inf, its softmax is 0 / 0. Setting the NaN to zero afterwards repairs "
            "the output and not the gradient. Hide keys with the smallest finite number, torch.finfo(dtype).min.",
            _exchange(blocked=-math.inf),
        ),
    ),
    hints=(
        "Cut the queries into chunks of `window` tokens. Where can the keys of such a chunk lie? In its own "
        "chunk, the one to the left, and the one to the right: 3 * window places.",
        "Fill k and v with `window` zeros on the left and at least as many on the right; then "
        "`unfold(2, 3 * window, window)` gives every chunk its three. Do the same with the mask, filled with "
        "False. The distance of key place b to query place a of a chunk is b - window - a, for every chunk.",
        "A neighbour: for each of 6 days the largest of the temperatures from 2 days before to 2 days after, "
        "two days at a time.\n"
        "  t = torch.tensor([3., 5., 4., 9., 8., 1.])\n"
        "  near = F.pad(t, (2, 2), value=-99.).unfold(0, 6, 2)       (3 chunks, 6 places)\n"
        "  gap = torch.arange(6)[None, :] - 2 - torch.arange(2)[:, None]          (2 days, 6 places)\n"
        "  near[:, None, :].masked_fill(gap.abs() > 2, -99.).amax(-1).flatten()\n"
        "  -> [5., 9., 9., 9., 9., 9.]\n"
        "-99 plays the part of the mask: what is filled in must not win.",
    ),
)
