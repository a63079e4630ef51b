"""What does the course's teacher still know with weights of 2 bits and activations of 8 (Zhang et al. 2020)?

The teacher's weights become ternary, by TWN or by LAT; its answers are then little better than chance, though mostly
because all are shifted to one side ("before"). Then the student learns, its latent weights beginning at the teacher's:
from the labels alone, or from the teacher's hidden states, attention scores and logits. Every student is written to a
file with 2 bits a ternary weight, and the one read back is tested.

NOTE the learning rates were chosen on the dev sentences with TWN and seed 0, among 1e-4, 3e-4 and 6e-4 for
distillation (84.3, 85.9 and 83.0 per cent right), 1e-4 and 3e-4 for labels (82.5 and 81.4). 84.3, 85.9 and 82.5 come
from 2,500 sentences, the others from 2,000, as many as are used here.
NOTE activations are not clipped here: MiniLM's reach 30, and the paper's bound for BERT, +-2.5, costs it accuracy
before any weight is ternary; see "before". Training runs under bfloat16 autocast, the test in float32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from effnlp_lessons.classification import ReviewExamples, logits_of
from effnlp_lessons.datasets import reviews
from effnlp_lessons.distillation.hinton import label_objective
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.measure import bytes_on_disk
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.quantization.packing import load_quantized, save_quantized
from effnlp_lessons.quantization.ternarybert import (
    CLIP,
    distillation_loss,
    freeze,
    ternarize,
    update_curvature_,
)
from effnlp_lessons.studies.runner import Outcome, Run, Study
from effnlp_lessons.training import TrainingPlan, train

LABELS, DISTILLATION = "labels", "distillation"


def learn(
    student: SentenceClassifier, teacher: SentenceClassifier, examples: ReviewExamples, signal: str, plan: TrainingPlan
) -> list[float]:
    """Train a ternary student in place from `LABELS` or by `DISTILLATION`; the loss of every step.

    Raises:
        ValueError: another word for `signal`.
    """
    if signal not in (LABELS, DISTILLATION):
        raise ValueError(f"signal must be {LABELS!r} or {DISTILLATION!r}, got {signal!r}")
    loss = label_objective if signal == LABELS else distillation_loss(teacher)
    return train(student, examples, loss, plan, after_step=update_curvature_, progress=False).loss


def packed(student: SentenceClassifier) -> tuple[SentenceClassifier, int]:
    """The student written to a file with packed codes and read back, and the bytes of the file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "student.safetensors"
        size = save_quantized(freeze(student), file)
        return load_quantized(student, file).eval(), size


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Numbers of the file read back: `answers` to the test sentences, its "bytes"; and of the training.

    "gap" is the largest difference of a logit between the student and its file; "loss" the mean of the first and of
    the last ten steps (of a short run: of its halves).
    """
    data, teacher = reviews.load_reviews(), load_teacher()
    examples = ReviewExamples(data.subset("train"), setting["sentences"])
    test = ReviewExamples(data.subset("test"), setting["tested"])
    student = ternarize(teacher, setting["method"], clip=setting["clip"])
    rate = setting["learning_rate"]
    plan = TrainingPlan(setting["epochs"], setting["batch"], learning_rate=rate, bfloat16=True, seed=seed)
    losses = learn(student, teacher, examples, setting["signal"], plan)
    reloaded, size = packed(student)
    batch = test.batch(list(range(32)))[:2]
    with torch.inference_mode():
        gap = (student(*batch) - reloaded(*batch)).abs().max().item()
    few = min(10, len(losses) // 2) or 1
    ends = [round(sum(part) / len(part), 3) for part in (losses[:few], losses[-few:])]
    return Outcome(answers(reloaded, test) | {"bytes": size, "gap": gap, "steps": len(losses), "loss": ends})


def answers(model: SentenceClassifier, examples: ReviewExamples) -> dict[str, float]:
    """Per cent: "right", "called positive", and "ranked".

    "ranked" is how often a positive review gets a higher score (the difference of the logits) than a negative one, over
    all pairs: what the model knows, wherever its decision stands (the area under the ROC curve). 50 is chance.
    """
    logits = logits_of(model, examples.token_ids)
    score, positive = logits[:, 1] - logits[:, 0], examples.labels == 1
    right = ((score > 0) == positive).double().mean()
    pairs = (score[positive][:, None] > score[~positive]).double().mean()
    numbers = {"right": right, "called positive": (score > 0).double().mean(), "ranked": pairs}
    return {name: round(100 * number.item(), 2) for name, number in numbers.items()}


def before(runs: list[Run], artefacts: Path) -> dict[str, Any]:
    """What quantization alone does to the test sentences (`answers`): no training, so no seeds.

    The teacher; its activations in 8 bits, clipped and not; its weights ternary, with and without that. LAT knows no
    curvature yet: it is the best ternary weight for d = 1.
    """
    test, teacher = ReviewExamples(reviews.load_reviews().subset("test")), load_teacher()
    models = {
        "teacher": teacher,
        "8-bit activations": ternarize(teacher, None, clip=None),
        "8-bit activations, clipped": ternarize(teacher, None, clip=CLIP),
        "ternary weights, TWN": freeze(ternarize(teacher, "twn", bits=None)),
        "ternary weights, LAT": freeze(ternarize(teacher, "lat", bits=None)),
        "both, TWN": freeze(ternarize(teacher, "twn", clip=None)),
        "both, LAT": freeze(ternarize(teacher, "lat", clip=None)),
    }
    found = {name: answers(model.eval(), test) for name, model in models.items()}
    return {"before": found, "teacher bytes": bytes_on_disk(teacher)}


COMMON = {"sentences": 2_000, "epochs": 2, "batch": 32, "clip": None, "tested": 2_000}
RATES = {LABELS: 1e-4, DISTILLATION: 3e-4}
# seconds instead of minutes, for the notebook: `run(LIVE, seed=0)`
LIVE = COMMON | {"sentences": 192, "epochs": 1, "tested": 200, "method": "twn", "signal": DISTILLATION}
LIVE |= {"learning_rate": RATES[DISTILLATION]}
STUDY = Study(
    name="ternary",
    question="What does the teacher still know with 2-bit weights, and what can the student learn back, and from what?",
    run=run,
    recorded=tuple(
        COMMON | {"method": method, "signal": signal, "learning_rate": RATES[signal]}
        for signal in (DISTILLATION, LABELS)
        for method in ("twn", "lat")
    ),
    full=tuple(
        COMMON
        | {"sentences": 7_072, "epochs": 3, "method": method, "signal": signal, "learning_rate": RATES[signal]}
        | {"clip": clip}
        for method in ("twn", "lat", "lat exact")
        for signal in (LABELS, DISTILLATION)
        for clip in (None, CLIP)
    ),
    seeds=(0, 1, 2),
    finish=before,
    minutes=12,
)
