"""What a lecture's homework is made of: exercises with properties and mistakes, and predictions.

A lecture's exercises (`start/` are the first) builds `Exercise` and `Prediction` objects and lists them as
`EXERCISES` and `PREDICTIONS`. Nothing here draws, grades or stores; `grader.py` and `predictions.py` do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

Answer = Callable[..., Any]  # the function a student writes, the reference, or a mistake


class HomeworkError(AssertionError):
    """An answer that is not right yet, or a request that cannot be served. One line in a notebook."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a stack trace through the grader."""
        return [f"{type(self).__name__}: {self}"]


def whole_number(low: int, high: int, generator: torch.Generator) -> int:
    """A random whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def call(fn: Answer, *inputs: Any) -> Any:
    """The plain observation: what `fn` returns for these inputs."""
    return fn(*inputs)


@dataclass(frozen=True)
class Property:
    """One thing that must hold: on inputs drawn by `draw`, the answer looks like the reference.

    Attributes:
        text: the property in words, as printed ("a row of padding alone gives zeros, not NaN").
        draw: inputs for one call, from a generator; a tuple in the order of the function's parameters.
        observe: what is compared, computed from a function and its inputs. By default the function's value;
            a gradient or a measured accuracy where the value alone does not show the mistake.
        times: how many inputs are drawn at every check.
    """

    text: str
    draw: Callable[[torch.Generator], tuple]
    observe: Callable[..., Any] = call
    times: int = 3


@dataclass(frozen=True)
class Mistake:
    """A realistic wrong answer: its name, why it is wrong and what to do, and a function that makes it."""

    name: str
    explanation: str
    answer: Answer


@dataclass(frozen=True)
class Exercise:
    """One exercise: the function to write, how it is checked, its usual mistakes and three hints.

    Attributes:
        id: "lecture module's prefix.name", as given to `check`.
        minutes, difficulty: as stated in the notebook; difficulty from 1 (easy) to 5 (hard).
        reference: a right answer; its parameters' names are shown with failing inputs.
        properties: in the order in which they are checked and printed, the simplest first.
        mistakes: at least four; each must differ from the reference on inputs that the properties draw.
        hints: three, from a nudge to a worked neighbour of the problem (not its solution).

    Raises:
        ValueError: if one of these is out of range.
    """

    id: str
    title: str
    minutes: int
    difficulty: int
    reference: Answer
    properties: tuple[Property, ...]
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, str, str]

    def __post_init__(self):
        if self.minutes < 1:
            raise ValueError(f"{self.id}: minutes must be >= 1, got {self.minutes}")
        if not 1 <= self.difficulty <= 5:
            raise ValueError(f"{self.id}: difficulty must be between 1 and 5, got {self.difficulty}")
        if not self.properties:
            raise ValueError(f"{self.id}: properties must hold at least one, got none")
        if len(self.mistakes) < 4:
            raise ValueError(f"{self.id}: mistakes must hold at least 4, got {len(self.mistakes)}")
        if len(self.hints) != 3:
            raise ValueError(f"{self.id}: hints must be 3, got {len(self.hints)}")


@dataclass(frozen=True)
class Prediction:
    """A question asked before the result is shown.

    Attributes:
        id: as given to `predict`.
        question: one sentence.
        unit: what a numeric guess counts ("per cent", "tokens"); empty for a choice.
        recorded: the guess used where nobody is there to guess (builds, tests). Plausible, not the truth.
        low, high: the allowed range of a numeric guess, both included.
        choices: the allowed words; empty for a number.

    Raises:
        ValueError: if the recorded guess would not be accepted.
    """

    id: str
    question: str
    recorded: float | str
    unit: str = ""
    low: float = 0
    high: float = float("inf")
    choices: tuple[str, ...] = ()

    def __post_init__(self):
        if self.accept(self.recorded) is None:
            raise ValueError(f"{self.id}: recorded must be a guess that fits the question, got {self.recorded!r}")

    def accept(self, guess: Any) -> float | str | None:
        """The guess in its stored form (a number, or one of the choices), or None if it does not fit."""
        if self.choices:
            word = guess.strip().lower() if isinstance(guess, str) else None
            return word if word in self.choices else None
        if isinstance(guess, bool) or not isinstance(guess, Real):
            return None
        whole = isinstance(guess, Integral) or float(guess).is_integer()
        number = int(guess) if whole else float(guess)  # numpy's numbers, too
        return number if self.low <= number <= self.high else None  # NaN is in no range

    def allowed(self) -> str:
        """What fits, in words: "one of 'earlier', 'later'" or "a number of per cent from 0 to 100"."""
        if self.choices:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        top = "" if self.high == float("inf") else f" to {self.high:,}"
        return f"a number of {self.unit} from {self.low:,}{top}"
