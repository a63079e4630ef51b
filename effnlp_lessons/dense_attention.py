"""Attention written out: every pair of tokens gets a score (Vaswani et al. 2017, arXiv 1706.03762, sec. 3.2.1).

This is the truth that every faster attention of the course is compared with. True in a mask means a real
token (`key_padding_mask`) or a pair that may attend (`attention_mask`). A query that may attend to nothing
gets zeros, never NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def check_key_padding_mask(mask: Tensor | None, batch: int, length: int) -> None:
    """Raise a ValueError unless `mask` is None or a bool tensor (batch, length), True = a real token."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"key_padding_mask must be bool (True = a real token), got {mask.dtype}")
    if tuple(mask.shape) != (batch, length):
        raise ValueError(f"key_padding_mask must have shape ({batch}, {length}), got {tuple(mask.shape)}")


def check_attention_mask(mask: Tensor, scores_shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless `mask` is bool and broadcasts to (batch, heads, queries, keys)."""
    if mask.dtype != torch.bool:
        raise ValueError(f"attention_mask must be bool (True = may attend), got {mask.dtype}")
    trailing = zip(reversed(mask.shape), reversed(scores_shape), strict=False)
    if mask.ndim > len(scores_shape) or any(given not in (1, wanted) for given, wanted in trailing):
        raise ValueError(f"attention_mask must broadcast to {scores_shape}, got {tuple(mask.shape)}")


def attention_scores(
    q: Float[Tensor, "batch heads queries d_head"], k: Float[Tensor, "batch heads keys d_head"]
) -> Float[Tensor, "batch heads queries keys"]:
    """Raw scores before mask and softmax, q kᵀ / sqrt(d_head) (Vaswani et al. 2017, Eq. 1)."""
    # divided in place, which saves a second table of n x n numbers
    return (q @ k.transpose(-2, -1)).div_(math.sqrt(q.shape[-1]))


def masked_softmax(
    scores: Float[Tensor, "batch heads queries keys"], allowed: Bool[Tensor, "*#broadcast"] | None
) -> Float[Tensor, "batch heads queries keys"]:
    """Softmax over the keys where `allowed` is True; a query with no allowed key gets all zeros, not NaN.

    Raises:
        ValueError: `allowed` that is not bool, or does not broadcast to the shape of `scores`.
    """
    if allowed is None:
        return scores.softmax(dim=-1)
    check_attention_mask(allowed, tuple(scores.shape))
    if allowed.all():
        return scores.softmax(dim=-1)
    # added to a score, half the smallest finite number gives a weight of exactly 0, and unlike -inf makes no NaN
    # in a row without any key; half, so that a very negative score does not make it -inf in float16
    smallest = torch.finfo(scores.dtype).min / 2
    bias = torch.zeros(allowed.shape, dtype=scores.dtype, device=scores.device).masked_fill_(~allowed, smallest)
    weights = (scores + bias).softmax(dim=-1)
    empty = ~allowed.any(dim=-1, keepdim=True)
    return weights.masked_fill(empty, 0.0) if empty.any() else weights


def causal_mask(queries: int, keys: int, device: torch.device | None = None) -> Bool[Tensor, "queries keys"]:
    """True where a query may attend: aligned bottom-right, so the last query sees every key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def dense_attention(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch heads keys d_head"],
    v: Float[Tensor, "batch heads keys d_head"],
    key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    attention_mask: Bool[Tensor, "*#broadcast"] | None = None,
    causal: bool = False,
    return_scores: bool = False,
) -> Any:
    """Scaled dot-product attention, every pair computed: softmax(q kᵀ / sqrt(d_head)) v (Eq. 1).

    Args:
        key_padding_mask: True = a real token; padded keys are never attended to.
        attention_mask: True where a query may attend, broadcastable to (batch, heads, queries, keys).
        causal: hide the future, aligned bottom-right when there are more keys than queries.
        return_scores: also return the raw scores, before any mask.

    Returns:
        (batch, heads, queries, d_head), or a pair (that, raw scores). A query that may attend to
        nothing gets zeros.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k, v must be (batch, heads, length, d_head), got {q.ndim}, {k.ndim}, {v.ndim} dims")
    if k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    check_key_padding_mask(key_padding_mask, batch, keys)
    allowed = causal_mask(queries, keys, q.device) if causal else None
    if attention_mask is not None:
        check_attention_mask(attention_mask, (*q.shape[:3], keys))
        allowed = attention_mask if allowed is None else allowed & attention_mask
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        allowed = padding if allowed is None else allowed & padding
    scores = attention_scores(q, k)
    output = masked_softmax(scores, allowed) @ v
    return (output, scores) if return_scores else output
