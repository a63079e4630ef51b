"""Movement pruning of whole blocks: what goes can be cut out of the model (Lagunas, Charlaix, Sanh, Rush 2021).

Single zeros save no time in a dense product. So a score belongs to a block of weights (arXiv 2109.04838), and the mask
of the weights is that of the blocks, each bit repeated over its block:

    a = (W ⊙ M) x,   M = repeat(M'),   M' = Top_v(S) or [sigmoid(S) > tau],   dL/dS_b = sum over block b of (dL/dW') W

"Hybrid": square blocks of 32 x 32 in the four attention matrices; in the feed-forward part a whole row of the first
matrix and a whole column of the second, that is a neuron's incoming and outgoing weights. A neuron without the one or
the other does nothing, nor does a head without its value rows or its output columns: `removable` finds them.

NOTE a row without any block gives 0: its bias is masked with it. Were it not, GELU(bias) would flow on through the
second matrix. The bias takes no part in the score's gradient.
NOTE gradients of a block are sums of 1,024 products, those of a row of 384. Adam divides by their size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnlp_lessons.layers import block_linears, with_layers
from effnlp_lessons.pruning.masks import block_sums, spread_blocks
from effnlp_lessons.pruning.movement import MovementLinear, above, masked_weight, movement_layers, top_share


class BlockMovementLinear(MovementLinear):
    """A `MovementLinear` with one score a block of `block` = (rows, columns): `score` (row_blocks, column_blocks).

    Raises:
        ValueError: blocks that do not tile the weight, a mode other than hard or soft.
    """

    def __init__(self, linear: nn.Linear, block: tuple[int, int], mode: str = "soft") -> None:
        if mode not in ("hard", "soft"):
            raise ValueError(f"mode must be 'hard' or 'soft', got {mode!r}")
        super().__init__(linear, mode)
        self.block = block
        self.score = nn.Parameter(torch.zeros_like(block_sums(self.weight.detach(), block)))

    def block_mask(self) -> Bool[Tensor, "row_blocks column_blocks"]:
        """M' of the present scores and level; ties are decided by the sum of |W| over the block."""
        size = block_sums(self.weight.detach().abs(), self.block)
        return (above if self.mode == "soft" else top_share)(self.score, self.level.item(), size)

    def mask(self) -> Bool[Tensor, "d_out d_in"]:
        return spread_blocks(self.block_mask(), self.block)

    def masked(self) -> tuple[Float[Tensor, "d_out d_in"], Tensor | None]:
        rows, columns = self.block
        # autograd of repeat_interleave sums over the block
        score = self.score.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        mask = self.mask()
        bias = None if self.bias is None else self.bias * mask.any(1)
        return masked_weight(self.weight, score, mask), bias


def hybrid_blocks(model: nn.Module, attention: tuple[int, int] = (32, 32)) -> dict[str, tuple[int, int]]:
    """The blocks of the paper's hybrid for every linear layer in the blocks of a Transformer, by name of the layer.

    `attention` for query, key, value and output, rows for the feed-forward layer that expands, columns for the other.

    Raises:
        ValueError: a model without blocks, or a layer of another name in them.
    """
    blocks = {}
    for name in block_linears(model):
        layer, kind = model.get_submodule(name), name.rsplit(".", 1)[-1]
        shapes = dict.fromkeys(("query", "key", "value", "output"), attention)
        shapes |= {"expand": (1, layer.in_features), "contract": (layer.out_features, 1)}
        if kind not in shapes:
            raise ValueError(f"model must have the layers {', '.join(shapes)} in its blocks, got {name!r}")
        blocks[name] = shapes[kind]
    if not blocks:
        raise ValueError("model must have linear layers in blocks")
    return blocks


def prepare_blocks(model: nn.Module, blocks: Mapping[str, tuple[int, int]], mode: str = "soft") -> nn.Module:
    """A copy of `model` with a `BlockMovementLinear` for each layer that `blocks` names, for `movement.train_movement`.

    `movement.movement_masks` and `movement.to_dense` take it as they take single weights; the biases of empty rows are
    zeros in what `to_dense` gives.

    Raises:
        ValueError: a name that is no linear layer, blocks that do not tile its weight, a mode other than hard or soft.
    """
    parts = dict(model.named_modules())
    for name in blocks:
        if not isinstance(parts.get(name), nn.Linear):
            raise ValueError(f"blocks: {name!r} is no nn.Linear of the model")
    return with_layers(model, {name: BlockMovementLinear(parts[name], block, mode) for name, block in blocks.items()})


def removable(model: nn.Module) -> dict[str, dict[str, Bool[Tensor, " units"]]]:
    """What can be cut out of every block without changing an output: {"encoder.blocks.0": {"heads", "neurons"}}.

    "heads" (heads,): the value rows or the output columns of the head are all masked. "neurons" (d_ff,): the row of
    `expand` or the column of `contract` is.

    Raises:
        ValueError: a model that does not come from `prepare_blocks`, or in which a value or expand layer is missing.
    """
    layers, found = movement_layers(model), {}
    for name in layers:
        block, _, kind = name.rpartition(".channel_mixer.")
        if kind != "expand":
            continue
        kinds = ("token_mixer.value", "token_mixer.output", "channel_mixer.expand", "channel_mixer.contract")
        needed = [layers.get(f"{block}.{kind}") for kind in kinds]
        if not all(isinstance(layer, BlockMovementLinear) for layer in needed):
            raise ValueError(f"model must have a BlockMovementLinear for each of {', '.join(kinds)} in {block}")
        value, output, expand, contract = (layer.mask() for layer in needed)
        heads = model.get_submodule(f"{block}.token_mixer").heads
        found[block] = {
            "heads": ~(value.any(1).unflatten(0, (heads, -1)).any(1) & output.any(0).unflatten(0, (heads, -1)).any(1)),
            "neurons": ~(expand.any(1) & contract.any(0)),
        }
    if not found:
        raise ValueError("model must have feed-forward layers among those of prepare_blocks")
    return found
