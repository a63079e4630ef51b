"""Predict, then see: a guess is stored before the result is shown, and drawn beside it afterwards.

A guess is one small file, `EFFNLP_HOME/guesses/ID.json` (by default in the folder `.progress` of the
checkout): it lasts between notebooks, and two open notebooks cannot overwrite each other's. Where the folder
cannot be written, guesses last as long as the kernel. With `EFFNLP_GUESSES=recorded` in the environment
(builds and tests) `predict(id, None)` takes the recorded guess, and nothing is written.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from effnlp_lessons.homework.exercise import HomeworkError, Prediction
from effnlp_lessons.homework.lectures import find_prediction
from effnlp_lessons.paths import ROOT

_guesses: dict[str, float | str] = {}  # of this kernel
_told_unwritable: set[Path] = set()


def predict(id: str, value: float | str | None = None) -> None:
    """Store your guess. With None: say how to make one.

    Raises:
        HomeworkError: if the guess does not fit the question, or the id is unknown.
    """
    prediction = find_prediction(id)
    if value is None:
        if _recorded():
            _guesses[id] = prediction.recorded
            print(f"{prediction.question}\nRecorded guess: {_words(prediction, prediction.recorded)}")
        else:
            _ask(prediction)
        return
    guess = prediction.accept(value)
    if guess is None:
        raise HomeworkError(f"{id} takes {prediction.allowed()}; got {value!r}")
    _guesses[id] = guess
    _store(id, guess)
    print(f"{prediction.question}\nYour guess: {_words(prediction, guess)}. Run the next cells to see.")


def reveal(id: str) -> float | str | None:
    """The stored guess; None, with a printed request to make one, if there is none.

    Raises:
        HomeworkError: if the id is unknown.
    """
    prediction = find_prediction(id)
    guess = _guess(prediction)
    if guess is None:
        print(f"First make your guess: predict({id!r}, ...) in the cell above. Then run this cell again.")
    return guess


def _guess(prediction: Prediction) -> float | str | None:
    if prediction.id in _guesses:
        return _guesses[prediction.id]
    return prediction.recorded if _recorded() else _load(prediction)


def _ask(prediction: Prediction) -> None:
    guess = _guess(prediction)
    print(prediction.question)
    if guess is not None:
        print(f"Your guess, stored earlier: {_words(prediction, guess)}.")
        return
    print(f"Put your guess in place of None and run the cell again. It takes {prediction.allowed()}.")


def _words(prediction: Prediction, guess: float | str) -> str:
    return guess if isinstance(guess, str) else f"{guess:,} {prediction.unit}"


def _recorded() -> bool:
    return os.environ.get("EFFNLP_GUESSES") == "recorded"


# ----------------------------------------------------------------------------- the files


def _file(id: str) -> Path:
    home = Path(os.environ.get("EFFNLP_HOME") or ROOT / ".progress")
    return home / "guesses" / f"{id}.json"


def _store(id: str, guess: float | str) -> None:
    """Write the guess in one step: a reader sees the old file or the new one, never half of it."""
    path = _file(id)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"guess": guess}, file)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise
    except OSError:
        if path.parent not in _told_unwritable:
            _told_unwritable.add(path.parent)
            print("Your progress folder cannot be written: guesses last until this notebook's kernel stops.")


def _load(prediction: Prediction) -> float | str | None:
    """The guess on file; None if there is none. A file that is no guess is renamed, and that is said."""
    path = _file(prediction.id)
    try:
        text = path.read_text()
    except OSError:
        return None
    except UnicodeDecodeError:
        text = ""
    guess = prediction.accept(_guess_in(text))
    if guess is None:
        with contextlib.suppress(OSError):
            os.replace(path, path.with_suffix(".json.damaged"))
        print(f"Your stored guess for {prediction.id} could not be read. It is now *.json.damaged.")
    return guess


def _guess_in(text: str) -> Any:
    try:
        return json.loads(text)["guess"]
    except (ValueError, TypeError, KeyError):
        return None
