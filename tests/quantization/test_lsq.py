"""LSQ: the step's gradient against the paper's cases, a smooth surrogate and torch's operation; what it is good for."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from effnlp_lessons.layers import block_linears
from effnlp_lessons.quantization.lsq import LsqLinear, initial_step, lsq_quantize, lsq_range, prepare_lsq
from effnlp_lessons.quantization.qat import convert_weights
from effnlp_lessons.training import TrainingPlan, train
from effnlp_lessons.transformer import Encoder, TransformerConfig


def normal(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(x, step, bits, upstream=None, signed=True):
    """(value, gradient of x, gradient of the step)."""
    x, step = x.detach().clone().requires_grad_(True), step.detach().clone().requires_grad_(True)
    y = lsq_quantize(x, step, bits, signed)
    return y.detach(), *torch.autograd.grad((y * (1 if upstream is None else upstream)).sum(), (x, step))


def test_ranges_and_first_step():
    assert lsq_range(2) == (2, 1) and lsq_range(8) == (128, 127) and lsq_range(4, signed=False) == (0, 15)
    x = torch.tensor([[1.0, -3.0], [0.0, 0.0]])
    assert initial_step(x, 4).tolist() == [pytest.approx(2 * 2 / math.sqrt(7)), 1]
    assert initial_step(x, 2)[0] == 4  # Q_P = 1


def test_the_papers_cases_one_number_at_a_time():
    # s = 0.5, 3 bits: Q_N = 4, Q_P = 3; each row is one number, so N = 1
    v = torch.tensor([[-5.0], [-4.3], [-4.0], [-3.8], [-0.4], [0.4], [1.7], [2.9], [3.0], [3.4], [9.0]])
    value, of_x, of_step = gradients(0.5 * v, torch.full((11,), 0.5), 3)
    assert value[:, 0].tolist() == [-2, -2, -2, -2, 0, 0, 1, 1.5, 1.5, 1.5, 1.5]
    assert of_x[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]
    expected = torch.tensor([-4, -4, -4, -0.2, 0.4, -0.4, 0.3, 0.1, 3, 3, 3])
    torch.testing.assert_close(of_step * math.sqrt(3), expected, rtol=1e-5, atol=1e-6)
    assert lsq_quantize(torch.tensor([[-1.0, 0.6, 99.0]]), torch.tensor([0.5]), 2, signed=False).tolist() == [
        [0, 0.5, 1.5]
    ]


@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(1, 40))
def test_gradient_is_that_of_the_surrogate_with_the_rounding_error_held_fixed(seed, bits, numbers):
    """s (x / s + r) with r = round(v) - v of the point where we stand, -s Q_N or s Q_P where it is clipped.

    The slope of s round(x / s) itself is round(v) between its jumps; finite differences would find that one.
    """
    q_n, q_p = lsq_range(bits)
    x, step = normal(3, numbers, seed=seed), normal(3, seed=seed + 1).abs() / q_p + 0.01
    upstream = normal(3, numbers, seed=seed + 2)
    v0 = x / step[:, None]
    held = torch.round(v0) - v0

    def surrogate(s):
        v = x / s[:, None]
        inside = s[:, None] * (v + held)
        y = torch.where(v0 <= -q_n, -q_n * s[:, None], torch.where(v0 >= q_p, q_p * s[:, None], inside))
        return (y * upstream).sum(-1)

    h = 1e-4 * step
    difference = (surrogate(step + h) - surrogate(step - h)) / (2 * h)
    value, _, of_step = gradients(x, step, bits, upstream)
    torch.testing.assert_close((value * upstream).sum(-1), surrogate(step))  # it touches the function there
    # the gradient is scaled by 1 / sqrt(N Q_P); differences of a function linear in s: rounding of float64 alone
    torch.testing.assert_close(of_step, difference / math.sqrt(numbers * q_p), rtol=1e-7, atol=1e-9)


def test_the_slope_between_jumps_is_another_and_misleads():
    """Over many jumps s round(x / s) stays near x: its mean slope is near 0, as LSQ's, and not near round(v)."""
    x, steps = torch.tensor([3.0], dtype=torch.float64), torch.linspace(0.1, 0.11, 20_001, dtype=torch.float64)
    y = lsq_quantize(x.expand(len(steps), 1), steps, 8)[:, 0]
    mean_slope = (y[-1] - y[0]) / (steps[-1] - steps[0])
    between = torch.round(x / steps).mean()  # d/ds s round(x / s), where it exists
    ours = gradients(x.expand(len(steps), 1), steps, 8)[2].mean() * math.sqrt(127)
    # y differs from x by half a step at most, at either end: the mean slope is within 0.11 / 0.01
    assert abs(mean_slope) <= 11 and abs(ours) < 0.5 and 27 < between < 30


