"""Exercise 6 of notebook 11: the masks of a Triton kernel, for rows that do not fill the block.

The student writes a plain function; `interpreted` makes a kernel of it (`triton.jit`) and runs it in Triton's
interpreter, where an address outside a tensor is an error. The function needs no decorator, so that the notebook's
cell can be run where there is no Triton (it exists on Linux only).

NOTE reference and mistakes are PyTorch and not kernels: they say what a kernel with such masks reads and writes. With
them the inputs can be drawn and compared anywhere, and quickly. The tests hold real kernels against them.
"""

import inspect
import math
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, HomeworkError, Mistake, Property, whole_number

UNTOUCHED = -1.0  # what the output holds before the kernel


def masked_row_softmax(
    scores: Float[Tensor, " numbers"], rows: int, row_stride: int, length: int, block: int
) -> Float[Tensor, " numbers"]:
    """The memory after a kernel has written the softmax of each row, one program a row; elsewhere it stays -1.

    Row r has the numbers from r * row_stride on, `length` of them; block >= length is a power of two.
    """
    return _rows()(scores, rows, row_stride, length, block)


class _Interpreted:
    """A kernel as a function of tensors, run by Triton's interpreter: one program a row."""

    def __init__(self, kernel: Callable) -> None:
        self.kernel = kernel

    @property
    def __code__(self) -> CodeType:
        """The student's lines, so that the grader can name the one in which an error was raised."""
        return self.kernel.fn.__code__

    def __call__(self, scores: Tensor, rows: int, row_stride: int, length: int, block: int) -> Tensor:
        from effnlp_lessons.attention.triton_tools import interpreting

        weights = torch.full_like(scores, UNTOUCHED)
        with interpreting():
            self.kernel[(rows,)](scores, weights, row_stride, length, block)
        return weights


def interpreted(kernel: Callable[..., None]) -> Answer:
    """`kernel(scores, weights, row_stride, length, BLOCK)`, with or without `@triton.jit`, for `check` to call.

    Raises:
        HomeworkError: if there is no Triton on this machine, or `kernel` is no function of a cell or a file.
    """
    try:
        import triton
    except ImportError:
        raise HomeworkError("there is no Triton here (it exists on Linux only): a kernel cannot be checked") from None
    if isinstance(kernel, triton.runtime.JITFunction):
        return _Interpreted(kernel)
    try:
        inspect.getsource(kernel)
    except (TypeError, OSError):
        needed = "interpreted needs the kernel itself, a function of a cell or a file"
        raise HomeworkError(f"{needed}, got {kernel!r}") from None
    return _Interpreted(triton.jit(kernel))


# ----------------------------------------------------------------------------- what a kernel reads and writes


def _reached(memory: Tensor, places: Tensor) -> Tensor:
    if len(places) and places.max() >= len(memory):
        raise IndexError("out of bounds")
    return places


def _maximum(row: Tensor) -> Tensor:
    return row.max()


def _rows(
    load: Callable[[int, int], int] = lambda length, block: length,
    store: Callable[[int, int], int] = lambda length, block: length,
    other: float = -math.inf,
    mask_sum: bool = False,
    maximum: Callable[[Tensor], Any] = _maximum,
    from_start: bool = False,
    stride: Callable[[int, int], int] = lambda row_stride, length: row_stride,
) -> Answer:
    """The answer with one step exchanged.

    Args:
        load, store: how many lanes the mask lets through, of (length, block).
        other: what the hidden lanes hold.
        mask_sum: leaves hidden lanes out of the sum.
        from_start: True compares the place in the whole tensor, not the one in the row.
        stride: the distance between rows, of (row_stride, length).
    """

    def answer(scores: Tensor, rows: int, row_stride: int, length: int, block: int) -> Tensor:
        weights = torch.full_like(scores, UNTOUCHED)
        columns = torch.arange(block)
        for first in range(0, rows * stride(row_stride, length), stride(row_stride, length)):
            place = columns + first
            counted = place if from_start else columns
            loaded, stored = counted < load(length, block), counted < store(length, block)
            row = torch.full((block,), other, dtype=scores.dtype)
            row[loaded] = scores[_reached(scores, place[loaded])]
            powers = (row - maximum(row)).exp()
            total = powers[columns < length].sum() if mask_sum else powers.sum()
            weights[_reached(weights, place[stored])] = (powers / total)[stored]
        return weights

    return answer


def _block(length: int, block: int) -> int:
    return block


def _one_more(length: int, block: int) -> int:
    return min(length + 1, block)


