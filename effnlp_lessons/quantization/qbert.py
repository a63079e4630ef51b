"""Q-BERT: more bits for the layers whose loss is more curved (Shen et al. 2019, arXiv 1909.05840).

1. A layer's block is all its parameters, biases and norms too. H is the Hessian of the loss with respect to them.
2. lambda_1 .. lambda_n: its top eigenvalue, by power iteration, on each of n subsets of the training set (ten of 10 %).

       Omega = |mean(lambda)| + std(lambda)        flat on average is not enough, if some sentences see a sharp valley

3. Layers in descending order of Omega: the first get more bits, the others fewer, as the size budget allows.
4. Group-wise ranges: the rows of a weight matrix (output neurons) are cut into groups of consecutive rows, each with
   a range of its own. Embeddings have bits of their own (8), for they suffer more. A range may leave out the outermost
   numbers.

The paper fine-tunes with fake-quantized weights (`qat`). Step 3 and 4 here are for a finished model, without training.

NOTE no code was released; the following is decided here. std is that of the population, division by n: the subsets are
all there are, in the paper they make up the training set. Dividing by n - 1 multiplies every std alike and could
exchange two layers that are close.
NOTE "top eigenvalue" is the one largest in absolute value, with its sign: it is what the paper's iteration finds.
NOTE 128 groups of the 768 rows of BERT-base are 6 rows each; 64 rows of a head are no multiple of 6, so some groups
straddle two heads. Groups are counted on the whole matrix; no head alignment is asked for.
NOTE the paper describes groups for Wq, Wk, Wv, Wo. `quantize_groups` cuts the feed-forward matrices alike.
NOTE the paper's sizes count all parameters of embeddings and encoder at k bits, biases and norms too, and neither the
ranges nor pooler and classifier: `papers_size`. `block_bytes` is what a layer takes on file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from effnlp_lessons.layers import block_linears
from effnlp_lessons.measure import transformer_parameters
from effnlp_lessons.quantization.hessian import Hessian, power_iteration
from effnlp_lessons.quantization.packing import packed_bytes
from effnlp_lessons.quantization.post_training import quantize_embeddings, quantize_linears
from effnlp_lessons.quantization.quantizers import Granularity, RangeRule, block_of, check_bits, min_max
from effnlp_lessons.transformer import TransformerConfig

MIB = 2**20
Batch = tuple[Tensor, Tensor, Tensor]  # token ids, key padding mask, labels

# ------------------------------------------------------------------------------------------- sensitivity


def sensitivity(eigenvalues: Float[Tensor, "*layers subsets"]) -> Float[Tensor, "*layers"]:
    """Omega = |mean(lambda)| + std(lambda) over the subsets, std of the population (Shen et al. 2019).

    Raises:
        ValueError: no subset.
    """
    if eigenvalues.ndim < 1 or eigenvalues.shape[-1] < 1:
        raise ValueError(f"eigenvalues must be (..., subsets) with a subset, got shape {tuple(eigenvalues.shape)}")
    return eigenvalues.mean(-1).abs() + eigenvalues.std(-1, correction=0)


@dataclass(frozen=True)
class Sensitivities:
    """Curvature of every layer.

    Attributes:
        eigenvalues: float64 (layers, subsets), in the unit of the loss per weight squared; largest in absolute value.
        residuals: float64 (layers, subsets), |H v - lambda v|: how far the iteration still is from an eigenvalue.
    """

    eigenvalues: Float[Tensor, "layers subsets"]
    residuals: Float[Tensor, "layers subsets"]

    @property
    def omega(self) -> Float[Tensor, " layers"]:
        """|mean| + std of every layer."""
        return sensitivity(self.eigenvalues)


def cross_entropy(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Mean cross-entropy of a classifier on one batch, in nats."""
    token_ids, key_padding_mask, labels = batch
    return F.cross_entropy(model(token_ids, key_padding_mask), labels)


