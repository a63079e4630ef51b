"""What the layers of a model are given: H = 2 X Xᵀ of their inputs on some sentences, gathered by hooks.

X has a column for every real token; padding is no input. Layers that are given the same tensor (query, key, value)
share one H. A module that is run only for the inputs of one layer stops there. `layerwise_obs` stands on this.

A model is a list of calls to it, `Call`; a block of the model has calls of its own, which `calls_inside` finds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Batch = tuple[Tensor, ...]  # the arguments of a model; the second, if there is one, is True at the real tokens
Call = tuple[tuple, dict[str, Any], Tensor | None]  # arguments of a module, and which tokens are real


def inputs_hessian(inputs: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "d_in d_in"]:
    """H = 2 X Xᵀ of |w X|², the same for every row w; float64. Here a token is a row: 2 inputsᵀ inputs."""
    return 2 * (inputs.T @ inputs).double()


class _Reached(Exception):  # noqa: N818
    """Raised by a hook: what comes after this layer need not be computed."""


def _run(module: nn.Module, call: Call) -> None:
    try:
        with torch.no_grad():
            module(*call[0], **call[1])
    except _Reached:
        pass


def gather(module: nn.Module, calls: list[Call], layers: dict[str, nn.Module], only: bool = False) -> dict[str, Tensor]:
    """{name: H of the inputs of that layer}, (d_in, d_in) float64, over all calls of the module.

    Args:
        only: there is one layer, stop when it is reached.
    """
    found: dict[str, Tensor] = {}
    real: Tensor | None = None  # of the call that is running

    def hook(name: str):
        def add(_: nn.Module, args: tuple) -> None:
            x = args[0]
            x = x[real] if real is not None and x.shape[:-1] == real.shape else x.flatten(0, -2)
            found[name] = found.get(name, 0) + inputs_hessian(x)
            if only:
                raise _Reached

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for call in calls:
            real = call[2]
            _run(module, call)
    finally:
        for handle in handles:
            handle.remove()
    return found


def input_groups(module: nn.Module, call: Call, layers: dict[str, nn.Module]) -> list[list[str]]:
    """Names of layers in the order in which they are called; those that are given the same tensor together.

    Raises:
        ValueError: a layer that is not called, or more than once.
    """
    seen: list[tuple[str, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0])))
        for name, layer in layers.items()
    ]
    try:
        _run(module, call)
    finally:
        for handle in handles:
            handle.remove()
    called = [name for name, _ in seen]
    if sorted(called) != sorted(layers):
        wrong = sorted(name for name in layers if called.count(name) != 1)
        raise ValueError(f"every layer must be called once, not so: {', '.join(wrong)}")
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in seen:
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))
    return [names for _, names in groups]


def calls_inside(model: nn.Module, calls: list[Call], inner: nn.Module) -> list[Call]:
    """The calls of a module inside the model, for calls of the model."""
    found: list[tuple[tuple, dict[str, Any]]] = []

    def keep(_: nn.Module, args: tuple, named: dict[str, Any]) -> None:
        found.append((args, named))
        raise _Reached

    handle = inner.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for call in calls:
            _run(model, call)
    finally:
        handle.remove()
    return [(*arguments, real) for arguments, (_, _, real) in zip(found, calls, strict=True)]


def calls_of(batches: Sequence[Batch]) -> list[Call]:
    """Batches as calls of a model.

    Raises:
        ValueError: no batch, or one that is no tuple of tensors.
    """
    if not batches:
        raise ValueError("batches must hold at least one batch, got none")
    if not all(isinstance(part, Tensor) for batch in batches for part in batch):
        raise ValueError("batches must be tuples of tensors, as `calibration_batches` makes them of token ids")
    return [(tuple(batch), {}, batch[1] if len(batch) > 1 else None) for batch in batches]


def block_list(names: Iterable[str]) -> str | None:
    """The name of the list of blocks in which all of the layers lie: "encoder.blocks", or None."""
    lists = {found and found[1] for found in (re.match(r"((?:.*?\.)?blocks)\.\d+\.", name) for name in names)}
    return lists.pop() if len(lists) == 1 else None


def first_output(output: Any) -> Tensor:
    """What a block hands to the next: its output, or the first of several."""
    return output[0] if isinstance(output, tuple) else output
