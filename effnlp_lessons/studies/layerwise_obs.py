"""Pruning the teacher in one shot, with no training after: by magnitude, by OBS's choice, by OBS with its update.

Layer-wise OBS (`pruning.layerwise_obs`) reads some training sentences, no labels, and answers two questions: which
weights go, and how the others are adjusted. Its masks are also tried on the weights as they were, which tells the two
answers apart. All methods prune the 36 matrices of the blocks; per matrix by the same share, except global magnitude.

A seed is a sample of calibration sentences. Magnitude reads none and has no randomness: it is measured once, in the run
of seed 0, and so is the teacher.

The relative errors ‖WX - W'X‖² / ‖WX‖² are of each layer on its own, X its inputs in the teacher. They are taken on
as many other training sentences as were calibrated on; for OBS also on those that it has seen.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.layers import block_linears, block_of_name
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.pruning.layerwise_obs import (
    Rate,
    calibration_batches,
    layer_hessians,
    output_error,
    prune_layerwise,
    sweep,
)
from effnlp_lessons.pruning.masks import (
    Masks,
    apply_masks_,
    global_masks,
    keep_top,
    local_masks,
    magnitudes,
    n_of_m,
    prunable,
)
from effnlp_lessons.studies.runner import Outcome, Study

LOCAL, GLOBAL = "magnitude, by layer", "magnitude, global"
CHOSEN, ADJUSTED = "OBS's choice, not adjusted", "OBS"
WAYS = (LOCAL, GLOBAL, CHOSEN, ADJUSTED)
SEEN = "OBS, on the sentences seen"
KINDS = ("query", "key", "value", "output", "expand", "contract")


def rate_of(word: str) -> Rate:
    """ "60" -> 0.6, per cent to remove; "2:4" -> (2, 4).

    Raises:
        ValueError: neither of the two.
    """
    try:
        if ":" in word:
            n, m = map(int, word.split(":"))
            return n, m
        return float(word) / 100
    except ValueError:
        raise ValueError(f'sparsity must be per cent or "n:m", got {word!r}') from None


def magnitude_masks(model: nn.Module, way: str, rate: Rate, names: tuple[str, ...]) -> Masks:
    """The masks of `LOCAL` or `GLOBAL`; n:m is a rule for every row, so `GLOBAL` has none.

    Raises:
        ValueError: another way, or n:m with `GLOBAL`.
    """
    scores = magnitudes(model, names)
    if way == LOCAL:
        if isinstance(rate, tuple):
            return {name: n_of_m(values, *rate) for name, values in scores.items()}
        return local_masks(scores, rate)
    if way != GLOBAL or isinstance(rate, tuple):
        raise ValueError(f"no masks by {way!r} at {rate}")
    return global_masks(scores, rate)


def without(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy with the masked weights at 0 and all others as they were."""
    new = copy.deepcopy(model)
    apply_masks_(new, masks)
    return new


