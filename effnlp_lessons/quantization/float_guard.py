"""The proof that a computation is integer-only: a guard that stops it at the first floating number.

Much that is called integer quantization holds integers in float tensors, or turns to floats for a scale, a softmax or
a mean in between. Inside `no_floats()` every operation that torch executes is looked at, and one that reads or makes
a floating tensor raises.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FloatInIntegerPath(RuntimeError):
    """A floating number was read or made inside `no_floats`."""


def _floating(value: object) -> str | None:
    """What is floating about an operand or a result, None if nothing is."""
    if isinstance(value, Tensor):
        # a torch quantized tensor carries a real scale, and its kernels use it
        return str(value.dtype) if value.is_floating_point() or value.is_complex() or value.is_quantized else None
    return f"the Python number {value!r}" if isinstance(value, float | complex) else None


class _NoFloats(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        kwargs = kwargs or {}
        self._check(func, "reads", (args, kwargs))
        out = func(*args, **kwargs)
        self._check(func, "makes", out)
        return out

    @staticmethod
    def _check(func: torch._ops.OpOverload, verb: str, values: object) -> None:
        for leaf in tree_leaves(values):
            if (what := _floating(leaf)) is not None:
                raise FloatInIntegerPath(f"{func._schema.name} {verb} {what} in a path that must be integer-only")


def no_floats() -> AbstractContextManager:
    """A context in which every torch operation on floating or complex numbers raises.

        with no_floats():
            codes = layer(codes)

    Tensors of torch's quantized types count as floating, and so do Python floats given to an operation. Not seen:
    arithmetic between Python numbers, numpy, and what a kernel does inside.

    Raises (inside):
        FloatInIntegerPath: names the operation and what was floating.
    """
    return _NoFloats()
