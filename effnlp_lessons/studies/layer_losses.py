"""Which loss of which paper teaches a three-layer student of MiniLM-L6 most, at equal size and equal steps?

The teacher is MiniLM as published: no task is known yet. Its student has half the layers, starts from the teacher's
layers that DistilBERT would copy, and learns on general text from one method's losses: DistilBERT's cosine of the last
hidden states, TinyBERT's hidden states and raw attention scores, MobileBERT's feature maps and attention
distributions. "none" is the start. The students are judged on movie reviews, which none of them has read.

NOTE the token table is copied and kept as it is, so that TinyBERT's embedding loss is 0 from the first step. Losses
over words are left out: MiniLM has no masked-word head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from effnlp_lessons.classification import ReviewExamples, accuracy, logits_of
from effnlp_lessons.datasets import general_text, reviews, tokenizer
from effnlp_lessons.distillation.distilbert import alternate_layers, cosine_loss
from effnlp_lessons.distillation.mobilebert_transfer import attention_transfer, feature_map_transfer
from effnlp_lessons.distillation.tinybert import attention_loss, hidden_loss, layer_mapping
from effnlp_lessons.distillation.well_read import fine_tune, truncated_encoder
from effnlp_lessons.heads import SentenceClassifier, sentence_vectors
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.training import TrainingPlan, train
from effnlp_lessons.transformer import Encoder, EncoderOutput

# (student's output, teacher's output, mask, teacher layer of every student layer) -> scalar
LayerLoss = Callable[[EncoderOutput, EncoderOutput, Tensor, tuple[int, ...]], Tensor]


def _over_layers(loss: Callable[[Tensor, Tensor, Tensor], Tensor], what: str) -> LayerLoss:
    """The sum of `loss` over the student's layers, of their "hidden" states or raw "scores"."""

    def summed(student: EncoderOutput, teacher: EncoderOutput, mask: Tensor, mapping: tuple[int, ...]) -> Tensor:
        mine, theirs = getattr(student, what), getattr(teacher, what)
        first = 1 if what == "hidden" else 0  # hidden[0] are the embeddings
        pairs = enumerate(mapping)
        return sum(loss(mine[layer + first], theirs[source - 1 + first], mask) for layer, source in pairs)

    return summed


def _sum(*losses: LayerLoss) -> LayerLoss:
    return lambda *arguments: sum(loss(*arguments) for loss in losses)


HIDDEN, SCORES = _over_layers(hidden_loss, "hidden"), _over_layers(attention_loss, "scores")
MAPS, DISTRIBUTIONS = _over_layers(feature_map_transfer, "hidden"), _over_layers(attention_transfer, "scores")
NONE = "none"
METHODS: dict[str, LayerLoss] = {
    "cosine of the last layer (DistilBERT)": lambda student, teacher, mask, _: cosine_loss(
        student.last, teacher.last, mask
    ),
    "hidden states": HIDDEN,
    "attention scores": SCORES,
    "attention distributions": DISTRIBUTIONS,
    "hidden states + scores (TinyBERT)": _sum(HIDDEN, SCORES),
    "feature maps + distributions (MobileBERT)": _sum(MAPS, DISTRIBUTIONS),
}


class AnsweredBatches:
    """Batches of sentences with the teacher's output, computed once: one example of `training.train` is a batch."""

    def __init__(self, teacher: Encoder, token_ids: list[list[int]], batch_size: int, *, scores: bool = True) -> None:
        order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
        self.batches = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for first in range(0, len(order), batch_size):
                ids, mask = tokenizer.pad([token_ids[i] for i in order[first : first + batch_size]])
                self.batches.append((ids, mask, teacher(ids, mask, return_scores=scores)))
        self.lengths = [1] * len(self.batches)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor, EncoderOutput]:
        (index,) = indices
        return self.batches[index]


def answered(setting: dict[str, Any], seed: int) -> AnsweredBatches:
    """`setting["sentences"]` random sentences of the general text with MiniLM's outputs."""
    text = general_text.load_general_text()
    chosen = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))[: setting["sentences"]]
    token_ids = tokenizer.encode([text[i] for i in chosen.tolist()], max_length=setting["tokens"])
    return AnsweredBatches(load_minilm(), token_ids, setting["batch"])


def start(layers: tuple[int, ...]) -> Encoder:
    """A student that begins with these layers of MiniLM (from 0), its token table frozen."""
    student = truncated_encoder(load_minilm(), 6)
    student.blocks = torch.nn.ModuleList(student.blocks[layer] for layer in layers)
    student.embeddings.requires_grad_(False)
    return student


