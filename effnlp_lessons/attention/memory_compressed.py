"""Memory-compressed attention, T-DMCA: keys and values are shortened in time (Liu et al. 2018, arXiv 1801.10198).

After the projections every `factor` keys become one, by a convolution whose kernel is as long as its stride, so no
token enters twice; the values likewise; the queries stay (sec. 4.2). Compressed slot m = 1, 2, ... covers positions
(m - 1) factor .. m factor - 1. Slot 0 is a key that always can be seen, so that the first queries have one. What is
saved is a constant: n (n / factor + 1) pairs of a query and a key are still quadratic in n.
The paper's decoder alternates it with local attention in blocks of 256 (`t_dmca`). Notebook 10 uses it.

NOTE a query never sees the tokens of its own unfinished block, not even the earlier ones: they have no slot yet. In
`t_dmca` the local layers show them. `visible="strict"` is the released code (tensor2tensor): slot m is seen by query i
if m factor <= i, so the last query of a block does not see it either. `visible="last"` shows it: m factor - 1 <= i.
NOTE the released code compresses x and then projects, and puts x_0 before it. Here, as in the paper, keys and values
are projected first, each has a convolution of its own, and slot 0 is x_0 projected: `null="learned"` gives a slot
that is learned instead. `reduction="mean"` and `"max"` replace the convolution by pooling without parameters.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnlp_lessons.attention.blocks import attend, check_positive, pad_to_multiple, real_tokens, without_padding
from effnlp_lessons.attention.local import local_attention
from effnlp_lessons.dense_attention import check_key_padding_mask
from effnlp_lessons.transformer import MixerFactory, SelfAttention, TransformerConfig

VISIBLE, NULL, REDUCTIONS = ("strict", "last"), ("x0", "learned"), ("convolution", "mean", "max")


def _check_choice(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {given!r}")


def visible_slots(
    length: int, factor: int, visible: str = "strict", causal: bool = True
) -> Bool[Tensor, "length slots"]:
    """True where query i may see slot m, of 1 + ceil(length / factor) slots; slot 0 is seen by all.

    Causal: m factor <= i ("strict") or m factor - 1 <= i ("last"). Not causal: every slot, whatever `visible` says.

    Raises:
        ValueError: a length or factor below 1, another word for `visible`.
    """
    check_positive(length=length, factor=factor)
    _check_choice("visible", visible, VISIBLE)
    i, m = torch.arange(length)[:, None], torch.arange(1 + -(-length // factor))
    if not causal:
        return torch.ones(length, len(m), dtype=torch.bool)
    own_block = int(visible == "last")  # is seen by its last query
    return (m == 0) | (m * factor - own_block <= i)


def compress(
    x: Float[Tensor, "batch length d_model"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    factor: int,
    reduction: str = "convolution",
    kernel: Float[Tensor, "d_out d_model factor"] | None = None,
) -> Float[Tensor, "batch slots d_out"]:
    """Every `factor` vectors become one: (batch, ceil(length / factor), d_out).

    Padding enters as zeros (convolution) or not at all (mean and max of the real tokens), and so does what an
    unfinished last block lacks. A block without a real token gives zeros.

    Args:
        kernel: out_c = sum over t, d of kernel[c, d, t] x[t, d]; needed for "convolution", refused otherwise.

    Raises:
        ValueError: a factor below 1, another reduction, a kernel that is missing or of another shape, a wrong mask.
    """
    check_positive(factor=factor)
    _check_choice("reduction", reduction, REDUCTIONS)
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, length, d_model), got {tuple(x.shape)}")
    check_key_padding_mask(key_padding_mask, *x.shape[:2])
    real = real_tokens(key_padding_mask, x.shape[1], x.device)[..., None]
    x, real = (pad_to_multiple(part, factor, dim=1).unflatten(1, (-1, factor)) for part in (x, real))
    if reduction == "convolution":
        if kernel is None or kernel.ndim != 3 or tuple(kernel.shape[1:]) != (x.shape[-1], factor):
            got = None if kernel is None else tuple(kernel.shape)
            raise ValueError(f"kernel must be (d_out, {x.shape[-1]}, {factor}) for a convolution, got {got}")
        # kernel = stride: a matrix product with every block, written as one vector
        return F.linear(x.masked_fill(~real, 0.0).flatten(2), kernel.transpose(1, 2).flatten(1))
    if kernel is not None:
        raise ValueError(f"kernel must be None for reduction {reduction!r}")
    if reduction == "mean":
        return x.masked_fill(~real, 0.0).sum(2) / real.sum(2).clamp(min=1)
    largest = x.masked_fill(~real, -torch.inf).amax(2)
    return largest.masked_fill(~real.any(2), 0.0)


def slot_attention(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads slots d_head"],
    v: Float[Tensor, "batch heads slots d_head"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    factor: int,
    visible: str = "strict",
    causal: bool = True,
) -> Float[Tensor, "batch heads length d_head"]:
    """Attention of n queries to 1 + ceil(n / factor) keys that stand in slots: softmax(q kᵀ / sqrt(d_head)) v.

    Strictly causal (`visible_slots`) as long as slot m is made of its own tokens. Slot 0 is seen by every query, a
    slot without a real token by none.

    Returns:
        Zeros for padded queries.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool (batch, length), another `visible`.
    """
    if not (q.ndim == k.ndim == v.ndim == 4) or 0 in q.shape:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"q, k, v must be (batch, heads, length or slots, d_head), none of them 0, got {shapes}")
    batch, heads, length, d_head = q.shape
    mask = visible_slots(length, factor, visible, causal).to(q.device)
    if tuple(k.shape) != (batch, heads, mask.shape[1], d_head) or k.shape[:3] != v.shape[:3]:
        wanted = f"k and v must hold {mask.shape[1]} slots for {length} queries and factor {factor}"
        raise ValueError(f"{wanted}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    check_key_padding_mask(key_padding_mask, batch, length)
    if key_padding_mask is not None:
        blocks = pad_to_multiple(key_padding_mask, factor, dim=1).unflatten(1, (-1, factor)).any(2)
        mask = mask & F.pad(blocks, (1, 0), value=True)[:, None, :]  # slot 0 is no block
    mask = mask.expand(batch, length, -1)[:, None, None] if mask.ndim == 3 else mask[None, None, None]
    mixed = attend(*(part.unsqueeze(2) for part in (q, k, v)), mask).squeeze(2)
    return without_padding(mixed, key_padding_mask)


class MemoryCompressedAttention(nn.Module):
    """Attention to compressed keys and values: a token mixer (sec. 4.2), strictly causal unless `causal=False`.

    Convolutions have no bias, and their weights are drawn from `seed`: normal(0, 1 / (factor d_model)).
    Padded positions give zeros before the output projection. With padding at the left, x_0 is the first real token.

    Args:
        factor: keys that become one.
        visible: "strict" or "last", what a query sees of the block that it ends (`visible_slots`).
        null: what stands in slot 0, "x0" or "learned" (a key and a value for every head, zeros at first).
        reduction: "convolution" of all channels, or "mean" or "max" of each.

    Raises:
        ValueError: a factor below 1, another word for `visible`, `null` or `reduction`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        factor: int = 3,
        visible: str = "strict",
        null: str = "x0",
        causal: bool = True,
        reduction: str = "convolution",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(factor=factor)
        _check_choice("visible", visible, VISIBLE)
        _check_choice("null", null, NULL)
        _check_choice("reduction", reduction, REDUCTIONS)
        self.heads, self.factor, self.visible, self.causal = config.heads, factor, visible, causal
        self.null, self.reduction = null, reduction
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)
        self.key_kernel = self.value_kernel = self.null_key = self.null_value = None
        if reduction == "convolution":
            generator, shape = torch.Generator().manual_seed(seed), (config.d_model, config.d_model, factor)
            size = (factor * config.d_model) ** -0.5
            self.key_kernel = nn.Parameter(size * torch.randn(shape, generator=generator))
            self.value_kernel = nn.Parameter(size * torch.randn(shape, generator=generator))
        if null == "learned":
            self.null_key = nn.Parameter(torch.zeros(config.d_model))
            self.null_value = nn.Parameter(torch.zeros(config.d_model))

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
        state: None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], None]:
        """Mix the tokens.

        Raises:
            ValueError: a mask of another shape or dtype, a length of 0; a state, for this mixer keeps none.
        """
        if state is not None:
            raise ValueError("state must be None: this mixer keeps none")
        check_key_padding_mask(key_padding_mask, *x.shape[:2])
        if x.shape[1] == 0:
            raise ValueError("x must hold at least one token, got length 0")
        k = self._slots(self.key(x), self.key_kernel, self.null_key, key_padding_mask)
        v = self._slots(self.value(x), self.value_kernel, self.null_value, key_padding_mask)
        mixed = slot_attention(
            *(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query(x), k, v)),
            key_padding_mask,
            factor=self.factor,
            visible=self.visible,
            causal=self.causal,
        )
        return self.output(mixed.transpose(1, 2).flatten(2)), None

    def _slots(self, x: Tensor, kernel: Tensor | None, null: Tensor | None, real: Tensor | None) -> Tensor:
        """Slot 0 and the compressed keys or values: (batch, 1 + ceil(length / factor), d_model)."""
        slots = compress(x, real, factor=self.factor, reduction=self.reduction, kernel=kernel)
        if null is None:
            # argmax of a mask is its first True
            first = torch.zeros(len(x), dtype=torch.long, device=x.device) if real is None else real.int().argmax(1)
            null = x[torch.arange(len(x), device=x.device), first][:, None]
        return torch.cat([null.expand(len(x), 1, -1), slots], dim=1)


def t_dmca(block: int = 256, factor: int = 3, visible: str = "strict", seed: int = 0) -> MixerFactory:
    """The paper's order of layers L M L M L for `Decoder(config, token_mixer=...)`, L first (sec. 4.2).

    L is dense causal attention inside blocks of `block` tokens, M is memory-compressed attention. Layer l draws its
    convolutions from seed + l.

    Raises:
        ValueError: a block or factor below 1, another word for `visible`.
    """
    check_positive(block=block, factor=factor)
    _check_choice("visible", visible, VISIBLE)
    local = partial(local_attention, block=block, flange=0, causal=True)

    def mixer(config: TransformerConfig, layer: int) -> nn.Module:
        if layer % 2 == 0:
            return SelfAttention(config, causal=True, attention=local)
        return MemoryCompressedAttention(config, factor, visible, seed=seed + layer)

    return mixer
