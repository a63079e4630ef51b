"""S4: a state space model for every feature, trained as a convolution and run as a recurrence (Gu et al. 2022).

"Efficiently Modeling Long Sequences with Structured State Spaces" (arXiv 2111.00396). With Ā, B̄ of `hippo.bilinear`:
    recurrent     x_k = Ā x_{k-1} + B̄ u_k,  y_k = C x_k                                            (Eq. 3)
    convolution   y = K * u,  K_i = C Āⁱ B̄                                                         (Eqs. 4, 5)
The kernel comes without powers of Ā from its generating function at the roots of unity z_k = exp(-2 pi i k / L):
    K^(z) = sum_{i<L} K_i zⁱ = C~ (I - Ā z)^-1 B̄  with  C~ = C (I - Ā^L),  then an inverse FFT       (Appendix C.3)
For A = Λ - P P* the inverse is that of a diagonal matrix and a correction of rank one (Woodbury):
    d_n = (2/Δ)(1 - z) - (1 + z) λ_n,   s(a, b) = sum_n a_n b_n / d_n
    K^ = 2 [ s(C~, B) - (1 + z) s(C~, P) s(P*, B) / (1 + (1 + z) s(P*, P)) ]
L is fixed in C~, which is what is trained. The recurrence needs C = C~ (I - Ā^L)^-1: only who generates pays for it.
Ā is diagonal plus rank one as well, so a step costs O(state) per feature.

NOTE the paper divides by 1 + z: its g = (2/Δ)(1 - z)/(1 + z) and c = 2/(1 + z) are infinite at z = -1. Ours are not.
NOTE P = Q and Re λ < 0 by construction, as in the authors' later code: then |Ā x| <= |x|, whatever is learned.
NOTE eigenvalues, P, B and C~ come in conjugate pairs, of which one is stored; sums over pairs are real.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from effnlp_lessons.architectures.hippo import bilinear, nplr
from effnlp_lessons.architectures.state_space import (
    StateSpaceMixer,
    StepForm,
    as_complex,
    with_conjugates,
)
from effnlp_lessons.transformer import TransformerConfig

BLOCK = 64  # tokens that `S4.final_state` takes at once


# --------------------------------------------------------------------------------------- the views, dense


def dense_dplr(
    eigenvalues: Complex[Tensor, "... pairs"], p: Complex[Tensor, "... pairs"]
) -> Complex[Tensor, "... state state"]:
    """A = diag(Λ) - P P*, written out for all of the state."""
    p = with_conjugates(p)
    return torch.diag_embed(with_conjugates(eigenvalues)) - p[..., :, None] * p.conj()[..., None, :]


def kernel_by_powers(a_bar: Tensor, b_bar: Tensor, c: Tensor, length: int) -> Float[Tensor, "... length"]:
    """K_i = Re C Āⁱ B̄ for i < length, one power after the other (Eq. 5): the slow truth, O(length state²)."""
    values, x = [], b_bar
    for _ in range(length):
        values.append((c * x).sum(-1).real)
        x = (a_bar @ x[..., None])[..., 0]
    return torch.stack(values, dim=-1)


def recurrence(a_bar: Tensor, b_bar: Tensor, c: Tensor, u: Float[Tensor, "... length"]) -> Float[Tensor, "... length"]:
    """y_k = Re C x_k with x_k = Ā x_{k-1} + B̄ u_k from x = 0, token by token (Eq. 3), dense."""
    x, outputs = torch.zeros_like(b_bar), []
    for k in range(u.shape[-1]):
        x = (a_bar @ x[..., None])[..., 0] + b_bar * u[..., k, None]
        outputs.append((c * x).sum(-1).real)
    return torch.stack(outputs, dim=-1)


# -------------------------------------------------------------------------------------- C and C~, the kernel


def c_to_generating(c: Tensor, a_bar: Tensor, length: int) -> Tensor:
    """C~ = C (I - Ā^L), which the generating function of a kernel of L = `length` values needs. C is not conjugated."""
    return c - (c[..., None, :] @ torch.linalg.matrix_power(a_bar, length))[..., 0, :]


def c_from_generating(c_tilde: Tensor, a_bar: Tensor, length: int) -> Tensor:
    """C = C~ (I - Ā^L)^-1, which powers and the recurrence need; `length` is the one that C~ was made for."""
    identity = torch.eye(a_bar.shape[-1], dtype=a_bar.dtype, device=a_bar.device)
    system = identity - torch.linalg.matrix_power(a_bar, length)
    return torch.linalg.solve(system, c_tilde[..., None, :], left=False)[..., 0, :]


def s4_kernel(
    eigenvalues: Complex[Tensor, "features pairs"],
    p: Complex[Tensor, "features pairs"],
    b: Complex[Tensor, "features pairs"],
    c_tilde: Complex[Tensor, "channels features pairs"],
    step: Float[Tensor, " features"],
    length: int,
) -> Float[Tensor, "channels features length"]:
    """K_0 .. K_{length-1} of x' = (Λ - P P*) x + B u by the generating function, O(length state) and an FFT.

    The module's equations times e^{it/2}, for z = e^{-it}: with S = 2 sin(t/2) and Q = cos(t/2), of every d_n
    Δ/2 e^{it/2} d_n = iS - QΔλ_n. Numerators w_n = a_n b_n and d_n of a conjugate pair add up to
        w/d + w'/d' = 2 (iS Re w - QΔ Re(w λ'_n)) / (Q²|Δλ_n|² - S² - 2iSQ Re Δλ_n)
    so that one table of reciprocals, for half of the state and half of the frequencies, serves all four sums s(a, b).

    Args:
        c_tilde: C (I - Ā^length) in one or several channels.

    Raises:
        ValueError: shapes that do not fit, or a length < 1.
    """
    features, pairs = eigenvalues.shape
    fit = p.shape == b.shape == (features, pairs) and c_tilde.shape[1:] == (features, pairs)
    if not fit or c_tilde.ndim != 3 or step.shape != (features,):
        shapes = ", ".join(str(tuple(x.shape)) for x in (eigenvalues, p, b, c_tilde, step))
        raise ValueError(f"eigenvalues, p, b, c_tilde, step do not fit together: {shapes}")
    if length < 1:
        raise ValueError(f"length must be >= 1, got {length}")
    half_angle = torch.arange(length // 2 + 1, dtype=torch.float64, device=step.device) * (math.pi / length)
    s, q = (2 * half_angle.sin()).to(step.dtype), half_angle.cos().to(step.dtype)
    scaled = step[:, None] * eigenvalues  # Δλ
    real = (scaled.real**2 + scaled.imag**2)[..., None] * q**2 - s**2
    imaginary = -2 * scaled.real[..., None] * (s * q)
    table = as_complex(torch.stack([real, imaginary], dim=-1)).reciprocal()  # (features, pairs, frequencies)

    # w of s(C~, B), s(C~, P), s(P*, B), s(P*, P), and of each Re w and Re(w Δλ')
    channels = len(c_tilde)
    w = torch.cat([c_tilde * b, c_tilde * p, (p.conj() * b)[None], (p.conj() * p)[None]]).transpose(0, 1)
    numerators = torch.cat([w.real, (w * scaled[:, None].conj()).real], dim=1)
    sums = numerators @ torch.view_as_real(table).flatten(-2)  # a real product: the numerators are real
    sums = torch.view_as_complex(sums.unflatten(-1, (-1, 2)).contiguous())
    by_re, by_product = sums.chunk(2, dim=1)
    sums = (2 * (1j * s * by_re - q * by_product)).transpose(0, 1)

    with_b, with_p, p_b, p_p = sums.split([channels, channels, 1, 1])
    correction = step[:, None] * q
    spectrum = with_b - correction * with_p * p_b / (1 + correction * p_p)
    turn = torch.exp(1j * half_angle).to(spectrum.dtype)  # takes e^{it/2} out again
    return torch.fft.irfft(step[:, None] * turn * spectrum, n=length)


# --------------------------------------------------------------------------------------------- the step form


def dplr_step_form(eigenvalues: Tensor, p: Tensor, b: Tensor, c: Tensor, step: Float[Tensor, " features"]) -> StepForm:
    """The bilinear rule for A = Λ - P P* without a matrix: Ā is diagonal plus rank one, too. `c` is C, not C~.

    With E = (2 - ΔΛ)^-1 and r = 1 + Δ P* E P, by Woodbury: Ā = (2 + ΔΛ) E - 4Δ (E P)(P* E) / r,
    B̄ = 2Δ (E B - Δ (E P)(P* E B) / r).
    """
    step = step[:, None]
    inverse = 1 / (2 - step * eigenvalues)
    column = inverse * p
    r = 1 + 2 * step * (p.conj() * column).real.sum(-1, keepdim=True)
    share = 2 * (p.conj() * inverse * b).real.sum(-1, keepdim=True) / r  # P* E B / r
    b_bar = 2 * step * (inverse * b - step * column * share)
    return StepForm((2 + step * eigenvalues) * inverse, column, 4 * step / r * p.conj() * inverse, b_bar, c)


# ------------------------------------------------------------------------------------------- the token mixer


class S4(StateSpaceMixer):
    """S4 as a token mixer: causal, or `bidirectional` for an encoder. `c` holds C~, made for `kernel_length` tokens.

    Shorter texts use the start of the kernel, and longer ones are refused: see `set_kernel_length_`. Generation with
    a state has no such bound. `kernel_length` and `step_scale` are saved with the weights, for C~ depends on both.

    Args:
        kernel_length: tokens; None for the config's max_length.
        state: N, even; half of it is stored.
        seed: of C and Δ. All features start with the same Λ, P and B.

    Raises:
        ValueError: a state that is not even, a kernel length that is no integer >= 1.
    """

    def __init__(
        self,
        config: TransformerConfig,
        kernel_length: int | None = None,
        state: int = 64,
        bidirectional: bool = False,
        seed: int = 0,
    ) -> None:
        start = nplr(state)
        half = slice(state // 2)
        generator = torch.Generator().manual_seed(seed)
        super().__init__(config, state, bidirectional, start.eigenvalues[half], start.b[half], generator)
        self.p = nn.Parameter(torch.view_as_real(start.p[half]).float().repeat(config.d_model, 1, 1))
        length = config.max_length if kernel_length is None else kernel_length
        _check_kernel_length(length)
        self.register_buffer("kernel_length", torch.tensor(length))
        with torch.no_grad():  # what was drawn is C
            a_bar = self._dense()
            c = c_to_generating(with_conjugates(as_complex(self.c.double())), a_bar, length)
            self.c.copy_(torch.view_as_real(c[..., : state // 2]))

    def _dense(self) -> Complex[Tensor, "d_model state state"]:
        """Ā in complex128."""
        p, b = as_complex(self.p.double()), as_complex(self.b.double())
        return bilinear(dense_dplr(self.eigenvalues, p), with_conjugates(b), self.step)[0]

    def recovered_c(self) -> Complex[Tensor, "channels d_model pairs"]:
        """C of powers and recurrence, from the C~ that is trained; in complex128, O(state³ log kernel_length)."""
        c_tilde = with_conjugates(as_complex(self.c.double()))
        c = c_from_generating(c_tilde, self._dense(), int(self.kernel_length))
        return c[..., : self.c.shape[-2]]

    @torch.no_grad()
    def _change_(self, kernel_length: int, step_scale: float) -> None:
        c = with_conjugates(self.recovered_c())
        self.kernel_length.fill_(kernel_length)
        super().set_step_scale_(step_scale)
        c_tilde = c_to_generating(c, self._dense(), kernel_length)
        self.c.copy_(torch.view_as_real(c_tilde[..., : self.c.shape[-2]]))

    def set_kernel_length_(self, kernel_length: int) -> None:
        """Make C~ fit another length in place; the model stays the same.

        Raises:
            ValueError: no integer >= 1.
        """
        _check_kernel_length(kernel_length)
        self._change_(kernel_length, float(self.step_scale))

    def set_step_scale_(self, step_scale: float) -> None:
        """As for every mixer; C stays, and C~ is made anew, for it depends on the step."""
        if not step_scale > 0:
            raise ValueError(f"step_scale must be > 0, got {step_scale}")
        self._change_(int(self.kernel_length), step_scale)

    def kernel(self, length: int) -> Float[Tensor, "channels d_model length"]:
        """The first `length` values of the kernel; the cost is that of all of them.

        Raises:
            ValueError: more than `kernel_length`.
        """
        full = int(self.kernel_length)
        if length > full:
            raise ValueError(f"{length} tokens are more than the kernel_length of {full}; see set_kernel_length_")
        p, b, c_tilde = (as_complex(x) for x in (self.p, self.b, self.c))
        eigenvalues, step = self.eigenvalues.to(c_tilde.dtype), self.step.to(c_tilde.real.dtype)
        return s4_kernel(eigenvalues, p, b, c_tilde, step, full)[..., :length]

    def step_form(self) -> StepForm:
        p, b = as_complex(self.p.double()), as_complex(self.b.double())
        form = dplr_step_form(self.eigenvalues, p, b, self.recovered_c()[0], self.step)
        return StepForm(*(x.to(as_complex(self.c).dtype) for x in form))

    def final_state(self, form: StepForm, u: Float[Tensor, "batch d_model length"]) -> Tensor:
        # columns [Ā^(T-1) B̄, .., Ā B̄, B̄] by doubling; at its end `a` is Ā^T
        a, columns = form.dense(), with_conjugates(form.b)[..., None]
        while columns.shape[-1] < min(u.shape[-1], BLOCK):
            columns, a = torch.cat([a @ columns, columns], dim=-1), a @ a
        width = columns.shape[-1]
        blocks = F.pad(u, (-u.shape[-1] % width, 0)).unflatten(-1, (-1, width))  # zeros first: the state is still 0
        added = torch.einsum("hnt,bhkt->kbhn", columns, blocks.to(columns.dtype))
        x = torch.zeros_like(added[0])
        for block in added:
            x = torch.einsum("hmn,bhn->bhm", a, x) + block
        return x[..., : form.b.shape[-1]]


def _check_kernel_length(length: int) -> None:
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"kernel_length must be an integer >= 1 (the config's max_length if None), got {length!r}")
