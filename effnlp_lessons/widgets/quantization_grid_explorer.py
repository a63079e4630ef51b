"""One weight far from the others: what does it do to the grid that it shares? (notebook 03)

A grid of 2^k levels reaches from the smallest to the largest of the numbers that share it (Jacob et al. 2017, arXiv
1712.05877, sec. 2.1). Drag one weight of a trained matrix away from the others: the step S grows with it, and the
levels leave the place where the weights are. How many weights suffer is the granularity: all of the tensor, one row
(output channel), or one group of consecutive inputs of a row (`effnlp_lessons.quantization.quantizers`).

The signal to noise is taken over the whole matrix, over the other weights of the dragged one's block (with it, the
block's signal would be little else), and over all other blocks. What it is, and which error is rounding and which is
clipping, stands in `quantization_grid_numbers`.

NOTE "range" is the plainest way to clip: the grid reaches only this share of the way from 0 to each end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from ipywidgets import FloatSlider, HBox, IntSlider, Layout, ToggleButtons
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from effnlp_lessons.quantization.quantizers import LinearQuantizer, block_of, integer_range
from effnlp_lessons.widgets.painted_image import PaintedImage
from effnlp_lessons.widgets.picture import Explorer, in_turn
from effnlp_lessons.widgets.quantization_grid_numbers import Errors, bytes_on_disk, decibels, is_clipped, measure
from effnlp_lessons.widgets.quantization_grid_picture import AREA, FARTHEST, QuantizationGridPicture, multiple_at

Matrix = Float[Tensor, "rows columns"]

GRANULARITIES = {"tensor": "tensor", "row": "row", "group 128": 128, "group 64": 64}
KINDS = {"symmetric": True, "affine": False}
SHARES = (10, 100)  # per cent of the range
STEP = 0.1  # of the dragged weight, in multiples of the largest
KEYS = {"ArrowLeft": -STEP, "ArrowRight": STEP, "ArrowDown": -1.0, "ArrowUp": 1.0}


def trained_matrices() -> dict[str, Matrix]:
    """Four matrices of MiniLM-L6 as published, float32 (outputs, inputs)."""
    from effnlp_lessons.pretrained import load_minilm

    blocks = load_minilm().blocks
    layers = {
        "block 0 query": blocks[0].token_mixer.query,
        "block 0 value": blocks[0].token_mixer.value,
        "block 5 query": blocks[5].token_mixer.query,
        "block 0 contract": blocks[0].channel_mixer.contract,
    }
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}


def check_matrices(matrices: Mapping[str, Matrix]) -> None:
    """Raise a ValueError unless every matrix has two rows or more, groups of 128, and finite numbers, not all 0."""
    if not matrices:
        raise ValueError("matrices must hold at least one matrix, got none")
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or len(matrix) < 2 or not matrix.shape[1] or matrix.shape[1] % 128:
            raise ValueError(
                f"matrices[{name!r}] must have two rows or more and a multiple of 128 columns, "
                f"got shape {tuple(matrix.shape)}"
            )
        if not torch.isfinite(matrix).all() or not matrix.any():
            raise ValueError(f"matrices[{name!r}] must be finite and not all 0")


class QuantizationGridExplorer(Explorer):
    """Drag one weight of a trained matrix away from the others and see what becomes of the grids.

    The weight that moves is the one nearest to 0. It goes where the picture's upper axis is pressed, and follows the
    pointer. By keyboard on the picture: left and right move it a little, up and down by the largest weight, space puts
    it back. The slider does the same. Its place is a multiple of the largest weight as trained; at 0 it has its own
    value.

    Args:
        matrices: float (outputs, inputs) by name, or one matrix; None: four of MiniLM-L6.
        matrix: the name of the one shown first; None: the first.
        bits: k, 2 to 8.
        kind: "symmetric" or "affine".
        granularity: "tensor", "row", "group 128" or "group 64".
        share: per cent of the range that the grid reaches, 10 to 100.
        outlier: place of the moved weight in multiples of the largest, -8 to 8.

    Raises:
        ValueError: a choice that is not offered; matrices that `check_matrices` refuses.
    """

    size = (9.0, 5.5)
    scene = ("matrix",)

    def __init__(
        self,
        matrices: Mapping[str, Matrix] | Matrix | None = None,
        matrix: str | None = None,
        bits: int = 8,
        kind: str = "symmetric",
        granularity: str = "tensor",
        share: int = 100,
        outlier: float = 0.0,
    ) -> None:
        if matrices is None:
            matrices = trained_matrices()
        elif isinstance(matrices, Tensor):
            matrices = {"matrix": matrices}
        check_matrices(matrices)
        self._matrices = {name: weights.detach().to(torch.float32, copy=True) for name, weights in matrices.items()}
        matrix = next(iter(self._matrices)) if matrix is None else matrix
        for name, value, allowed in (
            ("matrix", matrix, tuple(self._matrices)),
            ("bits", bits, tuple(range(2, 9))),
            ("kind", kind, tuple(KINDS)),
            ("granularity", granularity, tuple(GRANULARITIES)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if share not in range(SHARES[0], SHARES[1] + 1):
            raise ValueError(f"share must be whole per cent from {SHARES[0]} to {SHARES[1]}, got {share!r}")
        if not -FARTHEST <= outlier <= FARTHEST:
            raise ValueError(f"outlier must be from -{FARTHEST} to {FARTHEST}, got {outlier!r}")
        self._largest = {name: weights.abs().max().item() for name, weights in self._matrices.items()}
        # how far from 0 the lower panels reach
        self._spread = {
            name: min(8 * weights.std().item(), self._largest[name]) for name, weights in self._matrices.items()
        }
        self._places = {
            name: divmod(int(weights.abs().argmin()), weights.shape[1]) for name, weights in self._matrices.items()
        }
        self._as_trained = functools.lru_cache(maxsize=32)(self._measure_as_trained)
        self._picture = QuantizationGridPicture()
        super().__init__(
            {
                "matrix": _buttons("matrix", tuple(self._matrices), matrix),
                "granularity": _buttons("one grid for each", tuple(GRANULARITIES), granularity),
                "kind": _buttons("grid", tuple(KINDS), kind),
                "bits": IntSlider(bits, 2, 8, description="bits", **_look("200px")),
                "share": IntSlider(share, *SHARES, description="range (%)", **_look("290px")),
                "outlier": FloatSlider(
                    outlier,
                    min=-FARTHEST,
                    max=FARTHEST,
                    step=STEP,
                    readout_format=".1f",
                    description="moved weight (x largest)",
                    **_look("380px"),
                ),
            }
        )

    def arrange(self) -> list[HBox]:
        name = self.controls
        rows = (
            (name["matrix"],),
            (name["granularity"], name["kind"]),
            (name["bits"], name["share"], name["outlier"]),
        )
        return [HBox(row, layout=Layout(flex_flow="row wrap")) for row in rows]

    def make_image(self, width: int, height: int) -> PaintedImage:
        label = "one weight on the axis: left and right move it a little, up and down far, space puts it back"
        return PaintedImage(width, height, label, self.act)

    # ------------------------------------------------------------------------ moving the weight

    @in_turn
    def act(self, events: list[list[Any]]) -> None:
        """What happened on the upper axis, as `PaintedImage` reports it."""
        place = self.controls["outlier"].value
        for kind, *what in events:
            if kind in ("down", "move"):
                place = multiple_at(what[0])
            elif kind == "key":
                place = place + KEYS[what[0]] if what[0] in KEYS else 0.0
            place = min(max(round(place / STEP) * STEP, -FARTHEST), FARTHEST)
        with self.still():
            self.controls["outlier"].value = round(place, 1)
        self.refresh()
        self.image.spoken = self._speak()

    # ------------------------------------------------------------------------ numbers

    def _measure_as_trained(self, matrix: str, bits: int, kind: str, granularity: str, share: int) -> Errors:
        """The errors with no weight moved: what the blocks keep while the weight of another block moves."""
        return measure(self._matrices[matrix], bits, GRANULARITIES[granularity], KINDS[kind], share / 100)

    def numbers(
        self, matrix: str, granularity: str, kind: str, bits: int, share: int, outlier: float
    ) -> dict[str, Any]:
        """The grids of the moved weight and of weights elsewhere, the errors, the bytes.

        `held` and `elsewhere` have the weights of the block that holds the moved weight, and of a block (or, on a
        grid of the whole tensor, of a row) half the matrix away; "scale", "zero_point", "levels" (real numbers),
        "used" (bool, one a level), "count" (of levels in use). `sqnr` in dB over "matrix", "rest" (the other weights
        of the block) and "others" (all other blocks; None if there is none). `mse`, `rounding` and `clipping` are
        mean squared errors over the matrix, `held_mse` over the block.
        """
        weights, (row, column) = self._matrices[matrix], self._places[matrix]
        own, symmetric = float(weights[row, column]), KINDS[kind]
        # the block that holds the moved weight
        block = block_of(tuple(weights.shape), GRANULARITIES[granularity])
        i, j = row // block[0], column // block[1]
        inputs = slice(j * block[1], (j + 1) * block[1])
        held = weights[i * block[0] : (i + 1) * block[0], inputs].clone()
        inner = row % block[0], column % block[1]
        if outlier:
            held[inner] = outlier * self._largest[matrix]
        value = float(held[inner])
        now = measure(held, bits, "tensor", symmetric, share / 100)
        signal, rounding, clipping = (float(part[0, 0]) for part in (now.signal, now.rounding, now.clipping))
        scale, zero_point = now.quantized.scale[0, 0], now.quantized.zero_point[0, 0]
        quantizer = LinearQuantizer(scale, zero_point, *integer_range(bits, symmetric))
        lands = quantizer.dequantize(now.quantized.codes[inner])
        own_error = float((lands - held[inner]).square())
        rest = signal - float(held[inner].square()), max(rounding + clipping - own_error, 0.0)
        # all other blocks, which do not change with it, and one of them half the matrix away
        elsewhere = (row + len(weights) // 2) % len(weights)
        away, away_quantizer = weights[elsewhere, inputs], quantizer
        others, grids = (0.0, 0.0, 0.0, 0), 1
        if granularity != "tensor":
            trained = self._as_trained(matrix, bits, kind, granularity, share)
            others, grids = trained.without(i, j), trained.signal.size
            own_grid = trained.quantized.scale[elsewhere, j], trained.quantized.zero_point[elsewhere, j]
            away_quantizer = LinearQuantizer(*own_grid, *integer_range(bits, symmetric))
        total = others[1] + others[2] + rounding + clipping
        return {
            "matrix": matrix,
            "shape": tuple(weights.shape),
            "granularity": granularity,
            "kind": kind,
            "bits": bits,
            "share": share,
            "largest": self._largest[matrix],
            "spread": self._spread[matrix],
            "weight": (row, column),
            "outlier": outlier,
            "own": own,
            "value": value,
            "lands": float(lands),
            "cut": bool(is_clipped(held[inner], scale, zero_point, bits, symmetric)),
            "block": block,
            "grids": grids,
            "held": _grid(held.flatten(), now.quantized.codes.flatten(), quantizer),
            "elsewhere": _grid(away, away_quantizer.quantize(away), away_quantizer),
            "elsewhere_row": elsewhere,
            "first_input": inputs.start,
            "sqnr": {
                "matrix": decibels(others[0] + signal, total),
                "rest": decibels(*rest),
                "others": decibels(others[0], others[1] + others[2]) if grids > 1 else None,
            },
            "mse": total / weights.numel(),
            "held_mse": (rounding + clipping) / held.numel(),
            "rounding": (others[1] + rounding) / weights.numel(),
            "clipping": (others[2] + clipping) / weights.numel(),
            "clipped": others[3] + int(now.clipped[0, 0]),
            "bytes": bytes_on_disk(weights.numel(), bits, grids, symmetric),
            "grid_bytes": bytes_on_disk(0, bits, grids, symmetric),
            "float_bytes": 4 * weights.numel(),
        }

    # ------------------------------------------------------------------------ picture and words

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        self.image.area = AREA
        return self._picture.draw_static(figure, numbers, self._matrices[numbers["matrix"]])

    def draw(self, numbers: dict[str, Any]) -> None:
        self._picture.draw(
            numbers,
            {
                "weight": f"Now {_weight(numbers)}",
                "held": _levels(numbers, "held"),
                "elsewhere": _levels(numbers, "elsewhere"),
            },
        )

    def summary(self, numbers: dict[str, Any]) -> str:
        ratios, error = numbers["sqnr"], numbers["mse"]
        others = f", of all other blocks {_decibels(ratios['others'])}" if ratios["others"] is not None else ""
        parts = (
            f"rounding {numbers['rounding'] / error:.1%}, clipping {numbers['clipping'] / error:.1%}"
            if error
            else "no error"
        ).replace("%", " %")
        return " ".join(
            (
                f"{_title(numbers)}.",
                f"Moved weight (row {numbers['weight'][0]}, input {numbers['weight'][1]}): {_weight(numbers)}.",
                f"Its grid, {_levels(numbers, 'held')}. Elsewhere, {_levels(numbers, 'elsewhere')}.",
                f"Signal to noise of the matrix {_decibels(ratios['matrix'])}, of the other weights of the moved "
                f"weight's block {_decibels(ratios['rest'])}{others}.",
                f"Mean squared error {error:.3g} ({parts}), in the block {numbers['held_mse']:.3g}; "
                f"{numbers['clipped']:,} weight{'s' * (numbers['clipped'] != 1)} clipped.",
                f"{numbers['bytes']:,} bytes, {numbers['grid_bytes']:,} of them for grids, against "
                f"{numbers['float_bytes']:,} in float32.",
            )
        )

    def describe(self, numbers: dict[str, Any]) -> str:
        return (
            "Above: an axis with the histogram of all weights, the moved weight, and the levels of its grid and of a "
            "grid elsewhere. Below it, closer, the histograms of both blocks with their levels. Right: bars of the "
            f"signal to noise, of rounding and clipping error, and of bytes. {self.summary(numbers)}"
        )

    def _speak(self) -> str:
        """The moved weight and its effect, for a screen reader."""
        now = self._numbers
        ratios = f"matrix {_decibels(now['sqnr']['matrix'])}, rest of its block {_decibels(now['sqnr']['rest'])}"
        return f"Weight {_weight(now)}. Step {now['held']['scale']:.3g}. Signal to noise: {ratios}."


def _grid(weights: Tensor, codes: Tensor, quantizer: LinearQuantizer) -> dict[str, Any]:
    """Weights with their grid, and which of its levels they use."""
    every = torch.arange(quantizer.q_min, quantizer.q_max + 1, dtype=torch.int32)
    # read as uint8, negative codes are 256 higher: no wider copy of all of them is made to count
    used = torch.bincount(codes.view(torch.uint8), minlength=256)[every % 256] > 0
    return {
        "weights": weights.numpy(),
        "scale": float(quantizer.scale),
        "zero_point": int(quantizer.zero_point),
        "levels": quantizer.dequantize(every).numpy(),
        "used": used.numpy(),
        "count": int(used.sum()),
    }


def _title(numbers: dict[str, Any]) -> str:
    rows, columns = numbers["shape"]
    grids = f"{numbers['grids']:,} grids, one a {numbers['granularity'].split()[0]}" if numbers["grids"] > 1 else ""
    share = f", over {numbers['share']} % of the range" if numbers["share"] < 100 else ""
    return (
        f"{numbers['matrix'].capitalize()} ({rows:,} x {columns:,}): {grids or 'one grid for the tensor'}, "
        f"{numbers['bits']} bits, {numbers['kind']}{share}"
    )


def _weight(numbers: dict[str, Any]) -> str:
    """Where the moved weight is, and the level it goes to."""
    where = f"{numbers['outlier']:.1f} x largest" if numbers["outlier"] else "as trained"
    kept = "clipped to" if numbers["cut"] else "stored as"
    return f"{_no_minus_zero(numbers['value'])} ({where}), {kept} {_no_minus_zero(numbers['lands'])}"


def _no_minus_zero(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"


def _levels(numbers: dict[str, Any], part: str) -> str:
    """Which weights a lower panel shows, and their grid."""
    grid, first, size = numbers[part], numbers["first_input"], numbers["block"][1]
    row = numbers["weight"][0] if part == "held" else numbers["elsewhere_row"]
    whose = "all weights" if part == "held" and numbers["granularity"] == "tensor" else f"row {row}"
    if numbers["granularity"].startswith("group"):
        whose += f", inputs {first:,} to {first + size - 1:,}"
    used = f"{grid['count']} of {len(grid['levels'])} levels used"
    return f"{whose}: S = {grid['scale']:.3g}, Z = {grid['zero_point']}, {used}"


def _decibels(ratio: float) -> str:
    return "exact" if ratio == math.inf else f"{max(ratio, 0):.1f} dB"


def _look(width: str) -> dict[str, Any]:
    return {"layout": Layout(width=width, margin="2px 8px 2px 0"), "style": {"description_width": "initial"}}


def _buttons(description: str, options: tuple[str, ...], value: str) -> ToggleButtons:
    return ToggleButtons(
        options=options,
        value=value,
        description=description,
        style={"button_width": "auto", "description_width": "initial"},
        layout=Layout(width="max-content", max_width="100%", margin="2px 16px 2px 0"),
    )
