"""Exercise 2 of notebook 04, "find the bug": one step of quantization-aware training on float "shadow" weights.

Jacob et al. 2017 (arXiv 1712.05877, sec. 3); Q-BERT (Shen et al. 2019, arXiv 1909.05840): the gradient is taken at the
quantized weight, and moves the float weight, which is kept from step to step.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


@torch.no_grad()
def on_grid(weight: Float[Tensor, "rows columns"], bits: int) -> Float[Tensor, "rows columns"]:
    """The weight on a symmetric grid for every row, S = max|w| / (2^(bits-1) - 1). Without a graph."""
    scale = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return scale * torch.round(weight / scale)


class Optimizer(torch.optim.SGD):
    """Gradient descent with momentum, which has made steps before."""

    def __init__(self, layer: nn.Linear, learning_rate: float) -> None:
        super().__init__(layer.parameters(), lr=learning_rate, momentum=0.5)

    def __repr__(self) -> str:
        return f"SGD with momentum, learning rate {self.param_groups[0]['lr']:g}"


def shadow_step(
    layer: nn.Linear,
    optimizer: torch.optim.Optimizer,
    x: Float[Tensor, "batch in"],
    y: Float[Tensor, "batch out"],
    bits: int,
) -> Float[Tensor, ""]:
    """One step of training in place; returns the loss of the quantized layer before it.

    The loss is the mean squared error of x w_hat^T + bias, with w_hat = on_grid(layer.weight, bits). Its gradient at
    w_hat moves layer.weight. The bias is not quantized.
    """
    weight = layer.weight
    w_hat = weight + (on_grid(weight, bits) - weight).detach()
    loss = F.mse_loss(F.linear(x, w_hat, layer.bias), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def _straight_through(layer: nn.Linear, bits: int) -> Tensor:
    return layer.weight + (on_grid(layer.weight, bits) - layer.weight).detach()


def _set(weight: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(values)


def _exchange(
    before: Callable[[nn.Linear, int], None] = lambda layer, bits: None,
    weight: Callable[[nn.Linear, int], Tensor] = _straight_through,
    bias: Callable[[nn.Linear, int], Tensor] = lambda layer, bits: layer.bias,
    clear: bool = True,
    after: Callable[[nn.Linear, int], None] = lambda layer, bits: None,
    report: Callable[[nn.Linear, Tensor, Tensor, int], Tensor] | None = None,
) -> Answer:
    """The answer with one step exchanged, for the mistakes.

    Args:
        before, after: what is done to the layer first, and after the step.
        weight, bias: what the loss is computed with.
        report: the loss that is returned, of (layer, x, y, bits) after the step; the one of the step if None.
    """

    def answer(layer: nn.Linear, optimizer, x: Tensor, y: Tensor, bits: int) -> Tensor:
        before(layer, bits)
        loss = F.mse_loss(F.linear(x, weight(layer, bits), bias(layer, bits)), y)
        if clear:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(layer, bits)
        return loss.detach() if report is None else report(layer, x, y, bits).detach()

    return answer


def _loss_of_real_weights(layer: nn.Linear, optimizer, x: Tensor, y: Tensor, bits: int) -> Tensor:
    loss = F.mse_loss(layer(x), y).detach()
    shadow_step(layer, optimizer, x, y, bits)
    return loss


def _bias_on_grid(layer: nn.Linear, bits: int) -> Tensor:
    rounded = on_grid(layer.bias[None], bits)[0]
    return layer.bias + (rounded - layer.bias).detach()


def _trained(steps: int) -> Callable[..., dict[str, Tensor]]:
    """The layer after some calls, and the loss that the last of them returned."""

    def observe(fn: Answer, layer: nn.Linear, optimizer: Optimizer, x: Tensor, y: Tensor, bits: int) -> dict:
        for _ in range(steps):
            loss = fn(layer, optimizer, x, y, bits)
        return {"layer.weight": layer.weight.detach(), "layer.bias": layer.bias.detach(), "loss returned": loss}

    return observe


def _draw(learning_rate: float) -> Callable[[Generator], tuple]:
    """A layer with random weights and an optimizer that has made a step with it."""

    def draw(generator: Generator) -> tuple:
        inputs, outputs, batch = (whole_number(*bounds, generator) for bounds in ((3, 5), (2, 3), (6, 9)))
        layer = nn.Linear(inputs, outputs, dtype=torch.float64)
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        x = torch.randn(batch, inputs, generator=generator, dtype=torch.float64)
        y = torch.randn(batch, outputs, generator=generator, dtype=torch.float64)
        optimizer = Optimizer(layer, learning_rate)
        F.mse_loss(layer(x), y).backward()
        optimizer.step()  # leaves a momentum, and a gradient to clear
        return layer, optimizer, x, y, whole_number(2, 4, generator)

    return draw


SHADOW_STEP = Exercise(
    id="low_bit.shadow_step",
    title="find the bug: a step of quantization-aware training",
    minutes=20,
    difficulty=2,
    reference=shadow_step,
    properties=(
        Property("one step", _draw(0.1), _trained(1), times=1),
        Property("six small steps add up", _draw(0.001), _trained(6), times=1),
        Property("four large steps", _draw(0.05), _trained(4), times=1),
    ),
    mistakes=(
        Mistake(
            "The shadow weights are lost",
            "The rounded weights are written into the layer, so each step begins on the grid. A step that is smaller "
            "than half a grid step is rounded away at the next call: many small ones never add up. (Only the largest "
            "weight of a row still moves, for it sets the grid.) The rounded weights are for the forward pass only; "
            "the layer keeps the real ones.",
            _exchange(before=lambda layer, bits: _set(layer.weight, on_grid(layer.weight, bits))),
        ),
        Mistake(
            "The weights are rounded again after the step",
            "Then the next step begins on the grid, and small steps never add up. Rounded weights are made anew in "
            "every forward pass, and thrown away.",
            _exchange(after=lambda layer, bits: _set(layer.weight, on_grid(layer.weight, bits))),
        ),
        Mistake(
            "The weights never move",
            "Either no gradient reaches them: rounding has none to give, so take the value of the rounded weight with "
            "the gradient of the real one, w + (on_grid - w).detach(). Or you put the real weights back after the "
            "step, which undoes it: that must be done between backward() and optimizer.step().",
            _exchange(weight=lambda layer, bits: on_grid(layer.weight, bits)),
        ),
        Mistake(
            "The gradient is taken at the real weights",
            "That is plain training: the layer does not learn to live with its grid. The forward pass needs the "
            "rounded weights.",
            _exchange(weight=lambda layer, bits: layer.weight),
        ),
        Mistake(
            "The gradient is taken at the real weights, and the quantized loss returned",
            "The loss that you show is not the one that you train on. The forward pass needs the rounded weights.",
            lambda layer, optimizer, x, y, bits: (
                F.mse_loss(F.linear(x, on_grid(layer.weight, bits), layer.bias), y).detach()
                + 0 * _exchange(weight=lambda layer, bits: layer.weight)(layer, optimizer, x, y, bits)
            ),
        ),
        Mistake(
            "The bias is rounded, too",
            "It is added in the accumulator, with 32 bits. Only the weight goes through on_grid.",
            _exchange(bias=_bias_on_grid),
        ),
        Mistake(
            "Old gradients are still there",
            "zero_grad is missing: the gradient of the step before is added to the new one.",
            _exchange(clear=False),
        ),
        Mistake(
            "The loss of the real weights is returned",
            "The step is right. Asked is the loss of the quantized layer, the one that is trained.",
            _loss_of_real_weights,
        ),
        Mistake(
            "The loss after the step is returned",
            "The step is right. Asked is the loss before it, the one whose gradient was taken.",
            _exchange(
                report=lambda layer, x, y, bits: F.mse_loss(F.linear(x, on_grid(layer.weight, bits), layer.bias), y)
            ),
        ),
    ),
    hints=(
        "Take one weight, grid points at 0 and 1, and steps of 0.1. It begins at 0.3. Where is it after one call, "
        "after two, after ten?",
        "The rounded weights may exist during the forward and the backward pass only. F.linear(x, w_hat, layer.bias) "
        "needs no layer with rounded weights in it. Which w_hat has the value on_grid(layer.weight, bits), and passes "
        "its gradient on to layer.weight?",
        "A neighbour: savings, of which only whole coins can be spent.\n"
        "  purse = 0.3\n"
        "  for day in range(10):\n"
        "      coins = round(purse)                     what the shop sees\n"
        "      purse = purse + 0.1                      what is kept: 1.3 after ten days, one coin\n"
        "If the purse is set to `coins` every evening, it holds 0 for ever: 0.3 becomes 0, and 0.1 becomes 0 again.",
    ),
)
