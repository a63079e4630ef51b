"""Fixed point against gemmlowp's own results, and against Python's integers of any size."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effnlp_lessons.quantization.fixed_point import (
    quantize_multiplier,
    requantize,
    rounding_divide_by_pot,
    saturating_rounding_doubling_high_mul,
)

INT32 = st.integers(-(2**31), 2**31 - 1) | st.sampled_from([-(2**31), 2**31 - 1, -1, 0, 1])
# lines "SRDHM a b result" and "RDBP x exponent result", printed by a program compiled from gemmlowp's header
VECTORS = [line.split() for line in Path(__file__).with_name("gemmlowp_vectors.txt").read_text().splitlines()]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_gemmlowp_vectors():
    ours = {"SRDHM": saturating_rounding_doubling_high_mul, "RDBP": rounding_divide_by_pot}
    assert len(VECTORS) == 196
    for name, function in ours.items():
        first, second, result = (int32(*map(int, column)) for column in list(zip(*rows(name), strict=True))[1:])
        assert torch.equal(function(first, second), result)


def rows(name):
    return [row for row in VECTORS if row[0] == name]


def test_the_two_rules_round_a_half_differently():
    x = int32(1, -1, 3, -3)  # halves, after division by 2
    assert saturating_rounding_doubling_high_mul(x, int32(2**30)).tolist() == [1, 0, 2, -1]  # up
    assert rounding_divide_by_pot(x, 1).tolist() == [1, -1, 2, -2]  # away from zero


@given(INT32, INT32)
def test_high_mul_is_exact(a, b):
    expected = min((a * b + 2**30) // 2**31, 2**31 - 1)
    assert saturating_rounding_doubling_high_mul(int32(a), int32(b)).tolist() == [expected]


@given(INT32, st.integers(0, 31))
def test_division_is_exact(x, exponent):
    sign = -1 if x < 0 else 1
    expected = sign * ((2 * abs(x) + 2**exponent) // 2 ** (exponent + 1))
    assert rounding_divide_by_pot(int32(x), exponent).tolist() == [expected]


@pytest.mark.parametrize(
    ("multiplier", "expected"),
    [
        (0.5, (1_073_741_824, 0)),
        (0.25, (1_073_741_824, 1)),
        (0.3, (1_288_490_189, 1)),
        (0.001, (1_099_511_628, 9)),
        (math.sqrt(0.5), (1_518_500_250, 0)),
        (0.99999999999, (1_073_741_824, -1)),  # rounds up to 1
        (1.0, (1_073_741_824, -1)),
        (3.0, (1_610_612_736, -2)),
        (2.0**30, (1_073_741_824, -31)),
        (2.0**-32, (1_073_741_824, 31)),
        (2.0**-33, (0, 0)),
    ],
)
def test_multiplier(multiplier, expected):
    q, shift = quantize_multiplier(multiplier)
    assert (q.item(), shift.item()) == expected
    assert q.dtype == shift.dtype == torch.int32


@given(st.floats(2.0**-32, 2.0**30))
def test_multiplier_is_the_nearest_of_31_bits(multiplier):
    q, shift = (int(x) for x in quantize_multiplier(multiplier))
    assert 2**30 <= q < 2**31
    exact = Fraction(multiplier) * 2 ** (31 + shift)
    # half a unit; the unit halves where M0 rounds up to 1
    assert abs(exact - q) <= Fraction(1, 2)


def test_multipliers_of_rows_are_those_of_each():
    multipliers = torch.tensor([[0.5, 7.25], [1e-6, 0.99999999999]], dtype=torch.float64)
    q, shift = quantize_multiplier(multipliers)
    for i in range(4):
        assert (q.flatten()[i], shift.flatten()[i]) == quantize_multiplier(multipliers.flatten()[i].item())


@given(INT32, st.floats(2.0**-34, 2.0**30), st.integers(-128, 127))
def test_requantize_is_the_rule_and_one_code_from_real_numbers(accumulator, multiplier, zero_point):
    q, shift = quantize_multiplier(multiplier)
    # Python's integers: shift left and saturate, high product, shift right
    x = max(-(2**31), min(2**31 - 1, accumulator * 2 ** max(0, -int(shift))))
    x = min((x * int(q) + 2**30) // 2**31, 2**31 - 1)
    right = max(0, int(shift))
    x = (-1 if x < 0 else 1) * ((2 * abs(x) + 2**right) // 2 ** (right + 1)) + zero_point
    result = requantize(int32(accumulator), q, shift, zero_point, -128, 127)
    assert result.dtype == torch.int8
    assert result.item() == max(-128, min(127, x))
    real = max(-128, min(127, round(accumulator * multiplier) + zero_point))
    assert abs(result.item() - real) <= 1


@pytest.fixture
def differences():
    """A function: multipliers -> requantize less the rounded real product, for random accumulators below 2^20."""

    def compare(multiplier):
        generator = torch.Generator().manual_seed(1)
        accumulator = torch.randint(-(2**20), 2**20, multiplier.shape, generator=generator, dtype=torch.int32)
        result = requantize(accumulator, *quantize_multiplier(multiplier), 0, -(2**31), 2**31 - 1)
        return (result - torch.round(accumulator * multiplier)).int()

    return compare


def uniform(low, high, count=200_000):
    generator = torch.Generator().manual_seed(0)
    return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)


def test_rounding_twice_differs_by_one_from_rounding_once(differences):
    difference = differences(uniform(1e-6, 1))
    assert difference.abs().max() == 1
    share = (difference != 0).double().mean()
    assert 0.05 < share < 0.15
    # the sum over n of 2^-(n + 1), the share of n, times 2^-(n + 1), is 1 / 12; four standard errors
    assert abs(share - 1 / 12) < 4 * (1 / 12 / 200_000) ** 0.5


@pytest.mark.parametrize("n", range(1, 6))
def test_rounding_twice_differs_in_one_of_2_to_the_n_plus_1(differences, n):
    share = (differences(uniform(2.0 ** -(n + 1), 2.0**-n)) != 0).double().mean()
    expected = 2.0 ** -(n + 1)
    assert abs(share - expected) < 5 * (expected / 200_000) ** 0.5  # standard errors


def test_one_rounding_where_nothing_is_shifted(differences):
    assert (differences(uniform(0.5, 1)) != 0).double().mean() < 1e-3  # what the 31 bits of M lack


def test_a_clamp_narrower_than_the_type_is_the_fused_activation():
    q, shift = quantize_multiplier(0.5)
    result = requantize(int32(-100, 20, 4_000), q, shift, -10, -10, 50)  # ReLU: not below Z; at most 60 above it
    assert result.tolist() == [-10, 0, 50]


@pytest.mark.parametrize(
    ("low", "high", "dtype"), [(-128, 127, torch.int8), (0, 255, torch.uint8), (-1000, 5, torch.int32)]
)
def test_dtype_of_the_range(low, high, dtype):
    q, shift = quantize_multiplier(0.5)
    result = requantize(int32(-(2**31), 2**31 - 1), q, shift, 0, low, high)
    assert result.dtype == dtype
    assert result.tolist() == [low, high]


def test_nothing_wraps_at_the_ends_of_int32():
    ends = int32(-(2**31), 2**31 - 1)
    for multiplier in (1 - 2.0**-31, 4.0):  # the largest without a shift to the left, and one with
        q, shift = quantize_multiplier(multiplier)
        for zero_point in (100, -100):
            assert requantize(ends, q, shift, zero_point, -128, 127).tolist() == [-128, 127]


def test_every_column_has_its_own_multiplier():
    q, shift = quantize_multiplier(torch.tensor([0.5, 2.0, 1e-3]))
    accumulator = torch.arange(-6, 6, dtype=torch.int32).mul_(10).view(2, 2, 3)
    result = requantize(accumulator, q, shift, 3, -128, 127)
    for column in range(3):
        alone = requantize(accumulator[..., column], q[column], shift[column], 3, -128, 127)
        assert torch.equal(result[..., column], alone)


def test_inputs_are_left_as_they_were_and_empty_ones_pass():
    accumulator = torch.arange(-6, 6, dtype=torch.int32)
    for multiplier in (0.3, 5.0):
        q, shift = quantize_multiplier(multiplier)
        requantize(accumulator, q, shift, 3, -128, 127)
    assert accumulator.tolist() == list(range(-6, 6))
    assert requantize(accumulator[:0], q, shift, 3, -128, 127).shape == (0,)


@pytest.mark.parametrize("multiplier", [0.0, -0.5, math.inf, math.nan, 2.0**31, 2.0**31 - 1e-6])
def test_bad_multiplier(multiplier):
    with pytest.raises(ValueError, match="multiplier must be"):
        quantize_multiplier(multiplier)


@pytest.mark.parametrize("exponent", [-1, 32])
def test_bad_exponent(exponent):
    with pytest.raises(ValueError, match="exponent must be"):
        rounding_divide_by_pot(int32(1), exponent)


def test_other_bad_input():
    q, shift = quantize_multiplier(0.5)
    for call in (
        lambda: saturating_rounding_doubling_high_mul(torch.tensor([1]), int32(1)),
        lambda: saturating_rounding_doubling_high_mul(int32(1), torch.tensor([1.0])),
        lambda: rounding_divide_by_pot(torch.tensor([1]), 1),
        lambda: requantize(torch.tensor([1]), q, shift, 0, -128, 127),
    ):
        with pytest.raises(ValueError, match="must be int32"):
            call()
    with pytest.raises(ValueError, match="shift must be"):
        requantize(int32(1), q, shift - 40, 0, -128, 127)
    for zero_point, low, high in ((0, 5, 4), (0, -(2**31) - 1, 4), (10, -(2**31), 4)):
        with pytest.raises(ValueError, match="not a range of int32"):
            requantize(int32(1), q, shift, zero_point, low, high)
