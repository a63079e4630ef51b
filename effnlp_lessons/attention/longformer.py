"""Longformer (Beltagy, Peters, Cohan 2020, arXiv 2004.05150): a sliding window, wider by dilation, and global tokens.

Window (sec. 3.1): token i attends to j with |i - j| <= w, so a stack of L layers reaches L w tokens to each
side. Dilated: j = i + r δ with |r| <= w, reach L w δ. Autoregressive: 0 <= r, to the left only. Global tokens
attend to all and all attend to them, with projections of their own.

NOTE `window` is one-sided here, as in the authors' code. transformers' `attention_window` is two-sided: twice ours.
NOTE the authors cut the text into overlapping chunks of 2w and need a length that is a multiple of 2w. Here a block
of queries reads its keys as a strided view, and any length is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnlp_lessons.attention.blocks import (
    attend,
    check_inputs,
    check_not_negative,
    check_positive,
    neighbour_blocks,
    pad_to_multiple,
    real_tokens,
    without_padding,
)
from effnlp_lessons.dense_attention import check_key_padding_mask, dense_attention
from effnlp_lessons.transformer import TransformerConfig

QUERIES = 64  # in a block: fewer make small, slow products, more compute pairs that the band throws away

# ---------------------------------------------------------------------------------------- the definitions


def window_mask(length: int, window: int, dilation: int = 1, causal: bool = False) -> Bool[Tensor, "length length"]:
    """Sliding window (sec. 3.1): True where |i - j| = r * dilation with 0 <= r <= window; causal: and j <= i.

    Args:
        window: tokens to each side, the token itself not counted. 0 leaves the token alone.

    Raises:
        ValueError: a length or dilation below 1, a window below 0.
    """
    check_not_negative(window=window)
    check_positive(length=length, dilation=dilation)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    distance = (i - j).abs()
    mask = (distance <= window * dilation) & (distance % dilation == 0)
    return mask & (j <= i) if causal else mask


def longformer_mask(length: int, window: int, global_tokens: Bool[Tensor, " length"]) -> Bool[Tensor, "length length"]:
    """Window and global attention together: a global token's row and column are all True (sec. 3.1, "Global").

    Raises:
        ValueError: global_tokens that is not a bool tensor (length,), and what `window_mask` raises.
    """
    mask = window_mask(length, window)
    if global_tokens.dtype != torch.bool or tuple(global_tokens.shape) != (length,):
        got = f"{global_tokens.dtype} {tuple(global_tokens.shape)}"
        raise ValueError(f"global_tokens must be a bool tensor of shape ({length},), got {got}")
    return mask | global_tokens[:, None] | global_tokens


# ----------------------------------------------------------------------------------------- the fast paths


def window_attention(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_head"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    window: int,
    dilation: int | Sequence[int] = 1,
    causal: bool = False,
) -> Float[Tensor, "batch heads length d_head"]:
    """Sliding-window attention in time and memory linear in the length (sec. 3.1).

    Args:
        window: tokens to each side (one-sided), >= 0.
        dilation: one gap for all heads, or one per head (the paper dilates two heads of each layer).
        causal: only tokens to the left, and the token itself.

    Returns:
        Zeros at padded positions, and for a query whose window holds padding only.

    Raises:
        ValueError: shapes that do not fit, a window or dilation out of range, not one dilation per head.
    """
    check_inputs(q, k, v, key_padding_mask)
    if isinstance(dilation, int):
        return _dilated_window(q, k, v, key_padding_mask, window, dilation, causal)
    if len(dilation) != q.shape[1]:
        raise ValueError(f"dilation must be one number or {q.shape[1]}, one per head, got {len(dilation)}")
    output = torch.empty_like(v)
    for gap in sorted(set(dilation)):  # heads with the same gap go together
        heads = [head for head, own in enumerate(dilation) if own == gap]
        part = (x[:, heads] for x in (q, k, v))
        output[:, heads] = _dilated_window(*part, key_padding_mask, window, gap, causal)
    return output


def _dilated_window(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, window: int, dilation: int, causal: bool
) -> Tensor:
    """Positions that are equal modulo `dilation` form texts of their own, each with a plain window."""
    check_not_negative(window=window)
    check_positive(dilation=dilation)
    if dilation == 1:
        return _window(q, k, v, key_padding_mask, window, causal)
    output = torch.empty_like(v)
    for first in range(min(dilation, q.shape[2])):
        own = slice(first, None, dilation)
        mask = None if key_padding_mask is None else key_padding_mask[:, own]
        output[:, :, own] = _window(q[:, :, own], k[:, :, own], v[:, :, own], mask, window, causal)
    return output


def _window(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, window: int, causal: bool) -> Tensor:
    """Blocks of queries, each with the keys from `window` before its first to `window` after its last one."""
    length = q.shape[2]
    window = min(window, length - 1)
    block = min(QUERIES, length)
    after = 0 if causal else window
    real = neighbour_blocks(real_tokens(key_padding_mask, length, q.device), block, window, after, dim=1)
    # the mask of every block: its band, without what is padding or outside the text
    allowed = _band(block, window, after, q.device) & real[:, None, :, None, :]
    queries = pad_to_multiple(q, block).unflatten(2, (-1, block))
    keys, values = (neighbour_blocks(x, block, window, after) for x in (k, v))
    mixed = attend(queries, keys, values, allowed).flatten(2, 3)[:, :, :length]
    return without_padding(mixed, key_padding_mask)


def _band(block: int, window: int, after: int, device: torch.device) -> Bool[Tensor, "block keys"]:
    """True where key column c, which stands at position c - window of its block, is in the window of query row r."""
    offset = torch.arange(window + block + after, device=device) - window - torch.arange(block, device=device)[:, None]
    return (offset >= -window) & (offset <= after)


# -------------------------------------------------------------------------------------- with global tokens


class LongformerAttention(nn.Module):
    """Window attention with global tokens that have their own projections: a token mixer (sec. 3.1).

    A token that is not global attends to its window and to the global tokens, each once, with `query`, `key`
    and `value`. A global token attends to all tokens with `query_global`, `key_global`, `value_global`.
    Padded positions give zeros before the output projection.

    Args:
        window: tokens to each side; give each layer its own through `token_mixer=lambda config, layer: ...`.
        global_positions: positions that are global in every text, for classification the first token.

    Raises:
        ValueError: a window below 0, a global position below 0.
    """

    def __init__(self, config: TransformerConfig, window: int, global_positions: Sequence[int] = (0,)) -> None:
        super().__init__()
        check_not_negative(window=window)
        if any(position < 0 for position in global_positions):
            raise ValueError(f"global_positions must be >= 0, got {tuple(global_positions)}")
        self.heads, self.window, self.global_positions = config.heads, window, tuple(global_positions)
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.query_global = nn.Linear(config.d_model, config.d_model)
        self.key_global = nn.Linear(config.d_model, config.d_model)
        self.value_global = nn.Linear(config.d_model, config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)

    def copy_local_to_global_(self) -> None:
        """Set the global projections to the window's, in place: how the paper starts from a dense model (sec. 5)."""
        for name in ("query", "key", "value"):
            getattr(self, f"{name}_global").load_state_dict(getattr(self, name).state_dict())

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
        state: None = None,
        global_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], None]:
        """Mix the tokens. `global_mask`, True = global, may differ from text to text; default: `global_positions`.

        Raises:
            ValueError: masks of another shape or dtype; a state, for this mixer keeps none.
        """
        batch, length, _ = x.shape
        if state is not None:
            raise ValueError("state must be None: this mixer keeps none")
        check_key_padding_mask(key_padding_mask, batch, length)
        if global_mask is None:
            chosen = [position for position in self.global_positions if position < length]
            global_mask = torch.zeros(batch, length, dtype=torch.bool, device=x.device)
            global_mask[:, chosen] = True
        if global_mask.dtype != torch.bool or global_mask.shape != (batch, length):
            got = f"{global_mask.dtype} {tuple(global_mask.shape)}"
            raise ValueError(f"global_mask must be bool of shape ({batch}, {length}), got {got}")
        real = real_tokens(key_padding_mask, length, x.device).expand(batch, length)
        is_global = global_mask & real
        q, k, v = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        mixed = self._local(q, k, v, real, is_global)
        if is_global.any():
            mixed = self._global(x, real, is_global, mixed)
        return self.output(without_padding(mixed, real).transpose(1, 2).flatten(2)), None

    def _heads(self, x: Tensor) -> Float[Tensor, "batch heads length d_head"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _local(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, is_global: Tensor) -> Tensor:
        """Every query over its window and the global tokens: one softmax, a global key in the window counted once."""
        length = q.shape[2]
        window = min(self.window, length - 1)
        block = min(QUERIES, length)
        index, valid = _global_index(is_global)
        queries = pad_to_multiple(q, block).unflatten(2, (-1, block))
        blocks = queries.shape[2]
        near = neighbour_blocks(real & ~is_global, block, window, window, dim=1)[:, None, :, None, :]
        allowed = _band(block, window, window, q.device) & near
        far = valid[:, None, None, None, :].expand(*allowed.shape[:-1], -1)
        keys, values = (
            torch.cat(
                [
                    _pick(x, index).unsqueeze(2).expand(-1, -1, blocks, -1, -1),
                    neighbour_blocks(x, block, window, window),
                ],
                dim=3,
            )
            for x in (k, v)
        )
        mixed = attend(queries, keys, values, torch.cat([far, allowed], dim=-1))
        return mixed.flatten(2, 3)[:, :, :length]

    def _global(self, x: Tensor, real: Tensor, is_global: Tensor, mixed: Tensor) -> Tensor:
        """Put the global queries' outputs, over all real tokens, in their places of `mixed`."""
        index, valid = _global_index(is_global)
        x_global = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        q, k, v = self.query_global(x_global), self.key_global(x), self.value_global(x)
        rows = dense_attention(*(self._heads(part) for part in (q, k, v)), real)
        text, place = valid.nonzero(as_tuple=True)
        mixed, rows = mixed.transpose(1, 2), rows.transpose(1, 2)
        return mixed.index_put((text, index[text, place]), rows[text, place]).transpose(1, 2)


def _global_index(is_global: Bool[Tensor, "batch length"]) -> tuple[Tensor, Tensor]:
    """Positions of each text's global tokens (batch, most), filled up with others, and which of them are valid."""
    most = int(is_global.sum(1).max())
    index = is_global.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return index, is_global.gather(1, index)


def _pick(x: Float[Tensor, "batch heads length d_head"], index: Tensor) -> Float[Tensor, "batch heads most d_head"]:
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def extended_positions(positions: Float[Tensor, "length d_model"], length: int) -> Float[Tensor, "new_length d_model"]:
    """A longer table of position embeddings: the learned rows copied one after another (sec. 5).

    Raises:
        ValueError: a length below that of the table.
    """
    if length < len(positions):
        raise ValueError(f"length must be >= {len(positions)}, got {length}")
    return positions.repeat(-(-length // len(positions)), 1)[:length]
