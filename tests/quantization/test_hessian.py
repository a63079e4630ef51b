"""Products and eigenvalues against the whole Hessian, written out by torch.autograd.functional, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from effnlp_lessons.quantization.hessian import (
    Hessian,
    flatten,
    hessian_vector_product,
    lanczos,
    largest_eigenvalue,
    power_iteration,
    unflatten,
)
from effnlp_lessons.transformer import Encoder, TransformerConfig

TINY = TransformerConfig(
    vocab_size=11, max_length=6, d_model=4, layers=2, heads=2, d_ff=5, segments=0, pooler=False, dropout=0.3
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy(module, seed=0, scale=0.4):
    """In float64 and evaluation mode, all parameters of ordinary size."""
    draw = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=draw)
    return module.double().eval()


def written_out(loss_of, parameters):
    """The whole Hessian: `loss_of(list of tensors)`, as a matrix."""
    shaped = [p.detach() for p in parameters]
    return torch.autograd.functional.hessian(lambda w: loss_of(unflatten(w, shaped)), flatten(shaped))


class Case:
    """A loss, the parameters of its block, and the Hessian written out."""

    def __init__(self, model, block, loss_of_model):
        self.model, self.loss_of_model = model, loss_of_model
        self.names = [f"{block}.{name}" for name, _ in model.get_submodule(block).named_parameters()]
        self.parameters = [model.get_parameter(name) for name in self.names]
        self.matrix = written_out(self.loss_at, self.parameters)
        self.eigenvalues = torch.linalg.eigvalsh(self.matrix)

    def loss_at(self, weights):
        replaced = dict(zip(self.names, weights, strict=True))
        return self.loss_of_model(lambda *x: functional_call(self.model, replaced, x))

    def loss(self):
        return self.loss_of_model(self.model)


def encoder_case(seed=0):
    """A layer of the course's encoder, attention and norms included: 4 x 20 + 24 + 25 + 2 x 8 parameters."""
    encoder = noisy(Encoder(TINY), seed)
    ids = torch.randint(0, 11, (3, 6), generator=generator(1))
    mask = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
    target = torch.randn(3, 4, generator=generator(2), dtype=torch.float64)

    def loss(model):
        output = model(ids, mask).last
        return -(output[:, 0] * target).sum() / 3 + 0.1 * output[mask].square().sum()

    return Case(encoder, "blocks.1", loss)


def mlp_case(seed=0):
    with torch.random.fork_rng():  # linear layers draw from torch's global generator
        torch.manual_seed(seed)
        network = noisy(nn.Sequential(nn.Linear(3, 7), nn.GELU(), nn.Linear(7, 5)), seed)
    x = torch.randn(20, 3, generator=generator(1), dtype=torch.float64)
    y = torch.randint(0, 5, (20,), generator=generator(2))
    return Case(network, "0", lambda model: F.cross_entropy(model(x), y))


@pytest.fixture(scope="module", params=["encoder layer", "two layers"])
def case(request):
    return {"encoder layer": encoder_case, "two layers": mlp_case}[request.param]()


@pytest.fixture(scope="module")
def negative():
    """The same encoder layer, the sign of the loss chosen so that its largest eigenvalue by size is negative."""
    case = encoder_case()
    if case.eigenvalues[-1] > -case.eigenvalues[0]:
        positive = case.loss_of_model
        case = Case(case.model, "blocks.1", lambda model: -positive(model))
    assert -case.eigenvalues[0] > 1.2 * case.eigenvalues[-1] > 0
    return case


def known(values, seed=0):
    """A symmetric matrix with these eigenvalues and drawn directions."""
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator(seed), dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T, q


# ------------------------------------------------------------------------------- Hessian times a vector


