"""How many bits do the teacher's weights need, and how does that depend on who shares a grid and on its range?

Weight-only post-training quantization of the 36 linear layers in the blocks: no training, activations in float32.
There is nothing random in it, so a seed stands for text: seeds 0, 1 and 2 are three disjoint thirds of the 2,000 test
sentences. Every model is judged on each third, which shows how far a result depends on the sentences, and the summary
pools the thirds: per cent of all 2,000, and the difference to the teacher on the same sentences, each with its
standard error. Sizes are those of the files that `save_quantized` writes.

A model is described by bits, granularity, grid and ranges; optionally embeddings (their bits, by row) and layers
("all": pooler and head too).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effnlp_lessons.classification import ReviewExamples, logits_of
from effnlp_lessons.datasets import reviews
from effnlp_lessons.layers import block_linears, with_layers
from effnlp_lessons.measure import bytes_on_disk
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.quantization.nonuniform import lloyd_max, nearest_level, power_of_two_levels, quantile_levels
from effnlp_lessons.quantization.packing import quantized_bytes_on_disk
from effnlp_lessons.quantization.post_training import quantize_embeddings, quantize_linears
from effnlp_lessons.quantization.quantizers import RangeRule, min_max
from effnlp_lessons.quantization.ranges import aciq_gaussian, aciq_laplace, mean_squared_error, percentile
from effnlp_lessons.studies.runner import Outcome, Run, Study, load_results

SYMMETRIC, AFFINE = "symmetric", "affine"
LLOYD_MAX, POWERS, QUANTILES = "Lloyd-Max", "powers of two", "quantiles"
MIN_MAX, PERCENTILE, LEAST_ERROR, LAPLACE, GAUSSIAN = "min-max", "percentile", "least error", "Laplace", "Gaussian"
TENSOR, ROW, ALL = "tensor", "row", "all"
FLOAT = {"bits": 32}

Spec = dict[str, Any]


def spec(bits: int, granularity: str | int = ROW, grid: str = SYMMETRIC, ranges: str = MIN_MAX, **more: Any) -> Spec:
    """The description of one model; `more`: embeddings (bits), layers ("all")."""
    return {"bits": bits, "granularity": granularity, "grid": grid, "ranges": ranges} | more


def range_rule(ranges: str, bits: int, symmetric: bool) -> RangeRule:
    """The rule of that name: the percentile keeps 99.9 per cent on either side."""
    return {
        MIN_MAX: min_max,
        PERCENTILE: percentile(0.999),
        LEAST_ERROR: mean_squared_error(bits, symmetric),
        LAPLACE: aciq_laplace(bits),
        GAUSSIAN: aciq_gaussian(bits),
    }[ranges]


def levels_of(weight: torch.Tensor, bits: int, kind: str) -> torch.Tensor:
    """The non-uniform levels of that kind for one matrix."""
    if kind == POWERS:
        return power_of_two_levels(weight.abs().max().item(), bits)
    return lloyd_max(weight, bits)[0] if kind == LLOYD_MAX else quantile_levels(weight, bits)


def with_levels(model: nn.Module, bits: int, kind: str) -> nn.Module:
    """A copy whose block linears have non-uniform levels, one table a matrix, as float weights."""
    layers = {}
    for name in block_linears(model):
        old = model.get_submodule(name)
        weight = nearest_level(old.weight.detach(), levels_of(old.weight.detach(), bits, kind))
        layers[name] = nn.Linear(old.in_features, old.out_features)
        layers[name].load_state_dict({"weight": weight, "bias": old.bias})
    return with_layers(model, layers)


def build(model: nn.Module, wanted: Spec) -> nn.Module:
    """The model that a description means, from the teacher."""
    if wanted == FLOAT:
        return model
    bits, grid = wanted["bits"], wanted["grid"]
    if grid in (LLOYD_MAX, POWERS, QUANTILES):
        return with_levels(model, bits, grid)
    names, symmetric = block_linears(model), grid == SYMMETRIC
    if wanted.get("layers") == ALL:
        names = (*names, "encoder.pooler", "head")
    rule = range_rule(wanted["ranges"], bits, symmetric)
    quantized = quantize_linears(model, bits, wanted["granularity"], symmetric, rule, names)
    if "embeddings" in wanted:
        quantized = quantize_embeddings(quantized, wanted["embeddings"])
    return quantized


def noise(model: nn.Module, built: nn.Module) -> float:
    """10 log10(sum w^2 / sum (w - w_hat)^2) in dB, over the linear layers of all blocks together."""
    signal = error = 0.0
    for name in block_linears(model):
        weight = model.get_submodule(name).weight.detach().double()
        signal += weight.square().sum().item()
        error += (weight - built.get_submodule(name).weight.detach()).square().sum().item()
    return 10 * torch.log10(torch.tensor(signal / error, dtype=torch.float64)).item() if error else float("inf")


def size(built: nn.Module, wanted: Spec) -> int | None:
    """Bytes of the model's file; None for non-uniform levels, which have no file format here."""
    if wanted == FLOAT:
        return bytes_on_disk(built)
    if wanted["grid"] not in (SYMMETRIC, AFFINE):
        return None
    return quantized_bytes_on_disk(built)


@cache
def test_sentences() -> ReviewExamples:
    return ReviewExamples(reviews.load_reviews().subset("test"))