def layer_errors(
    model: nn.Module,
    seen: list[list[int]],
    unseen: list[list[int]],
    rate: Rate,
    names: tuple[str, ...],
) -> dict[str, dict[str, list[float]]]:
    """{way: {kind of layer: relative errors, one a block}} for `LOCAL`, `CHOSEN`, `ADJUSTED` and `SEEN`."""
    fitted, other = (layer_hessians(model, calibration_batches(ids), names) for ids in (seen, unseen))
    errors: dict[str, dict[str, list[float]]] = {way: {} for way in (LOCAL, CHOSEN, ADJUSTED, SEEN)}
    for name, weight in prunable(model, names).items():
        weight, kind = weight.detach(), name.split(".")[-2]
        new, mask = sweep(weight, fitted[name], rate)
        small = n_of_m(weight.abs(), *rate) if isinstance(rate, tuple) else keep_top(weight.abs(), rate)
        pruned = {
            LOCAL: (weight * small, other),
            CHOSEN: (weight * mask, other),
            ADJUSTED: (new, other),
            SEEN: (new, fitted),
        }
        for way, (values, hessians) in pruned.items():
            errors[way].setdefault(kind, []).append(round(output_error(weight, values, hessians[name]), 4))
    return errors


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """One sample of calibration sentences.

    `setting`: sentences (to calibrate on), sparsities (words of `rate_of`), errors_at (one more such word, or
    None), blocks (how many are pruned, from the first), tested (how many test sentences).

    Numbers: "right" `{way: {sparsity: per cent of the test sentences right}}`, "teacher" the same of the teacher (both
    for magnitude and for the teacher only with seed 0), "tokens" that were calibrated on, and "errors" `{way: {kind of
    layer: one a block}}`.
    """
    data = reviews.load_reviews()
    train, tested = ReviewExamples(data.subset("train")), ReviewExamples(data.subset("test"), setting["tested"])
    order = torch.randperm(len(train.token_ids), generator=torch.Generator().manual_seed(seed))
    rows = order[: 2 * setting["sentences"]].tolist()
    seen, unseen = ([train.token_ids[row] for row in part] for part in (rows[::2], rows[1::2]))
    teacher, batches = load_teacher(), calibration_batches(seen)
    names = tuple(name for name in block_linears(teacher) if block_of_name(name) < setting["blocks"])

    def right(model: nn.Module) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return round(accuracy(model, tested), 2)

    found: dict[str, dict[str, float]] = {}
    for word in setting["sparsities"]:
        rate = rate_of(word)
        pruned, masks = prune_layerwise(teacher, batches, rate, names)
        found.setdefault(ADJUSTED, {})[word] = right(pruned)
        found.setdefault(CHOSEN, {})[word] = right(without(teacher, masks))
        ways = (LOCAL,) if isinstance(rate, tuple) else (LOCAL, GLOBAL)
        for way in ways if seed == 0 else ():
            found.setdefault(way, {})[word] = right(without(teacher, magnitude_masks(teacher, way, rate, names)))
    numbers: dict[str, Any] = {"right": found, "tokens": sum(map(len, seen))}
    if seed == 0:
        numbers["teacher"] = right(teacher)
    if setting["errors_at"]:
        numbers["errors"] = layer_errors(teacher, seen, unseen, rate_of(setting["errors_at"]), names)
    return Outcome(numbers)


# -------------------------------------------------------------------------------- reading a recorded summary


def accuracies(summary: dict[str, Any], way: str) -> dict[str, list[float]]:
    """Of a recorded summary: {sparsity: per cent of the test sentences right}, one a seed; of magnitude a single one.

    Raises:
        ValueError: another way.
    """
    if way not in WAYS:
        raise ValueError(f"way must be one of {WAYS}, got {way!r}")
    values: dict[str, list[float]] = {}
    for run in summary["runs"]:
        for word, right in run["right"].get(way, {}).items():
            values.setdefault(word, []).append(right)
    return values


def mean_errors(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of a recorded summary: {way: {kind of layer: mean relative error over blocks and seeds}}."""
    runs = [run["errors"] for run in summary["runs"] if "errors" in run]
    return {
        way: {kind: sum(sum(run[way][kind]) / len(run[way][kind]) for run in runs) / len(runs) for kind in runs[0][way]}
        for way in (runs[0] if runs else {})
    }


# a few seconds, for a notebook: three blocks of six
LIVE = {"sentences": 32, "sparsities": ["80"], "errors_at": None, "blocks": 3, "tested": 100}
STUDY = Study(
    name="layerwise_obs",
    question="With no training after, how much of the teacher can go: by magnitude, by OBS's choice, with its update?",
    run=run,
    recorded=(
        {
            "sentences": 256,
            "sparsities": ["50", "60", "70", "2:4"],
            "errors_at": "60",
            "blocks": 6,
            "tested": 2_000,
        },
    ),
    full=(
        {
            "sentences": 512,
            "sparsities": ["30", "40", "50", "60", "70", "80", "90", "2:4"],
            "errors_at": "60",
            "blocks": 6,
            "tested": 2_000,
        },
    ),
    seeds=(0, 1, 2),
    minutes=6,
)
