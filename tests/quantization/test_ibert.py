"""I-BERT's operations on whole numbers: math.isqrt, float64 functions, and transformers' modules of the same names."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from transformers.models.ibert.quant_modules import IntGELU, IntLayerNorm, IntSoftmax

from effnlp_lessons.quantization.float_guard import no_floats
from effnlp_lessons.quantization.ibert import (
    ERF,
    EXP_PRINTED,
    EXP_RELEASED,
    IntegerExp,
    IntegerGelu,
    IntegerLayerNorm,
    IntegerSoftmax,
    Rescale,
    integer_polynomial,
    integer_sqrt,
    polynomial_constants,
)


def grid(low: float, high: float, scale: float) -> torch.Tensor:
    """Every int32 code of [low, high]."""
    return torch.arange(math.ceil(low / scale), math.floor(high / scale) + 1, dtype=torch.int32)


def run(module, *codes) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes under the guard, and the real numbers that they stand for."""
    with no_floats():
        out = module(*codes)
    assert out.dtype == torch.int32
    return out, module.dequantize(out)


# ------------------------------------------------------------------------------------- polynomial and root


def test_polynomial_is_the_real_one_up_to_the_rounding_of_its_constants():
    a, b, c, scale = 0.7, -1.3, 2.1, 1e-3
    q = grid(-5, 5, scale)
    q_b, q_c, output_scale = polynomial_constants(a, b, c, scale)
    assert isinstance(q_b, int) and isinstance(q_c, int)
    assert (q_b, q_c) == (-1300, 3_000_000) or (q_b, q_c) == (-1301, 2_999_999)  # floors of quotients that are whole
    x = q * scale
    found, expected = integer_polynomial(q, q_b, q_c) * output_scale, a * (x + b) ** 2 + c
    # b moves by one code at most: 2 a |x + b| S; c by one code of a S^2
    assert ((found - expected).abs() <= 2 * a * scale * ((x + b).abs() + scale) + 2 * a * scale**2).all()
    with pytest.raises(ValueError, match="a must not be 0"):
        polynomial_constants(0.0, 1.0, 1.0, 0.1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_root_is_that_of_the_standard_library(dtype):
    generator, largest = torch.Generator().manual_seed(0), torch.iinfo(dtype).max
    bits = torch.randint(1, torch.iinfo(dtype).bits, (4_000,), generator=generator)
    wide = torch.randint(0, 2**62, (4_000,), generator=generator)
    drawn = [x % 2**k for x, k in zip(wide.tolist(), bits.tolist(), strict=True)]
    top = math.isqrt(largest)
    roots = [*range(40), *(math.isqrt(n) for n in drawn[:500]), top - 1, top]
    squares = [r * r + d for r in roots for d in (-1, 0, 1) if 0 <= r * r + d <= largest]
    numbers = [*range(300), *drawn, *squares, largest - 1, largest]
    with no_floats():
        found = integer_sqrt(torch.tensor(numbers, dtype=dtype))
    assert found.dtype == dtype
    assert found.tolist() == [math.isqrt(n) for n in numbers]


def test_root_of_any_shape_and_of_bad_input():
    assert integer_sqrt(torch.tensor(17, dtype=torch.int32)).item() == 4
    assert integer_sqrt(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)
    with pytest.raises(ValueError, match="int32 or int64"):
        integer_sqrt(torch.tensor([4.0]))
    with pytest.raises(ValueError, match="negative"):
        integer_sqrt(torch.tensor([4, -1]))


# ---------------------------------------------------------------------------------------- changes of scale


@pytest.mark.parametrize(("q_min", "q_max", "zero_point"), [(-128, 127, -19), (-127, 127, 0), (-(2**23), 2**23, 0)])
def test_rescale_rounds_the_exact_product_once(q_min, q_max, zero_point):
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(7, generator=generator, dtype=torch.float64) * 1e-4 + 1e-7
    q = torch.randint(-(2**31), 2**31, (40, 7), generator=generator, dtype=torch.int64).to(torch.int32)
    q[20:] >>= 16
    rescale = Rescale(scale, 0.02, q_min, q_max, zero_point)
    with no_floats():
        codes = rescale(q)
    assert codes.dtype == (torch.int8 if q_max < 128 else torch.int32)
    for row, found in zip(q.tolist(), codes.tolist(), strict=True):
        for number, ratio, code in zip(row, (scale / 0.02).tolist(), found, strict=True):
            exact = number * Fraction(ratio)
            # m has 31 bits: off by 2^-31 of the product, which is below 2^31 M; then a half
            error = Fraction(1, 2) + abs(exact) / 2**30
            if q_min < code < q_max:
                assert abs(code - zero_point - exact) <= error
            else:
                assert abs(exact) + error >= abs(code - zero_point) and (exact > 0) == (code == q_max)
    assert torch.equal(rescale.dequantize(codes), (codes.int() - zero_point) * torch.tensor(0.02, dtype=torch.float64))


def test_rescale_takes_a_half_up_and_vanishing_scales_to_zero():
    halves = torch.tensor([-3, -2, -1, 0, 1, 2, 3], dtype=torch.int32)
    assert Rescale(0.5, 1.0, -128, 127)(halves).tolist() == [-1, -1, 0, 0, 1, 1, 2]
    assert Rescale(3.0, 1.0, -128, 127)(halves).tolist() == [-9, -6, -3, 0, 3, 6, 9]
    large = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32)
    assert Rescale(2.0**-33, 1.0, -128, 127)(large).tolist() == [0, 0]
    for arguments in ((0.0, 1.0, 0, 1), (1.0, math.inf, 0, 1), (2.0**31, 1.0, 0, 1), (2.0**-30, 1.0, -128, 127, 3)):
        with pytest.raises(ValueError, match="scale|multiplier"):
            Rescale(*arguments)


