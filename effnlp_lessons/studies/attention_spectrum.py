"""Is attention of low rank, and does Linformer use it? All 72 heads of MiniLM-L6 on passages of 128, 256, 512 tokens.

Linformer (Wang et al. 2020, arXiv 2006.04768) argues from the singular values of a head's attention matrix
P = softmax(q kᵀ / sqrt(d_head)): a few carry almost all. Here is their cumulative share, and beside it how far the
head's output P v moves under five approximations that pay for k columns instead of n: the best matrix of rank k; a
random projection of P, P Eᵀ E v, which is what the Johnson-Lindenstrauss lemma speaks of; Linformer itself,
softmax(q (E k)ᵀ / sqrt(d_head)) (E v), with that E and with mean pooling; and a window with as many pairs.

NOTE nothing is trained. The errors are where Linformer would start that is given the weights of a trained encoder;
the paper trains E and F, and the encoder with them.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from effnlp_lessons.attention.linformer import linformer_attention, pooling_projection
from effnlp_lessons.attention.longformer import window_attention
from effnlp_lessons.attention.patterns import read_projections
from effnlp_lessons.dense_attention import attention_scores
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.studies.attention_patterns import passage, spread
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.transformer import Encoder

BEST = "best of rank k"
RANDOM_OUTPUT = "random projection of P"
RANDOM = "Linformer, random E"
POOLING = "Linformer, mean pooling"
WINDOW = "window of equal pairs"
STEPS = 32  # points of a recorded spectrum
SHARES = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]

PerHead = Float[Tensor, " heads"]
Vectors = Float[Tensor, "heads length d_head"]


def read_vectors(encoder: Encoder, token_ids: Int[Tensor, "1 length"]) -> tuple[Vectors, Vectors, Vectors]:
    """Queries, keys and values of every head on one text, heads in the order of layers (72 for MiniLM-L6)."""
    q, k, v = (part.flatten(0, 1) for part in read_projections(encoder, token_ids))
    return q, k, v


def cumulative(values: Float[Tensor, "heads ranks"]) -> Float[Tensor, "heads ranks"]:
    """Share of the total that the first 1, 2, ... values hold."""
    return values.cumsum(1) / values.sum(1, keepdim=True)


def window_size(length: int, projected: int) -> int:
    """Tokens to each side of the largest window with at most length * projected pairs."""
    return max(w for w in range(length) if length * (2 * w + 1) - w * (w + 1) <= length * projected)


def relative_errors(found: Vectors, dense: Vectors) -> dict[str, PerHead]:
    """ "error" ‖found - dense‖ / ‖dense‖, and "scaled", the same after the one factor that is best for the head.

    1 in "scaled" says that nothing of the output is found, whatever its size.
    """
    found, dense = found.flatten(1), dense.flatten(1)
    size = dense.norm(dim=1)
    factor = (found * dense).sum(1) / found.square().sum(1)
    return {
        "error": (found - dense).norm(dim=1) / size,
        "scaled": (factor[:, None] * found - dense).norm(dim=1) / size,
    }


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Spectrum and errors on one passage, drawn from `seed` as the random projections are.

    Numbers, where `spread` is median, lower and upper quartile over the heads, each a list over ranks or shares:
        "ranks", and "spectrum" {"squares" | "sum": spread}: cumulative share of the singular values' squares or sum;
        "rank of 90 %" {"squares" | "sum": [head]}: how many singular values hold 90 %;
        "projected", k for every share of `setting["shares"]`, and "errors" {approximation:
        {"error" | "scaled": spread}};
        "mean of all values" {"error" | "scaled": spread}: the error of the mean of all values, whatever the query.
    """
    generator, length = torch.Generator().manual_seed(seed), setting["length"]
    q, k, v = read_vectors(load_minilm(), passage(setting["text"], length, generator))
    weights = attention_scores(q, k).softmax(-1)
    dense = weights @ v
    left, singular, right = torch.linalg.svd(weights)

    spectrum = {"squares": cumulative(singular.square()), "sum": cumulative(singular)}
    ranks = [max(1, round(length * step / STEPS)) for step in range(1, STEPS + 1)]

    found: dict[str, list[Vectors]] = {name: [] for name in (BEST, RANDOM_OUTPUT, RANDOM, POOLING, WINDOW)}
    projected = [max(1, round(share * length)) for share in setting["shares"]]
    for rows in projected:
        e = torch.randn(rows, length, generator=generator) * rows**-0.5  # E: N(0, 1 / k)
        found[BEST].append(left[:, :, :rows] @ (singular[:, :rows, None] * (right[:, :rows] @ v)))
        found[RANDOM_OUTPUT].append((weights @ e.T) @ (e @ v))
        for name, projection in ((RANDOM, e[None]), (POOLING, pooling_projection(length, rows))):
            output = linformer_attention(q[None], k[None], v[None], project_keys=projection, project_values=projection)
            found[name].append(output[0])
        found[WINDOW].append(window_attention(q[None], k[None], v[None], window=window_size(length, rows))[0])
    uniform = v.mean(1, keepdim=True).expand_as(v)
    return Outcome(
        {
            "ranks": ranks,
            "spectrum": {name: _spreads([shares[:, rank - 1] for rank in ranks]) for name, shares in spectrum.items()},
            "rank of 90 %": {name: ((shares < 0.9).sum(1) + 1).tolist() for name, shares in spectrum.items()},
            "projected": projected,
            "errors": {name: _error_spreads(outputs, dense) for name, outputs in found.items()},
            "mean of all values": _error_spreads([uniform], dense),
        }
    )


def _spreads(columns: list[PerHead]) -> dict[str, list[float]]:
    """Median, lower and upper quartile over the heads, each a list over `columns`."""
    rows = zip(*(spread(column.tolist()) for column in columns), strict=True)
    return {name: [round(x, 4) for x in row] for name, row in zip(("median", "lower", "upper"), rows, strict=True)}


def _error_spreads(outputs: list[Vectors], dense: Vectors) -> dict[str, dict[str, list[float]]]:
    errors = [relative_errors(output, dense) for output in outputs]
    return {what: _spreads([error[what] for error in errors]) for what in ("error", "scaled")}


def over_passages(summary: dict[str, Any], text: str, length: int) -> dict[str, Any]:
    """The numbers of `run`, each the mean over the recorded passages of one kind and length.

    Raises:
        ValueError: a text or length that is not recorded.
    """
    runs = [
        {name: part for name, part in run.items() if name not in ("setting", "seed", "seconds")}
        for run in summary["runs"]
        if (run["setting"]["text"], run["setting"]["length"]) == (text, length)
    ]
    if not runs:
        raise ValueError(f"no run on {text!r} of {length} tokens is recorded")
    return _mean(runs)


def _mean(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {name: _mean([part[name] for part in parts]) for name in parts[0]}
    if isinstance(parts[0], list):
        return [_mean(list(column)) for column in zip(*parts, strict=True)]
    return mean(parts)


STUDY = Study(
    name="attention_spectrum",
    question="Attention is of low rank: does a softmax over projected keys come near it?",
    run=run,
    recorded=tuple(
        {"text": text, "length": length, "shares": SHARES}
        for text in ("plays", "reviews")
        for length in (128, 256, 512)
    ),
    seeds=(0, 1, 2),
    minutes=2,
)
