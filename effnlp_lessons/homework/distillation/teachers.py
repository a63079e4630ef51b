"""Exercise 4 of notebook 01, "find the bug": the logits of a teacher, which is only asked and not changed."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def teacher_logits(teacher: nn.Module, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows classes"]:
    """`teacher(x)` without dropout and without a graph; every part of the teacher keeps the mode that it had."""
    modes = {part: part.training for part in teacher.modules()}
    teacher.eval()
    with torch.no_grad():
        logits = teacher(x)
    for part, training in modes.items():
        part.training = training
    return logits


class _Teacher(nn.Module):
    """An encoder and a head, each with dropout. Printed with the modes of its parts."""

    def __init__(self, generator: Generator, inputs: int, classes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Dropout(0.25), nn.Linear(16, classes))
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def __repr__(self) -> str:
        return f"teacher(all: {_mode(self)}, encoder: {_mode(self.encoder)}, head: {_mode(self.head)})"


def _mode(module: nn.Module) -> str:
    return "training" if module.training else "evaluation"


def _observed(read: Callable[[nn.Module, Tensor, list[bool]], Any]) -> Callable[..., Any]:
    """What `read(teacher, logits, recorded)` says after the call; `recorded`: whether the forward pass made a graph.

    Dropout draws the same numbers every time, and what the answer switches off for the whole program is undone.
    """

    def observe(fn: Answer, teacher: nn.Module, x: Tensor) -> Any:
        recorded: list[bool] = []
        hook = teacher.head[-1].register_forward_hook(
            lambda module, inputs, output: recorded.append(output.requires_grad)
        )
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(0)
            logits = fn(teacher, x)
            hook.remove()
            return read(teacher, logits, recorded)

    return observe


_logits = _observed(lambda teacher, logits, recorded: logits)
_graph = _observed(
    lambda teacher, logits, recorded: {
        "a graph was recorded": any(recorded),
        "the logits require a gradient": logits.requires_grad,
    }
)
_modes = _observed(lambda teacher, logits, recorded: {name or "all": _mode(m) for name, m in teacher.named_modules()})
_settings = _observed(
    lambda teacher, logits, recorded: {
        "gradients are switched on": torch.is_grad_enabled(),
        "weights that can be trained": sum(weight.requires_grad for weight in teacher.parameters()),
        "dropout rates": [float(part.p) for part in teacher.modules() if isinstance(part, nn.Dropout)],
    }
)


def _exchange(
    evaluation: bool = True,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
    afterwards: Callable[[nn.Module, dict[nn.Module, bool]], Any] | None = None,
) -> Answer:
    """The answer with one step exchanged, for the mistakes.

    Args:
        evaluation: False leaves the teacher in the mode that it has.
        forward: gives the logits; the teacher's own, without a graph, if None.
        afterwards: sets the modes, from those that the parts had; puts them back if None.
    """

    def answer(teacher: nn.Module, x: Tensor) -> Tensor:
        modes = {part: part.training for part in teacher.modules()}
        if evaluation:
            teacher.eval()
        if forward is None:
            with torch.no_grad():
                logits = teacher(x)
        else:
            logits = forward(teacher, x)
        if afterwards is not None:
            afterwards(teacher, modes)
            return logits
        for part, training in modes.items():
            part.training = training
        return logits

    return answer


def _switched_off(teacher: nn.Module, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    return teacher(x)


def _frozen(teacher: nn.Module, x: Tensor) -> Tensor:
    return teacher.requires_grad_(False)(x)


def _no_rates(teacher: nn.Module, x: Tensor) -> Tensor:
    for part in teacher.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with torch.no_grad():
        return teacher(x)


def _whole_mode(teacher: nn.Module, modes: dict[nn.Module, bool]) -> None:
    teacher.train(modes[teacher])


def _draw(kind: str) -> Callable[[Generator], tuple]:
    """A teacher and inputs; its parts are in "training", in "evaluation", or "mixed" (the encoder or the head)."""

    def draw(generator: Generator) -> tuple:
        inputs, classes, rows = (whole_number(*bounds, generator) for bounds in ((3, 6), (3, 5), (2, 4)))
        teacher = _Teacher(generator, inputs, classes).train(kind != "evaluation")
        if kind == "mixed":
            (teacher.encoder, teacher.head)[whole_number(0, 1, generator)].eval()
        return teacher, torch.randn(rows, inputs, generator=generator)

    return draw


TEACHER_LOGITS = Exercise(
    id="distillation.teacher_logits",
    title="find the bug: asking a teacher",
    minutes=15,
    difficulty=2,
    reference=teacher_logits,
    properties=(
        Property("a teacher in evaluation mode: its logits", _draw("evaluation"), observe=_logits, times=1),
        Property("in training mode: the same logits, without dropout", _draw("training"), observe=_logits, times=2),
        Property("nothing is recorded for a gradient", _draw("evaluation"), observe=_graph, times=1),
        Property("a teacher in training mode goes on training", _draw("training"), observe=_modes, times=1),
        Property("a teacher in evaluation mode stays in it", _draw("evaluation"), observe=_modes, times=1),
        Property("the parts had different modes, and have them again", _draw("mixed"), observe=_modes, times=2),
        Property("everything else is as it was", _draw("training"), observe=_settings, times=1),
    ),
    mistakes=(
        Mistake(
            "Dropout is on",
            "torch.no_grad() stops the recording of a graph, and nothing else: in training mode dropout still zeroes "
            "a part of the activations, and the targets change from call to call. teacher.eval() switches it off.",
            _exchange(evaluation=False),
        ),
        Mistake(
            "The graph is kept",
            "The teacher is not trained. Without torch.no_grad() every activation is kept for a gradient, and a "
            "loss would even send one into the teacher.",
            _exchange(forward=lambda teacher, x: teacher(x)),
        ),
        Mistake(
            "The graph is made, and then cut off",
            "The logits are right, but detach() comes when all activations have been kept already. Run the forward "
            "pass itself under torch.no_grad().",
            _exchange(forward=lambda teacher, x: teacher(x).detach()),
        ),
        Mistake(
            "Evaluation mode is never undone",
            "Who trains this teacher afterwards trains it without dropout, and no error says so. Put the mode back.",
            _exchange(afterwards=lambda teacher, modes: None),
        ),
        Mistake(
            "The teacher always ends in training mode",
            "teacher.train() is no way back: a teacher that was in evaluation mode has dropout from now on. "
            "Put back the mode that it had.",
            _exchange(afterwards=lambda teacher, modes: teacher.train()),
        ),
        Mistake(
            "All parts get the mode of the whole",
            "teacher.train(mode) sets every part. Each of teacher.modules() has a mode of its own: someone who trains "
            "a head on a frozen encoder keeps that encoder in evaluation mode. Remember and put back all of them.",
            _exchange(afterwards=_whole_mode),
        ),
        Mistake(
            "Gradients are switched off for the whole program",
            "torch.set_grad_enabled(False) lasts: the student cannot be trained afterwards. Use it, or "
            "torch.no_grad(), in a `with`.",
            _exchange(forward=_switched_off),
        ),
        Mistake(
            "The weights are frozen for good",
            "requires_grad_(False) stays when the function has returned. torch.no_grad() lasts as long as its `with`.",
            _exchange(forward=_frozen),
        ),
        Mistake(
            "The dropout rates are set to 0 for good",
            "The teacher has no dropout any more, in training neither. teacher.eval() switches it off and can be "
            "undone.",
            _exchange(evaluation=False, forward=_no_rates),
        ),
    ),
    hints=(
        "Take a teacher with dropout, in training mode, and call the function twice with the same batch. "
        "What does `torch.no_grad()` do, and what does it not do?",
        "`teacher.eval()` switches dropout off, for the teacher and all parts in it. Before that, write down what has "
        "to be put back: every one of `teacher.modules()` has an attribute `training`.",
        "A neighbour: read a list of lamps with the light off, and leave every lamp as it was.\n"
        "  was_on = {lamp: lamp.on for lamp in lamps}\n"
        "  for lamp in lamps:\n"
        "      lamp.on = False\n"
        "  picture = take_picture()\n"
        "  for lamp, on in was_on.items():\n"
        "      lamp.on = on\n"
        "To switch all lamps to what the first one was would be wrong as soon as two of them differ.",
    ),
)
