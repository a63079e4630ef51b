"""The exercises of notebook 03: references against torch, exact arithmetic and the library, wrong answers by name.

The wrong answers are written here anew, as a student would write them; none uses a `Mistake` of the exercise.
"""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from effnlp_lessons.homework import HomeworkError, check
from effnlp_lessons.homework.quantization.codes import quantize
from effnlp_lessons.homework.quantization.groups import group_quantize
from effnlp_lessons.homework.quantization.linear import INTEGER_LINEAR, integer_linear
from effnlp_lessons.homework.quantization.multiplier import fixed_point_multiplier
from effnlp_lessons.homework.quantization.ranges import scale_and_zero_point
from effnlp_lessons.homework.quantization.requantize import requantize
from effnlp_lessons.quantization import fixed_point
from effnlp_lessons.quantization.quantizers import affine_quantizer, quantize_matrix


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(low, high, shape, seed=0):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------- references


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    # gemmlowp's own choice for uint8
    [(-0.5, 3, 0.01372549, 36), (0.2, 3, 0.01176471, 0), (-3, -1, 0.01176471, 255), (-1, 1, 0.00784313725, 128)],
)
def test_scale_and_zero_point_of_gemmlowp(low, high, scale, zero_point):
    given = scale_and_zero_point(low, high, 8)
    assert given == (pytest.approx(scale, rel=1e-6), zero_point)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("low", "high"), [(-0.71, 2.3), (0.4, 1.9), (-5.0, -0.3), (-0.02, 0.9), (0.0, 1.0)])
def test_scale_and_zero_point_are_the_observers_and_the_librarys(low, high, bits):
    scale, zero_point = scale_and_zero_point(low, high, bits)
    observer = torch.ao.quantization.MinMaxObserver(
        dtype=torch.quint8, qscheme=torch.per_tensor_affine, quant_min=0, quant_max=2**bits - 1
    )
    observer(torch.tensor([low, high]))
    theirs = observer.calculate_qparams()
    assert scale == pytest.approx(theirs[0].item(), rel=1e-6) and zero_point == theirs[1].item()
    ours = affine_quantizer(*torch.tensor([low, high], dtype=torch.float64), bits)
    assert scale == pytest.approx(ours.scale.item(), rel=1e-12) and zero_point == ours.zero_point.item()


@pytest.mark.parametrize("k", [0, 1, 2, 3, 6])
def test_a_zero_point_on_a_half_goes_to_the_even_code(k):
    assert scale_and_zero_point(-(k + 0.5) / 4, (15 - k - 0.5) / 4, 4) == (0.25, k + k % 2)


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_quantize_is_torchs_fake_quantization(bits):
    z = torch.cat([normal(40).float(), torch.arange(-9, 10) / 8])
    for scale, zero_point in ((0.25, 1), (0.25, 2), (2.0**-5, 2**bits - 1), (0.0713, 0)):
        ours = scale * (quantize(z, scale, zero_point, bits).float() - zero_point)
        theirs = torch.fake_quantize_per_tensor_affine(z, scale, zero_point, 0, 2**bits - 1)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, but an independent rule
def test_quantize_agrees_with_torchs_codes_away_from_halves():
    z = normal(500).float()
    codes = torch.quantize_per_tensor(z, 0.0217, 131, torch.quint8).int_repr()
    assert torch.equal(quantize(z, 0.0217, 131, 8), codes)


@pytest.mark.parametrize(
    ("multiplier", "expected"),
    [
        (0.5, (1073741824, 0)),
        (0.25, (1073741824, 1)),
        (0.3, (1288490189, 1)),
        (0.001, (1099511628, 9)),
        (0.99999999999, (1073741824, -1)),
    ],
)
def test_fixed_point_multiplier_of_known_numbers(multiplier, expected):
    assert fixed_point_multiplier(multiplier, 31) == expected
    theirs = fixed_point.quantize_multiplier(multiplier)
    assert expected == tuple(part.item() for part in theirs)


