"""Six layers, a budget of three at 3 bits and three at 2: which three? Q-BERT's choice among all 20.

The teacher is quantized after training, the weights of its six layers only: affine, 64 consecutive inputs a grid. All
64 ways to give each layer 2 or 3 bits are measured; 20 of them have three layers of each and so one size. Beside them
stands the curvature of each layer: the largest eigenvalue of its Hessian on ten subsets of the training sentences
(Shen et al. 2019, arXiv 1909.05840; `quantization.qbert`). The Hessian's choice is the three layers of largest
Omega = |mean| + std at 3 bits.

An accuracy has no randomness, so no seed repeats it: the sentences are cut into as many parts as there are seeds, and
each seed measures all 64 on its own part. The parts add up to the whole test set and development set. What a seed
varies otherwise is which sentences the Hessian sees, and from which directions its iteration starts.

NOTE the four recorded runs shared two cores with much else, and their seconds say so; each took about 11 minutes of
processor time.
NOTE ten products with the Hessian settle in layers 4 to 6, not always below. On 7 of 40 subsets the residual of layer 1
is above a tenth of its value. On one of them (seed 0, the fourth) its eigenvalues reach from -20.1 to 19.0, found by
Lanczos: nearly equal size, opposite sign, and power iteration does not settle between them. It left -10.1, neither.
NOTE Q-BERT fine-tunes with quantized weights; here nothing is trained afterwards, and 64 inputs a grid are finer than
its groups of rows: of those, 2 bits leave little of this small model without training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from effnlp_lessons.classification import ReviewExamples
from effnlp_lessons.datasets import reviews, tokenizer
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.quantization.post_training import quantize_linears
from effnlp_lessons.quantization.qbert import allocate_bits, block_bytes, layer_sensitivities, sensitivity
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.transformer import MINILM_L6, Block

Bits = tuple[int, ...]  # of layers 1 .. 6

LOW, HIGH, LAYERS, GROUP = 2, 3, 6, 64
CHOICES: tuple[Bits, ...] = tuple(product((LOW, HIGH), repeat=LAYERS))
EQUAL_SIZE = tuple(bits for bits in CHOICES if bits.count(HIGH) == LAYERS // 2)  # the 20
SEEDS = (0, 1, 2, 3)  # as many parts of the sentences


def name(bits: Sequence[int]) -> str:
    """(2, 3, 2, 2, 3, 3) -> "232233", layer 1 first."""
    return "".join(map(str, bits))


def bits_of(word: str) -> Bits:
    """The inverse of `name`."""
    return tuple(map(int, word))


def size_of(bits: Sequence[int]) -> int:
    """Bytes of the six layers on file (`qbert.block_bytes`)."""
    return sum(block_bytes(MINILM_L6, k, GROUP) for k in bits)


# -------------------------------------------------------------------------------------------- curvature


def hessian_subsets(
    count: int, sentences: int, tokens: int, seed: int, batch: int = 32
) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """`count` subsets of so many training sentences, none twice, cut to `tokens`; in batches of similar length."""
    train = ReviewExamples(reviews.load_reviews().subset("train"))
    order = torch.randperm(len(train.lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    if count * sentences > len(order):
        raise ValueError(f"{count} subsets of {sentences} need more than the {len(order)} training sentences")
    subsets = []
    for start in range(0, count * sentences, sentences):
        rows = sorted(order[start : start + sentences], key=lambda row: train.lengths[row])
        parts = [rows[begin : begin + batch] for begin in range(0, sentences, batch)]
        cut = [[_cut(train.token_ids[row], tokens) for row in part] for part in parts]
        subsets.append([(*tokenizer.pad(ids), train.labels[part]) for ids, part in zip(cut, parts, strict=True)])
    return subsets


def _cut(ids: list[int], tokens: int) -> list[int]:
    return ids if len(ids) <= tokens else [*ids[: tokens - 1], tokenizer.SEP]


# --------------------------------------------------------------------------------------------- accuracy


def right_by_choice(
    model: SentenceClassifier,
    quantized: dict[int, Sequence[Block]],
    token_ids: list[list[int]],
    labels: Tensor,
    choices: Sequence[Bits] = CHOICES,
    batch: int = 128,
) -> dict[str, int]:
    """How many sentences each choice of bits gets right: {"232233": count}.

    Choices that begin alike share the layers they have in common, so that all 64 cost as many layers as 21 models.

    Args:
        quantized: {bits: the six blocks with those bits}.
    """
    right = dict.fromkeys(map(name, choices), 0)
    order = sorted(range(len(token_ids)), key=lambda row: len(token_ids[row]))

    def descend(x: Tensor, mask: Tensor, answers: Tensor, beginning: Bits) -> None:
        layer = len(beginning)
        if layer == len(model.encoder.blocks):
            pooled = torch.tanh(model.encoder.pooler(x[:, 0]))
            right[name(beginning)] += int((model.head(pooled).argmax(-1) == answers).sum())
            return
        for bits, blocks in quantized.items():
            longer = (*beginning, bits)
            if any(choice[: layer + 1] == longer for choice in choices):
                descend(blocks[layer](x, mask)[0], mask, answers, longer)

    with torch.inference_mode():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            ids, mask = tokenizer.pad([token_ids[row] for row in rows])
            descend(model.encoder.embeddings(ids), mask, labels[rows], ())
    return right


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Numbers: "eigenvalues" and "residuals" (layer by subset), "omega"; and of this seed's part of the sentences
    "sentences" `{"test", "dev"}`, "right" `{"test": {"232233": count, ...}, "dev": ...}`, "float" `{"test": count}`.
    """
    teacher = load_teacher()
    subsets = hessian_subsets(setting["subsets"], setting["sentences"], setting["tokens"], seed)
    found = layer_sensitivities(teacher, subsets, iterations=setting["iterations"], seed=seed)
    del subsets

    quantized = {k: list(quantize_linears(teacher, k, GROUP, symmetric=False).encoder.blocks) for k in (LOW, HIGH)}
    numbers: dict[str, Any] = {
        "eigenvalues": [[round(value, 4) for value in row] for row in found.eigenvalues.tolist()],
        "residuals": [[round(value, 4) for value in row] for row in found.residuals.tolist()],
        "omega": [round(value, 4) for value in found.omega.tolist()],
        "sentences": {},
        "right": {},
        "float": {},
    }
    for split in ("test", "dev"):
        examples = ReviewExamples(reviews.load_reviews().subset(split))
        part = range(seed % len(SEEDS), len(examples.token_ids), len(SEEDS))[: setting.get("limit")]
        ids, labels = [examples.token_ids[row] for row in part], examples.labels[list(part)]
        numbers["sentences"][split] = len(ids)
        numbers["right"][split] = right_by_choice(teacher, quantized, ids, labels)
        whole = right_by_choice(teacher, {32: list(teacher.encoder.blocks)}, ids, labels, ((32,) * LAYERS,))
        numbers["float"][split] = whole.popitem()[1]
    return Outcome(numbers)


