"""Post-training quantization of a whole model's weights: no data, no training, a few seconds.

Every chosen nn.Linear keeps its weight as codes and grids (`quantizers.QuantizedMatrix`) and computes

    y = x Wᵀ + b,   W = S (q - Z)

so weights cost k bits (`packing` writes them so), and activations and arithmetic stay real ("weight-only"; integer
arithmetic is `integer_only`). Tables of embeddings can be quantized too, each row when it is looked up. Everything
else, biases, norms, by default the pooler and the head, stays as it is: few numbers, and the head decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnlp_lessons.layers import block_linears, block_of_name, with_layers
from effnlp_lessons.quantization.quantizers import (
    Granularity,
    QuantizedMatrix,
    RangeRule,
    min_max,
    quantize_matrix,
)

# one number for all layers, {block: bits}, or a function of a layer's name
Bits = int | Mapping[int, int] | Callable[[str], int]


class _Quantized(nn.Module):
    """Holds a `QuantizedMatrix` as buffers `codes`, `scale`, `zero_point`: they move and load with the model."""

    codes: Int[Tensor, "rows columns"]
    scale: Float[Tensor, "row_blocks column_blocks"]
    zero_point: Int[Tensor, "row_blocks column_blocks"]

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        self.bits, self.symmetric, self.block = matrix.bits, matrix.symmetric, matrix.block
        self.register_buffer("codes", matrix.codes)
        self.register_buffer("scale", matrix.scale)
        self.register_buffer("zero_point", matrix.zero_point)

    @property
    def matrix(self) -> QuantizedMatrix:
        """Codes and grids."""
        return QuantizedMatrix(self.codes, self.scale, self.zero_point, self.bits, self.symmetric, self.block)

    @property
    def weight(self) -> Float[Tensor, "rows columns"]:
        """The real weight S (q - Z), computed anew at every access."""
        return self.matrix.dequantize()

    def extra_repr(self) -> str:
        rows, columns = self.codes.shape
        grid = "symmetric" if self.symmetric else "affine"
        return f"{rows} x {columns}, {self.bits} bits, {grid}, block {self.block[0]} x {self.block[1]}"


class QuantizedLinear(_Quantized):
    """nn.Linear whose weight (out, in) is a `QuantizedMatrix`; the bias stays real and trainable."""

    def __init__(self, matrix: QuantizedMatrix, bias: Float[Tensor, " d_out"] | None = None) -> None:
        super().__init__(matrix)
        self.out_features, self.in_features = matrix.codes.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return F.linear(x, self.weight, self.bias)


class QuantizedEmbedding(_Quantized):
    """nn.Embedding whose table is a `QuantizedMatrix`; a look-up dequantizes the rows it needs and no other."""

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__(matrix)
        self.num_embeddings, self.embedding_dim = matrix.codes.shape

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        rows, columns = self.block
        grid = torch.div(ids, rows, rounding_mode="floor")  # the row of blocks that each id lies in
        q = self.codes[ids].to(torch.int32).unflatten(-1, (-1, columns))
        return (self.scale[grid][..., None] * (q - self.zero_point[grid][..., None])).flatten(-2)


# -------------------------------------------------------------------------------------- which, and how fine


def bits_of(name: str, bits: Bits) -> int:
    """The bits for the layer `name`.

    Raises:
        ValueError: a mapping without the layer's block.
    """
    if isinstance(bits, Mapping):
        block = block_of_name(name)
        if block not in bits:
            raise ValueError(f"bits has no entry for block {block}, of layer {name!r}: it has {sorted(bits)}")
        return bits[block]
    return bits(name) if callable(bits) else bits


def _chosen(model: nn.Module, names: Iterable[str], kind: type[nn.Module]) -> dict[str, nn.Module]:
    """The modules of `names`, all of them of `kind`."""
    if isinstance(names, str):
        raise ValueError(f"names must be a collection of names, got the text {names!r}")
    modules = dict(model.named_modules())
    chosen = {}
    for name in names:
        if not isinstance(modules.get(name), kind):
            found = type(modules[name]).__name__ if name in modules else "nothing"
            raise ValueError(f"names: {name!r} must be an nn.{kind.__name__} of the model, it is {found}")
        chosen[name] = modules[name]
    if not chosen:
        raise ValueError(f"names must hold at least one nn.{kind.__name__}; the model has no such layers by default")
    return chosen


def quantize_linears(
    model: nn.Module,
    bits: Bits,
    granularity: Granularity = "row",
    symmetric: bool = True,
    ranges: RangeRule = min_max,
    names: Iterable[str] | None = None,
) -> nn.Module:
    """A copy of `model` with the weights of its linear layers quantized; `model` itself stays as it is.

    Args:
        bits: 2 to 8 for all, {block: bits}, or a function of the layer's name.
        granularity, symmetric, ranges: as in `quantize_matrix`. A range rule that knows its bits
            (`mean_squared_error(4)`) fits one number of bits only.
        names: which layers; None: those in the blocks (`block_linears`), neither pooler nor head. With
            ("head",) or (*block_linears(model), "encoder.pooler") also those.

    Raises:
        ValueError: names that are no linear layers, no layer at all, bits or granularity out of range.
    """
    chosen = _chosen(model, block_linears(model) if names is None else names, nn.Linear)
    layers = {
        name: QuantizedLinear(
            quantize_matrix(layer.weight, bits_of(name, bits), granularity, symmetric, ranges), layer.bias
        )
        for name, layer in chosen.items()
    }
    return with_layers(model, layers)


def quantize_embeddings(
    model: nn.Module,
    bits: int | Callable[[str], int] = 8,
    granularity: Granularity = "row",
    symmetric: bool = True,
    ranges: RangeRule = min_max,
    names: Iterable[str] | None = None,
) -> nn.Module:
    """A copy of `model` with its tables of embeddings quantized; "row" gives every word a grid of its own.

    Args: as in `quantize_linears`.
        names: which tables; None: all (tokens, positions, segments).

    Raises:
        ValueError: names that are no embeddings, no table at all, bits or granularity out of range.
    """
    modules = model.named_modules()
    names = [n for n, m in modules if isinstance(m, nn.Embedding)] if names is None else names
    tables = _chosen(model, names, nn.Embedding)
    layers = {
        name: QuantizedEmbedding(quantize_matrix(table.weight, bits_of(name, bits), granularity, symmetric, ranges))
        for name, table in tables.items()
    }
    return with_layers(model, layers)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear | QuantizedEmbedding]:
    """The quantized layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)}


def signal_to_noise(model: nn.Module, quantized: nn.Module) -> dict[str, float]:
    """For every quantized layer 10 log10(sum w^2 / sum (w - w_hat)^2) in dB (SQNR); infinite if nothing changed."""
    ratios = {}
    for name, layer in quantized_layers(quantized).items():
        weight = model.get_submodule(name).weight.detach().double()
        noise = (weight - layer.weight).square().sum()
        ratios[name] = (10 * torch.log10(weight.square().sum() / noise)).item()
    return ratios
