"""FlashAttention-2 in plain PyTorch: exact attention, one tile of scores at a time (Dao 2023, arXiv 2307.08691).

The table of n x n scores is never made. For a block of queries, the softmax is taken while the keys come by, block
after block; m is the largest score so far, l the sum of exp(score - m), O the same sum with values (Algorithm 1):
    m' = max(m, rowmax S)    P = exp(S - m')    l' = exp(m - m') l + rowsum P    O' = exp(m - m') O + P V
At the end O / l is the output, and LSE = m + log l, one number a query, is all that the backward pass needs beside it:
    P = exp(S - LSE)    D = rowsum(dO o O)    dP = dO Vᵀ    dS = P o (dP - D)
    dQ = scale dS K    dK = scale dSᵀ Q    dV = Pᵀ dO
with S = scale Q Kᵀ made again (Algorithm 2; first in Dao et al. 2022, 2205.14135). Logarithms are natural.

The Triton kernels compute the same, and are tested against this. It runs on any device and in any dtype, and counts
what a chip would move between its slow and its fast memory if it is given a `TwoMemories` (of `flash_costs`).

NOTE line 10 of Algorithm 1, and the example in sec. 3.1.1, print the inverse of diag(exp(m - m')) before the old O.
The factor itself is right, as for l: what was weighed by exp(s - m) must be weighed by exp(s - m'), and m' >= m makes
it smaller. The inverse lets old keys grow, and is 1 / 0 at the first tile, where m = -inf.
NOTE dQ and dK, dV are two passes over the tiles, as in our kernels: nobody adds into another's sums, and the result
does not depend on the order. The paper has one pass, with dQ summed up in slow memory.
NOTE a chip multiplies tiles of 16-bit numbers and sums in float32. Here the tiles are made float32 first.
NOTE `window` w means w keys to each side (to the left with `causal`), as in the course's Longformer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from effnlp_lessons.attention.blocks import without_padding
from effnlp_lessons.attention.flash_costs import Tile, TwoMemories, visited_tiles
from effnlp_lessons.dense_attention import at_least_float32, check_key_padding_mask


def check_flash_inputs(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> None:
    """Raise a ValueError unless q, k, v are (batch, heads, length, d_head) of one dtype and the mask fits the keys."""
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k, v must be (batch, heads, length, d_head), got {q.ndim}, {k.ndim}, {v.ndim} dims")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q, k, v must hold at least one token, got q {tuple(q.shape)}, k {tuple(k.shape)}")
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise ValueError(f"q, k, v must be of one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    check_key_padding_mask(key_padding_mask, q.shape[0], k.shape[2])


# ----------------------------------------------------------------------------------------------- one tile


def online_softmax_step(
    m: Float[Tensor, "... queries"],
    l: Float[Tensor, "... queries"],  # noqa: E741
    o: Float[Tensor, "... queries d_head"],
    scores: Float[Tensor, "... queries keys"],
    v: Float[Tensor, "... keys d_head"],
) -> tuple[Float[Tensor, "... queries"], Float[Tensor, "... queries"], Float[Tensor, "... queries d_head"]]:
    """Take one more tile of scores into the softmax (2307.08691, Algorithm 1, with the factor of O put right).

    Args:
        m: the largest score of each query so far; -inf before the first tile.
        l: the sum of exp(score - m) so far; 0 before the first tile.
        o: the sum of exp(score - m) v so far, not divided by l yet; 0 before the first tile.
        scores: of this tile, scaled; -inf where a query may not attend.

    Returns:
        The new (m, l, o). A query that has seen no key yet keeps (-inf, 0, 0): no NaN.
    """
    m_new = torch.maximum(m, scores.amax(dim=-1))
    # without any key so far m_new is -inf, and -inf - (-inf) would be NaN: shifted by 0, exp(-inf) is the right 0
    shift = m_new.masked_fill(m_new == -math.inf, 0.0)
    p = (scores - shift[..., None]).exp_()
    rescale = (m - shift).exp_()
    return m_new, rescale * l + p.sum(dim=-1), rescale[..., None] * o + p @ v.to(p.dtype)


@dataclass(frozen=True)
class _Tiling:
    """The tiles of one call: which there are, in what order, and the scores of each."""

    lengths: tuple[int, int]  # queries, keys
    blocks: tuple[int, int]  # block_queries, block_keys
    causal: bool
    window: int | None
    tiles: list[Tile]

    def walk(self, outer: int) -> Iterator[tuple[slice, list[tuple[slice, Tile]]]]:
        """Every block of queries (outer = 0) or of keys (1): its positions, and those of each block that it meets."""
        met = defaultdict(list)
        for tile in self.tiles:
            met[tile[outer]].append((self._positions(1 - outer, tile[1 - outer]), tile))
        for block in range(-(-self.lengths[outer] // self.blocks[outer])):
            yield self._positions(outer, block), met[block]

    def _positions(self, axis: int, block: int) -> slice:
        size = self.blocks[axis]
        return slice(block * size, min((block + 1) * size, self.lengths[axis]))

    def scores(
        self, q: Tensor, k: Tensor, rows: slice, columns: slice, tile: Tile, real: Tensor | None
    ) -> Float[Tensor, "batch heads rows columns"]:
        """S = scale Q Kᵀ of one tile, at least float32; -inf where a query does not see a key. `real`: no padding."""
        # scaled after the product: a scaled q would be rounded once more
        scores = (at_least_float32(q) @ at_least_float32(k).transpose(-2, -1)).mul_(1 / math.sqrt(q.shape[-1]))
        if tile.kind == "partial" and (self.causal or self.window is not None):
            # query i stands at the place of key i + keys - queries
            shift = self.lengths[1] - self.lengths[0]
            place = torch.arange(rows.start + shift, rows.stop + shift, device=q.device)[:, None]
            key = torch.arange(columns.start, columns.stop, device=q.device)
            if self.causal:
                scores.masked_fill_(key > place, -math.inf)
            if self.window is not None:
                outside = (key < place - self.window) | (key > place + self.window)
                scores.masked_fill_(outside, -math.inf)
        return scores if real is None else scores.masked_fill_(~real[:, :, None, :], -math.inf)


def _load_mask(
    memories: TwoMemories, key_padding_mask: Tensor | None, q: Tensor, columns: slice
) -> Bool[Tensor, "batch heads columns"] | None:
    """True for the real tokens of a block of keys: every head reads them, one byte a key."""
    if key_padding_mask is None:
        return None
    return memories.load("mask", key_padding_mask[:, None, columns].expand(*q.shape[:2], -1))


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    causal: bool,
    window: int | None,
    block_mask: Tensor | None,
    block_queries: int,
    block_keys: int,
) -> _Tiling:
    """Check everything, then list the tiles."""
    check_flash_inputs(q, k, v, key_padding_mask)
    queries, keys = q.shape[2], k.shape[2]
    tiles = visited_tiles(
        queries,
        keys,
        block_queries=block_queries,
        block_keys=block_keys,
        causal=causal,
        window=window,
        block_mask=block_mask,
    )
    return _Tiling((queries, keys), (block_queries, block_keys), causal, window, tiles)


# ------------------------------------------------------------------------------------------- the two passes


def flash_forward(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch heads keys d_head"],
    v: Float[Tensor, "batch heads keys d_head"],
    key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    block_mask: Bool[Tensor, "query_blocks key_blocks"] | None = None,
    block_queries: int = 64,
    block_keys: int = 64,
    memories: TwoMemories | None = None,
) -> tuple[Float[Tensor, "batch heads queries d_head"], Float[Tensor, "batch heads queries"]]:
    """The output and the natural logarithm of the softmax's denominator (2307.08691, Algorithm 1); no gradients.

    Args:
        key_padding_mask: True = a real token. Padded keys are never attended to.
        causal, window, block_mask: which keys a query sees, as in `visited_tiles`.
        block_queries, block_keys: rows and columns of a tile, B_r and B_c in the paper.
        memories: counts the bytes moved, if given.

    Returns:
        (output, LSE): the output in the dtype of `q`, LSE in float32 (float64 for float64). A query without a key
        has output 0 and LSE -inf.

    Raises:
        ValueError: shapes or dtypes that do not fit, and as `visited_tiles`.
    """
    tiling = _prepare(q, k, v, key_padding_mask, causal, window, block_mask, block_queries, block_keys)
    memories = memories or TwoMemories()
    output = q.new_empty(q.shape)
    lse = at_least_float32(q[..., :0]).new_empty(q.shape[:3])
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for rows, visits in tiling.walk(0):
            q_i = memories.load("Q", q[:, :, rows])
            m = torch.full_like(lse[:, :, rows], -math.inf)
            l, o = torch.zeros_like(m), torch.zeros_like(q_i, dtype=m.dtype)  # noqa: E741
            memories.hold(q_i, m, l, o)
            for columns, tile in visits:
                k_j, v_j = memories.load("K", k[:, :, columns]), memories.load("V", v[:, :, columns])
                real = _load_mask(memories, key_padding_mask, q, columns)
                scores = tiling.scores(q_i, k_j, rows, columns, tile, real)
                memories.hold(q_i, k_j, v_j, m, l, o, scores)
                m, l, o = online_softmax_step(m, l, o, scores, v_j)  # noqa: E741
            # l = 0 only without a key: there O = 0 / 1 and LSE = -inf + log 0 = -inf
            o = o / l.masked_fill(l == 0, 1.0)[..., None]
            output[:, :, rows] = memories.store("O", o.to(q.dtype))
            lse[:, :, rows] = memories.store("LSE", m + l.log())
    return output, lse


def flash_backward(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch heads keys d_head"],
    v: Float[Tensor, "batch heads keys d_head"],
    output: Float[Tensor, "batch heads queries d_head"],
    lse: Float[Tensor, "batch heads queries"],
    grad_output: Float[Tensor, "batch heads queries d_head"],
    key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    block_mask: Bool[Tensor, "query_blocks key_blocks"] | None = None,
    block_queries: int = 64,
    block_keys: int = 64,
    memories: TwoMemories | None = None,
) -> tuple[
    Float[Tensor, "batch heads queries d_head"],
    Float[Tensor, "batch heads keys d_head"],
    Float[Tensor, "batch heads keys d_head"],
]:
    """dQ, dK and dV from the outputs of `flash_forward`; every tile of scores is made again, twice (sec. 3.1.2).

    Args:
        output, lse: what `flash_forward` returned for the same settings; tiles may have another size.
        grad_output: dO, the gradient that arrives at the output.

    Raises:
        ValueError: shapes or dtypes that do not fit, and as `visited_tiles`.
    """
    for name, x, shape in (
        ("output", output, q.shape),
        ("lse", lse, q.shape[:3]),
        ("grad_output", grad_output, q.shape),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    tiling = _prepare(q, k, v, key_padding_mask, causal, window, block_mask, block_queries, block_keys)
    memories, scale = memories or TwoMemories(), 1 / math.sqrt(q.shape[3])
    dq, dk, dv, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for rows, _ in tiling.walk(0):
            o_i, do_i = memories.load("O", output[:, :, rows]), memories.load("dO", grad_output[:, :, rows])
            # D = rowsum(dO o O): what the softmax takes off dP
            delta[:, :, rows] = memories.store("delta", (at_least_float32(do_i) * at_least_float32(o_i)).sum(dim=-1))

        for rows, visits in tiling.walk(0):
            q_i, do_i = memories.load("Q", q[:, :, rows]), memories.load("dO", grad_output[:, :, rows])
            lse_i, delta_i = memories.load("LSE", lse[:, :, rows]), memories.load("delta", delta[:, :, rows])
            dq_i = torch.zeros_like(q_i, dtype=lse.dtype)
            for columns, tile in visits:
                k_j, v_j = memories.load("K", k[:, :, columns]), memories.load("V", v[:, :, columns])
                real = _load_mask(memories, key_padding_mask, q, columns)
                scores = tiling.scores(q_i, k_j, rows, columns, tile, real)
                p, ds = _weights_and_gradient(scores, lse_i, v_j, do_i, delta_i)
                memories.hold(q_i, do_i, lse_i, delta_i, dq_i, k_j, v_j, p, ds)
                dq_i += ds @ at_least_float32(k_j)
            dq[:, :, rows] = memories.store("dQ", (dq_i * scale).to(q.dtype))

        for columns, visits in tiling.walk(1):
            k_j, v_j = memories.load("K", k[:, :, columns]), memories.load("V", v[:, :, columns])
            real = _load_mask(memories, key_padding_mask, q, columns)
            dk_j, dv_j = (torch.zeros_like(x, dtype=lse.dtype) for x in (k_j, v_j))
            for rows, tile in visits:
                q_i, do_i = memories.load("Q", q[:, :, rows]), memories.load("dO", grad_output[:, :, rows])
                lse_i, delta_i = memories.load("LSE", lse[:, :, rows]), memories.load("delta", delta[:, :, rows])
                scores = tiling.scores(q_i, k_j, rows, columns, tile, real)
                p, ds = _weights_and_gradient(scores, lse_i, v_j, do_i, delta_i)
                memories.hold(q_i, do_i, lse_i, delta_i, k_j, v_j, dk_j, dv_j, p, ds)
                dv_j += p.transpose(-2, -1) @ at_least_float32(do_i)
                dk_j += ds.transpose(-2, -1) @ at_least_float32(q_i)
            dk[:, :, columns] = memories.store("dK", (dk_j * scale).to(k.dtype))
            dv[:, :, columns] = memories.store("dV", dv_j.to(v.dtype))
    return dq, dk, dv


def _weights_and_gradient(scores: Tensor, lse: Tensor, v: Tensor, grad_output: Tensor, delta: Tensor) -> tuple:
    """P = exp(S - LSE) and P o (dO Vᵀ - D) of one tile: dS without its scale. Overwrites `scores`."""
    # a query without a key has LSE = -inf, and its scores are -inf: shifted by +inf instead, P is 0 and not NaN
    p = scores.sub_(lse.masked_fill(lse == -math.inf, math.inf)[..., None]).exp_()
    dp = at_least_float32(grad_output) @ at_least_float32(v).transpose(-2, -1)
    return p, dp.sub_(delta[..., None]).mul_(p)


# ------------------------------------------------------------------------------------- attention with gradients


class _Flash(torch.autograd.Function):
    """`flash_forward`, and `flash_backward` for its gradients. Keeps the inputs, the output and LSE: O(n) numbers."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, settings: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        output, lse = flash_forward(q, k, v, key_padding_mask, **settings)
        ctx.save_for_backward(q, k, v, output, lse, key_padding_mask)
        ctx.settings = settings
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("tiled_attention has no second derivative: its backward pass is not differentiable")
        *saved, key_padding_mask = ctx.saved_tensors
        return *flash_backward(*saved, grad_output, key_padding_mask, **ctx.settings), None, None


