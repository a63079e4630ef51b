"""The models, signals and views of `three_views_explorer`, in float64.

C is chosen so that it can be seen what a model does: y is the signal one unit of the model's time ago, as well as the
state remembers it. For HiPPO-LegS it is the Legendre series at that moment: A and B make of x the coefficients of the
past u(t - s) for sqrt(2n+1) P_n(2v - 1) in v = e^{-s}. For the others it is the smallest signal of the last two units
that would leave the same state.

The recurrence is `s4.recurrence` of the dense matrices. Its kernel comes another way: from the generating function for
LegS, as a Vandermonde product for S4D-Lin, by powers for a random A. The equation in continuous time is solved by
exponentials of A, for the signal in `PIECES` level pieces.

NOTE a sample is the mean of the signal over the time that it stands for, so that a short impulse is not missed at a
lower rate.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from effnlp_lessons.architectures.hippo import (
    best_reconstruction,
    bilinear,
    hippo_legs,
    legendre_basis,
    nplr,
    random_memory,
)
from effnlp_lessons.architectures.s4 import c_to_generating, dense_dplr, kernel_by_powers, recurrence, s4_kernel
from effnlp_lessons.architectures.s4d import discretise_diagonal, s4d_kernel, s4d_start
from effnlp_lessons.architectures.state_space import fft_convolution

LENGTH = 128  # samples of the signal at the full rate
LEGS, LIN, RANDOM = KINDS = ("HiPPO-LegS", "S4D-Lin", "random stable")
SIGNALS = ("impulse", "steps", "chirp", "noise")
PIECES = 8 * LENGTH  # of the signal in continuous time
LAGS = torch.linspace(0, 2, 129, dtype=torch.float64)  # of the remembered past, in units of the model's time
WEAKEST = 0.03  # directions of a state that are weaker than this share of the strongest count as lost
READ = 64  # y is the past at this one of LAGS: one unit ago


# ------------------------------------------------------------------------ the signal, the model


def signal_at(name: str, time: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
    """The signal in continuous time, where a sample of the full rate is 1 long; its values lie in [-1, 1].

    Raises:
        ValueError: a name that is none of `SIGNALS`.
    """
    if name not in SIGNALS:
        raise ValueError(f"signal must be one of {', '.join(SIGNALS)}, got {name!r}")
    if name == "impulse":
        return ((time >= 4) & (time < 5)).astype(float)
    if name == "steps":
        return np.array([0.0, 1.0, -0.5, 0.75, 0.0])[np.searchsorted([8, 40, 56, 96], time, side="right")]
    if name == "chirp":  # from 1/64 to 1/16 of a period in a sample
        return np.sin(2 * np.pi * time * (1 / 64 + (1 / 16 - 1 / 64) * time / (2 * LENGTH)))
    generator = np.random.default_rng(3)
    periods, phases = np.arange(1, 7)[:, None], generator.uniform(0, 2 * np.pi, (6, 1))
    return np.sin(2 * np.pi * periods * time / LENGTH + phases).sum(0) / 4


@functools.cache
def pieces_of(name: str) -> Float[np.ndarray, " pieces"]:
    """The signal in `PIECES` level pieces, each of the value at its middle."""
    return signal_at(name, (np.arange(PIECES) + 0.5) * LENGTH / PIECES)


class Model(NamedTuple):
    """x' = A x + B u, y = C x, real and dense; `past`: x -> the signal at `LAGS` ago. C is one row of `past`."""

    a: Float[Tensor, "state state"]
    b: Float[Tensor, " state"]
    c: Float[Tensor, " state"]
    past: Float[Tensor, "lags state"]


