"""The numbers of `mask_explorer`: scores and masks, the bytes of every form, the time against the dense matrix.

Which weights go is decided by unit: a weight, a row, a block of 32 x 32, the lowest sums of scores first
(`pruning.masks.keep_top`), or two of every four neighbours in a row (`n_of_m`). The criteria:

    magnitude              |w|
    random                 uniform numbers, seeded
    magnitude x input      |w_ij| ||x_j||, x_j the values of input j at all tokens (Wanda, Sun et al. 2023, arXiv
                           2306.11695)

Bytes are closed forms (`pruning.storage.matrix_bytes`, `pruning_costs.bsr_bytes`). Times are those that the study
`pruning_costs` recorded, relative to the dense matrix in the same run. Between two recorded sparsities they are joined
on log-log axes of time and share kept; outside there is none.

NOTE Wanda compares the weights of one row with each other; here all of a matrix compete, under every criterion.
NOTE a smaller dense matrix, and zeros in a dense kernel, with nothing removed are the dense matrix itself: time 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnlp_lessons.pruning.masks import block_sums, n_of_m, spread_blocks
from effnlp_lessons.pruning.storage import matrix_bytes
from effnlp_lessons.studies import pruning_costs
from effnlp_lessons.studies.runner import load_results

Matrix = Float[Tensor, "rows columns"]
Times = Mapping[str, Mapping[str, float]]

MAGNITUDE, RANDOM, WITH_INPUT = "magnitude", "random", "magnitude x input"
SCATTERED, TWO_OF_FOUR, BLOCKS, ROWS = "unstructured", "2:4", "blocks 32 x 32", "rows"
STRUCTURES = (SCATTERED, TWO_OF_FOUR, BLOCKS, ROWS)
BLOCK = pruning_costs.BLOCK
SEED = 0
SENTENCES = 16
# what is stored, and what is run: in the order of the bars
BYTES = ("dense", "csr64", "csr", "bit mask", "2:4", "blocks", "smaller dense")
KERNELS = ("dense kernel", "CSR kernel", "block kernel", "smaller dense")
RECORDED, JOINED, NONE, OTHER = "recorded", "interpolated", "not recorded", "not for this mask"

LAYERS = {
    "block 0 query": (0, "token_mixer.query"),
    "block 0 expand": (0, "channel_mixer.expand"),
    "block 0 contract": (0, "channel_mixer.contract"),
    "block 5 query": (5, "token_mixer.query"),
    "block 5 expand": (5, "channel_mixer.expand"),
}


# ------------------------------------------------------------------------------------------- the matrices


def trained_matrices() -> tuple[dict[str, Matrix], dict[str, Float[Tensor, " columns"]]]:
    """Matrices of the teacher, float32 (outputs, inputs), and the norms of their inputs at `SENTENCES` reviews."""
    from effnlp_lessons.classification import ReviewExamples
    from effnlp_lessons.datasets import reviews
    from effnlp_lessons.pretrained import load_teacher

    teacher = load_teacher()
    blocks = teacher.encoder.blocks
    layers = {name: blocks[number].get_submodule(place) for name, (number, place) in LAYERS.items()}
    examples = ReviewExamples(reviews.load_reviews().subset("train"), SENTENCES)
    ids, padding, _ = examples.batch(list(range(SENTENCES)))
    norms = input_norms(layers, lambda: teacher(ids, padding), padding)
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}, norms


def input_norms(
    layers: Mapping[str, nn.Module], call: Callable[[], object], tokens: Bool[Tensor, "batch length"]
) -> dict[str, Float[Tensor, " columns"]]:
    """||x_j|| of every input of `layers` during `call()`, over the places where `tokens` is True."""
    norms: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            norms[name] = args[0][tokens].norm(dim=0)

        return keep

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return {name: norms[name].clone() for name in layers}


# --------------------------------------------------------------------------------------- which weights go


def scores_of(weights: Matrix, criterion: str, norms: Float[Tensor, " columns"] | None = None) -> Matrix:
    """The scores of a criterion, all >= 0.

    Raises:
        ValueError: another criterion, or `WITH_INPUT` without norms.
    """
    if criterion == MAGNITUDE:
        return weights.abs()
    if criterion == RANDOM:
        return torch.rand(weights.shape, generator=torch.Generator().manual_seed(SEED))
    if criterion == WITH_INPUT and norms is not None:
        return weights.abs() * norms
    raise ValueError(f"criterion must be one that these matrices have, got {criterion!r}")


def unit_of(structure: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of what goes as a whole."""
    return {SCATTERED: (1, 1), BLOCKS: BLOCK, ROWS: (1, shape[1])}[structure]


