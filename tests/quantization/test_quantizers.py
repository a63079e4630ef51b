"""Linear quantization: golden values, torch.ao's observers and fake quantization, a double loop, expected noise."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

from effnlp_lessons.quantization.quantizers import (
    LinearQuantizer,
    affine_quantizer,
    block_of,
    check_bits,
    from_blocks,
    integer_range,
    min_max,
    quantize_matrix,
    symmetric_quantizer,
    to_blocks,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scalar(number):
    return torch.tensor(float(number))


reals = st.floats(-1e6, 1e6, allow_nan=False, width=32)


# ---------------------------------------------------------------------------------------------- one grid


def test_integer_ranges():
    assert [integer_range(bits, symmetric=False) for bits in (2, 3, 8)] == [(0, 3), (0, 7), (0, 255)]
    assert [integer_range(bits, symmetric=True) for bits in (2, 3, 8)] == [(-1, 1), (-3, 3), (-127, 127)]


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    # gemmlowp's parameter chooser, uint8; -1 .. 1 lies on a tie, 127.5
    [
        (-1, 1, 0.00784313725, 128),
        (-0.5, 3, 0.01372549, 36),
        (0.2, 3, 0.01176471, 0),
        (-3, -1, 0.01176471, 255),
    ],
)
def test_golden_parameters(low, high, scale, zero_point):
    quantizer = affine_quantizer(scalar(low), scalar(high), 8)
    assert quantizer.scale.item() == pytest.approx(scale, rel=1e-6) and quantizer.zero_point.item() == zero_point
    signed = affine_quantizer(scalar(low), scalar(high), 8, signed=True)
    assert (signed.q_min, signed.q_max) == (-128, 127) and signed.scale == quantizer.scale
    assert abs(signed.zero_point.item() - (zero_point - 128)) <= (low == -1)  # -0.5 goes to 0, 127.5 to 128


def test_half_goes_to_the_even_code():
    quantizer = symmetric_quantizer(scalar(127), 8)  # S = 1
    z = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.500001, 126.5, 127.5, 300, -300])
    assert quantizer.quantize(z).tolist() == [0, 2, 2, 0, -2, -2, 1, 126, 127, 127, -127]


@given(reals, reals, st.integers(2, 8), st.booleans())
def test_zero_is_exact_and_the_range_is_reached(one, other, bits, signed):
    low, high = sorted((one, other))
    width = max(high, 0) - min(low, 0)
    assume(width == 0 or width > 1e-35)  # below, a float32 step has few digits left
    quantizer = affine_quantizer(torch.tensor(low), torch.tensor(high), bits, signed)
    q_min, q_max = quantizer.q_min, quantizer.q_max
    assert q_max - q_min == 2**bits - 1 and q_min <= quantizer.zero_point <= q_max
    assert quantizer.scale > 0 and quantizer(torch.zeros(3)).tolist() == [0, 0, 0]
    assert quantizer.quantize(torch.zeros(1)).item() == quantizer.zero_point
    ends = quantizer.dequantize(torch.tensor([q_min, q_max], dtype=torch.int8 if signed else torch.uint8))
    # the grid is as wide as the range and shifted by half a step at most, to have a point at 0
    half = quantizer.scale.item() / 2 * (1 + 1e-4)
    if width:
        assert abs(ends[0].item() - min(low, 0)) <= half and abs(ends[1].item() - max(high, 0)) <= half


@given(st.floats(0, 1e6, width=32), st.integers(2, 8))
def test_symmetric_grids_are_mirrored(largest, bits):
    quantizer = symmetric_quantizer(torch.tensor(largest), bits)
    z = normal(50) * max(largest, 1)
    codes = quantizer.quantize(z)
    assert quantizer.zero_point == 0 and codes.dtype == torch.int8
    assert torch.equal(quantizer.quantize(-z), -codes) and codes.abs().max() <= 2 ** (bits - 1) - 1
    if largest > 1e-35:
        assert quantizer(torch.tensor([largest])).item() == pytest.approx(largest, rel=1e-6)


@given(st.integers(2, 8), st.booleans(), st.integers(0, 10_000))
def test_what_is_inside_moves_by_half_a_step_at_most(bits, signed, seed):
    z = normal(200, seed=seed).double() + 0.5
    for quantizer in (affine_quantizer(z.min(), z.max(), bits, signed), symmetric_quantizer(z.abs().max(), bits)):
        inside = quantizer.dequantize(torch.tensor([quantizer.q_min, quantizer.q_max], dtype=torch.int32))
        error = (quantizer(z.clamp(*inside.tolist())) - z.clamp(*inside.tolist())).abs()
        assert error.max() <= quantizer.scale / 2 * (1 + 1e-9)
        again = quantizer(z)
        assert torch.equal(quantizer(again), again)  # a point of the grid stays


def test_types_of_the_codes():
    z = normal(4, 5)
    assert affine_quantizer(scalar(-1), scalar(1), 4).quantize(z).dtype == torch.uint8
    assert affine_quantizer(scalar(-1), scalar(1), 4, signed=True).quantize(z).dtype == torch.int8
    quantizer = affine_quantizer(scalar(-1), scalar(1), 8)
    assert quantizer.zero_point.dtype == torch.int32 and quantizer(z).dtype == torch.float32
    assert affine_quantizer(scalar(-1).double(), scalar(1).double(), 8)(z.double()).dtype == torch.float64
    assert quantizer.quantize(torch.tensor([math.inf, -math.inf])).tolist() == [255, 0]
    assert quantizer.quantize(z[:0]).shape == (0, 5)


# ------------------------------------------------------------------------------------ torch's own quantizers


@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.7, 5.0])
def test_affine_is_that_of_the_observer(shift):
    z = normal(11, 70) + shift
    for dtype, signed in ((torch.quint8, False), (torch.qint8, True)):
        observer = MinMaxObserver(dtype=dtype)
        observer(z)
        scale, zero_point = observer.calculate_qparams()
        ours = affine_quantizer(z.min(), z.max(), 8, signed)
        assert torch.equal(ours.scale, scale[0]) and ours.zero_point == zero_point
        theirs = torch.fake_quantize_per_tensor_affine(z, scale.item(), zero_point.item(), ours.q_min, ours.q_max)
        assert torch.equal(ours(z), theirs)


def test_affine_by_channel_is_that_of_the_observer():
    z = normal(6, 50) * torch.arange(1, 7)[:, None] + torch.linspace(-4, 4, 6)[:, None]
    observer = PerChannelMinMaxObserver(ch_axis=0, dtype=torch.quint8, qscheme=torch.per_channel_affine)
    observer(z)
    scale, zero_point = observer.calculate_qparams()
    ours = quantize_matrix(z, 8, "row", symmetric=False)
    assert torch.equal(ours.scale[:, 0], scale) and torch.equal(ours.zero_point[:, 0], zero_point.int())
    theirs = torch.fake_quantize_per_channel_affine(z, scale, zero_point.int(), 0, 0, 255)
    assert torch.equal(ours.dequantize(), theirs)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_by_channel_is_torch_s_fake_quantization(bits):
    z = normal(6, 50, seed=bits)
    ours = quantize_matrix(z, bits)
    largest = 2 ** (bits - 1) - 1
    zeros = torch.zeros(6, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(z, ours.scale[:, 0], zeros, 0, -largest, largest)
    assert torch.equal(ours.dequantize(), theirs)


def test_the_symmetric_observer_divides_otherwise():
    z = normal(6, 50)
    observer = PerChannelMinMaxObserver(ch_axis=0, dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    observer(z)
    scale, _ = observer.calculate_qparams()
    torch.testing.assert_close(quantize_matrix(z, 8).scale[:, 0] * 127, scale * 127.5)


# ------------------------------------------------------------------------------------------------- blocks


def by_hand(matrix, bits, block, symmetric):
    """Codes and real numbers of every block in plain Python; round() is half to even."""
    rows, columns = matrix.shape
    q_min, q_max = integer_range(bits, symmetric)
    codes = [[0] * columns for _ in range(rows)]
    reals = [[0.0] * columns for _ in range(rows)]
    for top in range(0, rows, block[0]):
        for left in range(0, columns, block[1]):
            places = [(i, j) for i in range(top, top + block[0]) for j in range(left, left + block[1])]
            numbers = [matrix[i, j].item() for i, j in places]
            if symmetric:
                scale, zero = max(map(abs, numbers)) / q_max, 0
            else:
                low, high = min(0.0, *numbers), max(0.0, *numbers)
                scale = (high - low) / q_max
                zero = round(-low * q_max / (high - low))
            for (i, j), number in zip(places, numbers, strict=True):
                codes[i][j] = min(max(round(number / scale) + zero, q_min), q_max)
                reals[i][j] = scale * (codes[i][j] - zero)
    return codes, reals


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("granularity", "block"),
    [("tensor", (6, 10)), ("row", (1, 10)), (5, (1, 5)), ((3, 10), (3, 10)), ((2, 5), (2, 5)), ((6, 2), (6, 2))],
)
def test_every_granularity_by_hand(granularity, block, bits, symmetric):
    matrix = normal(6, 10, seed=bits).double()
    found = quantize_matrix(matrix, bits, granularity, symmetric)
    codes, numbers = by_hand(matrix, bits, block, symmetric)
    assert found.codes.tolist() == codes and found.block == block
    assert found.scale.shape == found.zero_point.shape == (6 // block[0], 10 // block[1])
    torch.testing.assert_close(found.dequantize(), torch.tensor(numbers, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_blocks_of_any_shape(row_blocks, column_blocks, rows, columns, transposed):
    matrix = normal(row_blocks * rows, column_blocks * columns)
    if transposed:  # other strides
        matrix = normal(column_blocks * columns, row_blocks * rows).T
    blocks = to_blocks(matrix, (rows, columns))
    assert blocks.shape == (row_blocks, column_blocks, rows * columns)
    assert torch.equal(from_blocks(blocks, (rows, columns)), matrix)
    for i in range(row_blocks):
        for j in range(column_blocks):
            piece = matrix[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            assert torch.equal(blocks[i, j], piece.flatten())
    found = quantize_matrix(matrix, 4, (rows, columns))
    step = found.scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    assert ((found.dequantize() - matrix).abs() <= step / 2 * (1 + 1e-5)).all()


def test_a_smaller_block_has_the_smaller_step():
    matrix = normal(8, 24)
    scales = [quantize_matrix(matrix, 4, granularity).scale for granularity in ("tensor", "row", 12, 4)]
    for scale in scales:  # the largest number of all lies in some block
        torch.testing.assert_close(scale.max(), matrix.abs().max() / 7)
    mean = [scale.mean() for scale in scales]
    assert mean == sorted(mean, reverse=True) and mean[-1] < mean[0] / 1.5


def test_blocks_by_name():
    assert block_of((6, 10), "tensor") == (6, 10) and block_of((6, 10), "row") == (1, 10)
    assert block_of((6, 10), 5) == (1, 5) and block_of((6, 10), (2, 10)) == (2, 10)


def test_rules_get_one_block_a_row_and_may_clip():
    matrix = normal(4, 6)
    seen = []

    def rule(values):
        seen.append(values)
        return torch.full((len(values),), -0.1), torch.full((len(values),), 0.3)

    found = quantize_matrix(matrix, 4, 3, symmetric=True, ranges=rule)
    assert torch.equal(seen[0], matrix.reshape(8, 3))
    assert torch.equal(found.scale, torch.full((4, 2), 0.3) / 7)
    assert found.dequantize().abs().max() <= 0.3 * (1 + 1e-6)
    affine = quantize_matrix(matrix, 4, 3, symmetric=False, ranges=rule)
    assert affine.scale[0, 0].item() == pytest.approx(0.4 / 15) and (affine.zero_point == 4).all()  # 3.75
    assert torch.equal(min_max(matrix)[0], matrix.min(-1).values)


def test_a_parameter_gives_codes_without_a_graph():
    weight = torch.nn.Parameter(normal(3, 4))
    found = quantize_matrix(weight, 4)
    assert not found.scale.requires_grad and not found.dequantize().requires_grad


# -------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_the_noise_is_a_twelfth_of_the_squared_step(bits):
    z = torch.rand(200_000, generator=torch.Generator().manual_seed(bits), dtype=torch.float64) * 2 - 1
    quantizer = affine_quantizer(z.min(), z.max(), bits)
    noise = (quantizer(z) - z).square().mean().item()
    # 200,000 squares of a uniform error: their mean is within 0.2 per cent; Z's shift costs the outer steps a little
    assert noise == pytest.approx(quantizer.scale.item() ** 2 / 12, rel=0.01 if bits > 4 else 0.3 / 2**bits * 4)


def test_a_bit_is_worth_six_decibels():
    z = normal(100_000).double()
    ratios = []
    for bits in (5, 6, 7, 8):
        quantizer = affine_quantizer(z.min(), z.max(), bits)
        ratios.append(10 * math.log10(z.square().mean() / (quantizer(z) - z).square().mean()))
    for before, after in zip(ratios, ratios[1:], strict=False):
        # 2^k - 1 steps: a little more than 20 log10(2) = 6.02
        assert 6.02 < after - before + 0.1 < 6.35
    assert 20 * math.log10(2) == pytest.approx(6.02, abs=0.001)


# --------------------------------------------------------------------------------------------- odd input


def test_ranges_without_width():
    for quantizer in (affine_quantizer(scalar(0), scalar(0), 4), symmetric_quantizer(scalar(0), 4)):
        assert quantizer.scale == 1 and quantizer(torch.zeros(2)).tolist() == [0, 0]
    assert affine_quantizer(scalar(2), scalar(2), 8)(scalar(2)).item() == pytest.approx(2)
    assert affine_quantizer(scalar(-2), scalar(-2), 8)(scalar(-2)).item() == pytest.approx(-2)
    matrix = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [-3, -3, -3, -3], [0, 0, 0, 1e-30]])
    for symmetric in (True, False):
        for bits in (2, 4, 8):
            found = quantize_matrix(matrix, bits, symmetric=symmetric)
            torch.testing.assert_close(found.dequantize(), matrix, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", True, None])
def test_bad_bits(bits):
    for call in (
        lambda: check_bits(bits),
        lambda: integer_range(bits, True),
        lambda: affine_quantizer(scalar(0), scalar(1), bits),
        lambda: symmetric_quantizer(scalar(1), bits),
        lambda: quantize_matrix(normal(2, 2), bits),
    ):
        with pytest.raises(ValueError, match="bits must be an integer from 2 to 8"):
            call()


@pytest.mark.parametrize(("low", "high"), [(1, 0), (math.nan, 1), (0, math.nan), (-math.inf, 1), (0, math.inf)])
def test_bad_ranges(low, high):
    with pytest.raises(ValueError, match="low"):
        affine_quantizer(scalar(low), scalar(high), 8)


@pytest.mark.parametrize("largest", [-1, math.nan, math.inf])
def test_bad_largest(largest):
    with pytest.raises(ValueError):
        symmetric_quantizer(scalar(largest), 8)


@pytest.mark.parametrize("granularity", ["column", 0, -2, 4, 7, (2, 3), (4, 10), (0, 10), (1, 2, 3), ()])
def test_bad_granularity(granularity):
    with pytest.raises(ValueError, match="granularity"):
        quantize_matrix(normal(6, 10), 4, granularity)


def test_bad_numbers():
    for bad in (math.nan, math.inf, -math.inf):
        matrix = normal(3, 4)
        matrix[1, 2] = bad
        for granularity in ("tensor", "row", 2):
            with pytest.raises(ValueError, match="finite|NaN"):
                quantize_matrix(matrix, 4, granularity)
    quantizer = LinearQuantizer(scalar(1), torch.tensor(0, dtype=torch.int32), -7, 7)
    with pytest.raises(ValueError, match="NaN"):
        quantizer.quantize(torch.tensor([0.0, math.nan]))
    for shape in ((4,), (2, 3, 4)):
        with pytest.raises(ValueError, match="matrix"):
            quantize_matrix(normal(*shape), 4)
