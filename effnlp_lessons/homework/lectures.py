"""Which module holds the exercises of which id. Adding a lecture's homework is one line here."""

import difflib
from importlib import import_module

from effnlp_lessons.homework.exercise import Exercise, HomeworkError, Prediction

# first part of an id -> module in this folder
MODULES = {
    "start": "start",
    "patterns": "patterns",
    "distillation": "distillation",
    "pretraining": "pretraining",
    "quantization": "quantization",
    "low_bit": "low_bit",
    "second_order": "second_order",
    "tickets": "tickets",
    "movement": "movement",
    "buckets": "buckets",
    "recurrent": "recurrent",
    "flash": "flash",
}


def find_exercise(id: str) -> Exercise:
    """The exercise of this id; its lecture's module is imported now.

    Raises:
        HomeworkError: if there is none; the message lists the ids that exist.
    """
    return _find(id, "EXERCISES", "exercise")


def find_prediction(id: str) -> Prediction:
    """The prediction of this id; its lecture's module is imported now.

    Raises:
        HomeworkError: if there is none; the message lists the ids that exist.
    """
    return _find(id, "PREDICTIONS", "prediction")


def all_exercises() -> dict[str, Exercise]:
    """Every exercise of the course by id; imports every lecture's module of exercises."""
    return {entry.id: entry for prefix in MODULES for entry in _entries(prefix, "EXERCISES")}


def all_predictions() -> dict[str, Prediction]:
    """Every prediction of the course by id; imports every lecture's module of exercises."""
    return {entry.id: entry for prefix in MODULES for entry in _entries(prefix, "PREDICTIONS")}


def _entries(prefix: str, list_name: str) -> list:
    """The exercises or predictions whose ids begin with this prefix."""
    module = import_module(f"{__package__}.{MODULES[prefix]}")
    return [entry for entry in getattr(module, list_name) if entry.id.split(".")[0] == prefix]


def _find(id: str, list_name: str, kind: str) -> Exercise | Prediction:
    if not isinstance(id, str):
        raise HomeworkError(f'the id of the {kind} comes first, as text: "start.name"; got {type(id).__name__}')
    prefix = id.split(".")[0]
    found = {entry.id: entry for entry in _entries(prefix, list_name)} if prefix in MODULES else {}
    if id in found:
        return found[id]
    known = [entry.id for prefix in MODULES for entry in _entries(prefix, list_name)]
    close = difflib.get_close_matches(id, known, n=1)
    suggestion = f" Did you mean {close[0]!r}?" if close else ""
    raise HomeworkError(f"there is no {kind} {id!r}.{suggestion} Known: {', '.join(known)}")
