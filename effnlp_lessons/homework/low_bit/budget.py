"""Exercise 5 of notebook 04: 2 or 3 bits for every layer, the best choice of all under a byte budget.

Q-BERT (Shen et al. 2019, arXiv 1909.05840): Omega = |mean(lambda)| + std(lambda). The paper, and the library, give more
bits in the order of Omega. Here the layers differ in size, and all choices are compared.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number

Bits = Sequence[int]


def bits_under_budget(
    eigenvalues: Float[Tensor, "layers parts"], sizes: list[int], budget: int
) -> tuple[Float[Tensor, " layers"], list[int]]:
    """Omega of every layer, and its bits, 2 or 3: the choice with the largest sum of Omega over layers of 3 bits.

    `sizes` are the layers' numbers of weights; all weights together take at most `budget` bytes, which is enough for 2
    bits everywhere. std is that of the population.
    """
    omega = _omega(eigenvalues)
    return omega, _best(omega, sizes, budget)


def _omega(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.mean(dim=1).abs() + eigenvalues.std(dim=1, correction=0)


def _fits(bits: Bits, sizes: list[int], budget: int) -> bool:
    return sum(size * k for size, k in zip(sizes, bits, strict=True)) <= 8 * budget


def _gain(omega: Tensor, bits: Bits) -> float:
    return sum(value for value, k in zip(omega.tolist(), bits, strict=True) if k == 3)


def _best(
    omega: Tensor,
    sizes: list[int],
    budget: int,
    fits: Callable[[Bits, list[int], int], bool] = _fits,
    gain: Callable[[Tensor, Bits], float] = _gain,
) -> list[int]:
    """The choice with the largest gain among those that fit; 2 bits everywhere if none does."""
    choices = [bits for bits in product((2, 3), repeat=len(sizes)) if fits(bits, sizes, budget)]
    return list(max(choices, key=lambda bits: gain(omega, bits), default=(2,) * len(sizes)))


def _exchange(
    omega: Callable[[Tensor], Tensor] = _omega, choose: Callable[[Tensor, list[int], int], list[int]] = _best
) -> Answer:
    """The answer with another Omega, or another choice of (omega, sizes, budget)."""

    def answer(eigenvalues: Tensor, sizes: list[int], budget: int) -> tuple[Tensor, list[int]]:
        values = omega(eigenvalues)
        return values, choose(values, sizes, budget)

    return answer


def _in_order(
    key: Callable[[float, int], float], pass_over: bool = False
) -> Callable[[Tensor, list[int], int], list[int]]:
    """3 bits in falling order of `key(omega, size)`, to the first that does not fit, or passing such layers over."""

    def choose(omega: Tensor, sizes: list[int], budget: int) -> list[int]:
        values = omega.tolist()
        order = sorted(range(len(sizes)), key=lambda layer: -key(values[layer], sizes[layer]))
        bits = [2] * len(sizes)
        for layer in order:
            bits[layer] = 3
            if not _fits(bits, sizes, budget):
                bits[layer] = 2
                if not pass_over:
                    break
        return bits

    return choose


def _where_it(fits: Callable[[Bits, list[int], int], bool]) -> Callable[[Tensor, list[int], int], list[int]]:
    return lambda omega, sizes, budget: _best(omega, sizes, budget, fits)


def _with_gain(gain: Callable[[Tensor, Bits], float]) -> Callable[[Tensor, list[int], int], list[int]]:
    return lambda omega, sizes, budget: _best(omega, sizes, budget, gain=gain)


def _draw(room: str, same: bool = False) -> Callable[[Generator], tuple]:
    """Layers of different sizes; room "some", "exactly" what some choice takes, "none" or "all"."""

    def draw(generator: Generator) -> tuple:
        layers, parts = whole_number(4, 6, generator), whole_number(4, 10, generator)
        sizes = [8 * whole_number(3, 40, generator) for _ in range(layers)]
        if same:
            sizes = sizes[:1] * layers
        means, spreads = torch.randn(2, layers, 1, generator=generator, dtype=torch.float64).sinh()  # some are large
        eigenvalues = means + spreads * torch.randn(layers, parts, generator=generator, dtype=torch.float64)
        least, extra = sum(sizes) // 4, [size // 8 for size in sizes]
        budget = least + {"none": 0, "all": sum(extra)}.get(room, 0)
        if room == "some":
            budget += whole_number(max(extra), sum(extra) - min(extra), generator)
        if room == "exactly":
            half = torch.randperm(layers, generator=generator)[: layers // 2].tolist()
            budget += sum(extra[layer] for layer in half)
        return eigenvalues, sizes, budget

    return draw


BITS_UNDER_BUDGET = Exercise(
    id="low_bit.bits_under_budget",
    title="the best bits under a budget",
    minutes=25,
    difficulty=3,
    reference=bits_under_budget,
    properties=(
        Property(
            "by hand: three layers",
            lambda generator: (
                torch.tensor([[3.0, 5.0], [2.5, 2.5], [-1.0, -3.0]], dtype=torch.float64),
                [80, 40, 48],
                53,
            ),
            times=1,
        ),
        Property("layers of equal size", _draw("some", same=True), times=2),
        Property("layers of different sizes", _draw("some"), times=4),
        Property("the budget of some choice, to the last byte", _draw("exactly"), times=3),
        Property("no room at all", _draw("none"), times=1),
        Property("room for 3 bits everywhere", _draw("all"), times=1),
    ),
    mistakes=(
        Mistake(
            "The mean of the absolute values",
            "Omega has the absolute value of the mean: |mean(lambda)|. Eigenvalues of both signs on the parts are then "
            "a spread, which the second term counts.",
            _exchange(lambda values: values.abs().mean(1) + values.std(1, correction=0)),
        ),
        Mistake(
            "The mean keeps its sign",
            "Strong negative curvature is strong curvature: |mean(lambda)|.",
            _exchange(lambda values: values.mean(1) + values.std(1, correction=0)),
        ),
        Mistake(
            "The variance is added",
            "Omega adds the standard deviation, which has the same unit as the mean.",
            _exchange(lambda values: values.mean(1).abs() + values.var(1, correction=0)),
        ),
        Mistake(
            "The standard deviation of a sample",
            "torch.std divides by n - 1 unless told otherwise. Asked is that of the population: correction=0.",
            _exchange(lambda values: values.mean(1).abs() + values.std(1)),
        ),
        Mistake(
            "The spread is left out",
            "A layer whose curvature is large on some parts of the data is sensitive, too: add the standard deviation.",
            _exchange(lambda values: values.mean(1).abs()),
        ),
        Mistake(
            "The spread of the absolute values",
            "Take the standard deviation of the eigenvalues as they are.",
            _exchange(lambda values: values.mean(1).abs() + values.abs().std(1, correction=0)),
        ),
        Mistake(
            "In the order of Omega, to the first that does not fit",
            "That is the paper's rule, and the library's. A large layer at the head of the list can then keep several "
            "smaller ones out, whose sum is larger. With so few layers all choices can be tried.",
            _exchange(choose=_in_order(lambda value, size: value)),
        ),
        Mistake(
            "In the order of Omega, passing over what does not fit",
            "Better, but not the best: the first layers taken may fill the place of others whose sum is larger. With "
            "so few layers all choices can be tried.",
            _exchange(choose=_in_order(lambda value, size: value, pass_over=True)),
        ),
        Mistake(
            "In the order of Omega per weight",
            "A good rule, but not the best: some bytes are often left over that another choice would use. With so few "
            "layers all choices can be tried.",
            _exchange(choose=_in_order(lambda value, size: value / size, pass_over=True)),
        ),
        Mistake(
            "The least sensitive layers get more bits",
            "A sensitive layer is harmed most by coarse weights: it needs the third bit.",
            _exchange(choose=_in_order(lambda value, size: -value)),
        ),
        Mistake(
            "As many layers as possible",
            "Not their number is to be large, but the sum of their Omega.",
            _exchange(choose=_with_gain(lambda omega, bits: 1e6 * bits.count(3) + _gain(omega, bits))),
        ),
        Mistake(
            "Bits are compared with bytes",
            "A byte has 8 bits: sum of size * bits <= 8 * budget.",
            _exchange(
                choose=_where_it(
                    lambda bits, sizes, budget: sum(n * k for n, k in zip(sizes, bits, strict=True)) <= budget
                )
            ),
        ),
        Mistake(
            "Only the third bits are counted",
            "The budget is for the whole file: the other two bits of every weight are in it, too.",
            _exchange(
                choose=_where_it(
                    lambda bits, sizes, budget: sum(n for n, k in zip(sizes, bits, strict=True) if k == 3) <= 8 * budget
                )
            ),
        ),
        Mistake(
            "Only the layers of 3 bits are counted",
            "The budget is for the whole file: layers of 2 bits are in it, too.",
            _exchange(
                choose=_where_it(
                    lambda bits, sizes, budget: (
                        sum(3 * n for n, k in zip(sizes, bits, strict=True) if k == 3) <= 8 * budget
                    )
                )
            ),
        ),
        Mistake(
            "The budget must not be reached",
            "A file of exactly `budget` bytes fits: <= and not <.",
            _exchange(
                choose=_where_it(
                    lambda bits, sizes, budget: sum(n * k for n, k in zip(sizes, bits, strict=True)) < 8 * budget
                )
            ),
        ),
    ),
    hints=(
        "Two parts. Omega: the mean and the standard deviation over dim=1, and where does the absolute value stand? "
        "The choice: for 4 layers there are 16 choices. Write them all down with itertools.product.",
        "itertools.product((2, 3), repeat=len(sizes)) gives every choice. Keep those with sum(size * bits) <= 8 * "
        "budget, and take the one with the largest sum of Omega over its layers of 3 bits: max(..., key=...).",
        "A neighbour: a bag for 10 kg and three things, their weights in kg and what they are worth.\n"
        "  weights, worth = (7, 5, 5), (9, 6, 6)\n"
        "  from itertools import product\n"
        "  fits = [c for c in product((0, 1), repeat=3) if sum(w * x for w, x in zip(weights, c)) <= 10]\n"
        "  max(fits, key=lambda c: sum(v * x for v, x in zip(worth, c)))      (0, 1, 1), worth 12\n"
        "The most valuable thing first would have filled the bag with 9.",
    ),
)
