"""Transformer-XL: read a long text segment by segment, and keep what the last segments left in every layer.

The paper is Dai et al. 2019 (arXiv 1901.02860). Two ideas that need each other.

Recurrence (sec. 3.2): a layer takes its queries from the segment, and its keys and values from the memory and
the segment, [SG(m); h]. The memory m is the layer's own *input* of earlier tokens, the last `memory_length` rows;
SG stops the gradient. L layers with a memory of M reach about L M tokens back.

Relative positions (sec. 3.3): with absolute ones, the first token of every segment would have position 0. The
score of query i and key j, which lie a distance i - j apart, is instead

    A_ij = [(W_q h_i + u) · W_k h_j + (W_q h_i + v) · W_R r_{i-j}] / sqrt(d_head)

r is the sinusoid of the distance, d_model wide. Appendix B computes the second term for n queries and K keys by one
product and a shift, without a gather. Such a mixer needs no position table: `TransformerConfig(max_length=0)`.

NOTE u and v belong to each layer, as in XLNet; the authors' release shares one pair among all layers. They
start at zero here. No projection has a bias, as in the release.
NOTE the scores of the n queries make an n x K table, as in the paper; what stays small is n, one segment.
NOTE where a layer norm comes first (`norm_first`), the memory holds the normed input, which is what the mixer sees.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnlp_lessons.attention.blocks import check_not_negative, check_positive
from effnlp_lessons.dense_attention import causal_mask, check_key_padding_mask
from effnlp_lessons.transformer import TransformerConfig


def relative_positions(distances: Float[Tensor, " length"], d_model: int) -> Float[Tensor, "length d_model"]:
    """The sinusoid of every distance (in tokens), r_p = [sin(p f), cos(p f)], f_k = 10000^(-2k / d_model).

    All sines come first, then all cosines. The result has the dtype of `distances`.

    Raises:
        ValueError: `d_model` that is odd or < 2, or `distances` that are no vector of floating-point numbers.
    """
    if d_model < 2 or d_model % 2:
        raise ValueError(f"d_model must be even and >= 2, half of it are sines, got {d_model}")
    if distances.ndim != 1 or not distances.is_floating_point():
        raise ValueError(f"distances must be a float vector, got {distances.dtype} {tuple(distances.shape)}")
    steps = torch.arange(0, d_model, 2, dtype=distances.dtype, device=distances.device)
    angles = distances[:, None] * 10_000.0 ** (-steps / d_model)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def relative_shift(x: Float[Tensor, "*rest queries keys"]) -> Float[Tensor, "*rest queries keys"]:
    """Columns by distance -> columns by key, without a gather (App. B): y[i, j] = x[i, j - i + queries - 1].

    Column c of `x` belongs to the distance keys - 1 - c. The queries are the last of the keys. What lies above
    the causal diagonal (j > keys - queries + i) is left over from other rows and must be masked.

    Raises:
        ValueError: fewer keys than queries.
    """
    queries, keys = x.shape[-2:]
    if keys < queries:
        raise ValueError(f"x must have at least as many keys as queries, got {queries} queries, {keys} keys")
    # one column of zeros makes every row one longer; read again in rows of `keys`, each row moves one to the left
    padded = F.pad(x, (1, 0))
    return padded.reshape(*x.shape[:-2], keys + 1, queries)[..., 1:, :].reshape(x.shape)


def relative_attention(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch heads keys d_head"],
    v: Float[Tensor, "batch heads keys d_head"],
    key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    position_keys: Float[Tensor, "heads keys d_head"],
    content_bias: Float[Tensor, "heads d_head"],
    position_bias: Float[Tensor, "heads d_head"],
    return_weights: bool = False,
) -> Any:
    """Causal attention of the last `queries` of `keys` tokens with relative positions (sec. 3.3).

    Args:
        key_padding_mask: True = a real token; the last `queries` columns are those of the queries.
        position_keys: W_R r for the distances keys - 1, ..., 1, 0, split into heads.
        content_bias: u, for the content of the key.
        position_bias: v, for the distance of the key.
        return_weights: also return the attention weights (batch, heads, queries, keys).

    Returns:
        (batch, heads, queries, d_head), zeros for padded queries; or a pair (that, weights).

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k, v must be (batch, heads, length, d_head), got {q.ndim}, {k.ndim}, {v.ndim} dims")
    batch, heads, queries, d_head = q.shape
    keys = k.shape[2]
    if k.shape != (batch, heads, keys, d_head) or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    if not 1 <= queries <= keys:
        raise ValueError(f"q must hold the last 1 to {keys} of the {keys} tokens of k, got {queries}")
    wanted = {
        "position_keys": (position_keys, (heads, keys, d_head)),
        "content_bias": (content_bias, (heads, d_head)),
        "position_bias": (position_bias, (heads, d_head)),
    }
    for name, (given, shape) in wanted.items():
        if tuple(given.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(given.shape)}")
    check_key_padding_mask(key_padding_mask, batch, keys)

    allowed = causal_mask(queries, keys, q.device)
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, None, None, :]
    # (W_q h_i + v) · W_R r_{i-j}, divided before the sum over d_head to stay small in float16
    by_distance = (q + position_bias[:, None]) / math.sqrt(d_head) @ position_keys.transpose(-2, -1)
    # not -inf: a padded query may have no key at all
    bias = relative_shift(by_distance).masked_fill(~allowed, torch.finfo(q.dtype).min / 2)
    q = q + content_bias[:, None]
    if return_weights:
        scores = q / math.sqrt(d_head) @ k.transpose(-2, -1) + bias
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
        output = weights.to(v.dtype) @ v
    else:
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if key_padding_mask is not None:
        padded = ~key_padding_mask[:, None, keys - queries :, None]
        output = output.masked_fill(padded, 0.0)
        weights = weights.masked_fill(padded, 0.0) if return_weights else None
    return (output, weights) if return_weights else output


