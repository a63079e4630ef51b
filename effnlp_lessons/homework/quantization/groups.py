"""Exercise 6 of notebook 03, "find the bug": weights on a grid for every group of a row, whatever its length.

Groups of consecutive inputs of one output channel, as in Q-BERT and in 4-bit language models. The library wants rows
that the group size divides; here the last group of a row may be shorter.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def group_quantize(weight: Float[Tensor, "rows columns"], group: int, bits: int) -> Float[Tensor, "rows columns"]:
    """The weight moved to symmetric grids, one for every `group` consecutive columns of a row.

    S = max|w| / (2^(bits-1) - 1) of the group. The last group of a row may be shorter. Zeros stay zeros.
    """
    rows, columns = weight.shape
    groups = F.pad(weight, (0, -columns % group)).reshape(-1, group)  # zeros at the end of every row
    return _on_grid(groups, groups.abs().amax(1, keepdim=True), bits).reshape(rows, -1)[:, :columns]


def _on_grid(values: Tensor, largest: Tensor, bits: int) -> Tensor:
    scale = largest / (2 ** (bits - 1) - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale * torch.round(values / scale)


def _largest(values: Tensor) -> Tensor:
    return values.abs().amax(1, keepdim=True)


def _flat(weight: Tensor, group: int, bits: int) -> Tensor:
    groups = F.pad(weight.flatten(), (0, -weight.numel() % group)).reshape(-1, group)
    return _on_grid(groups, _largest(groups), bits).flatten()[: weight.numel()].reshape(weight.shape)


def _by_group(
    largest: Callable[[Tensor, Tensor], Tensor] = lambda part, weight: _largest(part),
    on_grid: Callable[[Tensor, Tensor, int], Tensor] = _on_grid,
) -> Answer:
    """The answer group after group; `largest` of (group (rows, its columns), weight) sets the scale."""

    def answer(weight: Tensor, group: int, bits: int) -> Tensor:
        parts = [on_grid(part, largest(part, weight), bits) for part in weight.split(group, dim=1)]
        return torch.cat(parts, dim=1)

    return answer


def _down_the_columns(weight: Tensor, group: int, bits: int) -> Tensor:
    return group_quantize(weight.T, group, bits).T


def _interleaved(weight: Tensor, group: int, bits: int) -> Tensor:
    """Every n-th column of a row forms a group, n groups in all."""
    rows, columns = weight.shape
    groups = F.pad(weight, (0, -columns % group)).reshape(rows, group, -1)
    on_grid = _on_grid(groups, groups.abs().amax(1, keepdim=True), bits)
    return on_grid.reshape(rows, -1)[:, :columns]


def _rest_left(weight: Tensor, group: int, bits: int) -> Tensor:
    whole = weight.shape[1] // group * group
    return torch.cat([group_quantize(weight[:, :whole], group, bits), weight[:, whole:]], dim=1)


def _rest_lost(weight: Tensor, group: int, bits: int) -> Tensor:
    whole = weight.shape[1] // group * group
    rest = torch.zeros_like(weight[:, whole:])
    return torch.cat([group_quantize(weight[:, :whole], group, bits), rest], dim=1)


def _rest_joined(weight: Tensor, group: int, bits: int) -> Tensor:
    first = max(weight.shape[1] // group - 1, 0) * group
    return torch.cat([group_quantize(weight[:, :first], group, bits), _by_row(weight[:, first:], bits)], dim=1)


def _by_row(weight: Tensor, bits: int) -> Tensor:
    return _on_grid(weight, _largest(weight), bits)


def _last_scale(weight: Tensor, group: int, bits: int) -> Tensor:
    return _on_grid(weight, _largest(weight.split(group, dim=1)[-1]), bits)


def _equal_parts(weight: Tensor, group: int, bits: int) -> Tensor:
    parts = weight.tensor_split(-(-weight.shape[1] // group), dim=1)
    return torch.cat([_by_row(part, bits) for part in parts], dim=1)


def _grid_by(
    steps: Callable[[int], int] = lambda bits: 2 ** (bits - 1) - 1, guard: bool = True
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The grid with another number of steps, or without the guard for zeros."""

    def on_grid(values: Tensor, largest: Tensor, bits: int) -> Tensor:
        scale = largest / steps(bits)
        if guard:
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale * torch.round(values / scale)

    return on_grid


def _draw(divides: bool, special: str = "", dtype: torch.dtype = torch.float64) -> Callable[[Generator], tuple]:
    """A random weight whose rows the group size divides, or not; special "outlier", "zeros" or "short"."""

    def draw(generator: Generator) -> tuple:
        rows, group, count = (whole_number(*bounds, generator) for bounds in ((3, 4), (3, 5), (2, 3)))
        columns = group * count + (0 if divides else whole_number(1, group - 1, generator))
        if special == "short":
            columns = whole_number(2, group - 1, generator)
        weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
        weight *= torch.exp(torch.randn(rows, 1, generator=generator, dtype=dtype))  # rows of different size
        if special == "outlier":
            weight[1, 0] = 100.0
        if special == "zeros":
            weight[0] = 0
        return weight, group, whole_number(3, 5, generator)

    return draw


