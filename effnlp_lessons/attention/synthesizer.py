"""Synthesizer: attention weights that no query and no key made (Tay et al. 2020, arXiv 2005.00743).

Y = softmax(S) G(X): G is the value projection, S comes from each token alone or from no token at all, and there is
no dot product and no 1 / sqrt(d_head). With N = `max_length`, for every head:
    dense               S_i = W2 relu(W1 x_i + b1) + b2, a score for each of N positions
    random              S = R (N x N), learned or fixed
    factorized dense    S_ij = A_i[j div b] B_i[j mod b] with A_i (a numbers), B_i (b numbers) made from x_i, a b = N
    factorized random   S = R1 R2ᵀ, R1 and R2 (N x rank)
    mixture             S = sum_c alpha_c S_c with sum_c alpha_c = 1, of the kinds above and the "dot product"
Notebook 10 uses it. It saves q kᵀ alone: softmax and its product with the values are still quadratic in the length,
and this module keeps tables of n x n scores.

Causality: strict with `causal=True`, for a row of S depends on its own token at most. A shorter text uses the first
rows and columns of S.
NOTE in a dense kind W1 goes from d_model to the d_head numbers of its head, as the query projection that it
replaces: what the paper counts as d² is d_model d_head parameters a head.
NOTE the alphas are softmax(a) with one learned number a_c a layer, zeros at first; for two kinds that is the released
code's sigmoid (Mesh TensorFlow). Its factorized dense kind gives both factors N numbers; here they have a and b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnlp_lessons.attention.blocks import check_positive, without_padding
from effnlp_lessons.dense_attention import attention_scores, causal_mask, check_key_padding_mask, masked_softmax
from effnlp_lessons.transformer import TransformerConfig

KINDS = ("dense", "random", "factorized dense", "factorized random", "dot product")


def factorized_scores(
    a: Float[Tensor, "... factors_a"], b: Float[Tensor, "... factors_b"]
) -> Float[Tensor, "... columns"]:
    """scores[j] = a[j div factors_b] * b[j mod factors_b], for factors_a * factors_b columns.

    `a` is repeated number by number, `b` as a whole. Were both repeated in the same way, columns would be equal.
    """
    return (a[..., :, None] * b[..., None, :]).flatten(-2)


def square_factors(length: int) -> tuple[int, int]:
    """The factors (a, b) of `length`, a <= b, that lie closest together.

    Raises:
        ValueError: a length below 1.
    """
    check_positive(length=length)
    a = next(a for a in range(math.isqrt(length), 0, -1) if length % a == 0)
    return a, length // a


# ---------------------------------------------------------------------- the scores, one class for each kind


class _TokenLinear(nn.Module):
    """relu(W1 x + b1), cut into heads: what the dense kinds make of every token."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.hidden = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Float[Tensor, "batch heads length d_head"]:
        return self.hidden(x).relu().unflatten(-1, (self.heads, -1)).transpose(1, 2)


