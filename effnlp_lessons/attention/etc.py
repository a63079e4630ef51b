"""ETC: a few global tokens beside a long text; the text sees a window and them, they see everything.

A word reaches any other in two steps, through a global token, and the cost stays linear in the long text.
Global tokens are extra inputs (one for each sentence or paragraph, say), not tokens of the text.
Ainslie et al. 2020, "ETC: Encoding Long and Structured Inputs in Transformers", arXiv 2004.08483, sec. 3.

    long queries:    ONE softmax over [long keys within the radius | all global keys]
    global queries:  ONE softmax over [all global keys | all long keys]
    score_ij = (q_i . k_j + q_i . a_label(i, j) + bias_label(i, j)) / sqrt(d_head)

There are no absolute positions: `label` says how key j lies to query i. Among long tokens, and among global
tokens, it is the distance, clipped at k (Shaw et al. 2018, arXiv 1803.02155): 0 = itself, 1 .. k to the right,
k + 1 .. 2k to the left. Between a global and a long token it says only whether the two belong together.
With `context_ids` the input is a set of contexts without an order (paragraphs that a search found): long
tokens of different contexts do not see each other, and global tokens of different contexts get one label
for all distances.

NOTE the numbers of labels, separate tables for long and for global queries, one query, key and value projection for
all four pieces, two output projections: as in the released code's defaults (google-research/etcmodel).
NOTE the released code links a long token to its sentence's and to its paragraph's global token, and can hide other
global tokens; here one id says what belongs together, and all global tokens are seen.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnlp_lessons.attention.blocks import (
    check_positive,
    neighbour_blocks,
    pad_to_multiple,
    real_tokens,
    softmax_over_parts,
    without_padding,
)
from effnlp_lessons.dense_attention import check_key_padding_mask, masked_softmax
from effnlp_lessons.transformer import TransformerConfig


def etc_mask(global_length: int, long_length: int, radius: int) -> Bool[Tensor, "length length"]:
    """True where a query may attend, over [global tokens; long tokens]: a cross of globals and a band.

    Raises:
        ValueError: sizes that are not integers >= 1.
    """
    check_positive(global_length=global_length, long_length=long_length, radius=radius)
    position = torch.arange(global_length + long_length)
    is_global = position < global_length
    near = (position[:, None] - position).abs() <= radius
    return near | is_global[:, None] | is_global


# ---------------------------------------------------------------------------------------------------- labels


class ExtraLabels(NamedTuple):
    """Numbers of the labels that are no distance, after the 2k + 1 distances 0 .. 2k."""

    other: int  # a global and a long token of different contexts
    own: int  # a global and a long token of one context
    cross: int  # two global tokens of different contexts


def extra_labels(max_distance: int) -> ExtraLabels:
    """The three labels beside distances: 2k + 1, 2k + 2, 2k + 3; a table of labels has 2k + 4 rows."""
    return ExtraLabels(2 * max_distance + 1, 2 * max_distance + 2, 2 * max_distance + 3)


def relative_labels(
    query_positions: Int[Tensor, " queries"], key_positions: Int[Tensor, " keys"], max_distance: int
) -> Int[Tensor, "queries keys"]:
    """Label of the distance from each query to each key, clipped at k = `max_distance`.

    0: the same position. 1 .. k: the key stands that far to the right, k or more. k + 1 .. 2k: to the left.
    """
    distance = (key_positions - query_positions[:, None]).clamp(-max_distance, max_distance)
    return torch.where(distance < 0, max_distance - distance, distance)


# ---------------------------------------------------------------------------------------------- the token mixer


class ETCAttention(nn.Module):
    """Global-local attention of ETC, a token mixer: one tensor holds the global tokens and then the long text.

    `Encoder(config, token_mixer=lambda config, layer: ETCAttention(config, global_length=8, radius=16, seed=layer))`
    The weights of `SelfAttention` load into query, key, value and output; global_output and the labels are new.

    Args:
        global_length: number of global tokens, the first positions of the input. At least one: without any
            this is a sliding window.
        radius: R, how far a long token sees to each side; 84 in the paper's base model.
        max_distance: k, distances from k on share a label; 12 in the released code.
        label_std: of the label vectors at the start, a normal distribution cut at two standard deviations.
            0.5 as in the released code; 0 starts as attention without positions, for weights learned elsewhere.
        seed: of the label vectors. Give each layer its own.

    Raises:
        ValueError: sizes out of range.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        global_length: int,
        radius: int,
        max_distance: int = 12,
        label_std: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(global_length=global_length, radius=radius, max_distance=max_distance)
        if not label_std >= 0:
            raise ValueError(f"label_std must be >= 0, got {label_std}")
        self.heads, self.global_length, self.radius = config.heads, global_length, radius
        self.max_distance = max_distance
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)
        self.global_output = nn.Linear(config.d_model, config.d_model)
        labels = 2 * max_distance + 1 + len(ExtraLabels._fields)
        generator = torch.Generator().manual_seed(seed)

        def vectors() -> nn.Parameter:
            table = torch.zeros(labels, config.heads, config.d_head)
            if label_std > 0:
                nn.init.trunc_normal_(table, 0.0, label_std, -2 * label_std, 2 * label_std, generator=generator)
            return nn.Parameter(table)

        # a: (labels, heads, d_head), bias: (labels, heads); one pair for long queries, one for global queries
        self.long_labels, self.global_labels = vectors(), vectors()
        self.long_label_bias = nn.Parameter(torch.zeros(labels, config.heads))
        self.global_label_bias = nn.Parameter(torch.zeros(labels, config.heads))

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
        state: None = None,
        context_ids: Int[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], None]:
        """Mix the tokens of [global; long]. Padded rows mix nothing: they give the output projection's bias.

        Args:
            context_ids: which context each token belongs to, any integers; None is one context. An Encoder
                does not pass them on: give them to the mixer itself.

        Returns:
            (y, None): it reads all tokens at once and keeps no state.

        Raises:
            ValueError: an input without a long token, a mask or ids of another shape or dtype, a state.
        """
        self._check(x, key_padding_mask, state, context_ids)
        length, g = x.shape[1], self.global_length
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        q = q / math.sqrt(q.shape[-1])
        real = real_tokens(key_padding_mask, length, x.device)
        contexts = x.new_zeros(1, length, dtype=torch.long) if context_ids is None else context_ids
        mixed = torch.cat(
            [
                self._mix_global(q[:, :, :g], k, v, real, contexts),
                self._mix_long(q[:, :, g:], k, v, real, contexts),
            ],
            dim=2,
        )
        mixed = without_padding(mixed, real).transpose(1, 2).flatten(2)
        return torch.cat([self.global_output(mixed[:, :g]), self.output(mixed[:, g:])], dim=1), None

    def _check(self, x: Tensor, key_padding_mask: Tensor | None, state: object, context_ids: Tensor | None) -> None:
        shortest = self.global_length + 1
        if x.ndim != 3 or x.shape[1] < shortest:
            raise ValueError(
                f"x must be (batch, length >= {shortest}, d_model): {self.global_length} global tokens and at least "
                f"one long token, got {tuple(x.shape)}"
            )
        check_key_padding_mask(key_padding_mask, *x.shape[:2])
        if state is not None:
            raise ValueError("state must be None: this attention reads all tokens at once")
        if context_ids is not None:
            if context_ids.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"context_ids must hold integers, got {context_ids.dtype}")
            if context_ids.shape != x.shape[:2]:
                raise ValueError(f"context_ids must have shape {tuple(x.shape[:2])}, got {tuple(context_ids.shape)}")

    @staticmethod
    def _label_scores(q: Tensor, vectors: Tensor, bias: Tensor) -> Float[Tensor, "batch heads queries labels"]:
        """(q . a_label + bias_label) / sqrt(d_head) for every label; `q` is divided by the root already."""
        return q @ vectors.permute(1, 2, 0) + bias.T[:, None] / math.sqrt(q.shape[-1])

    def _mix_global(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, contexts: Tensor) -> Tensor:
        """Global queries against every key: global_length x length pairs."""
        g, extra = self.global_length, extra_labels(self.max_distance)
        same = contexts[:, :g, None] == contexts[:, None, :]
        position = torch.arange(g, device=q.device)
        among = relative_labels(position, position, self.max_distance)
        to_global = torch.where(same[..., :g], among, extra.cross)
        to_long = torch.where(same[..., g:], extra.own, extra.other)
        labels = torch.cat([to_global, to_long], dim=-1)[:, None]  # (batch or 1, 1, g, length)
        scores = q @ k.transpose(-2, -1)
        terms = self._label_scores(q, self.global_labels, self.global_label_bias)
        scores = scores + terms.gather(-1, labels.expand(scores.shape))
        return masked_softmax(scores, real[:, None, None, :]) @ v

    def _mix_long(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, contexts: Tensor) -> Tensor:
        """Long queries, a block at a time, against their window and the global keys."""
        g, length, extra = self.global_length, q.shape[2], extra_labels(self.max_distance)
        reach = min(self.radius, length - 1)
        block = reach + 1
        q = pad_to_multiple(q, block)
        blocks = q.shape[2] // block
        terms = self._label_scores(q, self.long_labels, self.long_label_bias)

        # window: the label depends on the offset alone, so one small table serves all blocks
        keys, values = (neighbour_blocks(x[:, :, g:], block, reach, reach) for x in (k, v))
        query_at = torch.arange(reach, reach + block, device=q.device)
        key_at = torch.arange(block + 2 * reach, device=q.device)
        window = q.unflatten(2, (blocks, block)) @ keys.transpose(-2, -1)  # (batch, heads, blocks, block, window)
        labels = relative_labels(query_at, key_at, self.max_distance)
        window = window + terms.unflatten(2, (blocks, block)).gather(-1, labels.expand(window.shape))
        near = (key_at - query_at[:, None]).abs() <= reach
        real_keys = neighbour_blocks(real[:, g:], block, reach, reach, dim=1)[:, :, None]
        key_context = neighbour_blocks(contexts[:, g:], block, reach, reach, dim=1)[:, :, None]
        query_context = pad_to_multiple(contexts[:, g:], block, dim=1)
        same = query_context.unflatten(1, (blocks, block))[..., None] == key_context
        window_allowed = (near & real_keys & same)[:, None]

        # global keys: own or other context
        same = (query_context[..., None] == contexts[:, None, :g])[:, None]
        to_global = q @ k[:, :, :g].transpose(-2, -1)
        to_global = to_global + torch.where(same, terms[..., extra.own, None], terms[..., extra.other, None])
        to_global = to_global.unflatten(2, (blocks, block))
        global_allowed = real[:, None, None, None, :g]

        weights, global_weights = softmax_over_parts([window, to_global], [window_allowed, global_allowed])
        mixed = (weights @ values).flatten(2, 3) + global_weights.flatten(2, 3) @ v[:, :, :g]
        return mixed[:, :, :length]
