"""Exercise 5 of notebook 05: prune until the file fits, each matrix stored in its smallest form.

What a sparse file costs is arithmetic: values, and where they stand. One threshold for all matrices, as few weights
removed as possible, and none of the matrices emptied.
"""

import math
from bisect import bisect_left
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number

Weights = dict[str, Float[Tensor, "rows columns"]]
Pruned = tuple[dict[str, Tensor], dict[str, str]]
Size = Callable[[tuple[int, int], int], int]  # bytes of (rows, columns), kept


def prune_to_budget(weights: Weights, budget: int, floor: float) -> Pruned:
    """Masks and forms of all matrices: as few weights removed as possible, so that all take at most `budget` bytes.

    The weights go in the order of |w| over all matrices; of equal ones the first, in the order of the dictionary. But
    the ceil(floor * size) largest of each matrix stay. A form is "dense", "bitmask" or "csr", the smallest for its
    matrix; the first of these if two are equal.
    """
    return _prune(weights, budget, floor)


def _dense(shape: tuple[int, int], kept: int) -> int:
    return 4 * math.prod(shape)


def _bitmask(shape: tuple[int, int], kept: int) -> int:
    return math.ceil(math.prod(shape) / 8) + 4 * kept


def _csr(shape: tuple[int, int], kept: int) -> int:
    return (4 + 2) * kept + 4 * (shape[0] + 1)


FORMS: dict[str, Size] = {"dense": _dense, "bitmask": _bitmask, "csr": _csr}


def _each_its_smallest(shapes: list[tuple[int, int]], kept: list[int], forms: dict[str, Size]) -> list[str]:
    return [min(forms, key=lambda form: forms[form](*one)) for one in zip(shapes, kept, strict=True)]


def _one_for_all(shapes: list[tuple[int, int]], kept: list[int], forms: dict[str, Size]) -> list[str]:
    pairs = list(zip(shapes, kept, strict=True))
    return [min(forms, key=lambda form: sum(forms[form](*one) for one in pairs))] * len(shapes)


def _prune(
    weights: Weights,
    budget: int,
    floor: float,
    *,
    forms: dict[str, Size] = FORMS,
    choose: Callable = _each_its_smallest,
    score: Callable[[Tensor], Tensor] = torch.abs,
    at_least: Callable[[float, int], int] = lambda floor, size: math.ceil(floor * size),
    below: bool = False,
    relative: bool = False,
) -> Pruned:
    """The answer with other forms, another choice among them, another order or another floor.

    Args:
        below: the file must be smaller than the budget.
        relative: the order is the rank within a matrix, so that each loses the same share.
    """
    shapes = [tuple(weight.shape) for weight in weights.values()]
    sizes = [math.prod(shape) for shape in shapes]
    values, numbers, places = [], [], []  # of the weights that may go, matrix after matrix
    for number, (weight, size) in enumerate(zip(weights.values(), sizes, strict=True)):
        scores = score(weight).flatten()
        order = scores.argsort(stable=True)
        may_go = order[: size - at_least(floor, size)].sort().values
        values.append(order.argsort()[may_go] / size if relative else scores[may_go])
        numbers.append(torch.full_like(may_go, number))
        places.append(may_go)
    order = torch.cat(values).argsort(stable=True)
    numbers, places = torch.cat(numbers)[order], torch.cat(places)[order]
    gone = F.one_hot(numbers, len(sizes)).cumsum(0).tolist()  # of each matrix, after so many steps

    def kept(removed: int) -> list[int]:
        return [size - count for size, count in zip(sizes, gone[removed - 1], strict=True)] if removed else sizes

    def fits(removed: int) -> bool:
        counts = kept(removed)
        chosen = choose(shapes, counts, forms)
        used = sum(forms[form](shape, count) for form, shape, count in zip(chosen, shapes, counts, strict=True))
        return used < budget if below else used <= budget

    removed = bisect_left(range(len(order)), True, key=fits)  # the file never grows when a weight goes
    masks = [torch.ones(size, dtype=torch.bool) for size in sizes]
    for number, mask in enumerate(masks):
        mask[places[:removed][numbers[:removed] == number]] = False
    names = choose(shapes, kept(removed), forms)
    shaped = [mask.view(shape) for mask, shape in zip(masks, shapes, strict=True)]
    return dict(zip(weights, shaped, strict=True)), dict(zip(weights, names, strict=True))