def test_products_equal_the_whole_hessian(case):
    hessian = Hessian(case.loss(), case.parameters)
    size = hessian.size
    assert 20 < size == len(case.matrix) <= 300
    # every column, so every entry
    columns = torch.stack([hessian(e) for e in torch.eye(size, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(columns, case.matrix, atol=1e-12, rtol=1e-9)
    assert (case.matrix.abs() > 1e-6).any()
    vector = torch.randn(size, generator=generator(3), dtype=torch.float64)
    shaped = hessian_vector_product(case.loss(), case.parameters, unflatten(vector, case.parameters))
    assert [v.shape for v in shaped] == [p.shape for p in case.parameters]
    torch.testing.assert_close(flatten(shaped), case.matrix @ vector)


def test_products_equal_differences_of_gradients(case):
    vector = torch.randn(len(case.matrix), generator=generator(4), dtype=torch.float64)
    direction = unflatten(vector / vector.norm(), case.parameters)
    epsilon, sides = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            moved = [p + sign * epsilon * v for p, v in zip(case.parameters, direction, strict=True)]
        moved = [p.requires_grad_() for p in moved]
        sides.append(flatten(torch.autograd.grad(case.loss_at(moved), moved)))
    difference = (sides[0] - sides[1]) / (2 * epsilon)
    product = flatten(hessian_vector_product(case.loss(), case.parameters, direction))
    # the error of a central difference is of order epsilon^2 = 1e-10, and rounding 1e-16 / epsilon = 1e-11
    torch.testing.assert_close(product, difference, atol=1e-8, rtol=1e-6)


def test_quadratic_form():
    matrix, _ = known([-4.0, 0.0, 1.0, 2.5, 9.0])
    w = torch.randn(5, generator=generator(1), dtype=torch.float64, requires_grad=True)
    v = torch.randn(5, generator=generator(2), dtype=torch.float64)
    loss = 0.5 * w @ matrix @ w + 3 * w.sum()
    torch.testing.assert_close(Hessian(loss, [w])(v), matrix @ v)
    # in two tensors of odd shapes, one of them not contiguous
    a, b = w[:3].detach()[:, None].T.requires_grad_(), w[3:].detach().requires_grad_()
    joined = torch.cat([a.flatten(), b])
    torch.testing.assert_close(Hessian(0.5 * joined @ matrix @ joined, [a, b])(v), matrix @ v)


def test_products_can_be_repeated_and_the_loss_stays_usable():
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    loss = (w**3).sum()
    hessian = Hessian(loss, [w])
    for v in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])):
        assert torch.equal(hessian(v.double()), 6 * w.detach() * v.double())
    loss.backward()
    assert torch.equal(w.grad, 3 * w.detach() ** 2)


def test_weights_that_do_not_matter_have_zero_rows():
    w = torch.ones(2, requires_grad=True)
    unused, linear = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    products = hessian_vector_product(
        (w**2).sum() + linear.sum(), [w, unused, linear], [torch.ones(2), torch.ones(3), torch.ones(2)]
    )
    assert [p.tolist() for p in products] == [[2, 2], [0, 0, 0], [0, 0]]
    assert torch.equal(Hessian(linear.sum(), [linear])(torch.ones(2)), torch.zeros(2))


def test_attention_without_a_second_derivative_is_named():
    def fused(q, k, v, key_padding_mask):
        return F.scaled_dot_product_attention(q, k, v)

    ids = torch.randint(0, 11, (2, 6), generator=generator(1))
    encoder = noisy(Encoder(TINY, attention=fused)).float()
    parameters = list(encoder.blocks[1].parameters())
    with pytest.raises(RuntimeError, match="operation without a second derivative: write attention out"):
        hessian_vector_product(encoder(ids).last.square().sum(), parameters, [torch.ones_like(p) for p in parameters])


# ------------------------------------------------------------------------------------------- iterations


def test_power_iteration_finds_the_largest_of_the_whole_hessian(case):
    hessian, exact = Hessian(case.loss(), case.parameters), case.eigenvalues
    wanted = exact[exact.abs().argmax()].item()
    found = power_iteration(
        hessian, hessian.size, iterations=500, tolerance=1e-12, generator=generator(), dtype=torch.float64
    )
    assert found.values.item() == pytest.approx(wanted, rel=1e-6)
    assert found.residuals.item() < 1e-4 * abs(wanted) and found.iterations[0] < 500
    (v,) = found.vectors
    assert v.norm().item() == pytest.approx(1)
    residual = case.matrix @ v - found.values.item() * v
    assert residual.norm().item() == pytest.approx(found.residuals.item(), abs=1e-9)


def test_a_negative_eigenvalue_of_largest_size(negative):
    """Power iteration returns it with its sign; the shift and Lanczos find the largest positive one."""
    hessian, exact = Hessian(negative.loss(), negative.parameters), negative.eigenvalues
    options = {"generator": generator(5), "dtype": torch.float64}
    found = power_iteration(hessian, hessian.size, iterations=500, tolerance=1e-12, **options)
    assert found.values.item() < 0 and found.values.item() == pytest.approx(exact[0].item(), rel=1e-6)
    # the shift needs many products: by the matrix, which they equal
    top = largest_eigenvalue(negative.matrix.mv, hessian.size, iterations=5_000, tolerance=1e-13, **options)
    top = top.values.item()
    assert top > 0 and top == pytest.approx(exact[-1].item(), rel=1e-5)
    ends = lanczos(hessian, hessian.size, steps=50, **options)
    assert ends.values[0].item() == pytest.approx(exact[0].item(), rel=1e-9)
    assert ends.values[-1].item() == pytest.approx(exact[-1].item(), rel=1e-9)


