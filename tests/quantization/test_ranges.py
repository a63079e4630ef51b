"""Rules for ranges against sorting, torch.ao's observers, a search by hand, integrals, published constants."""

import math

import pytest
import torch
from torch.ao.quantization import MinMaxObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver
from transformers.models.ibert.quant_modules import get_percentile_min_max

from effnlp_lessons.quantization.quantizers import (
    affine_quantizer,
    integer_range,
    min_max,
    quantize_matrix,
    symmetric_quantizer,
)
from effnlp_lessons.quantization.ranges import (
    MovingAverageRange,
    aciq_gaussian,
    aciq_laplace,
    gaussian_clipping,
    laplace_clipping,
    mean_squared_error,
    percentile,
)

BITS = (2, 3, 4, 5, 6, 8)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laplace(*shape, seed=0, dtype=torch.float64):
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs())  # b = 1


# ------------------------------------------------------------------------------- minimum and maximum


def test_min_max_is_what_the_observers_find():
    x = normal(7, 33)
    whole, rows = MinMaxObserver(), PerChannelMinMaxObserver(ch_axis=0)
    whole(x), rows(x)
    low, high = min_max(x.flatten()[None])
    assert low.item() == whole.min_val.item() and high.item() == whole.max_val.item()
    low, high = min_max(x)
    assert torch.equal(low, rows.min_val) and torch.equal(high, rows.max_val)


# -------------------------------------------------------------------------------------------- percentile


@pytest.mark.parametrize("share", [0.501, 0.9, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("numbers", [1, 2, 13, 500, 1001])
def test_percentile_by_sorting(share, numbers):
    values = normal(3, numbers, seed=numbers)
    low, high = percentile(share)(values)
    k = max(1, round(share * numbers))
    for i, row in enumerate(values.tolist()):
        assert high[i].item() == sorted(row)[k - 1]
        assert low[i].item() == sorted(row, reverse=True)[k - 1]


@pytest.mark.parametrize("share", [0.9, 0.99, 0.999])
def test_percentile_is_that_of_i_bert(share):
    values = normal(1, 4001)
    low, high = percentile(share)(values)
    theirs = get_percentile_min_max(values[0], 100 * (1 - share), 100 * share, output_tensor=True)
    assert (low.item(), high.item()) == (theirs[0].item(), theirs[1].item())


def test_percentile_clips_a_share_of_either_side():
    values = torch.arange(1000.0)[None]
    assert [bound.item() for bound in percentile(0.99)(values)] == [10, 989]
    assert [bound.item() for bound in percentile(1.0)(values)] == [0, 999]
    # -5 is an outlier, 0.6 is not
    values = torch.cat([torch.linspace(-0.5, 0.6, 999), torch.tensor([-5.0])])[None]
    codes = quantize_matrix(values, 4, "row", ranges=percentile(0.999))
    # the percentile also drops the last of the 999: 0.6 less a thousandth of the width
    assert codes.scale.item() == pytest.approx(0.6 / 7, rel=0.01) and codes.codes[0, -1] == -7


@pytest.mark.parametrize("share", [0.5, 0, -1, 1.01, math.nan])
def test_percentile_refuses(share):
    with pytest.raises(ValueError, match="share"):
        percentile(share)


# ----------------------------------------------------------------------------------- mean squared error


def fake(value, low, high, bits, symmetric):
    """One number on the grid, in plain Python; round() is half to even."""
    q_min, q_max = integer_range(bits, symmetric)
    if symmetric:
        scale, zero_point = max(abs(low), abs(high)) / q_max, 0
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / q_max
        zero_point = round(-low / scale)
    return scale * (min(max(round(value / scale) + zero_point, q_min), q_max) - zero_point)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 5])
def test_least_error_by_trying_every_candidate(bits, symmetric):
    values = torch.cat([normal(4, 37, seed=bits).double() ** 3, 2 + normal(1, 37).double()])
    low, high = mean_squared_error(bits, symmetric, candidates=23)(values)
    for i, row in enumerate(values.tolist()):
        ends = min(row), max(row)
        if symmetric:
            ends = -max(map(abs, row)), max(map(abs, row))
        errors = {}
        for step in range(1, 24):
            bounds = [step / 23 * end for end in ends]
            errors[step] = sum((fake(z, *bounds, bits, symmetric) - z) ** 2 for z in row)
        best = min(errors, key=errors.get)
        assert [low[i].item(), high[i].item()] == pytest.approx([best / 23 * end for end in ends], rel=1e-12)


