"""The exercises of notebook 04: references against torch, linear algebra and brute force, wrong answers by name.

The wrong answers are written here anew, as a student would write them; none uses a `Mistake` of the exercise.
"""

from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effnlp_lessons.homework import HomeworkError, check
from effnlp_lessons.homework.low_bit.budget import bits_under_budget
from effnlp_lessons.homework.low_bit.eigenvalues import HessianProduct, top_eigenvalues
from effnlp_lessons.homework.low_bit.shadow import Optimizer, on_grid, shadow_step
from effnlp_lessons.homework.low_bit.straight import fake_quantize
from effnlp_lessons.homework.low_bit.ternary import ternary_scale
from effnlp_lessons.quantization.quantizers import quantize_matrix


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------- references


@pytest.mark.parametrize(("scale", "zero_point", "bits"), [(0.25, 2, 3), (0.1, 5, 8), (0.3, 1, 2)])
def test_fake_quantize_is_torchs_but_for_half_a_step_beyond_the_ends(scale, zero_point, bits):
    x = (12 * normal(400)).float()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    top = 2**bits - 1
    y = fake_quantize(ours, scale, zero_point, bits)
    expected = torch.fake_quantize_per_tensor_affine(theirs, scale, zero_point, 0, top)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    upstream = normal(400, seed=1).float()
    y.backward(upstream), expected.backward(upstream)
    beyond = torch.maximum(-zero_point - x / scale, x / scale - (top - zero_point))
    same = (beyond <= 0) | (beyond > 0.51)
    assert torch.equal(ours.grad[same], theirs.grad[same]) and same.sum() > 300
    assert not ours.grad[beyond > 0].any()


def test_fake_quantize_at_its_ends():
    x = torch.tensor([-0.75, -0.5, 0.1, 1.25, 1.26, 1.4]).requires_grad_()  # the grid goes from -0.5 to 1.25
    y = fake_quantize(x, 0.25, 2, 3)
    y.sum().backward()
    assert y.tolist() == [-0.5, -0.5, 0.0, 1.25, 1.25, 1.25]
    assert x.grad.tolist() == [0, 1, 1, 1, 0, 0]


def a_layer(learning_rate, seed=0):
    """A layer with its optimizer, inputs and targets."""
    layer = nn.Linear(4, 3, dtype=torch.float64)
    layer.weight.data, layer.bias.data = normal(3, 4, seed=seed), normal(3, seed=seed + 1)
    return layer, Optimizer(layer, learning_rate), normal(8, 4, seed=seed + 2), normal(8, 3, seed=seed + 3)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_on_grid_is_the_librarys_symmetric_row_grid(bits):
    weight = normal(5, 7)
    torch.testing.assert_close(on_grid(weight, bits), quantize_matrix(weight, bits, "row").dequantize())


def test_shadow_step_by_the_gradient_written_out():
    layer, optimizer, x, y = a_layer(0.1)
    weight, bias, rounded = layer.weight.detach().clone(), layer.bias.detach().clone(), on_grid(layer.weight, 3)
    error = x @ rounded.T + bias - y
    loss = shadow_step(layer, optimizer, x, y, 3)
    assert loss.item() == pytest.approx(error.square().mean().item(), rel=1e-12) and not loss.requires_grad
    torch.testing.assert_close(layer.weight, weight - 0.1 * 2 / error.numel() * error.T @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias, bias - 0.1 * 2 / error.numel() * error.sum(0), rtol=1e-12, atol=1e-12)


def test_small_steps_add_up_and_the_starter_stands_still():
    def codes(layer):
        return torch.round(layer.weight / layer.weight.abs().amax(1, keepdim=True) * 3)

    def changed(step):
        """How many of 12 codes are others after 100 small steps."""
        layer, optimizer, x, y = a_layer(0.003)
        before = codes(layer)
        for _ in range(100):
            step(layer, optimizer, x, y, 3)
        return int((codes(layer) != before).sum())

    assert changed(shadow_step) >= 4 and changed(starter_of_shadow_step) == 0


