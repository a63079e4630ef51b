"""Exercise 1 of notebook 03: from a range of real numbers to a scale and a zero point.

Jacob et al. 2017 (arXiv 1712.05877, sec. 2.1 and 3): z = S (q - Z) with codes q = 0 .. 2^k - 1.
"""

import math
from collections.abc import Callable

from torch import Generator

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def scale_and_zero_point(low: float, high: float, bits: int) -> tuple[float, int]:
    """S and Z of the grid of 2^bits codes, from 0, over [low, high]; 0 becomes a point of the grid.

    The range is extended to contain 0. S = (high - low) / (2^bits - 1), and Z = -low / S, rounded half to even.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, _clamped(round(-low / scale), bits)


def _clamped(zero_point: int, bits: int) -> int:
    return min(max(zero_point, 0), 2**bits - 1)


def _extended(low: float, high: float) -> tuple[float, float]:
    return min(low, 0.0), max(high, 0.0)


def _as_given(low: float, high: float) -> tuple[float, float]:
    return low, high


def _exchange(
    extend: Callable[[float, float], tuple[float, float]] = _extended,
    steps: Callable[[int], int] = lambda bits: 2**bits - 1,
    place: Callable[[float, float, float], float] = lambda low, high, scale: -low / scale,
    rounded: Callable[[float], float] = round,
    fit: Callable[[int, int], int] = lambda zero_point, bits: zero_point,
) -> Answer:
    """The answer with one step exchanged, for the mistakes.

    Args:
        extend: the range, from the one that is given.
        steps: by what the width is divided.
        place: the zero point before rounding, of (low, high, scale).
        fit: the zero point as it is returned, of (rounded, bits).
    """

    def answer(low: float, high: float, bits: int) -> tuple[float, float]:
        low, high = extend(low, high)
        scale = (high - low) / steps(bits)
        return scale, fit(rounded(place(low, high, scale)), bits)

    return answer


def _not_clamped(low: float, high: float, bits: int) -> tuple[float, int]:
    scale, _ = scale_and_zero_point(low, high, bits)
    return scale, round(-low / scale)  # low as it was given


def _inverted(low: float, high: float, bits: int) -> tuple[float, int]:
    scale, zero_point = scale_and_zero_point(low, high, bits)
    return 1 / scale, zero_point


def _symmetric(zero_point: Callable[[int], int]) -> Answer:
    def answer(low: float, high: float, bits: int) -> tuple[float, int]:
        return max(abs(low), abs(high)) / (2 ** (bits - 1) - 1), zero_point(bits)

    return answer


def _draw(side: str, bits: tuple[int, int] = (3, 8)) -> Callable[[Generator], tuple]:
    """A random range "around" 0, "above" it or "below" it."""

    def draw(generator: Generator) -> tuple:
        near, far = (whole_number(*bounds, generator) / 1000 for bounds in ((100, 900), (1100, 4000)))
        if side == "around":
            near = -near if whole_number(0, 1, generator) else near
            low, high = (near, far) if near < 0 else (-far, near)
        else:
            low, high = (near, far) if side == "above" else (-far, -near)
        return low, high, whole_number(*bits, generator)

    return draw


def _half(generator: Generator) -> tuple:
    """A range whose zero point falls on a half; all numbers are exact in binary."""
    bits = whole_number(3, 8, generator)
    steps, scale = 2**bits - 1, 2.0 ** -whole_number(0, 6, generator)
    low = -(whole_number(0, steps - 1, generator) + 0.5) * scale
    return low, low + steps * scale, bits


SCALE_AND_ZERO_POINT = Exercise(
    id="quantization.scale_and_zero_point",
    title="scale and zero point of a range",
    minutes=15,
    difficulty=1,
    reference=scale_and_zero_point,
    properties=(
        Property("by hand: from -1 to 2 with 2 bits", lambda generator: (-1.0, 2.0, 2), times=1),
        Property("a range around 0, 8 bits", _draw("around", (8, 8)), times=2),
        Property("a range around 0, fewer bits", _draw("around", (3, 7)), times=2),
        Property("a range above 0 is extended down to 0", _draw("above"), times=2),
        Property("a range below 0 is extended up to 0", _draw("below"), times=2),
        Property("a zero point on a half goes to the even code", _half, times=4),
    ),
    mistakes=(
        Mistake(
            "The scale divides by 2^k",
            "2^k codes have 2^k - 1 steps between them, as five fence posts have four gaps. With 2^k the top code "
            "stands for less than the top of the range.",
            _exchange(steps=lambda bits: 2**bits),
        ),
        Mistake(
            "The range does not contain 0, and the zero point is no code",
            "Extend the range first: min(low, 0) and max(high, 0). Without 0 in the range the zero point lies outside "
            "0 .. 2^k - 1, and padding, or what a ReLU cuts off, is no longer exactly 0.",
            _exchange(_as_given),
        ),
        Mistake(
            "The zero point is clamped, but the range was not extended",
            "The scale still belongs to the old range, so that the grid no longer reaches both its ends. Extend the "
            "range to contain 0 first; then the zero point is a code by itself.",
            _exchange(_as_given, fit=_clamped),
        ),
        Mistake(
            "The zero point is in the wrong range",
            "It must be one of the codes 0 .. 2^k - 1. You extend the range for the scale, but take `low` as it was "
            "given for the zero point: use the extended one in both places.",
            _not_clamped,
        ),
        Mistake(
            "Only the lower end is extended",
            "A range below 0 must be extended as well: max(high, 0).",
            _exchange(lambda low, high: (min(low, 0.0), high)),
        ),
        Mistake(
            "Only the lower end is extended, and the zero point is clamped",
            "A range below 0 must be extended as well: max(high, 0). Clamping hides it, and the scale stays wrong.",
            _exchange(lambda low, high: (min(low, 0.0), high), fit=_clamped),
        ),
        Mistake(
            "Only the upper end is extended",
            "A range above 0 must be extended as well: min(low, 0).",
            _exchange(lambda low, high: (low, max(high, 0.0))),
        ),
        Mistake(
            "The zero point of signed codes",
            "Yours belongs to the codes -2^(k-1) .. 2^(k-1) - 1. Here they are 0 .. 2^k - 1: add 2^(k-1).",
            _exchange(fit=lambda zero_point, bits: zero_point - 2 ** (bits - 1)),
        ),
        Mistake(
            "A half rounds up",
            "2.5 must become 2 here. Python's round() and torch.round() take a half to the even number; "
            "floor(x + 0.5) does not.",
            _exchange(rounded=lambda x: math.floor(x + 0.5)),
        ),
        Mistake(
            "A half rounds down",
            "1.5 must become 2 here. Python's round() and torch.round() take a half to the even number.",
            _exchange(rounded=lambda x: math.ceil(x - 0.5)),
        ),
        Mistake(
            "The zero point is cut off, not rounded",
            "int() and // drop the fraction: the whole grid is then up to one step off. Use round().",
            _exchange(rounded=math.floor),
        ),
        Mistake(
            "The zero point is rounded up",
            "Take the nearest whole number, with round().",
            _exchange(rounded=math.ceil),
        ),
        Mistake(
            "The zero point is not rounded",
            "Z is a code. Only if it is whole does some code stand for exactly 0.",
            _exchange(rounded=float),
        ),
        Mistake(
            "The zero point has the wrong sign",
            "Set q = 0 in z = S (q - Z): the lowest number is low = -S Z, so that Z = -low / S, which is not negative.",
            _exchange(place=lambda low, high, scale: low / scale),
        ),
        Mistake(
            "Low and high are exchanged",
            "Code 0 is for the lowest number: Z = -low / S. Yours counts the codes from the top down.",
            _exchange(place=lambda low, high, scale: high / scale),
        ),
        Mistake(
            "The zero point is the middle of the range",
            "Z is the code of the number 0, not of the middle between low and high.",
            _exchange(place=lambda low, high, scale: (high - low) / 2 / scale),
        ),
        Mistake(
            "The scale is upside down",
            "S is the width of one step, (high - low) / (2^k - 1). You give the steps per unit.",
            _inverted,
        ),
        Mistake(
            "A symmetric grid",
            "That is S = max|z| / (2^(k-1) - 1) with Z = 0. Asked is the grid that spends its codes on [low, high].",
            _symmetric(lambda bits: 0),
        ),
        Mistake(
            "A symmetric grid on unsigned codes",
            "0 always in the middle: half of the codes are lost where all numbers are positive. Asked is the grid that "
            "spends its codes on [low, high].",
            _symmetric(lambda bits: 2 ** (bits - 1)),
        ),
    ),
    hints=(
        "Draw a line from low to high and put 2^k points on it, evenly, the ends among them. How many gaps are there? "
        "And if 0 is not on the line: make the line longer first.",
        "The lowest point has q = 0, so low = S (0 - Z). Solve for Z. It is a code, hence whole: round() takes a half "
        "to the even number, as torch.round does.",
        "A neighbour: marks on a thermometer. 11 marks, numbered from 0, from -12 to 38 degrees.\n"
        "  10 gaps: one is (38 - -12) / 10 = 5 degrees\n"
        "  freezing point: 12 / 5 = 2.4 gaps above the lowest mark, so mark number 2\n"
        "  mark 7 then stands for 5 * (7 - 2) = 25 degrees\n"
        "From 20 to 40 degrees there is no freezing point on the scale: it begins at 0 instead, and a gap is\n"
        "  (40 - 0) / 10 = 4 degrees; the freezing point is mark 0.",
    ),
)
