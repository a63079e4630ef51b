"""Guesses: stored, revealed, kept between kernels, and never in the way."""

import math
from pathlib import Path

import pytest

from effnlp_lessons import progress
from effnlp_lessons.homework import HomeworkError, predict, predictions, reveal
from effnlp_lessons.homework.exercise import Prediction
from effnlp_lessons.homework.lectures import all_predictions


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A new progress folder, a new kernel, and a student who makes guesses."""
    monkeypatch.setenv("EFFNLP_HOME", str(tmp_path / "progress"))
    monkeypatch.delenv("EFFNLP_GUESSES", raising=False)
    new_kernel()
    return tmp_path / "progress"


def new_kernel():
    predictions._guesses.clear()
    progress._told_unwritable.clear()


def test_a_guess_is_revealed_in_this_kernel_and_in_the_next(home, capsys):
    predict("start.share", 40)
    assert "Your guess: 40 per cent" in capsys.readouterr().out
    assert reveal("start.share") == 40
    new_kernel()
    assert reveal("start.share") == 40
    assert [path.name for path in (home / "guesses").iterdir()] == ["start.share.json"]


def test_a_new_guess_replaces_the_old_one():
    predict("start.clock", "later")
    predict("start.clock", " Earlier ")
    new_kernel()
    assert reveal("start.clock") == "earlier"


def test_without_a_guess_reveal_asks_in_one_line(capsys):
    assert reveal("start.crossing") is None
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "First make your guess: predict('start.crossing', ...)" in printed


def test_none_says_how_to_guess_and_stores_nothing(home, capsys):
    predict("start.share", None)
    printed = capsys.readouterr().out
    assert "Which share of MiniLM's parameters" in printed and "a number of per cent from 0 to 100" in printed
    assert not home.exists() and reveal("start.share") is None


def test_none_keeps_an_earlier_guess(capsys):
    predict("start.share", 40)
    new_kernel()
    predict("start.share", None)
    assert "Your guess, stored earlier: 40 per cent." in capsys.readouterr().out
    assert reveal("start.share") == 40


@pytest.mark.parametrize(
    ("id", "guess", "words"),
    [
        ("start.share", "40", "a number of per cent from 0 to 100; got '40'"),
        ("start.share", 140, "from 0 to 100; got 140"),
        ("start.share", math.nan, "got nan"),
        ("start.share", True, "got True"),
        ("start.crossing", 0, "a number of tokens from 1; got 0"),
        ("start.clock", "sooner", "one of 'earlier', 'later', 'same'; got 'sooner'"),
        ("start.clock", 3, "one of 'earlier', 'later', 'same'; got 3"),
        ("start.shares", 3, "there is no prediction 'start.shares'. Did you mean 'start.share'?"),
    ],
)
def test_a_guess_that_does_not_fit_is_refused_kindly(id, guess, words):
    with pytest.raises(HomeworkError) as caught:
        predict(id, guess)
    assert words in str(caught.value)


def test_recorded_guesses_are_used_where_nobody_guesses(home, monkeypatch, capsys):
    monkeypatch.setenv("EFFNLP_GUESSES", "recorded")
    for id, prediction in all_predictions().items():
        predict(id, None)
        assert reveal(id) == prediction.recorded
    assert "Recorded guess: 384 tokens" in capsys.readouterr().out
    assert not home.exists()


def test_a_recorded_run_does_not_read_the_students_guesses(monkeypatch):
    predict("start.share", 77)
    new_kernel()
    monkeypatch.setenv("EFFNLP_GUESSES", "recorded")
    assert reveal("start.share") == 30
    monkeypatch.delenv("EFFNLP_GUESSES")
    assert reveal("start.share") == 77


@pytest.mark.parametrize("damage", ["", "{", "[1, 2]", '{"guess": "many"}', '{"guess": 400}', b"\xff\xfe\x00"])
def test_a_damaged_file_is_set_aside(home, damage, capsys):
    file = home / "guesses" / "start.share.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert reveal("start.share") is None
    printed = capsys.readouterr().out
    assert "could not be read. It is now *.json.damaged." in printed
    assert not file.exists() and file.with_suffix(".json.damaged").exists()
    predict("start.share", 12)
    new_kernel()
    assert reveal("start.share") == 12


def test_a_folder_that_cannot_be_written_is_said_once_and_memory_serves(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EFFNLP_HOME", str(tmp_path / "file" / "progress"))
    predict("start.share", 40)
    predict("start.crossing", 500)
    assert capsys.readouterr().out.count("cannot be written") == 1
    assert reveal("start.share") == 40 and reveal("start.crossing") == 500


def test_a_write_that_breaks_off_leaves_the_old_guess(home, monkeypatch, capsys):
    predict("start.share", 40)

    def breaks_off(file, text, **_):
        with file.open("w") as half:
            half.write(text[:4])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", breaks_off)
    predict("start.share", 50)
    assert "cannot be written" in capsys.readouterr().out
    assert [path.name for path in (home / "guesses").iterdir()] == ["start.share.json"]
    new_kernel()
    assert reveal("start.share") == 40


def test_a_recorded_guess_must_fit_its_question():
    with pytest.raises(ValueError, match="recorded must be a guess that fits"):
        Prediction(id="start.x", question="?", recorded=-1, unit="tokens")
