"""What a pattern of attention costs, how far it reaches, and what it loses of a real head.

A pattern is a bool mask (queries, keys), True where a query may attend. Its papers are in the modules beside
this one; here is what can be asked of any mask, painted by hand or from a paper. Used by the explorer, the
recorded study and notebook 08.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnlp_lessons.dense_attention import check_attention_mask
from effnlp_lessons.transformer import Encoder


def pairs(mask: Bool[Tensor, "... queries keys"]) -> int:
    """Pairs (query, key) that are allowed, over all heads in `mask`. One pair costs 2 d_head MACs."""
    return int(mask.sum())


def reach(layers: Sequence[Bool[Tensor, "length length"]]) -> Bool[Tensor, "length length"]:
    """True at (i, j) where output i of a stack can depend on input j. `layers`: each layer's mask, lowest first.

    Every layer also passes a token on to itself, through the residual sum. No layers: only itself.

    Raises:
        ValueError: masks that are not bool, square and of one size; an empty sequence.
    """
    if len(layers) == 0:
        raise ValueError("layers must hold at least one mask, got none")
    length = layers[0].shape[-1]
    reached = torch.eye(length, dtype=torch.bool)
    for mask in layers:
        check_attention_mask(mask, (length, length))
        # i depends on j if it may see some m (or is m) that depended on j one layer below
        reached = (mask.float() @ reached.float() > 0) | reached
    return reached


def captured_mass(
    weights: Float[Tensor, "heads queries keys"], mask: Bool[Tensor, "*heads queries keys"]
) -> Float[Tensor, " heads"]:
    """Share of each head's attention weights that falls on allowed pairs: the mean over its queries, 0 to 1."""
    check_attention_mask(mask, tuple(weights.shape))
    return (weights * mask).sum(-1).mean(-1)


def output_error(
    weights: Float[Tensor, "heads queries keys"],
    values: Float[Tensor, "heads keys d_head"],
    mask: Bool[Tensor, "*heads queries keys"],
) -> Float[Tensor, " heads"]:
    """How far each head's output moves when only allowed pairs may attend: ‖masked - dense‖ / ‖dense‖ (Frobenius).

    The allowed weights of a query are scaled to sum to 1 again, as a softmax over them would give; a query
    without an allowed key gets zeros. 0: nothing is lost. 1: as bad as an output of zeros.
    """
    check_attention_mask(mask, tuple(weights.shape))
    dense = weights @ values
    kept = weights * mask
    total = kept.sum(-1, keepdim=True)
    masked = (kept / total.where(total > 0, 1.0)) @ values
    return (masked - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)


def best_mask(weights: Float[Tensor, "heads queries keys"], pairs_per_head: int) -> Bool[Tensor, "heads queries keys"]:
    """Of all masks with `pairs_per_head` pairs the one that captures most mass, chosen anew for every head.

    It looks at the weights first, so no pattern of its size can capture more: an upper bound, not a method.

    Raises:
        ValueError: a number of pairs that is negative or more than there are.
    """
    heads, queries, keys = weights.shape
    if not 0 <= pairs_per_head <= queries * keys:
        raise ValueError(f"pairs_per_head must be from 0 to {queries * keys}, got {pairs_per_head}")
    chosen = weights.flatten(1).topk(pairs_per_head, dim=1).indices
    mask = torch.zeros(heads, queries * keys, dtype=torch.bool)
    return mask.scatter_(1, chosen, True).view(heads, queries, keys)


class Heads(NamedTuple):
    """What the heads of a model do with one text: their weights, and the values that the weights mix."""

    weights: Float[Tensor, "layers heads length length"]  # rows sum to 1
    values: Float[Tensor, "layers heads length d_head"]


def read_heads(encoder: Encoder, token_ids: Int[Tensor, "1 length"]) -> Heads:
    """Attention weights and values of every head on one text without padding, by running the encoder once.

    Raises:
        ValueError: more or less than one text; an encoder whose attention hands out no scores.
    """
    if token_ids.shape[0] != 1:
        raise ValueError(f"token_ids must be one text, (1, length), got {tuple(token_ids.shape)}")
    with torch.inference_mode():
        out = encoder(token_ids, return_scores=True)
        values = [mixer.split_heads(mixer.value(x))[0] for mixer, x in _mixers_and_inputs(encoder, out.hidden)]
        weights = [scores[0].softmax(-1) for scores in out.scores]
    return Heads(torch.stack(weights), torch.stack(values))


def read_projections(
    encoder: Encoder, token_ids: Int[Tensor, "1 length"]
) -> tuple[
    Float[Tensor, "layers heads length d_head"],
    Float[Tensor, "layers heads length d_head"],
    Float[Tensor, "layers heads length d_head"],
]:
    """Queries, keys and values of every head on one text without padding, by running the encoder once.

    Raises:
        ValueError: more or less than one text.
    """
    if token_ids.shape[0] != 1:
        raise ValueError(f"token_ids must be one text, (1, length), got {tuple(token_ids.shape)}")
    with torch.inference_mode():
        layers = [
            [mixer.split_heads(project(x))[0] for project in (mixer.query, mixer.key, mixer.value)]
            for mixer, x in _mixers_and_inputs(encoder, encoder(token_ids).hidden)
        ]
        q, k, v = (torch.stack(part) for part in zip(*layers, strict=True))
    return q, k, v


def _mixers_and_inputs(encoder: Encoder, hidden: Sequence[Tensor]) -> Iterator[tuple[nn.Module, Tensor]]:
    """Every layer's token mixer, and what it read."""
    for block, x in zip(encoder.blocks, hidden, strict=False):  # the last hidden state feeds no block
        yield block.token_mixer, block.token_norm(x) if block.norm_first else x