def layer_sensitivities(
    model: nn.Module,
    subsets: Sequence[Sequence[Batch]],
    *,
    iterations: int = 10,
    seed: int = 0,
    blocks: Sequence[nn.Module] | None = None,
    loss: Callable[[nn.Module, Any], Float[Tensor, ""]] = cross_entropy,
) -> Sensitivities:
    """Top eigenvalue of every layer's Hessian on every subset, by power iteration.

    The loss of a subset is the mean over its sentences, whatever batches they come in. Every layer costs, for each
    subset, one forward pass and `iterations` backward passes through the graph of its gradient, which is kept
    meanwhile: about ten times the memory of a training step's activations.

    Args:
        subsets: each some batches (token_ids, key_padding_mask, labels).
        seed: of the first directions.
        blocks: the layers; None: `model.encoder.blocks`.
        loss: mean loss of the model on one batch.

    Raises:
        ValueError: a model in training mode (dropout would give every pass another Hessian), no subset or an empty one.
        RuntimeError: attention without a second derivative (see `hessian`).
    """
    if any(module.training for module in model.modules()):
        raise ValueError("model must be in evaluation mode, dropout off: call model.eval()")
    if not subsets or not all(subsets):
        raise ValueError("subsets must hold at least one subset, each with at least one batch")
    blocks = model.encoder.blocks if blocks is None else blocks
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(2, len(blocks), len(subsets), dtype=torch.float64)
    for layer, block in enumerate(blocks):
        with _only(model, block) as parameters:
            for number, batches in enumerate(subsets):
                sizes = [len(batch[0]) for batch in batches]
                means = [loss(model, batch) * size for batch, size in zip(batches, sizes, strict=True)]
                hessian = Hessian(torch.stack(means).sum() / sum(sizes), parameters)
                pair = power_iteration(
                    hessian, hessian.size, iterations=iterations, tolerance=0, generator=generator,
                    dtype=parameters[0].dtype,
                )  # fmt: skip
                found[:, layer, number] = torch.cat([pair.values, pair.residuals])
    return Sensitivities(*found)


@contextmanager
def _only(model: nn.Module, block: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters of `block`, the only ones of `model` that need gradients in this block of code."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        block.requires_grad_(True)
        yield list(block.parameters())
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)


# -------------------------------------------------------------------------------------------------- bits


def allocate_bits(
    sensitivities: Sequence[float] | Float[Tensor, " layers"],
    low: int = 2,
    high: int = 3,
    *,
    count: int | None = None,
    budget: int | None = None,
    sizes: Callable[[int], int] | Mapping[int, Sequence[int]] | None = None,
) -> list[int]:
    """Bits of every layer: `high` for the most sensitive, `low` for the others.

    Either `count` layers get `high`, or as many as the byte `budget` allows, in descending order of sensitivity and
    ending at the first that does not fit: no layer has more bits than a more sensitive one. Of equal layers the
    earlier comes first.

    Args:
        sizes: with `budget`: bytes of a layer at k bits, as a function of k, or {k: bytes of every layer}.

    Raises:
        ValueError: not exactly one of count and budget, bits out of order, a count that is not 0 .. layers, a budget
            that is too small for `low` everywhere, sensitivities that are not finite.
    """
    check_bits(low), check_bits(high)
    omega = torch.as_tensor(sensitivities, dtype=torch.float64)
    if omega.ndim != 1 or not torch.isfinite(omega).all():
        raise ValueError(f"sensitivities must be one finite number a layer, got {sensitivities!r}")
    if low > high:
        raise ValueError(f"low must be at most high, got {low} and {high}")
    if (count is None) == (budget is None):
        raise ValueError("give either count or budget")
    layers = len(omega)
    order = torch.argsort(omega, descending=True, stable=True).tolist()
    if count is not None:
        if not 0 <= count <= layers:
            raise ValueError(f"count must be in 0 .. {layers}, got {count}")
    else:
        if sizes is None:
            raise ValueError("a budget needs sizes: the bytes of a layer at low and at high")
        small, large = ([sizes(k)] * layers if callable(sizes) else list(sizes[k]) for k in (low, high))
        left = budget - sum(small)
        if left < 0:
            raise ValueError(f"budget of {budget} bytes is too small: {low} bits everywhere take {sum(small)}")
        count = 0
        for layer in order:
            left -= large[layer] - small[layer]
            if left < 0:
                break
            count += 1
    chosen = set(order[:count])
    return [high if layer in chosen else low for layer in range(layers)]