class TransformerXLAttention(nn.Module):
    """Token mixer with a memory of the last `memory_length` inputs of its layer (sec. 3.2 and 3.3).

    Causality: strict. The state is the memory (batch, rows <= memory_length, d_model), detached. Give
    `state=None` where a new document begins. `memory_length` may be set to another value for evaluation, and
    with `clamp_length` all distances beyond it count as that distance, as none beyond it was seen in training.

    Raises:
        ValueError: `memory_length` < 0, `clamp_length` < 1, or an odd d_model.
    """

    def __init__(self, config: TransformerConfig, memory_length: int, clamp_length: int | None = None) -> None:
        super().__init__()
        check_not_negative(memory_length=memory_length)
        if clamp_length is not None:
            check_positive(clamp_length=clamp_length)
        if config.d_model % 2:
            raise ValueError(f"d_model must be even, half of a relative position are sines, got {config.d_model}")
        self.heads, self.memory_length, self.clamp_length = config.heads, memory_length, clamp_length
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.key = nn.Linear(config.d_model, config.d_model, bias=False)
        self.value = nn.Linear(config.d_model, config.d_model, bias=False)
        self.position = nn.Linear(config.d_model, config.d_model, bias=False)  # W_R
        self.output = nn.Linear(config.d_model, config.d_model, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(config.heads, config.d_head))  # u
        self.position_bias = nn.Parameter(torch.zeros(config.heads, config.d_head))  # v

    def split_heads(self, x: Float[Tensor, "*batch length d_model"]) -> Float[Tensor, "*batch heads length d_head"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def mix(
        self,
        x: Float[Tensor, "batch length d_model"],
        past: Float[Tensor, "batch rows d_model"],
        key_padding_mask: Bool[Tensor, "batch rows_and_length"] | None = None,
        return_weights: bool = False,
    ) -> Any:
        """Attention of `x` to [past; x], y of the shape of `x`, or with `return_weights` a pair (y, weights)."""
        context = torch.cat([past, x], dim=1)
        q, k, v = (
            self.split_heads(self.query(x)),
            self.split_heads(self.key(context)),
            self.split_heads(self.value(context)),
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        distances = torch.arange(context.shape[1] - 1, -1, -1, dtype=wide, device=x.device)
        if self.clamp_length is not None:
            distances = distances.clamp(max=self.clamp_length)
        positions = relative_positions(distances, x.shape[-1]).to(x.dtype)
        mixed = relative_attention(
            q, k, v, key_padding_mask,
            position_keys=self.split_heads(self.position(positions)),
            content_bias=self.content_bias, position_bias=self.position_bias, return_weights=return_weights,
        )  # fmt: skip
        mixed, weights = mixed if return_weights else (mixed, None)
        y = self.output(mixed.transpose(1, 2).flatten(2))
        return (y, weights) if return_weights else y

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
        state: Float[Tensor, "batch rows d_model"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mix one segment; the state is the memory for the next.

        `key_padding_mask` covers earlier tokens and those of `x`: all of the text so far, or at least the rows
        of the memory and `x`; the last columns are read.

        Raises:
            ValueError: a state of another batch or width, or a mask that is not bool or too short.
        """
        memory = x.new_zeros(x.shape[0], 0, x.shape[2]) if state is None else state
        if memory.ndim != 3 or (memory.shape[0], memory.shape[2]) != (x.shape[0], x.shape[2]):
            raise ValueError(f"state must be ({x.shape[0]}, rows, {x.shape[2]}), got {tuple(memory.shape)}")
        keys = memory.shape[1] + x.shape[1]
        if key_padding_mask is not None and state is not None and key_padding_mask.shape[-1] > keys:
            key_padding_mask = key_padding_mask[..., -keys:]
        check_key_padding_mask(key_padding_mask, x.shape[0], keys)
        y = self.mix(x, memory, key_padding_mask)
        return y, newest(torch.cat([memory, x.detach()], dim=1), self.memory_length)


def newest(rows: Tensor, count: int) -> Tensor:
    """The last `count` of (batch, rows, ...), all if there are fewer."""
    return rows[:, max(0, rows.shape[1] - count) :]
