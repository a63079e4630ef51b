"""Structured pruning: whole heads, feed-forward neurons and layers go, and the matrices become smaller.

    head     its d_head rows of Wq, Wk, Wv with their biases, and its d_head columns of Wo
    neuron   its row of W1 with its bias, and its column of W2
    layer    the whole block

Without them a model gives what it gives with them at 0, and any dense kernel is faster for it: that is what scattered
zeros do not bring. The bias of a neuron must go too: where only the row of W1 is 0, GELU(b) still reaches W2. What a
smaller layer keeps is its width d_model (residual sums, norms, embeddings), and d_head, which scales the scores.

Which ones go is another question: `importance` (Michel, Levy, Neubig 2019, arXiv 1905.10650).

NOTE the paper sets gates to 0, and a layer may lose all of its heads. Here matrices are cut, and every layer keeps a
head and a neuron: one with none would add a constant, and is better removed as a layer.
NOTE a model's `config` keeps the number of heads and neurons that it was made with, since it has one for all layers and
d_head follows from it: a shrunken layer knows its own.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.layers import with_layers
from effnlp_lessons.tensor_files import read_tensors
from effnlp_lessons.training import write_atomically
from effnlp_lessons.transformer import Block, Encoder, FeedForward, SelfAttention, TransformerConfig

Chosen = Mapping[int, Iterable[int]]  # layer from 0 -> heads, or neurons, from 0
FORMAT = "effnlp shrunken model, 1"


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of a Transformer, of a classifier on one, ...

    Raises:
        ValueError: no list of blocks or several; blocks without dense attention and a feed-forward network.
    """
    found = [m.blocks for m in model.modules() if isinstance(getattr(m, "blocks", None), nn.ModuleList)]
    if len(found) != 1:
        raise ValueError(f"model must have one list of blocks, got {len(found)}")
    for layer, block in enumerate(found[0]):
        parts = [getattr(block, "token_mixer", None), getattr(block, "channel_mixer", None)]
        linears = [m for part in parts if part is not None for m in part.children()]
        if not (isinstance(parts[0], SelfAttention) and isinstance(parts[1], FeedForward)):
            raise ValueError(f"layer {layer} must have SelfAttention and FeedForward as its mixers")
        if not all(isinstance(linear, nn.Linear) for linear in linears):
            raise ValueError(f"layer {layer} must have nn.Linear layers: prune before quantizing")
    return found[0]


# ----------------------------------------------------------------------------------- removing, and zeroing


def remove_heads(model: nn.Module, heads: Chosen) -> nn.Module:
    """A copy of `model` without these heads: fewer rows in Wq, Wk, Wv, fewer columns in Wo.

    Raises:
        ValueError: a layer or head that is not there, or a layer that would be left without one.
    """
    model = copy.deepcopy(model)
    for block, kept, _ in _each(model, heads, "head"):
        mixer, channels = block.token_mixer, _channels(block, kept)
        for name in ("query", "key", "value"):
            setattr(mixer, name, _part_of(getattr(mixer, name), rows=channels))
        mixer.output, mixer.heads = _part_of(mixer.output, columns=channels), len(kept)
    return model


def remove_neurons(model: nn.Module, neurons: Chosen) -> nn.Module:
    """A copy of `model` without these feed-forward neurons: fewer rows in W1, fewer columns in W2.

    Raises:
        ValueError: a layer or neuron that is not there, or a layer that would be left without one.
    """
    model = copy.deepcopy(model)
    for block, kept, _ in _each(model, neurons, "neuron"):
        mixer, kept = block.channel_mixer, torch.tensor(kept)
        mixer.expand, mixer.contract = _part_of(mixer.expand, rows=kept), _part_of(mixer.contract, columns=kept)
    return model


def remove_layers(model: nn.Module, layers: Iterable[int]) -> nn.Module:
    """A copy of `model` without these blocks; the others follow one another. Its `config.layers` is what is left.

    Raises:
        ValueError: a layer that is not there.
    """
    model, gone = copy.deepcopy(model), set(layers)
    count = len(blocks_of(model))
    if not gone <= set(range(count)):
        raise ValueError(f"layers must be in 0 .. {count - 1}, got {sorted(gone)}")
    for module in model.modules():
        if isinstance(getattr(module, "blocks", None), nn.ModuleList):
            module.blocks = nn.ModuleList(block for i, block in enumerate(module.blocks) if i not in gone)
        if isinstance(getattr(module, "config", None), TransformerConfig):
            module.config = replace(module.config, layers=count - len(gone))
    return model


