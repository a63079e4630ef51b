"""Fake quantization against torch's, the shadow weight by hand, and trained stacks against the integer engine."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.layers import block_linears
from effnlp_lessons.quantization.post_training import quantize_linears, quantized_layers
from effnlp_lessons.quantization.qat import (
    FakeQuantizedActivation,
    FakeQuantizedLinear,
    convert_weights,
    fake_quantize,
    fake_quantize_matrix,
    freeze_ranges_,
    prepare_qat,
)
from effnlp_lessons.quantization.quantizers import (
    LinearQuantizer,
    affine_quantizer,
    quantize_matrix,
    symmetric_quantizer,
)
from effnlp_lessons.quantization.ranges import percentile
from effnlp_lessons.training import TrainingPlan, train
from effnlp_lessons.transformer import Encoder, TransformerConfig

SMALL = TransformerConfig(vocab_size=40, max_length=16, d_model=12, layers=2, heads=3, d_ff=20, dropout=0.0)


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid(scale, zero_point, q_min, q_max):
    return LinearQuantizer(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), q_min, q_max)


def value_and_gradient(function, x):
    x = x.detach().clone().requires_grad_(True)
    y = function(x)
    (gradient,) = torch.autograd.grad((y * torch.linspace(1, 2, y.numel()).reshape(y.shape)).sum(), x)
    return y.detach(), gradient


# ------------------------------------------------------------------------- the straight-through estimator


@given(st.integers(0, 10_000), st.integers(2, 8), st.booleans())
def test_fake_quantize_is_torchs_away_from_the_ends(seed, bits, signed):
    low, high = -abs(normal(1, seed=seed)).item(), abs(normal(1, seed=seed + 1)).item()
    quantizer = affine_quantizer(torch.tensor(low), torch.tensor(high), bits, signed)
    x = normal(7, 11, seed=seed + 2, scale=1.5)
    levels = x / quantizer.scale + quantizer.zero_point
    # not where rounding x / S and x * (1 / S) may differ, nor within half a step outside of either end
    tie = (levels - levels.floor() - 0.5).abs() < 1e-3
    band = (levels < quantizer.q_min + 0.01) & (levels > quantizer.q_min - 0.51)
    band |= (levels > quantizer.q_max - 0.01) & (levels < quantizer.q_max + 0.51)
    x = x[~(tie | band)]
    ours = value_and_gradient(lambda x: fake_quantize(x, quantizer), x)
    scale, zero_point = quantizer.scale.item(), int(quantizer.zero_point)
    theirs = value_and_gradient(
        lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quantizer.q_min, quantizer.q_max), x
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    assert torch.equal(ours[1], theirs[1])


def test_fake_quantize_per_row_is_torchs_per_channel():
    x, scales = normal(5, 9, scale=2.0), torch.tensor([0.1, 0.03, 0.5, 0.07, 0.2])
    zero_points = torch.tensor([3, 0, 15, 7, 12], dtype=torch.int32)
    quantizer = LinearQuantizer(scales[:, None], zero_points[:, None], 0, 15)
    levels = x / quantizer.scale + quantizer.zero_point
    ends = ((levels > -0.51) & (levels < 0.01)) | ((levels > 14.99) & (levels < 15.51))
    x = torch.where(ends, 0.0, x)
    x = torch.where((quantizer.zero_point == 0) | (quantizer.zero_point == 15), x + 0.3 * quantizer.scale, x)
    keep = ~((x / quantizer.scale + quantizer.zero_point > 14.9) & (quantizer.zero_point == 15))
    ours = value_and_gradient(lambda x: fake_quantize(x, quantizer), x)
    theirs = value_and_gradient(lambda x: torch.fake_quantize_per_channel_affine(x, scales, zero_points, 0, 0, 15), x)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    assert torch.equal(ours[1][keep], theirs[1][keep]) and 0 < (ours[1] == 0).sum() < ours[1].numel()


def test_papers_and_torch_differ_in_half_a_step_beyond_the_ends():
    # S = 0.1, Z = 5, uint8: the grid reaches from -0.5 to 25.0
    x = torch.tensor([25.04, 25.06, -0.54, -0.56, 24.96, -0.46])
    quantizer = grid(0.1, 5, 0, 255)
    ours = torch.autograd.functional.jacobian(lambda x: fake_quantize(x, quantizer), x).diagonal()
    theirs = torch.autograd.functional.jacobian(
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 5, 0, 255), x
    ).diagonal()
    assert ours.tolist() == [0, 0, 0, 0, 1, 1]  # the papers: a <= x <= b
    assert theirs.tolist() == [1, 0, 1, 0, 1, 1]  # torch: the rounded integer is in q_min .. q_max
    # the value is the same
    torch.testing.assert_close(fake_quantize(x, quantizer), torch.fake_quantize_per_tensor_affine(x, 0.1, 5, 0, 255))


@given(st.integers(0, 10_000), st.integers(2, 8), st.sampled_from(["tensor", "row", 4, (3, 2)]))
def test_no_weight_of_a_minimum_maximum_range_loses_its_gradient(seed, bits, granularity):
    weight = normal(6, 8, seed=seed, scale=10.0 ** (seed % 7 - 3))
    value, gradient = value_and_gradient(lambda w: fake_quantize_matrix(w, bits, granularity), weight)
    assert (gradient > 0).all()  # also the largest, which is on the end of the grid up to a rounding
    assert torch.equal(value, quantize_matrix(weight, bits, granularity).dequantize())


def test_matrix_with_other_ranges_and_affine_grids():
    weight = normal(4, 40)
    weight[2, 5] = 9.0
    value, gradient = value_and_gradient(lambda w: fake_quantize_matrix(w, 4, "row", False, percentile(0.9)), weight)
    matrix = quantize_matrix(weight, 4, "row", False, percentile(0.9))
    assert torch.equal(value, matrix.dequantize())
    low, high = matrix.scale * (0 - matrix.zero_point), matrix.scale * (15 - matrix.zero_point)
    assert torch.equal(gradient > 0, (weight >= low) & (weight <= high)) and gradient[2, 5] == 0


def test_zeros_nothing_and_bad_input():
    assert torch.equal(fake_quantize_matrix(torch.zeros(2, 3), 4), torch.zeros(2, 3))
    assert fake_quantize(torch.zeros(0, 3), grid(0.1, 0, -7, 7)).shape == (0, 3)
    assert fake_quantize(torch.ones(2, dtype=torch.bfloat16), grid(0.1, 0, -7, 7)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="NaN"):
        fake_quantize(torch.tensor([float("nan")]), grid(0.1, 0, -7, 7))
    with pytest.raises(ValueError, match="bits must be"):
        FakeQuantizedLinear(nn.Linear(4, 4), 1)
    with pytest.raises(ValueError, match="does not divide"):
        FakeQuantizedLinear(nn.Linear(4, 4), 4, 3)
    with pytest.raises(ValueError, match="activation must be"):
        FakeQuantizedLinear(nn.Linear(4, 4), 4, activation="gelu")
    with pytest.raises(ValueError, match="delay must be"):
        FakeQuantizedActivation(8, delay=-1)


# ---------------------------------------------------------------------------------------- shadow weights


@pytest.mark.parametrize("granularity", ["tensor", "row", 5])
def test_one_step_moves_the_shadow_weight_by_the_gradient_of_the_quantized_weight(granularity):
    torch.manual_seed(0)
    linear, x = nn.Linear(10, 7), normal(6, 10)
    layer = FakeQuantizedLinear(copy.deepcopy(linear), 3, granularity)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        w, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
        w_hat = quantize_matrix(w, 3, granularity).dequantize().requires_grad_(True)
        (expected,) = torch.autograd.grad(F.linear(x, w_hat, bias).square().sum(), w_hat)
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        # w_{t+1} = w_t - eta dL/dw_hat, to the bit
        assert torch.equal(layer.weight.grad, expected)
        assert torch.equal(layer.weight.detach(), w.add(expected, alpha=-0.1))
        # the shadow is off the grid
        assert (layer.weight != quantize_matrix(layer.weight, 3, granularity).dequantize()).float().mean() > 0.5


class QuantizedInPlace(nn.Linear):
    """The mistake: the quantized weight is stored, and there is no shadow."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.data = quantize_matrix(self.weight, 3, "tensor").dequantize()
        return super().forward(x)


