"""From training to integers: a network trained so that integer-only inference computes the same (Jacob et al. 2017).

    w_fold = gamma w / sqrt(var + eps),   b_fold = beta + gamma (b - mean) / sqrt(var + eps)  (arXiv 1712.05877, sec. 3)

A stack of linear layers, each with its batch norm folded in and its ReLU fused, is fake-quantized (`qat`) exactly where
`integer_only.IntegerLinear` rounds: on the folded weight, and on each layer's output. After training every layer
becomes an integer one, which agrees with it within one code.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnlp_lessons.quantization.batch_norm import fold_statistics
from effnlp_lessons.quantization.integer_only import IntegerLinear
from effnlp_lessons.quantization.qat import FakeQuantizedActivation, FakeQuantizedLinear
from effnlp_lessons.quantization.quantizers import Granularity


class FakeQuantizedNormedLinear(FakeQuantizedLinear):
    """A linear layer with the batch norm after it folded in, so that the folded weight is quantized (sec. 3).

        w_fold = gamma w / sqrt(var + eps),   b_fold = beta + gamma (b - mean) / sqrt(var + eps)

    In training mean and var are the batch's, from a first product with the float weight; in evaluation, and once
    frozen, the running ones, with which inference folds.

    Raises:
        ValueError: a norm without running statistics or of another width.
    """

    frozen: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        norm: nn.BatchNorm1d,
        bits: int,
        granularity: Granularity = "row",
        *,
        input: FakeQuantizedActivation | None = None,
        output: FakeQuantizedActivation | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__(linear, bits, granularity, input=input, output=output, activation=activation)
        if norm.running_mean is None or norm.num_features != linear.out_features:
            raise ValueError(f"norm must have running statistics and width {linear.out_features}")
        self.norm = norm
        self.register_buffer("frozen", torch.tensor(False))

    def inference_parameters(self) -> tuple[Tensor, Tensor]:
        return fold_statistics(self, self.norm, self.norm.running_mean, self.norm.running_var)

    def training_parameters(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.frozen:
            return self.inference_parameters()
        z = F.linear(x, self.weight, self.bias).flatten(0, -2)
        self.norm(z)  # moves the running statistics
        return fold_statistics(self, self.norm, z.mean(0), z.var(0, correction=0))


def prepare_integer_stack(
    stack: nn.Sequential, bits: int = 8, granularity: Granularity = "row", *, delay: int = 0, rate: float = 0.01
) -> nn.Sequential:
    """A copy of a stack of Linear, [BatchNorm1d], [ReLU or ReLU6], ... to be trained for integer-only inference.

    Every layer becomes one module, norm folded and activation fused, whose output is fake-quantized in 8 bits; the
    first one's input too. So each number that inference holds as a code is on its grid in training.

    Raises:
        ValueError: another module, or one out of order; bits, granularity, delay or rate out of range.
    """
    layers: list[FakeQuantizedLinear] = []
    modules = list(copy.deepcopy(stack))
    while modules:
        linear = modules.pop(0)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"stack must be Linear, [BatchNorm1d], [ReLU or ReLU6], ..., got {type(linear).__name__}")
        norm = modules.pop(0) if modules and isinstance(modules[0], nn.BatchNorm1d) else None
        activation = {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(modules[0])) if modules else None
        if activation:
            modules.pop(0)
        grids = {"input": None if layers else FakeQuantizedActivation(8, delay, rate)}
        grids["output"] = FakeQuantizedActivation(8, delay, rate)
        if norm is None:
            layers.append(FakeQuantizedLinear(linear, bits, granularity, activation=activation, **grids))
        else:
            layers.append(FakeQuantizedNormedLinear(linear, norm, bits, granularity, activation=activation, **grids))
    if not layers:
        raise ValueError("stack must hold at least one linear layer")
    return nn.Sequential(*layers)


def convert_to_integers(stack: nn.Sequential) -> nn.Sequential:
    """The `integer_only.IntegerLinear` layers of a stack that was made by `prepare_integer_stack` and trained.

    It takes the codes `layers[0].input.quantize(x)` and gives codes that `layers[-1].output.dequantize` reads.

    Raises:
        ValueError: a stack that saw no batch or whose delay is not over, weights on other grids than one a row or one.
    """
    if not len(stack) or not all(isinstance(layer, FakeQuantizedLinear) and layer.output for layer in stack):
        raise ValueError("stack must come from prepare_integer_stack: every layer needs an output grid")
    layers, grid = [], None
    for layer in stack:
        for activation in (layer.input, layer.output):
            if activation is not None and activation.steps < activation.delay:
                raise ValueError(f"activations were quantized in no step yet: {activation.steps} of {activation.delay}")
        grid, output = (layer.input.quantizer if grid is None else grid), layer.output.quantizer
        matrix, bias = layer.quantized_weight(), layer.inference_parameters()[1]
        if matrix.block[1] != layer.in_features or matrix.block[0] not in (1, layer.out_features):
            raise ValueError(f"weights must have one grid a row or one in all, got blocks of {matrix.block}")
        scale = matrix.scale.flatten().expand(layer.out_features).double()
        if bias is not None:  # a row of zeros has any scale: one that is fine enough for its bias
            fine = bias.detach().double().abs() / grid.scale / 2**16
            scale = torch.where((matrix.codes == 0).all(1) & (fine > 0), fine, scale)
        layers.append(IntegerLinear(matrix.codes, scale, bias, grid, output, layer.activation))
        grid = output
    return nn.Sequential(*layers)
