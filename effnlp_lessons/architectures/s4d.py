"""S4D: S4 without the correction of rank one, a diagonal state matrix (Gu, Gupta, Goel and Ré 2022).

"On the Parameterization and Initialization of Diagonal State Space Models" (arXiv 2206.11893). With A = Λ diagonal, a
power of Ā is a power of numbers, and the kernel needs no generating function:
    K_l = 2 Re sum_n C_n B̄_n Ā_nˡ
    zero-order hold  Ā_n = exp(Δλ_n),  B̄_n = (Ā_n - 1) / λ_n B_n    (u is constant during a step)
    bilinear         Ā_n = (2 + Δλ_n) / (2 - Δλ_n),  B̄_n = 2Δ B_n / (2 - Δλ_n)
Three starts for λ_n, n < N/2:
    legs  the eigenvalues of the normal part of LegS (`hippo.nplr`), with its B / 2
    lin   -1/2 + i pi n
    inv   -1/2 + i (N/pi) (N/(2n+1) - 1)
Without its term of rank one and with half of its B, LegS answers smooth inputs as before when N is large: the states
after a unit step differ by 1.3 % at N = 16 and by 0.2 % at N = 64 (x_0). The impulse responses do not come nearer: the
diagonal ones swing about the smooth ones of LegS.

NOTE the sum is a Vandermonde product. Ā^(iT + j) = (Ā^T)ⁱ Ā^j, so two small tables and a matrix product give all of
K, and no tensor has state x length entries.
NOTE C is trained as it is, for a kernel of any length: there is no C~ here. B is trained too; only C_n B_n matters.
NOTE for lin, λ_0 is real. It counts twice, as every pair does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from effnlp_lessons.architectures.hippo import check_state, nplr
from effnlp_lessons.architectures.state_space import StateSpaceMixer, StepForm, as_complex
from effnlp_lessons.transformer import TransformerConfig

STARTS = ("legs", "lin", "inv")
DISCRETISATIONS = ("zoh", "bilinear")


def s4d_start(start: str, state: int) -> tuple[Complex[Tensor, " pairs"], Complex[Tensor, " pairs"]]:
    """(λ, B) of the start `legs`, `lin` or `inv`, one of each conjugate pair, complex128.

    Raises:
        ValueError: another name, or a state that is no even integer >= 2.
    """
    check_state(state, even=True)
    if start not in STARTS:
        raise ValueError(f"start must be one of {STARTS}, got {start!r}")
    if start == "legs":
        legs = nplr(state)
        return legs.eigenvalues[: state // 2], legs.b[: state // 2] / 2
    n = torch.arange(state // 2, dtype=torch.float64)
    w = math.pi * n if start == "lin" else state / math.pi * (state / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(w, -0.5), w), torch.ones_like(w).to(torch.complex128)


def discretise_diagonal(
    eigenvalues: Complex[Tensor, "*features pairs"],
    b: Complex[Tensor, "*features pairs"],
    step: Float[Tensor, "*features"],
    discretisation: str = "zoh",
) -> tuple[Complex[Tensor, "*features pairs"], Complex[Tensor, "*features pairs"]]:
    """(Ā, B̄) of a diagonal system by zero-order hold (`zoh`) or the bilinear rule.

    Raises:
        ValueError: another discretisation.
    """
    step = step[..., None]
    scaled = step * eigenvalues
    if discretisation == "zoh":  # expm1: the difference exp(Δλ) - 1 has lost its digits when Δλ is small
        return scaled.exp(), step * b * torch.expm1(scaled) / scaled
    if discretisation == "bilinear":
        return (2 + scaled) / (2 - scaled), 2 * step * b / (2 - scaled)
    raise ValueError(f"discretisation must be one of {DISCRETISATIONS}, got {discretisation!r}")


def powers(a_bar: Complex[Tensor, "... pairs"], count: int) -> Complex[Tensor, "... pairs count"]:
    """Ā⁰ .. Ā^(count-1) by doubling: log2(count) products, each as exact as a multiplication."""
    table, factor = torch.ones_like(a_bar)[..., None], a_bar[..., None]
    while table.shape[-1] < count:
        table, factor = torch.cat([table, table * factor], dim=-1), factor * factor
    return table[..., :count]


def _blocks(length: int) -> int:
    """A power of two near sqrt(length), the width of a block."""
    return 1 << math.ceil(math.log2(max(length, 1)) / 2)


def s4d_kernel(
    a_bar: Complex[Tensor, "features pairs"],
    weights: Complex[Tensor, "channels features pairs"],
    length: int,
) -> Float[Tensor, "channels features length"]:
    """K_l = 2 Re sum_n weights_n Ā_nˡ for l < length, with weights C B̄: O(length state) time, no such table.

    The result has the precision of `weights`. Give Ā in complex128: an error in it grows with the lag.

    Raises:
        ValueError: a length < 1.
    """
    if length < 1:
        raise ValueError(f"length must be >= 1, got {length}")
    width = _blocks(length)
    inside = powers(a_bar, width)  # (features, pairs, width)
    outside = powers(inside[..., -1] * a_bar, -(-length // width))  # of Ā^width
    left = 2 * weights[..., None] * outside  # (channels, features, pairs, blocks)
    # Re(left inside) = Re left Re inside - Im left Im inside: one real product
    left = torch.cat([left.real, -left.imag], dim=-2).transpose(-2, -1)
    left, inside = left.to(weights.real.dtype), inside.to(weights.dtype)
    return (left @ torch.cat([inside.real, inside.imag], dim=-2)).flatten(-2)[..., :length]


class S4D(StateSpaceMixer):
    """S4D as a token mixer: causal, or `bidirectional` for an encoder. Texts may have any length.

    Args:
        state: N, even; half of it is stored.
        start: `legs`, `lin` or `inv`.
        discretisation: `zoh` or `bilinear`.
        seed: of C and Δ. All features start with the same Λ and B.

    Raises:
        ValueError: a state that is not even, another start or discretisation.
    """

    def __init__(
        self,
        config: TransformerConfig,
        state: int = 64,
        bidirectional: bool = False,
        start: str = "legs",
        discretisation: str = "zoh",
        seed: int = 0,
    ) -> None:
        if discretisation not in DISCRETISATIONS:
            raise ValueError(f"discretisation must be one of {DISCRETISATIONS}, got {discretisation!r}")
        eigenvalues, b = s4d_start(start, state)
        super().__init__(config, state, bidirectional, eigenvalues, b, torch.Generator().manual_seed(seed))
        self.discretisation = discretisation

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """(Ā, B̄, C) in complex128; C of every channel."""
        b, c = as_complex(self.b.double()), as_complex(self.c.double())
        return *discretise_diagonal(self.eigenvalues, b, self.step, self.discretisation), c

    def kernel(self, length: int) -> Float[Tensor, "channels d_model length"]:
        a_bar, b_bar, c = self._discrete()
        return s4d_kernel(a_bar, (c * b_bar).to(as_complex(self.c).dtype), length)

    def step_form(self) -> StepForm:
        a_bar, b_bar, c = self._discrete()
        dtype = as_complex(self.c).dtype
        return StepForm(a_bar.to(dtype), None, None, b_bar.to(dtype), c[0].to(dtype))

    def final_state(self, form: StepForm, u: Float[Tensor, "batch d_model length"]) -> Tensor:
        # x = sum_j Ā^j B̄ u_{L-1-j}: newest first, in blocks as the kernel
        width = _blocks(u.shape[-1])
        newest_first = F.pad(u.flip(-1), (0, -u.shape[-1] % width)).unflatten(-1, (-1, width))
        inside = powers(form.diagonal, width)
        outside = powers(inside[..., -1] * form.diagonal, newest_first.shape[2])
        sums = torch.einsum("hnt,bhkt->bhnk", inside, newest_first.to(inside.dtype))
        return form.b * torch.einsum("bhnk,hnk->bhn", sums, outside)