def matrix_of(hvp):
    columns = []
    size = sum(torch.Size(shape).numel() for shape in hvp.shapes)
    for unit in torch.eye(size, dtype=torch.float64):
        columns.append(torch.cat([part.flatten() for part in hvp(hvp.split(unit))]))
    return torch.stack(columns)


@pytest.mark.parametrize("signs", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_top_eigenvalues_are_eigvalshs(signs):
    values = torch.tensor([7.0 * signs[0], 2.0 * signs[1], 0.5, -0.4, 0.3, 0.0, -0.1, 0.2], dtype=torch.float64)
    hvp = HessianProduct([(2, 3), (2,)], values, torch.Generator().manual_seed(1))
    exact = torch.linalg.eigvalsh(matrix_of(hvp))
    first, second = exact[exact.abs().argsort(descending=True)[:2]].tolist()
    starts = tuple(hvp.split(normal(8, seed=seed)) for seed in (2, 3))
    found = top_eigenvalues(hvp, starts, 60)
    assert found == (pytest.approx(first, rel=1e-9), pytest.approx(second, rel=1e-9))


def test_top_eigenvalues_of_a_real_loss():
    weights = [normal(2, 3).requires_grad_(), normal(2, seed=1).requires_grad_()]
    x, y = normal(20, 3, seed=2), normal(20, 2, seed=3)

    def loss(w, b):
        return (torch.tanh(x @ w.T + b) - y).square().mean()

    blocks = torch.autograd.functional.hessian(loss, tuple(weights))
    dense = torch.cat(
        [torch.cat([b.reshape(w.numel(), -1) for b in row], 1) for w, row in zip(weights, blocks, strict=True)]
    )
    exact = torch.linalg.eigvalsh(dense)
    wanted = exact[exact.abs().argsort(descending=True)[:2]].tolist()

    def hvp(v):
        gradients = torch.autograd.grad(loss(*weights), weights, create_graph=True)
        along = sum((g * part).sum() for g, part in zip(gradients, v, strict=True))
        return list(torch.autograd.grad(along, weights))

    starts = tuple([normal(2, 3, seed=seed), normal(2, seed=seed)] for seed in (4, 5))
    assert top_eigenvalues(hvp, starts, 400) == pytest.approx(wanted, rel=1e-6)


def test_orthogonal_at_the_start_alone_does_not_last():
    values = torch.tensor([10.0, 1.0, 0.1, 0.05], dtype=torch.float64)
    hvp = HessianProduct([(4,)], values, torch.Generator().manual_seed(0))
    first = torch.linalg.eigh(hvp.matrix)[1][:, -1]
    v = normal(4)
    v = v - (v @ first) * first
    for _ in range(30):
        v = hvp.matrix @ (v / v.norm())
    assert (v / v.norm()) @ first == pytest.approx(1, abs=1e-9) or (v / v.norm()) @ first == pytest.approx(-1, abs=1e-9)


def test_ternary_scale_row_by_row():
    weight = torch.cat([normal(3, 9) * torch.tensor([[1.0], [5.0], [0.1]]), torch.zeros(1, 9)]).double()
    alpha, codes = ternary_scale(weight)
    for row, numbers in enumerate(weight.tolist()):
        threshold = 0.7 * sum(map(abs, numbers)) / 9
        kept = [abs(number) for number in numbers if abs(number) > threshold]
        assert alpha[row].item() == pytest.approx(sum(kept) / len(kept) if kept else 0.0, rel=1e-12)
        signs = [(number > 0) - (number < 0) if abs(number) > threshold else 0 for number in numbers]
        assert codes[row].tolist() == signs


def test_ternary_scale_is_the_best_for_its_codes_and_near_the_best_of_all():
    """Over all sets of kept weights, the largest ones of every size are enough: the others have a smaller gain."""
    for seed in range(20):
        weight = normal(1, 8, seed=seed)
        alpha, codes = ternary_scale(weight)
        error = ((alpha[:, None] * codes - weight) ** 2).sum().item()
        for factor in (0.98, 1.02):
            assert ((factor * alpha[:, None] * codes - weight) ** 2).sum().item() > error
        sizes = weight.abs()[0].tolist()
        kept_sets = [kept for count in range(1, 9) for kept in combinations(sizes, count)]
        best = sum(size * size for size in sizes) - max(sum(kept) ** 2 / len(kept) for kept in kept_sets)
        assert best - 1e-12 <= error < 1.6 * best


def test_bits_under_budget_of_the_notebook():
    eigenvalues = torch.tensor([[3.0, 5.0], [2.5, 2.5], [-1.0, -3.0]])
    omega, bits = bits_under_budget(eigenvalues, [80, 40, 48], 53)
    assert omega.tolist() == [5.0, 2.5, 3.0] and bits == [2, 3, 3]
    assert bits_under_budget(eigenvalues, [80, 40, 48], 52)[1] == [3, 2, 2]


@pytest.mark.parametrize("seed", range(10))
def test_no_other_choice_under_the_budget_has_a_larger_sum(seed):
    eigenvalues = normal(6, 5, seed=seed)
    sizes = torch.randint(5, 60, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
    budget = sum(sizes) * 5 // 16
    omega, bits = bits_under_budget(eigenvalues, sizes, budget)
    values = [
        abs(sum(row) / 5) + (sum((v - sum(row) / 5) ** 2 for v in row) / 5) ** 0.5 for row in eigenvalues.tolist()
    ]
    assert omega.tolist() == pytest.approx(values, rel=1e-12)
    assert sum(n * k for n, k in zip(sizes, bits, strict=True)) / 8 <= budget
    sums = [
        sum(v for v, chosen in zip(values, choice, strict=True) if chosen)
        for choice in product((False, True), repeat=6)
        if sum(n * (2 + chosen) for n, chosen in zip(sizes, choice, strict=True)) / 8 <= budget
    ]
    assert sum(v for v, k in zip(values, bits, strict=True) if k == 3) == pytest.approx(max(sums), rel=1e-12)


# ----------------------------------------------------------------------------- wrong answers


def quantized(x, scale, zero_point, bits):
    codes = (x / scale).round() + zero_point
    return (codes.clamp(0, 2**bits - 1) - zero_point) * scale


def ends(scale, zero_point, bits):
    return -zero_point * scale, (2**bits - 1 - zero_point) * scale


def straight_by(smooth, value=quantized):
    """`smooth(x, low, high)` gives the gradient, `value` the numbers."""

    def answer(x, scale, zero_point, bits):
        way = smooth(x, *ends(scale, zero_point, bits))
        return way + (value(x, scale, zero_point, bits) - way).detach()

    return answer


def own_backward(rule):
    """A Function whose backward is `rule(upstream, x, low, high, scale)`."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(context, x, scale, zero_point, bits):
            context.save_for_backward(x)
            context.numbers = (*ends(scale, zero_point, bits), scale)
            return quantized(x, scale, zero_point, bits)

        @staticmethod
        def backward(context, upstream):
            return rule(upstream, *context.saved_tensors, *context.numbers), None, None, None

    return lambda x, scale, zero_point, bits: Own.apply(x, scale, zero_point, bits)


def torch_fake_quantize(x, scale, zero_point, bits):
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 2**bits - 1)


def codes_straight_through(x, scale, zero_point, bits):
    """The gradient of codes, without the division before."""
    low, high = ends(scale, zero_point, bits)
    codes = quantized(x, scale, zero_point, bits) / scale
    way = x.clamp(low, high)
    return scale * (way + (codes - way).detach())


def detached_the_wrong_way_round(x, scale, zero_point, bits):
    rounded, clipped = quantized(x, scale, zero_point, bits), x.clamp(*ends(scale, zero_point, bits))
    return rounded + (clipped - rounded).detach()


def starter_of_shadow_step(layer, optimizer, x, y, bits):
    with torch.no_grad():
        layer.weight.copy_(on_grid(layer.weight, bits))
    loss = F.mse_loss(layer(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def step_by(forward, clear=True, restore="before the step", after=None):
    """A step with saved and restored weights; `forward(layer, x, bits)` gives the prediction."""

    def answer(layer, optimizer, x, y, bits):
        kept = layer.weight.detach().clone()
        loss = ((forward(layer, x, bits) - y) ** 2).mean()
        if clear:
            for parameter in layer.parameters():
                parameter.grad = None
        loss.backward()
        if restore == "before the step":
            layer.weight.data = kept
        optimizer.step()
        if restore == "after the step":
            layer.weight.data = kept
        if after is not None:
            after(layer, bits)
        return loss.detach()

    return answer


def rounded_forward(layer, x, bits):
    layer.weight.data = on_grid(layer.weight.data, bits)
    return layer(x)


def plain_forward(layer, x, bits):
    return layer(x)


def forward_without_gradient(layer, x, bits):
    return x @ on_grid(layer.weight, bits).T + layer.bias


def forward_with_rounded_bias(layer, x, bits):
    layer.weight.data = on_grid(layer.weight.data, bits)
    step = layer.bias.detach().abs().max() / (2 ** (bits - 1) - 1)
    bias = layer.bias + (step * (layer.bias / step).round() - layer.bias).detach()
    return x @ layer.weight.T + bias


def round_in_place(layer, bits):
    layer.weight.data = on_grid(layer.weight.data, bits)


def loss_before_rounding(layer, optimizer, x, y, bits):
    before = F.mse_loss(layer(x), y).item()
    step_by(rounded_forward)(layer, optimizer, x, y, bits)
    return torch.tensor(before, dtype=x.dtype)


def loss_afterwards(layer, optimizer, x, y, bits):
    step_by(rounded_forward)(layer, optimizer, x, y, bits)
    return F.mse_loss(forward_without_gradient(layer, x, bits), y).detach()


def inner(a, b):
    return sum(torch.sum(x * y) for x, y in zip(a, b, strict=True))


def scaled(v):
    return [x / inner(v, v).sqrt() for x in v]


def eigen_by(length=scaled, keep_apart=True, value=lambda v, hv: inner(v, hv), finish=lambda values: values):
    """Power iteration with vectors that are made orthogonal before each product."""

    def answer(hvp, starts, iterations):
        vectors, values = [], []
        for start in starts:
            v = length(start)
            for _ in range(iterations):
                if vectors and keep_apart:
                    part = inner(vectors[0], v)
                    v = [x - part * y for x, y in zip(v, vectors[0], strict=True)]
                v = length(hvp(v))
            if vectors and keep_apart:
                part = inner(vectors[0], v)
                v = length([x - part * y for x, y in zip(v, vectors[0], strict=True)])
            vectors.append(v)
            values.append(float(value(v, hvp(v))))
        return tuple(finish(values))

    return answer


def made_orthogonal_once(hvp, starts, iterations):
    first = starts[0]
    for _ in range(iterations):
        first = scaled(hvp(first))
    part = inner(first, starts[1])
    second = [x - part * y for x, y in zip(starts[1], first, strict=True)]
    for _ in range(iterations):
        second = scaled(hvp(second))
    return inner(first, hvp(first)).item(), inner(second, hvp(second)).item()


def minus_the_whole_vector(hvp, starts, iterations):
    first, second = starts
    for _ in range(iterations):
        first = scaled(hvp(first))
    for _ in range(iterations):
        second = scaled([x - y for x, y in zip(hvp(second), first, strict=True)])
    return inner(first, hvp(first)).item(), inner(second, hvp(second)).item()


def apart_tensor_by_tensor(hvp, starts, iterations):
    first, second = starts
    for _ in range(iterations):
        first = scaled(hvp(first))
    for _ in range(iterations):
        second = scaled([x - torch.sum(x * y) * y for x, y in zip(hvp(second), first, strict=True)])
    return inner(first, hvp(first)).item(), inner(second, hvp(second)).item()


def deflated_by_the_size(hvp, starts, iterations):
    first, second = starts
    for _ in range(iterations):
        first = scaled(hvp(first))
    size = inner(hvp(first), hvp(first)).sqrt()
    for _ in range(iterations):
        part = size * inner(first, second)
        second = scaled([x - part * y for x, y in zip(hvp(second), first, strict=True)])
    return inner(first, hvp(first)).item(), inner(second, hvp(second)).item()


def ternary_by(threshold=lambda size: 0.7 * size.mean(), alpha=lambda row, kept: row[kept].abs().mean(), strict=True):
    """Row by row; `alpha(row, kept)` where something is kept, 0 elsewhere."""

    def answer(weight):
        scales, codes = [], []
        for row in weight:
            limit = threshold(row.abs())
            kept = row.abs() > limit if strict else row.abs() >= limit
            scales.append(alpha(row, kept) if kept.any() else torch.zeros((), dtype=weight.dtype))
            codes.append(torch.where(kept, row.sign(), 0.0))
        return torch.stack(scales), torch.stack(codes).to(torch.int8)

    return answer


def ternary_of_the_matrix(weight):
    kept = weight.abs() > 0.7 * weight.abs().mean()
    return weight[kept].abs().mean().repeat(len(weight)), (weight.sign() * kept).to(torch.int8)


def ternary_nan(weight):
    kept = weight.abs() > 0.7 * weight.abs().mean(1, keepdim=True)
    return (weight.abs() * kept).sum(1) / kept.sum(1), (weight.sign() * kept).to(torch.int8)


def positive_only(weight):
    kept = weight > 0.7 * weight.abs().mean(1, keepdim=True)
    return (weight * kept).sum(1) / kept.sum(1).clamp(min=1), kept.to(torch.int8)


def omega_by(mean=lambda v: v.mean(1).abs(), spread=lambda v: v.std(1, unbiased=False)):
    return lambda values: mean(values) + spread(values)


RIGHT_OMEGA = omega_by()


def bits_by(omega=RIGHT_OMEGA, unit=8, below=False, cost=lambda n, k: n * k):
    """The best of all choices, with the usual slips; the layers of 3 bits as a set of numbers."""

    def answer(eigenvalues, sizes, budget):
        values = omega(eigenvalues)
        best, chosen = -1.0, ()
        for count in range(len(sizes) + 1):
            for layers in combinations(range(len(sizes)), count):
                used = sum(cost(n, 3 if layer in layers else 2) for layer, n in enumerate(sizes))
                if used > unit * budget or (below and used == unit * budget):
                    continue
                total = float(sum(values[layer] for layer in layers))
                if total > best:
                    best, chosen = total, layers
        return values, [3 if layer in chosen else 2 for layer in range(len(sizes))]

    return answer


def bits_in_order(per_weight=False, go_on=False, falling=True):
    def answer(eigenvalues, sizes, budget):
        values = RIGHT_OMEGA(eigenvalues)
        key = values / torch.tensor(sizes) if per_weight else values
        left, bits = 8 * budget - 2 * sum(sizes), [2] * len(sizes)
        for layer in key.argsort(descending=falling).tolist():
            if sizes[layer] <= left:
                left, bits[layer] = left - sizes[layer], 3
            elif not go_on:
                break
        return values, bits

    return answer


WRONG_ANSWERS = [
    (
        "low_bit.straight_through",
        straight_by(lambda x, low, high: x),
        "The gradient passes outside the range",
    ),
    ("low_bit.straight_through", quantized, "The gradient of rounding"),
    ("low_bit.straight_through", torch.no_grad()(quantized), "Nothing has a gradient"),
    ("low_bit.straight_through", detached_the_wrong_way_round, "The value is not quantized"),
    (
        "low_bit.straight_through",
        lambda x, *grid: x.clamp(*ends(*grid)),
        "The value is clipped, but not rounded",
    ),
    (
        "low_bit.straight_through",
        own_backward(lambda g, x, low, high, s: g.masked_fill((low <= x) & (x <= high), 0)),
        "The mask is on the wrong side",
    ),
    ("low_bit.straight_through", straight_by(lambda x, low, high: x.clamp(max=high)), "Only the upper end is cut"),
    ("low_bit.straight_through", straight_by(lambda x, low, high: x.clamp(min=low)), "Only the lower end is cut"),
    ("low_bit.straight_through", torch_fake_quantize, "The rounded code is tested, not the number"),
    (
        "low_bit.straight_through",
        own_backward(lambda g, x, low, high, s: g * (x > low) * (x < high)),
        "The ends themselves are cut off",
    ),
    ("low_bit.straight_through", codes_straight_through, "The gradient is multiplied by the scale"),
    (
        "low_bit.straight_through",
        own_backward(lambda g, x, low, high, s: g * ((low <= x) & (x <= high)) / s),
        "The gradient is divided by the scale",
    ),
    (
        "low_bit.straight_through",
        own_backward(lambda g, x, low, high, s: ((low <= x) & (x <= high)).to(g.dtype)),
        "What came from above is forgotten",
    ),
    ("low_bit.shadow_step", starter_of_shadow_step, "The shadow weights are lost"),
    (
        "low_bit.shadow_step",
        step_by(rounded_forward, restore="never"),
        "The shadow weights are lost",
    ),
    (
        "low_bit.shadow_step",
        step_by(rounded_forward, after=round_in_place),
        "The weights are rounded again after the step",
    ),
    ("low_bit.shadow_step", step_by(rounded_forward, restore="after the step"), "The weights never move"),
    ("low_bit.shadow_step", step_by(forward_without_gradient), "The weights never move"),
    ("low_bit.shadow_step", step_by(plain_forward), "The gradient is taken at the real weights"),
    ("low_bit.shadow_step", step_by(forward_with_rounded_bias), "The bias is rounded, too"),
    ("low_bit.shadow_step", step_by(rounded_forward, clear=False), "Old gradients are still there"),
    ("low_bit.shadow_step", loss_before_rounding, "The loss of the real weights is returned"),
    ("low_bit.shadow_step", loss_afterwards, "The loss after the step is returned"),
    ("low_bit.top_eigenvalues", eigen_by(keep_apart=False), "Power iteration without orthogonalising"),
    ("low_bit.top_eigenvalues", made_orthogonal_once, "Power iteration without orthogonalising"),
    ("low_bit.top_eigenvalues", minus_the_whole_vector, "Power iteration without orthogonalising"),
    ("low_bit.top_eigenvalues", eigen_by(value=lambda v, hv: inner(hv, hv).sqrt()), "The sign is lost"),
    (
        "low_bit.top_eigenvalues",
        lambda *inputs: tuple(map(abs, eigen_by()(*inputs))),
        "The sign is lost",
    ),
    ("low_bit.top_eigenvalues", apart_tensor_by_tensor, "Each tensor is made orthogonal"),
    ("low_bit.top_eigenvalues", deflated_by_the_size, "H is deflated with the absolute value"),
    (
        "low_bit.top_eigenvalues",
        eigen_by(finish=lambda values: sorted(values, reverse=True)),
        "The values are sorted",
    ),
    ("low_bit.top_eigenvalues", eigen_by(value=lambda v, hv: inner(hv, hv)), "The eigenvalues are squared"),
    ("low_bit.ternary_scale", ternary_by(lambda size: 0.7 * size.max()), "0.7 of the largest, not of the mean"),
    ("low_bit.ternary_scale", ternary_by(lambda size: size.mean()), "The threshold is the mean"),
    (
        "low_bit.ternary_scale",
        ternary_by(lambda size: 0.7 * (size * size).mean() ** 0.5),
        "The root mean square",
    ),
    (
        "low_bit.ternary_scale",
        ternary_of_the_matrix,
        "One threshold and one scale for the whole matrix",
    ),
    (
        "low_bit.ternary_scale",
        ternary_by(alpha=lambda row, kept: row.abs().mean()),
        "The scale is a mean over all weights",
    ),
    (
        "low_bit.ternary_scale",
        ternary_by(alpha=lambda row, kept: row[kept].abs().sum() / len(row)),
        "The kept weights are divided by the number of all",
    ),
    (
        "low_bit.ternary_scale",
        ternary_by(alpha=lambda row, kept: row[kept].mean()),
        "The scale is a mean of the weights, not of their sizes",
    ),
    ("low_bit.ternary_scale", ternary_by(alpha=lambda row, kept: row.abs().max()), "The scale is the largest weight"),
    ("low_bit.ternary_scale", ternary_nan, "A row of zeros becomes NaN"),
    ("low_bit.ternary_scale", ternary_by(strict=False), "A number on the threshold is kept"),
    ("low_bit.ternary_scale", positive_only, "Negative weights are never kept"),
    (
        "low_bit.ternary_scale",
        lambda weight: (ternary_by()(weight)[0], ternary_by()(weight)[1].abs()),
        "The sign is lost",
    ),
    (
        "low_bit.bits_under_budget",
        bits_by(omega_by(lambda v: v.abs().mean(1))),
        "The mean of the absolute values",
    ),
    ("low_bit.bits_under_budget", bits_by(omega_by(lambda v: v.mean(1))), "The mean keeps its sign"),
    (
        "low_bit.bits_under_budget",
        bits_by(omega_by(spread=lambda v: v.var(1, unbiased=False))),
        "The variance is added",
    ),
    (
        "low_bit.bits_under_budget",
        bits_by(omega_by(spread=lambda v: v.std(1))),
        "The standard deviation of a sample",
    ),
    ("low_bit.bits_under_budget", bits_by(lambda v: v.mean(1).abs()), "The spread is left out"),
    (
        "low_bit.bits_under_budget",
        bits_in_order(),
        "In the order of Omega, to the first that does not fit",
    ),
    (
        "low_bit.bits_under_budget",
        bits_in_order(go_on=True),
        "In the order of Omega, passing over what does not fit",
    ),
    (
        "low_bit.bits_under_budget",
        bits_in_order(per_weight=True, go_on=True),
        "In the order of Omega per weight",
    ),
    ("low_bit.bits_under_budget", bits_in_order(falling=False), "The least sensitive layers get more bits"),
    ("low_bit.bits_under_budget", bits_by(unit=1), "Bits are compared with bytes"),
    (
        "low_bit.bits_under_budget",
        bits_by(cost=lambda n, k: n * (k - 2)),
        "Only the third bits are counted",
    ),
    ("low_bit.bits_under_budget", bits_by(below=True), "The budget must not be reached"),
]


# ----------------------------------------------------------------------------- other right answers


def straight_through_for_w_hat(layer, optimizer, x, y, bits):
    """The gradient is taken at w_hat, and put where the optimizer looks for it."""
    w_hat = on_grid(layer.weight, bits).requires_grad_()
    loss = F.mse_loss(F.linear(x, w_hat, layer.bias), y)
    optimizer.zero_grad()
    loss.backward()
    layer.weight.grad = w_hat.grad
    optimizer.step()
    return loss.detach()


def test_other_right_answers_pass():
    check("low_bit.straight_through", straight_by(lambda x, low, high: x.clamp(low, high)))
    check("low_bit.straight_through", own_backward(lambda g, x, low, high, s: g * ((low <= x) & (x <= high))))
    check("low_bit.shadow_step", step_by(rounded_forward))
    check("low_bit.shadow_step", straight_through_for_w_hat)
    check("low_bit.top_eigenvalues", eigen_by())
    check("low_bit.top_eigenvalues", lambda hvp, starts, iterations: list(eigen_by()(hvp, starts, iterations)))
    check("low_bit.ternary_scale", ternary_by())
    check("low_bit.bits_under_budget", bits_by())


def test_the_librarys_own_functions_pass():
    from effnlp_lessons.quantization.qat import fake_quantize as of_library
    from effnlp_lessons.quantization.quantizers import LinearQuantizer
    from effnlp_lessons.quantization.ternary import twn

    def quantizer(scale, zero_point, bits):
        return LinearQuantizer(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), 0, 2**bits - 1)

    check("low_bit.straight_through", lambda x, scale, zero, bits: of_library(x, quantizer(scale, zero, bits)))
    check("low_bit.ternary_scale", twn)


def test_lost_shadow_weights_are_shown_in_the_layers_weight(capsys):
    with pytest.raises(HomeworkError, match=r"expected 'layer\.weight'"):
        check("low_bit.shadow_step", starter_of_shadow_step, seed=0)
    assert "optimizer = SGD with momentum" in capsys.readouterr().out
