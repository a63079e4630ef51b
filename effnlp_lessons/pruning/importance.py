"""Which heads, neurons and layers matter: the gradient of a gate (Michel, Levy, Neubig 2019, arXiv 1905.10650).

Every head gets a gate xi, which is 1. How much the loss of one sentence would change if the gate were turned is the
head's importance, by the size and not by the sign, on average over sentences:

    head     xi_h Att_h(x)                 I_h = E_x |dL(x) / dxi_h| = E_x |sum_t Att_h(x)_t . dL/dAtt_h(x)_t|
    neuron   xi_i a_i                      the same, one gate for all tokens of a sentence
    layer    x + xi_l (block(x) - x)       the same; at 0 the layer is the identity

The heads of a layer are then divided by their norm, for layers differ in the size of their gradients. For neurons the
sum of a dL/da is the first-order Taylor term of Molchanov et al. (2016, arXiv 1611.06440). The gate of a layer is ours.

NOTE the released code sums |Att_h . dL/dAtt_h| token by token; a gate sums over the tokens first, as in the equation.
NOTE it is the slope at 1, and removing goes all the way to 0. Two heads that do the same are each unimportant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from effnlp_lessons.pruning.structured import blocks_of, remove_heads, remove_neurons
from effnlp_lessons.transformer import Block


@dataclass(frozen=True)
class Importance:
    """E |dL/dxi| of every gate, in nats, float64; a layer has as many heads and neurons as it has now."""

    heads: tuple[Float[Tensor, " heads"], ...]
    neurons: tuple[Float[Tensor, " neurons"], ...]
    layers: Float[Tensor, " layers"]

    @property
    def normalised_heads(self) -> tuple[Tensor, ...]:
        """Divided by their norm in each layer: comparable between layers."""
        return tuple(normalised(values) for values in self.heads)

    @property
    def normalised_neurons(self) -> tuple[Tensor, ...]:
        """The same for neurons."""
        return tuple(normalised(values) for values in self.neurons)


def normalised(values: Float[Tensor, " gates"]) -> Float[Tensor, " gates"]:
    """values / ||values||; zeros stay zeros."""
    norm = values.norm()
    return values / norm if norm > 0 else values


def sentence_losses(model: nn.Module, batch: Any) -> Float[Tensor, " batch"]:
    """The cross-entropy of every sentence of a batch (*inputs, labels), in nats."""
    *inputs, labels = batch
    return F.cross_entropy(model(*inputs), labels, reduction="none")


def importance(
    model: nn.Module,
    batches: Iterable[Any],
    losses: Callable[[nn.Module, Any], Float[Tensor, " batch"]] = sentence_losses,
) -> Importance:
    """E |dL/dxi| of all heads, neurons and layers over the sentences of some batches, in one pass.

    One forward and one backward pass a batch, without gradients of the weights. Every sentence has gates of its own,
    so that signs do not cancel between sentences. The model is left as it was.

    Args:
        losses: `losses(model, batch)`, one for each sentence; a batch begins with token_ids (batch, length).

    Raises:
        ValueError: a model in training mode or without blocks, no sentence, losses of another shape.
    """
    blocks = blocks_of(model)
    if not len(blocks):
        raise ValueError("model must have at least one block")
    if any(module.training for module in model.modules()):
        raise ValueError("model must be in evaluation mode, dropout off: call model.eval()")
    totals: list[Tensor] = []
    sentences = 0
    for batch in batches:
        size = len(batch[0])
        with _gates(blocks, size) as gates, torch.enable_grad():
            values = losses(model, batch)
            if values.shape != (size,):
                raise ValueError(f"losses must be one a sentence, ({size},), got {tuple(values.shape)}")
            gradients = torch.autograd.grad(values.sum(), gates)
        sums = [gradient.abs().sum(0, dtype=torch.float64) for gradient in gradients]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
        sentences += size
    if not sentences:
        raise ValueError("batches must hold at least one sentence")
    means = [total / sentences for total in totals]
    n = len(blocks)
    return Importance(tuple(means[:n]), tuple(means[n : 2 * n]), torch.stack(means[2 * n :]))


@contextmanager
def _gates(blocks: Sequence[Block], batch: int) -> Iterator[list[Tensor]]:
    """Gates of 1 in the model: of the heads, a layer (batch, heads), of the neurons, of the layers (batch)."""

    def gate(*shape: int) -> Tensor:
        weight = blocks[0].token_mixer.output.weight
        return torch.ones(batch, *shape, dtype=weight.dtype, device=weight.device, requires_grad=True)

    def turn_channels(gates: Tensor) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            (x,) = inputs  # (batch, length, channels): those of a head stand side by side
            return (x * gates.repeat_interleave(x.shape[-1] // gates.shape[-1], -1)[:, None],)

        return hook

    def turn_layer(gates: Tensor) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: tuple) -> tuple:
            x, (y, *rest) = inputs[0], output
            return (y + (gates - 1)[:, None, None] * (y - x), *rest)  # at a gate of 1 exactly y

        return hook

    heads = [gate(block.token_mixer.heads) for block in blocks]
    neurons = [gate(block.channel_mixer.contract.in_features) for block in blocks]
    layers = [gate() for _ in blocks]
    handles = []
    try:
        for block, h, n, layer in zip(blocks, heads, neurons, layers, strict=True):
            handles += [
                block.token_mixer.output.register_forward_pre_hook(turn_channels(h)),
                block.channel_mixer.contract.register_forward_pre_hook(turn_channels(n)),
                block.register_forward_hook(turn_layer(layer)),
            ]
        yield heads + neurons + layers
    finally:
        for handle in handles:
            handle.remove()


def least_important(scores: Sequence[Float[Tensor, " gates"]], count: int | Sequence[int]) -> dict[int, list[int]]:
    """{layer: the indices of the lowest scores}, of equal ones the first.

    Args:
        count: how many in each layer (a list), or in all layers together (a number): then scores are compared between
            layers, which is what `normalised_heads` is for, and the best of each layer is no candidate.

    Raises:
        ValueError: a count that leaves a layer with none.
    """
    if isinstance(count, int):
        ranked = [values.argsort(stable=True)[:-1] for values in scores]
        pairs = [(values[i].item(), layer, i.item()) for layer, values in enumerate(scores) for i in ranked[layer]]
        if not 0 <= count <= len(pairs):
            raise ValueError(f"count must be in 0 .. {len(pairs)}, so that every layer keeps one, got {count}")
        chosen: dict[int, list[int]] = {layer: [] for layer in range(len(scores))}
        for _, layer, i in sorted(pairs)[:count]:
            chosen[layer].append(i)
        return {layer: sorted(indices) for layer, indices in chosen.items()}
    if len(count) != len(scores) or not all(0 <= n < len(v) for n, v in zip(count, scores, strict=False)):
        raise ValueError(f"count must be one for each of {len(scores)} layers and leave each at least one, got {count}")
    return {
        layer: values.argsort(stable=True)[:n].sort().values.tolist()
        for layer, (values, n) in enumerate(zip(scores, count, strict=True))
    }


def shrink(model: nn.Module, found: Importance, heads: int | Sequence[int], neurons: int | Sequence[int]) -> nn.Module:
    """A copy of `model` with the most important heads and neurons: so many a layer, one number or one for each.

    Raises:
        ValueError: numbers that are not in 1 .. those of the layer.
    """
    gone = []
    for name, scores, left in (("heads", found.heads, heads), ("neurons", found.neurons, neurons)):
        left = [left] * len(scores) if isinstance(left, int) else list(left)
        if len(left) != len(scores) or not all(1 <= n <= len(v) for n, v in zip(left, scores, strict=False)):
            raise ValueError(f"{name} must be in 1 .. {len(scores[0])} for each of {len(scores)} layers, got {left}")
        gone.append(least_important(scores, [len(v) - n for v, n in zip(scores, left, strict=True)]))
    return remove_neurons(remove_heads(model, gone[0]), gone[1])
