"""Homework of notebook 10: six exercises on linear attention, relative positions and memories.

Linear attention whole, by running sums and step by step; the relative shift; two queues with a bug to repair; and the
loss that teaches the compression alone.
"""

from effnlp_lessons.homework.exercise import Prediction
from effnlp_lessons.homework.recurrent.linear import LINEAR_ATTENTION, LINEAR_STEP, PREFIX_SUM
from effnlp_lessons.homework.recurrent.memory import COMPRESSION_LOSS, UPDATE_MEMORIES
from effnlp_lessons.homework.recurrent.shift import RELATIVE_SHIFT

EXERCISES = (
    LINEAR_ATTENTION,
    PREFIX_SUM,
    LINEAR_STEP,
    RELATIVE_SHIFT,
    UPDATE_MEMORIES,
    COMPRESSION_LOSS,
)

PREDICTIONS = (
    Prediction(
        id="recurrent.line",
        question="Which line of the derivation does the exponential break?",
        unit="line",
        low=1,
        high=7,
        recorded=5,
    ),
    Prediction(
        id="recurrent.token",
        question="After 8,192 tokens: how many times as fast is the next one with a state as with a KV cache?",
        unit="times as fast",
        low=0,
        recorded=100,
    ),
    Prediction(
        id="recurrent.copy",
        question="On the second copy of a passage, which model comes closest to softmax attention?",
        choices=("window", "linear", "transformer-xl", "compressive"),
        recorded="linear",
    ),
)
