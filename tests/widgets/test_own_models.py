"""The student's own plot: models last between kernels, damage is set aside, the picture shows what was kept."""

import json

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from effnlp_lessons import progress
from effnlp_lessons.widgets import own_models
from effnlp_lessons.widgets.own_models import KeptModel, keep_model, kept_models, show_kept_models

SIZES = {"examples": 200, "macs": 300_000_000, "bytes_on_disk": 91_000_000}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFNLP_HOME", str(tmp_path / "progress"))
    monkeypatch.delenv("EFFNLP_GUESSES", raising=False)
    new_kernel()
    yield tmp_path / "progress"
    new_kernel()


def new_kernel():
    own_models._kept.clear()
    progress._told_unwritable.clear()


def test_models_last_between_notebooks_and_are_replaced_by_name():
    keep_model("08", "window 2", accuracy=50.0, **SIZES)
    keep_model("00", "teacher", accuracy=88.0, **SIZES)
    new_kernel()
    keep_model("08", "window 2", accuracy=53.0, **SIZES)
    expected = [KeptModel("00", "teacher", 88.0, *SIZES.values()), KeptModel("08", "window 2", 53.0, *SIZES.values())]
    assert kept_models() == expected
    new_kernel()
    assert kept_models() == expected


def test_names_that_differ_in_words_are_different_models():
    for name in ("window 2, row of [CLS]", "window 2, column of [CLS]", "window 2"):
        keep_model("08", name, accuracy=60.0, **SIZES)
    new_kernel()
    assert len(kept_models()) == 3


@pytest.mark.parametrize(
    "damage", ["{", '{"notebook": "08"}', json.dumps({**SIZES, "notebook": "08", "name": "x", "accuracy": 400})]
)
def test_a_damaged_file_is_set_aside(home, damage, capsys):
    keep_model("08", "good", accuracy=60.0, **SIZES)
    (home / "models" / "08-bad.json").write_text(damage)
    assert [model.name for model in kept_models()] == ["good"]
    assert "could not be read. It is now *.json.damaged." in capsys.readouterr().out
    assert (home / "models" / "08-bad.json.damaged").exists() and len(kept_models()) == 1


def test_builds_and_tests_keep_nothing(home, monkeypatch):
    keep_model("00", "of the student", accuracy=70.0, **SIZES)
    new_kernel()
    monkeypatch.setenv("EFFNLP_GUESSES", "recorded")
    keep_model("08", "window 2", accuracy=53.0, **SIZES)
    assert [model.name for model in kept_models()] == ["window 2"]
    assert [path.name for path in (home / "models").iterdir()] == ["00-of-the-student.json"]


def test_a_folder_that_cannot_be_written_is_said_once_and_memory_serves(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EFFNLP_HOME", str(tmp_path / "file" / "progress"))
    keep_model("08", "a", accuracy=60.0, **SIZES)
    keep_model("08", "b", accuracy=61.0, **SIZES)
    assert capsys.readouterr().out.count("cannot be written: models last") == 1
    assert [model.name for model in kept_models()] == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": 101}, "accuracy must be from 0 to 100"),
        ({"accuracy": float("nan")}, "accuracy must be"),
        ({"examples": 0}, "examples must be >= 1"),
        ({"macs": 0}, "macs must be >= 1"),
    ],
)
def test_bad_input_is_named_and_not_kept(change, message):
    with pytest.raises(ValueError, match=message):
        keep_model("08", "x", **{"accuracy": 50.0, **SIZES, **change})
    assert kept_models() == []


def test_the_picture_says_every_model():
    with pytest.raises(ValueError, match="no model was kept yet"):
        show_kept_models()
    keep_model("00", "teacher", accuracy=88.0, **SIZES)
    keep_model("08", "window 2", accuracy=53.0, **SIZES)
    InteractiveShell.instance()
    with capture_output() as captured:
        show_kept_models()
    picture = next(output for output in captured.outputs if "image/png" in output.data)
    assert picture.metadata["image/png"]["alt"] == (
        "Accuracy against cost: 00 teacher 88 %, 300 M MACs, 91 MB; 08 window 2 53 %, 300 M MACs, 91 MB."
    )
