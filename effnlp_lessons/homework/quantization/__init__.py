"""Homework of notebook 03: six exercises on quantization after training.

The exercises climb from a worked example with blanks (scale and zero point) and a wrong answer to repair (codes) to
integer arithmetic: a multiplier, its bit-exact use, a linear layer with zero points on both sides, which the library
does not have, and a bug in a group-wise quantizer. One module each.
"""

from effnlp_lessons.homework.exercise import Prediction
from effnlp_lessons.homework.quantization.codes import QUANTIZE
from effnlp_lessons.homework.quantization.groups import GROUP_QUANTIZE
from effnlp_lessons.homework.quantization.linear import INTEGER_LINEAR
from effnlp_lessons.homework.quantization.multiplier import FIXED_POINT_MULTIPLIER
from effnlp_lessons.homework.quantization.ranges import SCALE_AND_ZERO_POINT
from effnlp_lessons.homework.quantization.requantize import REQUANTIZE

EXERCISES = (
    SCALE_AND_ZERO_POINT,
    QUANTIZE,
    FIXED_POINT_MULTIPLIER,
    REQUANTIZE,
    INTEGER_LINEAR,
    GROUP_QUANTIZE,
)

PREDICTIONS = (
    Prediction(
        id="quantization.outlier",
        question="One weight of a matrix is made 20 times as large as the largest before. "
        "How many of the 15 codes of a symmetric 4-bit grid do all the other weights still use?",
        unit="codes",
        low=1,
        high=15,
        recorded=5,
    ),
    Prediction(
        id="quantization.granularity",
        question="Accuracy of the teacher with 4-bit weights, one grid for each matrix",
        unit="per cent",
        low=0,
        high=100,
        recorded=84,
    ),
    Prediction(
        id="quantization.integer_speed",
        question="How many times as fast as float32 is a product of two int8 matrices on this computer?",
        unit="times",
        low=0,
        high=100,
        recorded=4,
    ),
    Prediction(
        id="quantization.file",
        question="A model is fake-quantized to 4 bits and its state_dict saved. Beside the float32 file, this one is",
        choices=("an eighth", "a quarter", "as large"),
        recorded="an eighth",
    ),
)
