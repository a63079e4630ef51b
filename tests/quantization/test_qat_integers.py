"""Training for integer-only inference: every integer layer computes what training computed; folded norms."""

import copy

import pytest
import torch
from torch import nn

from effnlp_lessons.quantization.batch_norm import fold_batch_norm
from effnlp_lessons.quantization.post_training import (
    QuantizedLinear,
)
from effnlp_lessons.quantization.qat import (
    convert_weights,
    freeze_ranges_,
)
from effnlp_lessons.quantization.qat_integers import (
    FakeQuantizedNormedLinear,
    convert_to_integers,
    prepare_integer_stack,
)
from effnlp_lessons.quantization.quantizers import (
    quantize_matrix,
)


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------- to the integers


def trained_stack(stack, bits=8, granularity="row", steps=30, delay=5):
    torch.manual_seed(1)
    prepared = prepare_integer_stack(stack, bits, granularity, delay=delay, rate=0.2)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    generator, width = torch.Generator().manual_seed(2), prepared[0].in_features
    for step in range(steps):
        if step == steps - 5:
            freeze_ranges_(prepared)
        x = torch.randn(32, width, generator=generator)
        optimizer.zero_grad()
        (prepared.train()(x)[:, 0] - x[:, 0].sin()).square().mean().backward()
        optimizer.step()
    return prepared.eval()


def without_input_grid(layer):
    """The layer for numbers that are on its input grid already."""
    layer = copy.deepcopy(layer)
    layer.input = None
    return layer


STACKS = {
    "relu": lambda: nn.Sequential(nn.Linear(13, 21), nn.ReLU(), nn.Linear(21, 9), nn.ReLU(), nn.Linear(9, 3)),
    "relu6": lambda: nn.Sequential(nn.Linear(13, 5), nn.ReLU6(), nn.Linear(5, 3, bias=False), nn.Linear(3, 4)),
    "norms": lambda: nn.Sequential(
        nn.Linear(13, 17, bias=False), nn.BatchNorm1d(17), nn.ReLU6(), nn.Linear(17, 6), nn.BatchNorm1d(6)
    ),
}


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", STACKS)
def test_every_integer_layer_is_within_one_unit_of_training(kind, bits, granularity):
    torch.manual_seed(0)
    trained = trained_stack(STACKS[kind](), bits, granularity)
    integers, x = convert_to_integers(trained), normal(400, 13, seed=5, scale=1.3)
    assert len(integers) == len(trained)
    h = trained[0].input(x)
    for layer, integer in zip(trained, integers, strict=True):
        codes = integer.input.quantize(h)
        assert torch.equal(integer.input.dequantize(codes), h)  # what training computes with is on inference's grid
        h = without_input_grid(layer)(h)
        difference = (integer(codes).int() - integer.output.quantize(h).int()).abs().double()
        assert difference.max() <= 1
        # M = S1 S2 / S3 is a unit of the accumulator in units of the output. The rounded bias is off by M / 2 at most,
        # the product with the fixed-point multiplier by M: that much moves a share of at most 1.5 M over a border
        assert difference.mean() <= 1.5 * (integer.accumulator_scale / integer.output.scale).mean()
    # the last layer of the whole integer path: differences may add up, one unit a layer
    out = integers(integers[0].input.quantize(x))
    assert (integers[-1].output.dequantize(out) - trained(x)).abs().max() <= 6 * integers[-1].output.scale


def test_a_row_of_zeros_keeps_its_bias():
    """Its scale is 1 for want of weights: S1 S2, the unit of its bias, would be far coarser than the output's."""
    stack, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), normal(50, 4, scale=40)
    with torch.no_grad():
        stack[0].weight.copy_(normal(3, 4, seed=1, scale=0.01))
        stack[0].weight[1] = 0
        stack[0].bias[1] = 0.777
    prepared = prepare_integer_stack(stack)
    prepared(x)
    prepared.eval()
    integers = convert_to_integers(prepared)
    out = integers[-1].output.dequantize(integers(integers[0].input.quantize(x)))
    # one unit in the last place, and a rounding of float32
    assert (out - prepared(x)).abs().max() <= 1.001 * integers[-1].output.scale


