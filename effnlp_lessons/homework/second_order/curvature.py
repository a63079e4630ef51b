"""Exercise 2 of notebook 05, "find the bug": the saliencies of Optimal Brain Damage for one hidden layer.

LeCun, Denker and Solla (1990): s = h w^2 / 2, with h from one backward pass of second derivatives. NOTE the printed
formula for hidden units has a minus before f''(a) dE/dx; calculus wants a plus, and so does the formula for outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def obd_saliency(
    w1: Float[Tensor, "hidden inputs"],
    w2: Float[Tensor, "outputs hidden"],
    x: Float[Tensor, "patterns inputs"],
    d: Float[Tensor, "patterns outputs"],
) -> tuple[Float[Tensor, "hidden inputs"], Float[Tensor, "outputs hidden"]]:
    """h w^2 / 2 of both weights, h = d2E / dw2, for E = the mean over patterns of sum (d - out)^2.

    The net is hidden = tanh(w1 x), out = tanh(w2 hidden).
    """
    return _saliency(_curvatures(w1, w2, x, d), w1, w2)


@dataclass
class _Pass:
    """One pass through the net: what enters a layer, and first and second derivatives at what leaves it."""

    x: Tensor
    hidden: Tensor
    a_hidden: Tensor
    first_in: Tensor  # dE/da of the hidden units
    first_out: Tensor
    second_in: Tensor  # d2E/da2 of the hidden units
    second_out: Tensor


def _curvatures(
    w1: Tensor,
    w2: Tensor,
    x: Tensor,
    d: Tensor,
    *,
    sign: float = 1.0,
    sign_out: float = 1.0,
    bend: float = 1.0,
    bend_out: float = 1.0,
    scale: float = 2.0,
    squared: bool = True,
    slope_squared: bool = True,
) -> _Pass:
    """The recursion, with the usual slips: another sign or none for the f'' terms, factors that are not squared."""
    a_hidden = x @ w1.T
    hidden = torch.tanh(a_hidden)
    out = torch.tanh(hidden @ w2.T)
    slope, slope_out = 1 - hidden**2, 1 - out**2  # f' of tanh
    curve, curve_out = -2 * hidden * slope, -2 * out * slope_out  # f'' of tanh
    first_out = -scale * (d - out) * slope_out
    second_out = scale * slope_out**2 - sign_out * bend_out * scale * (d - out) * curve_out
    to_hidden = first_out @ w2  # dE/dx of the hidden units
    weights = w2**2 if squared else w2
    second_in = (slope**2 if slope_squared else slope) * (second_out @ weights) + sign * bend * curve * to_hidden
    return _Pass(x, hidden, a_hidden, to_hidden * slope, first_out, second_in, second_out)


def _by_pattern(run: _Pass) -> tuple[Tensor, Tensor]:
    """h of every pattern (patterns, d_out, d_in), for both weights: d2E/da2 times the square of what enters."""
    return (
        torch.einsum("ph,pi->phi", run.second_in, run.x**2),
        torch.einsum("po,ph->poh", run.second_out, run.hidden**2),
    )


def _saliency(
    run: _Pass,
    w1: Tensor,
    w2: Tensor,
    h: Callable[[_Pass], tuple[Tensor, Tensor]] = lambda run: tuple(part.mean(0) for part in _by_pattern(run)),
    of_weight: Callable[[Tensor, Tensor], Tensor] = lambda h, w: h * w**2 / 2,
) -> tuple[Tensor, Tensor]:
    return tuple(of_weight(part, w) for part, w in zip(h(run), (w1, w2), strict=True))


def _slip(**changes: object) -> Answer:
    return lambda w1, w2, x, d: _saliency(_curvatures(w1, w2, x, d, **changes), w1, w2)


def _exchange(**steps: Callable) -> Answer:
    """The answer with another h of the pass, or another saliency of (h, w)."""
    return lambda w1, w2, x, d: _saliency(_curvatures(w1, w2, x, d), w1, w2, **steps)


def _gradients(run: _Pass) -> tuple[Tensor, Tensor]:
    """dE/dw of every pattern."""
    return torch.einsum("ph,pi->phi", run.first_in, run.x), torch.einsum("po,ph->poh", run.first_out, run.hidden)


def _before_activation(run: _Pass) -> tuple[Tensor, Tensor]:
    return _by_pattern(run)[0].mean(0), torch.einsum("po,ph->oh", run.second_out, run.a_hidden**2) / len(run.x)


def _not_squared(run: _Pass) -> tuple[Tensor, Tensor]:
    return (run.second_in.T @ run.x) / len(run.x), (run.second_out.T @ run.hidden) / len(run.x)


def _means_multiplied(run: _Pass) -> tuple[Tensor, Tensor]:
    pairs = (run.second_in, run.x), (run.second_out, run.hidden)
    return tuple(torch.outer(second.mean(0), (entering**2).mean(0)) for second, entering in pairs)


def _draw(hidden: tuple[int, int], patterns: tuple[int, int]) -> Callable[[Generator], tuple]:
    """A net with random weights, far from any minimum, and random patterns."""

    def draw(generator: Generator) -> tuple:
        inputs, units, outputs = whole_number(2, 4, generator), whole_number(*hidden, generator), 3
        count = whole_number(*patterns, generator)
        shapes = (units, inputs), (outputs, units), (count, inputs), (count, outputs)
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

    return draw


def _by_hand(generator: Generator) -> tuple:
    rows = [[0.5]], [[1.0]], [[1.0]], [[1.0]]
    return tuple(torch.tensor(row, dtype=torch.float64) for row in rows)


OBD_SALIENCY = Exercise(
    id="second_order.obd_saliency",
    title="find the bug: saliencies of Optimal Brain Damage",
    minutes=25,
    difficulty=3,
    reference=obd_saliency,
    properties=(
        Property("by hand: one unit after another, one pattern", _by_hand, times=1),
        Property("one hidden unit", _draw((1, 1), (3, 5)), times=1),
        Property("a hidden layer, one pattern", _draw((2, 4), (1, 1)), times=1),
        Property("a hidden layer, several patterns", _draw((2, 5), (4, 7)), times=2),
    ),
    mistakes=(
        Mistake(
            "The minus sign of the printed formula",
            "d2E/da2 of a hidden unit ends in + f''(a) dE/dx: the derivative of f'(a) dE/dx by a is f''(a) dE/dx + "
            "f'(a) times the rest. A minus stands in print, and is wrong: the formula for the outputs has the same "
            "plus, hidden in dE/dx = -2 (d - x).",
            _slip(sign=-1.0),
        ),
        Mistake(
            "The f'' term of the hidden units is left out",
            "Without it h is never negative, which is often wanted (Levenberg-Marquardt). Asked is the second "
            "derivative itself.",
            _slip(bend=0.0),
        ),
        Mistake(
            "Both f'' terms are left out",
            "Without them h is never negative, which is often wanted (Levenberg-Marquardt). Asked is the second "
            "derivative itself.",
            _slip(bend=0.0, bend_out=0.0),
        ),
        Mistake(
            "The outputs have the wrong sign",
            "There the minus is right: d2E/da2 = 2 f'(a)^2 - 2 (d - x) f''(a).",
            _slip(sign_out=-1.0),
        ),
        Mistake(
            "Both signs are wrong",
            "The outputs have 2 f'^2 - 2 (d - x) f''; hidden units have a plus before f'' dE/dx.",
            _slip(sign=-1.0, sign_out=-1.0),
        ),
        Mistake(
            "The gradient is squared",
            "That is the Fisher information, another method. It equals the curvature only on average, where the net "
            "is right and the loss is a log-probability. OBD takes second derivatives.",
            _exchange(h=lambda run: tuple((part**2).mean(0) for part in _gradients(run))),
        ),
        Mistake(
            "The mean gradient is squared",
            "It is 0 at a minimum, where OBD is used. OBD takes second derivatives.",
            _exchange(h=lambda run: tuple(part.mean(0) ** 2 for part in _gradients(run))),
        ),
        Mistake(
            "The factor 1/2 is forgotten",
            "E changes by h du^2 / 2, the second term of Taylor's series.",
            _exchange(of_weight=lambda h, w: h * w**2),
        ),
        Mistake(
            "The weight is left out",
            "h alone says how curved the error is. Deleting a weight is a step of the length w: h w^2 / 2.",
            _exchange(of_weight=lambda h, w: h),
        ),
        Mistake(
            "The weight is not squared",
            "The step has the length w, and the error grows with its square: h w^2 / 2.",
            _exchange(of_weight=lambda h, w: h * w.abs() / 2),
        ),
        Mistake(
            "What enters the layer is taken before the activation",
            "w_ij is multiplied by x_j = f(a_j), the output of the unit below. Square that, and not a_j.",
            _exchange(h=_before_activation),
        ),
        Mistake(
            "What enters the layer is not squared",
            "a_i depends on w_ij by the factor x_j, and the second derivative has it twice.",
            _exchange(h=_not_squared),
        ),
        Mistake(
            "The weights above are not squared",
            "On the way down, a second derivative passes every weight twice: the sum over l of w_li^2 d2E/da_l^2.",
            _slip(squared=False),
        ),
        Mistake(
            "f' is not squared at the hidden units",
            "On the way down, a second derivative passes the activation twice: f'(a)^2.",
            _slip(slope_squared=False),
        ),
        Mistake(
            "The patterns are added",
            "E is the mean over the patterns, and so is h.",
            _exchange(h=lambda run: tuple(part.sum(0) for part in _by_pattern(run))),
        ),
        Mistake(
            "Two means are multiplied",
            "Multiply d2E/da2 by x_j^2 in every pattern, and then take the mean.",
            _exchange(h=_means_multiplied),
        ),
        Mistake(
            "The error has a factor 1/2",
            "Here E is the sum of (d - x)^2 without 1/2: its derivative by x is -2 (d - x).",
            _slip(scale=1.0),
        ),
    ),
    hints=(
        "Where is the function right? Compare both of its matrices with autograd: "
        "torch.autograd.functional.hessian(E, w1) for one hidden unit and one input. One of the two is right.",
        "For a hidden unit, dE/da = f'(a) dE/dx, with x = f(a). Differentiate it once more by a: a product of two "
        "terms that both depend on a. The first is differentiated to f''(a), with which sign?",
        "A neighbour: g(a) = s(u) with u = sin(a). What is g''?\n"
        "  g'  = cos(a) s'(u)\n"
        "  g'' = -sin(a) s'(u) + cos(a) * cos(a) s''(u)\n"
        "Here f = sin, f' = cos, f'' = -sin: so g'' = f''(a) s'(u) + f'(a)^2 s''(u). The minus comes from f'' alone.",
    ),
)