# ---------------------------------------------------------------------------------------------------- GELU


def test_gelu_has_the_error_of_the_paper():
    q = grid(-4, 4, 1e-4)
    _, found = run(IntegerGelu(1e-4), q)
    error = (found - F.gelu(q.double() * 1e-4)).abs()
    # from the formula in real numbers: 0.01815 and 0.0082; codes of 1e-4 add up to a code
    assert error.max().item() == pytest.approx(0.01815, abs=1e-4)
    assert error.square().mean().sqrt().item() == pytest.approx(0.0082, abs=1e-4)


@pytest.mark.parametrize("scale", [2e-5, 1e-4, 3e-4, 1e-2, 8 / 127])
def test_gelu_holds_at_every_scale(scale):
    limit = min(65_535 * scale, 30)
    q = grid(-limit, limit, scale)
    a, b = ERF
    x = q.double() * scale
    moved = 2e-4 if scale < 1e-4 else 0.0  # finer codes are shifted until they are worth 1e-4 .. 2e-4
    coarse = max(scale, moved)
    erf = (x / math.sqrt(2)).sign() * (a * ((x / math.sqrt(2)).abs().clamp(max=-b) + b) ** 2 + 1)
    codes, found = run(IntegerGelu(scale), q)
    # against the formula in real numbers. erf: b moves by a code of S / sqrt(2), slope at most 2 a b, and half a code
    # of 2^-13 at most is rounded off; GELU has half of it times |x|
    step = 2 * a * b * coarse / math.sqrt(2) + abs(a) * coarse**2 + 2**-14
    # and x itself is moved by a code where it is shifted, with a slope of 1.2
    assert ((found - x / 2 * (1 + erf)).abs() <= x.abs() / 2 * step + 1.2 * moved + 1e-9).all()
    assert codes[q == 0].item() == 0


def test_gelu_beside_transformers():
    """Theirs shifts by 14 bits at any scale: alike where that is fine, and theirs is destroyed where it is not."""
    for scale, close in ((1e-4, True), (8 / 127, False)):
        q = grid(-4, 4, scale)
        _, ours = run(IntegerGelu(scale), q)
        scaling_factor = torch.tensor([scale], dtype=torch.float64)
        theirs, _ = IntGELU()(q.double() * scaling_factor, scaling_factor)
        difference = (ours - theirs).abs().max()
        # 1.4142 for sqrt(2), and a code of the erf, 2^-14 or 2^14 of theirs, times |x| / 2
        assert difference < 1e-3 if close else difference > 10


@pytest.mark.parametrize("scale", [0.0, -1e-3, math.nan, 1e-15, 1.5])
def test_gelu_refuses_a_scale_that_it_cannot_serve(scale):
    with pytest.raises(ValueError, match="scale"):
        IntegerGelu(scale)


# ------------------------------------------------------------------------------------------ exp and softmax


@pytest.mark.parametrize(("coefficients", "largest"), [(EXP_PRINTED, 0.00213), (EXP_RELEASED, 0.00191)])
def test_exp_has_the_error_of_the_paper(coefficients, largest):
    q = grid(-12, 0, 1e-4)
    codes, found = run(IntegerExp(1e-4, coefficients), q)
    assert (found - (q.double() * 1e-4).exp()).abs().max().item() == pytest.approx(largest, abs=8e-5)  # a code of 1e-4
    assert codes.min() >= 0 and 2**15 <= codes.max() < 2**16


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1.1e-3, 0.05])
def test_exp_far_below_is_zero_and_never_negative(scale):
    codes, _ = run(IntegerExp(scale), torch.tensor([-(2**30), -(2**20), -1, 0], dtype=torch.int32))
    assert codes[0] == 0 and (codes >= 0).all() and codes[3] >= codes[2]