# ------------------------------------------------------------------------------------------------ groups


def row_groups(shape: tuple[int, int], groups: int) -> tuple[int, int]:
    """The block (rows, columns) of a weight (out, in) cut into `groups` groups of consecutive rows.

    Raises:
        ValueError: a number of groups that does not divide the rows.
    """
    rows, columns = shape
    if groups < 1 or rows % groups:
        raise ValueError(f"groups must divide the {rows} rows of the matrix, got {groups}")
    return rows // groups, columns


def quantize_groups(
    model: nn.Module,
    bits: int | Mapping[int, int] | Callable[[str], int],
    groups: int = 128,
    *,
    embedding_bits: int | None = 8,
    ranges: RangeRule = min_max,
) -> nn.Module:
    """A copy of `model` with Q-BERT's grids: affine, one range for each group of rows, embeddings with their own bits.

    Pooler and head stay as they are.

    Args:
        bits: for all layers, {layer from 0: bits}, or a function of the linear layer's name.
        groups: in every weight matrix of the layers. 1 is one range a matrix; heads is a head each (12).
        embedding_bits: of all tables, one range a table as for groups=1; None leaves them as they are.
        ranges: how far a range reaches, for the layers; `ranges.percentile` leaves the outermost numbers out.

    Raises:
        ValueError: groups that do not divide the rows, bits out of range.
    """
    modules = dict(model.named_modules())
    by_block: dict[tuple[int, int], list[str]] = {}
    for name in block_linears(model):
        by_block.setdefault(row_groups(tuple(modules[name].weight.shape), groups), []).append(name)
    for block, names in by_block.items():  # one for each shape of matrix
        model = quantize_linears(model, bits, block, symmetric=False, ranges=ranges, names=names)
    if embedding_bits is None:
        return model
    return quantize_embeddings(model, embedding_bits, "tensor", symmetric=False)


# ------------------------------------------------------------------------------------------------- sizes


def papers_size(config: TransformerConfig, bits: float | Sequence[int], embedding_bits: int) -> dict[str, float]:
    """Size in MiB as the paper counts it: {"encoder", "embeddings", "total"}.

    Every parameter at its bits, biases and norms too; no ranges, no pooler, no classifier. BERT-base at 32 bits: 324.5
    and 90.9. Several bits are one for each layer (their mean counts, as all layers are of one size).

    Raises:
        ValueError: bits of another number of layers, bits that are not positive.
    """
    mixed = [bits] * config.layers if isinstance(bits, int | float) else list(bits)
    if len(mixed) != config.layers or min((*mixed, embedding_bits)) <= 0:
        raise ValueError(f"bits must be positive, one number or {config.layers}, got {bits!r} and {embedding_bits}")
    parts = transformer_parameters(config)
    norm = 2 * config.d_model  # weights and biases of one
    embeddings = parts["embeddings"] + norm
    layer = (parts["attention"] + parts["feed-forward"] + parts["norms"] - norm) // max(config.layers, 1)
    sizes = {"encoder": layer * sum(mixed) / 8 / MIB, "embeddings": embeddings * embedding_bits / 8 / MIB}
    return sizes | {"total": sum(sizes.values())}


def block_bytes(config: TransformerConfig, bits: int, granularity: Granularity = "row", symmetric: bool = False) -> int:
    """Bytes that one layer takes on file, as `packing.save_quantized` writes it, without names and header.

    Weights: k bits a code, a float32 scale for each block and, if affine, k bits for its zero point; each is packed
    into whole bytes. Biases and norms: float32.

    Raises:
        ValueError: bits out of range, a granularity that does not divide the matrices.
    """
    check_bits(bits)
    d, d_ff = config.d_model, config.d_ff
    shapes = [(d, d)] * 4 + [(d_ff, d), (d, d_ff)]
    total = 4 * (sum(rows for rows, _ in shapes) + 2 * 2 * d)  # biases, two norms
    for rows, columns in shapes:
        block = block_of((rows, columns), granularity)
        blocks = rows // block[0] * (columns // block[1])
        total += packed_bytes(rows * columns, bits) + 4 * blocks
        total += 0 if symmetric else packed_bytes(blocks, bits)
    return total
