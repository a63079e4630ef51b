"""Exercise 5 of notebook 02: one block of MobileBERT, put together from its weights.

MobileBERT (Sun et al. 2020, arXiv 2004.02984, sec. 3.1 to 3.3): two bottlenecks, NoNorm, stacked feed-forwards.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number

Attention = Callable[[Tensor, Tensor], Tensor]  # (input of queries and keys, input of values) -> mixed


def bottleneck_block(
    x: Float[Tensor, "batch length d_model"], weights: dict[str, Any], attention: Attention
) -> Float[Tensor, "batch length d_model"]:
    """One block, N being NoNorm, gamma * h + beta; every W with its bias.

    u = N(W_in x), s = N(W_s x); a = N(attention(s, x) + u); then for each feed-forward a = N(W_2 relu(W_1 a) + a);
    last N(W_out a + x). `weights` has "bottleneck", "shared" and "output": (W, b, gamma, beta); "attention":
    (gamma, beta); "feed_forwards": a list of (W_1, b_1, W_2, b_2, gamma, beta).
    """

    def no_norm(h: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return gamma * h + beta

    w, b, *norm = weights["bottleneck"]
    u = no_norm(F.linear(x, w, b), *norm)
    w, b, *norm = weights["shared"]
    s = no_norm(F.linear(x, w, b), *norm)
    a = no_norm(attention(s, x) + u, *weights["attention"])
    for w_1, b_1, w_2, b_2, *norm in weights["feed_forwards"]:
        a = no_norm(F.linear(F.relu(F.linear(a, w_1, b_1)), w_2, b_2) + a, *norm)
    w, b, *norm = weights["output"]
    return no_norm(F.linear(a, w, b) + x, *norm)


def _no_norm(h: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return gamma * h + beta


def _exchange(
    norm: Callable[[Tensor, Tensor, Tensor], Tensor] = _no_norm,
    inputs: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, u, s: (s, x),
    residual: Callable[[Tensor, Tensor], Tensor | float] = lambda u, s: u,
    stack: Callable[[list], list] = lambda feed_forwards: feed_forwards,
    activation: Callable[[Tensor], Tensor] = F.relu,
    residual_each: bool = True,
    residual_around: bool = False,
    last_residual: bool = True,
    late: tuple[str, ...] = (),
) -> Answer:
    """The answer with one choice exchanged, for the mistakes.

    Args:
        norm: (h, gamma, beta).
        inputs: what the attention reads, of (x, u, s); residual: what is added to it, of (u, s).
        stack: the list of feed-forwards that are run, of the one given.
        late: where the residual is added after the norm: some of "attention", "feed_forwards", "output".
    """

    def join(place: str, y: Tensor, base: Tensor | float, parameters: tuple) -> Tensor:
        return norm(y, *parameters) + base if place in late else norm(y + base, *parameters)

    def answer(x: Tensor, weights: dict[str, Any], attention: Attention) -> Tensor:
        u, s = (norm(F.linear(x, *weights[name][:2]), *weights[name][2:]) for name in ("bottleneck", "shared"))
        a = join("attention", attention(*inputs(x, u, s)), residual(u, s), weights["attention"])
        mixed = a
        for w_1, b_1, w_2, b_2, *parameters in stack(weights["feed_forwards"]):
            y = F.linear(activation(F.linear(a, w_1, b_1)), w_2, b_2)
            a = join("feed_forwards", y, a if residual_each else 0.0, parameters)
        a = a + mixed if residual_around else a
        y = F.linear(a, *weights["output"][:2])
        return join("output", y, x if last_residual else 0.0, weights["output"][2:])

    return answer


class _Attention:
    """One head of attention with weights of its own; it shows itself by its call."""

    def __init__(self, d_model: int, d_bottleneck: int, normal: Callable[..., Tensor]) -> None:
        self.query, self.key, self.output = (normal(d_bottleneck, d_bottleneck) for _ in range(3))
        self.value = normal(d_model, d_bottleneck)

    def __call__(self, query_key_input: Tensor, value_input: Tensor) -> Tensor:
        q, k, v = query_key_input @ self.query, query_key_input @ self.key, value_input @ self.value
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v @ self.output

    def __repr__(self) -> str:
        return "attention(query_key_input, value_input)"


def _draw(feed_forwards: int, plain: bool = False, equal_widths: bool = False) -> Callable[[Generator], tuple]:
    """Random input and weights, float64; `plain`: gamma 1 and beta 0 everywhere."""

    def draw(generator: Generator) -> tuple:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def norm(width: int) -> tuple[Tensor, Tensor]:
            if plain:
                return torch.ones(width).double(), torch.zeros(width).double()
            return 1 + normal(width) / 2, normal(width) / 2

        def linear(d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
            return normal(d_out, d_in) / math.sqrt(d_in), normal(d_out) / 2

        inside = whole_number(2, 4, generator)
        d_model = inside if equal_widths else inside + whole_number(2, 4, generator)
        d_ff = 2 * inside
        weights = {
            "bottleneck": (*linear(d_model, inside), *norm(inside)),
            "shared": (*linear(d_model, inside), *norm(inside)),
            "attention": norm(inside),
            "feed_forwards": [
                (*linear(inside, d_ff), *linear(d_ff, inside), *norm(inside)) for _ in range(feed_forwards)
            ],
            "output": (*linear(inside, d_model), *norm(d_model)),
        }
        x = normal(whole_number(1, 2, generator), whole_number(3, 5, generator), d_model)
        return x, weights, _Attention(d_model, inside, normal)

    return draw


BOTTLENECK_BLOCK = Exercise(
    id="pretraining.bottleneck_block",
    title="a block of MobileBERT",
    minutes=25,
    difficulty=3,
    reference=bottleneck_block,
    properties=(
        Property("one feed-forward, gamma 1 and beta 0", _draw(1, plain=True), times=1),
        Property("one feed-forward, any gamma and beta", _draw(1), times=1),
        Property("three feed-forwards, any gamma and beta", _draw(3), times=1),
        Property("a bottleneck as wide as the block", _draw(3, equal_widths=True), times=1),
    ),
    mistakes=(
        Mistake(
            "A layer norm in place of NoNorm",
            "NoNorm(h) = gamma * h + beta, element by element. It takes no mean and no variance, and so it is fast.",
            _exchange(norm=lambda h, gamma, beta: F.layer_norm(h, h.shape[-1:], gamma, beta)),
        ),
        Mistake(
            "Beta is left out",
            "NoNorm(h) = gamma * h + beta.",
            _exchange(norm=lambda h, gamma, beta: gamma * h),
        ),
        Mistake(
            "The attention's residual is s",
            "s is made for queries and keys only. The residual stream inside the block is u.",
            _exchange(residual=lambda u, s: s),
        ),
        Mistake(
            "The attention has no residual",
            "u is added to what the attention gives, before NoNorm.",
            _exchange(residual=lambda u, s: 0.0),
        ),
        Mistake(
            "Values are made from s",
            "Queries and keys share the bottleneck s. Values are made from the block's input x, at its full width.",
            _exchange(inputs=lambda x, u, s: (s, s)),
        ),
        Mistake(
            "Values are made from u",
            "Values are made from the block's input x, at its full width. u is the residual stream.",
            _exchange(inputs=lambda x, u, s: (s, u)),
        ),
        Mistake(
            "Queries and keys are made from u",
            "They have a bottleneck of their own, s, which the two share. u is the residual stream.",
            _exchange(inputs=lambda x, u, s: (u, x)),
        ),
        Mistake(
            "Queries, keys and values are made from u",
            "That is the smaller variant, MobileBERT-TINY. In MobileBERT queries and keys are made from s, and values "
            "from x.",
            _exchange(inputs=lambda x, u, s: (u, u)),
        ),
        Mistake(
            "Queries, keys and values are made from x",
            "That is the teacher, IB-BERT. In the student queries and keys are made from the narrow s.",
            _exchange(inputs=lambda x, u, s: (x, x)),
        ),
        Mistake(
            "u and s are exchanged",
            "u, from weights['bottleneck'], is the residual stream. s, from weights['shared'], feeds queries and keys.",
            _exchange(inputs=lambda x, u, s: (u, x), residual=lambda u, s: s),
        ),
        Mistake(
            "One feed-forward too few",
            "All entries of weights['feed_forwards'] are run, one after the other.",
            _exchange(stack=lambda feed_forwards: feed_forwards[:-1]),
        ),
        Mistake(
            "The feed-forwards have no residual",
            "Each adds its own input, before NoNorm.",
            _exchange(residual_each=False),
        ),
        Mistake(
            "One residual around all feed-forwards",
            "Each feed-forward adds its own input, before its own NoNorm. There is none around the stack.",
            _exchange(residual_each=False, residual_around=True),
        ),
        Mistake(
            "The last residual is missing",
            "The block's input x is added to its output: blocks are joined by the wide stream, too.",
            _exchange(last_residual=False),
        ),
        Mistake(
            "The last residual is added after NoNorm",
            "NoNorm stands behind the sum: N(W a + b + x).",
            _exchange(late=("output",)),
        ),
        Mistake(
            "All residuals are added after NoNorm",
            "NoNorm stands behind the sum, as the layer norm does in BERT: N(... + residual).",
            _exchange(late=("attention", "feed_forwards", "output")),
        ),
        Mistake(
            "GELU in place of ReLU",
            "The teacher has GELU. The student has ReLU, which is faster.",
            _exchange(activation=F.gelu),
        ),
        Mistake(
            "The feed-forwards have no ReLU",
            "Without it the two matrices of a feed-forward are one.",
            _exchange(activation=lambda h: h),
        ),
    ),
    hints=(
        "Two streams run through the block: the wide one, x, from its input to its output, and the narrow one, from u "
        "through the attention and all feed-forwards. s is a side road. Which of the three does each line read, and "
        "which does it add?",
        "`w, b, gamma, beta = weights['bottleneck']` unpacks a part, and F.linear(x, w, b) is W x + b. NoNorm is "
        "gamma * h + beta, always the last thing in a line. The attention is called once, with s and x; what it gives "
        "is as wide as u.",
        "A neighbour: BERT's feed-forward with its layer norm, weights given, on h (batch, length, width).\n"
        "  w_1, b_1, w_2, b_2, gamma, beta = weights\n"
        "  inner = F.gelu(F.linear(h, w_1, b_1))\n"
        "  h = F.layer_norm(F.linear(inner, w_2, b_2) + h, h.shape[-1:], gamma, beta)\n"
        "The sum stands inside the norm, and what is added is the line's own input.",
    ),
)
