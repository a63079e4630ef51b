"""Exercise 2 of notebook 03: from real numbers to codes; a realistic wrong answer to repair.

Jacob et al. 2017 (arXiv 1712.05877, Eq. 12): q = clamp(round(z / S) + Z, 0, 2^k - 1).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def quantize(z: Float[Tensor, "*shape"], scale: float, zero_point: int, bits: int) -> UInt8[Tensor, "*shape"]:
    """The codes clamp(round(z / S) + Z, 0, 2^bits - 1), a half rounded to even; uint8."""
    q = torch.round(z / scale) + zero_point
    return q.clamp(0, 2**bits - 1).to(torch.uint8)


def _byte(q: Tensor) -> Tensor:
    """The lowest eight bits, as an integer conversion keeps them."""
    return q.to(torch.int64).remainder(256).to(torch.uint8)


def _half_up(x: Tensor) -> Tensor:
    return torch.floor(x + 0.5)


def _half_away(x: Tensor) -> Tensor:
    return x.sign() * torch.floor(x.abs() + 0.5)


def _exchange(
    rounded: Callable[[Tensor], Tensor] = torch.round,
    join: Callable[[Tensor, int], Tensor] = torch.add,
    fit: Callable[[Tensor, int], Tensor] = lambda q, top: q.clamp(0, top),
    divide: Callable[[Tensor, float], Tensor] = torch.div,
) -> Answer:
    """The answer with one step exchanged: rounding, joining (rounded, zero point), fitting (q, top), dividing."""

    def answer(z: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
        return _byte(fit(join(rounded(divide(z, scale)), zero_point), 2**bits - 1))

    return answer


def _order(rule: Callable[[Tensor, int, int], Tensor]) -> Answer:
    """The answer by a rule of (z / scale, zero point, highest code)."""
    return lambda z, scale, zero_point, bits: _byte(rule(z / scale, zero_point, 2**bits - 1))


def _draw(codes: str, bits: tuple[int, int] = (3, 8), dtype: torch.dtype = torch.float32) -> Callable:
    """Numbers whose codes lie "inside" the range, some "outside", or on "halves" (exact in binary)."""

    def draw(generator: Generator) -> tuple:
        k = whole_number(*bits, generator)
        top = 2**k - 1
        zero_point = whole_number(1, top - 1, generator)
        shape = [whole_number(1, 3, generator), whole_number(3, 7, generator)]
        low, high = (-top, 2 * top) if codes == "outside" else (0, top - (codes == "halves"))
        whole = torch.randint(low, high + 1, shape, generator=generator) - zero_point
        if codes == "halves":
            scale = 2.0 ** -whole_number(0, 6, generator)
            return (whole + 0.5).to(dtype) * scale, scale, zero_point, k
        scale = whole_number(100, 999, generator) / 7000
        fraction = 0.1 + 0.3 * torch.rand(shape, generator=generator, dtype=torch.float64)
        sign = 1 - 2 * torch.randint(0, 2, shape, generator=generator)
        return (scale * (whole + sign * fraction)).to(dtype), scale, zero_point, k

    return draw


QUANTIZE = Exercise(
    id="quantization.quantize",
    title="from real numbers to codes",
    minutes=10,
    difficulty=2,
    reference=quantize,
    properties=(
        Property(
            "by hand: four numbers, S = 0.5, Z = 1, 2 bits",
            lambda generator: (torch.tensor([-0.5, 0.0, 0.6, 1.0]), 0.5, 1, 2),
            times=1,
        ),
        Property("numbers inside the range, 8 bits", _draw("inside", (8, 8)), times=2),
        Property("numbers outside the range go to its ends, 8 bits", _draw("outside", (8, 8)), times=2),
        Property("numbers inside and outside, fewer bits", _draw("outside", (3, 7)), times=2),
        Property("a half goes to the even number, before the zero point is added", _draw("halves"), times=4),
        Property("numbers in float64", _draw("outside", dtype=torch.float64), times=1),
    ),
    mistakes=(
        Mistake(
            "Clipping before rounding, and before the zero point is added",
            "0 .. 2^k - 1 are the bounds of codes. z / S is not a code yet: below the zero point it is negative, and "
            "all of that becomes Z; at the top a code beyond the last one comes out. Round, add Z, and clamp last.",
            _order(lambda x, zero_point, top: torch.round(x.clamp(0, top)) + zero_point),
        ),
        Mistake(
            "The zero point is added before rounding",
            "round(0.5) + 1 is 1, and round(1.5) is 2: where Z is odd, a half goes the other way. The rule rounds "
            "z / S, then adds Z.",
            _order(lambda x, zero_point, top: torch.round(x + zero_point).clamp(0, top)),
        ),
        Mistake(
            "A half rounds up",
            "0.5 must become 0, and 2.5 must become 2: torch.round goes to the even number, floor(x + 0.5) does not.",
            _exchange(_half_up),
        ),
        Mistake(
            "A half rounds away from zero",
            "That is what round() does in C. 0.5 must become 0 here, and -2.5 must become -2: torch.round does it.",
            _exchange(_half_away),
        ),
        Mistake(
            "Rounded down",
            "You drop the fraction: every number moves down by up to a step, half a step on average. Use torch.round.",
            _exchange(torch.floor),
        ),
        Mistake(
            "Cut off towards zero",
            "A conversion to an integer drops the fraction: numbers on both sides of 0 move towards it. Use "
            "torch.round first.",
            _exchange(torch.trunc),
        ),
        Mistake(
            "No clamp: a byte wraps around",
            "256 becomes 0 and -1 becomes 255: the smallest number turns into the largest. Clamp to 0 .. 2^k - 1 "
            "before the conversion.",
            _exchange(fit=lambda q, top: q),
        ),
        Mistake(
            "Clamped to 2^k",
            "The last of 2^k codes, counted from 0, is 2^k - 1.",
            _exchange(fit=lambda q, top: q.clamp(0, top + 1)),
        ),
        Mistake(
            "Always clamped to 0 .. 255",
            "With k bits there are codes up to 2^k - 1 only, even if each is kept in a byte.",
            _exchange(fit=lambda q, top: q.clamp(0, 255)),
        ),
        Mistake(
            "Clamped to the range of signed codes",
            "-2^(k-1) .. 2^(k-1) - 1 are signed codes. Here they are 0 .. 2^k - 1.",
            _exchange(fit=lambda q, top: q.clamp(-(top + 1) // 2, top // 2)),
        ),
        Mistake(
            "Only the upper end is clamped",
            "Codes below 0 wrap around to the top. Clamp at both ends.",
            _exchange(fit=lambda q, top: q.clamp(max=top)),
        ),
        Mistake(
            "The zero point is subtracted",
            "From z = S (q - Z) follows q = z / S + Z.",
            _exchange(join=torch.sub),
        ),
        Mistake(
            "The zero point is left out",
            "From z = S (q - Z) follows q = z / S + Z. Without it all negative numbers become code 0.",
            _exchange(join=lambda q, zero_point: q),
        ),
        Mistake(
            "Multiplied by the scale",
            "S is the width of a step: z / S is the number of steps from 0.",
            _exchange(divide=torch.mul),
        ),
    ),
    hints=(
        "Take S = 0.5, Z = 1, 2 bits, and follow z = -0.5 through the lines: which code should it have, and where does "
        "it get lost?",
        "0 and 2^k - 1 are the lowest and the highest code. At which point do you hold codes? Three operations, "
        "round, add Z, clamp: in which order? Look also at z / S = 0.5 with Z = 1.",
        "A neighbour: floors of a house with 5 floors, numbered from 0; floor 2 is at street level; each is 3 m high.\n"
        "  height = torch.tensor([-20., -4., 1., 4.5, 30.])\n"
        "  torch.round(height / 3)                      [-7., -1., 0., 2., 10.]   (4.5 / 3 = 1.5, to the even 2)\n"
        "  torch.round(height / 3) + 2                  [-5., 1., 2., 4., 12.]\n"
        "  (torch.round(height / 3) + 2).clamp(0, 4)    [0., 1., 2., 4., 4.]\n"
        "Clamped first, the cellar at -4 m would have been taken for the street.",
    ),
)
