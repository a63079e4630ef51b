"""HiPPO-LegS: the matrices against their definition, the memory against Legendre, the normal form, both times."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnlp_lessons.architectures.hippo import (
    best_reconstruction,
    bilinear,
    hippo_legs,
    integrate,
    legendre_basis,
    legendre_reconstruction,
    memory_matrix,
    nplr,
    random_memory,
)

# scipy.signal.cont2discrete((A, B, C, D), 0.25, "bilinear") for LegS of 4 states; its C and D are other than ours
SCIPY_A_BAR = [
    [0.7777777777777777, 0.0, 0.0, 0.0],
    [-0.3079201435678004, 0.6000000000000001, 0.0, 0.0],
    [-0.25296930654543076, -0.5633430321756243, 0.4545454545454546, 0.0],
    [-0.1496586600198152, -0.33327823236042464, -0.7171005797696505, 0.3333333333333333],
]
SCIPY_B_BAR = [0.2222222222222222, 0.3079201435678004, 0.2529693065454308, 0.14965866001981518]


def close(given, wanted, bound=1e-10):
    torch.testing.assert_close(given, wanted, rtol=bound, atol=bound)


# --------------------------------------------------------------------------------------------- the matrices


@pytest.mark.parametrize("state", [1, 2, 5])
def test_the_matrices_are_their_definition(state):
    a, b = hippo_legs(state)
    assert a.dtype == b.dtype == torch.float64
    for n in range(state):
        assert b[n].item() == pytest.approx(math.sqrt(2 * n + 1), rel=1e-15)
        for k in range(state):
            wanted = -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1) if n == k else 0.0
            assert a[n, k].item() == pytest.approx(wanted, rel=1e-15)


@given(state=st.integers(1, 20), time=st.floats(0.0, 4.0))
@settings(max_examples=30)
def test_the_impulse_response_is_made_of_legendre_polynomials(state, time):
    a, b = hippo_legs(state)
    response = torch.linalg.matrix_exp(time * a) @ b
    s = torch.tensor([math.exp(-time)], dtype=torch.float64)
    close(response, legendre_basis(state, s)[0] * s, 1e-9)  # the exponential of entries of up to 40 * time


@pytest.mark.parametrize("state", [1, 2, 12])
def test_the_legendre_basis_is_orthonormal(state):
    points = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    basis = legendre_basis(state, points)
    # the middle rule: an error of (2n+1) n⁴ / (24 * 40,000²) at most
    close(basis.T @ basis / 40_000, torch.eye(state, dtype=torch.float64), 1e-4)


# -------------------------------------------------------------------------------------- normal plus rank one


@pytest.mark.parametrize("state", [2, 4, 10, 64])
def test_normal_plus_rank_one_is_the_matrix(state):
    a, b = hippo_legs(state)
    eigenvalues, p, b_new, v = nplr(state)
    rebuilt = v @ (torch.diag(eigenvalues) - torch.outer(p, p.conj())) @ v.conj().T
    close(rebuilt, a.to(rebuilt.dtype))
    close(v @ b_new, b.to(v.dtype))
    close(v @ p, (torch.arange(state) + 0.5).double().sqrt().to(v.dtype))
    close(v @ v.conj().T, torch.eye(state, dtype=v.dtype))
    assert (eigenvalues.real == -0.5).all()
    half = state // 2
    for x in (eigenvalues, p, b_new, v.T):
        assert torch.equal(x[half:], x[:half].conj())
    w = eigenvalues.imag[:half]
    assert w[0] > 0 and (w.diff() > 0).all()


def test_the_eigenvectors_of_the_matrix_itself_are_no_numbers():
    def condition(state):
        return torch.linalg.cond(torch.linalg.eig(hippo_legs(state)[0]).eigenvectors).item()

    assert condition(4) < 1e3 and condition(16) > 1e8 and condition(64) > 1e15
    assert torch.linalg.cond(nplr(64).v).item() == pytest.approx(1, abs=1e-10)


# ------------------------------------------------------------------------------ discrete and continuous time


def test_the_bilinear_rule_is_scipys():
    a_bar, b_bar = bilinear(*hippo_legs(4), 0.25)
    close(a_bar, torch.tensor(SCIPY_A_BAR, dtype=torch.float64), 1e-14)
    close(b_bar, torch.tensor(SCIPY_B_BAR, dtype=torch.float64), 1e-14)


def test_the_bilinear_rule_takes_many_systems_real_or_complex():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 5, 5, generator=generator, dtype=torch.complex128)
    b = torch.randn(3, 5, generator=generator, dtype=torch.complex128)
    step = torch.tensor([0.1, 0.02, 1.0], dtype=torch.float64)
    a_bar, b_bar = bilinear(a, b, step)
    for i in range(3):
        inverse = torch.linalg.inv(torch.eye(5) - step[i] / 2 * a[i])
        close(a_bar[i], inverse @ (torch.eye(5) + step[i] / 2 * a[i]))
        close(b_bar[i], inverse @ b[i] * step[i])
    assert bilinear(*(x.float() for x in hippo_legs(3)), 0.1)[0].dtype == torch.float32


def test_continuous_time_is_reached_by_ever_smaller_steps():
    """x' = A x + B has the solution A^-1 (e^{tA} - I) B; Runge-Kutta errs by h⁴, the bilinear rule by h²."""
    a, b = hippo_legs(6)
    identity = torch.eye(6, dtype=torch.float64)
    exact = torch.linalg.solve(a, (torch.linalg.matrix_exp(2 * a) - identity) @ b)

    def runge_kutta(steps):
        return (integrate(a, b, lambda t: 1.0, 2.0, steps)[-1] - exact).norm().item()

    def recurrence(steps):
        a_bar, b_bar = bilinear(a, b, 2.0 / steps)
        x = torch.zeros_like(b)
        for _ in range(steps):
            x = a_bar @ x + b_bar
        return (x - exact).norm().item()

    assert runge_kutta(400) < 1e-6
    assert runge_kutta(100) / runge_kutta(200) == pytest.approx(16, rel=0.2)
    assert recurrence(100) / recurrence(200) == pytest.approx(4, rel=0.2)
    a_bar, b_bar = bilinear(a, b, 1 / 200)
    x = torch.zeros_like(b)
    for k in range(400):  # a signal that moves, sampled in the middle of each step
        x = a_bar @ x + b_bar * math.sin(3 * (k + 0.5) / 200)
    close(x, integrate(a, b, lambda t: math.sin(3 * t), 2.0, 400)[-1], 1e-3)  # h² = 2.5e-5 times A³


