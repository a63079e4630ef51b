"""Exercise 3 of notebook 05: the inverse Hessian of Optimal Brain Surgeon, pattern by pattern.

Hassibi and Stork (1993): H = alpha I + (1/P) sum X X^T with the gradients X of the net's *outputs*, one for each output
and pattern, and its inverse by a rank-one recursion whose denominator holds P.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


class Net:
    """A small net as a function of its weights: net(w) gives the outputs (patterns, outputs) for fixed inputs."""

    def __init__(self, x: Float[Tensor, "patterns inputs"], hidden: int, outputs: int) -> None:
        self.x, self.shapes = x, ((hidden, x.shape[1]), (outputs, hidden))

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)

    def __call__(self, w: Float[Tensor, " weights"]) -> Float[Tensor, "patterns outputs"]:
        first, second = w.split([rows * columns for rows, columns in self.shapes])
        return torch.tanh(self.x @ first.view(self.shapes[0]).T) @ second.view(self.shapes[1]).T

    def __deepcopy__(self, memo: dict) -> "Net":
        return self  # nothing in it changes

    def __repr__(self) -> str:
        return f"a net of {self.weights} weights, {len(self.x)} patterns, {self.shapes[1][0]} outputs"


def inverse_hessian(
    net: Net, w: Float[Tensor, " weights"], targets: Float[Tensor, "patterns outputs"], alpha: float
) -> Float[Tensor, "weights weights"]:
    """The inverse of alpha I + (1/P) sum over patterns and outputs of X X^T, X = d output / d w at w.

    `targets` are not needed: at a minimum the error's second derivative is nearly that of the outputs alone.
    """
    return _recursion(_of_outputs(net, w, targets), len(targets), alpha)


Gradients = Callable[[Net, Tensor, Tensor], Tensor]  # (net, w, targets) -> (terms, weights)


def _jacobian(net: Net, w: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(net, w)  # (patterns, outputs, weights)


def _of_outputs(net: Net, w: Tensor, targets: Tensor) -> Tensor:
    return _jacobian(net, w).flatten(0, 1)


def _of_the_error(net: Net, w: Tensor, targets: Tensor) -> Tensor:
    return torch.einsum("po,pow->pw", net(w) - targets, _jacobian(net, w))


def _of_the_squared_error(net: Net, w: Tensor, targets: Tensor) -> Tensor:
    return 2 * _of_the_error(net, w, targets)


def _recursion(
    terms: Tensor,
    patterns: float,
    alpha: float,
    start: Callable[[float], float] = lambda alpha: 1 / alpha,
    sign: float = -1.0,
    renew: bool = True,
) -> Tensor:
    """H^-1 <- H^-1 - (H^-1 X)(H^-1 X)^T / (P + X^T H^-1 X), from 1/alpha I."""
    inverse = first = start(alpha) * torch.eye(terms.shape[1], dtype=terms.dtype)
    for x in terms:
        hx = (inverse if renew else first) @ x
        inverse = inverse + sign * torch.outer(hx, hx) / (patterns + x @ hx)
    return inverse


def _exchange(
    gradients: Gradients = _of_outputs,
    patterns: Callable[[Tensor], float] = len,
    finish: Callable[[Tensor], Tensor] = lambda inverse: inverse,
    **steps: object,
) -> Answer:
    """The answer with other gradients, another P of the targets, or another step of the recursion."""

    def answer(net: Net, w: Tensor, targets: Tensor, alpha: float) -> Tensor:
        return finish(_recursion(gradients(net, w, targets), patterns(targets), alpha, **steps))

    return answer


def _hessian(net: Net, w: Tensor, alpha: float) -> Tensor:
    terms = _of_outputs(net, w, w)
    return alpha * torch.eye(len(w), dtype=w.dtype) + terms.T @ terms / len(net.x)


def _observe(fn: Answer, net: Net, w: Tensor, targets: Tensor, alpha: float) -> object:
    """alpha H^-1, whose numbers are at most 1 whatever alpha is."""
    inverse = fn(net, w, targets, alpha)
    return alpha * inverse if isinstance(inverse, Tensor) else inverse


def _draw(outputs: int, patterns: tuple[int, int], alpha: float) -> Callable[[Generator], tuple]:
    """A net that is not trained, with targets that it misses by little or much."""

    def draw(generator: Generator) -> tuple:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        count = whole_number(*patterns, generator)
        net = Net(normal(count, whole_number(2, 3, generator)), whole_number(2, 3, generator), outputs)
        w = normal(net.weights)
        return net, w, net(w) + 0.7 * normal(count, outputs), alpha

    return draw


INVERSE_HESSIAN = Exercise(
    id="second_order.inverse_hessian",
    title="an inverse, pattern by pattern",
    minutes=25,
    difficulty=3,
    reference=inverse_hessian,
    properties=(
        Property("one pattern, one output", _draw(1, (1, 1), 0.01), _observe, times=1),
        Property("fewer patterns than weights", _draw(1, (3, 5), 0.01), _observe, times=1),
        Property("more patterns than weights", _draw(1, (15, 20), 0.001), _observe, times=1),
        Property("several outputs", _draw(3, (4, 7), 0.01), _observe, times=2),
    ),
    mistakes=(
        Mistake(
            "The denominator holds 1 instead of P",
            "H carries the factor 1/P, so each term is X X^T / P, and the formula for it is H^-1 - (H^-1 X)(H^-1 X)^T "
            "/ (P + X^T H^-1 X). Yours inverts the sum, and not the mean.",
            _exchange(patterns=lambda targets: 1),
        ),
        Mistake(
            "The gradients are divided by P, and not by its root",
            "With X / P the product X X^T is divided by P^2. Divide X by the root of P, or put P into the denominator.",
            _exchange(patterns=lambda targets: len(targets) ** 2),
        ),
        Mistake(
            "P counts the outputs, too",
            "P is the number of patterns. Each output adds a term, but the error is the mean over patterns.",
            _exchange(patterns=lambda targets: targets.numel()),
        ),
        Mistake(
            "The gradient of the error",
            "At a minimum the errors are small, and so would be your H: it says nothing of the curvature. H holds the "
            "gradients of the outputs, and the targets do not occur in it.",
            _exchange(_of_the_error),
        ),
        Mistake(
            "The gradient of the squared error, without 1/2",
            "At a minimum the errors are small, and so would be your H: it says nothing of the curvature. H holds the "
            "gradients of the outputs, and the targets do not occur in it.",
            _exchange(_of_the_squared_error),
        ),
        Mistake(
            "The gradients of a pattern's outputs are added up",
            "net(w).sum().backward() and the like mix the outputs. (X + Y)(X + Y)^T is not X X^T + Y Y^T: every output "
            "has a term of its own.",
            _exchange(lambda net, w, targets: _jacobian(net, w).sum(1)),
        ),
        Mistake(
            "Only the first output is used",
            "Every output of every pattern adds a term X X^T.",
            _exchange(lambda net, w, targets: _jacobian(net, w)[:, 0]),
        ),
        Mistake(
            "Every term begins from the first inverse",
            "The recursion goes on from the inverse that has all patterns before in it.",
            _exchange(renew=False),
        ),
        Mistake(
            "The start is alpha I",
            "Before any pattern H is alpha I, and its inverse is I / alpha.",
            _exchange(start=lambda alpha: alpha),
        ),
        Mistake(
            "The term is added",
            "A larger H has a smaller inverse: minus.",
            _exchange(sign=1.0),
        ),
        Mistake(
            "H is returned, not its inverse",
            "Asked is the inverse of alpha I + (1/P) sum X X^T.",
            lambda net, w, targets, alpha: _hessian(net, w, alpha),
        ),
        Mistake(
            "Only the diagonal of H is inverted",
            "Then the surgeon knows no more than OBD: the other numbers say which weights can stand in for which.",
            lambda net, w, targets, alpha: torch.diag(1 / _hessian(net, w, alpha).diagonal()),
        ),
    ),
    hints=(
        "Three steps: the gradients X of all outputs in all patterns, a list of vectors as long as w; the start, alpha "
        "I, inverted; and one update for each X. Which of the arguments do you not need?",
        "torch.autograd.functional.jacobian(net, w) has the shape (patterns, outputs, weights): flatten its first two. "
        "For each x: hx = inverse @ x, then take torch.outer(hx, hx) / (P + x @ hx) off. P is the number of patterns.",
        "A neighbour, with numbers for matrices: 1 / (0.5 + (9 + 4) / 2), term by term, with P = 2.\n"
        "  inverse = 1 / 0.5 = 2\n"
        "  x = 3:   2 - (2 * 3)^2 / (2 + 3 * 2 * 3)                2 - 36 / 20 = 0.2        = 1 / (0.5 + 9 / 2)\n"
        "  x = 2:   0.2 - (0.2 * 2)^2 / (2 + 2 * 0.2 * 2)          0.2 - 0.16 / 2.8 = 0.143 = 1 / 7",
    ),
)
