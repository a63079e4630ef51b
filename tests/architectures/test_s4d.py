"""S4D: diagonal S4 against dense systems, S4 without its correction, and LegS. What all mixers share: test_s4.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from effnlp_lessons.architectures.hippo import bilinear, hippo_legs, nplr
from effnlp_lessons.architectures.s4 import c_to_generating, kernel_by_powers, recurrence, s4_kernel
from effnlp_lessons.architectures.s4d import (
    DISCRETISATIONS,
    S4D,
    STARTS,
    discretise_diagonal,
    powers,
    s4d_kernel,
    s4d_start,
)
from effnlp_lessons.architectures.state_space import fft_convolution, run_steps, with_conjugates
from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.measure import count_macs
from effnlp_lessons.transformer import TransformerConfig

D_MODEL, STATE = 6, 8
CONFIG = TransformerConfig(max_length=0, d_model=D_MODEL, heads=2)
# scipy.signal.cont2discrete((A, B, C, D), 0.2, "zoh") for A = ((-1/2, -3), (3, -1/2)), B = (1, 0): the first columns
SCIPY_A_BAR = (0.7467945468079942, 0.5109096377402018)
SCIPY_B_BAR = (0.1793872043044982, 0.05450395034658554)


def close(given, wanted, bound=1e-10):
    torch.testing.assert_close(given, wanted, rtol=bound, atol=bound)


def draw_system(seed, features=3, state=STATE):
    """Λ, B, C of `features` systems, one of each pair, and their steps."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(3, features, state // 2, 2, generator=generator, dtype=torch.float64)
    frequency, b, c = (torch.view_as_complex(x) for x in parts)
    decay = torch.rand(features, state // 2, generator=generator, dtype=torch.float64) + 0.2
    step = 10 ** (-2.5 + 2 * torch.rand(features, generator=generator, dtype=torch.float64))
    return torch.complex(-decay, 10 * frequency.real), b, c, step


def dense_discrete(eigenvalues, b, step, discretisation):
    """(Ā, B̄) of all of the state by dense linear algebra: the matrix exponential or the rule for any matrix."""
    a, b = torch.diag_embed(with_conjugates(eigenvalues)), with_conjugates(b)
    if discretisation == "bilinear":
        return bilinear(a, b, step)
    # exp(Δ [A B; 0 0]) = [Ā B̄; 0 1]
    both = F.pad(torch.cat([a, b[..., None]], dim=-1), (0, 0, 0, 1)) * step[:, None, None]
    result = torch.linalg.matrix_exp(both)
    return result[:, :-1, :-1], result[:, :-1, -1]


# ---------------------------------------------------------------------------------------------------- the kernel


@given(length=st.integers(1, 70), seed=st.integers(0, 1_000), discretisation=st.sampled_from(DISCRETISATIONS))
@settings(max_examples=40)
def test_kernel_powers_recurrence_and_convolution_are_one(length, seed, discretisation):
    eigenvalues, b, c, step = draw_system(seed)
    a_dense, b_dense = dense_discrete(eigenvalues, b, step, discretisation)
    a_bar, b_bar = discretise_diagonal(eigenvalues, b, step, discretisation)
    close(with_conjugates(a_bar), a_dense.diagonal(dim1=-2, dim2=-1))
    close(with_conjugates(b_bar), b_dense)
    kernel = s4d_kernel(a_bar, (c * b_bar)[None], length)[0]
    close(kernel, kernel_by_powers(a_dense, b_dense, with_conjugates(c), length))
    u = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close(fft_convolution(u, kernel), recurrence(a_dense, b_dense, with_conjugates(c), u))


def test_the_zero_order_hold_is_scipys():
    """x' = λ x + u with λ = -1/2 + 3i is the real system of scipy's two rows."""
    one = torch.ones(1, dtype=torch.complex128)
    step = torch.tensor(0.2, dtype=torch.float64)
    a_bar, b_bar = discretise_diagonal(torch.tensor([-0.5 + 3j], dtype=torch.complex128), one, step)
    close(torch.view_as_real(a_bar)[0], torch.tensor(SCIPY_A_BAR, dtype=torch.float64), 1e-14)
    close(torch.view_as_real(b_bar)[0], torch.tensor(SCIPY_B_BAR, dtype=torch.float64), 1e-14)


@pytest.mark.parametrize("length", [1, 12, 33])
def test_with_the_bilinear_rule_it_is_s4_without_the_correction(length):
    eigenvalues, b, c, step = draw_system(5)
    a_bar, _ = dense_discrete(eigenvalues, b, step, "bilinear")
    c_tilde = c_to_generating(with_conjugates(c), a_bar, length)[..., : STATE // 2]
    wanted = s4_kernel(eigenvalues, torch.zeros_like(b), b, c_tilde[None], step, length)
    a_bar, b_bar = discretise_diagonal(eigenvalues, b, step, "bilinear")
    close(s4d_kernel(a_bar, (c * b_bar)[None], length), wanted)


def test_both_rules_become_one_for_small_steps():
    eigenvalues, b, c, _ = draw_system(6)

    def difference(step):
        step = torch.full((3,), step, dtype=torch.float64)
        kernels = []
        for discretisation in DISCRETISATIONS:
            a_bar, b_bar = discretise_diagonal(eigenvalues, b, step, discretisation)
            kernels.append(s4d_kernel(a_bar, (c * b_bar)[None], round(1 / step[0].item())))
        return ((kernels[0] - kernels[1]).norm() / kernels[0].norm()).item()

    assert difference(1 / 1_000) < 1e-3
    assert difference(1 / 500) / difference(1 / 1_000) == pytest.approx(4, rel=0.1)


@given(count=st.integers(1, 40))
@settings(max_examples=20)
def test_powers(count):
    a_bar, _ = discretise_diagonal(*draw_system(1)[:2], draw_system(1)[3])
    close(powers(a_bar, count), a_bar[..., None] ** torch.arange(count))


@pytest.mark.parametrize("start", STARTS)
def test_float32_kernels_are_near(start):
    mixer = S4D(TransformerConfig(d_model=32, heads=4), start=start)
    kernel = mixer.kernel(4_096)
    assert kernel.dtype == torch.float32
    truth = mixer.double().kernel(4_096)
    assert ((kernel - truth).norm(dim=-1) / truth.norm(dim=-1)).max() < 1e-5


def test_a_small_step_loses_no_digits():
    eigenvalues = torch.tensor([[-0.5 + 0.1j]], dtype=torch.complex128)
    step, one = torch.tensor([1e-5], dtype=torch.float64), torch.ones(1, 1, dtype=torch.complex128)
    exact = discretise_diagonal(eigenvalues, one, step)[1]
    rounded = discretise_diagonal(*(x.to(torch.complex64) for x in (eigenvalues, one)), step.float())[1]
    assert ((rounded - exact).abs() / exact.abs()).max() < 1e-6


# ---------------------------------------------------------------------------------------------------- the starts


def test_the_starts_are_their_formulas():
    n_pairs = STATE // 2
    for start in STARTS:
        eigenvalues, b = s4d_start(start, STATE)
        assert eigenvalues.shape == b.shape == (n_pairs,) and (eigenvalues.real == -0.5).all()
    for n in range(n_pairs):
        assert s4d_start("lin", STATE)[0][n].imag.item() == pytest.approx(math.pi * n, rel=1e-12)
        wanted = STATE / math.pi * (STATE / (2 * n + 1) - 1)
        assert s4d_start("inv", STATE)[0][n].imag.item() == pytest.approx(wanted, rel=1e-12)
    legs = nplr(STATE)
    assert torch.equal(s4d_start("legs", STATE)[0], legs.eigenvalues[:n_pairs])


def test_the_largest_frequency_of_inverse_is_near_that_of_legs():
    for state, bound in ((64, 0.02), (256, 0.01)):
        ours, legs = (s4d_start(start, state)[0].imag.max() for start in ("inv", "legs"))
        assert abs(ours - legs) / legs < bound


def test_the_diagonal_system_answers_a_step_as_legs_does():
    """States after a unit step: A^-1 (e^{tA} - I) B, and the same of the diagonal system with half of its B."""
    times = torch.linspace(0.05, 5, 100, dtype=torch.float64)

    def errors(state):
        a, b = hippo_legs(state)
        eigenvalues, b_half = (with_conjugates(x) for x in s4d_start("legs", state))
        v = nplr(state).v
        wanted = torch.stack([torch.linalg.solve(a, torch.linalg.matrix_exp(t * a) @ b - b) for t in times])
        answers = b_half / eigenvalues * torch.expm1(times[:, None] * eigenvalues)
        step = relative((answers @ v.T).real[:, 0], wanted[:, 0])
        impulse = relative((b_half * torch.exp(times[:, None] * eigenvalues) @ v.T).real[:, 0], times.neg().exp())
        return step, impulse

    (step_16, impulse_16), (step_64, impulse_64) = errors(16), errors(64)
    assert step_16 < 0.02 and step_64 < 0.003
    assert impulse_16 > 0.3 and impulse_64 > 0.3


def relative(given, wanted):
    return ((given - wanted).norm() / wanted.norm()).item()


# ----------------------------------------------------------------------------------------------------- the mixer


@pytest.mark.parametrize("discretisation", DISCRETISATIONS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("length", [1, 30, 31])
def test_steps_and_convolution_of_every_start(start, discretisation, length):
    mixer = S4D(CONFIG, STATE, start=start, discretisation=discretisation, seed=2).double()
    x = torch.randn(2, length, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, state = mixer(x)
    stepped, last = mixer(x, None, mixer.start(2))
    close(stepped, y)
    close(mixer.recurrent_state(state).x, last.x)
    form = mixer.step_form()
    wanted = kernel_by_powers(form.dense(), with_conjugates(form.b), with_conjugates(form.c), length)
    close(mixer.kernel(length)[0], wanted)
    close(run_steps(form, x.transpose(1, 2), mixer.start(2).x)[1], last.x)


def test_the_doubled_step_is_that_of_a_mixer_with_doubled_steps():
    mixer, other = (S4D(CONFIG, STATE, seed=1).double() for _ in range(2))
    mixer.set_step_scale_(2.0)
    with torch.no_grad():
        other.log_step.add_(math.log(2))
    close(mixer.kernel(20), other.kernel(20))
    other = S4D(CONFIG, STATE).double()
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(mixer.kernel(20), other.kernel(20))


@pytest.mark.parametrize("length", [1, 2, 17])
def test_the_kernels_gradient_is_its_derivative(length):
    eigenvalues, b, c, step = draw_system(3, features=2, state=4)
    inputs = [torch.view_as_real(x).clone().requires_grad_() for x in (eigenvalues, b, c)]

    def kernel(*parts):
        eigenvalues, b, c = (torch.view_as_complex(x) for x in parts[:3])
        a_bar, b_bar = discretise_diagonal(eigenvalues, b, parts[3])
        return s4d_kernel(a_bar, (c * b_bar)[None], length)

    assert torch.autograd.gradcheck(kernel, (*inputs, step.clone().requires_grad_()))


def test_no_table_of_state_times_length():
    def largest(length):
        mixer = S4D(TransformerConfig(max_length=0, d_model=4, heads=2), state=64)
        return largest_storage(lambda x: mixer(x)[0], torch.randn(1, length, 4))

    # the spectrum of the padded signal, complex: features x 8,192 points. A table would be features x 32 x 4,096
    assert largest(4_096) <= 2 * 4 * 8_192
    assert largest(16_384) <= 2 * 4 * 32_768


@pytest.mark.parametrize("bidirectional", [False, True])
def test_macs_are_counted(bidirectional):
    mixer = S4D(CONFIG, STATE, bidirectional)
    count = count_macs(mixer, torch.randn(2, 64, D_MODEL))
    channels = 1 + bidirectional
    kernel = channels * D_MODEL * 64 * STATE  # 64 = 8 blocks of 8 tokens; half the state, each two real products

    def transform(rows):  # 128 points, real: 5 n log2 n / 2 FLOPs, two FLOPs a MAC
        return round(rows * 128 * 5 * 7 / 4)

    assert count.by_module[""] == kernel + 2 * transform(2 * D_MODEL) + transform(D_MODEL)
    assert count.by_module["output"] == 2 * 64 * D_MODEL**2


def test_bad_input_is_refused_by_name():
    for state in (0, 5, 2.0, True):
        with pytest.raises(ValueError, match="state must be an even integer >= 2"):
            S4D(CONFIG, state)
    with pytest.raises(ValueError, match="start must be one of .* got 'random'"):
        S4D(CONFIG, start="random")
    with pytest.raises(ValueError, match="discretisation must be one of .* got 'euler'"):
        S4D(CONFIG, discretisation="euler")
    eigenvalues, b, c, step = draw_system(0)
    with pytest.raises(ValueError, match="discretisation must be one of"):
        discretise_diagonal(eigenvalues, b, step, "euler")
    with pytest.raises(ValueError, match="length must be >= 1"):
        s4d_kernel(eigenvalues.exp(), c[None], 0)