def ranks(scores: Matrix, structure: str) -> Int[Tensor, "row_units column_units"]:
    """The place of every unit in the order in which they go, from 0; of equal ones the first goes first.

    `keep_top(sums, rate)` is `ranks >= round(rate * units)`: sorted once, every sparsity is one comparison.
    """
    sums = block_sums(scores, unit_of(structure, tuple(scores.shape)))
    order = sums.flatten().argsort(stable=True)
    places = torch.empty(sums.numel(), dtype=torch.int32)
    places[order] = torch.arange(sums.numel(), dtype=torch.int32)
    return places.view(sums.shape)


def mask_at(
    places: Int[Tensor, "row_units column_units"], structure: str, sparsity: int, shape: tuple[int, int]
) -> Bool[Tensor, "rows columns"]:
    """The mask of units whose rank is not among the lowest `sparsity` per cent, bool of `shape`."""
    kept = places >= round(sparsity / 100 * places.numel())
    return kept if structure == SCATTERED else spread_blocks(kept, unit_of(structure, shape))


def two_of_four(scores: Matrix) -> Bool[Tensor, "rows columns"]:
    """The 2:4 mask."""
    return n_of_m(scores, 2, 4)


# --------------------------------------------------------------------------------------------- what it costs


def form_bytes(shape: tuple[int, int], structure: str, sparsity: int, kept: int) -> dict[str, int | None]:
    """Bytes of the pruned matrix in every form of `BYTES`, float32; None where the form is not for this mask."""
    rows, columns = shape
    found: dict[str, int | None] = {
        form: matrix_bytes(form, rows, columns, kept) for form in ("dense", "csr64", "csr", "bit mask")
    }
    found["2:4"] = matrix_bytes("2:4", rows, columns, kept) if structure == TWO_OF_FOUR else None
    found["blocks"] = pruning_costs.bsr_bytes(rows, columns, sparsity / 100) if structure == BLOCKS else None
    found["smaller dense"] = matrix_bytes("dense", kept // columns, columns, kept) if structure == ROWS else None
    return found


def recorded_times() -> dict[str, dict[str, float]]:
    """{"384 x 384": {form: time relative to dense}} of the study, medians of its runs; empty if not recorded."""
    try:
        summary = load_results("pruning_costs")
    except FileNotFoundError:
        return {}
    found: dict[str, dict[str, float]] = {}
    for what in summary["runs"][0]["seconds"]:
        runs = [run["seconds"][what] for run in summary["runs"]]
        dense = pruning_costs.DENSE
        found[what] = {form: median(run[form][0] / run[dense][0] for run in runs) for form in runs[0]}
    return found


def kernel_times(
    times: Times, shape: tuple[int, int], structure: str, sparsity: int
) -> dict[str, tuple[float | None, str]]:
    """For every name of `KERNELS`: time relative to the dense matrix, and whether that is recorded or interpolated.

    torch has no 2:4 kernel for a CPU: such a mask runs as zeros in the dense kernel. The CSR kernel was timed with
    scattered weights only.
    """
    recorded = times.get(f"{shape[0]} x {shape[1]}", {})
    names = {
        "dense kernel": (pruning_costs.zeros, STRUCTURES),
        "CSR kernel": (pruning_costs.csr, (SCATTERED,)),
        "block kernel": (pruning_costs.bsr, (BLOCKS,)),
        "smaller dense": (lambda zeros: pruning_costs.rows(1 - zeros), (ROWS,)),
    }
    found: dict[str, tuple[float | None, str]] = {}
    for kernel, (name, structures) in names.items():
        if structure not in structures:
            found[kernel] = None, OTHER
            continue
        points = {p: recorded[name(p / 100)] for p in range(100) if name(p / 100) in recorded}
        if points and kernel in ("dense kernel", "smaller dense"):
            points[0] = 1.0
        found[kernel] = joined(points, sparsity)
    return found


def joined(points: Mapping[int, float], sparsity: int) -> tuple[float | None, str]:
    """The value at a sparsity (per cent, below 100) from those at other ones, and which kind of value it is."""
    if sparsity in points:
        return points[sparsity], RECORDED
    below, above = [p for p in points if p < sparsity], [p for p in points if p > sparsity]
    if not below or not above:
        return None, NONE
    low, high = max(below), min(above)
    share = math.log((100 - low) / (100 - sparsity)) / math.log((100 - low) / (100 - high))
    return points[low] * (points[high] / points[low]) ** share, JOINED
