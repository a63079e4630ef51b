"""The integer layer against direct sums, fake quantization, and torch's own quantized linear layers."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effnlp_lessons.measure import count_macs
from effnlp_lessons.quantization.float_guard import no_floats
from effnlp_lessons.quantization.integer_only import (
    IntegerLinear,
    integer_product,
    largest_inner_size,
    zero_point_product,
)
from effnlp_lessons.quantization.quantizers import (
    LinearQuantizer,
    affine_quantizer,
    quantize_matrix,
    symmetric_quantizer,
)

SIZES = st.integers(0, 40)


def int8(*shape, seed=0, low=-128):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 128, shape, generator=generator, dtype=torch.int8)


def layer(rows=19, inner=45, out=23, granularity="row", activation=None, bits=8, seed=0):
    """(layer, codes, x, weight, bias): a layer whose rows differ in size tenfold, its grids from the data."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** -torch.rand(out, 1, generator=generator)
    weight = sizes * torch.randn(out, inner, generator=generator) / inner**0.5
    bias = 0.3 * torch.randn(out, generator=generator)
    x = 1.5 * torch.randn(rows, inner, generator=generator) + 0.4
    y = x @ weight.t() + bias
    input, output = (affine_quantizer(z.min(), z.max(), 8, signed=True) for z in (x, y))
    built = IntegerLinear.build(weight, bias, input, output, bits, granularity, activation)
    return built, input.quantize(x), x, weight, bias


def real_accumulator(built):
    return built.accumulator_scale / built.output.scale.double()


# ------------------------------------------------------------------------------------------- products


# the same matrix (rows, columns), laid out in several ways
LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: torch.empty(x.shape[::-1], dtype=x.dtype).copy_(x.t()).t(),
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "a part of wider rows": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "a part of longer columns": lambda x: torch.cat([x.t(), x.t()], 1)[:, : x.shape[0]].t(),
}


@given(SIZES, SIZES, SIZES, st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS)))
def test_product_is_the_int64_product(rows, inner, columns, layout_a, layout_b):
    a, b = LAYOUTS[layout_a](int8(rows, inner)), LAYOUTS[layout_b](int8(inner, columns, seed=1))
    product = integer_product(a, b)
    assert product.dtype == torch.int32
    assert torch.equal(product, (a.long()[:, :, None] * b.long()).sum(1).int())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_product_of_one_row_or_column(layout):
    """Where a transposed view has the strides (1, 1), `_int_mm` alone leaves the result unset."""
    for rows, inner, columns in ((1, 6, 5), (4, 1, 5), (4, 6, 1), (1, 1, 5), (1, 6, 1), (4, 1, 1), (1, 1, 1)):
        a, b = LAYOUTS[layout](int8(rows, inner)), LAYOUTS[layout](int8(inner, columns, seed=1))
        expected = (a.long()[:, :, None] * b.long()).sum(1).int()
        assert torch.equal(integer_product(a, b), expected)
        assert torch.equal(integer_product(a.expand(2, -1, -1), b.expand(2, -1, -1)), expected.expand(2, -1, -1))


@pytest.mark.filterwarnings("error")  # no slow way out
def test_product_of_views_and_batches():
    a, b = int8(2, 3, 5, 7, seed=1)[..., ::2], int8(4, 9, seed=2)
    assert torch.equal(integer_product(a, b), a.int() @ b.int())
    keys = int8(2, 3, 6, 4, seed=3).transpose(-1, -2)
    assert torch.equal(integer_product(a, keys), a.int() @ keys.int())
    assert integer_product(a[:0], keys[:0]).shape == (0, 3, 5, 6)
    assert integer_product(a[:, :, :0], b).shape == (2, 3, 0, 9)


def test_largest_inner_sizes():
    assert largest_inner_size(127, 255) == 66_311
    assert largest_inner_size(127, 127) == 133_144
    n = largest_inner_size(128, 128)
    worst = torch.full((1, n + 1), -128, dtype=torch.int8)
    assert integer_product(worst[:, :n], worst[:, :n].t()).item() == n * 128 * 128
    with pytest.raises(ValueError, match="at most 131071"):
        integer_product(worst, worst.t())


@given(SIZES, SIZES, SIZES, st.integers(-128, 127), st.integers(-128, 127))
def test_zero_points_outside_the_product(rows, inner, columns, z1, z2):
    q1, q2 = int8(rows, inner), int8(inner, columns, seed=1)
    expected = ((q1.long() - z1)[:, :, None] * (q2.long() - z2)).sum(1)
    assert torch.equal(zero_point_product(q1, z1, q2, z2), expected.int())


