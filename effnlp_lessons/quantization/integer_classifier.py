"""The course's sentence classifier on integers alone, from token ids to logits (I-BERT: Kim et al. 2021, 2101.01321).

    x        int32, "fine": 256 codes for one code of the int8 grid that the linear layers read
    q, k, v  int8 = linear(int8(x))                       products and sums int8 x int8 -> int32 (`integer_only`)
    x       <- norm(x + rescale(linear(int8(softmax(q k') v))))
    x       <- norm(x + rescale(linear(int8(GELU(rescale(linear(int8(x))))))))

Weights, embeddings and whatever enters a product are int8. Softmax, GELU and norm (`ibert`) read int32, and so do the
residual sums: their small parts would be rounded away beside the large ones. All scales are found beforehand, from the
ranges of the real model's activations on some sentences; at run time a change of scale is a multiplication by m / 2^c
(`ibert.Rescale`). The pooler's tanh is a table of 256 codes: of 8 bits any function is a table.

NOTE I-BERT keeps its products and sums on a different scale for every channel and lets GELU compute with it. Here they
are rescaled to one scale first, in 16 bits.
NOTE I-BERT has one scale for a table of embeddings. Of MiniLM's positions the first has a number ten times as large as
any other has; on one scale the table would lose a sixth. Here every row has a scale.
NOTE I-BERT is symmetric everywhere. The softmax's 0 .. 255 and the GELU's output, which is hardly negative, would lose
a bit by it: they have a zero point here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool, Float, Int, Int8, Int32
from torch import Tensor, nn

from effnlp_lessons.dense_attention import check_key_padding_mask
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.quantization.ibert import IntegerGelu, IntegerLayerNorm, IntegerSoftmax, Rescale
from effnlp_lessons.quantization.integer_only import IntegerLinear, integer_product
from effnlp_lessons.quantization.quantizers import (
    LinearQuantizer,
    RangeRule,
    affine_quantizer,
    min_max,
    quantize_matrix,
    symmetric_quantizer,
)
from effnlp_lessons.transformer import Block, Embeddings, FeedForward, SelfAttention

FINE = 256  # fine codes for one of int8
TOKENS_AT_ONCE = 256  # their int32 tensors stay in the processor's cache
Ranges = Mapping[str, tuple[float, float]]  # "module.input" or "module.output" -> lowest and highest activation


# --------------------------------------------------------------------------------------------- calibration


def activation_ranges(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], ranges: RangeRule = min_max
) -> dict[str, tuple[float, float]]:
    """The range of what enters and leaves every linear layer, and leaves every norm, over some batches.

    Args:
        model: real; put into evaluation mode.
        batches: of (token_ids, key_padding_mask, ...); padded positions do not count.
        ranges: the rule for one batch, see `ranges`; over the batches the widest range counts.

    Returns:
        `{"name.input" or "name.output": (lowest, highest)}`.

    Raises:
        ValueError: no batch.
    """
    found: dict[str, tuple[float, float]] = {}
    mask = torch.empty(0)

    def note(key: str, x: Tensor) -> None:
        values = x[mask] if x.shape[:2] == mask.shape else x
        low, high = (bound.item() for bound in ranges(values.reshape(1, -1)))
        before = found.get(key, (low, high))
        found[key] = (min(low, before[0]), max(high, before[1]))

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            note(f"{name}.output", output)
            if isinstance(module, nn.Linear):
                note(f"{name}.input", inputs[0])

        return module.register_forward_hook(hook)

    watched = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
    handles = [watch(name, module) for name, module in watched]
    try:
        with torch.no_grad():
            model.eval()
            for token_ids, mask, *_ in batches:
                model(token_ids, mask)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError("batches must hold at least one batch, got none")
    return found


def int8_grid(bounds: tuple[float, float], symmetric: bool = True) -> LinearQuantizer:
    """The int8 grid over a range, in float64: -127 .. 127 with Z = 0, or -128 .. 127 with a zero point."""
    low, high = torch.tensor(bounds, dtype=torch.float64)
    return symmetric_quantizer(torch.maximum(-low, high), 8) if symmetric else affine_quantizer(low, high, 8, True)


# ------------------------------------------------------------------------------------------------ the parts


def to_grid(scale: float | Float[Tensor, " channels"], grid: LinearQuantizer) -> Rescale:
    """From int32 codes to the int8 codes of a grid."""
    return Rescale(scale, grid.scale.item(), grid.q_min, grid.q_max, int(grid.zero_point))


def narrow(fine: Int32[Tensor, "*shape"]) -> Int8[Tensor, "*shape"]:
    """Fine codes to the int8 codes of the grid that they refine: 256 of them are one."""
    return ((fine + FINE // 2) >> 8).clamp_(-127, 127).to(torch.int8)


def integer_linear(
    linear: nn.Linear, grid: LinearQuantizer, output: LinearQuantizer | float, largest: int = 2**23
) -> nn.Sequential:
    """A linear layer that reads int8, and the change of scale: to int8 on a grid, or to int32 of a scale."""
    product = IntegerLinear.build(linear.weight, linear.bias, grid, None)
    if isinstance(output, LinearQuantizer):
        return nn.Sequential(product, to_grid(product.accumulator_scale, output))
    return nn.Sequential(product, Rescale(product.accumulator_scale, output, -largest, largest))


class IntegerEmbeddings(nn.Module):
    """Tokens, positions and segment 0: int8 tables with a scale for every row, summed on one int32 scale and normed."""

    def __init__(self, embeddings: Embeddings, output_scale: float) -> None:
        super().__init__()
        tables = {"tokens": embeddings.tokens.weight, "positions": embeddings.positions.weight}
        if embeddings.segments is not None:
            tables["segments"] = embeddings.segments.weight[:1]
        matrices = {name: quantize_matrix(table, 8, "row") for name, table in tables.items()}
        # a row's multiplier is whole, and no shift follows: the norm divides by the scale anyway
        scale = max(matrix.scale.max().item() for matrix in matrices.values()) / 2**15
        for name, matrix in matrices.items():
            self.register_buffer(name, matrix.codes)
            self.register_buffer(f"{name}_multiplier", torch.round(matrix.scale / scale).to(torch.int32))
        norm = embeddings.norm
        self.norm = IntegerLayerNorm(norm.weight, norm.bias, norm.eps, scale, output_scale)

    def forward(self, token_ids: Int[Tensor, "batch length"]) -> Int32[Tensor, "batch length d_model"]:
        length = token_ids.shape[1]
        x = self.tokens[token_ids] * self.tokens_multiplier[token_ids]
        x += self.positions[:length] * self.positions_multiplier[:length]
        if hasattr(self, "segments"):
            x += self.segments * self.segments_multiplier
        return self.norm(x)


class IntegerSelfAttention(nn.Module):
    """Multi-head self-attention: int8 to int32 of `output_scale`."""

    def __init__(self, attention: SelfAttention, grid: LinearQuantizer, output_scale: float, ranges: Ranges) -> None:
        super().__init__()
        self.heads = attention.heads
        q, k, v = (int8_grid(ranges[f"{name}.output"]) for name in ("query", "key", "value"))
        self.query = integer_linear(attention.query, grid, q)
        self.key = integer_linear(attention.key, grid, k)
        self.value = integer_linear(attention.value, grid, v)
        d_head = attention.query.out_features // self.heads
        self.softmax = IntegerSoftmax(q.scale.item() * k.scale.item() / math.sqrt(d_head))
        mixed = int8_grid(ranges["output.input"])
        self.mixed = to_grid(self.softmax.output_scale.item() * v.scale.item(), mixed)
        self.output = integer_linear(attention.output, mixed, output_scale)

    def split_heads(self, x: Int8[Tensor, "batch length d_model"]) -> Int8[Tensor, "batch heads length d_head"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, x: Int8[Tensor, "batch length d_model"], key_padding_mask: Bool[Tensor, "batch length"] | None = None
    ) -> Int32[Tensor, "batch length d_model"]:
        q, k, v = (self.split_heads(project(x)) for project in (self.query, self.key, self.value))
        allowed = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        weights = self.softmax(integer_product(q, k.transpose(-1, -2)), allowed)
        # 0 .. 255 as int8 with the zero point -128: sum w v = sum (w - 128) v + 128 sum v
        mixed = integer_product((weights - 128).to(torch.int8), v) + 128 * v.sum(-2, keepdim=True, dtype=torch.int32)
        return self.output(self.mixed(mixed.transpose(1, 2).flatten(2)))


class IntegerFeedForward(nn.Module):
    """Two linear layers with a GELU between: int8 to int32 of `output_scale`."""

    def __init__(self, mixer: FeedForward, grid: LinearQuantizer, output_scale: float, ranges: Ranges) -> None:
        super().__init__()
        fine = int8_grid(ranges["expand.output"]).scale.item() / FINE
        hidden = int8_grid(ranges["contract.input"], symmetric=False)
        self.expand = integer_linear(mixer.expand, grid, fine, largest=2**15)
        self.gelu = IntegerGelu(fine)
        self.hidden = to_grid(self.gelu.output_scale.item(), hidden)
        self.contract = integer_linear(mixer.contract, hidden, output_scale)

    def forward(self, x: Int8[Tensor, "batch length d_model"]) -> Int32[Tensor, "batch length d_model"]:
        return self.contract(self.hidden(self.gelu(self.expand(x))))


def _below(ranges: Ranges, name: str) -> dict[str, tuple[float, float]]:
    return {key.removeprefix(f"{name}."): value for key, value in ranges.items() if key.startswith(f"{name}.")}


class IntegerBlock(nn.Module):
    """One encoder layer on fine codes: attention and feed-forward, each with a residual sum and a norm (BERT).

    Args:
        block: the real layer, norms after the sums, dense attention, GELU.
        grid: the int8 grid of its input; the fine codes that `forward` reads have a 256th of its scale.
        ranges: of the block's activations, from `activation_ranges`, names below the block.

    Attributes:
        grid: of the output.
    """

    def __init__(self, block: Block, grid: LinearQuantizer, ranges: Ranges) -> None:
        super().__init__()
        mixer = block.token_mixer
        if block.norm_first or not isinstance(mixer, SelfAttention) or mixer.attention is not None or mixer.causal:
            raise ValueError("block must have its norms after the sums, and dense attention to all tokens")
        if not isinstance(block.channel_mixer, FeedForward) or block.channel_mixer.activation is not nn.functional.gelu:
            raise ValueError("block must have a feed-forward network with GELU")

        def norm(name: str, scale: float) -> tuple[IntegerLayerNorm, LinearQuantizer, float]:
            real, grid = getattr(block, name), int8_grid(ranges[f"{name}.output"])
            fine = grid.scale.item() / FINE
            return IntegerLayerNorm(real.weight, real.bias, real.eps, scale, fine), grid, fine

        fine = grid.scale.item() / FINE
        self.token_mixer = IntegerSelfAttention(mixer, grid, fine, _below(ranges, "token_mixer"))
        self.token_norm, grid, fine = norm("token_norm", fine)
        self.channel_mixer = IntegerFeedForward(block.channel_mixer, grid, fine, _below(ranges, "channel_mixer"))
        self.channel_norm, self.grid, _ = norm("channel_norm", fine)

    def forward(
        self, x: Int32[Tensor, "batch length d_model"], key_padding_mask: Bool[Tensor, "batch length"] | None = None
    ) -> Int32[Tensor, "batch length d_model"]:
        x = self.token_norm(x + self.token_mixer(narrow(x), key_padding_mask))
        return self.channel_norm(x + self.channel_mixer(narrow(x)))


# ------------------------------------------------------------------------------------------- the classifier


class IntegerClassifier(nn.Module):
    """A sentence classifier whose weights and constants are integer buffers and whose path holds no float.

    `forward` gives real logits, as the real model does: it multiplies `integer_logits` by one scale at the end.

    Args:
        model: the real classifier.
        ranges: of its activations, from `activation_ranges`.
    """

    def __init__(self, model: SentenceClassifier, ranges: Ranges) -> None:
        super().__init__()
        encoder = model.encoder
        if encoder.config.norm_first:
            raise ValueError("model must have its norms after the sums (norm_first=False)")
        self.vocab_size, self.max_length = encoder.config.vocab_size, encoder.config.max_length
        grid = int8_grid(ranges["encoder.embeddings.norm.output"])
        self.embeddings = IntegerEmbeddings(encoder.embeddings, grid.scale.item() / FINE)
        blocks = []
        for i, block in enumerate(encoder.blocks):
            blocks.append(IntegerBlock(block, grid, _below(ranges, f"encoder.blocks.{i}")))
            grid = blocks[-1].grid
        self.blocks = nn.ModuleList(blocks)
        low, high = ranges["encoder.pooler.output"]
        before, after = int8_grid((max(low, -4.0), min(high, 4.0))), int8_grid((-1.0, 1.0))  # tanh(4) = 0.9993
        self.pooler = integer_linear(encoder.pooler, grid, before)
        codes = torch.arange(-128, 128)
        self.register_buffer("tanh", after.quantize(torch.tanh(before.dequantize(codes))))
        # one scale for all classes, so that their accumulators can be compared
        self.head = IntegerLinear.build(model.head.weight, model.head.bias, after, None, granularity="tensor")
        self.register_buffer("output_scale", self.head.accumulator_scale[0].clone())

    @classmethod
    def from_float(
        cls, model: SentenceClassifier, batches: Iterable[tuple[Tensor, Tensor]], ranges: RangeRule = min_max
    ) -> IntegerClassifier:
        """Calibrate on some batches of (token_ids, key_padding_mask, ...), and build."""
        return cls(model, activation_ranges(model, batches, ranges))

    def integer_logits(
        self, token_ids: Int[Tensor, "batch length"], key_padding_mask: Bool[Tensor, "batch length"] | None = None
    ) -> Int32[Tensor, "batch classes"]:
        """int32 logits of the scale `output_scale`, from integers alone; sentences of a few hundred tokens at a time.

        Raises:
            ValueError: ids that are not integers (batch, length), too many tokens, a mask of another shape or dtype.
        """
        if token_ids.ndim != 2 or token_ids.dtype not in (torch.int64, torch.int32):
            got = f"{token_ids.dtype} {tuple(token_ids.shape)}"
            raise ValueError(f"token_ids must be integers of shape (batch, length), got {got}")
        batch, length = token_ids.shape
        if not 1 <= length <= self.max_length:
            raise ValueError(f"length must be in 1 .. {self.max_length} tokens, got {length}")
        check_key_padding_mask(key_padding_mask, batch, length)
        mask = torch.ones_like(token_ids, dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        rows = max(1, TOKENS_AT_ONCE // length)
        parts = zip(token_ids.split(rows), mask.split(rows), strict=True)
        return torch.cat([self._logits(*part) for part in parts])

    def _logits(self, token_ids: Tensor, key_padding_mask: Tensor) -> Tensor:
        x = self.embeddings(token_ids)
        for block in self.blocks:
            x = block(x, key_padding_mask)
        pooled = self.tanh[self.pooler(narrow(x[:, 0])).to(torch.int64) + 128]
        return self.head(pooled)

    def forward(
        self, token_ids: Int[Tensor, "batch length"], key_padding_mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        return (self.integer_logits(token_ids, key_padding_mask) * self.output_scale).to(torch.float32)