GROUP_QUANTIZE = Exercise(
    id="quantization.group_quantize",
    title="find the bug: a grid for every group",
    minutes=20,
    difficulty=2,
    reference=group_quantize,
    properties=(
        Property("rows that the group size divides", _draw(True), times=2),
        Property("a group of zeros stays zero", _draw(True, "zeros"), times=1),
        Property("rows that it does not divide", _draw(False), times=2),
        Property("an outlier harms its own group only", _draw(False, "outlier"), times=2),
        Property("rows shorter than a group", _draw(False, "short"), times=1),
        Property("float32 stays float32", _draw(False, dtype=torch.float32), times=1),
    ),
    mistakes=(
        Mistake(
            "Groups run over the end of a row",
            "The matrix is flattened, and padded once at its end. If the group size does not divide the columns, a "
            "group takes its last numbers from the next row, another output channel with another range. Every row must "
            "be padded.",
            _flat,
        ),
        Mistake(
            "Groups run down the columns",
            "A group holds inputs of one output channel, numbers of one row. Yours mix the output channels.",
            _down_the_columns,
        ),
        Mistake(
            "Every n-th column forms a group",
            "reshape(rows, group, -1) puts neighbours into different groups. The last dimension is the one whose "
            "numbers are neighbours: reshape(rows, -1, group).",
            _interleaved,
        ),
        Mistake(
            "One grid for each row",
            "The largest number is taken over the whole row. Take it over each group.",
            _by_group(lambda part, weight: _largest(weight)),
        ),
        Mistake(
            "One grid for the whole matrix",
            "The largest number is taken over everything. Take it over each group.",
            _by_group(lambda part, weight: weight.abs().max()),
        ),
        Mistake(
            "One grid for a group of columns in all rows",
            "The largest number is taken over the rows, too. Every row has grids of its own.",
            _by_group(lambda part, weight: part.abs().max()),
        ),
        Mistake(
            "The scale of the last group serves all",
            "In the loop the scale is overwritten, and used after it. Quantize each group with its own scale.",
            _last_scale,
        ),
        Mistake(
            "The short group at the end is not quantized",
            "It is a group, too, with fewer numbers.",
            _rest_left,
        ),
        Mistake(
            "The short group at the end is lost",
            "Its numbers come back as zeros. Pad the row before cutting it into groups.",
            _rest_lost,
        ),
        Mistake(
            "The short group is joined to the one before",
            "It has a grid of its own. Otherwise the last grid serves nearly twice as many numbers.",
            _rest_joined,
        ),
        Mistake(
            "The row is cut into equal parts",
            "All groups but the last have `group` numbers. tensor_split and chunk count parts; split takes the length.",
            _equal_parts,
        ),
        Mistake(
            "The largest number, not the largest absolute value",
            "A group whose largest weight is negative then has too small a scale.",
            _by_group(lambda part, weight: part.amax(1, keepdim=True)),
        ),
        Mistake(
            "A group of zeros becomes NaN",
            "max|w| is 0 there, and 0 / 0 is NaN. Any positive scale will do for a group of zeros.",
            _by_group(on_grid=_grid_by(guard=False)),
        ),
        Mistake(
            "The scale divides by 2^(k-1)",
            "The largest code is 2^(k-1) - 1. Your largest weight needs the code 2^(k-1), which is not there.",
            _by_group(on_grid=_grid_by(lambda bits: 2 ** (bits - 1))),
        ),
        Mistake(
            "The scale divides by 2^k - 1",
            "Half of the codes are negative: from 0 to the largest weight there are 2^(k-1) - 1 steps. Your codes need "
            "one bit more.",
            _by_group(on_grid=_grid_by(lambda bits: 2**bits - 1)),
        ),
    ),
    hints=(
        "It is right for 4 columns and groups of 2. Try 3 columns and groups of 2: write down, for each group, which "
        "numbers of the matrix it holds.",
        "Where does the padding go? The padded row must be a whole number of groups long, every row. F.pad(weight, "
        "(0, n)) adds n columns. At the end the added columns are cut off again, after the rows have been put back.",
        "A neighbour: two poems of 5 lines, three lines to a page; every poem begins on a new page.\n"
        "  poems = torch.arange(10).reshape(2, 5)\n"
        "  F.pad(poems.flatten(), (0, 2)).reshape(-1, 3)    page 2 is [3, 4, 5]: two poems on one page\n"
        "  F.pad(poems, (0, 1)).reshape(-1, 3)              [0, 1, 2], [3, 4, 0], [5, 6, 7], [8, 9, 0]\n"
        "  and back: .reshape(2, -1)[:, :5]",
    ),
)