def codes_by_step(layer, steps):
    """Codes of the weight before each step; every update is a fifth of a grid step, for one weight."""
    optimizer, codes = torch.optim.SGD([layer.weight], lr=1.0), []
    x = torch.tensor([[0.0, 1.0, 0.0]])
    for _ in range(steps):
        optimizer.zero_grad()
        (-0.2 * layer(x)).sum().backward()  # dL/dw = -0.2 for the weight in the middle
        optimizer.step()
        codes.append(quantize_matrix(layer.weight.detach(), 3, "tensor").codes[0, 1].item())
    return codes


def test_small_updates_add_up_in_the_shadow_and_vanish_without_it():
    start = torch.tensor([[3.0, 0.05, -3.0]])  # S = 1: borders of rounding at 0.5, 1.5, ...
    shadow = FakeQuantizedLinear(nn.Linear(3, 1, bias=False), 3, "tensor")
    stored = QuantizedInPlace(3, 1, bias=False)
    for layer in (shadow, stored):
        layer.weight.data = start.clone()
    assert codes_by_step(shadow, 8) == [0, 0, 1, 1, 1, 1, 1, 2]  # 0.25, 0.45, 0.65, ..., 1.45, 1.65
    assert codes_by_step(stored, 8) == [0] * 8
    assert stored.weight[0, 1].item() == pytest.approx(0.2)  # one update, taken back in every forward pass