def torchs(x, step, bits, factor=1.0):
    x, step = x.detach().clone().requires_grad_(True), step.detach().clone().requires_grad_(True)
    q_n, q_p = lsq_range(bits)
    y = torch._fake_quantize_learnable_per_tensor_affine(x, step, torch.zeros(1), -q_n, q_p, factor)
    return y.detach(), *torch.autograd.grad(y.sum(), (x, step))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_torchs_operation_agrees_away_from_the_borders(bits):
    (q_n, q_p), step = lsq_range(bits), torch.tensor([0.07])
    v = normal(5_000, seed=bits, scale=0.7 * q_p + 1, dtype=torch.float32)
    near = ((v > -q_n - 0.51) & (v < -q_n + 0.01)) | ((v > q_p - 0.01) & (v < q_p + 0.51))
    v = v[~near & ((v - v.floor() - 0.5).abs() > 1e-3)]
    factor = (len(v) * q_p) ** -0.5
    ours, theirs = gradients((step * v)[None], step, bits), torchs(step * v, step, bits, factor)
    torch.testing.assert_close(ours[0][0], theirs[0])
    assert torch.equal(ours[1][0], theirs[1])
    # float32 sums of thousands of numbers in another order
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=1e-5)


def test_torchs_operation_decides_on_the_rounded_number_at_the_borders():
    step = torch.tensor([1.0])
    for v, paper, torch_gives in ((-8.3, -8.0, 0.3), (7.4, 7.0, -0.4), (-8.6, -8.0, -8.0), (7.6, 7.0, 7.0)):
        x = torch.tensor([v])
        assert gradients(x[None], step, 4)[2].item() * math.sqrt(7) == pytest.approx(paper)
        assert torchs(x, step, 4)[2].item() == pytest.approx(torch_gives, abs=1e-5)


def test_the_gradient_is_scaled_by_the_numbers_of_each_block():
    x, step = normal(12, 10), torch.tensor([0.3], dtype=torch.float64)
    whole = gradients(x.reshape(1, 120), step, 3)[2] * math.sqrt(120 * 3)
    rows = gradients(x, step.expand(12), 3)[2] * math.sqrt(10 * 3)
    torch.testing.assert_close(rows.sum(), whole[0])


