"""Which weights go, and what it saves: the mask of one trained matrix, its bytes and its time. (notebook 07)

Choose a matrix of the teacher, what a weight is judged by, what goes as a whole, and how much goes. Half of the weights
gone makes a file of compressed sparse rows larger than the dense one, and the dense kernel multiplies by zeros as fast
as by anything else. A smaller file needs places that cost little (a bit each, or one for a block); a shorter time
needs a kernel that can leave something out, or a matrix that is smaller.

What the numbers are, and where the times come from, stands in `mask_numbers`.

NOTE a matrix without some of its rows does the same only where what follows does without these outputs: a neuron of
the layer `expand` can go with its column of `contract`; a row of `contract` is a dimension that all blocks share.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from ipywidgets import HBox, IntSlider, Label, Layout, ToggleButtons, Widget
from jaxtyping import Bool, Float
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from effnlp_lessons.pruning.masks import block_sums
from effnlp_lessons.widgets.mask_numbers import (
    BYTES,
    KERNELS,
    MAGNITUDE,
    NONE,
    OTHER,
    RANDOM,
    SCATTERED,
    STRUCTURES,
    TWO_OF_FOUR,
    WITH_INPUT,
    Matrix,
    Times,
    form_bytes,
    kernel_times,
    mask_at,
    ranks,
    recorded_times,
    scores_of,
    trained_matrices,
    two_of_four,
)
from effnlp_lessons.widgets.mask_picture import CELLS, LABELS, LENS, MATRIX, MaskPicture, area_of, cell_of, pixels_of
from effnlp_lessons.widgets.painted_image import PaintedImage
from effnlp_lessons.widgets.picture import Explorer, in_turn

MOST_SPARSE = 99  # per cent
STEP = 32  # weights that an arrow key moves the frame
KEYS = {"ArrowLeft": (0, -STEP), "ArrowRight": (0, STEP), "ArrowUp": (-STEP, 0), "ArrowDown": (STEP, 0)}
TILE, WIDEST = 32, 32 * CELLS


def check_matrices(matrices: Mapping[str, Matrix], norms: Mapping[str, Tensor] | None) -> None:
    """Raise a ValueError unless blocks of 32 x 32 tile every matrix, and all numbers are finite and fit together."""
    if not matrices:
        raise ValueError("matrices must hold at least one matrix, got none")
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or not matrix.numel() or any(side % TILE or side > WIDEST for side in matrix.shape):
            raise ValueError(
                f"matrices[{name!r}] must have sides of a multiple of {TILE} and at most {WIDEST:,}, "
                f"got shape {tuple(matrix.shape)}"
            )
        if not torch.isfinite(matrix).all() or not matrix.any():
            raise ValueError(f"matrices[{name!r}] must be finite and not all 0")
        if norms is None:
            continue
        if name not in norms or norms[name].shape != matrix.shape[1:]:
            raise ValueError(f"norms must have one number for each of the {matrix.shape[1]} inputs of {name!r}")
        if not torch.isfinite(norms[name]).all() or (norms[name] < 0).any():
            raise ValueError(f"norms[{name!r}] must be finite and not below 0")


class MaskExplorer(Explorer):
    """Choose matrix, criterion, structure and sparsity; see the mask, its bytes and its time.

    The frame on the matrix shows what is magnified beside it: click or drag on the matrix, or reach it with the Tab key
    and use the arrows; space puts the frame back into the upper left corner. 2:4 removes half of the weights, neither
    more nor less: the slider then stands at 50 and does not move.

    Args:
        matrices: float (outputs, inputs) by name, sides of a multiple of 32; None: five of the teacher.
        norms: of the inputs of each matrix, ||x_j||; without them the criterion "magnitude x input" is not offered.
            Only with `matrices`; the teacher's are computed here, on 16 reviews.
        times: {"384 x 384": {form: time relative to dense}}, the forms as `studies.pruning_costs` names them; None:
            the recorded ones, none if the study is not recorded.
        matrix: the name of the one shown first; None: the first.
        criterion: "magnitude", "random" or "magnitude x input".
        structure: "unstructured", "2:4", "blocks 32 x 32" or "rows".
        sparsity: per cent of the weights, blocks or rows that go, 0 to 99.

    Raises:
        ValueError: a choice that is not offered; matrices or norms that `check_matrices` refuses.
    """

    size = (9.0, 4.2)
    scene = ("matrix",)

    def __init__(
        self,
        matrices: Mapping[str, Matrix] | None = None,
        norms: Mapping[str, Float[Tensor, " columns"]] | None = None,
        times: Times | None = None,
        matrix: str | None = None,
        criterion: str = MAGNITUDE,
        structure: str = SCATTERED,
        sparsity: int = 50,
    ) -> None:
        if matrices is None:
            if norms is not None:
                raise ValueError("norms must be given together with matrices")
            matrices, norms = trained_matrices()
        check_matrices(matrices, norms)
        self._matrices = {name: weights.detach().to(torch.float32, copy=True) for name, weights in matrices.items()}
        self._norms = None if norms is None else {name: norms[name].float() for name in matrices}
        self._times = recorded_times() if times is None else times
        matrix = next(iter(self._matrices)) if matrix is None else matrix
        criteria = (MAGNITUDE, RANDOM) if norms is None else (MAGNITUDE, RANDOM, WITH_INPUT)
        for name, value, allowed in (
            ("matrix", matrix, tuple(self._matrices)),
            ("criterion", criterion, criteria),
            ("structure", structure, STRUCTURES),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if sparsity not in range(MOST_SPARSE + 1):
            raise ValueError(f"sparsity must be whole per cent from 0 to {MOST_SPARSE}, got {sparsity!r}")
        self._squares = {name: weights.square() for name, weights in self._matrices.items()}
        self._sums = {name: float(squares.sum(dtype=torch.float64)) for name, squares in self._squares.items()}
        self._ranks = functools.lru_cache(maxsize=64)(self._sort)
        self._two_of_four = functools.lru_cache(maxsize=16)(self._choose_two_of_four)
        self._corner = (0, 0)  # row and column of the frame
        self._picture = MaskPicture()
        super().__init__(
            {
                "matrix": _buttons(tuple(self._matrices), matrix),
                "criterion": _buttons(criteria, criterion),
                "structure": _buttons(STRUCTURES, structure),
                "sparsity": IntSlider(
                    50 if structure == TWO_OF_FOUR else sparsity,
                    0,
                    MOST_SPARSE,
                    description="sparsity (%)",
                    style={"description_width": "initial"},
                    layout=Layout(width="420px", margin="2px 20px 2px 2px"),
                ),
            }
        )

    def arrange(self) -> list[Widget]:
        wrap = Layout(flex_flow="row wrap")
        named = [
            [Label(words, layout=Layout(width="72px")), self.controls[name]]
            for name, words in (("matrix", "matrix"), ("criterion", "judged by"), ("structure", "goes as"))
        ]
        return [*(HBox(row, layout=wrap) for row in named), HBox([self.controls["sparsity"]], layout=wrap)]

    def make_image(self, width: int, height: int) -> PaintedImage:
        label = "the frame on the matrix: the arrows move it, space puts it into the upper left corner"
        return PaintedImage(width, height, label, self.act)

    def idle(self, numbers: dict[str, Any]) -> set[str]:
        return {"sparsity"} if numbers["structure"] == TWO_OF_FOUR else set()

    def settle(self, name: str) -> None:
        if self.controls["structure"].value == TWO_OF_FOUR:
            self.controls["sparsity"].value = 50

    # ------------------------------------------------------------------------ moving the frame

    @in_turn
    def act(self, events: list[list[Any]]) -> None:
        """What happened on the matrix, as `PaintedImage` reports it."""
        shape = tuple(self._matrices[self.controls["matrix"].value].shape)
        scale = pixels_of(shape) / cell_of(shape)
        row, column = self._numbers["corner"]
        for kind, *what in events:
            if kind in ("down", "move"):  # the middle of the frame goes to the pointer
                row, column = ((what[i] - MATRIX[i]) / scale - min(LENS, shape[1 - i]) / 2 for i in (1, 0))
            elif kind == "key":
                down, right = KEYS.get(what[0], (-row, -column))
                row, column = row + down, column + right
            row, column = _inside(row, column, shape)
        self._corner = row, column
        self.refresh()
        self.image.spoken = self._speak()

    # ------------------------------------------------------------------------ numbers

    def _scores(self, matrix: str, criterion: str) -> Matrix:
        return scores_of(self._matrices[matrix], criterion, None if self._norms is None else self._norms[matrix])

    def _sort(self, matrix: str, criterion: str, structure: str) -> Tensor:
        return ranks(self._scores(matrix, criterion), structure)

    def _choose_two_of_four(self, matrix: str, criterion: str) -> Tensor:
        return two_of_four(self._scores(matrix, criterion))

    def mask(self, matrix: str, criterion: str, structure: str, sparsity: int) -> Bool[Tensor, "rows columns"]:
        """The mask, True = kept; `sparsity` in per cent, of no effect on 2:4."""
        if structure == TWO_OF_FOUR:
            return self._two_of_four(matrix, criterion).clone()
        shape = tuple(self._matrices[matrix].shape)
        return mask_at(self._ranks(matrix, criterion, structure), structure, sparsity, shape)

    def numbers(self, matrix: str, criterion: str, structure: str, sparsity: int) -> dict[str, Any]:
        """What is kept, where, and what it costs.

        "kept" of "weights" are kept, a share "left"; "squares" is their share of the sum of squared weights. "cells":
        share kept of every cell of "cell" x "cell" weights; "part": bool, the 64 x 64 weights (fewer in a smaller
        matrix) from "corner" (row, column). "dense bytes" of the matrix; "bytes" and "time" by form, relative to the
        dense matrix, None where there is none; "how": for each of both and each form whether the number is a closed
        form, recorded, interpolated, not recorded, or not for this mask.
        """
        weights = self._matrices[matrix]
        shape = tuple(weights.shape)
        mask = self.mask(matrix, criterion, structure, sparsity)
        kept, dense = int(mask.sum()), 4 * mask.numel()
        sizes = form_bytes(shape, structure, sparsity, kept)
        times = kernel_times(self._times, shape, structure, sparsity)
        cell = cell_of(shape)
        row, column = _inside(*self._corner, shape)
        squares = float((self._squares[matrix] * mask).sum(dtype=torch.float64))
        return {
            "matrix": matrix,
            "criterion": criterion,
            "structure": structure,
            "sparsity": sparsity,
            "shape": shape,
            "weights": mask.numel(),
            "kept": kept,
            "left": kept / mask.numel(),
            "squares": squares / self._sums[matrix],
            "cell": cell,
            "cells": (block_sums(mask.float(), (cell, cell)) / cell**2).numpy(),
            "corner": (row, column),
            "part": mask[row : row + LENS, column : column + LENS].numpy(),
            "dense bytes": dense,
            "bytes": {form: None if sizes[form] is None else sizes[form] / dense for form in BYTES},
            "time": {kernel: times[kernel][0] for kernel in KERNELS},
            "how": {
                "bytes": {form: OTHER if sizes[form] is None else "closed form" for form in BYTES},
                "time": {kernel: times[kernel][1] for kernel in KERNELS},
            },
        }

    # ------------------------------------------------------------------------ picture and words

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        self.image.area = area_of(numbers["shape"])
        return self._picture.draw_static(figure, numbers)

    def draw(self, numbers: dict[str, Any]) -> None:
        (row, column), (high, wide) = numbers["corner"], numbers["part"].shape
        words = {
            "left": _percent(numbers["left"]),
            "squares": _percent(numbers["squares"]),
            "darkest": _percent(float(numbers["cells"].max())),
            "rows": f"{row} to {row + high - 1}",
            "columns": f"{column} to {column + wide - 1}",
            "kept": f"{int(numbers['part'].sum()):,} of {high * wide:,}",
        }
        self._picture.draw(numbers, words)

    def summary(self, numbers: dict[str, Any]) -> str:
        fixed = " (2:4 is always half)" if numbers["structure"] == TWO_OF_FOUR else ""
        return (
            f"{_title(numbers)}, {numbers['structure']}, by {numbers['criterion']}: {numbers['kept']:,} of "
            f"{numbers['weights']:,} weights left, {_percent(numbers['left'])}{fixed}, with "
            f"{_percent(numbers['squares'])} of the squared weight. Of {numbers['dense bytes']:,} dense bytes: "
            f"{_sizes_in_words(numbers)}. {_times_in_words(numbers)}"
        )

    def describe(self, numbers: dict[str, Any]) -> str:
        (row, column), (high, wide) = numbers["corner"], numbers["part"].shape
        return (
            f"Left: the matrix in cells of {numbers['cell']} by {numbers['cell']} weights, the darker the more are "
            f"kept, at most {_percent(float(numbers['cells'].max()))}. Middle: rows {row} to {row + high - 1} and "
            f"columns {column} to {column + wide - 1} weight by weight, {int(numbers['part'].sum()):,} of "
            f"{high * wide:,} kept. Right: bars of bytes and of time, with a line at 100 %, the dense matrix. "
            f"{self.summary(numbers)}"
        )

    def _speak(self) -> str:
        """Where the frame is and what it holds, for a screen reader."""
        (row, column), part = self._numbers["corner"], self._numbers["part"]
        return f"Row {row}, column {column}: {int(part.sum()):,} of {part.size:,} kept."


def _inside(row: float, column: float, shape: tuple[int, int]) -> tuple[int, int]:
    """The nearest place of the frame's corner, in whole tiles of 32, at which the frame lies on the matrix."""
    return tuple(
        min(max(TILE * round(place / TILE), 0), max(side - LENS, 0))
        for place, side in zip((row, column), shape, strict=True)
    )


def _title(numbers: dict[str, Any]) -> str:
    return f"{numbers['matrix']} ({numbers['shape'][0]} x {numbers['shape'][1]})"


def _percent(share: float) -> str:
    """A share in per cent with one digit; 100 only if it is all."""
    text = f"{100 * share:.1f}"
    return f"{text if text != '100.0' or share == 1 else '99.9'} %"


def _sizes_in_words(numbers: dict[str, Any]) -> str:
    shown = ((name, value) for name, value in numbers["bytes"].items() if value is not None)
    return "; ".join(f"{LABELS[name]} {100 * value:,.1f} %" for name, value in shown)


def _times_in_words(numbers: dict[str, Any]) -> str:
    how = numbers["how"]["time"]
    parts = [
        f"{LABELS[kernel]} " + (f"{100 * value:,.0f} % ({how[kernel]})" if value is not None else NONE)
        for kernel, value in numbers["time"].items()
        if how[kernel] != OTHER
    ]
    return f"Time against dense: {'; '.join(parts)}."


def _buttons(options: tuple[str, ...], value: str) -> ToggleButtons:
    style = {"button_width": "auto", "description_width": "initial"}
    return ToggleButtons(options=options, value=value, style=style, layout=Layout(width="max-content", margin="2px"))
