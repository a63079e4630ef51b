"""Layers of a model by name: which ones lie in its blocks, and a copy with others in their places.

Quantization and pruning both work on chosen linear layers. The name of a layer is its dotted path:
"encoder.blocks.3.token_mixer.query" belongs to block 3.
"""

from __future__ import annotations

import copy
import re

from torch import nn


def block_of_name(name: str) -> int | None:
    """The index of the block that a layer belongs to: 3 for "encoder.blocks.3.channel_mixer.expand", else None."""
    found = re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
    return None if found is None else int(found[1])


def block_linears(model: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers in the blocks of a Transformer: 6 a block, 36 in MiniLM-L6; no pooler, no head."""
    modules = model.named_modules()
    return tuple(n for n, module in modules if isinstance(module, nn.Linear) and block_of_name(n) is not None)


def with_layers(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    """A copy of `model` with `layers` in the places of their names, each in the mode of what it replaces."""
    places = {id(model.get_submodule(name)): layers[name].train(model.get_submodule(name).training) for name in layers}
    return copy.deepcopy(model, places)  # where it meets a replaced module, deepcopy takes the new one for its copy