def _exchange(**steps: object) -> Answer:
    return lambda weights, budget, floor: _prune(weights, budget, floor, **steps)


def _with(form: str, size: Size) -> dict[str, Size]:
    return FORMS | {form: size}


def _only(*names: str) -> dict[str, Size]:
    return {name: FORMS[name] for name in names}


def _one_more(weights: Weights, budget: int, floor: float) -> Pruned:
    """Removes one weight after the file fits."""
    masks = _prune(weights, budget, floor)[0]
    least = {name: math.ceil(floor * mask.numel()) for name, mask in masks.items()}
    rest = [
        (weights[name].flatten()[place].abs().item(), number, place, name)
        for number, (name, mask) in enumerate(masks.items())
        if mask.sum() > least[name]
        for place in mask.flatten().nonzero()[:, 0].tolist()
    ]
    if rest:
        *_, place, name = min(rest)
        masks[name].view(-1)[place] = False
    shapes = [tuple(mask.shape) for mask in masks.values()]
    forms = _each_its_smallest(shapes, [int(mask.sum()) for mask in masks.values()], FORMS)
    return masks, dict(zip(weights, forms, strict=True))


def _bytes(masks: dict[str, Tensor]) -> int:
    pairs = [(tuple(mask.shape), int(mask.sum())) for mask in masks.values()]
    return sum(min(size(*one) for size in FORMS.values()) for one in pairs)


def _draw(share: tuple[int, int], floors: tuple[int, int], ties: bool = False) -> Callable[[Generator], tuple]:
    """A wide matrix of small weights, a middle one and one of large weights; share and floor in per cent."""

    def draw(generator: Generator) -> tuple:
        shapes = (2, whole_number(100, 130, generator)), (5, whole_number(11, 17, generator)), (3, 7)
        scales = 0.2, 1.0, 3.0
        weights = {
            name: scale * torch.randn(shape, generator=generator)
            for name, shape, scale in zip(("query", "value", "output"), shapes, scales, strict=True)
        }
        if ties:
            weights = {name: torch.round(2 * weight) / 2 for name, weight in weights.items()}
        floor = whole_number(*floors, generator) / 100
        dense = sum(4 * weight.numel() for weight in weights.values())
        least = _bytes(_prune(weights, 0, floor)[0])  # all that may go is gone
        budget = least + (dense - least) * whole_number(*share, generator) // 100
        return weights, budget, floor

    return draw


def _exactly(generator: Generator) -> tuple:
    """A budget that some choice takes to the last byte."""
    weights, budget, floor = _draw((5, 40), (2, 6))(generator)
    return weights, _bytes(_prune(weights, budget, floor)[0]), floor


def _by_hand(generator: Generator) -> tuple:
    weights = {"a": torch.tensor([[0.1, -0.9, 0.2, 0.4]]), "b": torch.tensor([[2.0, -0.3], [0.8, 1.0]])}
    return weights, 18, 0.5


