"""Homework of notebook 00: five exercises and three predictions.

The exercises climb from blanks in a worked example, over counting, a derivation and a bug to repair, to a
tool that the library does not have. One module each.
"""

from effnlp_lessons.homework.exercise import Prediction
from effnlp_lessons.homework.start.clock import MACS_OR_CLOCK
from effnlp_lessons.homework.start.crossing import CROSSING_LENGTH
from effnlp_lessons.homework.start.macs import ENCODER_MACS
from effnlp_lessons.homework.start.parameters import BLOCK_PARAMETERS
from effnlp_lessons.homework.start.pooling import MEAN_POOL

EXERCISES = (BLOCK_PARAMETERS, ENCODER_MACS, CROSSING_LENGTH, MEAN_POOL, MACS_OR_CLOCK)

PREDICTIONS = (
    Prediction(
        id="start.share",
        question="Which share of MiniLM's parameters is the word-embedding table?",
        unit="per cent",
        low=0,
        high=100,
        recorded=30,
    ),
    Prediction(
        id="start.crossing",
        question="From which length do attention scores and mixing cost more MACs than the feed-forward?",
        unit="tokens",
        low=1,
        recorded=384,
    ),
    Prediction(
        id="start.clock",
        question="On the clock, does that crossing come earlier, at the same length, or later?",
        choices=("earlier", "later", "same"),
        recorded="same",
    ),
)