@pytest.mark.parametrize("bits", [3, 4, 7, 15, 31])
def test_fixed_point_multiplier_is_the_best_of_all_pairs(bits):
    for number in range(-12, 9):
        multiplier = 1.37**number
        m, n = fixed_point_multiplier(multiplier, bits)
        assert 2 ** (bits - 1) <= m < 2**bits
        unit = Fraction(2) ** (-bits - n)
        assert abs(Fraction(multiplier) - m * unit) <= unit / 2


def gemmlowp(accumulator, multiplier, shift):
    """The rule for one number, as the C++ reference writes it: nudges, and divisions that cut off towards zero."""
    product = accumulator * multiplier
    nudge = 2**30 if product >= 0 else 1 - 2**30
    high = int(Fraction(product + nudge, 2**31))  # C++ division cuts off towards zero
    mask = (1 << shift) - 1
    remainder, threshold = high & mask, (mask >> 1) + (1 if high < 0 else 0)
    return (high >> shift) + (1 if remainder > threshold else 0)


def test_requantize_is_gemmlowps_rule_and_the_librarys():
    accumulators = [*range(-40, 41), 2**31 - 1, 1 - 2**31, 123456789, -123456789]
    for multiplier in (2**30, 2**31 - 1, 1518500250, 3 * 2**29):
        for shift in (0, 1, 2, 3, 9, 31):
            tensor = torch.tensor(accumulators, dtype=torch.int32)
            given = requantize(tensor, multiplier, shift)
            assert given.dtype == torch.int32
            assert given.tolist() == [gemmlowp(number, multiplier, shift) for number in accumulators]
            m, n = (torch.tensor(part, dtype=torch.int32) for part in (multiplier, shift))
            theirs = fixed_point.requantize(tensor, m, n, 0, -(2**31), 2**31 - 1)
            assert torch.equal(given, theirs)


def test_requantize_is_not_a_rounded_product_but_never_more_than_one_away():
    accumulator = whole(-200_000, 200_000, (20_000,)).to(torch.int32)
    exact = torch.round(accumulator.double() * (1518500250 / 2**41)).to(torch.int32)
    difference = requantize(accumulator, 1518500250, 10) - exact
    assert difference.abs().max() == 1 and difference.any()


def test_integer_linear_from_real_numbers():
    """The codes are those of the real layer, up to one: M is rounded, and rounding is done twice."""
    generator = torch.Generator().manual_seed(3)
    for checked in INTEGER_LINEAR.properties:
        x, w, bias, x_grid, w_grid, y_grid, rescale = checked.draw(generator)
        y = F.relu(F.linear(x_grid.dequantize(x), w_grid.dequantize(w), bias))
        given = integer_linear(x, w, bias, x_grid, w_grid, y_grid, rescale)
        assert given.dtype == torch.int8
        assert (given.int() - y_grid.quantize(y).int()).abs().max() <= 1


def test_integer_linear_number_by_number():
    x, w, bias, x_grid, w_grid, y_grid, rescale = INTEGER_LINEAR.properties[4].draw(torch.Generator().manual_seed(0))
    given = integer_linear(x, w, bias, x_grid, w_grid, y_grid, rescale)
    for i in range(len(x)):
        for k in range(len(w)):
            z_w, s_w = w_grid.zero_point[k].item(), w_grid.scale[k].item()
            pairs = zip(x[i].tolist(), w[k].tolist(), strict=True)
            total = sum((a - x_grid.zero_point.item()) * (b - z_w) for a, b in pairs)
            total += round(bias[k].item() / (x_grid.scale.item() * s_w))
            m, n = fixed_point_multiplier(x_grid.scale.item() * s_w / y_grid.scale.item(), 31)
            z_y = y_grid.zero_point.item()
            assert given[i, k].item() == min(max(gemmlowp(total, m, n) + z_y, z_y), 127)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_group_quantize_is_the_librarys_where_the_group_divides(bits):
    weight = normal(5, 12)
    torch.testing.assert_close(group_quantize(weight, 4, bits), quantize_matrix(weight, bits, 4).dequantize())
    torch.testing.assert_close(group_quantize(weight, 12, bits), quantize_matrix(weight, bits, "row").dequantize())