class DenseScores(_TokenLinear):
    """S_i = W2 relu(W1 x_i + b1) + b2: d_model d_head + d_head N weights a head, and d_head + N biases."""

    def __init__(self, config: TransformerConfig, max_length: int, generator: torch.Generator) -> None:
        super().__init__(config)
        size = (config.heads, config.d_head, max_length)
        self.weight = nn.Parameter(torch.randn(size, generator=generator) * config.d_head**-0.5)  # W2
        self.bias = nn.Parameter(torch.zeros(config.heads, 1, max_length))  # b2

    def forward(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch heads length length"]:
        n = x.shape[1]
        return super().forward(x) @ self.weight[..., :n] + self.bias[..., :n]


class FactorizedDenseScores(_TokenLinear):
    """S_ij = A_i[j div b] B_i[j mod b]: d_model d_head + d_head (a + b) weights a head, and d_head + a + b biases."""

    def __init__(self, config: TransformerConfig, factors: tuple[int, int], generator: torch.Generator) -> None:
        super().__init__(config)
        self.factors = factors
        size = (config.heads, config.d_head, sum(factors))
        self.weight = nn.Parameter(torch.randn(size, generator=generator) * config.d_head**-0.5)
        # zeros for both factors would leave a product without gradient
        self.bias = nn.Parameter(torch.randn(config.heads, 1, sum(factors), generator=generator))

    def forward(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch heads length length"]:
        a, b = (super().forward(x) @ self.weight + self.bias).split(self.factors, dim=-1)
        blocks = -(-x.shape[1] // self.factors[1])  # the first columns need no more of A
        return factorized_scores(a[..., :blocks], b)[..., : x.shape[1]]


class RandomScores(nn.Module):
    """S = R: N² numbers a head, a parameter or a buffer, whatever the text says."""

    def __init__(self, config: TransformerConfig, max_length: int, trainable: bool, generator: torch.Generator) -> None:
        super().__init__()
        scores = torch.randn(config.heads, max_length, max_length, generator=generator)
        if trainable:
            self.scores = nn.Parameter(scores)
        else:
            self.register_buffer("scores", scores)

    def forward(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "1 heads length length"]:
        n = x.shape[1]
        return self.scores[None, :, :n, :n]


class FactorizedRandomScores(nn.Module):
    """S = R1 R2ᵀ: 2 N rank numbers a head, parameters or buffers."""

    def __init__(
        self, config: TransformerConfig, max_length: int, rank: int, trainable: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        # entries of R1 R2ᵀ then have variance 1, as those of a random R
        factors = torch.randn(2, config.heads, max_length, rank, generator=generator) * rank**-0.25
        if trainable:
            self.factors = nn.Parameter(factors)
        else:
            self.register_buffer("factors", factors)

    def forward(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "1 heads length length"]:
        rows, columns = self.factors[:, :, : x.shape[1]]
        return (rows @ columns.transpose(-2, -1))[None]


class DotProductScores(nn.Module):
    """S = q kᵀ / sqrt(d_head), the scores of a Transformer, to be mixed in: 2 d_model d_head weights a head."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch heads length length"]:
        q, k = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key))
        return attention_scores(q, k)


# -------------------------------------------------------------------------------------- the token mixer


class Synthesizer(nn.Module):
    """softmax(S) G(X) of every head, and an output projection: a token mixer.

    Parameters that are no nn.Linear are drawn from `seed`. Padded positions give zeros before the output projection.

    Args:
        max_length: N, the most tokens of a text.
        kind: how S is made: "dense", "random", "factorized dense", "factorized random" or "mixture".
        causal: hide the future.
        trainable: False for a random kind that stays as it was drawn.
        rank: columns of R1 and R2 of "factorized random".
        factors: (a, b) of "factorized dense" with a b = N; default `square_factors(N)`.
        components: two or more kinds of a "mixture", of those above and "dot product".

    Raises:
        ValueError: another kind, sizes below 1, factors that do not multiply to N, fewer than two components,
            `trainable=False` with nothing random to keep.
    """

    def __init__(
        self,
        config: TransformerConfig,
        max_length: int,
        kind: str = "dense",
        causal: bool = False,
        *,
        trainable: bool = True,
        rank: int = 8,
        factors: tuple[int, int] | None = None,
        components: Sequence[str] = ("random", "dot product"),
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(max_length=max_length, rank=rank)
        if kind not in (*KINDS[:-1], "mixture"):
            raise ValueError(f"kind must be one of {', '.join(map(repr, (*KINDS[:-1], 'mixture')))}, got {kind!r}")
        kinds = tuple(components) if kind == "mixture" else (kind,)
        if not set(kinds) <= set(KINDS) or (kind == "mixture" and len(kinds) < 2):
            raise ValueError(f"components must be two or more of {', '.join(map(repr, KINDS))}, got {components!r}")
        if not trainable and not {"random", "factorized random"} & set(kinds):
            raise ValueError(f"trainable=False needs a random kind, got {', '.join(map(repr, kinds))}")
        factors = square_factors(max_length) if factors is None else tuple(factors)
        if len(factors) != 2 or min(factors) < 1 or math.prod(factors) != max_length:
            raise ValueError(f"factors must be two numbers a, b >= 1 with a b = {max_length}, got {factors}")
        self.heads, self.max_length, self.causal = config.heads, max_length, causal
        generator = torch.Generator().manual_seed(seed)

        def scores(kind: str) -> nn.Module:
            if kind == "dense":
                return DenseScores(config, max_length, generator)
            if kind == "random":
                return RandomScores(config, max_length, trainable, generator)
            if kind == "factorized dense":
                return FactorizedDenseScores(config, factors, generator)
            if kind == "factorized random":
                return FactorizedRandomScores(config, max_length, rank, trainable, generator)
            return DotProductScores(config)

        self.scores = nn.ModuleList(scores(kind) for kind in kinds)
        self.mixing = nn.Parameter(torch.zeros(len(kinds))) if kind == "mixture" else None
        self.value = nn.Linear(config.d_model, config.d_model)  # G
        self.output = nn.Linear(config.d_model, config.d_model)

    def alphas(self) -> Float[Tensor, " components"]:
        """The share of every component in the scores; they sum to 1."""
        return torch.ones(1) if self.mixing is None else self.mixing.softmax(0)

    def synthesized_scores(
        self, x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch_or_1 heads length length"]:
        """S before mask and softmax; (1, heads, length, length) if it does not depend on the text.

        Raises:
            ValueError: no token or more than `max_length`.
        """
        if not 1 <= x.shape[1] <= self.max_length:
            raise ValueError(f"x must hold 1 to {self.max_length} tokens (max_length), got {x.shape[1]}")
        if self.mixing is None:
            return self.scores[0](x)
        return sum(alpha * part(x) for alpha, part in zip(self.alphas(), self.scores, strict=True))

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
        state: None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], None]:
        """Mix the tokens.

        Raises:
            ValueError: no token or more than `max_length`, a mask that does not fit; a state, for this mixer keeps
                none.
        """
        if state is not None:
            raise ValueError("state must be None: this mixer keeps none")
        check_key_padding_mask(key_padding_mask, *x.shape[:2])
        scores = self.synthesized_scores(x)
        allowed = causal_mask(x.shape[1], x.shape[1], x.device) if self.causal else None
        if key_padding_mask is not None:
            real = key_padding_mask[:, None, None, :]
            allowed = real if allowed is None else allowed & real
            scores = scores.expand(len(x), -1, -1, -1)
        # half precision: the softmax and its sum in float32
        weights = masked_softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), allowed)
        values = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = without_padding(weights.to(values.dtype) @ values, key_padding_mask)
        return self.output(mixed.transpose(1, 2).flatten(2)), None