# -------------------------------------------------------------------------------- reading a recorded summary


def accuracies(summary: dict[str, Any], split: str = "test") -> dict[Bits, float]:
    """Of a recorded summary: per cent of all sentences of the split that each of the 64 choices gets right."""
    runs = summary["runs"]
    sentences = sum(run["sentences"][split] for run in runs)
    return {bits: 100 * sum(run["right"][split][name(bits)] for run in runs) / sentences for bits in CHOICES}


def omegas(summary: dict[str, Any]) -> list[list[float]]:
    """Omega of the six layers, one list a seed."""
    return [run["omega"] for run in summary["runs"]]


def pooled_omega(summary: dict[str, Any]) -> list[float]:
    """Omega of the six layers over the subsets of all seeds together."""
    values = torch.tensor([run["eigenvalues"] for run in summary["runs"]], dtype=torch.float64)
    return sensitivity(values.transpose(0, 1).flatten(1)).tolist()


def hessian_choice(omega: Sequence[float], reverse: bool = False) -> Bits:
    """Three layers at 3 bits: those of largest Omega, or with `reverse` those of smallest."""
    sign = -1 if reverse else 1
    return tuple(allocate_bits([sign * value for value in omega], LOW, HIGH, count=LAYERS // 2))


def rank(bits: Bits, accuracy: Mapping[Bits, float]) -> int:
    """Place of a choice among the 20 of equal size: 1 + how many are more accurate."""
    return 1 + sum(accuracy[other] > accuracy[bits] for other in EQUAL_SIZE)


def standard_error(accuracy: float, sentences: int) -> float:
    """Of an accuracy in per cent, in points: 100 sqrt(p (1 - p) / n)."""
    share = accuracy / 100
    return 100 * math.sqrt(share * (1 - share) / sentences)


STUDY = Study(
    name="bit_budget",
    question="Three layers at 3 bits, three at 2: does the Hessian choose them well, among all 20 ways?",
    run=run,
    recorded=({"subsets": 10, "sentences": 64, "tokens": 32, "iterations": 10},),
    full=({"subsets": 10, "sentences": 64, "tokens": 512, "iterations": 10},),
    seeds=SEEDS,
    minutes=40,
)