def test_group_quantize_group_by_group():
    weight = normal(4, 11)
    weight[2, 4:8] = 0
    given = group_quantize(weight, 4, 3)
    for row in range(4):
        for start in (0, 4, 8):
            part = weight[row, start : start + 4].tolist()
            step = max(map(abs, part)) / 3 or 1.0
            expected = [step * round(number / step) for number in part]
            assert given[row, start : start + 4].tolist() == pytest.approx(expected, rel=1e-12)


# ----------------------------------------------------------------------------- wrong answers


def range_by(
    low=lambda a: min(a, 0), high=lambda b: max(b, 0), points=-1, zero=lambda a, b, s: -a / s, to=round, end=0
):
    """A grid with the usual slips; `end` is added to the zero point."""

    def answer(a, b, bits):
        a, b = low(a), high(b)
        s = (b - a) / (2**bits + points)
        return s, to(zero(a, b, s)) + (end(bits) if end else 0)

    return answer


def same_end(x):
    return x


def clamped_only(low, high, bits):
    s = (high - low) / (2**bits - 1)
    return s, max(0, min(2**bits - 1, round(-low / s)))


def zero_point_of_the_old_range(low, high, bits):
    s = (max(high, 0.0) - min(low, 0.0)) / (2**bits - 1)
    return s, round(0 - low / s)


def symmetric_grid(low, high, bits):
    return max(-low, high, -high, low) / (2 ** (bits - 1) - 1), 0


def round_half_up(x):
    whole_part = math.floor(x)
    return whole_part + 1 if x - whole_part >= 0.5 else whole_part


def codes_by(rule, dtype=torch.int32):
    """`rule(z, scale, zero_point, top)`, then the conversion to bytes that drops higher bits."""
    return lambda z, scale, zero_point, bits: rule(z, scale, zero_point, 2**bits - 1).to(dtype).to(torch.uint8)


def starter_of_quantize(z, scale, zero_point, bits):
    q = torch.clamp(z / scale, 0, 2**bits - 1)
    q = torch.round(q) + zero_point
    return q.to(torch.int32).to(torch.uint8)


def c_round(x):
    return torch.where(x < 0, torch.ceil(x - 0.5), torch.floor(x + 0.5))


