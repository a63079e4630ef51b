"""Exercise 6 of notebook 02, "find the bug": one step of MobileBERT's progressive transfer.

MobileBERT (Sun et al. 2020, arXiv 2004.02984, sec. 3.6): in the stage of a block only this block's loss is on, the
blocks above do not move, those below stand still or go on at a small rate, and the embeddings and the head stay.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number

VOCABULARY = 11


class Student(nn.Module):
    """A small student: embeddings, blocks that add to their input, and a head that the maps do not need.

    One module with all parameters, because it is copied for every answer that is tried. `parts` has the parameters of
    each part: of a block by its number, of the "embeddings" and the "head".
    """

    def __init__(self, blocks: int, width: int, generator: Generator) -> None:
        super().__init__()
        linear = [(width, width), (width,)]
        shapes = {**dict.fromkeys(range(blocks), linear), "embeddings": [(VOCABULARY, width)], "head": linear}
        for part, of_part in shapes.items():
            for number, shape in enumerate(of_part):
                drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
                self.register_parameter(f"{part}_{number}", nn.Parameter(drawn))

    @property
    def parts(self) -> dict[int | str, list[nn.Parameter]]:
        parts: dict[int | str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            part = name.rsplit("_", 1)[0]
            parts.setdefault(int(part) if part.isdigit() else part, []).append(parameter)
        return parts

    def forward(self, token_ids: Int[Tensor, "batch length"]) -> Float[Tensor, "maps batch length width"]:
        """The embeddings' output, then the map after each block."""
        parts = self.parts
        maps = [F.embedding(token_ids, *parts["embeddings"])]
        for block in range(len(parts) - 2):
            maps.append(maps[-1] + torch.tanh(F.linear(maps[-1], *parts[block])))
        return torch.stack(maps)

    def __repr__(self) -> str:
        return f"a student of {len(self.parts) - 2} blocks"


class Optimizer(torch.optim.AdamW):
    """AdamW with a group for every part of the student, marked with its "part"."""

    def __init__(self, student: Student) -> None:
        groups = [{"params": parameters, "part": part} for part, parameters in student.parts.items()]
        super().__init__(groups, lr=0.02, weight_decay=0.1)

    def __repr__(self) -> str:
        return "AdamW, with weight decay and the moments of earlier steps"


def transfer_step(
    student: Student,
    optimizer: Optimizer,
    token_ids: Int[Tensor, "batch length"],
    teacher_maps: Float[Tensor, "maps batch length width"],
    block: int,
    learning_rate: float,
    lower_rate: float,
) -> Float[Tensor, ""]:
    """One step in the stage of `block`, in place: its map moves towards the teacher's. Returns the loss before it.

    `block` learns at `learning_rate`, the blocks below it at lower_rate * learning_rate, and nothing else moves.
    """
    maps = student(token_ids)
    loss = F.mse_loss(maps[block + 1], teacher_maps[block + 1])  # maps[0] is the embeddings' output
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        part = group["part"]
        group["lr"] = learning_rate if part == block else lower_rate * learning_rate
        if part in ("embeddings", "head") or part > block:
            for parameter in group["params"]:
                parameter.grad = None  # an optimizer passes over what has no gradient
    optimizer.step()
    return loss.detach()


def _rate(part: int | str, block: int, learning_rate: float, lower_rate: float) -> float | None:
    """The rate of a part; None for what must not move."""
    if isinstance(part, str) or part > block:
        return None
    return learning_rate if part == block else lower_rate * learning_rate


def _without_gradient(optimizer: Optimizer, group: dict) -> None:
    for parameter in group["params"]:
        parameter.grad = None


def _zero_gradient(optimizer: Optimizer, group: dict) -> None:
    for parameter in group["params"]:
        parameter.grad = torch.zeros_like(parameter)


def _no_decay(optimizer: Optimizer, group: dict) -> None:
    _zero_gradient(optimizer, group)
    group["weight_decay"] = 0.0


def _no_moments(optimizer: Optimizer, group: dict) -> None:
    _zero_gradient(optimizer, group)
    for parameter in group["params"]:
        optimizer.state.pop(parameter, None)


