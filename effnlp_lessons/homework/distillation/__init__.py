"""Homework of notebook 01: seven exercises on distillation with soft targets.

The exercises climb from the soft loss with blanks, its gradient by hand and the sum with the labels, over a teacher's
logits (a bug to repair) and the targets of several teachers, to targets that keep k classes alone, which the library
does not have, and a training loop of one's own. One module each.
"""

from effnlp_lessons.homework.distillation.digits import DISTIL_DIGITS
from effnlp_lessons.homework.distillation.ensembles import ENSEMBLE_TARGETS
from effnlp_lessons.homework.distillation.gradient import SOFT_GRADIENT
from effnlp_lessons.homework.distillation.mixed import MIXED_LOSS
from effnlp_lessons.homework.distillation.soft import SOFT_LOSS
from effnlp_lessons.homework.distillation.teachers import TEACHER_LOGITS
from effnlp_lessons.homework.distillation.top_k import TOP_K_TARGETS
from effnlp_lessons.homework.exercise import Prediction

EXERCISES = (
    SOFT_LOSS,
    SOFT_GRADIENT,
    MIXED_LOSS,
    TEACHER_LOGITS,
    ENSEMBLE_TARGETS,
    TOP_K_TARGETS,
    DISTIL_DIGITS,
)

PREDICTIONS = (
    Prediction(
        id="distillation.gain",
        question="A student gains from a teacher's answers to more text: where does most of the gain come from?",
        choices=("soft answers", "more text", "both alike"),
        recorded="soft answers",
    ),
    Prediction(
        id="distillation.threes",
        question="A student of soft targets at T = 8 never saw a 3: how many of the test 3s are right as trained?",
        unit="per cent",
        low=0,
        high=100,
        recorded=10,
    ),
    Prediction(
        id="distillation.temperature",
        question="A student with four hidden units: at T = 20, compared with T = 1, it is",
        choices=("better", "worse", "as good"),
        recorded="better",
    ),
    Prediction(
        id="distillation.start",
        question="Two layers, distilled with soft answers: truncated blocks, compared with random ones, are",
        choices=("better", "worse", "alike"),
        recorded="better",
    ),
)
