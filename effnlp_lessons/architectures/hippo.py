"""HiPPO: a linear recurrent memory whose state holds the past as Legendre coefficients (Gu et al. 2020).

"HiPPO: Recurrent Memory with Optimal Polynomial Projections" (arXiv 2008.07669), and the form that S4 gives its
matrix ("Efficiently Modeling Long Sequences with Structured State Spaces", Gu et al. 2022, arXiv 2111.00396).
    x'(t) = A x(t) + B u(t),  y(t) = C x(t) + D u(t)                                              (S4, Eq. 1)
    LegS: A_nk = -sqrt(2n+1) sqrt(2k+1) for n > k, -(n+1) for n = k, else 0;  B_n = sqrt(2n+1)     (S4, Eq. 2)
HiPPO divides both by t. Then x_n is the coefficient of the past u(0..t), all of it equally weighed, for the normed
Legendre polynomial sqrt(2n+1) P_n(2s/t - 1). S4 leaves t out, and the memory fades: e^{tA} B are the functions
sqrt(2n+1) P_n(2e^{-t} - 1) e^{-t}, the same polynomials on an axis that shrinks the past.
The eigenvectors of A are useless as numbers (condition far beyond 1e16 at 64 of them), but A is normal plus rank one:
    A = V (Λ - P P*) V*,  V unitary,  P_n = sqrt(n + 1/2) before V*                 (S4, Theorem 1 and Appendix C)
    x_k = Ā x_{k-1} + B̄ u_k,  Ā = (I - Δ/2 A)^-1 (I + Δ/2 A),  B̄ = (I - Δ/2 A)^-1 Δ B           (S4, Eq. 3)

NOTE A + P Pᵀ + I/2 is skew-symmetric, so V comes from a Hermitian matrix by `eigh`: unitary to the last digit and with
exactly imaginary eigenvalues. `eig` of A, or even of the same normal matrix, promises neither.
NOTE eigenvalues come in conjugate pairs. Of each pair the first half of what `nplr` returns holds the one with a
positive imaginary part, and the second half its exact conjugate. S4 stores the first half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def check_state(state: int, even: bool = False) -> None:
    """Raise a ValueError unless `state` is an integer >= 1, or an even one >= 2."""
    smallest = 2 if even else 1
    if not isinstance(state, int) or isinstance(state, bool) or state < smallest or (even and state % 2):
        raise ValueError(f"state must be an {'even ' if even else ''}integer >= {smallest}, got {state!r}")


def hippo_legs(state: int) -> tuple[Float[Tensor, "state state"], Float[Tensor, " state"]]:
    """The matrices (A, B) of LegS (S4, Eq. 2), float64.

    Raises:
        ValueError: `state` is no integer >= 1.
    """
    check_state(state)
    n = torch.arange(state, dtype=torch.float64)
    b = (2 * n + 1).sqrt()
    a = -(torch.outer(b, b).tril(-1) + torch.diag(n + 1))
    return a, b


# ------------------------------------------------------------------------------ normal plus low rank


class NPLR(NamedTuple):
    """A = V (diag(eigenvalues) - p p*) V*, complex128; b is B in the same basis."""

    eigenvalues: Complex[Tensor, " state"]  # Λ: -1/2 + i w
    p: Complex[Tensor, " state"]  # V* P
    b: Complex[Tensor, " state"]  # V* B
    v: Complex[Tensor, "state state"]  # unitary


def nplr(state: int) -> NPLR:
    """LegS as a normal matrix plus one of rank one, in the basis where the normal one is diagonal (S4, Theorem 1).

    Entry n + state/2 of everything is the conjugate of entry n; the first half is sorted by rising frequency w > 0.

    Raises:
        ValueError: `state` is no even integer >= 2.
    """
    check_state(state, even=True)
    a, b = hippo_legs(state)
    p = (torch.arange(state, dtype=torch.float64) + 0.5).sqrt()
    # S = A + P Pᵀ + I/2 = -Sᵀ, so -iS is Hermitian: S v = i w v
    skew = a + torch.outer(p, p) + torch.eye(state, dtype=torch.float64) / 2
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    half = slice(state // 2, None)  # ascending: the second half is positive
    v = torch.cat([vectors[:, half], vectors[:, half].conj()], dim=1)
    w = torch.cat([frequencies[half], -frequencies[half]])
    to_basis = v.conj().T
    return NPLR(torch.complex(torch.full_like(w, -0.5), w), to_basis @ p.to(v.dtype), to_basis @ b.to(v.dtype), v)


# ------------------------------------------------------------------------- continuous time, discrete time


def bilinear(
    a: Tensor, b: Tensor, step: float | Tensor
) -> tuple[Float[Tensor, "... state state"], Float[Tensor, "... state"]]:
    """(Ā, B̄) of the recurrence x_k = Ā x_{k-1} + B̄ u_k by the bilinear rule (S4, Eq. 3), dense, O(state³).

    Args:
        a, b: (..., state, state) and (..., state), real or complex.
        step: Δ in the unit of time of `a`, one number or one for each leading index.

    Raises:
        ValueError: matrices that do not fit, or a step that is not positive.
    """
    if a.ndim < 2 or a.shape[-1] != a.shape[-2] or b.shape[-1:] != a.shape[-1:]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"a and b must have shapes (..., state, state) and (..., state), got {shapes}")
    step = torch.as_tensor(step, dtype=a.real.dtype, device=a.device)
    if not bool((step > 0).all()):
        raise ValueError(f"step must be > 0, got {step.tolist()}")
    step = step[..., None, None]
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    right = torch.cat([identity + step / 2 * a, step * b[..., None].expand_as(a[..., :1])], dim=-1)
    both = torch.linalg.solve(identity - step / 2 * a, right)
    return both[..., :-1], both[..., -1]


def integrate(
    a: Float[Tensor, "state state"],
    b: Float[Tensor, " state"],
    signal: Callable[[float], float],
    until: float,
    steps: int,
) -> Float[Tensor, "steps state"]:
    """States of x' = A x + B u(t) from x(0) = 0, after each of `steps` steps up to time `until` (Runge-Kutta 4).

    The continuous view, as a reference: slow, with an error of order (until / steps)⁴.

    Raises:
        ValueError: a time or a number of steps that is not positive.
    """
    if until <= 0 or steps < 1:
        raise ValueError(f"until must be > 0 and steps >= 1, got {until} and {steps}")
    h, x, states = until / steps, torch.zeros_like(b), []
    for k in range(steps):
        start, middle, end = (signal(k * h + part * h) for part in (0.0, 0.5, 1.0))
        k1 = a @ x + b * start
        k2 = a @ (x + h / 2 * k1) + b * middle
        k3 = a @ (x + h / 2 * k2) + b * middle
        k4 = a @ (x + h * k3) + b * end
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(x)
    return torch.stack(states)


# ------------------------------------------------------------------------------------ what the state remembers


def legendre_basis(state: int, points: Float[Tensor, " points"]) -> Float[Tensor, "points state"]:
    """sqrt(2n+1) P_n(2s - 1) for n < state at `points` s in [0, 1]: orthonormal on [0, 1].

    Raises:
        ValueError: `state` is no integer >= 1.
    """
    check_state(state)
    x = 2 * points - 1
    polynomials = [torch.ones_like(x), x]
    for n in range(1, state - 1):  # (n+1) P_{n+1} = (2n+1) x P_n - n P_{n-1}
        polynomials.append(((2 * n + 1) * x * polynomials[n] - n * polynomials[n - 1]) / (n + 1))
    n = torch.arange(state, dtype=points.dtype, device=points.device)
    return torch.stack(polynomials[:state], dim=-1) * (2 * n + 1).sqrt()


def memory_matrix(
    a: Float[Tensor, "state state"], b: Float[Tensor, " state"], length: int
) -> Float[Tensor, "state length"]:
    """M of x = M u, the state after all of a signal u of `length` samples, where time is divided out (HiPPO, Eq. 3).

    x' = (A x + B u) / t by the bilinear rule: sample k = 1 .. length has the step 1/k. For LegS, x are the Legendre
    coefficients of the whole signal; for another A, whatever that A keeps. Time O(length state³).

    Raises:
        ValueError: a length that is no integer >= 1, and what `bilinear` raises.
    """
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length must be an integer >= 1, got {length!r}")
    columns = a.new_zeros(len(b), length)
    for k in range(1, length + 1):
        a_bar, b_bar = bilinear(a, b, 1.0 / k)
        columns[:, : k - 1] = a_bar @ columns[:, : k - 1]
        columns[:, k - 1] = b_bar
    return columns


def legendre_reconstruction(x: Float[Tensor, "... state"], length: int) -> Float[Tensor, "... length"]:
    """The signal that a LegS state remembers: sum_n x_n sqrt(2n+1) P_n(2s - 1) at the middles of `length` samples."""
    points = (torch.arange(length, dtype=x.dtype, device=x.device) + 0.5) / length
    return x @ legendre_basis(x.shape[-1], points).T


def best_reconstruction(
    memory: Float[Tensor, "state length"], x: Float[Tensor, "... state"], tolerance: float = 1e-6
) -> Float[Tensor, "... length"]:
    """The smallest signal that would leave the state `x` = M u: what any linear memory can be read out to.

    Directions of the state that are weaker than `tolerance` times the strongest are taken to be lost.
    """
    return x @ torch.linalg.pinv(memory, rtol=tolerance).T


def random_memory(state: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(A, B) to compare LegS with: normal entries, A moved left until all eigenvalues have real parts <= -1/2."""
    check_state(state)
    a = torch.randn(state, state, generator=generator, dtype=torch.float64)
    b = torch.randn(state, generator=generator, dtype=torch.float64)
    rightmost = torch.linalg.eigvals(a).real.max()
    return a - (rightmost + 0.5) * torch.eye(state, dtype=torch.float64), b
