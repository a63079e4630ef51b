"""A linear layer that computes in int8 between float inputs and outputs: the integers that pay off at once.

    q = round(x / S1),  S1 = max|x| / 127         one scale for the input, found when it arrives
    y = S1 S2 (q Wq^T) + b                        Wq: int8, symmetric, a scale S2 for every row

Nothing must be calibrated and nothing around the layer changes, so it can replace any `nn.Linear`. The price is a pass
over the input for its range, one to make its codes, and one over the result: few numbers, where the product reads
all of the weight for every row. Quantizing the whole path instead (`integer_only`) saves these passes and needs ranges.
torch's own layer of this kind is `torch.ao.quantization.quantize_dynamic` (8 bits, affine input).

NOTE what was tried for each step, on one thread of a CPU with AVX-512 VNNI. The product: `torch._int_mm`, an eighth of
float32's time; a weight stored either way round takes the same. The range: `amax` and `amin` are quicker than
`aminmax`, and much quicker than `abs` first or a vector norm. The codes: multiplying, rounding in place and converting
are quicker than `quantize_per_tensor(...).int_repr()`, which copies (and which torch is going to remove). The result:
converting to float and one `addcmul` in place are quicker than an `addcmul` that converts on the way. What remains
beside the product is mostly memory traffic, which torch's layer avoids by doing all steps tile by tile in one kernel.
"""

from __future__ import annotations

import copy
import math

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor, nn

from effnlp_lessons.quantization.integer_only import largest_inner_size
from effnlp_lessons.quantization.quantizers import quantize_matrix


class DynamicInt8Linear(nn.Module):
    """`linear` with an int8 weight, its input quantized on the fly; for inference, no gradient passes through it.

    Attributes:
        weight: int8 (in, out), symmetric, the right factor of the product as it is read.
        scale: float32 (out), S2 of every output.
        bias: float32 (out), zeros where the layer had none.

    Raises:
        ValueError: a weight that is not finite, an input width whose sums could exceed int32.
    """

    weight: Int8[Tensor, "in out"]
    scale: Float32[Tensor, " out"]
    bias: Float32[Tensor, " out"]

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if linear.in_features > largest_inner_size(127, 127):
            raise ValueError(f"linear must have at most {largest_inner_size(127, 127)} inputs")
        matrix = quantize_matrix(linear.weight, 8, "row")
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach().float()
        # a clone has the strides of its shape, which `_int_mm` needs (see integer_only._plain)
        self.register_buffer("weight", matrix.codes.t().clone(memory_format=torch.contiguous_format))
        self.register_buffer("scale", matrix.scale.flatten().float())
        self.register_buffer("bias", bias.clone())

    def forward(self, x: Float[Tensor, "... in"]) -> Float32[Tensor, "... out"]:
        """x W^T + b, within the rounding of x and W to 8 bits.

        Raises:
            ValueError: `x` that is not floating point, not finite, or not of width `in`.
        """
        weight = self.weight
        if not x.is_floating_point() or x.shape[-1:] != weight.shape[:1]:
            raise ValueError(f"x must be floating point (..., {len(weight)}), got {x.dtype} {tuple(x.shape)}")
        if not x.numel():
            return self.bias.expand(*x.shape[:-1], -1).clone()
        flat = x.float().reshape(-1, len(weight)).contiguous()
        largest = max(flat.amax().item(), -flat.amin().item())
        if not math.isfinite(largest):
            raise ValueError("x must be finite")
        scale = largest / 127 if largest > 1e-30 else 1.0  # 1 / scale must be a float32
        codes = torch.mul(flat, 1 / scale).round_().to(torch.int8)
        y = torch._int_mm(codes, weight).float()
        torch.addcmul(self.bias, y, scale * self.scale, out=y)
        return y.view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        """Widths."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


def with_dynamic_int8(model: nn.Module) -> nn.Module:
    """A copy of `model`, every `nn.Linear` in it replaced by a `DynamicInt8Linear`; in evaluation mode.

    Raises:
        ValueError: as `DynamicInt8Linear`.
    """
    model = copy.deepcopy(model).eval()
    if type(model) is nn.Linear:
        return DynamicInt8Linear(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, DynamicInt8Linear(child))
    return model
