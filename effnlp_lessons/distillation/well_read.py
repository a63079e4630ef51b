"""Well-read students: pre-train the small model before it is distilled (Turc, Chang, Lee, Toutanova 2019, 1908.08962).

Pre-trained distillation has three steps, for a student of any shape:
1. pre-train it on masked words of general text;
2. distil it from a fine-tuned teacher on unlabelled text of the task, with soft labels only: -sum_i p_i log q_i;
3. fine-tune it on labelled text, if there is any.
The paper's other ways are the same function with a step left out or another start: distillation from random weights,
pre-training and fine-tuning, distillation of a student cut out of a deep pre-trained model ("truncated").

NOTE the sizes in the released models' table count BERT with both pre-training heads: `pretraining_parameters`.
NOTE the paper pre-trains with BERT's next-sentence task too. Here step 1 has masked words alone, so that the pooler
starts step 2 as it was initialised. That step 2 has no temperature (T = 1) was not checked in the paper's text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from effnlp_lessons.distillation.hinton import distil, hard_cross_entropy, label_objective, soft_cross_entropy
from effnlp_lessons.heads import MaskedLanguageModel, SentenceClassifier
from effnlp_lessons.measure import transformer_parameters
from effnlp_lessons.training import Examples, History, TrainingPlan, train
from effnlp_lessons.transformer import Encoder, TransformerConfig

LAYERS = (2, 4, 6, 8, 10, 12)
WIDTHS = (128, 256, 512, 768)
# the released models that have a name: (layers, width)
NAMES = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512), "base": (12, 768)}

# the loss of step 1: (model, batch) -> scalar
MaskedWordLoss = Callable[[MaskedLanguageModel, Any], Tensor]


# ---------------------------------------------------------------------------------------------- the sizes


def student_config(layers: int, width: int) -> TransformerConfig:
    """A BERT of the paper's family: heads of 64 channels, a feed-forward layer of 4 * width.

    Raises:
        ValueError: a width that is no multiple of 64.
    """
    if width < 64 or width % 64:
        raise ValueError(f"width must be a multiple of 64, got {width}")
    return TransformerConfig(d_model=width, layers=layers, heads=width // 64, d_ff=4 * width)


# the 24 published sizes by (layers, width)
SIZES = {(layers, width): student_config(layers, width) for layers in LAYERS for width in WIDTHS}


def encoder_parameters(config: TransformerConfig) -> int:
    """Parameters of the encoder alone, embeddings and pooler included: transformers' `BertModel`."""
    return sum(transformer_parameters(config).values())


def pretraining_parameters(config: TransformerConfig) -> int:
    """Parameters with both pre-training heads, as the paper counts: transformers' `BertForPreTraining`.

    The masked-word head has a d x d layer, a norm and one bias a word, its table is that of the embeddings; the
    next-sentence head has two classes.
    """
    d = config.d_model
    masked_words = d * d + d + 2 * d + config.vocab_size
    return encoder_parameters(config) + masked_words + 2 * d + 2


# --------------------------------------------------------------------------------------------- the starts


def truncated_encoder(teacher: Encoder, layers: int) -> Encoder:
    """A new encoder with copies of the teacher's first `layers` blocks, its embeddings, last norm and pooler.

    All of its parameters require a gradient, whatever the teacher's do. The width stays the teacher's.

    Raises:
        ValueError: fewer than 0 layers, or more than the teacher has.
    """
    if not 0 <= layers <= len(teacher.blocks):
        raise ValueError(f"layers must be in 0 .. {len(teacher.blocks)}, got {layers}")
    student = copy.deepcopy(teacher)
    student.blocks = student.blocks[:layers]
    student.config = student.embeddings.config = replace(teacher.config, layers=layers)
    student.zero_grad()
    return student.requires_grad_(True)


def pretrain(encoder: Encoder, text: Examples, loss: MaskedWordLoss, plan: TrainingPlan) -> History:
    """Step 1: train `encoder` in place under a new masked-word head, whose weights come from the plan's seed.

    Args:
        text: general text; its batches are what `loss` takes.
        loss: `loss(model, batch)` gives a scalar, with `model` a MaskedLanguageModel on the encoder. It may look at a
            pre-trained teacher too: distillation before the task is known is another start.
    """
    model = MaskedLanguageModel(encoder, plan.seed)
    return train(model, text, loss, plan, progress=False)


# ---------------------------------------------------------------------------------------- the later steps


def soft_label_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """The loss of step 2: -sum_i p_i log q_i at temperature 1, nats, mean over the batch. The labels are not read."""
    return soft_cross_entropy(student_logits, teacher_logits, temperature=1.0)


def pseudo_label_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """The control of step 2: cross-entropy with the class that the teacher finds likeliest. The labels are not read."""
    return hard_cross_entropy(student_logits, teacher_logits.argmax(-1))


def distil_on_text(
    student: SentenceClassifier,
    text: Examples,
    teacher_logits: Float[Tensor, "examples classes"],
    plan: TrainingPlan,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = soft_label_loss,
) -> History:
    """Step 2: train `student` in place on the teacher's cached logits; leaves it in evaluation mode.

    Args:
        text: text of the task; a batch is (*inputs, labels) as of `ReviewExamples`, whose labels are not read.
        teacher_logits: row i for example i. Without any text nothing happens.
        loss: `soft_label_loss`, or `pseudo_label_loss` for the control.

    Raises:
        ValueError: another number of logits than of examples.
    """
    if not len(text.lengths) and not len(teacher_logits):
        student.eval()
        return History()
    return distil(student, text, teacher_logits, loss, plan)


def fine_tune(student: SentenceClassifier, labelled: Examples, plan: TrainingPlan) -> History:
    """Step 3: train `student` in place on labels, a batch is (*inputs, labels); leaves it in evaluation mode."""
    return train(student, labelled, label_objective, plan, progress=False)


@dataclass(frozen=True)
class Plans:
    """How each step is trained. The seed of a step is that of its plan, so that it does not depend on the others."""

    pretrain: TrainingPlan = TrainingPlan()
    distil: TrainingPlan = TrainingPlan()
    fine_tune: TrainingPlan = TrainingPlan()


def pretrained_distillation(
    student: SentenceClassifier,
    plans: Plans,
    *,
    general_text: Examples | None = None,
    masked_word_loss: MaskedWordLoss | None = None,
    task_text: Examples | None = None,
    teacher_logits: Float[Tensor, "examples classes"] | None = None,
    labelled: Examples | None = None,
    distillation: Callable[[Tensor, Tensor, Tensor], Tensor] = soft_label_loss,
) -> dict[str, History]:
    """The three steps in place, each where its data are given; the losses of those that were taken.

    All data: PD+F. No labelled text: PD. No task text: pre-training and fine-tuning. No general text: distillation of
    the student as it is, from random weights or cut out of its teacher. Sentences that are in `task_text` and
    `labelled` are no additional data.

    Raises:
        ValueError: general text without a loss for it, task text without the teacher's logits, or the reverse.
    """
    if (general_text is None) != (masked_word_loss is None):
        raise ValueError("general_text and masked_word_loss must be given together")
    if (task_text is None) != (teacher_logits is None):
        raise ValueError("task_text and teacher_logits must be given together")
    histories = {}
    if general_text is not None:
        histories["pretrain"] = pretrain(student.encoder, general_text, masked_word_loss, plans.pretrain)
    if task_text is not None:
        histories["distil"] = distil_on_text(student, task_text, teacher_logits, plans.distil, distillation)
    if labelled is not None:
        histories["fine_tune"] = fine_tune(student, labelled, plans.fine_tune)
    return histories