def zero_heads(model: nn.Module, heads: Chosen) -> nn.Module:
    """A copy of `model`, as large, with these heads at 0: their rows of Wq, Wk, Wv with biases, columns of Wo."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block, _, gone in _each(model, heads, "head"):
            mixer, channels = block.token_mixer, _channels(block, gone)
            for linear in (mixer.query, mixer.key, mixer.value):
                _zero_rows_(linear, channels)
            mixer.output.weight[:, channels] = 0.0
    return model


def zero_neurons(model: nn.Module, neurons: Chosen) -> nn.Module:
    """A copy of `model`, as large, with these neurons at 0: their row of W1 with its bias, their column of W2."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block, _, gone in _each(model, neurons, "neuron"):
            _zero_rows_(block.channel_mixer.expand, torch.tensor(gone, dtype=torch.long))
            block.channel_mixer.contract.weight[:, gone] = 0.0
    return model


def _each(model: nn.Module, chosen: Chosen, what: str) -> Iterator[tuple[Block, list[int], list[int]]]:
    """The named blocks, with the indices that stay and those that go."""
    blocks = blocks_of(model)
    for layer, indices in chosen.items():
        if not 0 <= layer < len(blocks):
            raise ValueError(f"layer must be in 0 .. {len(blocks) - 1}, got {layer}")
        block, gone = blocks[layer], sorted(set(indices))
        count = block.token_mixer.heads if what == "head" else block.channel_mixer.contract.in_features
        if gone and not 0 <= gone[0] <= gone[-1] < count:
            raise ValueError(f"{what}s of layer {layer} must be in 0 .. {count - 1}, got {gone}")
        if len(gone) == count:
            raise ValueError(f"layer {layer} would have no {what} left: remove the layer, or keep one")
        yield block, sorted(set(range(count)) - set(gone)), gone


def _channels(block: Block, heads: list[int]) -> Tensor:
    """The channels of some heads: head h has h d_head .. (h + 1) d_head - 1."""
    mixer = block.token_mixer
    return torch.arange(mixer.query.out_features).view(mixer.heads, -1)[heads].flatten()


def _part_of(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """A smaller layer with some rows (outputs) or some columns (inputs); its bias goes with the rows."""
    weight = linear.weight.detach()
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns].contiguous()
    part = nn.Linear(*weight.shape[::-1], bias=linear.bias is not None, device="meta")
    part.weight = nn.Parameter(weight.clone(), linear.weight.requires_grad)
    if linear.bias is not None:
        bias = linear.bias.detach() if rows is None else linear.bias.detach()[rows]
        part.bias = nn.Parameter(bias.clone(), linear.bias.requires_grad)
    return part.train(linear.training)


def _zero_rows_(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight[rows] = 0.0
    if linear.bias is not None:
        linear.bias[rows] = 0.0


# ------------------------------------------------------------------------------------------------ on file


def save_shrunken(model: Encoder | SentenceClassifier, file: Path | str) -> int:
    """Write an encoder or a classifier with layers of any size to `file` (safetensors); the size in bytes.

    Raises:
        ValueError: another kind of model.
    """
    if not isinstance(model, Encoder | SentenceClassifier):
        raise ValueError(f"model must be an Encoder or a SentenceClassifier, got {type(model).__name__}")
    blocks_of(model)
    encoder = model if isinstance(model, Encoder) else model.encoder
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    metadata = {"format": FORMAT, "config": json.dumps(asdict(encoder.config))}
    write_atomically(Path(file), lambda path: save_file(tensors, path, metadata))
    return Path(file).stat().st_size


def load_shrunken(file: Path | str) -> Encoder | SentenceClassifier:
    """The model of a file of `save_shrunken`, in evaluation mode. Its shapes say how many heads and neurons it has.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: a damaged file, or one of another kind.
    """
    metadata, tensors = read_tensors(file, FORMAT, "save_shrunken")
    config = TransformerConfig(**json.loads(metadata["config"]))
    with torch.device("meta"):  # shapes only: the numbers come from the file
        model: Encoder | SentenceClassifier = Encoder(config)
        if "head.weight" in tensors:
            model = SentenceClassifier(model, classes=len(tensors["head.weight"]))
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        model = with_layers(model, {name: nn.Linear(*tensors[f"{name}.weight"].shape[::-1]) for name in linears})
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention):
            module.heads = len(tensors[f"{name}.query.weight"]) // config.d_head
    model.load_state_dict(tensors, assign=True)
    return model.eval()
