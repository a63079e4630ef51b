"""What every lecture notebook must have, read from the built files."""

import re

import nbformat
import pytest

from effnlp_lessons.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HEADINGS = ("Learning goals", "Paper and ours", "Common mistakes", "Quiz", "References")

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def cells(path, kind):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_headings_that_every_lecture_carries(path):
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    assert [name for name in HEADINGS if not re.search(rf"^##+ {name}$", text, re.M)] == []
    assert "**Reading:**" in text and "**Running:**" in text and "**You need:**" in text


def test_at_least_five_facts_are_checked_and_stored(path):
    checked = [cell for cell in cells(path, "code") if "nbval-check-output" in tags(cell)]
    assert len(checked) >= 5 and all(cell.outputs for cell in checked)


def test_every_picture_has_alt_text(path):
    pictures = [o for cell in cells(path, "code") for o in cell.outputs if "image/png" in o.get("data", {})]
    assert pictures
    for output in pictures:
        assert len(output.metadata.get("image/png", {}).get("alt", "")) > 20
    for cell in cells(path, "markdown"):
        assert not re.search(r"!\[\s*\]\(|<img(?![^>]*alt=)", cell.source), "a picture without alt text"


def test_a_widget_is_stored_as_a_picture_without_its_state(path):
    """Without a kernel the picture is what a reader sees; a stored view of a widget that is gone is an error."""
    outputs = [o.data for cell in cells(path, "code") for o in cell.outputs if "data" in o]
    shown = [data for data in outputs if "Explorer(" in data.get("text/plain", "")]
    assert shown and all("image/png" in data for data in shown)
    assert not any("widget-view" in kind for data in shown for kind in data)
    assert "widgets" not in nbformat.read(path, 4).metadata


def test_quiz_explains_every_choice(path):
    quiz = next(cell.source for cell in cells(path, "markdown") if re.search(r"^## Quiz$", cell.source, re.M))
    questions = re.split(r"^\*\*\d\. ", quiz, flags=re.M)[1:]
    assert len(questions) == 5
    for question in questions:
        choices = re.findall(r"<details><summary>(.+?)</summary>(.+?)</details>", question, re.S)
        assert len(choices) >= 3 and sum(explanation.startswith("Yes.") or explanation.startswith("Yes,")
                                         for _, explanation in choices) == 1  # fmt: skip
        assert all(len(explanation.strip()) > 20 for _, explanation in choices)


def test_guesses_and_their_answers_come_in_pairs(path):
    code = cells(path, "code")
    asked = {name for cell in code for name in re.findall(r'\bpredict\("([\w.]+)"', cell.source)}
    answered = {name for cell in code for name in re.findall(r'\breveal\("([\w.]+)"', cell.source)}
    assert asked and asked == answered
    for cell in code:
        if "reveal(" in cell.source:
            assert "reveal" in tags(cell) and cell.outputs == []


def test_no_cell_is_longer_than_a_screen(path):
    assert [cell.source for cell in cells(path, "code") if len(cell.source.splitlines()) > 30] == []