def test_least_error_is_never_above_that_of_the_full_range():
    values = laplace(20, 64, dtype=torch.float32)
    for bits in (2, 3, 4, 8):
        full = quantize_matrix(values, bits).dequantize()
        found = quantize_matrix(values, bits, ranges=mean_squared_error(bits)).dequantize()
        before, after = ((w - values).square().mean(-1) for w in (full, found))
        assert (after <= before).all()
        assert after.sum() < before.sum() * (0.5 if bits == 2 else 1)


def test_least_error_of_numbers_that_are_all_zero_or_equal():
    values = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]])
    for symmetric in (True, False):
        found = quantize_matrix(values, 4, symmetric=symmetric, ranges=mean_squared_error(4, symmetric))
        torch.testing.assert_close(found.dequantize(), values)


@pytest.mark.parametrize(("bits", "candidates"), [(1, 10), (9, 10), (4, 0)])
def test_least_error_refuses(bits, candidates):
    with pytest.raises(ValueError, match="bits" if candidates else "candidates"):
        mean_squared_error(bits, candidates=candidates)


# -------------------------------------------------------------------------------------------------- ACIQ


def test_aciq_constants():
    # printed to two digits; the Gaussian ones to six in the published table
    assert [round(laplace_clipping(bits), 2) for bits in BITS] == [2.83, 3.90, 5.03, 6.20, 7.41, 9.90]
    published = [1.710635, 2.151593, 2.559136, 2.936201, 3.286914, 3.924035]
    assert [gaussian_clipping(bits) for bits in BITS] == pytest.approx(published, abs=1e-6)


def expected_error(density, alpha, bits):
    """2 int_alpha^inf (z - alpha)^2 f(z) dz + alpha^2 / (3 4^M), by the trapezoidal rule."""
    z = torch.linspace(alpha, 40, 200_001, dtype=torch.float64)
    return 2 * torch.trapezoid((z - alpha) ** 2 * density(z), z).item() + alpha**2 / (3 * 4**bits)


@pytest.mark.parametrize("bits", BITS)
def test_aciq_is_where_the_integral_is_least(bits):
    densities = {
        laplace_clipping: lambda z: torch.exp(-z.abs()) / 2,
        gaussian_clipping: lambda z: torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi),
    }
    for clipping, density in densities.items():
        alpha = clipping(bits)
        at = expected_error(density, alpha, bits)
        for other in (alpha - 0.05, alpha + 0.05):
            assert expected_error(density, other, bits) > at
        if clipping is laplace_clipping:  # the closed form, b = 1
            assert at == pytest.approx(2 * math.exp(-alpha) + alpha**2 / (3 * 4**bits), rel=1e-6)
        else:  # sigma = 1
            closed = (alpha**2 + 1) * math.erfc(alpha / math.sqrt(2)) + alpha**2 / (3 * 4**bits)
            closed -= math.sqrt(2 / math.pi) * alpha * math.exp(-(alpha**2) / 2)
            assert at == pytest.approx(closed, rel=1e-6)


def test_aciq_reaches_its_ratio_around_the_mean():
    for rule, draw, ratio in ((aciq_laplace, laplace, laplace_clipping), (aciq_gaussian, normal, gaussian_clipping)):
        values = 0.3 + 2 * draw(2, 100_000).double()
        low, high = rule(4)(values)
        # 100,000 numbers give b and sigma to 0.3 per cent; four times that
        torch.testing.assert_close((high - low) / 2, torch.full_like(low, 2 * ratio(4)), rtol=0.013, atol=0)
        torch.testing.assert_close((high + low) / 2, values.mean(-1))


def test_aciq_by_hand():
    values = torch.tensor([[-3.0, 0, 0, 0, 0, 0, 0, 3], [-2.0, 1, 1, 1, 1, 1, 1, 4]])
    low, high = aciq_gaussian(2)(values)  # sigma = sqrt(18 / 8) = 1.5
    reach = 1.710635 * 1.5
    assert [*low.tolist(), *high.tolist()] == pytest.approx([-reach, 1 - reach, reach, 1 + reach], abs=1e-5)
    low, high = aciq_laplace(2)(values)  # b = 6 / 8
    reach = 2.83 * 0.75  # the constant is known to two digits
    assert [*low.tolist(), *high.tolist()] == pytest.approx([-reach, 1 - reach, reach, 1 + reach], abs=0.005)


