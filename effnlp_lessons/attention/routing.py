"""Routing Transformer (Roy et al. 2020, arXiv 2003.05997): tokens attend inside the clusters of an online k-means.

Queries and keys are put on a sphere, there |q - k|² = 2 d_head - 2 q·k, so a large score means a small distance
and two tokens that are close to the same centroid are likely to be close to each other. Every centroid
takes the `window` queries and the `window` keys nearest to it, and they attend to each other alone. With clusters =
length / window that is length * window scores, and length * sqrt(length) at the best choice of both. The centroids
are no parameters: they follow the tokens as moving averages.

NOTE the clusters have equal sizes because each centroid picks its tokens, not each token its centroid. So a token
may be in several clusters, whose results are averaged, or in none: then its output is zeros.
NOTE causality: gradient only. Inside a cluster no query sees a later key, so gradients never flow from the future.
But whether a token is among the nearest of a centroid depends on all tokens, and later ones push earlier ones out of
a cluster. A trained model can use this. The released code hides later tokens from the choice only while it generates.
NOTE the released code divides a token's sum by its number of clusters + 0.01; here by that number. It masks by the
rank inside the cluster, which is the order of time only where keys are queries; here by time. It does not divide the
scores by sqrt(d_head), here they are divided. Its counts start at 0, so that the sum
of a cluster that is empty at first is divided by almost 0; here at 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnlp_lessons.attention.blocks import attend, check_inputs, check_positive, real_tokens, without_padding
from effnlp_lessons.attention.local import local_attention
from effnlp_lessons.dense_attention import check_key_padding_mask
from effnlp_lessons.transformer import TransformerConfig

# ------------------------------------------------------------------------------------------- the clusters


def spherical(x: Float[Tensor, "... d_head"]) -> Float[Tensor, "... d_head"]:
    """Layer norm without scale and bias: mean 0 and length sqrt(d_head) for every vector (Alg. 1).

    A vector whose entries are all equal has no direction and becomes zeros.
    """
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def routing_clusters(
    x: Float[Tensor, "batch heads length d_head"],
    centroids: Float[Tensor, "heads clusters d_head"],
    window: int,
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
) -> Int[Tensor, "batch heads clusters window"]:
    """Positions of the `window` vectors with the largest x·μ for every centroid μ, in the order of time (Alg. 1).

    Of equal ones the earlier is taken. Padding is taken last, where there are fewer real tokens than `window`.

    Args:
        x: queries or keys, on the sphere.
        window: w, tokens in a cluster; the whole text if it is shorter.

    Raises:
        ValueError: centroids of another shape, a window that is no integer >= 1, a mask that does not fit.
    """
    _check_centroids(centroids, x)
    check_positive(window=window)
    check_key_padding_mask(key_padding_mask, x.shape[0], x.shape[2])
    with torch.no_grad():
        similarity = _similarity(x, centroids).transpose(2, 3)
        if key_padding_mask is not None:
            similarity = similarity.masked_fill(~key_padding_mask[:, None, None, :], -torch.inf)
        nearest = similarity.argsort(dim=-1, descending=True, stable=True)
        return nearest[..., :window].sort(dim=-1).values


def _similarity(x: Tensor, centroids: Tensor) -> Float[Tensor, "batch heads length clusters"]:
    wide = torch.promote_types(x.dtype, torch.float32)  # a choice should not hang on the rounding of 16 bits
    return x.to(wide) @ centroids.to(wide).transpose(1, 2)


def _check_centroids(centroids: Tensor, x: Tensor) -> None:
    if centroids.ndim != 3 or (centroids.shape[0], centroids.shape[2]) != (x.shape[1], x.shape[3]):
        wanted = f"({x.shape[1]}, clusters, {x.shape[3]})"
        raise ValueError(f"centroids must have shape {wanted}, heads and d_head as q, got {tuple(centroids.shape)}")


# ------------------------------------------------------------------------------------------ the attention


def routing_attention(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_head"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    centroids: Float[Tensor, "heads clusters d_head"],
    window: int,
    causal: bool = False,
) -> Float[Tensor, "batch heads length d_head"]:
    """Attention inside clusters, softmax(q kᵀ / sqrt(d_head)) v on spherical q and k (Alg. 1).

    A head has clusters * window² scores. `causal` is causal for gradients only: see the module's NOTE.

    Args:
        q, k: are put on the sphere here. The paper shares them (k = q) where attention is causal.
        key_padding_mask: True = a real token. Padding is in no cluster.
        centroids: as `Centroids.means`; no gradient flows to them.
        window: w, queries and keys in a cluster; the paper takes length / clusters.
        causal: inside a cluster, only keys that do not stand after the query.

    Returns:
        The mean over the clusters in which the query finds a key. Zeros if there is none, and for padding.

    Raises:
        ValueError: shapes that do not fit, a window that is no integer >= 1.
    """
    check_inputs(q, k, v, key_padding_mask)
    shared = k is q
    q = spherical(q)
    k = q if shared else spherical(k)
    queries_at = routing_clusters(q, centroids, window, key_padding_mask)
    keys_at = queries_at if shared else routing_clusters(k, centroids, window, key_padding_mask)
    real = real_tokens(key_padding_mask, q.shape[2], q.device)[:, None, :].expand(*q.shape[:3])
    allowed = _members(real, keys_at)[..., None, :] & _members(real, queries_at)[..., :, None]
    if causal:
        allowed = allowed & (keys_at[..., None, :] <= queries_at[..., :, None])
    mixed = attend(_members(q, queries_at), _members(k, keys_at), _members(v, keys_at), allowed)
    # back to the places they came from: sum over clusters / number of clusters in which the query found a key
    found = allowed.any(-1).flatten(2)
    places = queries_at.flatten(2)
    count = torch.zeros(q.shape[:3], device=q.device).scatter_add(2, places, found.float())
    wide = torch.promote_types(v.dtype, torch.float32)
    mixed = mixed.flatten(2, 3).to(wide).masked_fill(~found[..., None], 0.0)
    total = torch.zeros(v.shape, dtype=wide, device=v.device)
    total = total.scatter_add(2, places[..., None].expand_as(mixed), mixed)
    return without_padding((total / count.clamp(min=1)[..., None]).to(v.dtype), key_padding_mask)


def _members(x: Tensor, at: Int[Tensor, "batch heads clusters window"]) -> Tensor:
    """What stands in `x` (batch, heads, length) or (batch, heads, length, rest) at the clusters' positions."""
    places = at.flatten(2)
    if x.ndim == 4:
        places = places[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, places).unflatten(2, at.shape[2:])