def test_what_cannot_become_integers():
    stack = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with pytest.raises(ValueError, match="stack must be"):
        prepare_integer_stack(nn.Sequential(nn.Linear(4, 3), nn.GELU()))
    with pytest.raises(ValueError, match="stack must be"):
        prepare_integer_stack(nn.Sequential(nn.ReLU(), nn.Linear(4, 3)))
    with pytest.raises(ValueError, match="at least one"):
        prepare_integer_stack(nn.Sequential())
    with pytest.raises(ValueError, match="must come from"):
        convert_to_integers(stack)
    with pytest.raises(ValueError, match="no batch"):
        convert_to_integers(prepare_integer_stack(stack))
    delayed = prepare_integer_stack(stack, delay=3)
    delayed(normal(5, 4))
    with pytest.raises(ValueError, match="in no step yet"):
        convert_to_integers(delayed)
    grouped = prepare_integer_stack(stack, granularity=2)
    grouped(normal(5, 4))
    with pytest.raises(ValueError, match="one grid a row"):
        convert_to_integers(grouped)


# -------------------------------------------------------------------------------------------- folded norms


def test_a_folded_norm_is_the_norm(monkeypatch):
    """Without quantization, folding changes nothing: outputs, gradients and running statistics, in both modes."""
    from effnlp_lessons.quantization import qat

    monkeypatch.setattr(qat, "fake_quantize_matrix", lambda weight, *_: weight)
    torch.manual_seed(0)
    linear, norm = nn.Linear(6, 5).double(), nn.BatchNorm1d(5).double()
    norm.weight.data, norm.bias.data = normal(5, seed=1).double(), normal(5, seed=2).double()
    plain, folded = nn.Sequential(linear, norm), FakeQuantizedNormedLinear(*copy.deepcopy((linear, norm)), 8)
    for seed in range(3):
        x = normal(9, 6, seed=seed).double() + 1
        outputs = [model(x) for model in (plain, folded)]
        torch.testing.assert_close(*outputs)
        for y, model in zip(outputs, (plain, folded), strict=True):
            model.zero_grad()
            y.pow(3).sum().backward()
        torch.testing.assert_close(folded.weight.grad, linear.weight.grad)
        torch.testing.assert_close(folded.norm.weight.grad, norm.weight.grad)
    assert torch.equal(folded.norm.running_mean, norm.running_mean)
    assert torch.equal(folded.norm.running_var, norm.running_var) and folded.norm.num_batches_tracked == 3
    torch.testing.assert_close(folded.eval()(x), plain.eval()(x))
    freeze_ranges_(folded)
    torch.testing.assert_close(folded.train()(x * 5), plain(x * 5))  # frozen: the running statistics in training too
    assert torch.equal(folded.norm.running_mean, norm.running_mean)


def test_the_folded_weight_is_what_is_quantized():
    torch.manual_seed(0)
    linear, norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
    norm.weight.data, norm.running_var = torch.tensor([1.0, 30.0, 0.1, 2.0]), torch.tensor([4.0, 1.0, 1.0, 0.2])
    layer = FakeQuantizedNormedLinear(linear, norm, 4, "tensor").eval()
    folded = fold_batch_norm(linear, norm.eval()).weight
    assert torch.equal(layer.quantized_weight().codes, quantize_matrix(folded, 4, "tensor").codes)
    assert not torch.equal(layer.quantized_weight().codes, quantize_matrix(linear.weight, 4, "tensor").codes)
    x = normal(8, 6)
    assert torch.equal(convert_weights(nn.Sequential(layer))(x), layer(x))
    assert isinstance(convert_weights(nn.Sequential(layer))[0], QuantizedLinear)
    with pytest.raises(ValueError, match="norm must have"):
        FakeQuantizedNormedLinear(linear, nn.BatchNorm1d(5), 4)
    with pytest.raises(ValueError, match="norm must have"):
        FakeQuantizedNormedLinear(linear, nn.BatchNorm1d(4, track_running_stats=False), 4)
