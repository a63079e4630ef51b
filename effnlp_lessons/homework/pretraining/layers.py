"""Exercise 1 of notebook 02: which layers a DistilBERT copies from its teacher.

DistilBERT (Sanh et al. 2019, arXiv 1910.01108, sec. 3). The paper says "one layer out of two"; the released code copies
layers 0, 2, 4, 7, 9 and 11 of BERT's twelve.
"""

import math
from collections.abc import Callable

from torch import Generator

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def alternate_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """The teacher layers to copy, from 0: evenly spread, the first and the last among them, a half rounds down.

    A student of one layer takes the first.
    """
    if student_layers == 1:
        return [0]
    gaps, last = student_layers - 1, teacher_layers - 1
    return [math.ceil(layer * last / gaps - 0.5) for layer in range(student_layers)]


def _each(place: Callable[[int, int, int], int]) -> Answer:
    """The layers by another rule of (student layer, teacher_layers, student_layers), for the mistakes."""

    def answer(teacher_layers: int, student_layers: int) -> list[int]:
        if student_layers == 1:
            return [0]
        return [place(layer, teacher_layers, student_layers) for layer in range(student_layers)]

    return answer


def _rounded(rule: Callable[[float], int]) -> Answer:
    """The right places, rounded by another rule."""
    return _each(lambda layer, teacher, student: rule(layer * (teacher - 1) / (student - 1)))


def _any(generator: Generator) -> tuple:
    student = whole_number(3, 6, generator)
    return student + whole_number(1, 18, generator), student


def _two_layers(generator: Generator) -> tuple:
    return whole_number(3, 24, generator), 2


def _one_layer(generator: Generator) -> tuple:
    return whole_number(2, 24, generator), 1


def _all_layers(generator: Generator) -> tuple:
    layers = whole_number(2, 12, generator)
    return layers, layers


def _half(remainder: int) -> Callable[[Generator], tuple]:
    """Three layers of an even number: the middle one falls halfway. `remainder` (0, 2) of the number by 4."""
    return lambda generator: (4 * whole_number(1, 6, generator) + remainder, 3)


ALTERNATE_LAYERS = Exercise(
    id="pretraining.alternate_layers",
    title="the layers that DistilBERT copies",
    minutes=10,
    difficulty=1,
    reference=alternate_layers,
    properties=(
        Property("by hand: 12 layers, a student of 6", lambda generator: (12, 6), times=1),
        Property("a student of one layer takes the first", _one_layer, times=1),
        Property("a student of two layers takes the first and the last", _two_layers, times=1),
        Property("a student as deep as its teacher takes all", _all_layers, times=1),
        Property("any two depths", _any, times=4),
        Property("three layers of 4, 8, 12, ...: a half rounds down", _half(0), times=2),
        Property("three layers of 6, 10, 14, ...: a half rounds down", _half(2), times=2),
    ),
    mistakes=(
        Mistake(
            "A fixed step from the first layer",
            "0, 2, 4, 6, 8, 10: the last layer of the teacher is never copied, and it is the one whose output the "
            "head was trained on. Divide the way from the first to the last layer by the number of gaps, "
            "student_layers - 1.",
            _each(lambda layer, teacher, student: layer * (teacher // student)),
        ),
        Mistake(
            "The first layer of each group",
            "You share the layers out into student_layers groups, so the last is left out. There is one gap fewer than "
            "there are layers.",
            _each(lambda layer, teacher, student: layer * teacher // student),
        ),
        Mistake(
            "The last layer of each group",
            "1, 3, 5, 7, 9, 11: the first layer, which was trained to read the embeddings, is left out.",
            _each(lambda layer, teacher, student: (layer + 1) * teacher // student - 1),
        ),
        Mistake(
            "Layers are numbered from one",
            "Your last layer is teacher_layers, which does not exist, and layer 0 is never copied. Count from 0.",
            _each(lambda layer, teacher, student: alternate_layers(teacher, student)[layer] + 1),
        ),
        Mistake(
            "The last layer is taken for number teacher_layers",
            "Counted from 0 the last of 12 layers is 11: the way to share out is teacher_layers - 1 long.",
            _each(lambda layer, teacher, student: math.ceil(layer * teacher / (student - 1) - 0.5)),
        ),
        Mistake(
            "The lowest layers",
            "The student begins as the bottom of the teacher, and never gets its upper half. Spread the layers.",
            _each(lambda layer, teacher, student: layer),
        ),
        Mistake(
            "The highest layers",
            "The layers that you copy were trained to read layers that you leave out. Spread them, from the first on.",
            _each(lambda layer, teacher, student: teacher - student + layer),
        ),
        Mistake(
            "Python's round goes to the even number",
            "round(1.5) and round(2.5) are both 2. Here a half rounds down: 1.5 is 1, 2.5 is 2. "
            "math.ceil(x - 0.5) does that.",
            _rounded(round),
        ),
        Mistake(
            "A half rounds up",
            "2.5 must become 2 here: the smaller number wins. math.ceil(x - 0.5) does that.",
            _rounded(lambda place: math.floor(place + 0.5)),
        ),
        Mistake(
            "Everything rounds down",
            "6.6 lies nearer to 7. Only an exact half goes down. Integer division and int() cut everything off.",
            _rounded(math.floor),
        ),
        Mistake(
            "Everything rounds up",
            "2.2 lies nearer to 2. Take the nearest whole number.",
            _rounded(math.ceil),
        ),
    ),
    hints=(
        "Twelve layers, counted from 0: the way from the first to the last is 11 long. Six points on it that are "
        "equally far apart, the ends among them, leave how many gaps?",
        "Point number i of k stands at i * (teacher_layers - 1) / (k - 1): 0, 2.2, 4.4, 6.6, 8.8, 11. Now the nearest "
        "whole number. Try your rounding on 1.5 and on 2.5: it must give 1 and 2.",
        "A neighbour: four lamps along a street of house numbers 10 to 20, one at each end.\n"
        "  3 gaps of 10 / 3: the lamps stand at 10, 13.33, 16.67, 20\n"
        "  the nearest houses: 10, 13, 17, 20\n"
        "With three lamps in numbers 10 to 15 the middle one stands at 12.5. A half rounds down: house 12.\n"
        "  math.ceil(12.5 - 0.5) -> 12      math.ceil(13.5 - 0.5) -> 13      round(13.5) -> 14",
    ),
)