PRUNE_TO_BUDGET = Exercise(
    id="second_order.prune_to_budget",
    title="prune until the file fits",
    minutes=35,
    difficulty=4,
    reference=prune_to_budget,
    properties=(
        Property("by hand: two small matrices", _by_hand, times=1),
        Property("room for most weights", _draw((45, 80), (1, 3)), times=1),
        Property("room for few", _draw((6, 20), (1, 3)), times=1),
        Property("room for very few", _draw((1, 5), (1, 3)), times=2),
        Property("a floor that holds some back", _draw((4, 20), (15, 30)), times=2),
        Property("equal weights", _draw((10, 40), (2, 6), ties=True), times=1),
        Property("a budget that is met to the last byte", _exactly, times=2),
        Property("a budget that needs no pruning", _draw((100, 110), (2, 6)), times=1),
        Property("a budget that leaves the floor alone", _draw((0, 0), (2, 6)), times=1),
    ),
    mistakes=(
        Mistake(
            "CSR for all matrices",
            "A row pointer and a column for every value: as long as many weights are left, that is more than the "
            "dense matrix. Compute all three sizes for each matrix, and take the smallest.",
            _exchange(forms=_only("csr")),
        ),
        Mistake(
            "A bitmask for all matrices",
            "With few weights left, the places of the few take less than a bit for each. Compute all three sizes for "
            "each matrix, and take the smallest.",
            _exchange(forms=_only("bitmask")),
        ),
        Mistake(
            "Dense is not considered",
            "A matrix that has lost next to nothing is smallest as it is.",
            _exchange(forms=_only("bitmask", "csr")),
        ),
        Mistake(
            "Bitmasks are not considered",
            "One bit for each weight, and 4 bytes for each that is kept: the smallest form over a wide range.",
            _exchange(forms=_only("dense", "csr")),
        ),
        Mistake(
            "CSR is not considered",
            "With very few weights left it is the smallest: it stores nothing at all for a weight that is gone.",
            _exchange(forms=_only("dense", "bitmask")),
        ),
        Mistake(
            "One form for all matrices",
            "Each matrix is stored in its own smallest form.",
            _exchange(choose=_one_for_all),
        ),
        Mistake(
            "The mask is stored for nothing",
            "You count 4 bytes for each kept weight. The file must also say where they stand: a bit for each weight.",
            _exchange(forms=_with("bitmask", lambda shape, kept: 4 * kept)),
        ),
        Mistake(
            "A byte for each weight of the mask",
            "8 bits go into a byte: ceil(weights / 8).",
            _exchange(forms=_with("bitmask", lambda shape, kept: math.prod(shape) + 4 * kept)),
        ),
        Mistake(
            "The last byte of the mask is cut off",
            "If 8 does not divide the number of weights, one more byte holds the rest: round up.",
            _exchange(forms=_with("bitmask", lambda shape, kept: math.prod(shape) // 8 + 4 * kept)),
        ),
        Mistake(
            "CSR has one row pointer too few",
            "It stores where every row begins, and where the last one ends: rows + 1 numbers.",
            _exchange(forms=_with("csr", lambda shape, kept: 6 * kept + 4 * shape[0])),
        ),
        Mistake(
            "The columns of CSR take four bytes",
            "Here a column is a number of 16 bits: 4 + 2 bytes for each weight that is kept.",
            _exchange(forms=_with("csr", lambda shape, kept: 8 * kept + 4 * (shape[0] + 1))),
        ),
        Mistake(
            "The floor is forgotten",
            "One threshold for all matrices empties the one of small weights. The ceil(floor * size) largest of each "
            "matrix stay.",
            _exchange(at_least=lambda floor, size: 0),
        ),
        Mistake(
            "The floor is rounded down",
            "A matrix keeps at least the share `floor`: ceil(floor * size) weights.",
            _exchange(at_least=lambda floor, size: int(floor * size)),
        ),
        Mistake(
            "Each matrix loses the same share",
            "There is one order of |w| over all matrices. A matrix of small weights loses more, down to its floor.",
            _exchange(relative=True),
        ),
        Mistake(
            "The weights are sorted with their signs",
            "Large negative weights are large: sort |w|.",
            _exchange(score=lambda weight: weight),
        ),
        Mistake(
            "The budget must not be reached",
            "A file of exactly `budget` bytes fits: <= and not <.",
            _exchange(below=True),
        ),
        Mistake(
            "One weight too many goes",
            "Stop as soon as the file fits. Ask before a weight is removed, and not after.",
            _one_more,
        ),
    ),
    hints=(
        "Three parts, each a small function: the smallest form of a matrix with so many weights left; the list of all "
        "weights that may go, in their order; and a loop that removes one after the other until the sum fits.",
        "For each matrix sort |w| and leave its ceil(floor * size) largest out: the rest may go. Put triples (|w|, "
        "number of the matrix, place) of all matrices into one list and sort it: equal |w| then go in the order of the "
        "dictionary, as asked. A size depends on the count of kept weights only, so keep the counts up to date.",
        "A neighbour: two shelves are to lose books until both lists fit into 20 lines; a shelf is listed by titles, "
        "one a line, or as 'all but' those that are missing.\n"
        "  books, left = [15, 12], [15, 12]\n"
        "  def lines(number): return min(left[number], 1 + books[number] - left[number])\n"
        "  sum(lines(n) for n in (0, 1))          1 + 1 = 2: nothing has to go\n"
        "Each shelf in its shorter form, counted anew whenever a book has gone.",
    ),
)
