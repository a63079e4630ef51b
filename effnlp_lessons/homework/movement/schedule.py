"""Exercise 2 of notebook 07: how many weights are left at each step.

Zhu and Gupta (2017, arXiv 1710.01878), as Sanh, Wolf and Rush (2020, arXiv 2005.07683) use it: a cubic fall between a
warm-up, in which nothing is removed, and a cool-down, in which the mask is no longer tightened.
"""

from collections.abc import Callable

from torch import Generator

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def share_at(step: int, steps: int, warm_up: int, cool_down: int, first: float, last: float) -> float:
    """The share at `step`: `first` for warm_up steps, then last + (first - last) (1 - p)^3, and `last` to the end.

    p goes from 0 at step warm_up to 1 at step steps - cool_down.
    """
    progress = (step - warm_up) / (steps - warm_up - cool_down)
    return last + (first - last) * (1 - min(max(progress, 0.0), 1.0)) ** 3


def _held(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)


def _exchange(
    progress: Callable[[int, int, int, int], float] = lambda step, steps, warm_up, cool_down: (
        (step - warm_up) / (steps - warm_up - cool_down)
    ),
    hold: Callable[[float], float] = _held,
    curve: Callable[[float, float, float], float] = lambda p, first, last: last + (first - last) * (1 - p) ** 3,
) -> Answer:
    """The answer with another progress of (step, steps, warm_up, cool_down), holding, or curve of (p, first, last)."""

    def answer(step: int, steps: int, warm_up: int, cool_down: int, first: float, last: float) -> float:
        return float(curve(hold(progress(step, steps, warm_up, cool_down)), first, last))

    return answer


def _ends_at_once(step: int, steps: int, warm_up: int, cool_down: int, first: float, last: float) -> float:
    if step > steps - cool_down:
        return last
    return share_at(step, steps, warm_up, 0, first, last)


def _draw(where: str, rising: bool = False) -> Callable[[Generator], tuple]:
    """A step within the fall, in the "warm-up", the "cool-down", or at one of the "ends" of the fall."""

    def draw(generator: Generator) -> tuple:
        warm_up, fall, cool_down = (whole_number(*bounds, generator) for bounds in ((5, 40), (40, 90), (5, 40)))
        low, high = {
            "fall": (warm_up + 5, warm_up + fall - 5),
            "warm-up": (0, warm_up - 1),
            "cool-down": (warm_up + fall + 1, warm_up + fall + cool_down),
            "start": (warm_up, warm_up),
            "end": (warm_up + fall, warm_up + fall),
        }[where]
        first, last = (0.0, whole_number(5, 30, generator) / 100)
        if not rising:
            first, last = whole_number(80, 100, generator) / 100, whole_number(3, 30, generator) / 100
        step = whole_number(low, high, generator)
        return step, warm_up + fall + cool_down, warm_up, cool_down, first, last

    return draw


SHARE_AT = Exercise(
    id="movement.share_at",
    title="how many are left, step by step",
    minutes=10,
    difficulty=1,
    reference=share_at,
    properties=(
        Property("by hand: half-way through the fall", lambda generator: (60, 120, 20, 20, 1.0, 0.2), times=1),
        Property("within the fall", _draw("fall"), times=3),
        Property("the fall begins", _draw("start"), times=1),
        Property("the fall ends", _draw("end"), times=1),
        Property("during the warm-up", _draw("warm-up"), times=2),
        Property("during the cool-down", _draw("cool-down"), times=2),
        Property("upwards: a threshold that begins at 0", _draw("fall", rising=True), times=1),
    ),
    mistakes=(
        Mistake(
            "The fall is linear",
            "(1 - p)^3: most weights go early, while the net can still adapt, and few go late.",
            _exchange(curve=lambda p, first, last: last + (first - last) * (1 - p)),
        ),
        Mistake(
            "The fall is slow at first",
            "You have p^3 where (1 - p)^3 is asked. Most weights are to go early, while the net can still adapt.",
            _exchange(curve=lambda p, first, last: first + (last - first) * p**3),
        ),
        Mistake(
            "A square in the place of the cube",
            "(1 - p)^3.",
            _exchange(curve=lambda p, first, last: last + (first - last) * (1 - p) ** 2),
        ),
        Mistake(
            "First and last are exchanged",
            "At p = 0 the share is `first`: last + (first - last) * 1.",
            _exchange(curve=lambda p, first, last: first + (last - first) * (1 - p) ** 3),
        ),
        Mistake(
            "The fall ends at 0",
            "(1 - p)^3 goes to 0. `last` is added, and only the rest falls: last + (first - last) (1 - p)^3.",
            _exchange(curve=lambda p, first, last: first * (1 - p) ** 3),
        ),
        Mistake(
            "The share is not held during the warm-up",
            "p is negative there, and the share larger than `first`. Hold p at 0.",
            _exchange(hold=lambda p: min(p, 1.0)),
        ),
        Mistake(
            "The share is not held during the cool-down",
            "p is larger than 1 there, and (1 - p)^3 negative: the share falls below `last`. Hold p at 1.",
            _exchange(hold=lambda p: max(p, 0.0)),
        ),
        Mistake(
            "The share is not held at all",
            "Outside the fall p is below 0 or above 1. Hold it.",
            _exchange(hold=lambda p: p),
        ),
        Mistake(
            "The fall begins at step 0",
            "p counts from the end of the warm-up: (step - warm_up) / ...",
            _exchange(lambda step, steps, warm_up, cool_down: step / (steps - warm_up - cool_down)),
        ),
        Mistake(
            "The fall lasts as long as the training",
            "It takes steps - warm_up - cool_down steps. Yours is not over when the training ends.",
            _exchange(lambda step, steps, warm_up, cool_down: (step - warm_up) / steps),
        ),
        Mistake(
            "The fall lasts to the end of the training",
            "The cool-down is missing: steps - warm_up - cool_down.",
            _exchange(lambda step, steps, warm_up, cool_down: (step - warm_up) / (steps - warm_up)),
        ),
        Mistake(
            "The fall breaks off at the cool-down",
            "Your fall is planned up to the last step, and then jumps to `last`. It takes steps - warm_up - cool_down "
            "steps, and arrives there smoothly.",
            _ends_at_once,
        ),
        Mistake(
            "The warm-up takes the place of the cool-down",
            "The fall begins after warm_up steps and ends cool_down steps before the end, not the other way round.",
            _exchange(lambda step, steps, warm_up, cool_down: (step - cool_down) / (steps - warm_up - cool_down)),
        ),
    ),
    hints=(
        "How long is the fall? How far is it at this step, as a number p between 0 and 1?",
        "p = (step - warm_up) / (steps - warm_up - cool_down), held between 0 and 1: warm-up and cool-down then "
        "need no case of their own.",
        "A neighbour: a lamp is dimmed from 8 to 2 between minute 10 and minute 30, in a straight line.\n"
        "  minute 5:    p = (5 - 10) / 20 = -0.25, held at 0:   2 + 6 * (1 - 0) = 8\n"
        "  minute 20:   p = 0.5:                                2 + 6 * (1 - 0.5) = 5\n"
        "  minute 40:   p = 1.5, held at 1:                     2 + 6 * 0 = 2",
    ),
)
