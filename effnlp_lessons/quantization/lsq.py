"""Learned step size quantization: the scale is a parameter, trained with the weights (Esser et al. 2019, LSQ).

    v = x / s,   x_bar = round(clip(v, -Q_N, Q_P)),   x_hat = s x_bar                             (arXiv 1902.08153)
    d x_hat / d s = -Q_N if v <= -Q_N,  Q_P if v >= Q_P,  round(v) - v between              (Eq. 3)
    d x_hat / d x = 1 if -Q_N < v < Q_P, else 0

Signed: Q_N = 2^(k-1), Q_P = 2^(k-1) - 1. The gradient of s is multiplied by 1 / sqrt(N Q_P) for N numbers
that share s, and s begins at 2 mean|x| / sqrt(Q_P).

Why round(v) - v, when s round(x / s) has the slope round(v) almost everywhere? That slope leaves out the jumps, which
take back what it gives: over many of them x_hat stays near x, whatever s. Eq. 3 holds the rounding error
r = round(v) - v fixed and differentiates s (x / s + r) = x + s r, which is smooth.

NOTE the paper has one step size for a layer. Here any block of the weight may have its own; N is then the block's.
NOTE torch._fake_quantize_learnable_per_tensor_affine decides on round(v), not on v: between -Q_N - 1/2 and -Q_N it
gives round(v) - v where the paper gives -Q_N.
NOTE AdamW divides a gradient by its own size: the factor 1 / sqrt(N Q_P) matters for SGD, and where gradients
are clipped.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from effnlp_lessons.quantization.post_training import Bits, bits_of
from effnlp_lessons.quantization.qat import replace_linears
from effnlp_lessons.quantization.quantizers import (
    Granularity,
    QuantizedMatrix,
    block_of,
    check_bits,
    from_blocks,
    to_blocks,
)


def lsq_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """(Q_N, Q_P): the largest codes below and above zero; unsigned data have Q_N = 0, Q_P = 2^k - 1.

    Raises:
        ValueError: if `bits` is not an integer from 2 to 8.
    """
    check_bits(bits)
    return (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(context, x: Tensor, step: Tensor, q_n: int, q_p: int) -> Tensor:
        v = x / step[..., None]
        x_bar = torch.round(v.clamp(-q_n, q_p))
        # x_bar - v between the borders, x_bar = -Q_N or Q_P on and outside of them
        inside = (v > -q_n) & (v < q_p)
        context.save_for_backward(inside, torch.where(inside, x_bar - v, x_bar))
        context.factor = (x.shape[-1] * q_p) ** -0.5
        return x_bar * step[..., None]

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inside, slope = context.saved_tensors
        return gradient * inside, (gradient * slope).sum(-1) * context.factor, None, None


def lsq_quantize(
    x: Float[Tensor, "*blocks numbers"], step: Float[Tensor, "*blocks"], bits: int, signed: bool = True
) -> Float[Tensor, "*blocks numbers"]:
    """s clip(round(x / s), -Q_N, Q_P) with the paper's gradients of `x` and, scaled by 1 / sqrt(N Q_P), of `step`.

    Args:
        x: every row of numbers shares a step; N is their number.
        step: s > 0, one for every row.

    Raises:
        ValueError: bits out of range, shapes that do not fit, a step that is not positive.
    """
    q_n, q_p = lsq_range(bits, signed)
    if step.shape != x.shape[:-1]:
        raise ValueError(f"step must have shape {tuple(x.shape[:-1])}, one for each row of x, got {tuple(step.shape)}")
    if not (step > 0).all():
        raise ValueError(f"step must be positive, got {step.min().item()}; lower the learning rate")
    return _LearnedStep.apply(x, step, q_n, q_p)


def initial_step(x: Float[Tensor, "*blocks numbers"], bits: int, signed: bool = True) -> Float[Tensor, "*blocks"]:
    """2 mean|x| / sqrt(Q_P), and 1 for a row of zeros.

    Raises:
        ValueError: if `bits` is not an integer from 2 to 8.
    """
    step = 2 * x.abs().mean(-1) / lsq_range(bits, signed)[1] ** 0.5
    return torch.where(step > 0, step, torch.ones_like(step))


class LsqLinear(nn.Linear):
    """A linear layer with a fake-quantized weight whose step sizes are trained with it.

    Parameters: those of the layer it replaces, and `step` (blocks,), flat so that `training.train` does not decay it.
    """

    def __init__(self, linear: nn.Linear, bits: int, granularity: Granularity = "tensor") -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.bits = linear.weight, linear.bias, bits
        self.block = block_of(tuple(linear.weight.shape), granularity)
        self.step = nn.Parameter(initial_step(to_blocks(linear.weight.detach(), self.block), bits).flatten())
        self.train(linear.training)

    def quantized_weight(self) -> QuantizedMatrix:
        """The weight as codes, -2^(k-1) among them: what is stored after training."""
        blocks, (q_n, q_p) = to_blocks(self.weight.detach(), self.block), lsq_range(self.bits)
        step = self.step.detach().unflatten(0, blocks.shape[:2])
        codes = torch.round((blocks / step[..., None]).clamp(-q_n, q_p)).to(torch.int8)
        zero_point = torch.zeros_like(step, dtype=torch.int32)
        return QuantizedMatrix(from_blocks(codes, self.block), step, zero_point, self.bits, True, self.block)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        blocks = to_blocks(self.weight, self.block)
        weight = lsq_quantize(blocks, self.step.unflatten(0, blocks.shape[:2]), self.bits)
        return F.linear(x, from_blocks(weight, self.block), self.bias)


def prepare_lsq(
    model: nn.Module,
    bits: Bits,
    granularity: Granularity = "tensor",
    *,
    names: Iterable[str] | None = None,
) -> nn.Module:
    """A copy of `model`, to be trained, whose linear layers are fake-quantized at learned step sizes.

    Arguments and errors are those of `qat.prepare_qat`; `qat.convert_weights` makes codes of the trained model.
    """
    return replace_linears(model, lambda name, linear: LsqLinear(linear, bits_of(name, bits), granularity), names)
