"""What does training through the grid bring, at 4, 3 and 2 bits? (Jacob et al. 2017, sec. 3; Esser et al. 2019)

The teacher's 36 encoder matrices get a symmetric grid a row. Before any training that is post-training quantization.
Then the model is fine-tuned for a short while on labelled reviews in one of four ways, and measured with its quantized
weights: in floats, quantized afterwards (the control: is it the training, or the quantization in it?); through
fake-quantized weights; through learned step sizes (LSQ); and through steps that stay where LSQ begins (the control: is
it the learning of the step, or its start?).

NOTE embeddings, pooler and head stay in floats; activations are not quantized. The embeddings are not trained.
NOTE at 2 bits the restricted grid has 3 levels, LSQ's has all 4.
NOTE the learning rates were chosen among 5e-5, 1e-4, 2e-4 and 4e-4 by the dev accuracy of seed 0 for each way and bits.
NOTE training runs under bfloat16 autocast, the grid in float32; accuracy is measured in float32.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.distillation.well_read import fine_tune
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.quantization.lsq import LsqLinear, prepare_lsq
from effnlp_lessons.quantization.qat import prepare_qat
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.studies.transfer_set import Rows
from effnlp_lessons.training import TrainingPlan

FLOAT, FAKE, LEARNED, FIXED = (
    "float, then quantized",
    "fake-quantized",
    "learned steps (LSQ)",
    "LSQ's first steps, kept",
)
WAYS = (FLOAT, FAKE, LEARNED, FIXED)


def prepared(teacher: nn.Module, way: str, bits: int) -> nn.Module:
    """The teacher, ready to be fine-tuned this way; a copy.

    Raises:
        ValueError: a way that is not in `WAYS`.
    """
    if way not in WAYS:
        raise ValueError(f"way must be one of {WAYS}, got {way!r}")
    if way == FLOAT:
        return copy.deepcopy(teacher)
    if way == FAKE:
        return prepare_qat(teacher, bits, "row")
    model = prepare_lsq(teacher, bits, "row")
    for part in model.modules():
        if isinstance(part, LsqLinear):
            part.step.requires_grad_(way == LEARNED)
    return model


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Numbers: "results", `{bits: {"before": {split: per cent right}, "after": the same}}`, with quantized weights.

    `setting`: way, bits (a list), sentences (of the training split), epochs, learning_rate; optionally `tested`, how
    many sentences of dev and of test to measure on. `FLOAT` trains once for all bits, and has a row "float" too.
    """
    data, way, tested = reviews.load_reviews(), setting["way"], setting.get("tested")
    train = ReviewExamples(data.subset("train"))
    splits = {name: ReviewExamples(data.subset(name), tested) for name in ("dev", "test")}
    chosen = torch.randperm(len(train.lengths), generator=torch.Generator().manual_seed(seed))[: setting["sentences"]]
    plan = TrainingPlan(setting["epochs"], 32, learning_rate=setting["learning_rate"], bfloat16=True, seed=seed)
    teacher = load_teacher()
    teacher.encoder.embeddings.requires_grad_(False)

    def right(model: nn.Module) -> dict[str, float]:
        return {name: round(accuracy(model.eval(), examples), 2) for name, examples in splits.items()}

    def quantized(model: nn.Module, bits: int) -> nn.Module:
        return prepare_qat(model, bits, "row") if way == FLOAT else model

    results: dict[str, dict[str, Any]] = {}
    if way == FLOAT:
        model = prepared(teacher, way, 8)
        fine_tune(model, Rows(train, chosen), plan)
        results["float"] = {"before": right(teacher), "after": right(model)}
    for bits in setting["bits"]:
        if way != FLOAT:
            model = prepared(teacher, way, bits)
        before = right(quantized(teacher if way == FLOAT else model, bits))
        if way != FLOAT:
            fine_tune(model, Rows(train, chosen), plan)
        results[str(bits)] = {"before": before, "after": right(quantized(model, bits))}
    return Outcome({"results": results})


COMMON = {"sentences": 3_000, "epochs": 2}
STUDY = Study(
    name="qat_by_bits",
    question="What does training through the grid bring, at 4, 3 and 2 bits a weight?",
    run=run,
    recorded=(
        COMMON | {"way": FLOAT, "bits": [4, 3, 2], "learning_rate": 5e-5},
        *(COMMON | {"way": FAKE, "bits": [bits], "learning_rate": 1e-4} for bits in (4, 3, 2)),
        COMMON | {"way": LEARNED, "bits": [2], "learning_rate": 1e-4},
        COMMON | {"way": FIXED, "bits": [2], "learning_rate": 1e-4},
    ),
    seeds=(0, 1, 2),
    minutes=20,
)