def _exchange(
    rate: Callable[[int | str, int, float, float], float | None] = _rate,
    freeze: Callable[[Optimizer, dict], None] = _without_gradient,
    losses: Callable[[int, int], list[int]] = lambda block, blocks: [block + 1],
    clear: bool = True,
    scale_gradients: bool = False,
) -> Answer:
    """The answer with one step exchanged, for the mistakes.

    Args:
        rate: the learning rate by (part, block, learning_rate, lower_rate); None: `freeze` it, at the lower rate.
        losses: numbers of the maps that are compared, of (block, number of blocks).
        clear: take away the old gradients first.
        scale_gradients: the lower blocks' gradients are scaled, in place of their rate.
    """

    def answer(student, optimizer, token_ids, teacher_maps, block, learning_rate, lower_rate):
        maps = student(token_ids)
        loss = sum(F.mse_loss(maps[number], teacher_maps[number]) for number in losses(block, len(maps) - 1))
        if clear:
            optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            part = group["part"]
            chosen = rate(part, block, learning_rate, lower_rate)
            group["lr"] = lower_rate * learning_rate if chosen is None else chosen
            if chosen is None:
                freeze(optimizer, group)
            elif scale_gradients and part != block:
                group["lr"] = learning_rate
                for parameter in group["params"]:
                    parameter.grad *= lower_rate
        optimizer.step()
        return loss.detach()

    return answer


def _rate_by(
    embeddings: float | None = None, head: float | None = None, above: float | None = None, below: float | None = None
) -> Callable[[int | str, int, float, float], float | None]:
    """Other multipliers of the learning rate; None as it should be."""

    def rate(part: int | str, block: int, learning_rate: float, lower_rate: float) -> float | None:
        kind = part if isinstance(part, str) else "above" if part > block else "below" if part < block else "own"
        changed = {"embeddings": embeddings, "head": head, "above": above, "below": below, "own": None}[kind]
        return _rate(part, block, learning_rate, lower_rate) if changed is None else changed * learning_rate

    return rate


def _embeddings_as_below(part: int | str, block: int, learning_rate: float, lower_rate: float) -> float | None:
    return lower_rate * learning_rate if part == "embeddings" else _rate(part, block, learning_rate, lower_rate)


def _what_moved(fn: Answer, student: Student, optimizer: Optimizer, token_ids: Tensor, teacher_maps: Tensor, *stage):
    """How far every part moves in one step, behind an earlier one in which all parts followed some gradient."""
    for parameter in student.parameters():
        parameter.grad = parameter.detach().cos()
    optimizer.step()  # the gradients stay, as they do behind an earlier stage
    before = [[parameter.detach().clone() for parameter in group["params"]] for group in optimizer.param_groups]
    loss = fn(student, optimizer, token_ids, teacher_maps, *stage)
    moved = {"loss": float(torch.as_tensor(loss).detach())}
    for group, old in zip(optimizer.param_groups, before, strict=True):
        part = group["part"]
        steps = [(new.detach() - was).flatten() for new, was in zip(group["params"], old, strict=True)]
        moved[part if isinstance(part, str) else f"block {part}"] = torch.cat(steps)
    return moved


def _draw(first: bool, lower_rate: float | None = None) -> Callable[[Generator], tuple]:
    """A student and its optimizer, a batch, a teacher's maps; the first block's stage, or one between two blocks."""

    def draw(generator: Generator) -> tuple:
        blocks, width, batch, length = (whole_number(*bounds, generator) for bounds in ((3, 4), (4, 5), (1, 2), (2, 4)))
        student = Student(blocks, width, generator)
        token_ids = torch.randint(VOCABULARY, (batch, length), generator=generator)
        shape = (blocks + 1, batch, length, width)
        teacher_maps = torch.randn(shape, generator=generator, dtype=torch.float64)
        block = 0 if first else whole_number(1, blocks - 2, generator)
        lower = whole_number(1, 5, generator) / 10 if lower_rate is None else lower_rate
        return student, Optimizer(student), token_ids, teacher_maps, block, whole_number(1, 5, generator) / 100, lower

    return draw


