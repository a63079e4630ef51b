"""Exercise 2 of notebook 06: back to the first weights, under the new mask, with an optimizer that remembers nothing.

Frankle and Carbin (2019, arXiv 1803.03635): a ticket is a mask together with the weights the net began with.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number

Weights = dict[str, Float[Tensor, "*shape"]]
Masks = dict[str, Bool[Tensor, "d_out d_in"]]


class Adam(torch.optim.Adam):
    """Adam, which says what it is when it is printed."""

    def __repr__(self) -> str:
        return f"Adam, learning rate {self.param_groups[0]['lr']:g}, {len(self.state)} parameters with momentum"


class Net(nn.Sequential):
    """Two linear layers in float64 with a tanh between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        float64 = {"dtype": torch.float64}
        super().__init__(nn.Linear(inputs, hidden, **float64), nn.Tanh(), nn.Linear(hidden, outputs, **float64))

    def __repr__(self) -> str:
        return f"a net {self[0].in_features}-{self[0].out_features}-{self[2].out_features}, trained"


def rewind(model: nn.Module, optimizer: torch.optim.Optimizer, theta_0: Weights, masks: Masks) -> torch.optim.Optimizer:
    """Set `model` to theta_0, pruned weights to 0, in place; the optimizer for its next training, without memory."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(theta_0[name] * masks.get(name, 1))
    optimizer.state.clear()
    return optimizer


def _exchange(
    value: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    forget: bool = True,
    share: bool = False,
) -> Answer:
    """The answer with other values of a parameter, of (theta_0, trained, its mask or None).

    Args:
        forget: whether the optimizer's memory is cleared.
        share: whether a parameter takes the given tensor itself, without a copy.
    """

    def answer(model: nn.Module, optimizer, theta_0: Weights, masks: Masks) -> torch.optim.Optimizer:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                new = value(theta_0[name], parameter, masks.get(name))
                if share:
                    parameter.data = new
                else:
                    parameter.copy_(new)
        if forget:
            optimizer.state.clear()
        return optimizer

    return answer


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values * mask


def _ticket(theta_0: Tensor, trained: Tensor, mask: Tensor | None) -> Tensor:
    return _masked(theta_0, mask)


def _redrawn(model: nn.Module, optimizer, theta_0: Weights, masks: Masks) -> torch.optim.Optimizer:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_masked(parameter, masks.get(name)))
    optimizer.state.clear()
    return optimizer


def _new_optimizer(learning_rate: float | None, old_parameters: bool = False) -> Answer:
    """A new Adam in place of a cleared one; on a copy of the old parameters the model does not learn."""

    def answer(model: nn.Module, optimizer, theta_0: Weights, masks: Masks) -> torch.optim.Optimizer:
        before = list(model.parameters())
        if old_parameters:
            for name in [name for name, _ in model.named_parameters()]:
                layer, _, kind = name.rpartition(".")
                new = nn.Parameter(_masked(theta_0[name], masks.get(name)).clone())
                setattr(model.get_submodule(layer), kind, new)
        else:
            _exchange(_ticket)(model, optimizer, theta_0, masks)
        rate = optimizer.param_groups[0]["lr"] if learning_rate is None else learning_rate
        return torch.optim.Adam(before, lr=rate)

    return answer


def _parameters(model: nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _at_once(fn: Answer, model: nn.Module, optimizer: Adam, theta_0: Weights, masks: Masks) -> Weights:
    """The model right after the call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # an answer that draws new weights draws the same ones each time
        fn(model, optimizer, theta_0, masks)
    return _parameters(model)


def _biases(fn: Answer, *inputs: object) -> Weights:
    return {name: values for name, values in _at_once(fn, *inputs).items() if name.endswith("bias")}


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer, masks: Masks, steps: int) -> None:
    """Steps of the returned optimizer on a fixed problem; masked weights are set to 0 after each."""
    inputs = model[0].in_features
    x = torch.linspace(-1, 1, 4 * inputs, dtype=torch.float64).view(4, inputs)
    for _ in range(steps):
        optimizer.zero_grad()
        for parameter in model.parameters():  # an optimizer of other parameters does not clear these
            parameter.grad = None
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in masks:
                    parameter *= masks[name]


def _later(what: str) -> Callable[..., Weights]:
    """Two steps of training after the call: the model, or theta_0, which must not have moved."""

    def observe(fn: Answer, model: nn.Module, optimizer: Adam, theta_0: Weights, masks: Masks) -> Weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            optimizer = fn(model, optimizer, theta_0, masks)
        _trained(model, optimizer, masks, 2)
        return (
            {name: values.detach().clone() for name, values in theta_0.items()}
            if what == "theta_0"
            else (_parameters(model))
        )

    return observe


