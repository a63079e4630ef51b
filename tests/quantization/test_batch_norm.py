"""A folded layer is the layer and its normalisation; folded layers on integers are the network of real numbers."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from effnlp_lessons.quantization.batch_norm import fold_batch_norm, fold_statistics
from effnlp_lessons.quantization.float_guard import no_floats
from effnlp_lessons.quantization.integer_only import IntegerLinear
from effnlp_lessons.quantization.quantizers import affine_quantizer, quantize_matrix


def pair(inner=7, out=5, bias=True, affine=True, seed=0):
    """A linear layer and a batch norm with random parameters and statistics, float64."""
    generator = torch.Generator().manual_seed(seed)
    linear, norm = nn.Linear(inner, out, bias=bias).double(), nn.BatchNorm1d(out, affine=affine).double()
    with torch.no_grad():
        for parameter in (*linear.parameters(), *norm.parameters(), norm.running_mean):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))  # gamma < 0 too
        norm.running_var.copy_(torch.rand(out, generator=generator) * 3)
        norm.running_var[0] = 0
    return linear, norm


def data(rows, width, seed=1):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_folded_is_the_pair_in_evaluation(bias, affine):
    linear, norm = pair(bias=bias, affine=affine)
    norm.eval()
    x = data(11, 7)
    folded = fold_batch_norm(linear, norm)
    # a variance of 0: the outputs are hundreds
    torch.testing.assert_close(folded(x), norm(linear(x)), rtol=1e-12, atol=1e-12)
    assert folded.weight.requires_grad
    assert folded.weight.data_ptr() != linear.weight.data_ptr()


def test_fold_of_the_batch_is_the_pair_in_training():
    linear, norm = pair()
    x, target = data(11, 7), data(11, 5, seed=2)
    parameters = [*linear.parameters(), *norm.parameters()]
    y = norm(linear(x))
    gradients = torch.autograd.grad((y * target).sum(), parameters)

    before = linear(x)  # the layer runs once for the statistics
    weight, bias = fold_statistics(linear, norm, before.mean(0), before.var(0, correction=0))
    folded = nn.functional.linear(x, weight, bias)  # and once folded
    torch.testing.assert_close(folded, y, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad((folded * target).sum(), parameters), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)  # two long chains of float64


def test_the_generator_is_left_alone():
    before = torch.get_rng_state()
    linear, norm = pair()
    torch.set_rng_state(before)
    fold_batch_norm(linear, norm)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_folded_network_on_integers(granularity):
    """Two layers with batch norm, one ReLU: codes within one of fake quantization, and near the real network."""
    widths, generator = (20, 33, 9), torch.Generator().manual_seed(0)
    pairs = [pair(inner, out, seed=i) for i, (inner, out) in enumerate(pairwise(widths))]
    for _, norm in pairs:
        norm.running_var += 5
        norm.eval()
    x = torch.randn(300, widths[0], generator=generator, dtype=torch.float64)
    real = [x]
    for i, (linear, norm) in enumerate(pairs):
        y = norm(linear(real[-1])).detach()
        real.append(y.relu() if i == 0 else y)
    grids = [affine_quantizer(z.min(), z.max(), 8, signed=True) for z in real]
    folded = [fold_batch_norm(linear, norm) for linear, norm in pairs]
    layers = [
        IntegerLinear.build(f.weight, f.bias, grids[i], grids[i + 1], 8, granularity, "relu" if i == 0 else None)
        for i, f in enumerate(folded)
    ]

    codes = [grids[0].quantize(x)]
    with no_floats():
        for layer in layers:
            codes.append(layer(codes[-1]))

    for i, f in enumerate(folded):  # every layer from the same codes
        weight = quantize_matrix(f.weight, 8, granularity).dequantize()
        y = nn.functional.linear(grids[i].dequantize(codes[i]), weight, f.bias).detach()
        fake = grids[i + 1].quantize(y.relu() if i == 0 else y)
        assert (codes[i + 1].int() - fake.int()).abs().max() <= 1
    error = grids[2].dequantize(codes[2]) - real[2]
    assert error.std() < 0.05 * real[2].std()


def test_bad_input():
    linear, norm = pair()
    with pytest.raises(ValueError, match="widths must agree"):
        fold_batch_norm(linear, nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="running statistics"):
        fold_batch_norm(linear, nn.BatchNorm1d(5, track_running_stats=False))
