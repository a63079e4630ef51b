"""What every lecture notebook must have, read from the built files."""

import re

import nbformat
import notebooks_build as builder
import pytest

from effnlp_lessons.catalog import load_catalog
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
    missing = [f"## {name}" for name in HEADINGS if not re.search(rf"^##+ {name}$", text, re.M)]
    missing += [words for words in ("**Reading:**", "**Running:**", "**You need:**") if words not in text]
    assert not missing, f"a lecture has these, the last three in its head: {missing}"


def test_at_least_five_facts_are_checked_and_stored(path):
    checked = [cell for cell in cells(path, "code") if "nbval-check-output" in tags(cell)]
    assert len(checked) >= 5, f"{len(checked)} cells are tagged nbval-check-output, at least 5 are asked for"
    assert all(cell.outputs for cell in checked), "a checked cell without an output"


def test_every_picture_has_alt_text(path):
    pictures = [o for cell in cells(path, "code") for o in cell.outputs if "image/png" in o.get("data", {})]
    assert pictures, "a lecture shows at least one picture outside its reveal cells"
    for output in pictures:
        assert len(output.metadata.get("image/png", {}).get("alt", "")) > 20
    for cell in cells(path, "markdown"):
        assert not re.search(r"!\[\s*\]\(|<img(?![^>]*alt=)", cell.source), "a picture without alt text"


def test_the_widgets_of_the_catalogue_are_stored_as_pictures_without_state(path):
    """Without a kernel the picture is what a reader sees; a stored view of a widget that is gone is an error."""
    outputs = [o.data for cell in cells(path, "code") for o in cell.outputs if "data" in o]
    rows = [row for row in load_catalog() if row.widget and row.section.startswith(f"{path.stem}#")]
    names = [row.widget.split(":")[1] for row in rows]
    assert names, f"no row of the catalogue names a widget of {path.stem}"
    for name in names:
        shown = [data for data in outputs if f"{name}(" in data.get("text/plain", "")]
        assert shown, f"the catalogue's widget {name} is not shown in {path.name}"
        assert all("image/png" in data for data in shown)
    assert not any("widget-view" in kind for data in outputs for kind in data)
    assert "widgets" not in nbformat.read(path, 4).metadata


def test_quiz_explains_every_choice(path):
    quiz = next(cell.source for cell in cells(path, "markdown") if re.search(r"^## Quiz$", cell.source, re.M))
    questions = re.split(r"^\*\*\d\. ", quiz, flags=re.M)[1:]
    asked = {question.split("**")[0] for question in questions}
    assert len(questions) == len(asked) == 5, "the quiz has five different questions, each beginning **1. and so on"
    for number, question in enumerate(questions, start=1):
        choices = re.findall(r"<details><summary>(.+?)</summary>(.+?)</details>", question, re.S)
        right = [text for _, text in choices if re.match(r"Yes[.,]", text)]
        assert len(choices) >= 3 and len(right) == 1, f"question {number}: three choices, one explanation begins Yes"
        assert all(len(text.strip()) > 20 for _, text in choices), f"question {number}: explain every choice"


def test_guesses_and_their_answers_come_in_pairs(path):
    code = cells(path, "code")
    asked = {name for cell in code for name in re.findall(r'\bpredict\("([\w.]+)"', cell.source)}
    answered = {name for cell in code for name in re.findall(r'\breveal\("([\w.]+)"', cell.source)}
    assert asked, "a lecture asks for at least one guess"
    assert asked == answered, f"predict without reveal, or the reverse: {asked ^ answered}"
    for cell in code:
        if "reveal(" in cell.source:
            assert "reveal" in tags(cell) and cell.outputs == [], "a cell that calls reveal(...) carries the tag reveal"


def test_a_student_who_has_not_guessed_gets_no_error(path):
    notebook = nbformat.read(path, 4)
    builder.execute(notebook, path.parent, allow_errors=True, guesses="")
    errors = [o.evalue for c in notebook.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    assert errors == [], "a cell needs what exists only after a guess"
    texts = [o.text for c in notebook.cells if "reveal" in tags(c) for o in c.outputs if o.output_type == "stream"]
    assert texts and all(text.startswith("First make your guess") for text in texts)


def test_no_cell_is_longer_than_a_screen(path):
    long = [cell.source.splitlines()[0] for cell in cells(path, "code") if len(cell.source.splitlines()) > 30]
    assert not long, f"cells of more than 30 lines, beginning: {long}"