def _draw(
    fills: bool = False, gap: bool = False, ends: bool = False, shift: float = 0.0
) -> Callable[[Generator], tuple]:
    """Three or four rows.

    Args:
        fills: the row is as long as the block.
        gap: other numbers lie between the rows.
        ends: the tensor ends with the last row; else other numbers follow.
        shift: added to the scores of the rows, not to the numbers around them.
    """

    def draw(generator: Generator) -> tuple:
        block = 2 ** whole_number(3, 4, generator)
        length = block if fills else whole_number(block // 2 + 1, block - 2, generator)
        rows, row_stride = whole_number(3, 4, generator), length + gap * whole_number(1, 5, generator)
        behind = 0 if ends else block
        scores = torch.randn((rows - 1) * row_stride + length + behind, generator=generator)
        inside = (torch.arange(len(scores)) % row_stride < length) & (torch.arange(len(scores)) < rows * row_stride)
        return torch.where(inside, 2 * scores + shift, scores), rows, row_stride, length, block

    return draw


MASKED_TAIL = Exercise(
    id="flash.masked_tail",
    title="find the bug: the masks of a kernel",
    minutes=25,
    difficulty=3,
    reference=masked_row_softmax,
    properties=(
        Property("the row fills the block, and nothing lies between the rows", _draw(fills=True, ends=True), times=1),
        Property("the row is shorter than the block", _draw(), times=1),
        Property("other numbers between the rows stay as they are", _draw(gap=True), times=1),
        Property("the tensor ends with its last row", _draw(gap=True, ends=True), times=1),
        Property("all scores are near -200", _draw(gap=True, shift=-200.0), times=1),
        Property("all scores are near 200", _draw(shift=200.0), times=1),
    ),
    mistakes=(
        Mistake(
            "No mask at all",
            "Lanes at and beyond `length` read and write what belongs to others. Both tl.load and tl.store need "
            "mask=columns < length.",
            _rows(load=_block, store=_block),
        ),
        Mistake(
            "The load has no mask",
            "Lanes at and beyond `length` read the next row, or beyond the tensor. tl.load needs mask=columns < length "
            "and other=-inf.",
            _rows(load=_block),
        ),
        Mistake(
            "The store has no mask",
            "Lanes at and beyond `length` write into what lies behind the row. tl.store needs mask=columns < length.",
            _rows(store=_block),
        ),
        Mistake(
            "Hidden lanes count as 0",
            "A score of 0 has the weight exp(0 - maximum), and is in the sum. Load with other=-inf: exp(-inf) is 0. "
            "(Without `other` the interpreter gives 0, a GPU anything.)",
            _rows(other=0.0),
        ),
        Mistake(
            "Hidden lanes count as 0 in the maximum",
            "The sum leaves them out, but the maximum is then at least 0. If all scores are far below, every power is "
            "0, and the sum too. Load with other=-inf.",
            _rows(other=0.0, mask_sum=True),
        ),
        Mistake(
            "The mask lets one lane too many through",
            "The last column is length - 1: columns < length, not <=.",
            _rows(load=_one_more, store=_one_more),
        ),
        Mistake(
            "The load lets one lane too many through",
            "The last column is length - 1: columns < length, not <=.",
            _rows(load=_one_more),
        ),
        Mistake(
            "The mask hides the last column",
            "The last column is length - 1, and belongs to the row: columns < length.",
            _rows(load=lambda length, block: length - 1, store=lambda length, block: length - 1),
        ),
        Mistake(
            "The mask counts from the start of the tensor",
            "Only the first row is left. The mask asks for the column, not for the place in memory: columns < length.",
            _rows(from_start=True),
        ),
        Mistake(
            "The length in the place of the stride",
            "Row r begins at r * row_stride, for other numbers may lie between the rows.",
            _rows(stride=lambda row_stride, length: length),
        ),
        Mistake(
            "The maximum is not subtracted",
            "exp of a score far below 0 is 0 in float32, and exp of a large one is inf. Subtract the row's maximum.",
            _rows(maximum=lambda row: 0.0),
        ),
    ),
    hints=(
        "BLOCK is 16 and length is 13. What do lanes 13, 14 and 15 read? What do they write, and where?",
        "inside = columns < length. The load takes mask=inside and a value for the lanes outside that changes neither "
        "the maximum nor the sum of powers. The store takes mask=inside.",
        "A neighbour: the product of each row, in the same form. 1 changes no product.\n"
        "  inside = columns < length\n"
        "  x = tl.load(numbers + row * row_stride + columns, mask=inside, other=1.0)\n"
        "  tl.store(doubled + row * row_stride + columns, 2 * x, mask=inside)",
    ),
)