def test_zero_points_at_the_largest_size():
    n = largest_inner_size(255, 255)
    q1, q2 = torch.full((1, n), 127, dtype=torch.int8), torch.full((n, 1), -128, dtype=torch.int8)
    assert zero_point_product(q1, -128, q2, 127).item() == -n * 255 * 255
    with pytest.raises(ValueError, match="at most 33025"):
        zero_point_product(q1.repeat(1, 2), -128, q2.repeat(2, 1), 127)


def test_real_numbers_from_codes():
    """Eq. 3 and 4: r3 = S1 S2 sum (q1 - Z1) (q2 - Z2) is the product of the dequantized matrices."""
    generator = torch.Generator().manual_seed(0)
    r1, r2 = (torch.rand(n, m, generator=generator).double() * 3 - 1 for n, m in ((5, 11), (11, 4)))
    g1, g2 = (affine_quantizer(r.min(), r.max(), 8, signed=True) for r in (r1, r2))
    sums = zero_point_product(g1.quantize(r1), int(g1.zero_point), g2.quantize(r2), int(g2.zero_point))
    torch.testing.assert_close(g1.scale * g2.scale * sums, g1(r1) @ g2(r2), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------- layer


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_and_accumulators_are_exact(granularity, bits):
    built, codes, _, weight, bias = layer(granularity=granularity, bits=bits)
    quantized = quantize_matrix(weight, bits, granularity)
    assert torch.equal(built.weight, quantized.codes)
    scale = built.input.scale.double() * quantized.scale.flatten().double().expand(len(weight))
    torch.testing.assert_close(built.accumulator_scale, scale, rtol=1e-12, atol=0)
    shifted = codes.long() - int(built.input.zero_point)
    expected = (shifted[:, None] * quantized.codes.long()).sum(-1) + torch.round(bias / scale).long()
    accumulators = built.accumulate(codes)
    assert accumulators.dtype == torch.int32
    assert torch.equal(accumulators.long(), expected)
    # so an accumulator is the dequantized layer, but for the bias on its grid of S1 S2
    real = built.input(built.input.dequantize(codes)).double() @ quantized.dequantize().double().t() + bias
    # float32 scales times codes; the bias moves by half a unit
    assert ((built.accumulator_scale * accumulators - real).abs() <= 0.51 * built.accumulator_scale + 1e-5).all()


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_one_code_from_fake_quantization(granularity, activation):
    built, codes, x, weight, bias = layer(granularity=granularity, activation=activation)
    real = built.input(x) @ quantize_matrix(weight, 8, granularity).dequantize().t() + bias
    real = {None: real, "relu": real.relu(), "relu6": real.clamp(0, 6)}[activation]
    difference = built(codes).int() - built.output.quantize(real).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).double().mean() < 0.02
    assert len(built(codes).unique()) > 20


def test_activations_are_clamps():
    output = affine_quantizer(torch.tensor(-3.0), torch.tensor(8.0), 8, signed=True)
    input = symmetric_quantizer(torch.tensor(12.7), 8)
    results = {}
    for activation in (None, "relu", "relu6"):
        built = IntegerLinear.build(torch.ones(1, 1), None, input, output, activation=activation)
        results[activation] = output.dequantize(built(torch.arange(-127, 128, dtype=torch.int8)[:, None]))
    step = output.scale.item()
    torch.testing.assert_close(results["relu"], results[None].relu(), rtol=0, atol=1e-6)
    assert results["relu"].min() == 0
    # 6 itself is not on the grid: the nearest code is the top
    assert abs(results["relu6"].max() - 6) <= step / 2
    torch.testing.assert_close(results["relu6"], results[None].clamp(0, results["relu6"].max()), rtol=0, atol=1e-6)


def torch_linear(engine, built, bias, codes):
    """torch.ao's quantized layer with the same codes and grids; its activations are uint8, ours + 128."""
    rows = len(built.weight)
    scale = built.accumulator_scale / built.input.scale.double()
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        theirs = torch.ao.nn.quantized.Linear(built.weight.shape[1], rows)
        if len(scale.unique()) > 1:
            zeros = torch.zeros(rows, dtype=torch.long)
            weight = torch._make_per_channel_quantized_tensor(built.weight, scale, zeros, 0)
        else:
            weight = torch._make_per_tensor_quantized_tensor(built.weight, scale[0].item(), 0)
        theirs.set_weight_bias(weight, bias)
        theirs.scale, theirs.zero_point = built.output.scale.item(), int(built.output.zero_point) + 128
        x = torch._make_per_tensor_quantized_tensor(
            (codes.int() + 128).to(torch.uint8), built.input.scale.item(), int(built.input.zero_point) + 128
        )
        return theirs(x).int_repr().int() - 128
    finally:
        torch.backends.quantized.engine = before