# ------------------------------------------------------------------------------------------ the centroids


class Centroids(nn.Module):
    """Spherical k-means online: every centroid is a moving average of the tokens nearest to it (Alg. 1).

    counts ← decay counts + (1 - decay) Σ z,  sums ← decay sums + (1 - decay) Σ z x,  means = sums / counts, where z
    is 1 for the tokens nearest to a centroid. Counts are smoothed (Laplace) before the division, so that it has a
    result for an empty cluster. Such a centroid stays where it is: nothing brings it back but tokens that come near.
    The means are not put back on the sphere. That of a loose cluster is shorter, and a tight one wins tokens
    between them.

    Buffers: means, sums (heads, clusters, d_head), counts (heads, clusters); drawn from `seed`.

    Raises:
        ValueError: sizes that are no integer >= 1, a decay that is not in [0, 1).
    """

    def __init__(self, heads: int, clusters: int, d_head: int, decay: float = 0.999, seed: int = 0) -> None:
        super().__init__()
        check_positive(heads=heads, clusters=clusters, d_head=d_head)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        means = spherical(torch.randn(heads, clusters, d_head, generator=torch.Generator().manual_seed(seed)))
        self.register_buffer("means", means)
        self.register_buffer("sums", means.clone())
        self.register_buffer("counts", torch.ones(heads, clusters))

    def nearest(self, x: Float[Tensor, "batch heads length d_head"]) -> Int[Tensor, "batch heads length"]:
        """The centroid with the largest x·μ for every token. `x` on the sphere."""
        _check_centroids(self.means, x)
        with torch.no_grad():
            return _similarity(x, self.means).argmax(-1)

    def _assigned(
        self, x: Tensor, key_padding_mask: Bool[Tensor, "batch length"] | None
    ) -> Float[Tensor, "batch heads length clusters"]:
        """z: one-hot of the nearest centroid, zeros for padding."""
        check_key_padding_mask(key_padding_mask, x.shape[0], x.shape[2])
        z = F.one_hot(self.nearest(x), self.means.shape[1]).to(self.means.dtype)
        return z if key_padding_mask is None else z * key_padding_mask[:, None, :, None]

    @torch.no_grad()
    def update_(
        self,
        x: Float[Tensor, "batch heads length d_head"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> None:
        """Move the centroids, in place, towards the tokens of one batch on the sphere; padding does not count.

        Raises:
            ValueError: x or mask of shapes that do not fit.
        """
        z = self._assigned(x, key_padding_mask)
        self.counts.lerp_(z.sum(dim=(0, 2)), 1 - self.decay)
        self.sums.lerp_(torch.einsum("bhlc,bhld->hcd", z, x.to(z.dtype)), 1 - self.decay)
        # counts = (counts + ε) / (N + clusters ε) N, N: all counts
        total, epsilon = self.counts.sum(-1, keepdim=True), 1e-5
        smoothed = (self.counts + epsilon) / (total + self.counts.shape[1] * epsilon) * total
        self.means.copy_(self.sums / smoothed[..., None])

    def commitment_loss(
        self,
        x: Float[Tensor, "batch heads length d_head"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean of (x - μ)² over all entries of real tokens, μ the nearest centroid: it pulls tokens to centroids.

        Only x gets a gradient. The paper adds 1e-4 of it to the loss of the model. 0 if there are no real tokens.

        Raises:
            ValueError: x or mask of shapes that do not fit.
        """
        z = self._assigned(x, key_padding_mask)
        distance = (x - (z @ self.means).to(x.dtype)).square().mean(-1)
        real = z.sum(-1)
        return (distance * real).sum() / real.sum().clamp(min=1)

    def occupancy(
        self,
        x: Float[Tensor, "batch heads length d_head"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "heads clusters"]:
        """Share of the real tokens that are nearest to each centroid. Its entropy falls where clusters die out.

        Raises:
            ValueError: x or mask of shapes that do not fit.
        """
        tokens = self._assigned(x, key_padding_mask).sum(dim=(0, 2))
        return tokens / tokens.sum(-1, keepdim=True).clamp(min=1)


# -------------------------------------------------------------------------------------------- token mixer


class RoutingSelfAttention(nn.Module):
    """Half the heads attend locally, half inside clusters: a token mixer.

    With `causal` the routed heads use their queries as keys, as in the paper, and `key` is for the local heads alone.
    Causality: gradient only, see the module's NOTE. No state: a decoder must read all tokens at once.
    In training mode, and where gradients are taken, a call moves the centroids. In training mode it leaves
    `commitment_loss` of its queries and keys, to add to the loss of the model (times 1e-4).

    Args:
        clusters, window: of `routing_attention`; the paper takes window = length / clusters.
        local_block: of `local_attention`, with a flange of the same size.
        seed: draws the first centroids.

    Raises:
        ValueError: sizes that are no integer >= 1, fewer than two heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        clusters: int,
        window: int,
        local_block: int,
        causal: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(clusters=clusters, window=window, local_block=local_block)
        if config.heads < 2:
            raise ValueError(f"heads must be >= 2, half local and half routed, got {config.heads}")
        self.heads, self.local_heads = config.heads, config.heads // 2
        self.window, self.local_block, self.causal = window, local_block, causal
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, self.local_heads * config.d_head if causal else config.d_model)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)
        self.centroids = Centroids(self.heads - self.local_heads, clusters, config.d_head, seed=seed)
        self.commitment_loss: Float[Tensor, ""] | None = None

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
        state: None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], None]:
        """Mix the tokens.

        Raises:
            ValueError: a mask of another shape or dtype; a state, for this mixer keeps none.
        """
        if state is not None:
            raise ValueError("state must be None: this mixer keeps none")
        d_head = self.query.out_features // self.heads
        q, k, v = (part(x).unflatten(-1, (-1, d_head)).transpose(1, 2) for part in (self.query, self.key, self.value))
        local, routed = slice(None, self.local_heads), slice(self.local_heads, None)
        near = local_attention(
            *(part[:, local] for part in (q, k, v)),
            key_padding_mask,
            block=self.local_block,
            flange=self.local_block,
            causal=self.causal,
        )
        queries = q[:, routed]
        keys = queries if self.causal else k[:, routed]
        far = routing_attention(
            queries,
            keys,
            v[:, routed],
            key_padding_mask,
            centroids=self.centroids.means,
            window=self.window,
            causal=self.causal,
        )
        self.commitment_loss = None
        if self.training:
            self._learn_centroids(queries, keys, key_padding_mask)
        return self.output(torch.cat([near, far], dim=1).transpose(1, 2).flatten(2)), None

    def _learn_centroids(self, queries: Tensor, keys: Tensor, key_padding_mask: Tensor | None) -> None:
        """Set the commitment loss and move the centroids, after the clusters were chosen with the old ones."""
        tokens = spherical(queries)
        if not self.causal:  # else the keys are the queries
            tokens = torch.cat([tokens, spherical(keys)], dim=2)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.repeat(1, 2)
        self.commitment_loss = self.centroids.commitment_loss(tokens, key_padding_mask)
        if torch.is_grad_enabled():  # a pass that is computed twice, to save memory, counts once
            self.centroids.update_(tokens, key_padding_mask)
