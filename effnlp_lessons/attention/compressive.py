"""Compressive Transformer: what falls out of Transformer-XL's memory is not lost but compressed.

The paper is Rae et al. 2019 (arXiv 1911.05507). Every layer has two queues (Algorithm 1): a memory of the last
n_m inputs, as in Transformer-XL, and a compressed memory of n_cm slots. A segment attends to [compressed; memory;
segment]. The rows that it pushes out of the memory go, c at a time (the compression rate), through a compression
function f_c into one slot each; slots that fall out of the compressed memory are gone. One layer reaches
n_m + c n_cm tokens back for n_m + n_cm keys.

f_c (sec. 3.1): mean or max pooling, a convolution (kernel = stride = c), dilated convolutions, or the most-used rows.
f_c learns by a loss of its own (sec. 3.2), never from the language model: to rebuild the old rows (autoencoding,
||old - g(f_c(old))||²), or only what the layer reads out of them (attention reconstruction, Algorithm 2,
||attn(h, old) - attn(h, f_c(old))||², attn by content without positions). There h, old and the layer's own
weights get no gradient.

NOTE what the paper leaves open. Rows are compressed in whole windows of c: up to c - 1 rows that are due wait in
the memory, which then holds up to n_m + c - 1 rows. So a segment may have any length, also 1, and nothing is lost
between two windows. While the memory is not full nothing is compressed, and the loss is 0. Slots count as
positions like tokens: the distances are those in the concatenation, as if it were consecutive text.
NOTE padded rows keep their place in the queues. Pooling is over real rows, a convolution sees zeros, and a slot
without any real row is never attended to.
NOTE the losses here are means of squares over real rows, so that their size does not grow with the segment.
NOTE the paper does not give the dilated convolutions; here they are two of width 3 with gaps 1 and 2, each added
to its input, and then the convolution. These and the most-used rows look at all rows that are due together, so the
slots depend on how the text is cut. The other three do not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnlp_lessons.attention.blocks import check_not_negative, check_positive
from effnlp_lessons.attention.transformer_xl import TransformerXLAttention, newest
from effnlp_lessons.dense_attention import check_key_padding_mask, dense_attention
from effnlp_lessons.transformer import TransformerConfig

COMPRESSIONS = ("mean", "max", "convolution", "dilated", "most-used")
RECONSTRUCTIONS = ("attention", "autoencoding")
GAPS = (1, 2)  # of the dilated convolutions


class CompressiveState(NamedTuple):
    """What one layer carries on. All but the loss is detached; the loss belongs to the last segment alone."""

    memory: Float[Tensor, "batch rows d_model"]
    compressed: Float[Tensor, "batch slots d_model"]
    reconstruction_loss: Float[Tensor, ""]  # add it to the language model's loss, it trains the compression only
    memory_real: Bool[Tensor, "batch rows"]  # False = a padded token
    compressed_real: Bool[Tensor, "batch slots"]
    usage: Float[Tensor, "batch rows"]  # attention that each row of the memory got so far, 0 unless most-used


def mean_pool(
    old: Float[Tensor, "batch rows d_model"], real: Bool[Tensor, "batch rows"], rate: int
) -> Float[Tensor, "batch slots d_model"]:
    """The mean of the real ones of every `rate` rows; zeros where none is real."""
    real = real.unflatten(1, (-1, rate))[..., None]
    return (old.unflatten(1, (-1, rate)) * real).sum(dim=2) / real.sum(dim=2).clamp(min=1)


def max_pool(
    old: Float[Tensor, "batch rows d_model"], real: Bool[Tensor, "batch rows"], rate: int
) -> Float[Tensor, "batch slots d_model"]:
    """The largest of the real ones of every `rate` rows, in each channel; zeros where none is real."""
    real = real.unflatten(1, (-1, rate))[..., None]
    largest = old.unflatten(1, (-1, rate)).masked_fill(~real, float("-inf")).amax(dim=2)
    return largest.masked_fill(~real.any(dim=2), 0.0)


def most_used(
    old: Float[Tensor, "batch rows d_model"],
    real: Bool[Tensor, "batch rows"],
    usage: Float[Tensor, "batch rows"],
    rate: int,
) -> tuple[Float[Tensor, "batch slots d_model"], Bool[Tensor, "batch slots"]]:
    """The rows / rate rows with the most `usage`, in their order in time, and whether each is real."""
    wanted = usage.masked_fill(~real, float("-inf")).topk(old.shape[1] // rate, dim=1).indices.sort(dim=1).values
    return old.take_along_dim(wanted[..., None], dim=1), real.take_along_dim(wanted, dim=1)


class Compression(nn.Module):
    """f_c, from rows to rows / rate slots, and, for the autoencoding loss, its decoder g.

    A convolution with kernel = stride = rate is a linear map of every window, and written so.
    """

    def __init__(self, d_model: int, rate: int, kind: str, decoder: bool) -> None:
        super().__init__()
        self.rate, self.kind = rate, kind
        learned = kind in ("convolution", "dilated")
        self.convolution = nn.Linear(rate * d_model, d_model) if learned else None
        gaps = GAPS if kind == "dilated" else ()
        self.dilated = nn.ModuleList(nn.Linear(3 * d_model, d_model) for _ in gaps)
        self.decoder = nn.Linear(d_model, rate * d_model) if decoder else None

    def forward(
        self,
        old: Float[Tensor, "batch rows d_model"],
        real: Bool[Tensor, "batch rows"],
        usage: Float[Tensor, "batch rows"],
    ) -> tuple[Float[Tensor, "batch slots d_model"], Bool[Tensor, "batch slots"]]:
        """Compress `old`, a multiple of rate rows; also says which slots are real."""
        slots_real = real.unflatten(1, (-1, self.rate)).any(dim=-1)
        if self.kind == "mean":
            return mean_pool(old, real, self.rate), slots_real
        if self.kind == "max":
            return max_pool(old, real, self.rate), slots_real
        if self.kind == "most-used":
            return most_used(old, real, usage, self.rate)
        rows = old * real[..., None]
        for layer, gap in zip(self.dilated, GAPS, strict=False):
            around = F.pad(rows, (0, 0, gap, gap))  # rows before and after are zeros
            around = torch.cat([around[:, : -2 * gap], rows, around[:, 2 * gap :]], dim=-1)
            rows = (rows + F.relu(layer(around))) * real[..., None]
        return self.convolution(rows.unflatten(1, (-1, self.rate)).flatten(2)), slots_real

    def decode(self, slots: Float[Tensor, "batch slots d_model"]) -> Float[Tensor, "batch rows d_model"]:
        """g, a transposed convolution with kernel = stride = rate."""
        return self.decoder(slots).unflatten(-1, (self.rate, -1)).flatten(1, 2)


class CompressiveAttention(TransformerXLAttention):
    """Token mixer with a memory and a compressed memory (Algorithm 1).

    Add the sum over layers of `state.reconstruction_loss` to the language model's loss: the parameters of
    `compression` learn from it, and from nothing else; no other parameter learns from it. Causality: strict.

    Args:
        memory_length: n_m, in tokens.
        compressed_length: n_cm, in slots.
        rate: c, tokens per slot.
        compression: one of `COMPRESSIONS`.
        reconstruction: "attention" (Algorithm 2) or "autoencoding".

    Raises:
        ValueError: a length < 0, `rate` < 1, or an unknown compression or reconstruction.
    """

    def __init__(
        self,
        config: TransformerConfig,
        memory_length: int,
        compressed_length: int,
        rate: int,
        compression: str = "convolution",
        reconstruction: str = "attention",
    ) -> None:
        super().__init__(config, memory_length)
        check_not_negative(compressed_length=compressed_length)
        check_positive(rate=rate)
        if compression not in COMPRESSIONS:
            raise ValueError(f"compression must be one of {COMPRESSIONS}, got {compression!r}")
        if reconstruction not in RECONSTRUCTIONS:
            raise ValueError(f"reconstruction must be one of {RECONSTRUCTIONS}, got {reconstruction!r}")
        self.compressed_length, self.rate = compressed_length, rate
        self.compression = Compression(config.d_model, rate, compression, reconstruction == "autoencoding")

    def content_attention(
        self,
        h: Float[Tensor, "batch length d_model"],
        rows: Float[Tensor, "batch rows d_model"],
        real: Bool[Tensor, "batch rows"],
    ) -> Float[Tensor, "batch heads length d_head"]:
        """softmax(h Q (rows K)ᵀ / sqrt(d_head)) rows V with Q, K, V that get no gradient (Algorithm 2)."""
        weights = (self.query.weight, self.key.weight, self.value.weight)
        inputs = zip((h, rows, rows), weights, strict=True)
        q, k, v = (self.split_heads(F.linear(x, weight.detach())) for x, weight in inputs)
        return dense_attention(q, k, v, real)

    def reconstruction_loss(
        self,
        h: Float[Tensor, "batch length d_model"],
        old: Float[Tensor, "batch rows d_model"],
        new: Float[Tensor, "batch slots d_model"],
        real: Bool[Tensor, "batch length"],
        old_real: Bool[Tensor, "batch rows"],
        new_real: Bool[Tensor, "batch slots"],
    ) -> Float[Tensor, ""]:
        """Mean squared error of what is rebuilt: the `old` rows, or what the tokens `h` read out of them.

        `h` and `old` must be detached. The mean is over real rows (`old_real`) or real tokens (`real`).
        """
        if self.compression.decoder is not None:
            error, counted = old - self.compression.decode(new), old_real
        else:
            read = self.content_attention(h, old, old_real) - self.content_attention(h, new, new_real)
            error, counted = read.transpose(1, 2).flatten(2), real
        squares = error.square().mean(dim=-1, dtype=torch.promote_types(h.dtype, torch.float32))
        return (squares * counted).sum() / counted.sum().clamp(min=1)

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
        state: CompressiveState | None = None,
    ) -> tuple[Tensor, CompressiveState]:
        """Mix one segment, then move what is due from the memory to the compressed memory.

        `key_padding_mask` covers `x`, and may cover any earlier tokens before it: the last columns are read, since
        the state knows which of its rows are real.

        Raises:
            ValueError: a state of another batch or width, or a mask that is not bool or too short.
        """
        batch, length, d_model = x.shape
        if state is None:
            nothing, unreal = x.new_zeros(batch, 0, d_model), x.new_zeros(batch, 0, dtype=torch.bool)
            unused = x.new_zeros(batch, 0, dtype=torch.promote_types(x.dtype, torch.float32))
            state = CompressiveState(nothing, nothing, unused.new_zeros(()), unreal, unreal, unused)
        elif key_padding_mask is not None:
            key_padding_mask = key_padding_mask[..., -length:]
        shape = state.memory.shape
        if shape[0] != batch or shape[2] != d_model:
            raise ValueError(f"state.memory must be ({batch}, rows, {d_model}), got {tuple(shape)}")
        check_key_padding_mask(key_padding_mask, batch, length)
        real = x.new_ones(batch, length, dtype=torch.bool) if key_padding_mask is None else key_padding_mask

        past = torch.cat([state.compressed, state.memory], dim=1)
        all_real = torch.cat([state.compressed_real, state.memory_real, real], dim=1)
        count_usage = self.compression.kind == "most-used"
        mixed = self.mix(x, past, None if all_real.all() else all_real, return_weights=count_usage)
        y, weights = mixed if count_usage else (mixed, None)

        h = x.detach()
        memory = torch.cat([state.memory, h], dim=1)
        memory_real = torch.cat([state.memory_real, real], dim=1)
        usage = F.pad(state.usage, (0, length))
        if count_usage:
            usage = usage + weights.detach().sum(dim=(1, 2))[:, state.compressed.shape[1] :]
        # whole windows that are due: of the rows beyond memory_length, a multiple of rate
        due = max(0, memory.shape[1] - self.memory_length) // self.rate * self.rate
        compressed, compressed_real, loss = state.compressed, state.compressed_real, usage.new_zeros(())
        if due:
            old, old_real = memory[:, :due], memory_real[:, :due]
            # usage per query that could attend to the row: itself and the real tokens after it
            seen = memory_real.flip(1).cumsum(1).flip(1)[:, :due].clamp(min=1)
            new, new_real = self.compression(old, old_real, usage[:, :due] / seen)
            loss = self.reconstruction_loss(h, old, new, real, old_real, new_real)
            compressed = newest(torch.cat([compressed, new.detach()], dim=1), self.compressed_length)
            compressed_real = newest(torch.cat([compressed_real, new_real], dim=1), self.compressed_length)
        left = slice(due, None)
        return y, CompressiveState(
            memory[:, left], compressed, loss, memory_real[:, left], compressed_real, usage[:, left]
        )
