"""Optimal Brain Damage: prune what the error is flat in, not what is small (LeCun, Denker, Solla 1990).

Near a minimum, with only the diagonal of the second derivatives kept, setting u_k to 0 raises the error by its
saliency s_k = h_kk u_k² / 2. The diagonal comes from one backward pass of its own. With x_i = f(a_i),
a_i = Σ_j w_ij x_j and E = Σ (d - x)², averaged over the patterns:

    ∂²E/∂w_ij² = (∂²E/∂a_i²) x_j²
    output:  ∂²E/∂a_i² = 2 f'(a_i)² - 2 (d_i - x_i) f''(a_i)
    hidden:  ∂²E/∂a_i² = f'(a_i)² Σ_l w_li² ∂²E/∂a_l² + f''(a_i) ∂E/∂x_i

A weight that many connections share (a convolution, a layer used twice) has the sum over them. Recipe: train, rank,
set some to 0, retrain, repeat.

NOTE the paper prints a minus before the last term. The chain rule gives a plus, as does the paper's own output line.
NOTE the sum over l leaves out ∂²E/∂a_l∂a_m. With one hidden layer nothing is lost: the diagonal is exact. With more
hidden layers it is an approximation, for the layers below the last hidden one.
NOTE the Levenberg-Marquardt variant drops the terms with f'': no entry is negative, and the sum is the diagonal of
2/P Σ ggᵀ, g the gradient of an output, again exact with one hidden layer.
NOTE biases get their h too (x_j = 1). Which parameters are pruned, the masks say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from effnlp_lessons.pruning.masks import Masks, apply_masks_, global_masks

# (network's masks, how many to delete) -> (new masks, predicted rise of the error); changes the network
Step = Callable[[Masks, int], tuple[Masks, float]]


class ScaledTanh(nn.Module):
    """f(a) = amplitude tanh(slope a); 1.7159 and 2/3 are the numbers of LeCun's digit networks."""

    def __init__(self, amplitude: float = 1.7159, slope: float = 2 / 3) -> None:
        super().__init__()
        self.amplitude, self.slope = amplitude, slope

    def forward(self, a: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self.amplitude * torch.tanh(self.slope * a)


def slope_and_bend(activation: nn.Module, a: Float[Tensor, "*shape"]) -> tuple[Tensor, Tensor]:
    """f'(a) and f''(a) of an elementwise activation.

    Raises:
        ValueError: an activation that is none of Identity, Sigmoid, Tanh, ScaledTanh.
    """
    if isinstance(activation, nn.Identity):
        return torch.ones_like(a), torch.zeros_like(a)
    if isinstance(activation, nn.Sigmoid):
        x = torch.sigmoid(a)
        return x * (1 - x), x * (1 - x) * (1 - 2 * x)
    if isinstance(activation, nn.Tanh | ScaledTanh):
        amplitude, slope = (activation.amplitude, activation.slope) if isinstance(activation, ScaledTanh) else (1, 1)
        t = torch.tanh(slope * a)
        return amplitude * slope * (1 - t**2), -2 * amplitude * slope**2 * t * (1 - t**2)
    raise ValueError(f"activation must be Identity, Sigmoid, Tanh or ScaledTanh, got {type(activation).__name__}")


# ---------------------------------------------------------------------- the diagonal of second derivatives


@torch.no_grad()
def second_derivatives(
    network: nn.Sequential,
    inputs: Float[Tensor, "patterns d_in"],
    targets: Float[Tensor, "patterns d_out"],
    levenberg_marquardt: bool = False,
    printed_minus: bool = False,
) -> dict[str, Tensor]:
    """h_kk = ∂²E/∂u_k² of every weight and bias, by name; E = (1/P) Σ (d - x)², summed over outputs.

    `levenberg_marquardt` drops the terms with f''. `printed_minus` takes the sign of the paper's print, which is wrong.

    Raises:
        ValueError: a network that is not linear layers with elementwise activations; targets of another shape.
    """
    layers, x = _forward(network, inputs)
    if x.shape != targets.shape:
        raise ValueError(f"targets must have the shape of the outputs, {tuple(x.shape)}, got {tuple(targets.shape)}")
    name_of = {parameter: name for name, parameter in network.named_parameters()}
    found = {name: torch.zeros_like(parameter) for parameter, name in name_of.items()}
    sign = 1  # the output layer's sign is right in print
    e_x, e_xx = -2 * (targets - x), torch.full_like(x, 2.0)  # ∂E/∂x and ∂²E/∂x², a row a pattern
    for linear, x, slope, bend in reversed(layers):
        e_aa = slope**2 * e_xx + (0 if levenberg_marquardt else sign) * bend * e_x  # ∂²E/∂a²
        found[name_of[linear.weight]] += e_aa.T @ x**2 / len(inputs)  # summed, if layers share it
        if linear.bias is not None:
            found[name_of[linear.bias]] += e_aa.mean(0)
        e_x, e_xx = (slope * e_x) @ linear.weight, e_aa @ linear.weight**2
        sign = -1 if printed_minus else 1
    return found


def _forward(network: nn.Sequential, inputs: Tensor) -> tuple[list[tuple[nn.Linear, Tensor, Tensor, Tensor]], Tensor]:
    """For every layer the linear map, its inputs x, f'(a) and f''(a); and the outputs."""
    x, states = inputs, []
    for linear, activation in _layers(network):
        a = linear(x)
        states.append((linear, x, *slope_and_bend(activation, a)))
        x = activation(a)
    return states, x


def _layers(network: nn.Sequential) -> list[tuple[nn.Linear, nn.Module]]:
    """(linear layer, its activation) from the inputs on; Identity where no activation follows."""
    found: list[tuple[nn.Linear, nn.Module]] = []
    waits = False  # for an activation
    for place, module in enumerate(network):  # a module that stands twice comes twice; named_children would skip it
        if isinstance(module, nn.Linear):
            found.append((module, nn.Identity()))
        elif waits:
            found[-1] = (found[-1][0], module)
        else:
            raise ValueError(f"network must be linear layers, each with one activation: {place} {module} has no place")
        waits = isinstance(module, nn.Linear)
    if not found:
        raise ValueError("network must have at least one linear layer")
    return found


# ------------------------------------------------------------------------------------------ shared weights


def convolution_connections(length: int, width: int) -> Int64[Tensor, "d_out length"]:
    """Which weight of a 1-D convolution (stride 1, no padding) connects input j to output i; -1: none does.

    Raises:
        ValueError: a width not in 1 .. length.
    """
    if not 1 <= width <= length:
        raise ValueError(f"width must be in 1 .. length = {length}, got {width}")
    offset = torch.arange(length) - torch.arange(length - width + 1)[:, None]
    return torch.where((offset >= 0) & (offset < width), offset, -1)


def sum_over_connections(
    h: Float[Tensor, "d_out d_in"], weight_of: Int64[Tensor, "d_out d_in"]
) -> Float[Tensor, " weights"]:
    """h_kk = Σ h_ij over the connections (i, j) that share weight k.

    The paper's formula for shared weights. It leaves out ∂²E/∂w_ij∂w_lm between two connections of one weight, which
    is 0 only where no two of them meet above: in an output layer, each output reading the weight once.

    Args:
        weight_of: the number of the weight, 0, 1, ..., of each connection; -1: no connection.

    Raises:
        ValueError: another shape than `h`, a number below -1, no connection.
    """
    if h.shape != weight_of.shape or weight_of.min() < -1 or weight_of.max() < 0:
        raise ValueError(f"weight_of must be {tuple(h.shape)}, >= -1, with a connection, got {tuple(weight_of.shape)}")
    connected = weight_of >= 0
    return h.new_zeros(int(weight_of.max()) + 1).index_add_(0, weight_of[connected], h[connected])


# ------------------------------------------------------------------------------------------------- pruning


def saliencies(network: nn.Module, h: dict[str, Tensor]) -> dict[str, Tensor]:
    """s_k = h_kk u_k² / 2 for every parameter in `h`: the predicted rise of E when u_k becomes 0."""
    parameters = dict(network.named_parameters())
    return {name: second * parameters[name].detach() ** 2 / 2 for name, second in h.items()}


def damage_(
    network: nn.Sequential,
    inputs: Float[Tensor, "patterns d_in"],
    targets: Float[Tensor, "patterns d_out"],
    masks: Masks,
    count: int,
    levenberg_marquardt: bool = True,
) -> tuple[Masks, float]:
    """Set the `count` parameters of lowest saliency to 0, in place; the others stay as they are.

    Only what `masks` names and still keeps is a candidate. Returns the new masks and the predicted rise of E. Without
    `levenberg_marquardt` a saliency can be negative, and then goes first: a fall of E is predicted.

    Raises:
        ValueError: a count outside 0 .. kept; as `second_derivatives`.
    """
    scores = saliencies(network, second_derivatives(network, inputs, targets, levenberg_marquardt))
    new = delete_lowest_(network, scores, masks, count)
    return new, sum(scores[name][masks[name] & ~new[name]].sum().item() for name in masks)


def delete_lowest_(network: nn.Module, scores: dict[str, Tensor], masks: Masks, count: int) -> Masks:
    """Set the `count` lowest-scored parameters that `masks` keeps to 0, in place; the new masks. Ties by place.

    Raises:
        ValueError: a count outside 0 .. kept, a mask of a name without score.
    """
    missing = sorted(set(masks) - set(scores))
    if missing:
        raise ValueError(f"masks must name parameters of linear layers, got {', '.join(missing)}")
    left = sum(int(mask.sum()) for mask in masks.values())
    if not 0 <= count <= left:
        raise ValueError(f"count must be in 0 .. {left} parameters left, got {count}")
    new = global_masks({name: scores[name] for name in masks}, count / max(left, 1), masks)
    apply_masks_(network, new)
    return new


def in_rounds(
    step: Step, masks: Masks, counts: Iterable[int], retrain: Callable[[Masks], None] | None = None
) -> Iterator[tuple[Masks, float]]:
    """Delete, retrain, repeat: after every round the masks and the rise that was predicted for its deletions.

        in_rounds(lambda masks, count: damage_(network, inputs, targets, masks, count), masks, [10, 10], retrain)

    Args:
        counts: how many parameters each round deletes.
        retrain: trains the network and leaves at 0 what the masks have removed; None: no retraining.
    """
    for count in counts:
        masks, predicted = step(masks, count)
        if retrain is not None:
            retrain(masks)
        yield masks, predicted
