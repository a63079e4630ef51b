"""Which temperature suits which student? On digits, by the width of one hidden layer (Hinton, Vinyals, Dean 2015).

Students of several widths learn all training digits: from labels, from one teacher, and from an ensemble of teachers
(sec. 1) at several temperatures. Soft targets alone, so that the temperature is all that differs.

NOTE the ensemble's target at a temperature is the arithmetic mean of its members' softened distributions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effnlp_lessons.datasets.digits import load_digits
from effnlp_lessons.distillation.hinton import distil, ensemble_logits, teacher_logits_of
from effnlp_lessons.distillation.omitted_digit import DigitExamples, digit_network
from effnlp_lessons.studies.omitted_digit import loss_of, train_teacher
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.training import TrainingPlan

HARD, ONE, ENSEMBLE = "labels", "one teacher", "ensemble"


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Numbers, per cent of the test digits right: "members", "ensemble of them", and "results".

    "results" is `{HARD: {width: right}, ONE: {width: {temperature: right}}, ENSEMBLE: the same}`.
    """
    digits = load_digits()
    training, test = DigitExamples(digits.subset("train")), DigitExamples(digits.subset("test"))

    def right(logits: Tensor) -> float:
        return round(100 * (logits.argmax(-1) == test.labels).double().mean().item(), 2)

    members = [train_teacher(100 * seed + member, setting["teacher_epochs"]) for member in range(setting["members"])]
    targets, on_test = (teacher_logits_of(members, examples.pixels) for examples in (training, test))

    def student_right(width: int, kind: str | float, teacher_logits: Tensor) -> float:
        student = digit_network((width,), seed=seed + 1_000)
        plan = TrainingPlan(setting["epochs"], batch_size=64, learning_rate=5e-3, weight_decay=0.0, seed=seed)
        distil(student, training, teacher_logits, loss_of(kind), plan)
        return right(teacher_logits_of([student], test.pixels)[0])

    results: dict[str, dict[str, Any]] = {HARD: {}, ONE: {}, ENSEMBLE: {}}
    for width in setting["widths"]:
        name = str(width)
        results[HARD][name] = student_right(width, "hard", targets[0])
        results[ONE][name] = {str(t): student_right(width, t, targets[0]) for t in setting["temperatures"]}
        results[ENSEMBLE][name] = {
            str(t): student_right(width, t, ensemble_logits(targets, temperature=t)) for t in setting["temperatures"]
        }
    together = right(ensemble_logits(on_test))
    return Outcome({"members": [right(z) for z in on_test], "ensemble of them": together, "results": results})


STUDY = Study(
    name="temperature_by_size",
    question="Which temperature suits a student of which width, on digits, from one teacher and from an ensemble?",
    run=run,
    recorded=(
        {"widths": [4, 8, 16, 128], "temperatures": [1, 2, 4, 8, 20], "epochs": 20, "members": 5, "teacher_epochs": 12},
    ),
    full=(
        {
            "widths": [4, 8, 16, 32, 64, 128, 300],
            "temperatures": [0.5, 1, 2, 3, 4, 8, 20],
            "epochs": 40,
            "members": 10,
            "teacher_epochs": 24,
        },
    ),
    seeds=(0, 1, 2, 3, 4),
    minutes=6,
)