def multiplier_by(stop=1.0, factor=lambda bits: 2**bits, to=round, full=lambda m, n: (m // 2, n - 1)):
    """Doubling and halving until M0 is below `stop` and at least half of it."""

    def answer(multiplier, bits):
        n = 0
        while multiplier < stop / 2:
            multiplier, n = multiplier * 2, n + 1
        while multiplier >= stop:
            multiplier, n = multiplier / 2, n - 1
        m = to(multiplier * factor(bits))
        return full(m, n) if m == 2**bits else (m, n)

    return answer


def doubling_only(multiplier, bits):
    n = 0
    while multiplier < 0.5:
        multiplier, n = multiplier * 2, n + 1
    m = round(multiplier * 2**bits)
    if m == 2**bits and multiplier < 1:
        return m // 2, n - 1
    return m, n


def number_by_number(rule):
    """`rule(accumulator, multiplier, shift)` on plain integers."""

    def answer(accumulator, multiplier, shift):
        values = [rule(number, multiplier, shift) for number in accumulator.flatten().tolist()]
        return torch.tensor(values, dtype=torch.int32).reshape(accumulator.shape)

    return answer


def up(x, bits):
    return math.floor(Fraction(x, 2**bits) + Fraction(1, 2))


def away(x, bits):
    size = math.floor(Fraction(abs(x), 2**bits) + Fraction(1, 2))
    return size if x >= 0 else -size


def even(x, bits):
    return round(Fraction(x, 2**bits))


def torch_round(accumulator, multiplier, shift):
    m = multiplier / 2**31 / 2**shift
    return torch.round(accumulator.to(torch.float64) * m).int()


def torch_wraps(accumulator, multiplier, shift):
    product = accumulator * torch.tensor(multiplier, dtype=torch.int32)  # int32 times int32 is int32
    return number_by_number(lambda x, m, n: away(up(x, 31), n))(product, multiplier, shift)


def layer_by(
    product=lambda x, w: x.int() @ w.int().T,
    signs=(1, 1, 1),
    count=lambda x: x.shape[1],
    bias_unit=lambda x, w, y: x * w,
    zero_of=lambda zeros: zeros,
    out=lambda y, zero: torch.clamp(y + zero, min=int(zero), max=127),
):
    """The layer in the paper's four terms, with the usual slips."""

    def answer(x, w, bias, x_grid, w_grid, y_grid, rescale):
        zero_x, zero_w = int(x_grid.zero_point), zero_of(w_grid.zero_point.squeeze(1))
        sums_w, sums_x = w.int().sum(dim=1), x.int().sum(dim=1)
        total = product(x, w) - signs[0] * zero_x * sums_w[None] - signs[1] * torch.outer(sums_x, zero_w)
        total = total + signs[2] * count(x) * zero_x * zero_w
        unit = bias_unit(x_grid.scale, w_grid.scale.squeeze(1), y_grid.scale)
        total = total + (0 if unit is None else torch.round(bias / unit))
        y = out(rescale(total.to(torch.int32)), y_grid.zero_point)
        return y.to(torch.int32).to(torch.int8)

    return answer


def shifted_bytes(x, w, bias, x_grid, w_grid, y_grid, rescale):
    x, w = x - x_grid.zero_point.to(torch.int8), w - w_grid.zero_point.to(torch.int8)
    total = x.int() @ w.int().T + torch.round(bias / x_grid.scale / w_grid.scale[:, 0]).int()
    return torch.clamp(rescale(total.int()) + y_grid.zero_point, int(y_grid.zero_point), 127).to(torch.int8)


def late_bias(x, w, bias, x_grid, w_grid, y_grid, rescale):
    total = (x.int() - x_grid.zero_point) @ (w.int() - w_grid.zero_point).T
    y = rescale(total.int()) + torch.round(bias / y_grid.scale).int() + y_grid.zero_point
    return torch.clamp(y, int(y_grid.zero_point), 127).to(torch.int8)


def starter_of_groups(weight, group, bits):
    padding = -weight.numel() % group
    groups = F.pad(weight.flatten(), (0, padding)).reshape(-1, group)
    scale = groups.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    on_grid = scale * torch.round(groups / scale)
    return on_grid.flatten()[: weight.numel()].reshape(weight.shape)


def groups_by(cut, size=lambda part: part.abs().max(), top=lambda bits: 2 ** (bits - 1) - 1, guard=True):
    """`cut(rows, columns, group)`: index lists (row indices, column indices), each with a scale of its own."""

    def answer(weight, group, bits):
        result = weight.clone()
        for rows, columns in cut(*weight.shape, group):
            index = torch.tensor(rows)[:, None], torch.tensor(columns)[None]
            part = weight[index]
            step = size(part) / top(bits)
            step = 1.0 if guard and step <= 0 else step
            result[index] = step * torch.round(part / step)
        return result

    return answer


def right_cut(rows, columns, group):
    return [
        ([row], list(range(start, min(start + group, columns))))
        for row in range(rows)
        for start in range(0, columns, group)
    ]


def cut_with_the_rest_joined(rows, columns, group):
    starts = list(range(0, columns, group))
    if len(starts) > 1 and columns % group:
        starts.pop()
    ends = [*starts[1:], columns]
    return [([row], list(range(*ends_))) for row in range(rows) for ends_ in zip(starts, ends, strict=True)]


def last_scale_in_a_loop(weight, group, bits):
    for start in range(0, weight.shape[1], group):
        largest = weight[:, start : start + group].abs().max(dim=1, keepdim=True).values
    step = largest / (2 ** (bits - 1) - 1)
    step[step == 0] = 1
    return step * (weight / step).round()


WRONG_ANSWERS = [
    ("quantization.scale_and_zero_point", range_by(points=0), "The scale divides by 2^k"),
    (
        "quantization.scale_and_zero_point",
        range_by(same_end, same_end),
        "The range does not contain 0, and the zero point is no code",
    ),
    (
        "quantization.scale_and_zero_point",
        clamped_only,
        "The zero point is clamped, but the range was not extended",
    ),
    ("quantization.scale_and_zero_point", zero_point_of_the_old_range, "The zero point is in the wrong range"),
    ("quantization.scale_and_zero_point", range_by(high=same_end), "Only the lower end is extended"),
    ("quantization.scale_and_zero_point", range_by(low=same_end), "Only the upper end is extended"),
    (
        "quantization.scale_and_zero_point",
        range_by(end=lambda bits: -(2 ** (bits - 1))),
        "The zero point of signed codes",
    ),
    ("quantization.scale_and_zero_point", range_by(to=round_half_up), "A half rounds up"),
    ("quantization.scale_and_zero_point", range_by(to=lambda x: -round_half_up(-x)), "A half rounds down"),
    ("quantization.scale_and_zero_point", range_by(to=int), "The zero point is cut off, not rounded"),
    ("quantization.scale_and_zero_point", range_by(to=same_end), "The zero point is not rounded"),
    (
        "quantization.scale_and_zero_point",
        range_by(zero=lambda a, b, s: a / s),
        "The zero point has the wrong sign",
    ),
    ("quantization.scale_and_zero_point", range_by(zero=lambda a, b, s: b / s), "Low and high are exchanged"),
    ("quantization.scale_and_zero_point", symmetric_grid, "A symmetric grid"),
    (
        "quantization.quantize",
        starter_of_quantize,
        "Clipping before rounding, and before the zero point is added",
    ),
    (
        "quantization.quantize",
        codes_by(lambda z, s, zero, top: (z / s + zero).round().clamp(0, top)),
        "The zero point is added before rounding",
    ),
    (
        "quantization.quantize",
        codes_by(lambda z, s, zero, top: ((z / s + 0.5).floor() + zero).clamp(0, top)),
        "A half rounds up",
    ),
    (
        "quantization.quantize",
        codes_by(lambda z, s, zero, top: (c_round(z / s) + zero).clamp(0, top)),
        "A half rounds away from zero",
    ),
    (
        "quantization.quantize",
        codes_by(lambda z, s, zero, top: (z / s + zero).int().clamp(0, top)),
        "Rounded down",
    ),
    (
        "quantization.quantize",
        codes_by(lambda z, s, zero, top: ((z / s).int() + zero).clamp(0, top)),
        "Cut off towards zero",
    ),
    (
        "quantization.quantize",
        codes_by(lambda z, s, zero, top: torch.round(z / s) + zero),
        "No clamp: a byte wraps around",
    ),
    (
        "quantization.quantize",
        codes_by(lambda z, s, zero, top: torch.clip(torch.round(z / s) + zero, 0, top + 1)),
        "Clamped to 2^k",
    ),
    (
        "quantization.quantize",
        codes_by(lambda z, s, zero, top: (zero + torch.round(z / s)).clamp(0, 255)),
        "Always clamped to 0 .. 255",
    ),
    (
        "quantization.quantize",
        codes_by(lambda z, s, zero, top: torch.round(z / s).clamp(0, top)),
        "The zero point is left out",
    ),
    ("quantization.fixed_point_multiplier", multiplier_by(full=lambda m, n: (m, n)), "M0 may round up to 2^bits"),
    (
        "quantization.fixed_point_multiplier",
        multiplier_by(full=lambda m, n: (m // 2, n + 1)),
        "Rounded up to 2^bits, and the shift goes the wrong way",
    ),
    (
        "quantization.fixed_point_multiplier",
        multiplier_by(full=lambda m, n: (m - 1, n)),
        "Rounded up to 2^bits, then cut to 2^bits - 1",
    ),
    (
        "quantization.fixed_point_multiplier",
        lambda multiplier, bits: (lambda m, n: (m, -n))(*multiplier_by()(multiplier, bits)),
        "The shift has the wrong sign",
    ),
    ("quantization.fixed_point_multiplier", multiplier_by(2.0, full=lambda m, n: (m, n)), "M0 between 1 and 2"),
    ("quantization.fixed_point_multiplier", multiplier_by(to=int), "M0 is cut off, not rounded"),
    (
        "quantization.fixed_point_multiplier",
        multiplier_by(factor=lambda bits: 2 ** (bits - 1)),
        "One bit is kept for the sign",
    ),
    ("quantization.fixed_point_multiplier", doubling_only, "A multiplier above 1 is not brought down"),
    ("quantization.requantize", torch_round, "A real product, rounded once"),
    (
        "quantization.requantize",
        lambda x, m, n: torch.round(x * (m / 2 ** (31 + n))).int(),
        "A real product in float32, rounded once",
    ),
    ("quantization.requantize", number_by_number(lambda x, m, n: up(x * m, 31 + n)), "Rounded once, half up"),
    ("quantization.requantize", number_by_number(lambda x, m, n: away(x * m, 31 + n)), "Rounded once, half away"),
    (
        "quantization.requantize",
        number_by_number(lambda x, m, n: up(up(x * m, 31), n)),
        "The first rounding is used twice",
    ),
    (
        "quantization.requantize",
        number_by_number(lambda x, m, n: away(away(x * m, 31), n)),
        "The second rounding is used twice",
    ),
    (
        "quantization.requantize",
        number_by_number(lambda x, m, n: up(away(x * m, 31), n)),
        "The two roundings are exchanged",
    ),
    (
        "quantization.requantize",
        number_by_number(lambda x, m, n: away(up(x * m, 32), n)),
        "The first shift is one too many",
    ),
    (
        "quantization.requantize",
        number_by_number(
            lambda x, m, n: away(up(x * m, 30), n) % 2**32 - 2**32 * (away(up(x * m, 30), n) % 2**32 >= 2**31)
        ),
        "The first shift is one too few",
    ),
    ("quantization.requantize", number_by_number(lambda x, m, n: (x * m >> 31) >> n), "Nothing is rounded"),
    (
        "quantization.requantize",
        number_by_number(lambda x, m, n: away(x * m >> 31, n)),
        "The product is rounded down",
    ),
    (
        "quantization.requantize",
        number_by_number(lambda x, m, n: up(x * m, 31) >> n),
        "The second division is rounded down",
    ),
    (
        "quantization.requantize",
        number_by_number(lambda x, m, n: even(up(x * m, 31), n)),
        "The second division rounds half to even",
    ),
    ("quantization.requantize", torch_wraps, "The product wraps around in 32 bits"),
    (
        "quantization.integer_linear",
        layer_by(signs=(0, 0, 0)),
        "The zero points of inputs and weights are not used",
    ),
    ("quantization.integer_linear", layer_by(signs=(0, 1, 1)), "Z_x a_w is missing"),
    ("quantization.integer_linear", layer_by(signs=(1, 0, 1)), "Z_w a_x is missing"),
    ("quantization.integer_linear", layer_by(signs=(1, 1, 0)), "N Z_x Z_w is missing"),
    ("quantization.integer_linear", layer_by(count=lambda x: 1), "Z_x Z_w is added once, not N times"),
    ("quantization.integer_linear", layer_by(signs=(1, 1, -1)), "N Z_x Z_w has the wrong sign"),
    (
        "quantization.integer_linear",
        layer_by(zero_of=lambda zeros: zeros[0].repeat(len(zeros))),
        "One zero point for all rows of the weight",
    ),
    ("quantization.integer_linear", shifted_bytes, "The zero points are taken off in int8"),
    (
        "quantization.integer_linear",
        layer_by(product=lambda x, w: (x @ w.T).int()),
        "The product is summed in int8",
    ),
    (
        "quantization.integer_linear",
        layer_by(bias_unit=lambda x, w, y: y),
        "The bias has the output's scale",
    ),
    ("quantization.integer_linear", layer_by(bias_unit=lambda x, w, y: x), "The bias has the input's scale"),
    ("quantization.integer_linear", layer_by(bias_unit=lambda x, w, y: None), "The bias is left out"),
    ("quantization.integer_linear", late_bias, "The bias is added after rescaling"),
    (
        "quantization.integer_linear",
        layer_by(out=lambda y, zero: torch.clamp(y + zero, 0, 127)),
        "ReLU cuts at code 0",
    ),
    (
        "quantization.integer_linear",
        layer_by(out=lambda y, zero: torch.clamp(y + zero, -128, 127)),
        "ReLU is missing",
    ),
    (
        "quantization.integer_linear",
        layer_by(out=lambda y, zero: torch.clamp(y.relu(), max=127) + zero),
        "Clamped before the zero point is added",
    ),
    ("quantization.group_quantize", starter_of_groups, "Groups run over the end of a row"),
    (
        "quantization.group_quantize",
        groups_by(lambda rows, columns, group: [(c, r) for r, c in right_cut(columns, rows, group)]),
        "Groups run down the columns",
    ),
    (
        "quantization.group_quantize",
        groups_by(lambda rows, columns, group: [([row], list(range(columns))) for row in range(rows)]),
        "One grid for each row",
    ),
    (
        "quantization.group_quantize",
        groups_by(lambda rows, columns, group: [(list(range(rows)), list(range(columns)))]),
        "One grid for the whole matrix",
    ),
    (
        "quantization.group_quantize",
        groups_by(lambda rows, columns, group: [(list(range(rows)), c) for _, c in right_cut(1, columns, group)]),
        "One grid for a group of columns in all rows",
    ),
    ("quantization.group_quantize", last_scale_in_a_loop, "The scale of the last group serves all"),
    (
        "quantization.group_quantize",
        groups_by(lambda *sizes: [(r, c) for r, c in right_cut(*sizes) if len(c) == sizes[2]]),
        "The short group at the end is not quantized",
    ),
    (
        "quantization.group_quantize",
        groups_by(cut_with_the_rest_joined),
        "The short group is joined to the one before",
    ),
    (
        "quantization.group_quantize",
        groups_by(right_cut, size=lambda part: part.max()),
        "The largest number, not the largest absolute value",
    ),
    ("quantization.group_quantize", groups_by(right_cut, guard=False), "A group of zeros becomes NaN"),
    (
        "quantization.group_quantize",
        groups_by(right_cut, top=lambda bits: 2 ** (bits - 1)),
        "The scale divides by 2^(k-1)",
    ),
    (
        "quantization.group_quantize",
        groups_by(right_cut, top=lambda bits: 2**bits - 1),
        "The scale divides by 2^k - 1",
    ),
]


# ----------------------------------------------------------------------------- other right answers


def plain_subtraction(x, w, bias, x_grid, w_grid, y_grid, rescale):
    """The zero points are taken off before the product, in int32."""
    total = (x.int() - x_grid.zero_point) @ (w.int() - w_grid.zero_point).T
    total = total + torch.round(bias / x_grid.scale / w_grid.scale[:, 0]).int()
    y = torch.relu(rescale(total)) + y_grid.zero_point
    return torch.clamp(y, max=127).to(torch.int8)


def nudged(low, high, bits):
    """The zero point clamped, from a range that is extended for the scale alone."""
    s = (max(high, 0.0) - min(low, 0.0)) / (2**bits - 1)
    return s, max(0, min(2**bits - 1, round(-low / s)))


def test_other_right_answers_pass():
    check("quantization.scale_and_zero_point", range_by())
    check("quantization.scale_and_zero_point", nudged)
    check("quantization.quantize", codes_by(lambda z, s, zero, top: (torch.round(z / s) + zero).clamp(0, top)))
    check("quantization.quantize", lambda z, s, zero, k: (zero + (z * (1 / s)).round()).clamp(0, 2**k - 1).byte())
    check("quantization.fixed_point_multiplier", multiplier_by())
    check("quantization.requantize", number_by_number(gemmlowp))
    check("quantization.requantize", number_by_number(lambda x, m, n: away(up(x * m, 31), n)))
    check("quantization.integer_linear", layer_by())
    check("quantization.integer_linear", plain_subtraction)
    check("quantization.group_quantize", groups_by(right_cut))


def test_the_librarys_own_functions_pass():
    def of_library(low, high, bits):
        grid = affine_quantizer(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64), bits)
        return grid.scale.item(), grid.zero_point.item()

    def library_requantize(accumulator, multiplier, shift):
        m, n = (torch.tensor(part, dtype=torch.int32) for part in (multiplier, shift))
        return fixed_point.requantize(accumulator, m, n, 0, -(2**31), 2**31 - 1)

    check("quantization.scale_and_zero_point", of_library)
    check("quantization.requantize", library_requantize)


def test_a_real_accumulator_is_refused_in_words():
    def real(x, w, bias, x_grid, w_grid, y_grid, rescale):
        return rescale(x_grid.dequantize(x) @ w_grid.dequantize(w).T)

    with pytest.raises(HomeworkError, match="rescale takes an int32 accumulator, got float64"):
        check("quantization.integer_linear", real)