def test_the_scale_of_the_gradient_makes_layers_of_all_sizes_alike():
    """(gradient of s / s) over (|gradient of x| / |x|), root mean square of 200 draws, is near 1."""
    ratios = []
    for numbers in (30, 3_000):
        x, upstream = normal(200, numbers, seed=numbers), normal(200, numbers, seed=numbers + 1)
        step = initial_step(x, 4)
        _, of_x, of_step = gradients(x, step, 4, upstream)
        ratios.append(((of_step / step) / (of_x.norm(dim=1) / x.norm(dim=1))).square().mean().sqrt().item())
    assert ratios[1] == pytest.approx(ratios[0], rel=0.2)  # unscaled they would differ by sqrt(3000 / 30) = 10
    assert 0.1 < ratios[0] < 10


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("start", [0.4, 1.0, 2.5])
def test_a_learned_step_comes_near_the_best_one(bits, start):
    """The mean squared error of 4,000 normal numbers, from the first step and from bad ones."""
    x = normal(1, 4_000, seed=1)
    tried = torch.linspace(0.02, 3, 600, dtype=torch.float64)
    best = min((lsq_quantize(x, s[None], bits) - x).square().mean().item() for s in tried)
    step = (start * initial_step(x, bits)).requires_grad_(True)
    first = (lsq_quantize(x, step, bits) - x).square().mean().item()
    optimizer = torch.optim.SGD([step], lr=2.0)
    for _ in range(400):
        optimizer.zero_grad()
        (lsq_quantize(x, step, bits) - x).square().mean().backward()
        step.grad *= math.sqrt(4_000 * lsq_range(bits)[1]) / 2**bits  # the full gradient: one parameter, no weights
        optimizer.step()
    last = (lsq_quantize(x, step, bits) - x).square().mean().item()
    assert last < first and last < 1.02 * best


# -------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("granularity", ["tensor", "row", 5, (2, 10)])
def test_the_layer_its_codes_and_its_steps(granularity):
    torch.manual_seed(0)
    linear, x = nn.Linear(10, 6), normal(7, 10, dtype=torch.float32)
    layer = LsqLinear(copy.deepcopy(linear), 3, granularity)
    matrix = layer.quantized_weight()
    assert matrix.codes.min() >= -4 and matrix.codes.max() <= 3 and layer.step.shape == (matrix.scale.numel(),)
    assert torch.equal(F.linear(x, matrix.dequantize(), linear.bias), layer(x))
    layer(x).square().sum().backward()
    assert layer.step.grad.ne(0).all() and layer.weight.grad.ne(0).any()
    # every block by hand
    rows, columns = matrix.block
    for index, step in enumerate(layer.step):
        i, j = divmod(index, 10 // columns)
        part = linear.weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        assert step.item() == pytest.approx(2 * part.abs().mean().item() / math.sqrt(3), rel=1e-5)


def test_trained_in_a_model_and_converted():
    config = TransformerConfig(vocab_size=30, max_length=8, d_model=12, layers=2, heads=2, d_ff=16, dropout=0.0)
    encoder = Encoder(config, seed=1).eval()
    model = prepare_lsq(encoder, 2, "row")
    assert sum(isinstance(part, LsqLinear) for part in model.modules()) == len(block_linears(encoder)) == 12

    class Sentences:
        lengths = [6] * 64
        ids = torch.randint(0, 30, (64, 6), generator=torch.Generator().manual_seed(0))

        def batch(self, indices):
            return self.ids[indices]

    def loss(model, ids):
        with torch.no_grad():
            target = encoder(ids).last
        return F.mse_loss(model(ids).last, target)

    before = loss(model, Sentences.ids).item()
    first = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("step")}
    train(model, Sentences(), loss, TrainingPlan(15, 16, 3e-3), progress=False)
    assert loss(model, Sentences.ids).item() < before / 2
    assert all(not torch.equal(p, first[name]) for name, p in model.named_parameters() if name in first)
    assert torch.equal(convert_weights(model)(Sentences.ids).last, model(Sentences.ids).last)


def test_bad_input():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="step must have shape"):
        lsq_quantize(x, torch.ones(3), 4)
    with pytest.raises(ValueError, match="step must be positive"):
        lsq_quantize(x, torch.tensor([1.0, 0.0]), 4)
    with pytest.raises(ValueError, match="bits must be"):
        lsq_quantize(x, torch.ones(2), 1)
    with pytest.raises(ValueError, match="does not divide"):
        LsqLinear(nn.Linear(4, 4), 4, 3)
    with pytest.raises(ValueError, match="bits must be"):
        LsqLinear(nn.Linear(4, 4), 9)
