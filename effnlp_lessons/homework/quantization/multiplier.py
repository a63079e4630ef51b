"""Exercise 3 of notebook 03: a real multiplier as an integer and a shift.

Jacob et al. 2017 (arXiv 1712.05877, sec. 2.2): M = 2^-n M0 with M0 in [0.5, 1). They keep M0 as a 32-bit integer with
31 bits behind the point; here the number of bits is free.
"""

import math
from collections.abc import Callable

import torch
from torch import Generator

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def fixed_point_multiplier(multiplier: float, bits: int) -> tuple[int, int]:
    """(m, n) with multiplier = m 2^-bits 2^-n, m the nearest integer in 2^(bits-1) .. 2^bits - 1.

    n is negative for a multiplier of 1 and more.
    """
    m0, exponent = math.frexp(multiplier)  # multiplier = m0 2^exponent, m0 in [0.5, 1)
    m = round(m0 * 2**bits)
    if m == 2**bits:  # m0 was rounded up to 1
        return m // 2, -exponent - 1
    return m, -exponent


def _exchange(
    integer: Callable[[float, int], int] = lambda m0, bits: round(m0 * 2**bits),
    overflow: Callable[[int, int, int], tuple[int, int]] = lambda m, n, bits: (m // 2, n - 1),
    shift: Callable[[int], int] = lambda n: n,
    split: Callable[[float], tuple[float, int]] = math.frexp,
) -> Answer:
    """The answer with one step exchanged, for the mistakes.

    Args:
        integer: of (M0, bits).
        overflow: (m, n) where m is 2^bits, of (m, n, bits).
        split: M0 and exponent of the multiplier.
    """

    def answer(multiplier: float, bits: int) -> tuple[int, int]:
        m0, exponent = split(multiplier)
        m, n = integer(m0, bits), -exponent
        if m == 2**bits:
            m, n = overflow(m, n, bits)
        return m, shift(n)

    return answer


def _from_one_to_two(multiplier: float, bits: int) -> tuple[int, int]:
    """M0 in [1, 2), as in a floating-point number."""
    m0, exponent = math.frexp(multiplier)
    return round(2 * m0 * 2**bits), 1 - exponent


def _never_shifted_left(multiplier: float, bits: int) -> tuple[int, int]:
    if multiplier < 1:
        return fixed_point_multiplier(multiplier, bits)
    return round(multiplier * 2**bits), 0


def _shift_with_the_bits(multiplier: float, bits: int) -> tuple[int, int]:
    m, n = fixed_point_multiplier(multiplier, bits)
    return m, n + bits


def _draw(low: float, high: float, bits: tuple[int, int]) -> Callable[[Generator], tuple]:
    """A multiplier 2^x with x drawn between low and high, far enough from a half of the last bit."""

    def draw(generator: Generator) -> tuple:
        k = whole_number(*bits, generator)
        while True:
            x = low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()
            last_bits = math.frexp(2.0**x)[0] * 2**k % 1
            if 0.1 < last_bits < 0.4 or 0.6 < last_bits < 0.9:
                return 2.0**x, k

    return draw


def _just_below(generator: Generator) -> tuple:
    """A multiplier just below a power of 2, not above 1, so that M0 rounds up to 1."""
    bits = whole_number(4, 31, generator)
    missing = whole_number(10, 40, generator) / 100  # of a last bit
    return (2**bits - missing) / 2**bits * 2.0 ** -whole_number(0, 5, generator), bits


FIXED_POINT_MULTIPLIER = Exercise(
    id="quantization.fixed_point_multiplier",
    title="a multiplier without real numbers",
    minutes=15,
    difficulty=2,
    reference=fixed_point_multiplier,
    properties=(
        Property("by hand: 0.3 with 4 bits", lambda generator: (0.3, 4), times=1),
        Property(
            "a power of 2, 31 bits",
            lambda generator: (2.0 ** -whole_number(1, 9, generator), 31),
            times=2,
        ),
        Property("a multiplier below 1, 31 bits as in the paper", _draw(-12, 0, (31, 31)), times=2),
        Property("a multiplier below 1, few bits", _draw(-12, 0, (4, 14)), times=3),
        Property("just below a power of 2: M0 is rounded up to 1", _just_below, times=2),
        Property("a multiplier above 1: the shift is negative", _draw(0.1, 5, (7, 31)), times=2),
    ),
    mistakes=(
        Mistake(
            "M0 may round up to 2^bits",
            "0.999 with 4 bits gives round(15.98) = 16, which takes one bit more than there are: with 31 bits it "
            "overflows an int32. Halve it, and shift by one less.",
            _exchange(overflow=lambda m, n, bits: (m, n)),
        ),
        Mistake(
            "Rounded up to 2^bits, and the shift goes the wrong way",
            "Half as large a number must be shifted to the right by one less, not by one more.",
            _exchange(overflow=lambda m, n, bits: (m // 2, n + 1)),
        ),
        Mistake(
            "Rounded up to 2^bits, and the shift stays",
            "You halve the integer and forget the shift: the multiplier is half as large as it should be.",
            _exchange(overflow=lambda m, n, bits: (m // 2, n)),
        ),
        Mistake(
            "Rounded up to 2^bits, then cut to 2^bits - 1",
            "The multiplier is nearer to the power of 2 than to that: halve the integer, and shift by one less.",
            _exchange(overflow=lambda m, n, bits: (m - 1, n)),
        ),
        Mistake(
            "The shift has the wrong sign",
            "n counts a shift to the right: M = 2^-n M0. A small multiplier has a large n. math.frexp gives -n.",
            _exchange(shift=lambda n: -n),
        ),
        Mistake(
            "M0 between 1 and 2",
            "So it is in floating-point numbers. Here M0 is in [0.5, 1), or its integer needs one bit more than there "
            "are.",
            _from_one_to_two,
        ),
        Mistake(
            "M0 is cut off, not rounded",
            "int() drops what is behind the last bit, so that every multiplier is too small. Use round().",
            _exchange(lambda m0, bits: math.floor(m0 * 2**bits)),
        ),
        Mistake(
            "One bit is kept for the sign",
            "`bits` are the bits behind the point; with 31 of them and the sign an int32 is full. You use bits - 1, "
            "and the product comes out half as large.",
            _exchange(lambda m0, bits: round(m0 * 2 ** (bits - 1))),
        ),
        Mistake(
            "Multiplied by 2^bits - 1",
            "A shift divides by a power of 2, so M0 is multiplied by one: 2^bits.",
            _exchange(lambda m0, bits: round(m0 * (2**bits - 1))),
        ),
        Mistake(
            "A multiplier above 1 is not brought down",
            "Then the integer needs more bits than there are. Halve until it is below 1: the shift becomes negative, "
            "which is a shift to the left.",
            _never_shifted_left,
        ),
        Mistake(
            "The shift is never negative",
            "M = 2^-n M0 with M0 below 1: a multiplier of 1 and more needs n < 0, a shift to the left.",
            _exchange(shift=lambda n: max(n, 0)),
        ),
        Mistake(
            "The multiplier is not brought to [0.5, 1)",
            "round(M 2^bits) alone keeps few bits of a small multiplier: 0.001 with 14 bits would be 16. Bring M to "
            "[0.5, 1) first and count the doublings.",
            _exchange(split=lambda multiplier: (multiplier, 0)),
        ),
        Mistake(
            "The shift contains the bits",
            "n is what remains after 2^-bits: multiplier = m 2^-bits 2^-n.",
            _shift_with_the_bits,
        ),
    ),
    hints=(
        "Double 0.3 until it is in [0.5, 1), and count: that is n. Then how many sixteenths is it?",
        "math.frexp(0.3) gives (0.6, -1), since 0.3 = 0.6 * 2^-1. m is round(0.6 * 2^bits). Which values of M0 make m "
        "equal to 2^bits, and what is the same number with an integer half as large?",
        "A neighbour in the decimal system: 0.0372 as two digits d and a shift n, 0.0372 ~ d 10^-2 10^-n, d in 10 .. "
        "99.\n"
        "  0.0372 = 0.372 * 10^-1, so n = 1, and d = round(0.372 * 100) = 37:  0.37 * 10^-1\n"
        "  0.997  = 0.997 * 10^0,  so n = 0, and d = round(99.7) = 100: three digits!\n"
        "           a tenth of it, d = 10, and n = -1:                         0.10 * 10^1\n"
        "  37.2   = 0.372 * 10^2,  so n = -2, and d = 37",
    ),
)
