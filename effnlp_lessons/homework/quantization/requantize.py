"""Exercise 4 of notebook 03: multiply an int32 accumulator by a real number with integers alone, bit for bit.

Jacob et al. 2017 (arXiv 1712.05877, sec. 2.2) with the roundings of gemmlowp, the library that the paper describes:
the product takes a half up, the shift takes it away from zero.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int32
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def requantize(accumulator: Int32[Tensor, "*shape"], multiplier: int, shift: int) -> Int32[Tensor, "*shape"]:
    """accumulator * multiplier * 2^-31 * 2^-shift: rounded half up after 2^31, half away from zero after 2^shift.

    multiplier is in 2^30 .. 2^31 - 1 and shift in 0 .. 31.
    """
    high = (accumulator.to(torch.int64) * multiplier + 2**30) >> 31
    return _half_away(high, shift).to(torch.int32)


def _half_up(x: Tensor, shift: int) -> Tensor:
    """round(x / 2^shift), a half going up; x int64."""
    return (x + (1 << shift >> 1)) >> shift


def _half_away(x: Tensor, shift: int) -> Tensor:
    """round(x / 2^shift), a half going away from zero; x int64."""
    return x.sign() * _half_up(x.abs(), shift)


def _half_even(x: Tensor, shift: int) -> Tensor:
    return torch.round(x.double() / 2**shift).to(torch.int64)


def _down(x: Tensor, shift: int) -> Tensor:
    return x >> shift


def _towards_zero(x: Tensor, shift: int) -> Tensor:
    return x.sign() * (x.abs() >> shift)


def _exchange(
    first: Callable[[Tensor, int], Tensor] = _half_up,
    second: Callable[[Tensor, int], Tensor] = _half_away,
    first_bits: int = 31,
    second_bits: Callable[[int], int] = lambda shift: shift,
) -> Answer:
    """The answer with other roundings (of x and the bits shifted out), or with other shifts."""

    def answer(accumulator: Tensor, multiplier: int, shift: int) -> Tensor:
        high = first(accumulator.to(torch.int64) * multiplier, first_bits)
        return second(high, second_bits(shift)).to(torch.int32)

    return answer


def _once(rounded: Callable[[Tensor, int], Tensor]) -> Answer:
    return lambda accumulator, multiplier, shift: rounded(accumulator.to(torch.int64) * multiplier, 31 + shift).to(
        torch.int32
    )


def _real(dtype: torch.dtype) -> Answer:
    def answer(accumulator: Tensor, multiplier: int, shift: int) -> Tensor:
        return torch.round(accumulator.to(dtype) * (multiplier / 2 ** (31 + shift))).to(torch.int32)

    return answer


def _product_wraps(accumulator: Tensor, multiplier: int, shift: int) -> Tensor:
    low = (accumulator.to(torch.int64) * multiplier).to(torch.int32).to(torch.int64)
    return _half_away(_half_up(low, 31), shift).to(torch.int32)


def _draw(size: int, shifts: tuple[int, int], half: bool = False) -> Callable[[Generator], tuple]:
    """Accumulators up to `size` in absolute value; `half`: the multiplier is 2^30, so that odd ones fall on a half."""

    def draw(generator: Generator) -> tuple:
        shape = [whole_number(1, 3, generator), whole_number(5, 8, generator)]
        accumulator = torch.randint(-size, size + 1, shape, generator=generator, dtype=torch.int32)
        multiplier = 2**30 if half else whole_number(2**30, 2**31 - 1, generator)
        return accumulator, multiplier, whole_number(*shifts, generator)

    return draw


REQUANTIZE = Exercise(
    id="quantization.requantize",
    title="multiply an accumulator, bit for bit",
    minutes=20,
    difficulty=3,
    reference=requantize,
    properties=(
        Property(
            "by hand: times 0.5 and no shift, a half goes up",
            lambda generator: (torch.tensor([3, -3, 4, -4, 1], dtype=torch.int32), 2**30, 0),
            times=1,
        ),
        Property("times 0.5 and no shift", _draw(40, (0, 0), half=True), times=1),
        Property("small accumulators, small shifts: many halves", _draw(60, (1, 3)), times=4),
        Property("small accumulators, times a power of 2: halves twice", _draw(60, (1, 3), half=True), times=4),
        Property("accumulators of a real layer", _draw(200_000, (4, 10)), times=2),
        Property("the largest accumulators", _draw(2**31 - 1, (0, 3)), times=1),
        Property("the largest shifts", _draw(2**31 - 1, (26, 31)), times=1),
    ),
    mistakes=(
        Mistake(
            "A real product, rounded once",
            "torch.round(accumulator * M) needs real numbers and rounds once, half to even. The processor rounds "
            "twice, so the codes differ by one in about a tenth of all cases. Do what it does.",
            _real(torch.float64),
        ),
        Mistake(
            "A real product in float32, rounded once",
            "An int32 times a Python float is float32, which has 24 bits: large accumulators are not even exact. And "
            "the processor rounds twice. Use integers only: .to(torch.int64), + and >>.",
            _real(torch.float32),
        ),
        Mistake(
            "Rounded once, half up",
            "One shift by 31 + shift, in integers. But gemmlowp rounds after 31 bits, and the rounded number once "
            "more after `shift` bits.",
            _once(_half_up),
        ),
        Mistake(
            "Rounded once, half away from zero",
            "One shift by 31 + shift, in integers. But gemmlowp rounds after 31 bits, and the rounded number once "
            "more after `shift` bits.",
            _once(_half_away),
        ),
        Mistake(
            "The first rounding is used twice",
            "A half goes up in the product only. The shift takes it away from zero: -2.5 becomes -3.",
            _exchange(second=_half_up),
        ),
        Mistake(
            "The second rounding is used twice",
            "A half goes away from zero in the shift only. The product takes it up: -1.5 becomes -1.",
            _exchange(first=_half_away),
        ),
        Mistake(
            "The two roundings are exchanged",
            "The product takes a half up, towards +infinity; the shift takes it away from zero.",
            _exchange(_half_away, _half_up),
        ),
        Mistake(
            "The first shift is one too few",
            "multiplier = 2^31 M0, so the product is divided by 2^31. Two 32-bit numbers give 64 bits; the upper 32 of "
            "them are the product over 2^32, and gemmlowp doubles that.",
            _exchange(first_bits=30),
        ),
        Mistake(
            "The first shift is one too many",
            "The upper 32 bits of the product are the product over 2^32. multiplier is 2^31 M0, so they must be "
            "doubled: shift by 31.",
            _exchange(first_bits=32),
        ),
        Mistake(
            "The second shift is one too few",
            "Divide by 2^shift, all of it.",
            _exchange(second_bits=lambda shift: max(shift - 1, 0)),
        ),
        Mistake(
            "The product is rounded down",
            ">> alone drops the fraction. Half of the divisor, 2^30, is added first.",
            _exchange(first=_down),
        ),
        Mistake(
            "The second division is rounded down",
            ">> alone drops the fraction. Round to the nearest, a half away from zero.",
            _exchange(second=_down),
        ),
        Mistake(
            "The second division is cut off towards zero",
            "Round to the nearest, a half away from zero: add half of the divisor to the absolute value first.",
            _exchange(second=_towards_zero),
        ),
        Mistake(
            "Nothing is rounded",
            ">> alone rounds down, and here it does so twice. On average a result is then about 0.5 too low.",
            _exchange(_down, _down),
        ),
        Mistake(
            "The second division rounds half to even",
            "So does torch.round. gemmlowp takes a half away from zero: 2.5 becomes 3 and -2.5 becomes -3.",
            _exchange(second=_half_even),
        ),
        Mistake(
            "Both divisions round half to even",
            "So does torch.round. gemmlowp takes a half up in the product, and away from zero in the shift.",
            _exchange(_half_even, _half_even),
        ),
        Mistake(
            "The product wraps around in 32 bits",
            "accumulator * multiplier needs up to 63 bits. Convert the accumulator with .to(torch.int64) first.",
            _product_wraps,
        ),
    ),
    hints=(
        "Leave real numbers behind: after .to(torch.int64) the product fits, and x >> n is floor(x / 2^n). What must "
        "be added before the shift so that it becomes the nearest whole number?",
        "(x + half) >> n with half = 2^(n-1) takes an exact half up, for negative x, too: -1.5 becomes -1. Away from "
        "zero means: the same on the absolute value, then the sign. For n = 0 there is nothing to add; "
        "1 << n >> 1 is 0 then.",
        "A neighbour: prices in cents, first to whole tens (a 5 goes up), then to whole hundreds (a 50 goes away from "
        "zero).\n"
        "  -145: (-145 + 5) // 10 = -14 tens;  14 tens and 5 are 19, 19 // 10 = 1, so -1 hundred\n"
        "   145: ( 145 + 5) // 10 =  15 tens;  15 + 5 = 20, 20 // 10 = 2, so 2 hundreds\n"
        "  -155: (-155 + 5) // 10 = -15 tens;  15 + 5 = 20, 20 // 10 = 2, so -2 hundreds\n"
        "Rounded once, 145 would have given 1.",
    ),
)