# ------------------------------------------------------------------------------------------ what is remembered


def wave(length):
    t = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return sum(torch.sin(2 * math.pi * f * t + f) / f for f in (1, 2, 3, 5))


def relative(given, wanted):
    return ((given - wanted).norm() / wanted.norm()).item()


def test_the_state_holds_the_legendre_coefficients_of_the_whole_past():
    length = 2_000
    u = wave(length)
    points = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    coefficients = legendre_basis(8, points).T @ u / length
    close(memory_matrix(*hippo_legs(8), length) @ u, coefficients, 1e-2)  # first samples have steps of 1, 1/2, 1/3, ..


def test_a_longer_state_remembers_better_and_better_than_a_random_matrix_does():
    length, u = 256, wave(256)
    errors, rivals = [], []
    for state in (4, 8, 16, 32):
        memory = memory_matrix(*hippo_legs(state), length)
        errors.append(relative(legendre_reconstruction(memory @ u, length), u))
        best = best_reconstruction(memory, memory @ u)
        assert relative(best, u) <= errors[-1] + 1e-3
        others = [memory_matrix(*random_memory(state, torch.Generator().manual_seed(s)), length) for s in range(3)]
        rivals.append(min(relative(best_reconstruction(m, m @ u), u) for m in others))
    # what is left at 32 sits in the first samples, whose steps of 1, 1/2, 1/3 .. are long: 0.02 with 1,024 samples
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.06
    assert all(ours < 0.8 * theirs for ours, theirs in zip(errors[1:], rivals[1:], strict=True))


def test_the_best_reconstruction_leaves_the_same_state():
    memory = memory_matrix(*hippo_legs(6), 40)
    x = memory @ wave(40)
    close(memory @ best_reconstruction(memory, x), x, 1e-9)
    weak = memory_matrix(*random_memory(6, torch.Generator().manual_seed(0)), 40)
    strengths = torch.linalg.svdvals(weak)
    x_weak = weak @ wave(40)
    close(weak @ best_reconstruction(weak, x_weak), x_weak, 1e-9)
    assert strengths[-1] < 0.05 * strengths[0]
    assert (weak @ best_reconstruction(weak, x_weak, tolerance=0.05) - x_weak).norm() > 1e-6  # that direction is lost
    assert best_reconstruction(memory, torch.stack([x, x])).shape == (2, 40)
    assert legendre_reconstruction(torch.stack([x, x]), 7).shape == (2, 7)


def test_the_random_matrix_is_stable_and_repeats():
    a, b = random_memory(16, torch.Generator().manual_seed(3))
    assert torch.linalg.eigvals(a).real.max() < -0.49
    again = random_memory(16, torch.Generator().manual_seed(3))
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])


def test_bad_input_is_refused_by_name():
    for state in (0, -1, 2.0, True):
        for call in (hippo_legs, nplr):
            with pytest.raises(ValueError, match="state must be an"):
                call(state)
    with pytest.raises(ValueError, match="state must be an even integer >= 2, got 3"):
        nplr(3)
    with pytest.raises(ValueError, match="state must be"):
        legendre_basis(0, torch.zeros(3))
    with pytest.raises(ValueError, match="state must be"):
        random_memory(0, torch.Generator())
    a, b = hippo_legs(3)
    for step in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="step must be > 0"):
            bilinear(a, b, step)
    with pytest.raises(ValueError, match="a and b must have shapes"):
        bilinear(a, b[:2], 0.1)
    for until, steps in ((0.0, 3), (1.0, 0)):
        with pytest.raises(ValueError, match="until must be > 0 and steps >= 1"):
            integrate(a, b, math.sin, until, steps)
    for length in (0, 2.0):
        with pytest.raises(ValueError, match="length must be an integer >= 1"):
            memory_matrix(a, b, length)