def tiled_attention(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch heads keys d_head"],
    v: Float[Tensor, "batch heads keys d_head"],
    key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    block_mask: Bool[Tensor, "query_blocks key_blocks"] | None = None,
    block_queries: int = 64,
    block_keys: int = 64,
    return_lse: bool = False,
) -> Any:
    """softmax(q kᵀ / sqrt(d_head)) v, exact, with gradients and without a table of all pairs.

    Args:
        key_padding_mask: True = a real token. Padded keys are never attended to.
        causal: key j is visible to query i only if j <= i + keys - queries: the last query sees every key.
        window: and only if |i + keys - queries - j| <= window.
        block_mask: True = the tile is computed, for all texts and heads; not together with `window`.
        block_queries, block_keys: rows and columns of a tile. They change bytes and time, not the result.
        return_lse: also return LSE, the natural logarithm of the softmax's denominator; it has no gradient.

    Returns:
        The output, or (output, LSE). Queries without a key have output 0 and LSE -inf; so have padded tokens, if there
        are as many queries as keys.

    Raises:
        ValueError: shapes or dtypes that do not fit, sizes that are no integer >= 1, a block mask that has not one
            entry a tile or comes with a window.
    """
    settings = {
        "causal": causal,
        "window": window,
        "block_mask": block_mask,
        "block_queries": block_queries,
        "block_keys": block_keys,
    }
    output, lse = _Flash.apply(q, k, v, key_padding_mask, settings)
    if key_padding_mask is not None and q.shape[2] == k.shape[2]:
        output = without_padding(output, key_padding_mask)
        lse = lse.masked_fill(~key_padding_mask[:, None, :], -math.inf)
    return (output, lse) if return_lse else output