@pytest.mark.parametrize("scale", [0.0, 1e-15, 0.7, math.inf])
def test_exp_refuses_a_scale_that_it_cannot_serve(scale):
    with pytest.raises(ValueError, match="scale"):
        IntegerExp(scale)


@pytest.mark.parametrize("keys", [1, 3, 8, 131])
@pytest.mark.parametrize("scale", [1e-7, 2e-4, 1.3e-3, 2e-2])
def test_softmax_is_close_and_a_row_loses_what_is_rounded_down(keys, scale):
    generator = torch.Generator().manual_seed(keys)
    q = (torch.randn(2, 3, 17, keys, generator=generator) * 3 / scale).to(torch.int32)
    codes, found = run(IntegerSoftmax(scale), q)
    exact = (q.double() * scale).softmax(-1)
    # the exponential: 0.002 of the largest and q_b, q_c, q_ln2 floored by one code; 8 bits rounded down: 1 / 256
    assert ((found - exact).abs() <= 0.006 + 2 * scale + 2**-8).all()
    sums = codes.sum(-1)
    assert (sums <= 255).all()  # < 1
    assert (sums >= 256 - keys - 2).all()  # a code a key, and two for the reciprocal
    if keys <= 3:
        assert (sums * 2.0**-8 >= 0.98).all()


def test_softmax_gives_padding_nothing_and_an_empty_row_zeros():
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(-20_000, 20_000, (3, 2, 5, 7), generator=generator, dtype=torch.int32)
    allowed = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    allowed[0, ..., 4:] = False
    allowed[2] = False
    softmax = IntegerSoftmax(1e-3)
    with no_floats():
        weights = softmax(q, allowed)
        short = softmax(q[:1, ..., :4].contiguous())
        far = softmax(q.masked_fill(~allowed, 2**30), allowed)
    assert torch.equal(weights[:1, ..., :4], short)  # bit by bit, whatever stands in the padding
    assert torch.equal(far, weights)
    assert (weights[0, ..., 4:] == 0).all() and (weights[2] == 0).all() and (weights[1].sum(-1) > 0).all()


def test_softmax_of_large_codes_does_not_overflow():
    q = torch.tensor([[2**30, -(2**30), 2**30 - 1], [-(2**30), -(2**30), -(2**30)]], dtype=torch.int32)
    weights, _ = run(IntegerSoftmax(1e-3), q)
    assert weights.tolist()[0][1] == 0 and (weights[1] == weights[1, 0]).all()
    assert (weights.sum(-1) >= 250).all()
    many = torch.zeros(1, 32_768, dtype=torch.int32)
    assert (IntegerSoftmax(1e-3, output_bits=16)(many) >= 1).all()


def test_softmax_beside_transformers():
    generator, scale = torch.Generator().manual_seed(2), 1e-3
    q = torch.randint(-6_000, 6_000, (2, 3, 5, 11), generator=generator, dtype=torch.int32)
    theirs = IntSoftmax(8, quant_mode=True).double().train()  # in training it learns its range of 16 bits
    factor = torch.tensor([scale], dtype=torch.float64)
    expected, _ = theirs(q.double() * scale, factor)
    _, ours = run(IntegerSoftmax(scale), q)
    # the same 8 bits; the 16 bits of the exponential are cut elsewhere: a code
    assert (ours - expected).abs().max() <= 2**-8 + 1e-9