def third(seed: int, sentences: int | None = None) -> torch.Tensor:
    """The rows of the test sentences that a seed stands for; 0, 1, 2 share none and make up all of them.

    `sentences`: at most so many of them, for a small run.
    """
    if seed not in (0, 1, 2):
        raise ValueError(f"seed must be 0, 1 or 2: it names a third of the test sentences, got {seed}")
    order = torch.randperm(len(test_sentences().lengths), generator=torch.Generator().manual_seed(0))
    return order[seed::3][:sentences]


def right_answers(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Which of those test sentences the model gets right."""
    examples = test_sentences()
    logits = logits_of(model, [examples.token_ids[i] for i in rows.tolist()], 128)
    return logits.argmax(-1) == examples.labels[rows]


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Numbers: "sentences" (how many) and "results", one entry for each model of the setting.

    right: how many sentences are right; lost, won: how many the teacher alone gets right, and the model alone;
    signal to noise (dB; null for the teacher); bytes (null for non-uniform levels).
    """
    teacher, rows, results = load_teacher(), third(seed, setting.get("sentences")), []
    teacher_right = right_answers(teacher, rows)
    for wanted in setting["models"]:
        built = build(teacher, wanted)
        right = teacher_right if wanted == FLOAT else right_answers(built, rows)
        ratio = noise(teacher, built)
        results.append(
            {
                "model": wanted,
                "right": int(right.sum()),
                "lost": int((teacher_right & ~right).sum()),
                "won": int((right & ~teacher_right).sum()),
                "signal to noise": round(ratio, 2) if ratio < float("inf") else None,
                "bytes": size(built, wanted),
            }
        )
    return Outcome({"sentences": len(rows), "results": results})


def pooled(runs: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every model over all its runs, which are given as (sentences, result of the model).

    accuracy: per cent of all sentences, with its standard error sqrt(p (1 - p) / n); difference: to the teacher, in
    points, with the standard error of a mean of paired differences (+1 won, -1 lost, 0 the same).
    """
    models: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for sentences, result in runs:
        models.setdefault(repr(sorted(result["model"].items())), []).append((sentences, result))
    rows = []
    for found in models.values():
        n = sum(sentences for sentences, _ in found)
        right, lost, won = (sum(result[key] for _, result in found) for key in ("right", "lost", "won"))
        p, difference = right / n, (won - lost) / n
        spread = (won + lost) / n - difference**2
        rows.append(
            found[0][1]["model"]
            | {
                "accuracy": round(100 * p, 2),
                "standard error": round(100 * (p * (1 - p) / n) ** 0.5, 2),
                "difference": round(100 * difference, 2),
                "its standard error": round(100 * (spread / n) ** 0.5, 2),
                "by third": [round(100 * result["right"] / sentences, 1) for sentences, result in found],
                "signal to noise": found[0][1]["signal to noise"],
                "bytes": found[0][1]["bytes"],
            }
        )
    return rows


def finish(runs: list[Run], artefacts: Path) -> dict[str, Any]:
    """Adds "models": every model on all test sentences."""
    numbers = [run.outcome.numbers for run in runs]
    return {"models": pooled([(n["sentences"], result) for n in numbers for result in n["results"]])}


def recorded(
    bits: int, granularity: str | int = ROW, grid: str = SYMMETRIC, ranges: str = MIN_MAX, **more: Any
) -> Spec:
    """The recorded row of one model (see `pooled`), by its description; bits=32 is the teacher.

    Raises:
        KeyError: if no such model was recorded.
    """
    wanted = FLOAT if bits == 32 else spec(bits, granularity, grid, ranges, **more)
    for row in load_results(STUDY.name)["models"]:
        if {key: row[key] for key in row if key in (*spec(0), "embeddings", "layers")} == wanted:
            return row
    raise KeyError(f"no model was recorded as {wanted}")


GRANULARITIES = (TENSOR, ROW, 128, 64)
RULES = (PERCENTILE, LEAST_ERROR, LAPLACE, GAUSSIAN)
SETTINGS = (
    *({"models": [spec(b, g, grid) for g in GRANULARITIES for grid in (SYMMETRIC, AFFINE)]} for b in (8, 4, 3, 2)),
    *({"models": [spec(bits, g, ranges=rule) for g in (TENSOR, ROW) for rule in RULES]} for bits in (4, 3)),
    {"models": [spec(bits, 64, grid, LEAST_ERROR) for bits in (3, 2) for grid in (SYMMETRIC, AFFINE)]},
    {"models": [spec(bits, TENSOR, grid) for bits in (4, 3) for grid in (LLOYD_MAX, POWERS, QUANTILES)]},
    {
        "models": [
            FLOAT,
            *(spec(4, 64, AFFINE, embeddings=bits) for bits in (8, 4, 3)),
            spec(8, embeddings=8),
            spec(4, 64, AFFINE, layers=ALL),
        ]
    },
)
FINER = (96, 32, 16)
OTHER_RULES = (PERCENTILE, LAPLACE, GAUSSIAN)
STUDY = Study(
    name="bits_by_granularity",
    question="How many bits do the teacher's weights need, by who shares a grid, and by its range?",
    run=run,
    recorded=SETTINGS,
    full=(
        *SETTINGS,
        *({"models": [spec(b, g, grid) for g in FINER for grid in (SYMMETRIC, AFFINE)]} for b in (8, 4, 3, 2)),
        *({"models": [spec(b, g, grid) for g in GRANULARITIES for grid in (SYMMETRIC, AFFINE)]} for b in (6, 5)),
        *({"models": [spec(b, 64, ranges=rule) for rule in OTHER_RULES]} for b in (4, 3, 2)),
    ),
    seeds=(0, 1, 2),
    minutes=13,
    finish=finish,
)