@pytest.mark.filterwarnings("ignore")  # torch.ao announces its end
@pytest.mark.parametrize("engine", ["qnnpack", "onednn", "x86"])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("inner", [33, 700])
def test_torch_quantized_linear(engine, granularity, inner):
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"torch was built without {engine}")
    built, codes, _, _, bias = layer(rows=200, inner=inner, out=64, granularity=granularity)
    theirs, ours = torch_linear(engine, built, bias, codes), built(codes).int()
    difference = theirs - ours
    assert difference.abs().max() <= 1
    # theirs rounds once: a share of 2^-(n + 1), n >= 6 here, and 0.2 % for onednn, which adds the bias as a real number
    assert built.shift.min() >= 6
    assert (difference != 0).double().mean() < 2**-7 + 0.002
    if engine == "qnnpack":  # exact integer sums, one rounding of acc M: bit by bit, from our accumulators
        once = torch.round(built.accumulate(codes) * real_accumulator(built)) + built.output.zero_point
        assert torch.equal(theirs, once.clamp(-128, 127).int())


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_no_floating_number_in_the_layer(granularity):
    built, codes, *_ = layer(granularity=granularity, activation="relu")
    expected = built(codes)
    with no_floats():
        assert torch.equal(built(codes), expected)
        built.accumulate(codes)
    assert not any(buffer.is_floating_point() for buffer in built.buffers())
    assert not list(built.parameters())


def test_a_large_multiplier():
    """An output grid finer than S1 S2: M > 1, a shift to the left."""
    built = IntegerLinear.build(
        torch.full((1, 1), 2.0),
        None,
        symmetric_quantizer(torch.tensor(127.0), 8),
        symmetric_quantizer(torch.tensor(1.27), 8),
    )
    assert built.shift.item() < 0
    # 2 q in codes of 0.01, saturated
    assert built(torch.tensor([[0], [1], [-1]], dtype=torch.int8)).flatten().tolist() == [0, 127, -127]


def test_shapes():
    built, codes, *_ = layer(rows=12)
    whole = built(codes)
    assert whole.dtype == torch.int8
    assert torch.equal(built(codes.view(3, 2, 2, -1)), whole.view(3, 2, 2, -1))
    assert torch.equal(built(codes[0]), whole[0])
    assert torch.equal(built(codes.t().contiguous().t()), whole)
    assert built(codes[:0]).shape == (0, 23)
    assert built(codes[:0].view(2, 0, 45)).shape == (2, 0, 23)


def test_without_an_output_grid_the_accumulators():
    built, codes, _, weight, bias = layer()
    raw = IntegerLinear.build(weight, bias, built.input, None)
    assert torch.equal(raw(codes), built.accumulate(codes))


def test_from_codes_is_build():
    built, codes, _, weight, bias = layer()
    quantized = quantize_matrix(weight, 8, "row")
    same = IntegerLinear(quantized.codes, quantized.scale.flatten(), bias, built.input, built.output)
    assert torch.equal(same(codes), built(codes))


def test_copies_and_state():
    built, codes, *_ = layer()
    assert torch.equal(copy.deepcopy(built)(codes), built(codes))
    assert {name: tensor.dtype for name, tensor in built.state_dict().items()} == {
        "weight": torch.int8,
        "bias": torch.int32,
        "multiplier": torch.int32,
        "shift": torch.int32,
    }