@functools.cache
def make_model(kind: str, state: int) -> Model:
    """A model of one of `KINDS`. The state of S4D-Lin is the real parts of its `state` / 2 numbers, then the imaginary.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == LEGS:
        past = legendre_basis(state, torch.exp(-LAGS))
        return Model(*hippo_legs(state), past[READ], past)
    if kind == LIN:
        eigenvalues, b = s4d_start("lin", state)
        real, imaginary = torch.diag(eigenvalues.real), torch.diag(eigenvalues.imag)
        a = torch.cat([torch.cat([real, -imaginary], 1), torch.cat([imaginary, real], 1)])
        b = torch.cat([b.real, b.imag])
    else:
        a, b = random_memory(state, torch.Generator().manual_seed(0))
    between = float(LAGS[1])
    answers = kernel_by_powers(torch.linalg.matrix_exp(between * a), b, torch.eye(state, dtype=a.dtype), len(LAGS))
    past = best_reconstruction(between * answers, torch.eye(state, dtype=a.dtype), tolerance=WEAKEST).T
    return Model(a, b, past[READ], past)


def kernel_of(kind: str, state: int, step: float, length: int) -> Float[Tensor, " length"]:
    """K_0 .. K_{length-1} of the model, in the way that its A allows."""
    model, half, steps = make_model(kind, state), slice(state // 2), torch.tensor([step], dtype=torch.float64)
    if kind == LEGS:
        legs = nplr(state)
        eigenvalues, p = legs.eigenvalues[half], legs.p[half]
        a_bar, _ = bilinear(dense_dplr(eigenvalues, p), legs.b, step)
        c_tilde = c_to_generating(model.c.to(legs.v.dtype) @ legs.v, a_bar, length)[half]
        return s4_kernel(eigenvalues[None], p[None], legs.b[None, half], c_tilde[None, None], steps, length)[0, 0]
    if kind == LIN:
        eigenvalues, b = s4d_start("lin", state)
        a_bar, b_bar = discretise_diagonal(eigenvalues[None], b[None], steps, "bilinear")
        c = torch.complex(model.c[half], -model.c[state // 2 :]) / 2  # C x = 2 Re c (x' + i x'')
        return s4d_kernel(a_bar, (c * b_bar)[None], length)[0, 0]
    return kernel_by_powers(*bilinear(model.a, model.b, step), model.c, length)


# ------------------------------------------------------------------------ the views


class Views(NamedTuple):
    """What a model makes of a signal."""

    kernel: Float[np.ndarray, " samples"]
    convolution: Float[np.ndarray, " samples"]
    recurrent: Float[np.ndarray, " samples"]
    states: Float[np.ndarray, "state samples"]
    continuous: Float[np.ndarray, " pieces"]  # at the end of each piece


def solve(model: Model, width: float, pieces: Float[np.ndarray, " pieces"]) -> Float[np.ndarray, " pieces"]:
    """y of x' = A x + B u at the end of each piece of `width`, in which u is level: exact."""
    state = len(model.b)
    system = torch.zeros(state + 1, state + 1, dtype=torch.float64)
    system[:state] = width * torch.cat([model.a, model.b[:, None]], 1)
    flow = torch.linalg.matrix_exp(system)[:state].numpy()
    across, added = np.ascontiguousarray(flow[:, :state]), np.outer(pieces, flow[:, state])
    states, x = np.empty_like(added), np.zeros(state)
    for piece, more in enumerate(added):
        states[piece] = x = across @ x + more
    return states @ model.c.numpy()


@functools.lru_cache(maxsize=512)
def run_views(kind: str, state: int, step: float, signal: str, samples: int) -> Views:
    """The three views of a signal of `samples` samples, with `step` of the model's time from one to the next."""
    model, pieces = make_model(kind, state), pieces_of(signal)
    u = torch.from_numpy(pieces.reshape(samples, -1).mean(1))
    readouts = torch.cat([model.c[None], torch.eye(state, dtype=torch.float64)])  # y, and the state itself
    steps = recurrence(*bilinear(model.a, model.b, step), readouts, u).numpy()
    kernel = kernel_of(kind, state, step, samples)
    convolution = fft_convolution(u, kernel).numpy()
    return Views(kernel.numpy(), convolution, steps[0], steps[1:], solve(model, step * samples / PIECES, pieces))
