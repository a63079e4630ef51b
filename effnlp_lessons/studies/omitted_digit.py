"""A digit left out of the transfer set: what does the student know of it? (Hinton, Vinyals, Dean 2015, sec. 3)

The teacher sees all digits. The student's transfer set holds no 3. It is trained on labels, and on soft targets at
several temperatures; then one bias, that of class 3, is raised. How much is chosen on the training digits, where the
3s are put back for this one number.

NOTE the paper chose the shift on its test set.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save
from torch import Tensor, nn

from effnlp_lessons import paths
from effnlp_lessons.datasets.digits import load_digits
from effnlp_lessons.distillation.hinton import (
    LogitLoss,
    distil,
    distillation_loss,
    hard_cross_entropy,
    label_objective,
    teacher_logits_of,
)
from effnlp_lessons.distillation.omitted_digit import DigitExamples, digit_network, rows_without
from effnlp_lessons.studies.runner import Outcome, Run, Study
from effnlp_lessons.training import TrainingPlan, train, write_atomically

SHIFTS = torch.arange(0, 8.25, 0.25)
FILE = "omitted_digit.safetensors"


def train_teacher(seed: int, epochs: int = 12) -> nn.Sequential:
    """Two hidden layers of 300 with dropout, on the labels of all training digits; in evaluation mode."""
    teacher = digit_network((300, 300), dropout=0.4, seed=seed)
    plan = TrainingPlan(epochs=epochs, batch_size=64, learning_rate=2e-3, seed=seed)
    train(teacher, DigitExamples(load_digits().subset("train")), label_objective, plan, progress=False)
    return teacher


def loss_of(targets: str | float) -> LogitLoss:
    """The student's loss: on "hard" labels, or on soft targets alone at a temperature."""
    if targets == "hard":
        return lambda student, teacher, labels: hard_cross_entropy(student, labels)
    soft = partial(distillation_loss, temperature=targets)
    return lambda student, teacher, labels: soft(student, teacher)


def right_by_shift(
    logits: Float[Tensor, "rows 10"], labels: Int[Tensor, " rows"], omitted: int
) -> tuple[list[float], list[float], list[float]]:
    """Per cent right at every one of `SHIFTS` of the omitted class's bias: of that class, of the others, of all."""
    own, found = labels == omitted, []
    for shift in SHIFTS:
        shifted = logits.clone()
        shifted[:, omitted] += shift
        right = (shifted.argmax(-1) == labels).double()
        found.append([round(100 * part.mean().item(), 2) for part in (right[own], right[~own], right)])
    omitted_right, others_right, all_right = (list(column) for column in zip(*found, strict=True))
    return omitted_right, others_right, all_right


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """One teacher, and one student for each kind of targets. Files: their logits on the test digits.

    Numbers: "teacher", per cent of the test digits right; "results", `{targets: {"omitted", "others", "all": per cent
    right at every shift, "shift": the shift that is best for all training digits}}`.
    """
    digits, omitted = load_digits(), setting["omitted"]
    everything, test = DigitExamples(digits.subset("train")), DigitExamples(digits.subset("test"))
    teacher = train_teacher(seed, setting.get("teacher_epochs", 12))
    targets, on_test = teacher_logits_of([teacher], everything.pixels)[0], teacher_logits_of([teacher], test.pixels)[0]
    kept = rows_without(everything.labels, omitted)
    transfer_set = DigitExamples(digits.subset("train"), kept)
    results, logits = {}, {"teacher": on_test}
    for kind in ("hard", *setting["temperatures"]):
        student = digit_network(tuple(setting["hidden"]), seed=seed + 1_000)
        plan = TrainingPlan(setting["epochs"], batch_size=64, learning_rate=2e-3, weight_decay=0.0, seed=seed)
        distil(student, transfer_set, targets[kept], loss_of(kind), plan)
        mine = teacher_logits_of([student], test.pixels)[0]
        own, others, every = right_by_shift(mine, test.labels, omitted)
        on_training_digits = teacher_logits_of([student], everything.pixels)[0]
        best = max(
            range(len(SHIFTS)), key=right_by_shift(on_training_digits, everything.labels, omitted)[2].__getitem__
        )
        results[str(kind)] = {"omitted": own, "others": others, "all": every, "shift": SHIFTS[best].item()}
        logits[str(kind)] = mine
    right = 100 * (on_test.argmax(-1) == test.labels).double().mean().item()
    stored = save({name: z.half().contiguous() for name, z in logits.items()})
    return Outcome({"teacher": round(right, 2), "results": results}, {FILE: stored})


def finish(runs: list[Run], artefacts: Path) -> dict[str, Any]:
    """Ship the logits of the first seed, for the explorer."""
    first = min(runs, key=lambda run: run.seed)
    write_atomically(artefacts / FILE, lambda path: path.write_bytes(first.outcome.files[FILE]))
    return {"shipped": {"seed": first.seed, "bytes": len(first.outcome.files[FILE])}}


def load_logits() -> dict[str, Tensor]:
    """Logits (1000, 10), float32, on the test digits: of "teacher", and of the students "hard", "1", "2", "4", ...

    A student's name is the temperature of its targets; none saw a 3 in its transfer set.

    Raises:
        FileNotFoundError: if the study was not recorded.
    """
    file = paths.checkpoints_dir() / FILE
    if not file.exists():
        raise FileNotFoundError(
            f"{file.name} is missing: record it with `python -m effnlp_lessons.studies omitted_digit`"
        )
    return {name: logits.float() for name, logits in load_file(file).items()}


STUDY = Study(
    name="omitted_digit",
    question="What does a student know of a digit that was left out of its transfer set, by temperature?",
    run=run,
    recorded=({"omitted": 3, "hidden": [300, 300], "epochs": 6, "temperatures": [1, 2, 4, 8, 20]},),
    full=tuple(
        {"omitted": digit, "hidden": [300, 300], "epochs": 6, "temperatures": [1, 2, 4, 8, 20]} for digit in range(10)
    ),
    seeds=(0, 1, 2, 3, 4),
    minutes=2,
    finish=finish,
)
