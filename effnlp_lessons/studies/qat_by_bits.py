"""What does training through the grid bring, at 4, 3 and 2 bits? (Jacob et al. 2017, sec. 3; Esser et al. 2019)

The teacher's 36 encoder matrices get a symmetric grid a row. Before any training that is post-training quantization.
Then the model is fine-tuned for a short while on labelled reviews in one of four ways, and measured with its quantized
weights: in floats, quantized afterwards (the control: is it the training, or the quantization in it?); through
fake-quantized weights; through learned step sizes (LSQ); and through steps that stay where LSQ begins (the control: is
it the learning of the step, or its start?).

NOTE embeddings, pooler and head stay in floats; activations are not quantized. The embeddings are not trained.
NOTE at 2 bits the restricted grid has 3 levels, LSQ's has all 4.
NOTE the learning rates were chosen among 5e-5, 1e-4, 2e-4 and 4e-4 by the dev accuracy of seed 0 for each way and bits.
NOTE training and measuring run under bfloat16 autocast; the grid is computed in float32, the product rounds.
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
from effnlp_lessons.quantization.post_training import quantize_linears
from effnlp_lessons.quantization.qat import convert_weights, prepare_qat
from effnlp_lessons.quantization.ranges import mean_squared_error
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.studies.transfer_set import Rows
from effnlp_lessons.training import TrainingPlan

FLOAT, FAKE, LEARNED, FIXED = (
    "float, then quantized",
    "fake-quantized",
    "learned steps (LSQ)",
    "LSQ's first steps, kept",
)
CLIPPED = "clipped for the least squared error"
WAYS = (FLOAT, FAKE, LEARNED, FIXED)


def prepared(teacher: nn.Module, way: str, bits: int) -> nn.Module:
    """The teacher, ready to be fine-tuned through quantized weights in this way; a copy.

    Raises:
        ValueError: a way that is not in `WAYS`, or trains in floats.
    """
    if way not in WAYS[1:]:
        raise ValueError(f"way must be one of {WAYS[1:]}, got {way!r}")
    if way == FAKE:
        return prepare_qat(teacher, bits, "row")
    model = prepare_lsq(teacher, bits, "row")
    for part in model.modules():
        if isinstance(part, LsqLinear):
            part.step.requires_grad_(way == LEARNED)
    return model


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Numbers: "before" and "after" training, `{bits: {split: per cent right}}`, always with quantized weights.

    `setting`: way, bits (a list), sentences (of the training split), epochs, learning_rate; optionally `tested`, how
    many sentences of each split in `splits` to measure on. `FLOAT` trains once for all bits; it has rows "float" and
    "{bits}, {CLIPPED}" too. Before training, `FAKE` is what `FLOAT` is: post-training quantization.
    """
    data, way = reviews.load_reviews(), setting["way"]
    train = ReviewExamples(data.subset("train"))
    splits = {name: ReviewExamples(data.subset(name), setting.get("tested")) for name in ("dev", "test")}
    chosen = torch.randperm(len(train.lengths), generator=torch.Generator().manual_seed(seed))[: setting["sentences"]]
    plan = TrainingPlan(setting["epochs"], 32, learning_rate=setting["learning_rate"], bfloat16=True, seed=seed)
    teacher = load_teacher()
    teacher.encoder.embeddings.requires_grad_(False)

    def right(model: nn.Module) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            return {name: round(accuracy(model, examples), 2) for name, examples in splits.items()}

    def by_bits(model: nn.Module) -> dict[str, dict[str, float]]:
        found = {"float": right(model)}
        for bits in setting["bits"]:
            found[str(bits)] = right(quantize_linears(model, bits, "row"))
            clipped = quantize_linears(model, bits, "row", ranges=mean_squared_error(bits, candidates=25))
            found[f"{bits}, {CLIPPED}"] = right(clipped)
        return found

    if way == FLOAT:
        model = copy.deepcopy(teacher)
        before = by_bits(model)
        fine_tune(model, Rows(train, chosen), plan)
        return Outcome({"before": before, "after": by_bits(model)})
    before, after = {}, {}
    for bits in setting["bits"]:
        model = prepared(teacher, way, bits)
        before[str(bits)] = right(convert_weights(model))
        fine_tune(model, Rows(train, chosen), plan)
        after[str(bits)] = right(convert_weights(model))
    return Outcome({"before": before, "after": after})


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
