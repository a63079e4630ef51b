"""Exercise 3 of notebook 04: the two largest eigenvalues of a Hessian, from products with it.

Q-BERT (Shen et al. 2019, arXiv 1909.05840) takes the largest one of every layer by power iteration.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number

Block = list[Tensor]  # one tensor for every weight of the layer; together they are one vector
Product = Callable[[Block], Block]


def top_eigenvalues(hvp: Product, starts: tuple[Block, Block], iterations: int) -> tuple[float, float]:
    """The two eigenvalues of H that are largest in absolute value, with their signs, the largest first.

    `hvp` gives H v, v a list of tensors. Power iteration from each of `starts`; the second vector is kept orthogonal to
    the first.
    """
    found: list[Block] = []
    values = []
    for v in starts:
        for _ in range(iterations):
            for known in found:
                v = _minus(v, _dot(known, v), known)
            v = hvp(_unit(v))
        for known in found:
            v = _minus(v, _dot(known, v), known)
        v = _unit(v)
        found.append(v)
        values.append(_dot(v, hvp(v)))
    return values[0], values[1]


def _dot(a: Block, b: Block) -> float:
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True))


def _unit(v: Block) -> Block:
    length = _dot(v, v) ** 0.5
    return [part / length for part in v]


def _minus(v: Block, factor: float, known: Block) -> Block:
    return [part - factor * other for part, other in zip(v, known, strict=True)]


def _each_unit(v: Block) -> Block:
    return [part / part.norm() for part in v]


def _norms_added(v: Block) -> Block:
    length = sum(part.norm().item() for part in v)
    return [part / length for part in v]


def _constant_added(v: Block) -> Block:
    length = _dot(v, v) ** 0.5 + 1e-6
    return [part / length for part in v]


def _project(v: Block, known: Block) -> Block:
    return _minus(v, _dot(known, v), known)


def _project_each(v: Block, known: Block) -> Block:
    return [part - (part * other).sum() * other for part, other in zip(v, known, strict=True)]


def _quotient(v: Block, product: Block) -> float:
    return _dot(v, product)


def _exchange(
    unit: Callable[[Block], Block] = _unit,
    project: Callable[[Block, Block], Block] = _project,
    quotient: Callable[[Block, Block], float] = _quotient,
    order: Callable[[float, float], tuple[float, float]] = lambda first, second: (first, second),
) -> Answer:
    """The answer with one step exchanged: normalising, orthogonalising, the value of (v, H v), or the order."""

    def answer(hvp: Product, starts: tuple[Block, Block], iterations: int) -> tuple[float, float]:
        first = starts[0]
        for _ in range(iterations):
            first = unit(hvp(first))
        second = starts[1]
        for _ in range(iterations):
            second = unit(project(hvp(second), first))
        return order(quotient(first, hvp(first)), quotient(second, hvp(second)))

    return answer


def _deflated(hvp: Product, starts: tuple[Block, Block], iterations: int) -> tuple[float, float]:
    """Takes |lambda_1| v v^T away from H."""
    (value, _), first = top_eigenvalues(hvp, starts, iterations), starts[0]
    for _ in range(iterations):
        first = _unit(hvp(first))
    second = starts[1]
    for _ in range(iterations):
        second = _unit(_minus(hvp(second), abs(value) * _dot(first, second), first))
    return value, _dot(second, hvp(second))


class HessianProduct:
    """v -> H v of a Hessian with known eigenvalues, for lists of tensors of these shapes."""

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], eigenvalues: Float[Tensor, " size"], generator: Generator
    ) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        size = len(eigenvalues)
        directions = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        self.matrix = directions @ torch.diag(eigenvalues) @ directions.T

    def split(self, vector: Float[Tensor, " size"]) -> Block:
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        return [part.reshape(shape) for part, shape in zip(vector.split(sizes), self.shapes, strict=True)]

    def __call__(self, v: Block) -> Block:
        if [tuple(part.shape) for part in v] != self.shapes:
            raise ValueError(f"hvp takes a list of tensors of the shapes {self.shapes}")
        return self.split(self.matrix @ torch.cat([part.flatten() for part in v]))

    def __deepcopy__(self, memo: dict) -> "HessianProduct":
        return self  # nothing in it changes

    def __repr__(self) -> str:
        return f"v -> H v for tensors of the shapes {', '.join(map(str, self.shapes))}"


def _draw(tensors: int, signs: tuple[int, int], size: float = 1.0) -> Callable[[Generator], tuple]:
    """A Hessian with eigenvalues about 10 and 1, with these signs, and smaller ones, all times `size`."""

    def draw(generator: Generator) -> tuple:
        shapes = [(whole_number(3, 5, generator),)]
        shapes += [(whole_number(1, 3, generator), whole_number(2, 3, generator)) for _ in range(tensors - 1)]
        total = sum(torch.Size(shape).numel() for shape in shapes)
        values = 0.2 * torch.rand(total, generator=generator, dtype=torch.float64) - 0.1
        values[0] = signs[0] * (8 + 4 * torch.rand((), generator=generator))
        values[1] = signs[1] * (0.8 + 0.4 * torch.rand((), generator=generator))
        hvp = HessianProduct(shapes, size * values, generator)
        starts = tuple(hvp.split(torch.randn(total, generator=generator, dtype=torch.float64)) for _ in range(2))
        return hvp, starts, 30

    return draw


TOP_EIGENVALUES = Exercise(
    id="low_bit.top_eigenvalues",
    title="two eigenvalues of a Hessian",
    minutes=25,
    difficulty=3,
    reference=top_eigenvalues,
    properties=(
        Property("one tensor, both eigenvalues positive", _draw(1, (1, 1)), times=1),
        Property("one tensor, the largest is negative", _draw(1, (-1, 1)), times=1),
        Property("a layer of two tensors", _draw(2, (1, -1)), times=1),
        Property("a layer of three tensors, both negative", _draw(3, (-1, -1)), times=1),
        Property("a flat loss: all eigenvalues are tiny", _draw(2, (1, 1), 1e-6), times=1),
    ),
    mistakes=(
        Mistake(
            "Power iteration without orthogonalising",
            "Both vectors turn into the first eigenvector, whatever they started from. The second must have its part "
            "along the first taken off, v - (v1 . v) v1 and not v - v1, in every iteration: taken off once, it grows "
            "back from rounding errors.",
            _exchange(project=lambda v, known: v),
        ),
        Mistake(
            "The sign is lost",
            "|H v| and |v . H v| are the eigenvalue without its sign. After fine-tuning a loss may well have negative "
            "curvature. Return the Rayleigh quotient v . H v.",
            _exchange(quotient=lambda v, product: abs(_dot(v, product))),
        ),
        Mistake(
            "Each tensor is normalised",
            "The tensors of a layer are one vector. Normalised one by one they all get the same weight, and the "
            "direction is not an eigenvector of the whole. One norm: the root of the sum over all tensors.",
            _exchange(_each_unit),
        ),
        Mistake(
            "Each tensor is normalised, and the quotient divided by v . v",
            "The tensors of a layer are one vector. Normalised one by one they all get the same weight, and the "
            "direction is not an eigenvector of the whole. One norm: the root of the sum over all tensors.",
            _exchange(_each_unit, quotient=lambda v, product: _dot(v, product) / _dot(v, v)),
        ),
        Mistake(
            "The norms of the tensors are added",
            "Squares are added, then the root is taken. Your vector is too short, and the value too small.",
            _exchange(_norms_added),
        ),
        Mistake(
            "Each tensor is made orthogonal",
            "The tensors of a layer are one vector, with one inner product: the sum over all tensors. Then this "
            "number times the first vector is taken off.",
            _exchange(project=_project_each),
        ),
        Mistake(
            "H is deflated with the absolute value",
            "H - lambda v v^T removes an eigenvalue with its sign. If it is negative, your |lambda| doubles it, and "
            "the iteration finds it once more.",
            _deflated,
        ),
        Mistake(
            "A constant is added to the norm",
            "1e-6 against a division by zero is as large as the whole product where the loss is flat: the vector gets "
            "shorter than 1, and v . H v too small. Without it, or divide by v . v.",
            _exchange(_constant_added),
        ),
        Mistake(
            "The values are sorted",
            "Power iteration finds the largest in absolute value. That one comes first, even if it is negative.",
            _exchange(order=lambda first, second: (max(first, second), min(first, second))),
        ),
        Mistake(
            "The eigenvalues are squared",
            "|H v|^2 is lambda^2. The Rayleigh quotient is v . H v.",
            _exchange(quotient=lambda v, product: _dot(product, product)),
        ),
    ),
    hints=(
        "First write three small functions for lists of tensors: the inner product of two lists (a sum over all "
        "tensors), a list scaled to length 1, and a list less a multiple of another.",
        "First vector: v = unit(hvp(v)), again and again, then the Rayleigh quotient v . hvp(v), which keeps the sign. "
        "Second vector: the same, but after each product its part along the first is taken off: w - (v1 . w) v1. Why "
        "is it not enough to do this once, at the start?",
        "A neighbour: the matrix diag(3, -2, 1), with plain vectors; the first eigenvector (1, 0, 0) is known.\n"
        "  v = (0.6, 0.6, 0.6)\n"
        "  H v = (1.8, -1.2, 0.6); its part along (1, 0, 0) is 1.8; taken off: (0, -1.2, 0.6)\n"
        "  unit: (0, -0.894, 0.447)\n"
        "  H v = (0, 1.789, 0.447), unit: (0, 0.970, 0.243); again: (0, -0.992, 0.124)\n"
        "  v . H v = 0.992^2 * -2 + 0.124^2 * 1 = -1.95, on its way to -2",
    ),
)
