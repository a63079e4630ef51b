"""Performer: random features whose products are, on average, the softmax's own weights (Choromanski et al. 2020).

"Rethinking Attention with Performers" (arXiv 2009.14794), FAVOR+. Linear attention may take any kernel φ(q)ᵀφ(k); this
one estimates that of softmax attention. For w normal(0, 1) in every channel (Lemma 1)
    exp(qᵀk) = E[exp(wᵀq - |q|²/2) exp(wᵀk - |k|²/2)]    (Eq. 7)
so that φ(x) = exp(W x - |x|²/2) / sqrt(features), x scaled by d_head^(-1/4), has φ(q)ᵀφ(k) = exp(qᵀk / sqrt(d_head)) on
average. All features are positive: no weight can be negative, and small weights have small errors, where
sines and cosines fail (sec. 2.3). Rows of W that are orthogonal, with the lengths of independent normal vectors, are
still unbiased and have less variance (sec. 2.4). The sums are those of `linear`.

NOTE the released code subtracts from the exponents of the keys their maximum over the whole text, and adds 1e-4 to
every feature. Both let the future into a causal output, and the second draws all weights towards equal ones. Here
queries lose their own maximum, which cancels, keys nothing: their exponent is at most |w|²/2, within float32 for
heads of up to about 100 channels. A scaled key longer than about 15 vanishes; its estimate would be noise anyway.
NOTE the paper's orthogonal rows are at most d_head. More are drawn in blocks of d_head, as in the released code.
NOTE the paper draws new projections in the course of training. Here who owns them may: they are an argument.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from effnlp_lessons.attention.blocks import check_inputs, check_positive, without_padding
from effnlp_lessons.attention.linear import (
    attend_features,
    attend_features_causal,
    hide_padding,
)
from effnlp_lessons.dense_attention import at_least_float32


def draw_projections(
    features: int, d_head: int, generator: torch.Generator, orthogonal: bool = True
) -> Float[Tensor, "features d_head"]:
    """Rows w, each normal(0, 1) in every channel; `orthogonal`: to each other within every d_head of them (sec. 2.4).

    Args:
        features: rows, any number >= 1. The estimated kernel's variance falls as 1 / features (Lemma 2).

    Returns:
        float32, on the generator's device.

    Raises:
        ValueError: features or d_head that is no integer >= 1.
    """
    check_positive(features=features, d_head=d_head)
    device = generator.device
    rows = torch.randn(features, d_head, generator=generator, device=device)
    if not orthogonal:
        return rows
    blocks = torch.randn(-(-features // d_head), d_head, d_head, generator=generator, device=device)
    directions, r = torch.linalg.qr(blocks)
    # QR fixes the signs of R's diagonal as it likes; with them taken out, every direction is equally likely
    directions = directions * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    # the columns of a block are orthogonal; their lengths are those of independent normal vectors
    directions = directions.transpose(1, 2).flatten(0, 1)[:features]
    return directions * rows.norm(dim=1, keepdim=True)


def favor_features(
    x: Float[Tensor, "... d_head"], projections: Float[Tensor, "features d_head"], is_query: bool
) -> Float[Tensor, "... features"]:
    """φ(x) = exp(W x - |x|²/2) / sqrt(features) of x d_head^(-1/4) (Eq. 7); float32, or float64 for a float64 `x`.

    `is_query` divides every row by its largest feature: attention does not change, and no query vanishes.

    Raises:
        ValueError: projections of another d_head.
    """
    if projections.ndim != 2 or projections.shape[1] != x.shape[-1]:
        raise ValueError(f"projections must be (features, {x.shape[-1]}), got {tuple(projections.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_float32(x) * x.shape[-1] ** -0.25
        exponents = x @ projections.to(x.dtype).T - x.square().sum(dim=-1, keepdim=True) / 2
        if is_query:
            exponents = exponents - exponents.amax(dim=-1, keepdim=True).detach()
        return exponents.exp() * len(projections) ** -0.5


def performer_attention(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_value"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    projections: Float[Tensor, "features d_head"],
    causal: bool = False,
) -> Float[Tensor, "batch heads length d_value"]:
    """An estimate of softmax attention in time O(length): linear attention with `favor_features`.

    With `causal` strictly causal, without it every output depends on every real token.

    Args:
        key_padding_mask: True = a real token. Padded keys add nothing to the sums.
        projections: of `draw_projections`. The error falls with their number as 1 / sqrt(features).

    Returns:
        Zeros for padded queries and for a query without a real key; the dtype of `v`.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool.
    """
    check_inputs(q, k, v, key_padding_mask)
    queries = favor_features(q, projections, is_query=True)
    keys = hide_padding(favor_features(k, projections, is_query=False), key_padding_mask)
    if causal:
        output, _ = attend_features_causal(queries, keys, at_least_float32(v))
    else:
        output = attend_features(queries, keys, at_least_float32(v))
    return without_padding(output, key_padding_mask).to(v.dtype)