def test_macs_are_counted():
    built, codes, *_ = layer(rows=19, inner=45, out=23)
    assert count_macs(built, codes).total == 19 * 45 * 23


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_rows_of_zeros_and_of_almost_zeros_keep_their_bias(granularity):
    weight = torch.tensor([[0.0, 0.0], [1e-12, -1e-12], [0.5, -0.25]])
    if granularity == "tensor":
        weight = weight[:2]
    bias = torch.tensor([0.7, -0.9, 0.1])[: len(weight)]
    input = affine_quantizer(torch.tensor(-1.0), torch.tensor(3.0), 8, signed=True)
    output = affine_quantizer(torch.tensor(-1.0), torch.tensor(2.0), 8, signed=True)
    built = IntegerLinear.build(weight, bias, input, output, granularity=granularity)
    x = torch.tensor([[-1.0, 3.0], [0.0, 0.0], [2.0, 1.0]])
    difference = built(input.quantize(x)).int() - output.quantize(input(x) @ weight.t() + bias).int()
    assert difference.abs().max() <= 1
    # nothing but a bias, smaller than S1: its scale must not depend on the input's alone
    coarse = affine_quantizer(torch.tensor(-100.0), torch.tensor(300.0), 8, signed=True)
    zeros = IntegerLinear.build(torch.zeros(2, 3), bias[:2], coarse, output, granularity=granularity)
    assert (zeros(int8(1, 3))[0].int() - output.quantize(bias[:2]).int()).abs().max() <= 1
    empty = IntegerLinear.build(torch.zeros(2, 3), None, input, output, granularity=granularity)
    assert (empty(int8(4, 3)) == int(output.zero_point)).all()


def test_the_largest_width():
    input = affine_quantizer(torch.tensor(0.0), torch.tensor(1.0), 8, signed=True)  # zero point -128
    built = IntegerLinear.build(torch.ones(1, 66_311), None, input, None)
    assert built(torch.full((1, 66_311), 127, dtype=torch.int8)).item() == 66_311 * 127 * 255
    with pytest.raises(ValueError, match="at most 66311"):
        IntegerLinear.build(torch.ones(1, 66_312), None, input, None)
    with pytest.raises(ValueError, match="bias is too large"):
        IntegerLinear.build(torch.ones(1, 66_311), torch.ones(1), input, None)


def test_bad_input():
    grid = affine_quantizer(torch.tensor(-1.0), torch.tensor(1.0), 8, signed=True)
    weight = torch.ones(3, 2)
    rows = LinearQuantizer(torch.ones(2), torch.zeros(2, dtype=torch.int32), -128, 127)
    unsigned = affine_quantizer(torch.tensor(-1.0), torch.tensor(1.0), 8)
    cases = [
        ("granularity must be", lambda: IntegerLinear.build(weight, None, grid, grid, granularity="column")),
        ("activation must be", lambda: IntegerLinear.build(weight, None, grid, grid, activation="gelu")),
        ("activation must be", lambda: IntegerLinear.build(weight, None, grid, None, activation="relu")),
        ("a matrix", lambda: IntegerLinear.build(torch.ones(3), None, grid, grid)),
        ("weight must be finite", lambda: IntegerLinear.build(weight * torch.nan, None, grid, grid)),
        ("bias must be", lambda: IntegerLinear.build(weight, torch.ones(2), grid, grid)),
        ("bias must be", lambda: IntegerLinear.build(weight, torch.full((3,), torch.inf), grid, grid)),
        ("bits must be", lambda: IntegerLinear.build(weight, None, grid, grid, weight_bits=9)),
        ("input must have one scale", lambda: IntegerLinear.build(weight, None, rows, grid)),
        ("input must have int8", lambda: IntegerLinear.build(weight, None, unsigned, grid)),
        ("output must have int8", lambda: IntegerLinear.build(weight, None, grid, unsigned)),
        ("weight must be int8", lambda: IntegerLinear(weight, torch.tensor(1.0), None, grid, grid)),
        ("weight must be int8", lambda: IntegerLinear(int8(300, 300), torch.tensor(1.0), None, grid, grid)),
        ("scale must be", lambda: IntegerLinear(int8(3, 2, low=-127), torch.ones(2), None, grid, grid)),
        ("scale must be", lambda: IntegerLinear(int8(3, 2, low=-127), torch.zeros(3), None, grid, grid)),
        ("codes must be int8", lambda: integer_product(int8(2, 3).to(torch.uint8), int8(3, 2))),
        ("cannot be multiplied", lambda: integer_product(int8(2, 3), int8(2, 3))),
        ("cannot be multiplied", lambda: integer_product(int8(2, 2, 3), int8(3, 3, 2))),
        ("cannot be multiplied", lambda: integer_product(int8(3), int8(3, 2))),
        ("zero points must be", lambda: zero_point_product(int8(2, 3), 128, int8(3, 2), 0)),
        ("must be >= 1", lambda: largest_inner_size(0, 5)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    built = IntegerLinear.build(weight, None, grid, grid)
    with pytest.raises(ValueError, match="cannot be multiplied"):
        built(int8(4, 3))
    with pytest.raises(ValueError, match="must be int8"):
        built(torch.ones(4, 2))