TRANSFER_STEP = Exercise(
    id="pretraining.transfer_step",
    title="find the bug: a step of progressive transfer",
    minutes=25,
    difficulty=3,
    reference=transfer_step,
    properties=(
        Property("the first block: nothing else moves", _draw(first=True), _what_moved, times=1),
        Property("a later block, those below stand still", _draw(first=False, lower_rate=0.0), _what_moved, times=1),
        Property("a later block, those below go on slowly", _draw(first=False), _what_moved, times=1),
    ),
    mistakes=(
        Mistake(
            "A gradient of zero is taken for no step",
            "AdamW does two things besides: it shrinks every weight a little (weight decay), and it goes on in the "
            "direction of earlier gradients (its moments). Both happen where the gradient is 0. Where `grad` is None "
            "an optimizer does nothing.",
            _exchange(freeze=_zero_gradient),
        ),
        Mistake(
            "Only weight decay is switched off",
            "The moments of earlier steps still move what has a gradient of 0. Set `grad` to None: then the optimizer "
            "passes over the parameter.",
            _exchange(freeze=_no_decay),
        ),
        Mistake(
            "Only the moments are thrown away",
            "Weight decay still shrinks what has a gradient of 0; and the moments may be needed in a later stage. Set "
            "`grad` to None: then the optimizer passes over the parameter.",
            _exchange(freeze=_no_moments),
        ),
        Mistake(
            "The embeddings learn at the full rate",
            "The loss of a block reaches down to the embeddings, so they have a gradient. During the transfer they "
            "stay as they were copied from the teacher.",
            _exchange(_rate_by(embeddings=1.0)),
        ),
        Mistake(
            "The embeddings learn at the lower rate",
            "The loss of a block reaches down to the embeddings, so they have a gradient. Only the blocks below go on "
            "slowly: the embeddings stay as they were copied from the teacher.",
            _exchange(_embeddings_as_below),
        ),
        Mistake(
            "The lower blocks learn at the full rate",
            "What is done should stay about as it is: the blocks below `block` have the rate "
            "lower_rate * learning_rate.",
            _exchange(_rate_by(below=1.0)),
        ),
        Mistake(
            "The lower blocks never move",
            "They go on at lower_rate * learning_rate, and stand still only where lower_rate is 0.",
            _exchange(_rate_by(below=0.0)),
        ),
        Mistake(
            "The lower blocks' gradients are scaled, not their rate",
            "Adam divides a gradient by its own size, so a gradient ten times smaller makes nearly the same step. "
            "Scale the learning rate.",
            _exchange(scale_gradients=True),
        ),
        Mistake(
            "The losses of all blocks are on",
            "In the stage of a block only its own loss is on: maps[block + 1] against teacher_maps[block + 1].",
            _exchange(losses=lambda block, blocks: list(range(1, blocks + 1))),
        ),
        Mistake(
            "The losses of all blocks are on, and all blocks learn",
            "That is the joint transfer. Here one block after the other learns: only the loss of `block` is on, and "
            "the blocks above it do not move.",
            _exchange(_rate_by(above=1.0, below=1.0), losses=lambda block, blocks: list(range(1, blocks + 1))),
        ),
        Mistake(
            "The losses of the blocks below are on, too",
            "They had their stages. Only maps[block + 1] is compared.",
            _exchange(losses=lambda block, blocks: list(range(1, block + 2))),
        ),
        Mistake(
            "The map of the block below is compared",
            "maps[0] is the embeddings' output, so the map after `block` is maps[block + 1].",
            _exchange(losses=lambda block, blocks: [block]),
        ),
        Mistake(
            "Old gradients are still there",
            "zero_grad is missing: what the last step of the stage before left is added to the new gradients.",
            _exchange(clear=False),
        ),
    ),
    hints=(
        "Compare what moved with what should move: the failing check names the part. That part has a gradient of "
        "exactly 0. What does AdamW do to a parameter, besides following its gradient?",
        "AdamW's step is not the gradient: it is a running mean of past gradients, and a share of the weight itself "
        "is taken off. Both are there at gradient 0. How does an optimizer tell a parameter that it should leave "
        "alone? (zero_grad does it by default, since PyTorch 2.)",
        "A neighbour: plain gradient descent with momentum.\n"
        "  w = torch.ones(1, requires_grad=True)\n"
        "  optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)\n"
        "  (w * 2).sum().backward(); optimizer.step()      w is 0.8\n"
        "  w.grad = torch.zeros(1);  optimizer.step()      w is 0.62: the momentum goes on\n"
        "  w.grad = torch.zeros(1);  optimizer.step()      w is 0.458\n"
        "  optimizer.zero_grad();    optimizer.step()      w is 0.458: it has no gradient, and is passed over",
    ),
)
