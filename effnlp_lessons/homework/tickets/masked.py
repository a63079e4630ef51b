"""Exercise 4 of notebook 06: training during which a pruned weight stays away.

Adam moves a weight by its momentum, not by its gradient: a weight that is set to 0 once, with a gradient of 0 from
then on, is back after the next step.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number
from effnlp_lessons.homework.tickets.rewind import Adam, Net

Masks = dict[str, Bool[Tensor, "d_out d_in"]]
Batch = tuple[Float[Tensor, "rows d_in"], Float[Tensor, "rows d_out"]]


def masked_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, masks: Masks, batches: list[Batch]
) -> list[float]:
    """One step of the optimizer for each batch (x, y), in place, on the mean squared error; the losses before each.

    Weights that a mask has removed are 0 in every forward pass, and when the function returns. The others train as
    ever.
    """
    losses = []
    _apply(model, masks)
    for x, y in batches:
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _apply(model, masks)
        losses.append(loss.item())
    return losses


@torch.no_grad()
def _apply(model: nn.Module, masks: Masks) -> None:
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask, 0.0)


def _nothing(model: nn.Module, masks: Masks) -> None:
    pass


def _mask_gradients(model: nn.Module, masks: Masks) -> None:
    for name, parameter in model.named_parameters():
        if name in masks:
            parameter.grad = parameter.grad * masks[name]


def _turned(act: Callable) -> Callable:
    return lambda model, masks: act(model, {name: ~mask for name, mask in masks.items()})


def _first_only(model: nn.Module, masks: Masks) -> None:
    _apply(model, dict(list(masks.items())[:1]))


def _exchange(
    first: Callable = _apply,
    before: Callable = _nothing,
    gradients: Callable = _nothing,
    after: Callable = _apply,
    last: Callable = _nothing,
    clear: bool = True,
    forget: bool = False,
    late: bool = False,
) -> Answer:
    """The answer with other actions on (model, masks): first of all, before and after a step, on gradients, at last.

    Args:
        clear: whether old gradients are cleared.
        forget: whether the optimizer's memory is cleared.
        late: the loss is that after the step.
    """

    def answer(model: nn.Module, optimizer, masks: Masks, batches: list[Batch]) -> list[float]:
        losses = []
        first(model, masks)
        if forget:
            optimizer.state.clear()
        for x, y in batches:
            before(model, masks)
            loss = F.mse_loss(model(x), y)
            if clear:
                optimizer.zero_grad()
            loss.backward()
            gradients(model, masks)
            optimizer.step()
            after(model, masks)
            losses.append(F.mse_loss(model(x), y).item() if late else loss.item())
        last(model, masks)
        return losses

    return answer


def _zeros_are_pruned(model: nn.Module, optimizer, masks: Masks, batches: list[Batch]) -> list[float]:
    _apply(model, masks)
    found = {name: parameter.detach() != 0 for name, parameter in model.named_parameters() if name in masks}
    return masked_training(model, optimizer, found, batches)


def _product_in_the_forward(model: nn.Module, optimizer, masks: Masks, batches: list[Batch]) -> list[float]:
    losses = []
    for x, y in batches:
        values = {name: p * masks[name] if name in masks else p for name, p in model.named_parameters()}
        loss = F.mse_loss(torch.func.functional_call(model, values, (x,)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _pruned_now(model: nn.Module, masks: Masks) -> dict[str, int]:
    parameters = dict(model.named_parameters())
    return {name: int((parameters[name].detach()[~mask] != 0).sum()) for name, mask in masks.items()}


def _returned(fn: Answer, model: nn.Module, optimizer: Adam, masks: Masks, batches: list[Batch]) -> dict[str, int]:
    """How many pruned weights are not 0 at the end."""
    fn(model, optimizer, masks, batches)
    return {f"pruned weights of {name} that are not 0": count for name, count in _pruned_now(model, masks).items()}


def _everything(fn: Answer, model: nn.Module, optimizer: Adam, masks: Masks, batches: list[Batch]) -> dict:
    losses = fn(model, optimizer, masks, batches)
    return {"losses": losses} | {name: parameter.detach() for name, parameter in model.named_parameters()}


def _draw(batches: int, zero: bool = False) -> Callable[[Generator], tuple]:
    """A net whose Adam has made steps with all of its weights; `zero` puts a kept weight at 0."""

    def draw(generator: Generator) -> tuple:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        inputs, hidden, outputs = (whole_number(2, 4, generator) for _ in range(3))
        model = Net(inputs, hidden, outputs)
        for parameter in model.parameters():
            parameter.data = normal(*parameter.shape)
        optimizer = Adam(model.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            F.mse_loss(model(normal(5, inputs)), normal(5, outputs)).backward()
            optimizer.step()  # leaves a momentum of every weight, and a gradient to clear
        masks = {}
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                order = torch.randperm(parameter.numel(), generator=generator)
                masks[name] = (order >= parameter.numel() // 2).view(parameter.shape)
                if zero:
                    parameter.data.view(-1)[order.argmax()] = 0.0
        return model, optimizer, masks, [(normal(6, inputs), normal(6, outputs)) for _ in range(batches)]

    return draw


MASKED_TRAINING = Exercise(
    id="tickets.masked_training",
    title="training with weights that stay away",
    minutes=20,
    difficulty=2,
    reference=masked_training,
    properties=(
        Property("pruned weights are 0 after one step", _draw(1), _returned, times=1),
        Property("losses and weights of three steps", _draw(3), _everything, times=1),
        Property("a kept weight that is 0 at the start may move", _draw(2, zero=True), _everything, times=1),
    ),
    mistakes=(
        Mistake(
            "Masked once, and then Adam goes on",
            "The first step brings every pruned weight back: it has a gradient, and a momentum from before. Set the "
            "pruned weights to 0 again after every step.",
            _exchange(after=_nothing),
        ),
        Mistake(
            "Only the gradient is masked after that",
            "A weight with the gradient 0 still moves if it has a momentum, and Adam has one from the training before. "
            "Set the pruned weights to 0 again after every step.",
            _exchange(gradients=_mask_gradients, after=_nothing),
        ),
        Mistake(
            "The last step is not masked",
            "You mask before each forward pass, so the losses are right. But what the last step brought back is still "
            "there at the end.",
            _exchange(first=_nothing, before=_apply, after=_nothing),
        ),
        Mistake(
            "The mask comes at the end only",
            "The net has trained with all of its weights, and loses them afterwards: the others have not learned to do "
            "without them. Mask before the first forward pass, and after every step.",
            _exchange(first=_nothing, after=_nothing, last=_apply),
        ),
        Mistake(
            "The first forward pass has all weights",
            "Mask once before the first batch, too.",
            _exchange(first=_nothing),
        ),
        Mistake(
            "The product is masked, and the weights are not",
            "w * mask in the forward pass gives pruned weights no gradient, and the losses are right. But the stored "
            "weights are not 0: they still have their values, and move by their momentum.",
            _product_in_the_forward,
        ),
        Mistake(
            "The mask is turned round",
            "True means kept. You remove what should stay.",
            _exchange(first=_turned(_apply), after=_turned(_apply)),
        ),
        Mistake(
            "Kept weights are frozen",
            "The gradient is masked with the wrong side of the mask.",
            _exchange(gradients=_turned(_mask_gradients)),
        ),
        Mistake(
            "A kept weight of 0 is taken for a pruned one",
            "`weight != 0` is not the mask: a kept weight may be 0 now, and has to be free to move. Use `masks`.",
            _zeros_are_pruned,
        ),
        Mistake(
            "Only the first matrix is masked",
            "Every matrix in `masks` has to be masked. Does the loop end too early?",
            _exchange(first=_first_only, after=_first_only),
        ),
        Mistake(
            "Old gradients are still there",
            "zero_grad is missing: the gradient of the step before is added to the new one.",
            _exchange(clear=False),
        ),
        Mistake(
            "The optimizer's memory is cleared",
            "That helps against the old momentum, but it changes how the kept weights train. Only rewinding clears it.",
            _exchange(forget=True),
        ),
        Mistake(
            "The loss after the step is returned",
            "Asked is the loss of each step's forward pass.",
            _exchange(late=True),
        ),
    ),
    hints=(
        "When is a pruned weight not 0? Print one of them after each line of a step.",
        "Adam moves a weight by its mean of past gradients, even if the gradient is 0 now. So it is not enough to keep "
        "gradients away: set the weights themselves to 0, before the first forward pass and after each step.",
        "A neighbour: a door that a spring pushes open.\n"
        "  angle, speed = 0.0, 2.0          closed once, but still moving\n"
        "  for _ in range(2):\n"
        "      speed = 0.9 * speed          nobody pushes any more: the force is 0\n"
        "      angle = angle + speed        1.8, 3.4, 4.9: it opens all the same\n"
        "      angle = 0.0                  with this line it is shut after every step",
    ),
)