# --------------------------------------------------------------------------------------- activation grids


def test_activations_pass_until_the_delay_is_over():
    grid_of = FakeQuantizedActivation(4, delay=2)
    batches = [normal(5, 3, seed=i) for i in range(4)]
    assert torch.equal(grid_of.eval()(batches[0]), batches[0])  # nothing seen yet
    grid_of.train()
    outputs = [grid_of(x) for x in batches]
    assert all(torch.equal(y, x) for x, y in zip(batches[:2], outputs[:2], strict=True))
    assert all(
        y.unique().numel() <= 16 and not torch.equal(y, x) for x, y in zip(batches[2:], outputs[2:], strict=True)
    )
    assert grid_of.steps == 4
    # evaluation after exactly `delay` steps quantizes: the next step would
    after_two = FakeQuantizedActivation(4, delay=2)
    for x in batches[:2]:
        after_two(x)
    assert not torch.equal(after_two.eval()(batches[0]), batches[0])


def test_ranges_are_moving_averages_that_neither_evaluation_nor_freezing_moves():
    activation, batches = FakeQuantizedActivation(8, rate=0.1), [normal(6, 2, seed=i) + 1 for i in range(4)]
    low, high = batches[0].min(), batches[0].max()
    activation(batches[0])
    for x in batches[1:3]:
        activation(x)
        low, high = low + 0.1 * (x.min() - low), high + 0.1 * (x.max() - high)
    torch.testing.assert_close(torch.stack(activation.range.bounds()), torch.stack([low, high]))
    before = [bound.clone() for bound in activation.range.bounds()]
    activation.eval()(batches[3] * 100)
    assert list(activation.range.bounds()) == before
    freeze_ranges_(nn.Sequential(activation.train()))
    activation(batches[3] * 100)
    assert list(activation.range.bounds()) == before
    # all of it is in the state dict
    copied = FakeQuantizedActivation(8)
    copied.load_state_dict(activation.state_dict())
    assert torch.equal(copied.eval()(batches[3]), activation.eval()(batches[3])) and copied.frozen


def test_the_fused_activation_comes_before_the_output_grid():
    layer = FakeQuantizedLinear(nn.Linear(4, 5), 8, output=FakeQuantizedActivation(8), activation="relu")
    y = layer(normal(20, 4))
    assert (y >= 0).all() and layer.output.range.low == 0
    assert layer.output.quantizer.zero_point == -128  # no code is spent on what ReLU removed


# ------------------------------------------------------------------------------------------ whole models


def classifier(seed=0):
    torch.manual_seed(seed)
    model = SentenceClassifier(Encoder(SMALL, seed=seed), classes=2, seed=seed)
    for parameter in model.parameters():
        parameter.data += normal(*parameter.shape, seed=seed, scale=0.2)
    return model.eval()


