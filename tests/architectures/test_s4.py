"""S4: powers, recurrence, convolution and generating function are one thing; the mixer keeps the course's rules."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from effnlp_lessons.architectures.hippo import bilinear, hippo_legs, nplr
from effnlp_lessons.architectures.s4 import (
    S4,
    c_from_generating,
    c_to_generating,
    dense_dplr,
    dplr_step_form,
    kernel_by_powers,
    recurrence,
    s4_kernel,
)
from effnlp_lessons.architectures.s4d import S4D
from effnlp_lessons.architectures.state_space import (
    ReadInputs,
    RecurrentState,
    StateSpaceMixer,
    as_complex,
    fft_convolution,
    run_steps,
    state_space_parameters,
    with_conjugates,
)
from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.measure import count_macs
from effnlp_lessons.transformer import Decoder, DecoderState, Encoder, TransformerConfig

D_MODEL, STATE = 6, 8
CONFIG = TransformerConfig(
    vocab_size=50, max_length=40, d_model=D_MODEL, layers=2, heads=2, d_ff=16, segments=0, dropout=0.0
)
MIXERS = {"S4": partial(S4, state=STATE), "S4D": partial(S4D, state=STATE)}
both = pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)
lengths = st.integers(1, 70)
# scipy.signal.dlsim((Ad, Bd, C Ad, C Bd, 1), impulse) with Ad, Bd = cont2discrete((A, B, ..), 0.25, "bilinear") for
# LegS of 4 states and C = (1, -2, 0.5, 3): dlsim's own output is that of the state before the input
SCIPY_IMPULSE = [
    0.18184256841878235, -0.9193546117780887, -0.19397640040075248, 0.30784930108879527,
    0.45437214003330173, 0.4127208795192604, 0.3108655609587716,
]  # fmt: skip


def close(given, wanted, bound=1e-10):
    torch.testing.assert_close(given, wanted, rtol=bound, atol=bound)


def draw_system(seed, features=3, state=STATE):
    """Λ, P, B, C of `features` systems away from HiPPO, one of each pair, and their steps."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(4, features, state // 2, 2, generator=generator, dtype=torch.float64)
    frequency, p, b, c = (torch.view_as_complex(x) for x in parts)
    eigenvalues = -torch.rand(features, state // 2, generator=generator) - 0.2 + 10j * frequency.real
    step = 10 ** (-2.5 + 2 * torch.rand(features, generator=generator, dtype=torch.float64))
    return eigenvalues.to(torch.complex128), p, b, c, step


def dense(eigenvalues, p, b, c, step):
    """(Ā, B̄, C) of all of the state."""
    a_bar, b_bar = bilinear(dense_dplr(eigenvalues, p), with_conjugates(b), step)
    return a_bar, b_bar, with_conjugates(c)


def shaken(make, seed=0, **arguments):
    """A float64 mixer whose every parameter has moved away from where training starts."""
    mixer = make(CONFIG, **arguments).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return mixer


def draw_x(length=19, batch=2, seed=0, dtype=torch.float64):
    """(batch, length, d_model), not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, D_MODEL, length, generator=generator, dtype=dtype).transpose(1, 2)


# ----------------------------------------------------------------------------------- three views of one system


@given(length=lengths, seed=st.integers(0, 1_000))
@settings(max_examples=25)
def test_generating_function_powers_convolution_recurrence_and_steps_are_one(length, seed):
    eigenvalues, p, b, c, step = draw_system(seed)
    a_bar, b_bar, c_all = dense(eigenvalues, p, b, c, step)
    c_tilde = c_to_generating(c_all, a_bar, length)[..., : STATE // 2]
    kernel = s4_kernel(eigenvalues, p, b, c_tilde[None], step, length)[0]
    close(kernel, kernel_by_powers(a_bar, b_bar, c_all, length))
    u = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = recurrence(a_bar, b_bar, c_all, u)
    close(fft_convolution(u, kernel), wanted)
    stepped, last = run_steps(dplr_step_form(eigenvalues, p, b, c, step), u, b.new_zeros(2, *b.shape))
    close(stepped, wanted)
    assert last.shape == (2, 3, STATE // 2)


@pytest.mark.parametrize("length", [1, 2, 1_023, 1_024])
def test_of_hippo_itself_with_64_states(length):
    legs = nplr(64)
    step = torch.tensor([1e-3, 1e-2, 1e-1], dtype=torch.float64)
    eigenvalues, p, b = (x[:32].expand(3, -1) for x in legs[:3])
    c = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.complex128)
    a_bar, b_bar, c_all = dense(eigenvalues, p, b, c, step)
    c_tilde = c_to_generating(c_all, a_bar, length)[..., :32]
    kernel = s4_kernel(eigenvalues, p, b, c_tilde[None], step, length)[0]
    truth = kernel_by_powers(a_bar, b_bar, c_all, length)
    close(kernel, truth)
    # the same in the basis of LegS, where everything is real
    a, b_legs = hippo_legs(64)
    c_legs = (c_all @ legs.v.conj().T).real
    close(kernel_by_powers(*bilinear(a.expand(3, -1, -1), b_legs.expand(3, -1), step), c_legs, length), truth)


@pytest.mark.parametrize("length", [1, 6, 7])
def test_the_kernel_is_the_inverse_transform_of_the_generating_function(length):
    eigenvalues, p, b, c, step = draw_system(1)
    a_bar, b_bar, c_tilde = dense(eigenvalues, p, b, c, step)
    z = torch.exp(-2j * math.pi * torch.arange(length, dtype=torch.float64) / length)
    identity = torch.eye(STATE, dtype=a_bar.dtype)
    values = [(c_tilde * torch.linalg.solve(identity - a_bar * x, b_bar)).sum(-1) for x in z]
    close(s4_kernel(eigenvalues, p, b, c[None], step, length)[0], torch.fft.ifft(torch.stack(values, -1)).real)


def test_the_impulse_response_is_scipys():
    a_bar, b_bar = bilinear(*hippo_legs(4), 0.25)
    c = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    wanted = torch.tensor(SCIPY_IMPULSE, dtype=torch.float64)
    close(kernel_by_powers(a_bar, b_bar, c, 7), wanted, 1e-13)
    impulse = F.one_hot(torch.tensor(0), 7).double()
    close(recurrence(a_bar, b_bar, c, impulse), wanted, 1e-13)
    legs = nplr(4)
    c_basis = c.to(legs.v.dtype) @ legs.v
    c_tilde = c_to_generating(c_basis, *bilinear(dense_dplr(legs.eigenvalues[:2], legs.p[:2]), legs.b, 0.25)[:1], 7)
    system = (x[None, :2] for x in legs[:3])
    kernel = s4_kernel(*system, c_tilde[None, None, :2], torch.tensor([0.25]).double(), 7)
    close(kernel[0, 0], wanted, 1e-12)


def test_the_impulse_response_of_the_mixer_is_its_kernel():
    mixer = shaken(MIXERS["S4"], kernel_length=11)
    close(fft_convolution(F.one_hot(torch.tensor(0), 11).double(), mixer.kernel(11)[0]), mixer.kernel(11)[0])
    with torch.no_grad():
        mixer.output.weight.copy_(torch.eye(D_MODEL))
        mixer.output.bias.zero_()
        mixer.skip.zero_()
    x = torch.zeros(1, 11, D_MODEL, dtype=torch.float64)
    x[:, 0] = 1
    close(mixer(x)[0][0].T, F.gelu(mixer.kernel(11)[0]))


@pytest.mark.parametrize("length", [1_001, 1_024, 2_048])
def test_float32_kernels_are_near(length):
    config = TransformerConfig(d_model=32, heads=4, max_length=length)
    mixer = S4(config, seed=length)
    kernel = mixer.kernel(length)[0]
    assert kernel.dtype == torch.float32
    with torch.no_grad():
        a_bar = mixer.double()._dense()
        b_bar = with_conjugates(mixer.step_form().b)
        truth = kernel_by_powers(a_bar, b_bar, with_conjugates(mixer.recovered_c()[0]), length)
    errors = (kernel - truth).norm(dim=-1) / truth.norm(dim=-1)
    assert errors.max() < 1e-5


# ----------------------------------------------------------------------------------------------- C and C~


@pytest.mark.parametrize("length", [1, 5, 64])
def test_c_comes_back_from_its_generating_form_and_is_not_the_same(length):
    eigenvalues, p, b, c, step = draw_system(2)
    a_bar, _, c = dense(eigenvalues, p, b, c, step)
    c_tilde = c_to_generating(c, a_bar, length)
    close(c_tilde, c - (c[:, None] @ torch.matrix_power(a_bar, length))[:, 0])
    close(c_from_generating(c_tilde, a_bar, length), c)
    close(c_from_generating(c_tilde.expand(2, 3, STATE), a_bar, length), c.expand(2, 3, STATE))
    assert (c_tilde - c).abs().max() > 0.05


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("length", [1, 7, 64])
def test_a_new_kernel_length_leaves_the_model_as_it_was(length, bidirectional):
    mixer = shaken(MIXERS["S4"], kernel_length=16, bidirectional=bidirectional)
    kernel, c, c_tilde = mixer.kernel(16), mixer.recovered_c(), mixer.c.clone()
    mixer.set_kernel_length_(length)
    close(mixer.recovered_c(), c, 1e-9)  # I - Ā^L is near singular when L is 1 and the step is small
    shared = min(16, length)
    close(mixer.kernel(shared), kernel[..., :shared], 1e-9)
    assert (mixer.c - c_tilde).abs().max() > 0.05
    with pytest.raises(ValueError, match=f"{length + 1} tokens are more than the kernel_length of {length}"):
        mixer.kernel(length + 1)
    mixer.set_kernel_length_(16)
    close(mixer.kernel(16), kernel, 1e-9)


def test_what_was_drawn_is_c_and_what_is_stored_is_made_for_the_length():
    short, long = (S4(CONFIG, kernel_length=n, seed=4).double() for n in (8, 30))
    # stored in float32, and divided by I - Ā^8, which is 0.004 for a step of 1e-3
    close(short.kernel(8), long.kernel(8), 1e-3)
    assert (short.c - long.c).abs().max() > 0.1
    assert 0.6 < long.recovered_c().abs().square().mean() < 1.6  # a complex normal of variance 1


def test_a_checkpoint_brings_its_kernel_length_and_its_step_along():
    mixer = shaken(MIXERS["S4"], kernel_length=9)
    mixer.set_step_scale_(2.0)
    other = S4(CONFIG, kernel_length=33, state=STATE, seed=5).double()
    other.load_state_dict(mixer.state_dict())
    x = draw_x(9)
    assert torch.equal(other(x)[0], mixer(x)[0])
    assert all(not tensor.is_complex() for tensor in mixer.state_dict().values())


# --------------------------------------------------------------------------------------------- the step form


@given(seed=st.integers(0, 1_000))
@settings(max_examples=30)
def test_the_step_form_is_the_dense_matrix_and_never_grows_a_state(seed):
    eigenvalues, p, b, c, step = draw_system(seed)
    a_bar, b_bar, _ = dense(eigenvalues, p, b, c, step)
    form = dplr_step_form(eigenvalues, p, b, c, step)
    close(form.dense(), a_bar)
    close(with_conjugates(form.b), b_bar)
    assert torch.linalg.matrix_norm(a_bar, 2).max() <= 1 + 1e-12


@both
@given(length=lengths)
@settings(max_examples=20)
def test_the_state_after_many_tokens_is_that_of_single_steps(make, length):
    mixer = shaken(make)
    u = draw_x(length, 3).transpose(1, 2)
    form = mixer.step_form()
    _, wanted = run_steps(form, u, mixer.start(3).x)
    close(mixer.final_state(form, u), wanted)


# ----------------------------------------------------------------------------------------------- convolution


@given(length=lengths, extra=st.integers(0, 3), two_sided=st.booleans())
@settings(max_examples=40)
def test_the_convolution_is_its_definition(length, extra, two_sided):
    generator = torch.Generator().manual_seed(length)
    u = torch.randn(2, 3, length, generator=generator, dtype=torch.float64)
    kernel, reverse = torch.randn(2, 3, length + extra, generator=generator, dtype=torch.float64)
    wanted = torch.zeros_like(u)
    for k in range(length):
        for j in range(length):
            if j <= k:
                wanted[..., k] += kernel[:, k - j] * u[..., j]
            elif two_sided:
                wanted[..., k] += reverse[:, j - k - 1] * u[..., j]
    close(fft_convolution(u, kernel, reverse if two_sided else None), wanted)


def test_without_room_behind_the_signal_the_end_would_wrap_round():
    u, kernel = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wrapped = torch.fft.irfft(torch.fft.rfft(u) * torch.fft.rfft(kernel), n=16)
    assert (wrapped - fft_convolution(u, kernel)).abs().max() > 0.5


# ----------------------------------------------------------------------------------------------- sampling rate


@both
def test_half_the_samples_with_twice_the_step_are_the_same_signal(make):
    """The rule holds to second order in the step: a quarter of the error with half of it."""

    def error(length, scale=2.0):
        mixer = make(CONFIG.__class__(d_model=D_MODEL, heads=2, max_length=length)).double()
        with torch.no_grad():
            mixer.log_step.fill_(math.log(2 / length))  # the signal takes two units of time
        if isinstance(mixer, S4):  # C~ depends on the step
            torch.nn.init.normal_(mixer.c, generator=torch.Generator().manual_seed(0))
            c = as_complex(mixer.c.detach())
            c_tilde = c_to_generating(with_conjugates(c), mixer._dense(), length)[..., : STATE // 2]
            mixer.c.data.copy_(torch.view_as_real(c_tilde))

        def signal(samples):  # in the middle of every step
            t = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
            return (torch.sin(7 * t) + t**2).expand(1, D_MODEL, -1)

        fine = fft_convolution(signal(length), mixer.kernel(length)[0])[..., 1::2]
        mixer.set_step_scale_(scale)
        coarse = fft_convolution(signal(length // 2), mixer.kernel(length // 2)[0])
        return ((coarse - fine).norm() / fine.norm()).item()

    with torch.no_grad():
        assert error(256) < 0.02
        assert error(256) / error(512) == pytest.approx(4, rel=0.25)
        assert error(256, scale=1.0) > 0.3


def test_a_changed_step_keeps_c_and_goes_back():
    mixer = shaken(MIXERS["S4"])
    c, kernel = mixer.recovered_c(), mixer.kernel(40)
    mixer.set_step_scale_(2.0)
    close(mixer.recovered_c(), c, 1e-9)
    assert mixer.step_scale == 2
    assert (mixer.kernel(40) - kernel).abs().max() > 0.01
    mixer.set_step_scale_(1.0)
    close(mixer.kernel(40), kernel, 1e-9)


# ------------------------------------------------------------------------------------------------- the mixer


@both
def test_the_mixer_is_a_convolution_a_skip_and_an_output(make):
    x = draw_x()
    for bidirectional in (False, True):
        mixer = shaken(make, bidirectional=bidirectional)
        kernel, u = mixer.kernel(19), x.transpose(1, 2)
        assert kernel.shape == (1 + bidirectional, D_MODEL, 19)
        wanted = torch.zeros_like(u)
        for k in range(19):
            for j in range(19):
                if j <= k:
                    wanted[..., k] += kernel[0, :, k - j] * u[..., j]
                elif bidirectional:
                    wanted[..., k] += kernel[1, :, j - k - 1] * u[..., j]
        wanted = F.gelu(wanted + mixer.skip[:, None] * u).transpose(1, 2)
        y, state = mixer(x)
        close(y, F.linear(wanted, mixer.output.weight, mixer.output.bias))
        assert state is None if bidirectional else isinstance(state, ReadInputs)


def decoder(make):
    model = Decoder(CONFIG, token_mixer=lambda config, layer: make(config, seed=layer)).eval().double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def token_ids(length=19, batch=2):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(0))


@both
@pytest.mark.parametrize("pieces", [[1] * 19, [7, 1, 1, 10], [18, 1]])
def test_a_decoder_generates_token_by_token_what_it_computes_at_once(make, pieces):
    model, ids = decoder(make), token_ids()
    real = torch.arange(19) >= torch.tensor([[0], [4]])  # padding before the text, as in generation from a batch
    for mask in (None, real):
        whole = model(ids, mask).logits
        outputs, state, end = [], None, 0
        for piece in pieces:
            end += piece
            out = model(ids[:, end - piece : end], None if mask is None else mask[:, :end], state)
            outputs.append(out.logits)
            state = out.state
        close(torch.cat(outputs, dim=1), whole)
        assert isinstance(state, DecoderState) and isinstance(state.layers[0], RecurrentState)
        assert state.layers[0].x.shape == (2, D_MODEL, STATE // 2)


@both
def test_generation_goes_on_past_the_kernel_and_from_a_start_of_its_own(make):
    mixer = shaken(make)
    x = draw_x(60)
    form = mixer.step_form()
    y, state = mixer(x, None, mixer.start(2, form))
    assert state.form is form  # computed once, used again
    _, half = mixer(x[:, :30])
    again, last = mixer(x[:, 30:], None, half)
    close(again, y[:, 30:])
    close(last.x, state.x)
    if make is MIXERS["S4"]:
        with pytest.raises(ValueError, match="60 tokens are more than the kernel_length of 40"):
            mixer(x)
        mixer.set_kernel_length_(60)
    close(mixer(x)[0], y, 1e-9)


@both
def test_gradients_go_through_the_state_and_are_those_of_the_convolution(make):
    mixer = shaken(make)
    x = draw_x(13).requires_grad_()
    inputs = [x, *mixer.parameters()]
    whole, _ = mixer(x)
    upstream = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=whole.dtype)
    first, state = mixer(x[:, :6])
    second, _ = mixer(x[:, 6:], None, state)
    pieces = torch.cat([first, second], dim=1)
    ours, theirs = (torch.autograd.grad(y, inputs, upstream) for y in (whole, pieces))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-8)  # the gradient of the steps goes through (I - Ā^L)^-1
    assert all(gradient.abs().max() > 0 for gradient in ours)


@pytest.mark.parametrize("length", [1, 4, 5])
def test_the_kernels_gradient_is_its_derivative(length):
    eigenvalues, p, b, c, step = draw_system(3, features=2, state=4)
    inputs = [torch.view_as_real(x).clone().requires_grad_() for x in (eigenvalues, p, b, c[None])]
    inputs.append(step.clone().requires_grad_())

    def kernel(*parts):
        return s4_kernel(*(torch.view_as_complex(x) for x in parts[:4]), parts[4], length)

    assert torch.autograd.gradcheck(kernel, inputs)


@both
def test_the_mixers_gradient_is_its_derivative(make):
    mixer = shaken(partial(make, state=4), bidirectional=True)
    names, values = zip(*mixer.named_parameters(), strict=True)
    x = draw_x(3, 1).contiguous().requires_grad_()

    def call(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))[0]

    values = [value.detach().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(call, (x, *values))


# --------------------------------------------------------------------------------------- causality, padding


@both
def test_the_future_is_not_read_and_a_bidirectional_mixer_reads_all(make):
    x = draw_x(33)
    later = x.clone()
    later[:, 20:] += 1
    mixer = shaken(make)
    before, after = (mixer(y)[0][:, :20] for y in (x, later))
    close(before, after, 1e-12)  # not to the bit: all outputs share one transform
    stepped, again = (mixer(y, None, mixer.start(2))[0][:, :20] for y in (x, later))
    assert torch.equal(stepped, again)
    assert (mixer(x)[0] - mixer(later)[0])[:, 20].abs().max() > 1e-3
    mixer = shaken(make, bidirectional=True)
    before, after = (mixer(y)[0][:, :20] for y in (x, later))
    assert (before - after).abs().amax(dim=(0, 2)).min() > 1e-4


@both
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_is_not_read(make, bidirectional):
    mixer, x = shaken(make, bidirectional=bidirectional), draw_x()
    real = torch.arange(19) < torch.tensor([[11], [0]])
    y = mixer(x, real)[0]
    for filling in (7.0, math.nan):
        other = torch.where(real[..., None], x, filling)
        assert torch.equal(mixer(other, real)[0], y)
    close(y[:1, :11], mixer(x[:1, :11])[0])
    assert torch.equal(y[~real], mixer.output.bias.expand_as(y[~real]))  # a fully padded text is one of them
    real = torch.arange(19).expand(2, -1) >= 6  # padding first
    close(mixer(x, real)[0][:, 6:], mixer(x[:, 6:])[0])


# ------------------------------------------------------------------------------------- precision, cost, training


@both
@pytest.mark.parametrize("length", [1, 19, 40])
def test_float32_and_half_precision_are_near_the_truth(make, length):
    mixer = shaken(make).float()
    x = draw_x(length, dtype=torch.float32)
    y, state = mixer(x)
    stepped = mixer(x, None, mixer.start(2))[0]
    assert y.dtype == stepped.dtype == torch.float32 and mixer.start(1).x.dtype == torch.complex64
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer(x)[0].dtype == torch.bfloat16
    rounded = {dtype: make(CONFIG).to(dtype) for dtype in (torch.float16, torch.bfloat16)}
    for dtype, model in rounded.items():
        model.load_state_dict(mixer.state_dict())
        low = model(x.to(dtype))[0]
        assert low.dtype == dtype
        # eleven or eight bits of every parameter, Δ and Λ among them
        assert (low.float() - y).norm() < (0.02 if dtype == torch.float16 else 0.15) * y.norm()
    truth = mixer.double()(x.double())[0]
    close(y.double(), truth, 1e-5)
    close(stepped.double(), truth, 1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_macs_are_counted(bidirectional):
    n, length, batch = STATE // 2, 40, 2
    mixer = S4(CONFIG, state=STATE, bidirectional=bidirectional)
    count = count_macs(mixer, draw_x(length, batch, dtype=torch.float32))
    assert count.by_module["output"] == batch * length * D_MODEL**2
    channels = 1 + bidirectional
    frequencies, sums = length // 2 + 1, 2 * channels + 2  # s(C~, B), s(C~, P) of each channel, s(P*, B), s(P*, P)
    table = D_MODEL * (2 * sums) * n * (2 * frequencies)
    points = 128  # >= 2 * 40 - 1

    def transform(rows, size):  # 5 n log2 n FLOPs for complex numbers, half for real ones, two FLOPs a MAC
        return round(rows * size * 5 * math.log2(size) / 4)

    transforms = transform(channels * D_MODEL, length) + 2 * transform(batch * D_MODEL, points)
    assert count.by_module[""] == table + transforms + transform(D_MODEL, points)


@both
def test_macs_of_a_step_do_not_depend_on_what_came_before(make):
    mixer = make(CONFIG)
    counts = []
    for length in (3, 30):
        state = mixer.recurrent_state(mixer(draw_x(length, dtype=torch.float32))[1])
        counts.append(count_macs(mixer, draw_x(1, dtype=torch.float32), None, state).total)
        assert state.x.numel() == 2 * D_MODEL * STATE // 2
    products = 2 if make is MIXERS["S4"] else 1  # complex, one real part each: row x and c x
    assert counts == [2 * (products * 4 * D_MODEL * STATE // 2 + D_MODEL**2)] * 2


def test_the_largest_tensor_is_the_table_of_half_the_state_and_half_the_frequencies():
    def largest(length):
        mixer = S4(CONFIG, kernel_length=length, state=32)
        return largest_storage(lambda x: mixer(x)[0], torch.randn(1, length, D_MODEL))

    # complex numbers of features x pairs x frequencies, which may be watched as pairs of real ones
    assert largest(512) <= 2 * D_MODEL * 16 * 257
    assert largest(1_024) <= 2 * D_MODEL * 16 * 513


@both
def test_parameters_of_the_state_space_are_handed_out(make):
    model = decoder(make)
    found = state_space_parameters(model)
    names = [name for name, p in model.named_parameters() if any(p is q for q in found)]
    kinds = {name.split(".")[-1] for name in names}
    assert kinds == {"log_decay", "frequency", "b", "log_step"} | ({"p"} if make is MIXERS["S4"] else set())
    assert len(found) == len(names) == 2 * len(kinds)
    assert state_space_parameters(torch.nn.Linear(2, 2)) == []


@both
def test_the_start_is_the_seeds_and_a_transformer_leaves_it_alone(make):
    first, same, other = (make(CONFIG, seed=s) for s in (3, 3, 4))
    for name, value in first.state_dict().items():
        if not name.startswith("output"):
            assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(first.c, other.c) and not torch.equal(first.log_step, other.log_step)
    assert first.step.min() >= 1e-3 * 0.999 and first.step.max() <= 1e-1 * 1.001
    model = Decoder(CONFIG, token_mixer=lambda config, layer: make(config, seed=3))
    assert torch.equal(model.blocks[0].token_mixer.c, first.c)
    assert all(p.dtype == torch.float32 for p in first.parameters())


@both
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_it_trains_and_stays_stable(make, kind):
    if kind == "encoder":
        model = Encoder(CONFIG, token_mixer=lambda config, layer: make(config, bidirectional=True))
    else:
        model = Decoder(CONFIG, token_mixer=lambda config, layer: make(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)  # far too much for a state space
    losses = []
    for _ in range(12):
        output = model(token_ids())[0]
        loss = F.cross_entropy(output.flatten(0, 1), token_ids().flatten() % output.shape[-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for block in model.blocks:
        mixer = block.token_mixer
        assert isinstance(mixer, StateSpaceMixer) and mixer.eigenvalues.real.max() < 0
        assert torch.linalg.matrix_norm(mixer.step_form().dense(), 2).max() <= 1 + 1e-5
        for name, parameter in mixer.named_parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_an_encoder_reads_both_ways_and_pads():
    model = Encoder(CONFIG, token_mixer=lambda config, layer: S4(config, state=STATE, bidirectional=True)).double()
    model.eval()
    ids, real = token_ids(), torch.arange(19) < torch.tensor([[19], [8]])
    last = model(ids, real).last
    close(last[1, :8], model(ids[1:, :8]).last[0])
    other = ids.clone()
    other[0, -1] += 1
    assert (model(other % 50, real).last[0, 0] - last[0, 0]).abs().max() > 1e-6


# ---------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused_by_name():
    for state in (0, 3, 2.0, True):
        with pytest.raises(ValueError, match="state must be an even integer >= 2"):
            S4(CONFIG, state=state)
    for length in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="kernel_length must be an integer >= 1"):
            S4(CONFIG, length)
        with pytest.raises(ValueError, match="kernel_length must be an integer >= 1"):
            S4(CONFIG, state=STATE).set_kernel_length_(length)
    with pytest.raises(ValueError, match=r"kernel_length must be .* got 0"):
        S4(TransformerConfig(max_length=0))
    with pytest.raises(ValueError, match="kernel must have at least 5 lags"):
        fft_convolution(torch.zeros(5), torch.zeros(4))
    with pytest.raises(ValueError, match="reverse_kernel must have at least 5 lags"):
        fft_convolution(torch.zeros(5), torch.zeros(5), torch.zeros(4))
    eigenvalues, p, b, c, step = draw_system(0)
    with pytest.raises(ValueError, match="do not fit together"):
        s4_kernel(eigenvalues, p, b, c, step, 3)
    with pytest.raises(ValueError, match="do not fit together"):
        s4_kernel(eigenvalues, p[:1], b, c[None], step, 3)
    with pytest.raises(ValueError, match="length must be >= 1"):
        s4_kernel(eigenvalues, p, b, c[None], step, 0)


@both
def test_a_mixer_refuses_bad_input_by_name(make):
    mixer, x = make(CONFIG), draw_x(7, dtype=torch.float32)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="step_scale must be > 0"):
            mixer.set_step_scale_(scale)
    for bad in (x[:, :0], x[..., :1], x[0]):
        with pytest.raises(ValueError, match=r"x must have shape \(batch, length >= 1, 6\)"):
            mixer(bad)
    state = mixer(x)[1]
    with pytest.raises(ValueError, match="state must be of batch 1, as x is, got batch 2"):
        mixer(x[:1], None, state)
    with pytest.raises(ValueError, match="key_padding_mask must have shape"):
        mixer(x, torch.ones(2, 6, dtype=torch.bool), state)
    with pytest.raises(ValueError, match="key_padding_mask must have shape"):
        mixer(x, torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        mixer(x, torch.ones(2, 7))
    with pytest.raises(ValueError, match="state needs a causal mixer"):
        make(CONFIG, bidirectional=True)(x, None, state)
    with pytest.raises(ValueError, match="has no scores"):
        Encoder(CONFIG, token_mixer=lambda config, layer: make(config))(token_ids(), return_scores=True)
