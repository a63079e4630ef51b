"""Quantization-aware training: train float weights through the grid that inference will use (Jacob et al. 2017).

    forward:   w_hat = Q(w) = S (clamp(round(w / S) + Z) - Z)                              (arXiv 1712.05877, sec. 3)
    backward:  dL/dw := dL/dw_hat where a <= w <= b, 0 outside                   straight-through estimator
    update:    w_{t+1} = w_t - eta dL/dw_hat                                     w stays a float, off the grid

round has the derivative 0 almost everywhere; the straight-through estimator takes the identity's instead (Bengio,
Leonard, Courville 2013, arXiv 1308.3432). a = S (q_min - Z) and b = S (q_max - Z) are the ends of the grid. The float
"shadow" weight adds up updates that are much smaller than a step of the grid. A weight's range is taken anew in every
forward pass; an activation's is a moving average, and activations may pass unquantized for the first steps. Biases are
not fake-quantized. Fake quantization stands where inference requantizes: after a fused activation.

NOTE which gradients pass: the papers and TensorFlow test the real number, a <= x <= b, and so does `fake_quantize`.
torch.fake_quantize_per_tensor_affine tests the rounded integer, and so lets through half a step more at each end.
NOTE the range of a weight (its minimum and maximum) is a constant to the gradient.
NOTE under bfloat16 autocast weights are fake-quantized in float32, and the product then rounds both its factors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from effnlp_lessons.layers import block_linears
from effnlp_lessons.quantization.integer_only import ACTIVATIONS
from effnlp_lessons.quantization.post_training import Bits, QuantizedLinear, bits_of
from effnlp_lessons.quantization.quantizers import (
    Granularity,
    LinearQuantizer,
    QuantizedMatrix,
    RangeRule,
    affine_quantizer,
    block_of,
    block_quantizer,
    check_bits,
    from_blocks,
    min_max,
    quantize_matrix,
    to_blocks,
)
from effnlp_lessons.quantization.ranges import MovingAverageRange


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(context, x: Tensor, quantizer: LinearQuantizer) -> Tensor:
        # a <= x <= b, divided by S. The largest weight sets S = largest / q_max: it must not fall outside by a rounding
        levels = x / quantizer.scale + quantizer.zero_point
        slack = 8 * torch.finfo(levels.dtype).eps * (quantizer.q_max - quantizer.q_min)
        context.save_for_backward((levels >= quantizer.q_min - slack) & (levels <= quantizer.q_max + slack))
        return quantizer(x).to(x.dtype)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        (inside,) = context.saved_tensors
        return gradient * inside, None


def fake_quantize(x: Float[Tensor, "*shape"], quantizer: LinearQuantizer) -> Float[Tensor, "*shape"]:
    """Q(x), the nearest point of the grid, with the straight-through gradient (Jacob et al. 2017, sec. 3).

    dL/dx = dL/dQ(x) where S (q_min - Z) <= x <= S (q_max - Z), both ends included up to a rounding of floats, else 0.
    Computed in the scale's precision, given back in x's dtype.

    Raises:
        ValueError: if `x` holds NaN.
    """
    return _FakeQuantize.apply(x, quantizer)


def fake_quantize_matrix(
    matrix: Float[Tensor, "rows columns"],
    bits: int,
    granularity: Granularity = "row",
    symmetric: bool = True,
    ranges: RangeRule = min_max,
) -> Float[Tensor, "rows columns"]:
    """`quantize_matrix(...).dequantize()` with the straight-through gradient. Arguments and errors are the same."""
    block = block_of(tuple(matrix.shape), granularity)
    blocks = to_blocks(matrix, block)
    with torch.no_grad():
        quantizer = block_quantizer(blocks, bits, symmetric, ranges)
    return from_blocks(fake_quantize(blocks, quantizer), block)


class FakeQuantizedActivation(nn.Module):
    """Fake quantization of activations, one grid of signed codes for the tensor (Jacob et al. 2017, sec. 3).

    Every forward pass in training mode moves the range and is counted; the first `delay` of them, and evaluation
    before them, give x back as it is. Evaluation never moves the range. All state goes with the model's state dict.
    """

    steps: Tensor
    frozen: Tensor

    def __init__(self, bits: int = 8, delay: int = 0, rate: float = 0.01) -> None:
        """`rate` is that of `MovingAverageRange`. Raises ValueError for a delay below 0, bits or rate out of range."""
        super().__init__()
        check_bits(bits)
        if delay < 0:
            raise ValueError(f"delay must be >= 0 steps, got {delay}")
        self.bits, self.delay, self.range = bits, delay, MovingAverageRange(rate)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("frozen", torch.tensor(False))

    @property
    def quantizer(self) -> LinearQuantizer:
        """The present grid: inference quantizes with it. Raises ValueError before the first batch."""
        return affine_quantizer(*self.range.bounds(), self.bits, signed=True)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.training and not self.frozen:
            self.range.update(x)
        active = self.range.started and self.steps >= self.delay
        if self.training:
            self.steps += 1
        return fake_quantize(x, self.quantizer) if active else x


class FakeQuantizedLinear(nn.Linear):
    """A linear layer that multiplies by its quantized weight and keeps the float one, its shadow, as the parameter.

    y = Q_out(activation(Q_in(x) Q(W)^T + b)), with Q_in and Q_out None or a `FakeQuantizedActivation`. The parameters
    are those of the layer it replaces, the same objects under the same names.

    Args:
        granularity, symmetric, ranges: the weight's grid, see `quantizers.quantize_matrix`.
        activation: None, "relu" or "relu6", fused: no grid between the product and it.
    """

    def __init__(
        self,
        linear: nn.Linear,
        bits: int,
        granularity: Granularity = "row",
        symmetric: bool = True,
        ranges: RangeRule = min_max,
        *,
        input: FakeQuantizedActivation | None = None,
        output: FakeQuantizedActivation | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        check_bits(bits)
        block_of(tuple(linear.weight.shape), granularity)  # an error here, not in the first step
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
        self.weight, self.bias = linear.weight, linear.bias
        self.bits, self.granularity, self.symmetric, self.ranges = bits, granularity, symmetric, ranges
        self.input, self.output, self.activation = input, output, activation
        self.train(linear.training)

    def inference_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that inference computes with, before they are quantized."""
        return self.weight, self.bias

    def training_parameters(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for this batch in training, before the weight is fake-quantized."""
        return self.weight, self.bias

    def quantized_weight(self) -> QuantizedMatrix:
        """The weight as codes: what is stored after training."""
        return quantize_matrix(self.inference_parameters()[0], self.bits, self.granularity, self.symmetric, self.ranges)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        x = x if self.input is None else self.input(x)
        weight, bias = self.training_parameters(x) if self.training else self.inference_parameters()
        weight = fake_quantize_matrix(weight, self.bits, self.granularity, self.symmetric, self.ranges)
        y = F.linear(x, weight, bias)
        if self.activation is not None:
            y = F.relu(y) if self.activation == "relu" else F.relu6(y)
        return y if self.output is None else self.output(y)


def freeze_ranges_(model: nn.Module) -> None:
    """From now on no range of activations and no statistics of a folded norm move. In place; for the last steps.

    Freezes every module that has a buffer `frozen`.
    """
    for part in model.modules():
        if "frozen" in dict(part.named_buffers(recurse=False)):
            part.frozen.fill_(True)


# ------------------------------------------------------------------------------------------- whole models


def replace_linears(
    model: nn.Module, replacement: Callable[[str, nn.Linear], nn.Module], names: Iterable[str] | None = None
) -> nn.Module:
    """A copy of `model` in which `replacement(name, layer)` stands for each linear layer named.

    `names`: None for those in the blocks of a Transformer (`post_training.block_linears`).

    Raises:
        ValueError: names that are no linear layers, or none at all.
    """
    model = copy.deepcopy(model)
    names = block_linears(model) if names is None else tuple(names)
    parts = dict(model.named_modules())
    if not names:
        raise ValueError("names must hold at least one linear layer; the model has none in blocks")
    for name in names:
        if not isinstance(parts.get(name), nn.Linear):
            raise ValueError(f"names: {name!r} must be a linear layer of the model")
        model.set_submodule(name, replacement(name, parts[name]))
    return model


def prepare_qat(
    model: nn.Module,
    bits: Bits,
    granularity: Granularity = "row",
    *,
    symmetric: bool = True,
    ranges: RangeRule = min_max,
    activations: int | None = None,
    delay: int = 0,
    rate: float = 0.01,
    names: Iterable[str] | None = None,
) -> nn.Module:
    """A copy of `model`, to be trained as any other (`training.train`), whose linear layers are fake-quantized.

    Make the optimizer afterwards: it must hold the copy's parameters.

    Args:
        bits, granularity, symmetric, ranges, names: as in `post_training.quantize_linears`; the pooler and the head
            stay in floats unless named.
        activations: bits of each layer's input, or None for floats; `delay` and `rate` as in `FakeQuantizedActivation`.

    Raises:
        ValueError: bits, granularity, delay or rate out of range, names that are no linear layers.
    """

    def replacement(name: str, linear: nn.Linear) -> FakeQuantizedLinear:
        grid = None if activations is None else FakeQuantizedActivation(activations, delay, rate)
        return FakeQuantizedLinear(linear, bits_of(name, bits), granularity, symmetric, ranges, input=grid)

    return replace_linears(model, replacement, names)


def convert_weights(model: nn.Module) -> nn.Module:
    """A copy whose fake-quantized layers (also `lsq.LsqLinear`) hold codes; in evaluation mode, with equal outputs.

    Where activations are fake-quantized they stay so.

    Raises:
        ValueError: if no layer is fake-quantized.
    """
    model = copy.deepcopy(model).eval()
    layers = [(name, part) for name, part in model.named_modules() if hasattr(part, "quantized_weight")]
    if not layers:
        raise ValueError("model has no fake-quantized layer")
    for name, layer in layers:
        quantized: nn.Module = QuantizedLinear(layer.quantized_weight(), layer.bias)
        if isinstance(layer, FakeQuantizedLinear):
            quantized = QuantizedLinear(layer.quantized_weight(), layer.inference_parameters()[1])
            activation = {"relu": nn.ReLU(), "relu6": nn.ReLU6()}.get(layer.activation)
            parts = [part for part in (layer.input, quantized, activation, layer.output) if part is not None]
            quantized = quantized if len(parts) == 1 else nn.Sequential(*parts)
        model.set_submodule(name, quantized.eval())
    return model
