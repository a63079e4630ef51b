"""LSH attention, Reformer: a query looks for keys of its own hash bucket (Kitaev et al. 2020, arXiv 2001.04451).

Hash (sec. 2): h(x) = argmax([xR; -xR]), R random; vectors at a small angle share a bucket with high probability.
Queries are keys: k = q / ||q||, so a token and what it looks for fall into the same bucket. Each round of hashing
sorts the tokens by (bucket, position); the rounds stand one after another in one list, which is cut into chunks.
A chunk attends to itself and to the chunk before it. The rounds' outputs are joined by their logsumexp,
o_i = sum_r exp(lse_i^(r) - lse_i) o_i^(r), which is one softmax over all keys that were met.
A token attends to itself only if there is nothing else.

Causality: gradient only. No weight falls on the future, and no gradient reaches it; but future tokens take places
in the sorted list and so move the borders of the chunks, which changes what the past meets. For training that is
enough. A model that writes token by token hashes a longer list at each step, and may judge its past differently.

NOTE as in the authors' code (trax) and in transformers, scores are q k without 1 / sqrt(d_head); the first chunk
looks back to the last one, the first chunk of a round to the last of the round before; keys of other buckets in
the two chunks are met too (`same_bucket_only` hides them), and a key that is met twice counts twice
(`count_duplicates=False` subtracts log N_ij, N_ij the times it is met, so that the keys form a union).
NOTE trax and transformers split the hash into two factors when there are very many buckets. Here it has one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from effnlp_lessons.attention.blocks import check_inputs, check_positive, real_tokens, without_padding
from effnlp_lessons.dense_attention import check_key_padding_mask
from effnlp_lessons.transformer import TransformerConfig

# ---------------------------------------------------------------------------------------------- the hash


def draw_rotations(
    hashes: int, d_head: int, buckets: int, generator: torch.Generator | None = None
) -> Float[Tensor, "hashes d_head half_buckets"]:
    """The random R ~ N(0, 1) of every round (sec. 2); with `buckets` = 2 length / chunk a chunk is two mean buckets.

    Raises:
        ValueError: sizes that are no integer >= 1, an odd number of buckets.
    """
    check_positive(hashes=hashes, d_head=d_head, buckets=buckets)
    if buckets % 2:
        raise ValueError(f"buckets must be even, since -xR gives half of them, got {buckets}")
    return torch.randn(hashes, d_head, buckets // 2, generator=generator)


@torch.no_grad()
def lsh_buckets(
    x: Float[Tensor, "... length d_head"], rotations: Float[Tensor, "hashes d_head half_buckets"]
) -> Int[Tensor, "... hashes length"]:
    """Bucket of every vector in every round, h(x) = argmax([xR; -xR]) (sec. 2), 0 .. 2 half_buckets - 1.

    Depends on the direction of `x` alone. No gradient passes through it.

    Raises:
        ValueError: rotations that are not 3-dimensional, or whose second dimension is not the last of `x`.
    """
    if rotations.ndim != 3 or x.shape[-1] != rotations.shape[1]:
        got = f"rotations {tuple(rotations.shape)} and x {tuple(x.shape)}"
        raise ValueError(f"rotations must be (hashes, d_head, half_buckets) for x (..., length, d_head), got {got}")
    rotated = x.to(rotations.dtype).unsqueeze(-3) @ rotations  # (..., hashes, length, half_buckets)
    # argmax([xR; -xR]) from the largest and the smallest of xR, without a second table
    (largest, where_largest), (smallest, where_smallest) = rotated.max(dim=-1), rotated.min(dim=-1)
    return torch.where(largest >= -smallest, where_largest, where_smallest + rotations.shape[2])


def unit_keys(qk: Float[Tensor, "... d_head"]) -> Float[Tensor, "... d_head"]:
    """k = q / ||q|| (sec. 2, "shared QK"); d_head 1e-6 joins the squared norm, so that q = 0 has a gradient."""
    return qk * torch.rsqrt(qk.square().sum(dim=-1, keepdim=True) + 1e-6 * qk.shape[-1])


# ------------------------------------------------------------------------------------------ the definition


def _check_buckets(buckets: Tensor, chunk: int) -> None:
    check_positive(chunk=chunk)
    if buckets.ndim != 4 or buckets.is_floating_point() or buckets.dtype == torch.bool or buckets.shape[2] < 1:
        got = f"{buckets.dtype} {tuple(buckets.shape)}"
        raise ValueError(f"buckets must be integers of shape (batch, heads, hashes, length), got {got}")


def _padding_last(buckets: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Padded tokens go to a bucket of their own, behind all others."""
    if key_padding_mask is None:
        return buckets
    return buckets.masked_fill(~key_padding_mask[:, None, None, :], int(buckets.max()) + 1)


