"""Homework of notebook 04: five exercises on training for few bits.

The exercises climb from a worked example with blanks (the straight-through estimator) and a bug in a training step on
shadow weights to power iteration for two eigenvalues, ternary weights, and a choice of bits under a byte budget, which
the library does not make. One module each.
"""

from effnlp_lessons.homework.exercise import Prediction
from effnlp_lessons.homework.low_bit.budget import BITS_UNDER_BUDGET
from effnlp_lessons.homework.low_bit.eigenvalues import TOP_EIGENVALUES
from effnlp_lessons.homework.low_bit.shadow import SHADOW_STEP
from effnlp_lessons.homework.low_bit.straight import STRAIGHT_THROUGH
from effnlp_lessons.homework.low_bit.ternary import TERNARY_SCALE

EXERCISES = (
    STRAIGHT_THROUGH,
    SHADOW_STEP,
    TOP_EIGENVALUES,
    TERNARY_SCALE,
    BITS_UNDER_BUDGET,
)

PREDICTIONS = (
    Prediction(
        id="low_bit.qat",
        question="At 2 bits, what training through the grid adds to the accuracy of a model that is only rounded",
        unit="points",
        low=-50,
        high=50,
        recorded=10,
    ),
    Prediction(
        id="low_bit.rank",
        question="Of the 20 ways to give 3 bits to three of six layers and 2 to the others, "
        "how many are at least as good as the Hessian's choice, itself counted? (This is its place: 1 is the best.)",
        unit="ways",
        low=1,
        high=20,
        recorded=1,
    ),
    Prediction(
        id="low_bit.ternary",
        question="Ternary weights: what learning from the teacher adds to the accuracy of learning from labels",
        unit="points",
        low=-50,
        high=50,
        recorded=5,
    ),
)
