"""What S4 and S4D share: a state space model for every feature as a token mixer (Gu et al. 2022, arXiv 2111.00396).

A text is read at once, as a convolution with the kernel of each feature, and continued token by token, as a recurrence:
    y = K * u        or        x_k = Ā x_{k-1} + B̄ u_k,  y_k = C x_k
S4 and S4D say what the kernel is and how a step is taken. The mixer adds D u, an activation and a linear layer.

NOTE of numbers in conjugate pairs one is stored; sums over pairs are real.
NOTE bidirectional: the second kernel starts at the next token, so that no pair of tokens is counted twice.
NOTE a padded token is an input of 0: time passes. Padding before a text changes nothing, for the state is still 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from effnlp_lessons.dense_attention import at_least_float32, check_key_padding_mask
from effnlp_lessons.transformer import TransformerConfig

STEP_RANGE = (1e-3, 1e-1)  # Δ at the start, log-uniform over the features


def as_complex(x: Float[Tensor, "*shape two"]) -> Complex[Tensor, "*shape"]:
    """Complex numbers from stored (real, imaginary) pairs, complex64 or complex128."""
    return torch.view_as_complex(at_least_float32(x).contiguous())


def with_conjugates(x: Complex[Tensor, "... pairs"]) -> Complex[Tensor, "... state"]:
    """All of the state from one of each conjugate pair."""
    return torch.cat([x, x.conj()], dim=-1)


def fft_convolution(
    u: Float[Tensor, "... length"],
    kernel: Float[Tensor, "... lags"],
    reverse_kernel: Float[Tensor, "... lags"] | None = None,
) -> Float[Tensor, "... length"]:
    """y_k = sum_{i <= k} K_i u_{k-i}, and with a second kernel + sum_{i >= 0} R_i u_{k+1+i}: O(length log length).

    Zeros behind the signal make room for 2 length - 1 products; without them the end would wrap round to the start.
    Causal up to rounding: a later token moves an earlier output by the error of the FFT, and by no more.

    Raises:
        ValueError: a kernel with fewer lags than the signal has samples.
    """
    length = u.shape[-1]
    for name, given in (("kernel", kernel), ("reverse_kernel", reverse_kernel)):
        if given is not None and given.shape[-1] < length:
            raise ValueError(f"{name} must have at least {length} lags, one for each sample, got {given.shape[-1]}")
    points = 1 << (2 * length - 2).bit_length()  # a power of two >= 2 length - 1
    kernel = F.pad(kernel[..., :length], (0, points - length))
    if reverse_kernel is not None:  # lag -1 is the last of the points
        kernel = kernel + F.pad(reverse_kernel[..., : length - 1].flip(-1), (points - length + 1, 0))
    spectrum = torch.fft.rfft(u, n=points) * torch.fft.rfft(kernel)
    return torch.fft.irfft(spectrum, n=points)[..., :length]


class StepForm(NamedTuple):
    """x_k = diagonal x - column (2 Re sum row x) + b u_k,  y_k = 2 Re sum c x_k: O(state) for each feature.

    All (features, pairs), complex. `column` and `row` are None for a diagonal Ā.
    """

    diagonal: Tensor
    column: Tensor | None
    row: Tensor | None
    b: Tensor
    c: Tensor

    def dense(self) -> Complex[Tensor, "features state state"]:
        """Ā written out."""
        a_bar = torch.diag_embed(with_conjugates(self.diagonal))
        if self.column is None:
            return a_bar
        return a_bar - with_conjugates(self.column)[..., :, None] * with_conjugates(self.row)[..., None, :]


def run_steps(
    form: StepForm, u: Float[Tensor, "batch features length"], x: Complex[Tensor, "batch features pairs"]
) -> tuple[Float[Tensor, "batch features length"], Complex[Tensor, "batch features pairs"]]:
    """The recurrence token by token from the state `x`: (y without skip, the new state)."""
    outputs = []
    for k in range(u.shape[-1]):
        new = form.diagonal * x + form.b * u[..., k, None]
        if form.column is not None:
            new = new - form.column * (2 * torch.einsum("bhn,hn->bh", x, form.row).real)[..., None]
        x = new
        outputs.append(2 * torch.einsum("bhn,hn->bh", x, form.c).real)
    return torch.stack(outputs, dim=-1), x


class ReadInputs(NamedTuple):
    """What a convolution leaves behind for generation: its inputs. Only who goes on turns them into a state."""

    inputs: Float[Tensor, "batch d_model length"]


class RecurrentState(NamedTuple):
    """The state after the tokens so far, and the coefficients of a step, computed once for the whole text."""

    x: Complex[Tensor, "batch d_model pairs"]
    form: StepForm


class StateSpaceMixer(nn.Module):
    """What S4 and S4D have in common: y = W GELU(K * u + D u) with one K for each feature, u the input.

    Subclasses give the kernel, the step form and the state after many tokens. Parameters that are complex numbers are
    stored as (real, imaginary) pairs. Re λ = -exp(log_decay) < 0, Δ = exp(log_step) step_scale.
    """

    def __init__(
        self,
        config: TransformerConfig,
        state: int,
        bidirectional: bool,
        eigenvalues: Complex[Tensor, " pairs"],
        b: Complex[Tensor, " pairs"],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        d, pairs = config.d_model, state // 2
        self.bidirectional = bidirectional
        self.log_decay = nn.Parameter((-eigenvalues.real).log().float().repeat(d, 1))
        self.frequency = nn.Parameter(eigenvalues.imag.float().repeat(d, 1))
        self.b = nn.Parameter(torch.view_as_real(b).float().repeat(d, 1, 1))
        low, high = (math.log(x) for x in STEP_RANGE)
        self.log_step = nn.Parameter(low + (high - low) * torch.rand(d, generator=generator))
        # complex normal of variance 1
        c = torch.randn(1 + bidirectional, d, pairs, 2, generator=generator) / math.sqrt(2)
        self.c = nn.Parameter(c)
        self.skip = nn.Parameter(torch.ones(d))  # D
        self.output = nn.Linear(d, d)
        self.register_buffer("step_scale", torch.tensor(1.0))

    @property
    def eigenvalues(self) -> Complex[Tensor, "d_model pairs"]:
        """λ, one of each pair, complex128; its real part is negative."""
        return as_complex(torch.stack([-self.log_decay.double().exp(), self.frequency.double()], dim=-1))

    @property
    def step(self) -> Float[Tensor, " d_model"]:
        """Δ of every feature, float64."""
        return self.log_step.double().exp() * self.step_scale.double()

    def kernel(self, length: int) -> Float[Tensor, "channels d_model length"]:
        """K_0 .. K_{length-1} of every feature, in one channel or (bidirectional) two."""
        raise NotImplementedError  # S4 and S4D each have their own

    def step_form(self) -> StepForm:
        """The recurrence of the first channel, for `run_steps`."""
        raise NotImplementedError  # S4 and S4D each have their own

    def final_state(self, form: StepForm, u: Float[Tensor, "batch d_model length"]) -> Tensor:
        """x after all of `u`, (batch, d_model, pairs), by blocks instead of token by token."""
        raise NotImplementedError  # S4 and S4D each have their own

    def set_step_scale_(self, step_scale: float) -> None:
        """Run with Δ times `step_scale` from now on, in place: 2 for signals sampled half as often as in training.

        Raises:
            ValueError: a scale that is not positive.
        """
        if not step_scale > 0:
            raise ValueError(f"step_scale must be > 0, got {step_scale}")
        self.step_scale.fill_(step_scale)

    def start(self, batch: int, form: StepForm | None = None) -> RecurrentState:
        """The state before the first token; give `form` to use the step form of an earlier text again."""
        form = self.step_form() if form is None else form
        return RecurrentState(form.b.new_zeros(batch, *form.b.shape), form)

    def recurrent_state(self, state: ReadInputs | RecurrentState) -> RecurrentState:
        """Turn what a convolution left behind into the state of the recurrence."""
        if isinstance(state, RecurrentState):
            return state
        form = self.step_form()
        return RecurrentState(self.final_state(form, state.inputs), form)

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
        state: ReadInputs | RecurrentState | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], ReadInputs | RecurrentState | None]:
        """Mix the tokens: a convolution without `state`, and with it steps that go on where the last call stopped.

        `key_padding_mask` covers the earlier tokens, if there are any, and those of `x`.

        Returns:
            (y, state); the state is None if bidirectional.

        Raises:
            ValueError: no token, another d_model, a state for a bidirectional mixer or of another batch, a mask of
                another shape or dtype.
        """
        if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != len(self.skip):
            wanted = f"(batch, length >= 1, {len(self.skip)})"
            raise ValueError(f"x must have shape {wanted}, got {tuple(x.shape)}")
        if state is not None:
            if self.bidirectional:
                raise ValueError("state needs a causal mixer: a bidirectional one reads all tokens at once")
            if len(state[0]) != len(x):
                raise ValueError(f"state must be of batch {len(x)}, as x is, got batch {len(state[0])}")
            if key_padding_mask is not None:
                if key_padding_mask.ndim != 2 or key_padding_mask.shape[1] < x.shape[1]:
                    wanted = f"({x.shape[0]}, earlier tokens + {x.shape[1]})"
                    raise ValueError(f"key_padding_mask must have shape {wanted}, got {tuple(key_padding_mask.shape)}")
                key_padding_mask = key_padding_mask[:, -x.shape[1] :]
        check_key_padding_mask(key_padding_mask, *x.shape[:2])
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has no FFT, and the state is a long sum
            u = at_least_float32(x).transpose(1, 2)
            if key_padding_mask is not None:
                u = u.masked_fill(~key_padding_mask[:, None], 0.0)
            if state is None:
                y = fft_convolution(u, *self.kernel(u.shape[-1]))
                state = None if self.bidirectional else ReadInputs(u)
            else:
                state = self.recurrent_state(state)
                y, last = run_steps(state.form, u, state.x)
                state = RecurrentState(last, state.form)
            y = F.gelu(y + self.skip[:, None] * u)
            if key_padding_mask is not None:
                y = y.masked_fill(~key_padding_mask[:, None], 0.0)
        return self.output(y.transpose(1, 2).to(x.dtype)), state


def state_space_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Λ, P, B and Δ of all mixers in `module`: they want a smaller learning rate than the rest and no weight decay."""
    names = ("log_decay", "frequency", "p", "b", "log_step")
    mixers = [mixer for mixer in module.modules() if isinstance(mixer, StateSpaceMixer)]
    return [getattr(mixer, name) for mixer in mixers for name in names if hasattr(mixer, name)]