def teach(
    student: Encoder,
    text: AnsweredBatches,
    loss: LayerLoss,
    mapping: tuple[int, ...],
    epochs: int,
    rate: float,
    seed: int,
) -> list[float]:
    """Train in place on the teacher's outputs; the loss of every step."""
    plan = TrainingPlan(epochs, batch_size=1, learning_rate=rate, bfloat16=True, seed=seed)

    def of_batch(student: Encoder, batch: tuple) -> Tensor:
        token_ids, mask, theirs = batch
        return loss(student(token_ids, mask, return_scores=True), theirs, mask, mapping)

    return train(student, text, of_batch, plan, progress=False).loss


# ------------------------------------------------------------------------------------------- the judgement


@dataclass(frozen=True)
class Exam:
    """What a student is judged by: dev sentences, 1,500 labelled sentences, and MiniLM's vectors of the former."""

    dev: ReviewExamples
    labelled: ReviewExamples
    teacher: Float[Tensor, "sentences d_model"]


@cache
def exam(labels: int = 1_500) -> Exam:
    """The same for every student: `labels` training sentences (always the same), and the dev sentences."""
    data = reviews.load_reviews()
    dev, labelled = ReviewExamples(data.subset("dev")), ReviewExamples(data.subset("train"), limit=labels)
    return Exam(dev, labelled, vectors(load_minilm(), dev))


def vectors(encoder: Encoder, examples: ReviewExamples) -> Float[Tensor, "sentences d_model"]:
    """Sentence vectors of length 1, float32."""
    with torch.autocast("cpu", torch.bfloat16):
        return logits_of(lambda ids, mask: sentence_vectors(encoder, ids, mask), examples.token_ids).float()


def agreement(mine: Float[Tensor, "sentences d"], theirs: Float[Tensor, "sentences d"]) -> float:
    """Per cent of the sentences whose nearest other sentence (by cosine) is the same for student and teacher."""
    nearest = [(x @ x.T).fill_diagonal_(-2).argmax(-1) for x in (mine, theirs)]
    return 100 * (nearest[0] == nearest[1]).double().mean().item()


def probe_accuracy(
    train_vectors: Tensor, train_labels: Tensor, test_vectors: Tensor, test_labels: Tensor, ridge: float = 3.0
) -> float:
    """Per cent right of a ridge regression from sentence vectors to the label, -1 or 1; the encoder does not learn."""
    mean = train_vectors.mean(0)
    x, y = (train_vectors - mean).double(), 2 * train_labels.double() - 1
    weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - y.mean()))
    predicted = (test_vectors - mean).double() @ weights + y.mean()
    return 100 * ((predicted > 0) == (test_labels > 0)).double().mean().item()


def judge(student: Encoder) -> dict[str, float]:
    """Per cent on the dev reviews: agreement with MiniLM, and accuracy of a probe trained on 1,500 labels."""
    paper = exam()
    mine = vectors(student, paper.dev)
    probe = probe_accuracy(vectors(student, paper.labelled), paper.labelled.labels, mine, paper.dev.labels)
    return {"agreement": round(agreement(mine, paper.teacher), 2), "accuracy": round(probe, 2)}


def fine_tuned_accuracy(student: Encoder, seed: int, epochs: int) -> float:
    """Per cent of the dev reviews right after all blocks learned from the 1,500 labels; the student is changed."""
    classifier = SentenceClassifier(student, classes=2, seed=seed)
    plan = TrainingPlan(epochs, 32, learning_rate=1e-4, bfloat16=True, seed=seed)
    fine_tune(classifier, exam().labelled, plan)
    return accuracy(classifier, exam().dev)


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Numbers: "results", `{method: {"agreement", "accuracy", "fine-tuned": per cent, "loss": [first, last]}}`.

    "accuracy" is that of the probe.
    """
    text, layers = answered(setting, seed), alternate_layers(6, 3)
    mapping = layer_mapping(3, 6, setting.get("mapping", "uniform"))[1:-1]
    results = {}
    for name, loss in {NONE: None, **METHODS}.items():
        student, losses = start(layers), []
        if loss is not None:
            losses = teach(student, text, loss, mapping, setting["epochs"], setting["learning_rate"], seed)
        row: dict[str, Any] = judge(student.eval())
        if losses:
            last = losses[-20:]
            row["loss"] = [round(losses[0], 5), round(sum(last) / len(last), 5)]
        row["fine-tuned"] = round(fine_tuned_accuracy(student, seed, setting["fine_tuning_epochs"]), 2)
        results[name] = row
    return Outcome({"steps": setting["epochs"] * len(text.lengths), "results": results})


STUDY = Study(
    name="layer_losses",
    question="Which of the papers' losses teaches a three-layer student of MiniLM most, at equal steps?",
    run=run,
    recorded=(
        {"sentences": 3_200, "tokens": 32, "batch": 16, "epochs": 1, "learning_rate": 1e-3, "fine_tuning_epochs": 2},
    ),
    full=(
        {"sentences": 12_951, "tokens": 48, "batch": 32, "epochs": 3, "learning_rate": 1e-3, "fine_tuning_epochs": 3},
    ),
    seeds=(0, 1, 2),
    minutes=30,
)
