"""Homework of notebook 07: four exercises on movement pruning and on layers that become smaller.

The exercises climb from a worked example with blanks (the gradient of a score) and a schedule to masks whose share is
measured, and to a block without its pruned heads and neurons. One module each.
"""

from effnlp_lessons.homework.exercise import Prediction
from effnlp_lessons.homework.movement.gradient import SCORE_GRADIENT
from effnlp_lessons.homework.movement.schedule import SHARE_AT
from effnlp_lessons.homework.movement.shrink import SHRINK_BLOCK
from effnlp_lessons.homework.movement.soft import SOFT_MASKS

EXERCISES = (
    SCORE_GRADIENT,
    SHARE_AT,
    SOFT_MASKS,
    SHRINK_BLOCK,
)

PREDICTIONS = (
    Prediction(
        id="movement.three_percent",
        question="3 % of the encoder's weights are left: by how much is the accuracy of movement pruning above that of "
        "magnitude pruning?",
        unit="points",
        low=-30,
        high=30,
        recorded=3,
    ),
    Prediction(
        id="movement.zeros",
        question="90 % of the weights of a layer are set to 0, and its matrices are multiplied as before. "
        "How many times as fast is it?",
        unit="times",
        low=0.1,
        high=20,
        recorded=3,
    ),
    Prediction(
        id="movement.half",
        question="Half of the heads and half of the neurons of a layer are really removed. "
        "How many times as fast is it?",
        unit="times",
        low=0.1,
        high=20,
        recorded=1.5,
    ),
)
