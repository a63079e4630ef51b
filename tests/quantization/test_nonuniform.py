"""Any levels: the definition by a loop, the even grid as a special case, Lloyd-Max against every partition."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effnlp_lessons.quantization.nonuniform import (
    linear_levels,
    lloyd_max,
    midpoints,
    nearest_level,
    piecewise_constant,
    power_of_two_levels,
    quantile_levels,
)
from effnlp_lessons.quantization.quantizers import affine_quantizer, symmetric_quantizer


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------------- definition

small = st.integers(-6, 6).map(float)  # so that numbers meet thresholds


@given(st.lists(small, max_size=30), st.lists(small, max_size=6))
def test_the_definition_by_a_loop(z, thresholds):
    thresholds = sorted(thresholds)
    levels = [float(10 * j) for j in range(len(thresholds) + 1)]
    edges = [-math.inf, *thresholds, math.inf]
    expected = [next(q for q, a, b in zip(levels, edges, edges[1:], strict=False) if a < x <= b) for x in z]
    found = piecewise_constant(torch.tensor(z), torch.tensor(thresholds), torch.tensor(levels))
    assert found.tolist() == expected


def test_a_cell_is_closed_on_the_right():
    thresholds, levels = torch.tensor([0.0, 1.0]), torch.tensor([5.0, 6.0, 7.0])
    z = torch.tensor([[-math.inf, -1, 0.0], [1e-30, 1.0, 1.0001]])
    assert piecewise_constant(z, thresholds, levels).tolist() == [[5, 5, 5], [6, 6, 7]]


@given(st.integers(2, 8), st.floats(-3, 3, width=32), st.floats(0.125, 3, width=32), st.booleans())
def test_the_even_grid_is_a_special_case(bits, low, width, symmetric):
    low = torch.tensor(low, dtype=torch.float64)
    affine = affine_quantizer(low, low + width, bits)
    quantizer = symmetric_quantizer(low.abs() + width, bits) if symmetric else affine
    levels = linear_levels(quantizer)
    steps = levels.diff()
    torch.testing.assert_close(steps, quantizer.scale.expand_as(steps), rtol=1e-9, atol=0)
    z = 3 * normal(500, seed=bits)  # no ties
    # S (q - Z) from one place or the other: the same operation on the same numbers
    assert torch.equal(nearest_level(z, levels), quantizer(z))


def test_at_a_tie_the_lower_level_or_the_even_code():
    quantizer = symmetric_quantizer(torch.tensor(7.0), 4)  # S = 1
    ties = torch.arange(-6.5, 7)
    lower = nearest_level(ties, linear_levels(quantizer))
    assert torch.equal(lower, ties - 0.5)
    differ = quantizer(ties) != lower
    assert torch.equal(differ, lower % 2 == 1) and differ.double().mean() == 0.5
    assert ties[differ].tolist() == [-6.5, -4.5, -2.5, -0.5, 1.5, 3.5, 5.5]


def test_nearest_is_nearest():
    levels, z = normal(9, seed=1).sort().values, 2 * normal(200)
    distance = (z[:, None] - levels).abs()
    assert torch.equal((nearest_level(z, levels) - z).abs(), distance.min(-1).values)
    assert nearest_level(z, levels[:1]).unique().tolist() == levels[:1].tolist()
    assert nearest_level(torch.zeros(2, 0), torch.zeros(3)).shape == (2, 0)


# ------------------------------------------------------------------------------------------------- levels


def test_powers_of_two():
    assert power_of_two_levels(1.0, 2).tolist() == [-1, 0, 1]
    assert power_of_two_levels(1.0, 3).tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    assert len(power_of_two_levels(0.3, 8)) == 255
    # the nearest power of two: 1.5 is the middle between 1 and 2
    assert [power_of_two_levels(x, 2).max().item() for x in (0.76, 1.49, 1.51, 2.9, 3.1)] == [1, 1, 2, 2, 4]
    for level in power_of_two_levels(0.7, 5).abs().tolist():
        assert level == 0 or math.frexp(level)[0] == 0.5


def test_quantiles_give_equal_shares():
    values = normal(4096) ** 3
    for bits in (2, 3, 4):
        levels = quantile_levels(values, bits)
        places = torch.tensor([(j + 0.5) / 2**bits for j in range(2**bits)], dtype=torch.float64)
        torch.testing.assert_close(levels, torch.quantile(values, places))
    cells = torch.bucketize(values, torch.quantile(values, torch.arange(1, 8, dtype=torch.float64) / 8))
    assert cells.bincount().tolist() == [512] * 8
    found = [(levels := quantile_levels(values, 3)), torch.bucketize(values, midpoints(levels)).bincount()][1]
    assert found.min() > 200  # thresholds are midpoints of levels, not quantiles: shares are nearly equal
    assert quantile_levels(torch.tensor([3.0]), 2).tolist() == [3, 3, 3, 3]


# ---------------------------------------------------------------------------------------------- Lloyd-Max


def least_error(values, levels):
    """The least mean squared error of a partition into `levels` intervals of sorted numbers, by trying all."""
    ordered = sorted(values.tolist())
    best = math.inf
    for cuts in combinations(range(1, len(ordered)), levels - 1):
        parts = [ordered[a:b] for a, b in zip((0, *cuts), (*cuts, len(ordered)), strict=True)]
        error = sum((x - sum(part) / len(part)) ** 2 for part in parts for x in part)
        if error < best:
            best, means = error, [sum(part) / len(part) for part in parts]
    return best / len(ordered), torch.tensor(means, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(6))
def test_lloyd_max_against_every_partition(seed):
    values = normal(13, seed=seed)
    best, means = least_error(values, 4)
    levels, errors = lloyd_max(values, 2, start=means)
    torch.testing.assert_close(levels, means)  # the least error is one of its fixed points
    assert errors[-1] == pytest.approx(best, rel=1e-9)
    found = [lloyd_max(values, 2)[1][-1]]
    for other in range(30):
        start = values[torch.randperm(13, generator=torch.Generator().manual_seed(other))[:4]].sort().values
        found.append(lloyd_max(values, 2, start)[1][-1])
    assert min(found) == pytest.approx(best, rel=1e-9) and min(found) >= best * (1 - 1e-9)


def test_the_error_never_rises_and_both_conditions_hold_at_the_end():
    values = normal(3000, seed=2) ** 3
    levels, errors = lloyd_max(values, 3, iterations=2000)
    assert all(after <= before * (1 + 1e-12) for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.5 * errors[0]
    rounded = nearest_level(values, levels)
    assert errors[-1] == pytest.approx((rounded - values).square().mean().item(), rel=1e-9)
    for level in levels:
        # it stops when an iteration gains a billionth of the error
        assert values[rounded == level].mean().item() == pytest.approx(level.item(), abs=1e-3)


def gaussian_levels(count):
    """Lloyd and Max for the density itself: the mean of a cell is (phi(a) - phi(b)) / (P(b) - P(a))."""
    levels = torch.linspace(-2, 2, count, dtype=torch.float64)
    for _ in range(3000):
        edges = torch.cat([torch.tensor([-40.0]), (levels[1:] + levels[:-1]) / 2, torch.tensor([40.0])]).double()
        density = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        levels = -density.diff() / torch.special.ndtr(edges).diff()
    return levels


def test_lloyd_max_of_a_gaussian():
    quantiles = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    values = torch.special.ndtri(quantiles)
    for bits in (2, 3):
        levels, _ = lloyd_max(values, bits, iterations=1000)
        # 100,000 evenly spread numbers end at 4.4 sigma: that moves the outermost level
        torch.testing.assert_close(levels, gaussian_levels(2**bits), rtol=0, atol=2e-3)
    assert gaussian_levels(4)[2:].tolist() == pytest.approx([0.4528, 1.510], abs=5e-4)  # Max's table


def test_lloyd_max_beats_even_levels():
    values = normal(20_000) ** 3
    for bits in (2, 3, 4):
        _, errors = lloyd_max(values, bits)
        even = affine_quantizer(values.min(), values.max(), bits)
        assert errors[-1] < 0.5 * (even(values) - values).square().mean()


def test_one_iteration_by_hand():
    values = torch.tensor([20.0, 0, 1, 2, 10])
    levels, errors = lloyd_max(values, 2, torch.tensor([0.0, 2, 10, 20]), iterations=1)
    assert levels.tolist() == [0.5, 2, 10, 20]  # 1 lies on a threshold and belongs to the cell below
    assert errors == pytest.approx([1 / 5, 0.5 / 5])


def test_few_different_numbers_are_exact():
    values = torch.tensor([[1.0, 1, 5, 5], [2, 2, 1, 7]])
    levels, errors = lloyd_max(values, 2, torch.tensor([0, 2.4, 4.6, 9]))
    assert errors[-1] == 0 and levels.dtype == torch.float32 and set(levels.tolist()) == {1, 2, 5, 7}
    levels, errors = lloyd_max(torch.full((6,), 3.0), 2)
    assert levels.tolist() == [3, 3, 3, 3] and errors[-1] == 0
    empty = torch.tensor([-100.0, -90.0, 1.0, 6.0])  # nothing is near the first two
    levels, _ = lloyd_max(values, 2, empty)
    assert levels[:2].tolist() == [-100, -90]


# ---------------------------------------------------------------------------------------------- bad input


def test_bad_input():
    z = torch.zeros(3)
    with pytest.raises(ValueError, match="thresholds must be a vector .* rising"):
        piecewise_constant(z, torch.tensor([1.0, 0.0]), torch.zeros(3))
    with pytest.raises(ValueError, match="one level more"):
        piecewise_constant(z, torch.tensor([0.0, 1.0]), torch.zeros(2))
    with pytest.raises(ValueError, match="NaN"):
        nearest_level(torch.tensor([math.nan]), torch.zeros(2))
    for levels in (torch.tensor([1.0, 0.0]), torch.zeros(0), torch.zeros(2, 2), torch.tensor([math.nan, 1.0])):
        with pytest.raises(ValueError, match="levels must be"):
            midpoints(levels)
    with pytest.raises(ValueError, match="one grid"):
        linear_levels(symmetric_quantizer(torch.ones(2), 4))
    for largest in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="largest"):
            power_of_two_levels(largest, 4)
    for call in (lambda v, b: quantile_levels(v, b), lambda v, b: lloyd_max(v, b), power_of_two_levels):
        with pytest.raises(ValueError, match="bits"):
            call(torch.tensor(1.0), 1)
    for values in (torch.zeros(0), torch.tensor([1.0, math.nan]), torch.tensor([math.inf])):
        for call in (quantile_levels, lloyd_max):
            with pytest.raises(ValueError, match="values must hold"):
                call(values, 2)
    for start in (torch.tensor([0.0, 1.0, 2.0]), torch.arange(5.0), torch.tensor([0.0, 2.0, 1.0, 3.0])):
        with pytest.raises(ValueError, match="start must"):
            lloyd_max(z, 2, start)