def test_aciq_stays_inside_the_numbers():
    values = torch.tensor([[-1.0, 0.0, 3.0], [2.0, 2.0, 2.0]])
    low, high = aciq_laplace(8)(values)
    assert low.tolist() == [-1, 2] and high.tolist() == [3, 2]


def test_aciq_comes_close_to_the_search_on_its_own_distribution():
    for rule, values in ((aciq_laplace, laplace(1, 50_000)), (aciq_gaussian, normal(1, 50_000).double())):
        for bits in (3, 4, 5):

            def error(ranges, bits=bits, values=values):
                found = quantize_matrix(values, bits, symmetric=False, ranges=ranges).dequantize()
                return (found - values).square().mean().item()

            searched = error(mean_squared_error(bits, symmetric=False))
            # its grid has one step more than ours, which shifts the optimum
            assert error(rule(bits)) < 1.15 * searched < error(min_max)


def test_aciq_refuses():
    for make in (aciq_laplace, aciq_gaussian, laplace_clipping, gaussian_clipping):
        with pytest.raises(ValueError, match="bits"):
            make(1)


# ---------------------------------------------------------------------------------------- moving average


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_moving_average_is_that_of_the_observer(rate):
    ours, theirs = MovingAverageRange(rate), MovingAverageMinMaxObserver(averaging_constant=rate)
    for step in range(25):
        x = normal(3, 5 + step, seed=step) * (1 + step % 4)
        assert ours(x) is x
        theirs(x)
        assert [bound.item() for bound in ours.bounds()] == [theirs.min_val.item(), theirs.max_val.item()]
    scale, zero_point = theirs.calculate_qparams()  # quint8
    quantizer = affine_quantizer(*ours.bounds(), 8)
    assert quantizer.zero_point == zero_point and torch.allclose(quantizer.scale, scale, rtol=1e-6)


def test_moving_average_begins_with_the_first_batch():
    average = MovingAverageRange()
    average(torch.tensor([2.0, 5.0]))
    assert [bound.item() for bound in average.bounds()] == [2, 5]
    average(torch.tensor([3.0, 4.0]))
    assert [bound.item() for bound in average.bounds()] == pytest.approx([2.01, 4.99])


def test_moving_average_stands_still_in_evaluation():
    average = MovingAverageRange().eval()
    average(torch.ones(3))
    with pytest.raises(ValueError, match="no batch"):
        average.bounds()
    average.update(torch.ones(3))
    average(torch.zeros(3))
    assert [bound.item() for bound in average.bounds()] == [1, 1]


def test_moving_average_goes_with_the_state_dict():
    average, other = MovingAverageRange(), MovingAverageRange()
    average(normal(9))
    other.load_state_dict(average.state_dict())
    for both in (average, other):
        both(normal(9, seed=1))
    assert other.bounds() == average.bounds()
    x = normal(4).requires_grad_()
    average(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(4)) and not average.low.requires_grad


@pytest.mark.parametrize("x", [torch.zeros(0), torch.tensor([1.0, math.nan]), torch.tensor([math.inf])])
def test_moving_average_refuses(x):
    average = MovingAverageRange()
    average(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="x must hold"):
        average(x)
    assert [bound.item() for bound in average.bounds()] == [1, 2]


@pytest.mark.parametrize("rate", [0, -0.1, 1.1])
def test_moving_average_refuses_rates(rate):
    with pytest.raises(ValueError, match="rate"):
        MovingAverageRange(rate)


def test_rules_keep_the_dtype():
    for rule in (min_max, percentile(0.9), mean_squared_error(4, candidates=3), aciq_laplace(4), aciq_gaussian(4)):
        for dtype in (torch.float32, torch.float64):
            low, high = rule(normal(3, 40).to(dtype))
            assert low.dtype == high.dtype == dtype and low.shape == high.shape == (3,)
            assert (low <= high).all()
    assert symmetric_quantizer(torch.tensor(1.0), 4).scale.dtype == torch.float32