def test_softmax_with_more_bits_loses_less():
    q = torch.randint(-3_000, 3_000, (50, 60), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    lost = [1 - run(IntegerSoftmax(1e-3, bits), q)[1].sum(-1).mean().item() for bits in (8, 12, 16)]
    assert lost[0] > 10 * lost[1] > 0 and lost[1] > lost[2] > 0
    with pytest.raises(ValueError, match="output_bits"):
        IntegerSoftmax(1e-3, 17)


# ---------------------------------------------------------------------------------------------- layer norm


def norm_case(width=384, scale=1e-3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(3, 5, width, generator=generator) * 2_000 + 700).to(torch.int32)
    weight, bias = torch.randn(2, width, generator=generator, dtype=torch.float64).unbind()
    return q, weight, bias, scale


@pytest.mark.parametrize(("width", "output_scale"), [(384, 1e-3), (5, 1e-4), (97, 8 / 127)])
def test_norm_is_that_of_real_numbers_up_to_a_code(width, output_scale):
    q, weight, bias, scale = norm_case(width)
    weight[1], weight[2] = 0.0, -weight[2].abs()
    _, found = run(IntegerLayerNorm(weight, bias, 1e-12, scale, output_scale), q)
    expected = F.layer_norm(q.double() * scale, (width,), weight, bias, 1e-12)
    deviation = q.double().std(-1, correction=0, keepdim=True)  # in codes
    normal = (q - q.double().mean(-1, keepdim=True)) / deviation
    # the mean is rounded by half a code, the root of the sum by one; of the output a code and a half: three roundings
    rounded = 0.5 / deviation * (1 + normal.abs()) + normal.abs() / (deviation * width**0.5)
    assert ((found - expected).abs() <= 1.5 * output_scale + weight.abs() * rounded).all()


def test_norm_does_not_depend_on_the_scale_of_its_input():
    q, weight, bias, _ = norm_case()
    codes = [run(IntegerLayerNorm(weight, bias, 0.0, scale, 1e-3), q)[0] for scale in (1e-5, 3.0)]
    assert torch.equal(codes[0], codes[1])


def test_norm_of_a_constant_row_is_the_bias_and_eps_counts():
    _, weight, bias, scale = norm_case()
    constant = torch.full((2, 384), 1_234, dtype=torch.int32)
    codes, _ = run(IntegerLayerNorm(weight, bias, 1e-12, scale, 1e-3), constant)
    assert torch.equal(codes, torch.round(bias / 1e-3).to(torch.int32).expand(2, -1))
    q = torch.randint(-20, 20, (4, 384), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    _, found = run(IntegerLayerNorm(weight, bias, 1e-3, scale, 1e-4), q)
    expected = F.layer_norm(q.double() * scale, (384,), weight, bias, 1e-3)  # eps is seven times the variance
    # the mean is rounded to a code of 1e-3, of a deviation of 0.033 with eps
    assert ((found - expected).abs() <= 2e-4 + weight.abs() * 0.02).all()
    assert (found - F.layer_norm(q.double() * scale, (384,), weight, bias)).abs().max() > 1


def test_norm_of_extreme_codes_does_not_overflow():
    q = torch.zeros(2, 384, dtype=torch.int32)
    q[0, 7], q[1, ::2], q[1, 1::2] = 2**24, 2**24, -(2**24)
    _, found = run(IntegerLayerNorm(torch.ones(384), torch.zeros(384), 1e-12, 1e-3, 1e-3), q)
    expected = F.layer_norm(q.double(), (384,))
    assert ((found - expected).abs() <= 1.5e-3).all()


def test_norm_beside_transformers():
    q, weight, bias, scale = norm_case()
    theirs = IntLayerNorm(384, 1e-12, quant_mode=True)
    theirs.weight.data, theirs.bias.data = weight, bias
    theirs.double().train()  # in training it finds its shift
    expected, _ = theirs(q.double() * scale, torch.tensor([scale], dtype=torch.float64))
    _, ours = run(IntegerLayerNorm(weight, bias, 1e-12, scale, 1e-4), q)
    # theirs has no shift at this size; the roots are alike, ours has codes of 1e-4
    assert ((ours - expected.detach()).abs() <= 1.5e-4).all()


def test_norm_refuses_what_does_not_fit():
    ones = torch.ones(4)
    for arguments in ((ones, torch.ones(3), 1e-12, 1.0, 1.0), (ones, ones * math.inf, 1e-12, 1.0, 1.0)):
        with pytest.raises(ValueError, match="bias"):
            IntegerLayerNorm(*arguments)
    with pytest.raises(ValueError, match="scale"):
        IntegerLayerNorm(ones, ones, 1e-12, 1.0, 0.0)


# --------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize(
    "module",
    [
        IntegerGelu(1e-3),
        IntegerExp(1e-3),
        IntegerSoftmax(1e-3),
        IntegerLayerNorm(torch.ones(6), torch.zeros(6), 1e-12, 1e-3, 1e-3),
    ],
    ids=lambda module: type(module).__name__,
)
def test_constants_travel_in_the_state_and_other_types_are_refused(module):
    state = module.state_dict()
    assert all(not value.is_floating_point() for name, value in state.items() if not name.endswith("put_scale"))
    assert not list(module.parameters())
    for q in (torch.zeros(2, 6), torch.zeros(2, 6, dtype=torch.int64)):
        with pytest.raises(ValueError, match="int32"):
            module(q)
    other = type(module)(*((torch.zeros(6), torch.ones(6), 0.1, 0.1, 0.1) if "bias" in state else (0.3,)))
    other.load_state_dict(state)
    q = torch.randint(-3_000, 1, (4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    assert torch.equal(other(q), module(q))
