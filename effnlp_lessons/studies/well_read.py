"""Turc's comparison in small: from which start should a compact student be distilled? (Turc et al. 2019, sec. 5)

Students of 2, 3 and 4 layers begin with random blocks, with the first blocks of MiniLM-L6 ("truncated"), or with those
after they were distilled on general text, before any task was known ("well-read"), all on the same sentences. Then each
is fine-tuned on 1,500 labels, or distilled on reviews with the teacher's soft targets, or with its pseudo-labels. Among
three layers stands MiniLM-L3 too, a published compact model (Reimers and Gurevych 2019).

NOTE the paper pre-trains every student on masked words of Wikipedia and books, days on TPUs. Here "well-read" means
some minutes of matching MiniLM's last hidden states, beginning with MiniLM's blocks: no random start gets far so fast.
NOTE all starts have MiniLM's token table, kept as it is (L3 its own), and a pooler drawn anew.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.distillation.well_read import (
    distil_on_text,
    fine_tune,
    pseudo_label_loss,
    soft_label_loss,
    truncated_encoder,
)
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.pretrained import load_minilm, load_minilm_l3, teacher_logits
from effnlp_lessons.studies.layer_losses import METHODS, answered, teach
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.studies.transfer_set import Rows, labelled_rows
from effnlp_lessons.training import TrainingPlan
from effnlp_lessons.transformer import Encoder, initialise_

RANDOM, TRUNCATED, READ, PUBLISHED = "random", "truncated", "well-read", "published (MiniLM-L3)"
COSINE = METHODS["cosine of the last layer (DistilBERT)"]


def start(kind: str, layers: int, seed: int, text: Any, rate: float) -> Encoder:
    """A student of so many layers before the task; `text` are the general sentences with MiniLM's outputs."""
    if kind == PUBLISHED:
        encoder = load_minilm_l3()
    else:
        encoder = truncated_encoder(load_minilm(), layers)
        if kind == RANDOM:
            initialise_(encoder.blocks, torch.Generator().manual_seed(seed))
    encoder.embeddings.requires_grad_(False)
    if kind == READ:
        teach(encoder, text, COSINE, (), epochs=1, rate=rate, seed=seed)
    encoder.config = encoder.embeddings.config = replace(encoder.config, pooler=True)
    encoder.pooler = nn.Linear(encoder.config.d_model, encoder.config.d_model)
    initialise_(encoder.pooler, torch.Generator().manual_seed(seed))
    return encoder


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Numbers: "results", `{start: {"labels", "soft", "pseudo-labels": per cent of the test sentences right}}`."""
    data, layers = reviews.load_reviews(), setting["layers"]
    train, test = ReviewExamples(data.subset("train")), ReviewExamples(data.subset("test"))
    logits = teacher_logits()[torch.from_numpy(data.split == "train")]
    order = torch.randperm(len(train.lengths), generator=torch.Generator().manual_seed(seed))
    labelled = labelled_rows(setting["labels"], seed, len(train.lengths))
    transfer = order[: setting["labels"] + setting["unlabelled"]]  # begins with the labelled rows
    text, results = answered(setting, seed), {}

    def plan(rows: Tensor, steps: int) -> TrainingPlan:
        epochs = max(1, round(steps / -(-len(rows) // 32)))
        return TrainingPlan(epochs, 32, learning_rate=setting["task_rate"], bfloat16=True, seed=seed)

    steps = -(-len(transfer) // 32)
    for kind in setting["starts"]:
        state = start(kind, layers, seed, text, setting["learning_rate"])
        found: dict[str, float] = {}
        for signal, loss in (("labels", None), ("soft", soft_label_loss), ("pseudo-labels", pseudo_label_loss)):
            student = SentenceClassifier(truncated_encoder(state, layers), classes=2, seed=seed)
            student.encoder.embeddings.requires_grad_(False)
            if loss is None:
                fine_tune(student, Rows(train, labelled), plan(labelled, steps))
            else:
                distil_on_text(student, Rows(train, transfer), logits[transfer], plan(transfer, steps), loss)
            with torch.autocast("cpu", torch.bfloat16):
                found[signal] = round(accuracy(student, test), 2)
        results[kind] = found
    return Outcome({"steps": steps, "results": results})


COMMON = {"sentences": 3_200, "tokens": 32, "batch": 16, "learning_rate": 1e-3, "task_rate": 2e-4}
STARTS = [RANDOM, TRUNCATED, READ]
STUDY = Study(
    name="well_read",
    question="From which start should a compact student be distilled: random, truncated, or well-read?",
    run=run,
    recorded=tuple(
        COMMON
        | {"layers": layers, "labels": 1_500, "unlabelled": 2_000}
        | {"starts": STARTS if layers != 3 else [*STARTS, PUBLISHED]}
        for layers in (2, 3, 4)
    ),
    full=tuple(
        COMMON
        | {"sentences": 12_951, "layers": layers, "labels": labels, "unlabelled": 5_500 - labels}
        | {"starts": STARTS if layers != 3 else [*STARTS, PUBLISHED]}
        for layers in (1, 2, 3, 4, 5)
        for labels in (500, 1_500)
    ),
    seeds=(0, 1, 2),
    minutes=35,
)
