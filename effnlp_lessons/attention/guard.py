"""The proof that a method is not a masked dense matrix: the largest tensor that it ever makes.

A method that computes all n x n scores and throws most away gives the right answer and saves nothing.
`largest_storage` watches every operation, forward and backward, and reports the largest memory behind any
result. Views that only look large (an expanded or unfolded tensor) count by what they occupy.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return out


def largest_storage(method: Callable[..., Tensor], *inputs: Tensor, backward: bool = True) -> int:
    """Elements of the largest tensor made during `method(*inputs)` and, with `backward`, its gradients.

    `inputs` that are floating point get gradients. Kernels' own small buffers are not seen.
    """
    inputs = tuple(x.detach().requires_grad_(backward) if x.is_floating_point() else x for x in inputs)
    with _Largest() as seen:
        output = method(*inputs)
        if backward:
            output.sum().backward()
    return seen.elements
