"""Check an answer in the student's cell, and give hints.

`check` draws fresh random inputs at every call, prints each property that held and stops at the first that
did not: property, input, expected, got. From the second failing call on it also names the likely cause: the
mistake whose answers equal the student's on every input drawn. Inputs are drawn again until each mistake
differs from the reference and from every other mistake on at least one of them, so that only one name fits.
"""

import copy
import inspect
import linecache
import math
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from effnlp_lessons.homework.compare import difference, form_problem, same, show
from effnlp_lessons.homework.exercise import Answer, Exercise, HomeworkError, Mistake, Property
from effnlp_lessons.homework.lectures import find_exercise

MAX_DRAWS = 200
LINE = 90  # characters; longer inputs are printed one below the other
NO_CAUSE = "none of the usual mistakes gives these answers. Work the input above out by hand."
STUB_TEXTS = ("", "your code here")  # what a blank's NotImplementedError says

_failed_checks: Counter[str] = Counter()  # by exercise id, in this kernel
_hints_given: Counter[str] = Counter()


def check(id: str, fn: Answer, explain: bool = False, seed: int | None = None) -> None:
    """Check `fn` against the exercise `id`; print what held, and raise at the first thing that did not.

    Args:
        explain: name the likely cause at the first failing call already, not from the second on.
        seed: repeat the inputs of a failed check; the failure prints its seed. Fresh ones if None.

    Raises:
        HomeworkError: if a property does not hold, the function is not written yet, or the id is unknown.
    """
    exercise = find_exercise(id)
    if not callable(fn):
        name = id.split(".")[-1]
        raise HomeworkError(f'check needs the function itself, without parentheses: check("{id}", {name})')
    if seed is None:
        seed = secrets.randbelow(1_000_000)
    findings = examine(exercise, fn, seed)

    print(f"{id}: {exercise.title}")
    if all(finding.blank for finding in findings):
        print(f'  not written yet. To start: hint("{id}")')
        raise HomeworkError(f"{id} is not written yet: {findings[0].blank}")
    for checked in exercise.properties:
        failure = next((f for f in findings if f.checked is checked and f.problem), None)
        if failure is None:
            print(f"  holds  {checked.text}")
            continue
        _failed_checks[id] += 1
        print(f"  FAILS  {checked.text}\n" + "\n".join(f"    {line}" for line in failure.lines(exercise)))
        if explain or _failed_checks[id] > 1:
            cause = likely_cause(exercise, findings)
            if cause or failure.differs:
                print(f"    likely cause  {cause or NO_CAUSE}")
        elif failure.differs:
            print("    The next failing check also names the likely cause.")
        print(f'    Same inputs again: check("{id}", ..., seed={seed}). A hint: hint("{id}").')
        raise HomeworkError(f"{id}: {failure.summary}")
    print(f"All of {id} holds.")


def hint(id: str) -> None:
    """Print the next of the exercise's three hints; the third stays, and says that it is the last.

    Raises:
        HomeworkError: if the id is unknown.
    """
    exercise = find_exercise(id)
    _hints_given[id] += 1
    number = min(_hints_given[id], len(exercise.hints))
    print(f"Hint {number} of {len(exercise.hints)} for {id}\n{exercise.hints[number - 1]}")
    if number == len(exercise.hints):
        print("This is the last hint.")


# ----------------------------------------------------------------------------- running an answer


@dataclass(frozen=True)
class Case:
    """One property with one input drawn for it, and what is expected there."""

    checked: Property
    inputs: tuple
    expected: Any


@dataclass(frozen=True)
class Finding:
    """What an answer did in one case: the value it returned, or what is wrong with it in words."""

    case: Case
    value: Any = None
    returned: bool = False
    differs: bool = False  # of the right form, with other values
    problem: tuple[str, ...] = ()
    summary: str = ""
    blank: str = ""

    @property
    def checked(self) -> Property:
        return self.case.checked

    def lines(self, exercise: Exercise) -> list[str]:
        """What is printed below the property: the input, and what is wrong."""
        names = inspect.signature(exercise.reference).parameters
        given = [f"{name} = {show(value)}" for name, value in zip(names, self.case.inputs, strict=True)]
        joined = ", ".join(given)
        first, *others = [joined] if len(joined) <= LINE else given
        return [f"input     {first}", *(f"          {line}" for line in others), *self.problem]


class _Stopped(Exception):
    """The student's function did not give an answer to compare."""

    def __init__(self, problem: tuple[str, ...] = (), summary: str = "", blank: str = ""):
        self.problem, self.summary, self.blank = problem, summary, blank


def examine(exercise: Exercise, fn: Answer, seed: int) -> list[Finding]:
    """What `fn` does in every case drawn from `seed`, in the order of the properties."""
    parameters = list(inspect.signature(exercise.reference).parameters)
    guarded = _guard(fn, parameters)
    return [_examine_case(case, guarded) for case in draw_cases(exercise, seed)]


