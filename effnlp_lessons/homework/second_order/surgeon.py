"""Exercise 4 of notebook 05: one step of Optimal Brain Surgeon, with weights that are already gone.

Hassibi and Stork (1993): L_q = w_q^2 / (2 [H^-1]_qq), and every weight that is left moves by -w_q / [H^-1]_qq H^-1 e_q.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number

Step = tuple[int, Float[Tensor, " weights"], float]


def surgeon_step(
    w: Float[Tensor, " weights"], hessian: Float[Tensor, "weights weights"], kept: Bool[Tensor, " weights"]
) -> Step:
    """The weight q that costs least, the weights after it is gone, and by how much the error grows.

    Weights that are not `kept` are 0 and stay 0: their rows and columns leave H before it is inverted. w_q is 0
    afterwards, exactly.
    """
    left = kept.nonzero()[:, 0]
    inverse = torch.linalg.inv(hessian[left][:, left])
    increase = w[left] ** 2 / (2 * inverse.diagonal())
    place = int(increase.argmin())
    new = w.clone()
    new[left] -= w[left[place]] / inverse[place, place] * inverse[:, place]
    new[left[place]] = 0.0
    return int(left[place]), new, increase[place].item()


def _exchange(
    increase: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda w, h, inverse: w**2 / (2 * inverse.diagonal()),
    move: Callable[[Tensor, Tensor, Tensor, int], Tensor] = lambda w, h, inverse, q: -w[q] / inverse[q, q] * inverse[q],
    choose: Callable[[Tensor, Tensor], Tensor] = lambda increase, w: increase.argmin(),
    report: Callable[[float], float] = lambda increase: increase,
    place: Callable[[Tensor, int], int] = lambda left, q: int(left[q]),
    exactly: bool = True,
) -> Answer:
    """The answer with one step exchanged, on the weights that are left, their H and its inverse.

    Args:
        increase, move: what each weight costs, and how all move when the one at q goes.
        choose, report, place: which goes, of (increase, w); the increase and the number that are returned.
        exactly: whether the weight at q is set to 0.
    """

    def answer(w: Tensor, hessian: Tensor, kept: Tensor) -> Step:
        left = kept.nonzero()[:, 0]
        h, there = hessian[left][:, left], w[left]
        inverse = torch.linalg.inv(h)
        costs = increase(there, h, inverse)
        q = int(choose(costs, there))
        new = w.clone()
        new[left] += move(there, h, inverse, q)
        if exactly:
            new[left[q]] = 0.0
        return place(left, q), new, report(costs[q].item())

    return answer


def _whole(hold: bool, only_kept: bool = True) -> Answer:
    """The inverse of the whole H; `hold` leaves the pruned weights where they are, `only_kept` lets none be chosen."""

    def answer(w: Tensor, hessian: Tensor, kept: Tensor) -> Step:
        inverse = torch.linalg.inv(hessian)
        increase = w**2 / (2 * inverse.diagonal())
        allowed = kept if only_kept else torch.ones_like(kept)
        q = int(increase.masked_fill(~allowed, float("inf")).argmin())
        move = -w[q] / inverse[q, q] * inverse[q]
        new = w + (move * kept if hold else move)
        new[q] = 0.0
        return q, new, increase[q].item()

    return answer


def _backwards(w: Tensor, h: Tensor, inverse: Tensor, q: int) -> Tensor:
    return w[q] / inverse[q, q] * inverse[q]


def _zeros(fn: Answer, *inputs: Tensor) -> dict[str, object]:
    """The weights that are 0, to the last bit."""
    weights = fn(*inputs)[1]
    return {"weights that are exactly 0": (weights == 0).nonzero()[:, 0].tolist()}


def _twice(fn: Answer, w: Tensor, hessian: Tensor, kept: Tensor) -> dict[str, object]:
    """Two steps one after the other, from a minimum: the second knows of the first through `kept`."""
    first, weights, _ = fn(w, hessian, kept)
    if not 0 <= first < len(w):
        raise ValueError(f"q must be the place of a weight, 0 .. {len(w) - 1}, got {first}")
    left = kept.clone()
    left[first] = False
    second, weights, _ = fn(weights * left, hessian, left)
    return {"first": first, "second": second, "weights": weights}


def _draw(gone: int) -> Callable[[Generator], tuple]:
    """Weights of which `gone` are pruned, and a full Hessian whose weights stand in for each other."""

    def draw(generator: Generator) -> tuple:
        size = whole_number(5, 7, generator) + gone
        factor = torch.randn(size, size + 2, generator=generator, dtype=torch.float64)
        scale = torch.exp(0.8 * torch.randn(size, generator=generator, dtype=torch.float64))
        hessian = scale[:, None] * (factor @ factor.T / (size + 2) + 0.05 * torch.eye(size)) * scale
        w = torch.randn(size, generator=generator, dtype=torch.float64)
        kept = torch.ones(size, dtype=torch.bool)
        kept[torch.randperm(size, generator=generator)[:gone]] = False
        return w * kept, hessian, kept

    return draw


def _with_rounding(generator: Generator) -> tuple:
    """One in which w_q - w_q / a * a is not 0."""
    draw, rounded = _draw(1), _exchange(exactly=False)
    while True:
        inputs = draw(generator)
        q, weights, _ = rounded(*inputs)
        if weights[q] != 0:
            return inputs


def _by_hand(generator: Generator) -> tuple:
    w = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64)
    return w, hessian, torch.ones(3, dtype=torch.bool)


SURGEON_STEP = Exercise(
    id="second_order.surgeon_step",
    title="one step of Optimal Brain Surgeon",
    minutes=30,
    difficulty=3,
    reference=surgeon_step,
    properties=(
        Property("by hand: three weights", _by_hand, times=1),
        Property("nothing is pruned yet", _draw(0), times=2),
        Property("two weights are gone already", _draw(2), times=2),
        Property("what is gone is 0, to the last bit", _with_rounding, _zeros, times=1),
        Property("two steps", _draw(1), _twice, times=2),
    ),
    mistakes=(
        Mistake(
            "The other weights are not updated",
            "Then the error grows by w_q^2 H_qq / 2, and not by L_q: the surgeon's gain is that the others take over. "
            "All that are left move by -w_q / [H^-1]_qq times the column q of H^-1.",
            _exchange(move=lambda w, h, inverse, q: torch.zeros_like(w)),
        ),
        Mistake(
            "The update has the wrong sign",
            "The move of w_q itself must be -w_q. Yours is +w_q before it is set to 0; the others go the wrong way.",
            _exchange(move=_backwards),
        ),
        Mistake(
            "The update has the wrong sign, and w_q doubles",
            "The move of w_q itself must be -w_q, so that it ends at 0. All others have the opposite sign, too.",
            _exchange(move=_backwards, exactly=False),
        ),
        Mistake(
            "w_q is not exactly 0",
            "w_q - w_q / a * a leaves a rounding error now and then. Such a weight is counted as one that is still "
            "there. Set it to 0.",
            _exchange(exactly=False),
        ),
        Mistake(
            "Pruned weights drift away from 0",
            "H of all weights also moves those that are gone. Take their rows and columns out of H, and then invert.",
            _whole(hold=False),
        ),
        Mistake(
            "The pruned weights are held, but still in the inverse",
            "The inverse of the whole H reckons with moves of the pruned weights that you do not make: w is not at the "
            "minimum. Take their rows and columns out of H, and then invert.",
            _whole(hold=True),
        ),
        Mistake(
            "A pruned weight is chosen again",
            "w_q = 0 costs nothing, and is always the cheapest. Only what is `kept` can go.",
            _whole(hold=True, only_kept=False),
        ),
        Mistake(
            "The weight is chosen by H_qq",
            "w_q^2 H_qq / 2 is OBD: what deleting costs if nothing else moves. The surgeon lets the others move, and "
            "divides by [H^-1]_qq. 1 / [H^-1]_qq is not H_qq.",
            _exchange(lambda w, h, inverse: w**2 * h.diagonal() / 2),
        ),
        Mistake(
            "The inverse multiplies instead of dividing",
            "L_q = w_q^2 / (2 [H^-1]_qq). A large [H^-1]_qq means that the others can easily take over.",
            _exchange(lambda w, h, inverse: w**2 * inverse.diagonal() / 2),
        ),
        Mistake(
            "The smallest weight goes",
            "Magnitude is not asked. A large weight can be cheap if others can take over: the smallest L_q goes.",
            _exchange(choose=lambda increase, w: w.abs().argmin()),
        ),
        Mistake(
            "The most expensive weight goes",
            "The one with the smallest L_q goes.",
            _exchange(choose=lambda increase, w: increase.argmax()),
        ),
        Mistake(
            "The others move by H, not by its inverse",
            "The column of H says how the gradient changes. How the others have to move is in the column of H^-1.",
            _exchange(move=lambda w, h, inverse, q: -w[q] / h[q, q] * h[q]),
        ),
        Mistake(
            "q is counted among the weights that are left",
            "Return the place in w: left[q], if left holds the places of the kept weights.",
            _exchange(place=lambda left, q: q),
        ),
        Mistake(
            "The factor 1/2 is missing in the increase",
            "The error grows by L_q = w_q^2 / (2 [H^-1]_qq).",
            _exchange(report=lambda increase: 2 * increase),
        ),
    ),
    hints=(
        "Leave the pruned weights out first: left = kept.nonzero()[:, 0] are the places of the others. From there on "
        "think of a smaller problem, with w[left] and with H of these rows and columns.",
        "hessian[left][:, left] is the smaller H. Invert it; its diagonal gives L of every weight, the smallest names "
        "q, and the column of q says how all of them move. Check yourself: the move of w_q must be -w_q.",
        "A neighbour: pay 7 with two purses. Spending x and y hurts by x^2 + y^2, and x + y = 7: 3.5 from each.\n"
        "Now the second purse is closed (y = 0). Who only closes it pays 3.5. Who also moves x pays 7.\n"
        "With three purses, one closed before: it must not even be asked. Solve for two.\n"
        "  left = torch.tensor([True, False, True]).nonzero()[:, 0]      [0, 2]\n"
        "  table[left][:, left]                                          the 2 x 2 table of the open ones",
    ),
)
