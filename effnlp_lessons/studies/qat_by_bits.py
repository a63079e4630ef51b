"""What does training through the grid bring, at 4, 3 and 2 bits? (Jacob et al. 2017, sec. 3; Esser et al. 2019)

The teacher's 36 encoder matrices get a symmetric grid a row. Without any training that is post-training quantization.
Or the model is fine-tuned for a short while on labelled reviews, and measured with its quantized weights: trained in
floats and quantized afterwards (the control: is it the training, or the quantization in it?); trained through
fake-quantized weights; with learned step sizes (LSQ); with steps that stay where LSQ begins (the control: is it the
learning of the step, or its start?).

NOTE embeddings, pooler and head stay in floats; activations are not quantized. The embeddings are not trained.
NOTE at 2 bits the restricted grid has 3 levels, LSQ's has all 4.
NOTE the learning rates come from a trial of two epochs on seed 0, by dev accuracy. 2 bits, fake-quantized: 74.6 at
1e-4, 75.7 at 2e-4; 2 bits, LSQ: 84.1 at 2e-4, 81.3 at 4e-4; 3 bits: 85.2 at 1e-4, no other rate tried; 4 bits: 5e-5,
not tried before. The control trains at the smallest and at the largest of these rates.
NOTE training and measuring run under bfloat16 autocast; the grid is computed in float32, the product rounds.
"""

from __future__ import annotations

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
    """Numbers: "right", `{bits: per cent of the sentences right}` with quantized weights.

    `setting`: way, bits (a list), sentences (how many of the training split), epochs (0: no training), learning_rate;
    optionally `split` to measure on ("test"), and `tested`, how many sentences of it. `FLOAT` trains once for all bits;
    it has the rows "float" and, for the fewest bits, "{bits}, {CLIPPED}" too.
    """
    data, way, fewest = reviews.load_reviews(), setting["way"], min(setting["bits"])
    train = ReviewExamples(data.subset("train"))
    tested = ReviewExamples(data.subset(setting.get("split", "test")), setting.get("tested"))
    chosen = torch.randperm(len(train.lengths), generator=torch.Generator().manual_seed(seed))[: setting["sentences"]]
    teacher = load_teacher()
    teacher.encoder.embeddings.requires_grad_(False)

    def trained(model: nn.Module) -> nn.Module:
        if setting["epochs"]:
            rate = setting["learning_rate"]
            fine_tune(model, Rows(train, chosen), TrainingPlan(setting["epochs"], 32, rate, bfloat16=True, seed=seed))
        return model

    def right(model: nn.Module) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return round(accuracy(model, tested), 2)

    if way != FLOAT:
        models = {str(bits): trained(prepared(teacher, way, bits)) for bits in setting["bits"]}
        return Outcome({"right": {bits: right(convert_weights(model)) for bits, model in models.items()}})
    model = trained(teacher)
    found = {"float": right(model)}
    for bits in setting["bits"]:
        found[str(bits)] = right(quantize_linears(model, bits, "row"))
    clipped = quantize_linears(model, fewest, "row", ranges=mean_squared_error(fewest, candidates=25))
    return Outcome({"right": found | {f"{fewest}, {CLIPPED}": right(clipped)}})


COMMON = {"sentences": 3_000, "epochs": 1}
UNTRAINED = COMMON | {"epochs": 0, "learning_rate": 0.0}
# a few seconds, for a notebook: the fewest bits after eight steps
LIVE = {"way": FAKE, "bits": [2], "sentences": 256, "epochs": 1, "learning_rate": 2e-4, "tested": 300}
STUDY = Study(
    name="qat_by_bits",
    question="What does training through the grid bring, at 4, 3 and 2 bits a weight?",
    run=run,
    recorded=(
        COMMON | {"way": FAKE, "bits": [2], "learning_rate": 2e-4},
        COMMON | {"way": FAKE, "bits": [3], "learning_rate": 1e-4},
        COMMON | {"way": FAKE, "bits": [4], "learning_rate": 5e-5},
        COMMON | {"way": LEARNED, "bits": [2], "learning_rate": 2e-4},
        COMMON | {"way": FIXED, "bits": [2], "learning_rate": 2e-4},
        COMMON | {"way": FLOAT, "bits": [4, 3, 2], "learning_rate": 2e-4},
        COMMON | {"way": FLOAT, "bits": [4, 3, 2], "learning_rate": 5e-5},
        UNTRAINED | {"way": FLOAT, "bits": [4, 3, 2]},
        UNTRAINED | {"way": FIXED, "bits": [2]},
    ),
    full=tuple(
        COMMON | {"sentences": 7_072, "epochs": 3, "way": way, "bits": [4, 3, 2], "learning_rate": rate}
        for way in WAYS
        for rate in (5e-5, 1e-4, 2e-4)
    ),
    seeds=(0, 1, 2),
    minutes=20,
)