def draw_cases(exercise: Exercise, seed: int) -> list[Case]:
    """Fresh inputs for every property, on which no mistake looks like the reference or like another mistake.

    Raises:
        RuntimeError: if the properties' inputs cannot tell two of them apart (the exercise is badly built).
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(MAX_DRAWS):
        drawn = [(checked, checked.draw(generator)) for checked in exercise.properties for _ in range(checked.times)]
        cases = [
            Case(checked, inputs, checked.observe(exercise.reference, *copy.deepcopy(inputs)))
            for checked, inputs in drawn
        ]
        alike = next(_indistinguishable(exercise.mistakes, cases), None)
        if alike is None:
            return cases
    raise RuntimeError(f"{exercise.id}: no inputs drawn tell {alike} apart")


def likely_cause(exercise: Exercise, findings: list[Finding]) -> str | None:
    """The mistake that gives the student's answers in all cases, with its explanation; None if none does."""
    cases = [finding.case for finding in findings]
    answers = [_Outcome(finding.value, finding.returned) for finding in findings]
    for mistake in exercise.mistakes:
        outcomes = _outcomes(mistake, cases)
        if any(outcome.returned for outcome in outcomes) and answers == outcomes:
            return f"{mistake.name}. {mistake.explanation}"
    ratio = _constant_ratio(findings)
    return None if ratio is None else f"unknown, but every answer is {ratio:.6g} times the expected one."


def _examine_case(case: Case, guarded: Answer) -> Finding:
    try:
        value = case.checked.observe(guarded, *copy.deepcopy(case.inputs))
    except _Stopped as stopped:
        return Finding(case, problem=stopped.problem, summary=stopped.summary, blank=stopped.blank)
    except Exception as error:  # the observation needs something that the answer does not offer
        problem, summary = _problem(f"{type(error).__name__}: {error}")
        return Finding(case, problem=problem, summary=summary)
    wrong_form = form_problem(case.expected, value)
    if wrong_form:
        return Finding(case, value, True, False, *_problem(wrong_form))
    texts = difference(case.expected, value)
    if texts is None:
        return Finding(case, value, True)
    expected, got = texts
    problem = (f"expected  {expected}", f"got       {got}")
    return Finding(case, value, True, True, problem, f"expected {expected}, got {got}")


def _guard(fn: Answer, parameters: list[str]) -> Answer:
    """`fn`, with everything but a usable answer turned into a message about the student's own lines."""

    def guarded(*inputs: Any) -> Any:
        try:
            inspect.signature(fn).bind(*inputs)
        except TypeError as error:
            called = f"the exercise calls your function with ({', '.join(parameters)}): {error}"
            raise _Stopped(*_problem(called)) from None
        except ValueError:
            pass  # a builtin without a signature: calling it will tell
        before = copy.deepcopy(inputs)
        try:
            answer = fn(*inputs)
        except Exception as error:
            raise _stopped_by(error, fn) from None
        if answer is None:
            raise _Stopped(*_problem("your function returns None here"), "it returns None (is a `return` missing?)")
        if answer is Ellipsis:
            raise _Stopped(*_problem("your function returns `...` here"), "it returns `...`")
        for name, old, new in zip(parameters, before, inputs, strict=True):
            if isinstance(old, (Tensor, list, dict)) and not same(old, new):
                raise _Stopped(*_problem(f"your function changes its input {name!r} in place; work on a copy"))
        return answer

    return guarded


def _stopped_by(error: Exception, fn: Answer) -> _Stopped:
    """The message for an exception in the student's function: what it was, and on which of their lines."""
    blank = ""
    if isinstance(error, NotImplementedError) and str(error) in STUB_TEXTS:
        blank = "the blank is still there"
    if isinstance(error, TypeError) and "ellipsis" in str(error).lower():
        blank = "a `...` is still there"
    lines, summary = _problem(f"{type(error).__name__} inside your function: {error}")
    code = getattr(fn, "__code__", None)
    frame = error.__traceback__
    line = None
    while frame is not None:  # the deepest line of the student's own file or cell
        if code is not None and frame.tb_frame.f_code.co_filename == code.co_filename:
            line = frame.tb_lineno
        frame = frame.tb_next
    if line is not None:
        source = linecache.getline(code.co_filename, line).strip()
        lines += (f"in line   {line - code.co_firstlineno + 1} of your function: {source}".rstrip(": "),)
    return _Stopped(lines, summary, blank)


def _problem(text: str) -> tuple[tuple[str, ...], str]:
    """A finding's printed lines and its summary, for what is no difference of values."""
    return (f"problem   {text}",), text


# ----------------------------------------------------------------------------- telling answers apart


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What an answer gave in one case: a value, or none because it raised."""

    value: Any
    returned: bool

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Outcome) or self.returned != other.returned:
            return False
        return not self.returned or same(self.value, other.value)


def _outcomes(mistake: Mistake, cases: list[Case]) -> list[_Outcome]:
    return [_outcome(mistake.answer, case) for case in cases]


def _outcome(answer: Callable, case: Case) -> _Outcome:
    try:
        return _Outcome(case.checked.observe(answer, *copy.deepcopy(case.inputs)), True)
    except Exception:
        return _Outcome(None, False)


def _indistinguishable(mistakes: tuple[Mistake, ...], cases: list[Case]) -> Iterator[str]:
    """Pairs of answers, the reference among them, that agree in all cases."""
    answers = {mistake.name: _outcomes(mistake, cases) for mistake in mistakes}
    answers["the reference"] = [_Outcome(case.expected, True) for case in cases]
    for one, other in combinations(answers, 2):
        if answers[one] == answers[other]:
            yield f"{one!r} and {other!r}"


def _constant_ratio(findings: list[Finding]) -> float | None:
    """How many times the expected number every answer is, if that is the same in all cases; else None."""
    pairs = [(finding.case.expected, finding.value) for finding in findings if finding.returned]
    numbers = all(isinstance(wanted, Real) and isinstance(had, Real) and wanted for wanted, had in pairs)
    if not numbers or len(pairs) < len(findings):
        return None
    ratios = [had / wanted for wanted, had in pairs]
    constant = max(ratios) - min(ratios) <= 1e-9 * abs(ratios[0]) and not math.isclose(ratios[0], 1)
    return ratios[0] if constant else None