def _places(order: Int[Tensor, "batch heads hashes length"]) -> Int[Tensor, "batch heads hashes length"]:
    """Where every token stands in the list of all rounds: the inverse of the sort, round r behind r * length."""
    hashes, length = order.shape[2:]
    start = length * torch.arange(hashes, device=order.device)[:, None]
    ranks = torch.arange(length, device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(3, order, ranks) + start


def lsh_pairs(
    buckets: Int[Tensor, "batch heads hashes length"],
    chunk: int,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    count_duplicates: bool = True,
    same_bucket_only: bool = False,
) -> Int[Tensor, "batch heads length length"]:
    """How often query i meets key j: LSH attention is dense attention over `unit_keys` with log of this added.

    A token of an earlier chunk of the list, or of another round, counts as the chunks of `lsh_attention` meet it.
    The diagonal is 1 where a real token meets no other, else 0. For tests and pictures: n x n numbers.

    Raises:
        ValueError: what `lsh_attention` raises.
    """
    _check_buckets(buckets, chunk)
    batch, _, hashes, length = buckets.shape
    check_key_padding_mask(key_padding_mask, batch, length)
    if length <= chunk:
        met = torch.ones_like(buckets[:, :, 0, :, None]).expand(-1, -1, -1, length)
    else:
        buckets = _padding_last(buckets, key_padding_mask)
        chunk_of = _places(buckets.argsort(dim=-1, stable=True)) // chunk
        met = _times_met(chunk_of, chunk_of, buckets, buckets, -(-hashes * length // chunk), same_bucket_only).long()
    if not count_duplicates:
        met = met.clamp(max=1)
    met = met.tril(-1) if causal else met * ~torch.eye(length, dtype=torch.bool, device=met.device)
    real = real_tokens(key_padding_mask, length, met.device)
    met = met * real[:, None, None, :] * real[:, None, :, None]
    alone = (met.sum(dim=-1) == 0) & real[:, None]
    return met + torch.diag_embed(alone.to(met.dtype))


def _times_met(
    query_chunk: Int[Tensor, "*batch hashes queries"],
    key_chunk: Int[Tensor, "*batch hashes keys"],
    query_bucket: Int[Tensor, "*batch hashes queries"],
    key_bucket: Int[Tensor, "*batch hashes keys"],
    chunks: int,
    same_bucket_only: bool,
) -> Int[Tensor, "*batch queries keys"]:
    """N_ij: over the rounds r of the query and s of the key, how often j is in the chunk of i or the one before."""
    hashes = query_chunk.shape[-2]
    met = torch.zeros(*query_chunk.shape[:-2], query_chunk.shape[-1], key_chunk.shape[-1], dtype=torch.int16)
    met = met.to(query_chunk.device)
    for r in range(hashes):
        for s in [r] if same_bucket_only else range(hashes):
            own = query_chunk[..., r, :, None]
            other = key_chunk[..., s, None, :]
            near = (other == own) | (other == (own - 1) % chunks)
            if same_bucket_only:
                near = near & (query_bucket[..., r, :, None] == key_bucket[..., s, None, :])
            met += near
    return met


# -------------------------------------------------------------------------------------------- the fast path


def lsh_attention(
    qk: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_head"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    buckets: Int[Tensor, "batch heads hashes length"],
    chunk: int,
    causal: bool = False,
    count_duplicates: bool = True,
    same_bucket_only: bool = False,
) -> Float[Tensor, "batch heads length d_head"]:
    """Attention over the pairs of `lsh_pairs`: sort, cut into chunks, look back, join the rounds (sec. 2).

    hashes * length * 2 chunk scores a head. A text of at most `chunk` tokens is not hashed: all pairs are computed.

    Args:
        qk: queries, and keys before they are brought to length 1.
        key_padding_mask: True = a real token. Padded keys are never attended to.
        buckets: of `lsh_buckets`, any integers; those of padded tokens are not looked at.
        chunk: tokens in a chunk.
        causal: hide the future from the past's gradient (see the module's docstring: not from its choice of keys).
        count_duplicates: False subtracts log N_ij, so that a key met in several rounds counts once.
        same_bucket_only: True hides keys of other buckets.

    Returns:
        Zeros for padded queries; `v` itself for a query that meets no other token.

    Raises:
        ValueError: shapes that do not fit, buckets that are no integers, a chunk that is no integer >= 1.
    """
    check_inputs(qk, qk, v, key_padding_mask)
    _check_buckets(buckets, chunk)
    batch, heads, length, _ = qk.shape
    if (*buckets.shape[:2], buckets.shape[3]) != (batch, heads, length):
        got = tuple(buckets.shape)
        raise ValueError(f"buckets must have shape ({batch}, {heads}, hashes, {length}) like qk, got {got}")
    if length <= chunk:
        order = torch.arange(length, device=qk.device).expand(batch, heads, 1, length)
        chunk, look_back = length, 0
    else:
        buckets = _padding_last(buckets, key_padding_mask)
        order, look_back = buckets.argsort(dim=-1, stable=True), chunk
    places = _places(order)
    hashes = order.shape[2]

    # the list of all rounds, filled up to full chunks; -1 stands for no token
    tokens = F.pad(order.flatten(2), (0, -hashes * length % chunk), value=-1)
    chunks = tokens.shape[2] // chunk
    key_tokens = torch.cat([tokens[:, :, tokens.shape[2] - look_back :], tokens], dim=2)
    queries_of, keys_of = tokens.unflatten(2, (chunks, chunk)), key_tokens.unfold(2, look_back + chunk, chunk)
    # j < i already leaves out the token itself
    i, j = queries_of[..., :, None], keys_of[..., None, :]
    allowed = (j < i) if causal else (j != i) & (i >= 0)
    visible = key_tokens >= 0
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None].expand(-1, heads, -1).gather(2, key_tokens.clamp(min=0))
    if not visible.all():
        allowed = allowed & visible.unfold(2, look_back + chunk, chunk)[..., None, :]
    if look_back and same_bucket_only:
        in_round = torch.arange(hashes, device=qk.device)[:, None] + hashes * buckets  # differs by round and bucket
        own = F.pad(in_round.gather(3, order).flatten(2), (0, tokens.shape[2] - hashes * length), value=-1)
        other = torch.cat([own[:, :, -look_back:], own], dim=2).unfold(2, look_back + chunk, chunk)
        allowed = allowed & (own.unflatten(2, (chunks, chunk))[..., :, None] == other[..., None, :])
    dtype = qk.dtype
    if dtype in (torch.float16, torch.bfloat16):
        qk, v = qk.float(), v.float()
    # half the smallest finite number gives a weight of exactly 0 and no NaN in a row without any key
    bias = torch.zeros(allowed.shape, dtype=qk.dtype, device=qk.device)
    bias.masked_fill_(~allowed, torch.finfo(qk.dtype).min / 2)
    if look_back and not count_duplicates:
        chunk_of = (places // chunk).transpose(2, 3)
        met = _times_met(
            *(_rounds(chunk_of, t) for t in (queries_of, keys_of)),
            *(_rounds(buckets.transpose(2, 3), t) for t in (queries_of, keys_of)),
            chunks,
            same_bucket_only,
        )
        bias -= met.clamp(min=1).to(bias.dtype).log()

    queries, keys, values = (_pick(x, t) for x, t in ((qk, tokens), (unit_keys(qk), key_tokens), (v, key_tokens)))
    attend = _JoinedRounds.apply if qk.device.type == "cpu" else _joined_rounds
    places = places.flatten(0, 1)
    output, lse = attend(queries, keys, values, bias.flatten(0, 1), places)
    alone = (lse < torch.finfo(lse.dtype).min / 4).unflatten(0, (batch, heads))
    output = torch.where(alone[..., None], v, output.unflatten(0, (batch, heads))).to(dtype)
    return without_padding(output, key_padding_mask)


def _rounds(x: Tensor, tokens: Int[Tensor, "batch heads chunks some"]) -> Int[Tensor, "batch heads chunks hashes some"]:
    """The numbers that the chosen tokens have in every round; `x` is (batch, heads, length, hashes)."""
    index = tokens.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, index).unflatten(2, tokens.shape[2:]).transpose(3, 4)


def _pick(x: Tensor, tokens: Int[Tensor, "batch heads entries"]) -> Float[Tensor, "batch_heads entries d_head"]:
    """The vectors of the list's tokens. Whole rows by one index are several times faster than `gather`."""
    batch, heads, length, _ = x.shape
    first = length * torch.arange(batch * heads, device=x.device)[:, None]
    rows = tokens.clamp(min=0).flatten(0, 1) + first
    return x.reshape(batch * heads * length, -1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _windows(x: Float[Tensor, "rows entries d_head"], size: int, step: int) -> Tensor:
    """(rows, chunks, size, d_head), overlapping views."""
    return x.unfold(1, size, step).transpose(2, 3)


def _per_token(x: Tensor, places: Int[Tensor, "rows hashes length"]) -> Float[Tensor, "rows hashes length some"]:
    """From the order of the list, (rows, entries, some), back to tokens: what each round found."""
    return x[torch.arange(len(x), device=x.device)[:, None, None], places]


def _join(lse: Tensor) -> tuple[Float[Tensor, "rows length"], Float[Tensor, "rows hashes length 1"]]:
    """logsumexp over the rounds, and each round's share exp(lse_r - lse)."""
    total = lse.logsumexp(dim=1)
    return total, (lse - total[:, None]).exp()[..., None]


def _joined_rounds(
    queries: Float[Tensor, "rows entries d_head"],
    keys: Float[Tensor, "rows key_entries d_head"],
    values: Float[Tensor, "rows key_entries d_head"],
    bias: Float[Tensor, "rows chunks chunk keys"],
    places: Int[Tensor, "rows hashes length"],
) -> tuple[Float[Tensor, "rows length d_head"], Float[Tensor, "rows length"]]:
    """Attention inside every chunk, its rounds joined, and the logsumexp of all scores of a token: in plain torch."""
    chunk, size = bias.shape[2:]
    scores = queries.unflatten(1, (-1, chunk)) @ _windows(keys, size, chunk).transpose(2, 3) + bias
    lse = scores.logsumexp(dim=-1)
    found = (scores - lse[..., None]).exp() @ _windows(values, size, chunk)
    total, share = _join(_per_token(lse.flatten(1), places))
    return (share * _per_token(found.flatten(1, 2), places)).sum(dim=1), total.detach()


class _JoinedRounds(torch.autograd.Function):
    """`_joined_rounds` with torch's CPU flash kernel, which keeps no scores; it returns a logsumexp per query.

    All rounds together are one softmax, so its gradient dS = P * (dP - rowsum(dO * O)) needs nothing but the joined
    O and logsumexp in the place of each round's own: the kernel's backward computes P = exp(S - lse) with them.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        chunk, size = bias.shape[2:]
        found, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries.unflatten(1, (-1, chunk)),
            _windows(keys, size, chunk),
            _windows(values, size, chunk),
            attn_mask=bias,
            scale=1.0,
        )
        total, share = _join(_per_token(lse.flatten(1), places))
        output = (share * _per_token(found.flatten(1, 2), places)).sum(dim=1)
        ctx.save_for_backward(queries, keys, values, bias, places, output, total)
        ctx.mark_non_differentiable(total)
        return output, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, bias, places, output, total = ctx.saved_tensors
        rows, chunks, chunk, size = bias.shape
        # a token's numbers at each of its places in the list
        entries = torch.zeros(rows, chunks * chunk, dtype=torch.long)
        entries.scatter_(1, places.flatten(1), torch.arange(places.shape[2]).expand_as(places).flatten(1))
        row = torch.arange(rows)[:, None]
        grad_found, joined, lse = (x[row, entries].unflatten(1, (chunks, chunk)) for x in (grad_output, output, total))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_found,
            queries.unflatten(1, (chunks, chunk)),
            _windows(keys, size, chunk),
            _windows(values, size, chunk),
            joined,
            lse,
            0.0,
            False,
            attn_mask=bias,
            scale=1.0,
        )
        return grads[0].flatten(1, 2), *(_overlap_added(grad, chunk) for grad in grads[1:]), None, None


def _overlap_added(grad: Float[Tensor, "rows chunks keys d_head"], chunk: int) -> Tensor:
    """The gradient of `_windows`: a vector's sum over the one or two windows that hold it."""
    own = grad[:, :, -chunk:].flatten(1, 2)
    if grad.shape[2] == chunk:
        return own
    total = F.pad(own, (0, 0, chunk, 0))
    total[:, : own.shape[1]] += grad[:, :, :chunk].flatten(1, 2)
    return total


# ------------------------------------------------------------------------------------------ the token mixer


class LSHSelfAttention(nn.Module):
    """Multi-head LSH self-attention, a token mixer with one projection for queries and keys (sec. 2).

    The rotations are drawn once from `seed`, stay the same for training and evaluation, and are saved with the
    weights. Causality: gradient only (see the module's docstring).

    Attributes:
        choice: the buckets of the last forward pass in training mode, else None.
        fixed_choice: buckets to take instead of hashing. A reversible stack sets them when it computes again what it
            did not keep: a rounding error in the input must not send a token to another bucket.

    Args:
        chunk: tokens in a chunk.
        hashes: rounds.
        buckets: in each round, even; 2 length / chunk in the paper.

    Raises:
        ValueError: sizes that are no integer >= 1, an odd number of buckets.
    """

    def __init__(
        self, config: TransformerConfig, chunk: int, hashes: int, buckets: int, causal: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        check_positive(chunk=chunk)
        self.heads, self.chunk, self.causal = config.heads, chunk, causal
        self.query_key = nn.Linear(config.d_model, config.d_model, bias=False)
        self.value = nn.Linear(config.d_model, config.d_model, bias=False)
        self.output = nn.Linear(config.d_model, config.d_model)
        rotations = draw_rotations(hashes, config.d_head, buckets, torch.Generator().manual_seed(seed))
        self.register_buffer("rotations", rotations)
        self.choice: Tensor | None = None
        self.fixed_choice: Tensor | None = None

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
        qk, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query_key, self.value))
        buckets = lsh_buckets(qk, self.rotations) if self.fixed_choice is None else self.fixed_choice
        self.choice = buckets if self.training else None
        mixed = lsh_attention(qk, v, key_padding_mask, buckets=buckets, chunk=self.chunk, causal=self.causal)
        return self.output(mixed.transpose(1, 2).flatten(2)), None
