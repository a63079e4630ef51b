"""Homework of notebook 06: four exercises on lottery tickets.

The exercises climb from a round of pruning with blanks to rewinding, training under a mask, and two controls with bugs
in them. One module each.
"""

from effnlp_lessons.homework.exercise import Prediction
from effnlp_lessons.homework.tickets.controls import CONTROLS
from effnlp_lessons.homework.tickets.masked import MASKED_TRAINING
from effnlp_lessons.homework.tickets.rewind import REWIND
from effnlp_lessons.homework.tickets.rounds import ONE_ROUND

EXERCISES = (
    ONE_ROUND,
    REWIND,
    MASKED_TRAINING,
    CONTROLS,
)

PREDICTIONS = (
    Prediction(
        id="tickets.early",
        question="After a tenth of the training, by how much is the accuracy of a ticket with 16.9 % of the weights "
        "above that of the dense net? (Below 0: the dense net leads.)",
        unit="points",
        low=-20,
        high=20,
        recorded=-2,
    ),
    Prediction(
        id="tickets.reinit",
        question="The same mask with new random weights: its accuracy after training, less that of the ticket",
        unit="points",
        low=-20,
        high=20,
        recorded=-5,
    ),
)