def test_the_shift_is_taken_off_again():
    matrix, directions = known([-10.0, -3.0, 1.0, 6.0])
    options = {"iterations": 2_000, "tolerance": 1e-14, "generator": generator(), "dtype": torch.float64}
    plain = power_iteration(matrix.mv, 4, **options)
    assert plain.values.item() == pytest.approx(-10) and abs(plain.vectors[0] @ directions[:, 0]) > 1 - 1e-9
    assert power_iteration(matrix.mv, 4, shift=10.0, **options).values.item() == pytest.approx(6)
    assert power_iteration(matrix.mv, 4, shift=-10.0, **options).values.item() == pytest.approx(-10)
    assert largest_eigenvalue(matrix.mv, 4, **options).values.item() == pytest.approx(6)
    for values, top in (([-5.0, -2.0, -1.0], -1.0), ([0.0, 1.0, 7.0], 7.0), ([-7.0, 0.0, 0.0], 0.0)):
        found = largest_eigenvalue(known(values)[0].mv, 3, **options)
        assert found.values.item() == pytest.approx(top, abs=1e-9)


def test_the_top_k_come_in_order_and_are_orthogonal():
    values = [-9.0, 7.0, -5.0, 3.0, 1.0, 0.5, 0.0]
    matrix, _ = known(values)
    found = power_iteration(
        matrix.mv, 7, iterations=3_000, tolerance=1e-15, generator=generator(), k=7, dtype=torch.float64
    )
    torch.testing.assert_close(found.values, torch.tensor(values, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(7, dtype=torch.float64))
    assert found.residuals.max() < 1e-5


def test_one_norm_for_the_whole_block():
    """Two blocks on the diagonal: with a norm for each, v would not settle on the eigenvector of the larger one."""
    w, u = (
        torch.ones(2, requires_grad=True, dtype=torch.float64),
        torch.ones(3, requires_grad=True, dtype=torch.float64),
    )
    hessian = Hessian((5 * w**2).sum() / 2 + (2 * u**2).sum() / 2, [w, u])
    found = power_iteration(
        hessian, hessian.size, iterations=200, tolerance=0, generator=generator(), dtype=torch.float64
    )
    assert found.values.item() == pytest.approx(5) and found.vectors[0, 2:].norm() < 1e-12
    assert found.residuals.item() < 1e-12 and found.iterations == (200,)


def test_opposite_eigenvalues_of_one_size_do_not_settle_and_the_residual_says_so():
    matrix, _ = known([-4.0, 1.0, 4.0])
    found = power_iteration(matrix.mv, 3, iterations=500, tolerance=0, generator=generator(), dtype=torch.float64)
    assert abs(found.values.item()) < 3.9 and found.residuals.item() > 1
    ends = lanczos(matrix.mv, 3, steps=3, generator=generator(), dtype=torch.float64).values
    torch.testing.assert_close(ends, torch.tensor([-4.0, 1.0, 4.0], dtype=torch.float64))


def test_residuals_bound_the_distance_to_an_eigenvalue():
    matrix, _ = known(torch.linspace(-3, 8, 40).tolist())
    exact = torch.linalg.eigvalsh(matrix)
    for iterations in (1, 3, 10, 30):
        found = power_iteration(
            matrix.mv, 40, iterations=iterations, tolerance=0, generator=generator(iterations), dtype=torch.float64
        )
        assert (exact - found.values).abs().min() <= found.residuals.item() + 1e-12
    ritz = lanczos(matrix.mv, 40, steps=12, generator=generator(), dtype=torch.float64)
    assert ((exact[:, None] - ritz.values).abs().min(0).values <= ritz.residuals + 1e-12).all()
    for value, vector, residual in zip(ritz.values, ritz.vectors, ritz.residuals, strict=True):
        assert (matrix @ vector - value * vector).norm().item() == pytest.approx(residual.item(), abs=1e-9)


def test_lanczos_gives_the_whole_spectrum_in_as_many_steps_as_rows(case):
    hessian = Hessian(case.loss(), case.parameters)
    size = hessian.size
    ritz = lanczos(hessian, size, steps=size, generator=generator(), dtype=torch.float64)
    exact = case.eigenvalues
    assert len(ritz.values) <= size
    # distinct eigenvalues once each; those of several directions too, but not the many zeros
    for end in (0, 1, -2, -1):
        assert ritz.values[end].item() == pytest.approx(exact[end].item(), abs=1e-9 * exact.abs().max().item())
    assert ((exact[:, None] - ritz.values).abs().min(1).values < 1e-7 * exact.abs().max()).all()
    torch.testing.assert_close(ritz.vectors @ ritz.vectors.T, torch.eye(len(ritz.values), dtype=torch.float64))


def test_lanczos_needs_fewer_products_than_power_iteration():
    matrix, _ = known([*torch.linspace(0, 0.99, 199).tolist(), 1.0])
    ritz = lanczos(matrix.mv, 200, steps=60, generator=generator(), dtype=torch.float64).values[-1].item()
    power = power_iteration(matrix.mv, 200, iterations=60, tolerance=0, generator=generator(), dtype=torch.float64)
    assert 1 - ritz < 1e-6 < 1e-3 < 1 - power.values.item()


@pytest.mark.parametrize("iterate", ["power", "lanczos"])
def test_a_space_that_is_used_up(iterate):
    def iterated(matrix):
        size = len(matrix)
        if iterate == "power":
            return power_iteration(matrix.mv, size, generator=generator(), dtype=torch.float64)
        return lanczos(matrix.mv, size, steps=50, generator=generator(), dtype=torch.float64)

    zero = iterated(torch.zeros(4, 4, dtype=torch.float64))
    assert zero.values.tolist() == [0] and zero.residuals.tolist() == [0]
    one = iterated(torch.full((1, 1), -3.0, dtype=torch.float64))
    assert one.values.tolist() == [-3]
    twice = iterated(2 * torch.eye(5, dtype=torch.float64))
    assert len(twice.values) == 1 and twice.values.item() == pytest.approx(2)


def test_float32_and_the_generator(case):
    """float32 agrees with float64; the same seed gives the same bits, and torch's own generator is left alone."""
    state, hessian = torch.random.get_rng_state(), Hessian(case.loss(), case.parameters)
    exact = case.eigenvalues[case.eigenvalues.abs().argmax()].item()

    def single(v):
        return hessian(v.double()).float()

    first, again = (power_iteration(single, hessian.size, iterations=300, generator=generator(7)) for _ in range(2))
    assert torch.equal(first.values, again.values) and first.vectors.dtype == torch.float32
    # stopped at a change of a thousandth
    assert first.values.item() == pytest.approx(exact, rel=0.05)
    assert torch.equal(torch.random.get_rng_state(), state)


# -------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_named():
    w, v = torch.ones(2, requires_grad=True), torch.ones(2)
    for loss in (w, w.sum().detach()):
        with pytest.raises(ValueError, match="loss must be one number with a graph"):
            Hessian(loss, [w])
    for parameters in ([], [v], [w, v]):
        with pytest.raises(ValueError, match="parameters must be at least one tensor, all with requires_grad"):
            Hessian(w.sum(), parameters)
    hessian = Hessian((w**2).sum(), [w])
    for wrong in ([torch.ones(3)], [torch.ones(1, 2)], [], [v, v]):
        with pytest.raises(ValueError, match=r"vectors must have the shapes of the parameters, \[\(2,\)\], got"):
            hessian.times(wrong)
    for wrong in (torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(ValueError, match=r"vector must have shape \(2,\), got"):
            hessian(wrong)
    draw = generator()
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        power_iteration(hessian, 0, generator=draw)
    with pytest.raises(ValueError, match="iterations must be >= 1, got 0"):
        power_iteration(hessian, 2, iterations=0, generator=draw)
    with pytest.raises(ValueError, match="k must be at most the size, 2, got 3"):
        power_iteration(hessian, 2, k=3, generator=draw)
    with pytest.raises(ValueError, match="tolerance must be >= 0, got -1"):
        power_iteration(hessian, 2, tolerance=-1, generator=draw)
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        lanczos(hessian, 2, steps=0, generator=draw)
    for iterate in (power_iteration, lanczos):
        with pytest.raises(ValueError, match="hvp must give finite numbers"):
            iterate(lambda x: x * float("nan"), 2, generator=draw)
