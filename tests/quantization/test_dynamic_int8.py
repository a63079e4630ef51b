"""The dynamic layer against the same codes in float64, and inside the course's encoder."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from effnlp_lessons.measure import bytes_on_disk, count_macs
from effnlp_lessons.quantization.dynamic_int8 import DynamicInt8Linear, with_dynamic_int8
from effnlp_lessons.quantization.quantizers import quantize_matrix, symmetric_quantizer
from effnlp_lessons.transformer import Encoder, TransformerConfig


def linear_and_input(rows, inner, out, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inner, out, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear, 3 * torch.randn(rows, inner, generator=generator) + 1


def reference(linear, x):
    """Codes and scales multiplied in float64; the input's codes by the layer's rule, times 1 / S1."""
    weight = quantize_matrix(linear.weight, 8, "row")
    scale = x.abs().max().item() / 127
    codes = torch.round(x * (1 / scale)).double()
    real = scale * codes @ (weight.codes.double() * weight.scale.double()).t()
    return real if linear.bias is None else real + linear.bias.detach().double()


@given(st.integers(1, 20), st.integers(1, 50), st.integers(1, 20), st.booleans(), st.integers(0, 1_000))
def test_is_the_product_of_the_dequantized(rows, inner, out, bias, seed):
    linear, x = linear_and_input(rows, inner, out, bias, seed)
    y, expected = DynamicInt8Linear(linear)(x), reference(linear, x)
    assert y.dtype == torch.float32
    # float32 against float64, beside the largest number: sums cancel
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-6 * (1 + expected.abs().max().item()))


def test_codes_are_those_of_the_symmetric_grid():
    _, x = linear_and_input(50, 40, 30)
    scale = x.abs().max().item() / 127
    difference = torch.round(x * (1 / scale)) - symmetric_quantizer(x.abs().max(), 8).quantize(x)
    assert (difference != 0).double().mean() < 1e-3  # a half, seen from float32 on either side


def test_near_the_float_layer():
    linear, x = linear_and_input(200, 384, 96)
    error, y = DynamicInt8Linear(linear)(x) - linear(x), linear(x)
    assert error.std() < 0.02 * y.std()
    assert error.mean().abs() < 0.01 * y.std()


def test_shapes_and_layouts():
    linear, x = linear_and_input(12, 9, 5)
    layer = DynamicInt8Linear(linear)
    y = layer(x)
    assert torch.equal(layer(x.view(3, 2, 2, 9)), y.view(3, 2, 2, 5))
    assert torch.equal(layer(x.t().contiguous().t()), y)
    assert torch.equal(layer(x.repeat_interleave(2, 1)[:, ::2]), y)
    assert layer(x[0]).shape == (5,)
    assert layer(x[:0]).shape == (0, 5)
    assert layer(x[:0].view(2, 0, 9)).shape == (2, 0, 5)
    assert not layer(x.requires_grad_()).requires_grad
    column, z = linear_and_input(4, 1, 6)
    # the rescaling is in float32, the reference in float64
    torch.testing.assert_close(DynamicInt8Linear(column)(z).double(), reference(column, z), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-32])
def test_inputs_of_zero_or_next_to_it(size):
    linear, _ = linear_and_input(1, 9, 5)
    y = DynamicInt8Linear(linear)(torch.full((4, 9), size))
    assert torch.equal(y, linear.bias.detach().expand(4, -1))


def test_input_is_left_as_it_was():
    linear, x = linear_and_input(12, 9, 5)
    before = x.clone()
    DynamicInt8Linear(linear)(x)
    assert torch.equal(x, before)


def test_in_the_encoder():
    config = TransformerConfig(vocab_size=200, max_length=24, d_model=64, layers=2, heads=4, d_ff=128)
    model = Encoder(config, seed=0).eval()
    int8 = with_dynamic_int8(model)
    ids = torch.randint(1, 200, (4, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        ours, theirs = int8(ids, mask).last, model(ids, mask).last
    assert (ours - theirs).std() < 0.05 * theirs.std()
    assert not torch.equal(ours, theirs)
    kinds = [type(m) for m in int8.modules()]
    assert nn.Linear not in kinds
    assert kinds.count(DynamicInt8Linear) == [type(m) for m in model.modules()].count(nn.Linear)
    assert count_macs(int8, ids, mask).total == count_macs(model, ids, mask).total
    linears = sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear)
    assert bytes_on_disk(int8) < bytes_on_disk(model) - 2.8 * linears  # a byte instead of four, and a scale a row


def test_a_lone_layer_and_nested_ones():
    linear, x = linear_and_input(3, 9, 5)
    alone = with_dynamic_int8(linear)
    nested = with_dynamic_int8(nn.Sequential(nn.Sequential(linear), nn.ReLU()))
    assert torch.equal(nested(x), alone(x).relu())
    assert type(linear) is nn.Linear
    assert not nested.training


def test_bad_input():
    linear, x = linear_and_input(3, 9, 5)
    layer = DynamicInt8Linear(linear)
    for bad in (x[:, :8], x.int(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="x must be floating point"):
            layer(bad)
    for value in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="x must be finite"):
            layer(torch.cat([x, torch.full((1, 9), value)]))
    wide = torch.nn.utils.skip_init(nn.Linear, 133_145, 1)
    with pytest.raises(ValueError, match="at most 133144"):
        DynamicInt8Linear(wide)