def _draw(generator: Generator) -> tuple:
    """A net that has been trained for some steps from theta_0, its optimizer, and a mask of each matrix."""
    model = Net(*(whole_number(2, 4, generator) for _ in range(3)))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    theta_0 = _parameters(model)
    optimizer = Adam(model.parameters(), lr=whole_number(5, 20, generator) / 100)
    _trained(model, optimizer, {}, 2)
    masks = {}
    for name, values in theta_0.items():
        if values.ndim == 2:
            order = torch.randperm(values.numel(), generator=generator)
            masks[name] = (order >= values.numel() // 2).view(values.shape)
    return model, optimizer, theta_0, masks


REWIND = Exercise(
    id="tickets.rewind",
    title="rewind",
    minutes=20,
    difficulty=2,
    reference=rewind,
    properties=(
        Property("the weights after the call", _draw, _at_once, times=1),
        Property("the biases after the call", _draw, _biases, times=1),
        Property("the weights after two more steps of training", _draw, _later("model"), times=1),
        Property("theta_0 after two more steps: it must not have moved", _draw, _later("theta_0"), times=1),
    ),
    mistakes=(
        Mistake(
            "The weights go on from where training ended",
            "That is fine-tuning of a pruned net, a good method with another name. A ticket has the weights of theta_0 "
            "and not the trained ones.",
            _exchange(lambda theta_0, trained, mask: _masked(trained, mask)),
        ),
        Mistake(
            "The weights and the optimizer go on from where training ended",
            "That is fine-tuning of a pruned net, a good method with another name. A ticket has the weights of theta_0 "
            "and an optimizer that begins anew.",
            _exchange(lambda theta_0, trained, mask: _masked(trained, mask), forget=False),
        ),
        Mistake(
            "New weights are drawn",
            "The same mask with new random weights is the control of the paper, and not the ticket. Take theta_0.",
            _redrawn,
        ),
        Mistake(
            "The optimizer remembers the last training",
            "Adam's two means and its count of steps are still there, and the first steps go where the old training "
            "was going. Clear optimizer.state, or make a new optimizer.",
            _exchange(_ticket, forget=False),
        ),
        Mistake(
            "The mask is not applied",
            "The whole net is back. Pruned weights are 0.",
            _exchange(lambda theta_0, trained, mask: theta_0),
        ),
        Mistake(
            "The mask is turned round",
            "True means kept: multiply by the mask.",
            _exchange(lambda theta_0, trained, mask: _masked(theta_0, None if mask is None else ~mask)),
        ),
        Mistake(
            "Pruned weights keep their trained values",
            "They are 0 in a ticket.",
            _exchange(lambda theta_0, trained, mask: theta_0 if mask is None else torch.where(mask, theta_0, trained)),
        ),
        Mistake(
            "Only the masked matrices are rewound",
            "The biases have no mask, but they go back to theta_0 as well.",
            _exchange(lambda theta_0, trained, mask: trained if mask is None else theta_0 * mask),
        ),
        Mistake(
            "The biases are set to 0",
            "They have no mask and go back to theta_0.",
            _exchange(lambda theta_0, trained, mask: torch.zeros_like(theta_0) if mask is None else theta_0 * mask),
        ),
        Mistake(
            "theta_0 moves with the model",
            "A parameter took the tensor of theta_0 itself: parameter.data = theta_0[name] makes no copy. Training "
            "then changes theta_0, and the next round rewinds to trained weights. Use copy_, or .clone().",
            _exchange(_ticket, share=True),
        ),
        Mistake(
            "The learning rate is lost",
            "A new optimizer without `lr` takes torch's own. Give it that of the old one, or clear optimizer.state.",
            _new_optimizer(1e-3),
        ),
        Mistake(
            "The optimizer holds the old parameters",
            "The model was given new nn.Parameter objects, and the optimizer still has the old ones: nothing is "
            "trained any more. Write new values into the parameters that are there: parameter.copy_(...).",
            _new_optimizer(None, old_parameters=True),
        ),
    ),
    hints=(
        "Three things have to go back: the matrices, the biases, and what the optimizer remembers. Which of them has a "
        "mask?",
        "Under torch.no_grad(), parameter.copy_(values) writes into the parameter that the optimizer knows, and shares "
        "nothing with `values`. optimizer.state is a dictionary: .clear() empties it, and the learning rate stays.",
        "A neighbour: a list that is put back to its first values.\n"
        "  first = [3, 1, 2]\n"
        "  now = first            now.append(5) changes `first`, too\n"
        "  now = list(first)      now.append(5) does not\n"
        "  now[:] = first         new values in the same list: whoever holds `now` sees them",
    ),
)