class Words:
    """Sentences of random words; the label is whether the first is in the upper half of the vocabulary."""

    def __init__(self, count=96, seed=0):
        self.ids = torch.randint(1, 40, (count, 7), generator=torch.Generator().manual_seed(seed))
        self.labels, self.lengths = (self.ids[:, 0] >= 20).long(), [7] * count

    def batch(self, indices):
        return self.ids[indices], torch.ones(len(indices), 7, dtype=torch.bool), self.labels[indices]


def loss(model, batch):
    ids, mask, labels = batch
    return F.cross_entropy(model(ids, mask), labels)


def test_prepare_wraps_the_blocks_and_leaves_the_model_alone():
    model = classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = prepare_qat(model, 4, "row")
    wrapped = [name for name, part in prepared.named_modules() if isinstance(part, FakeQuantizedLinear)]
    assert wrapped == list(block_linears(model)) and len(wrapped) == 12
    assert set(prepared.state_dict()) == set(before) and not prepared.training
    words = Words()
    train(prepared, words, loss, TrainingPlan(1, 16, 1e-2), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(
        prepared.encoder.blocks[0].token_mixer.query.weight, model.encoder.blocks[0].token_mixer.query.weight
    )
    with pytest.raises(ValueError, match="at least one"):
        prepare_qat(nn.Sequential(nn.Linear(3, 3)), 4)
    with pytest.raises(ValueError, match="must be a linear layer"):
        prepare_qat(model, 4, names=["encoder.embeddings"])
    named = prepare_qat(model, {0: 2, 1: 8}, 4, names=["encoder.blocks.1.channel_mixer.expand"])
    assert named.encoder.blocks[1].channel_mixer.expand.bits == 8


def test_before_training_it_is_post_training_quantization():
    model, (ids, mask, _) = classifier(), Words(20).batch(list(range(20)))
    for bits, granularity, symmetric in ((4, "row", True), (2, 4, True), (3, "tensor", False)):
        ours = prepare_qat(model, bits, granularity, symmetric=symmetric)(ids, mask)
        assert torch.equal(ours, quantize_linears(model, bits, granularity, symmetric)(ids, mask))


@pytest.mark.parametrize("activations", [None, 8])
def test_training_learns_through_the_grid_and_the_codes_give_the_same_logits(activations):
    words, (ids, mask, labels) = Words(), Words().batch(list(range(96)))
    model = prepare_qat(classifier(), 3, "row", activations=activations, delay=3)
    start = loss(model, (ids, mask, labels)).item()
    train(model, words, loss, TrainingPlan(10, 16, 5e-3), progress=False)
    assert loss(model, (ids, mask, labels)).item() < start / 2
    converted = convert_weights(model)
    assert len(quantized_layers(converted)) == 12
    assert all(layer.codes.abs().max() <= 3 for layer in quantized_layers(converted).values())
    assert torch.equal(converted(ids, mask), model(ids, mask))
    with pytest.raises(ValueError, match="no fake-quantized layer"):
        convert_weights(classifier())


def test_a_run_that_was_killed_goes_on_with_its_ranges(tmp_path):
    class Killed(Exception):
        pass

    def kill(model, step):
        if step == 7:
            raise Killed

    def prepared():
        return prepare_qat(classifier(), 4, activations=8, delay=4)

    plan, file = TrainingPlan(2, 16, 1e-3), tmp_path / "checkpoint.safetensors"
    whole = prepared()
    train(whole, Words(), loss, plan, progress=False)
    with pytest.raises(Killed):
        train(prepared(), Words(), loss, plan, checkpoint=file, checkpoint_every=3, after_step=kill, progress=False)
    resumed = prepared()
    train(resumed, Words(), loss, plan, checkpoint=file, checkpoint_every=3, progress=False)
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in resumed.state_dict().items())


def test_the_ends_of_a_symmetric_grid_are_inside():
    quantizer = symmetric_quantizer(torch.tensor(0.7), 4)
    x = torch.tensor([-0.75, -0.7, 0.0, 0.69, 0.75])
    jacobian = torch.autograd.functional.jacobian(lambda x: fake_quantize(x, quantizer), x).diagonal()
    assert jacobian.tolist() == [0, 1, 1, 1, 0]
