"""Predict, then see: a guess is stored before the result is shown, and drawn beside it afterwards.

A guess lasts between notebooks (see `effnlp_lessons.progress`). With `EFFNLP_GUESSES=recorded` in the environment
(builds and tests) `predict(id, None)` takes the recorded guess, and nothing is written.
"""

from effnlp_lessons import progress
from effnlp_lessons.homework.exercise import HomeworkError, Prediction
from effnlp_lessons.homework.lectures import find_prediction

_guesses: dict[str, float | str] = {}  # of this kernel


def predict(id: str, value: float | str | None = None) -> None:
    """Store your guess. With None: say how to make one.

    Raises:
        HomeworkError: if the guess does not fit the question, or the id is unknown.
    """
    prediction = find_prediction(id)
    if value is None:
        if progress.recorded():
            _guesses[id] = prediction.recorded
            print(f"{prediction.question}\nRecorded guess: {_words(prediction, prediction.recorded)}")
        else:
            _ask(prediction)
        return
    guess = prediction.accept(value)
    if guess is None:
        raise HomeworkError(f"{id} takes {prediction.allowed()}; got {value!r}")
    _guesses[id] = guess
    progress.store("guesses", id, {"guess": guess})
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
    if progress.recorded():
        return prediction.recorded
    return progress.load("guesses", prediction.id, lambda content: prediction.accept(content["guess"]))


def _ask(prediction: Prediction) -> None:
    guess = _guess(prediction)
    print(prediction.question)
    if guess is not None:
        print(f"Your guess, stored earlier: {_words(prediction, guess)}.")
        return
    print(f"Put your guess in place of None and run the cell again. It takes {prediction.allowed()}.")


def _words(prediction: Prediction, guess: float | str) -> str:
    return guess if isinstance(guess, str) else f"{guess:,} {prediction.unit}"
