"""What each pattern of attention loses on real heads: all 72 heads of MiniLM-L6 on passages of 512 tokens.

For every pattern, at several budgets of pairs, and for every head: the share of its attention weights that the
pattern captures, and the error of the head's output. Beside them two masks that are no patterns: the best one of
equal size, which has seen the weights, and two columns alone, the first and the last token. Nothing is trained.

NOTE the heads were trained dense. What they lose under a pattern is where a model would start that is given
the pattern, not where it would end after training with it.
"""

from __future__ import annotations

from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

from effnlp_lessons.attention.gallery import PATTERNS, ends, size_for
from effnlp_lessons.attention.patterns import best_mask, captured_mass, output_error, pairs, read_heads
from effnlp_lessons.datasets import reviews, shakespeare, tokenizer
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.studies.runner import Outcome, Study

BEST, COLUMNS = "best of equal size", "two columns alone"


def passage(text: str, length: int, generator: torch.Generator) -> Tensor:
    """Token ids (1, length) of a random stretch of `text`, "plays" or "reviews", between [CLS] and [SEP]."""
    if text == "plays":
        whole = shakespeare.load_text("dev")
        start = int(torch.randint(len(whole) - 20 * length, (), generator=generator))
        words = whole[start : start + 20 * length].split(maxsplit=1)[1]  # begin at a word
    else:
        sentences = reviews.load_reviews().subset("dev").text
        start = int(torch.randint(len(sentences) - length, (), generator=generator))
        words = " ".join(sentences[start : start + length])
    return torch.tensor(tokenizer.encode([words], max_length=length))


@cache
def mask_within(name: str, length: int, budget: int) -> tuple[int, Tensor] | None:
    """The largest mask of a pattern within `budget` pairs, and its size; None if it has none so small."""
    size = size_for(name, length, budget)
    return None if size is None else (size, PATTERNS[name].mask(length, size))


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Mass and error of every pattern and head on `setting["passages"]` passages, means over them.

    Numbers: "results", `{share: {pattern: {"size", "pairs", "mass": [head], "error": [head]}}}`, the heads in
    the order of layers; `share` is the budget as a share of all pairs.
    """
    generator, length = torch.Generator().manual_seed(seed), setting["length"]
    encoder = load_minilm()
    texts = [passage(setting["text"], length, generator) for _ in range(setting["passages"])]
    heads = [[part.flatten(0, 1) for part in read_heads(encoder, token_ids)] for token_ids in texts]

    def measured(mask_for: Any) -> dict[str, Any]:
        found = [(mask_for(weights), weights, values) for weights, values in heads]
        mass = torch.stack([captured_mass(weights, mask) for mask, weights, _ in found]).mean(0)
        error = torch.stack([output_error(weights, values, mask) for mask, weights, values in found]).mean(0)
        return {name: [round(x, 4) for x in of_head.tolist()] for name, of_head in (("mass", mass), ("error", error))}

    results: dict[str, dict[str, Any]] = {}
    columns = ends(length).expand(length, length)
    for share in setting["shares"]:
        budget = round(share * length**2)
        results[str(share)] = {
            BEST: {"size": budget, "pairs": budget}
            | measured(lambda weights, budget=budget: best_mask(weights, budget)),
            COLUMNS: {"size": 2, "pairs": pairs(columns)} | measured(lambda weights: columns),
        }
        for name in PATTERNS:
            if (found := mask_within(name, length, budget)) is not None:
                size, mask = found
                row = {"size": size, "pairs": pairs(mask)} | measured(lambda weights, mask=mask: mask)
                results[str(share)][name] = row
    return Outcome({"results": results})


def over_heads(runs: list[dict[str, Any]], share: float) -> dict[str, dict[str, Any]]:
    """Per pattern at one budget: size, pairs, and for "mass" and "error" each head's mean over the runs."""
    collected = [run["results"][str(share)] for run in runs]
    table = {}
    for name in collected[0]:
        rows = [found[name] for found in collected]
        table[name] = {"size": rows[0]["size"], "pairs": rows[0]["pairs"]} | {
            what: [sum(column) / len(rows) for column in zip(*(row[what] for row in rows), strict=True)]
            for what in ("mass", "error")
        }
    return table


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return median(ordered), median(ordered[: half or 1]), median(ordered[-half or -1 :])


STUDY = Study(
    name="attention_patterns",
    question="What do the heads of a trained encoder lose under each pattern, at equal numbers of pairs?",
    run=run,
    recorded=tuple(
        {"text": text, "length": 512, "passages": 2, "shares": [0.0625, 0.125, 0.25]} for text in ("plays", "reviews")
    ),
    full=tuple(
        {"text": text, "length": 512, "passages": 10, "shares": [0.03125, 0.0625, 0.125, 0.25, 0.5]}
        for text in ("plays", "reviews")
    ),
    seeds=(0, 1, 2, 3, 4),
    minutes=8,
)
