"""notebooks/build.py on small texts of its own: what it writes, what it refuses, and what drift it sees."""

import json
import shutil
from pathlib import Path

import nbformat
import notebooks_build as builder
import pytest

LECTURE = """\
# %% [markdown]
# # A lecture

# %%
import os
import time

print(os.environ["EFFNLP_GUESSES"], os.environ["OMP_NUM_THREADS"], os.path.basename(os.getcwd()), flush=True)
time.sleep(0.3)
print("second line")

# %% tags=["nbval-check-output"]
40 + 2

# %% tags=["reveal"]
"the answer is 1,536"

# %% tags=["skip-execution"]
1 / 0

# %%
import sys

from IPython.display import display

print("  3%|2         | 3/100", file=sys.stderr)
widget = "application/vnd.jupyter.widget-view+json"
display({widget: {"model_id": os.urandom(4).hex()}, "text/plain": "a slider"}, raw=True)
"""

HOMEWORK = """\
# %% [markdown]
# # Homework

# %%
def check(id, fn):
    assert fn(3) == 9, id

# %% tags=["exercise"]
def square(number):
    halfway = number
    ### BEGIN SOLUTION
    secret = halfway * number
    return secret
    ### END SOLUTION

# %% tags=["check"] points=2
check("tiny.square", square)

# %% tags=["exercise"]
def other_square(number):
    ### BEGIN SOLUTION
    return number**2
    ### END SOLUTION
    ### BEGIN STARTER
    return number * 2
    ### END STARTER

# %% tags=["check"] points=3
check("tiny.other_square", other_square)
"""


def write_texts(folder, lecture=LECTURE, homework=HOMEWORK):
    (folder / "source" / "homework").mkdir(parents=True, exist_ok=True)
    if lecture:
        (folder / "source" / "lecture.py").write_text(lecture)
    if homework:
        (folder / "source" / "homework" / "tiny.py").write_text(homework)
    return folder


@pytest.fixture(scope="module")
def built_once(tmp_path_factory):
    folder = write_texts(tmp_path_factory.mktemp("checkout") / "notebooks")
    written = builder.build(folder)
    assert len(written) == 3
    return folder


@pytest.fixture
def built(built_once, tmp_path):
    """A copy of a folder with built notebooks, to change."""
    return Path(shutil.copytree(built_once, tmp_path / "notebooks"))


def read(path):
    return nbformat.read(path, 4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.ipynb"))}


# ----------------------------------------------------------------------------- what is written


def test_a_new_recording_of_a_study_is_drift(tmp_path, monkeypatch):
    """The text is the same, the numbers that it loads are not."""
    monkeypatch.setattr(builder, "HERE", tmp_path / "notebooks")
    results = tmp_path / "data" / "results"
    results.mkdir(parents=True)
    text = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('shown = load_results("trial")["runs"]')])
    hashes = [builder.source_hash(text)]
    for content in ("1", "2"):
        (results / "trial.json").write_text(content)
        hashes.append(builder.source_hash(text))
    (results / "another.json").write_text("3")
    assert len(set(hashes)) == 3 and builder.source_hash(text) == hashes[-1]


def test_a_lecture_is_executed_beside_its_file_with_recorded_guesses(built):
    first = code(read(built / "lecture.ipynb"))[0]
    assert [output.text for output in first.outputs] == ["recorded 1 notebooks\nsecond line\n"]


def test_reveal_cells_are_empty_and_everything_else_has_run(built):
    cells = code(read(built / "lecture.ipynb"))
    by_tag = {cell.metadata.get("tags", [""])[0]: cell for cell in cells}
    assert by_tag["reveal"].outputs == [] and by_tag["reveal"].execution_count is None
    assert by_tag["nbval-check-output"].outputs[0].data["text/plain"] == "42"
    assert "1,536" not in json.dumps([cell.get("outputs") for cell in cells])
    assert by_tag["skip-execution"].outputs == []


def test_no_widget_model_and_no_progress_bar_is_stored(built):
    last = code(read(built / "lecture.ipynb"))[-1]
    assert [output.get("data") for output in last.outputs] == [{"text/plain": "a slider"}]
    assert "widgets" not in read(built / "lecture.ipynb").metadata


def test_metadata_is_the_same_on_every_machine(built):
    for path in built.rglob("*.ipynb"):
        notebook = read(path)
        assert set(notebook.metadata) == {"kernelspec", "language_info", "effnlp"}
        assert notebook.metadata.kernelspec.name == "python3"
        assert "version" not in notebook.metadata.language_info
        assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_the_unsolved_homework_has_stub_and_starter_and_was_not_run(built):
    cells = code(read(built / "homework" / "tiny.ipynb"))
    assert cells[1].source == (
        'def square(number):\n    halfway = number\n    raise NotImplementedError("your code here")'
    )
    assert cells[3].source == "def other_square(number):\n    return number * 2"
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_the_unsolved_homework_leaks_nothing(built):
    text = (built / "homework" / "tiny.ipynb").read_text()
    for word in ("secret", "number**2", "SOLUTION", "STARTER"):
        assert word not in text


def test_the_solved_homework_is_executed_and_has_no_markers(built):
    notebook = read(built / "homework" / "solutions" / "tiny.ipynb")
    assert code(notebook)[1].source.endswith("secret = halfway * number\n    return secret")
    assert code(notebook)[3].source == "def other_square(number):\n    return number**2"
    assert all(cell.execution_count for cell in code(notebook))
    assert not builder.MARKER.search(json.dumps(notebook))
    assert code(notebook)[2].metadata == {"tags": ["check"]}


def test_nbgrader_metadata_comes_from_the_tags(built):
    cells = code(read(built / "homework" / "tiny.ipynb"))
    assert "nbgrader" not in cells[0].metadata
    assert cells[1].metadata.nbgrader == {
        "grade_id": "tiny-square",
        "grade": False,
        "solution": True,
        "locked": False,
        "schema_version": 3,
        "task": False,
    }
    assert cells[4].metadata.nbgrader == {
        "grade_id": "tiny-other_square-check",
        "grade": True,
        "solution": False,
        "locked": True,
        "points": 3,
        "schema_version": 3,
        "task": False,
    }


def test_checked_cells_are_counted(built):
    assert builder.checked_cells(read(built / "lecture.ipynb")) == 1


# ----------------------------------------------------------------------------- building again


def test_a_second_build_runs_nothing_and_changes_no_byte(built, monkeypatch):
    before = everything(built)
    with monkeypatch.context() as patch:
        patch.setattr(builder, "execute", lambda *_: pytest.fail("ran again"))
        assert builder.build(built) == []
    assert everything(built) == before


def test_a_forced_build_of_the_same_text_changes_no_byte(built):
    before = everything(built)
    assert len(builder.build(built, force=True)) == 3
    assert everything(built) == before


def test_an_inserted_cell_keeps_the_ids_of_the_others(built):
    before = [cell.id for cell in read(built / "lecture.ipynb").cells]
    source = built / "source" / "lecture.py"
    source.write_text("# %% [markdown]\n# New first.\n\n" + source.read_text())
    planned = builder.targets(source, built)[0].notebook
    assert [cell.id for cell in planned.cells][1:] == before


# ----------------------------------------------------------------------------- drift


def test_current_notebooks_have_no_problems(built):
    assert builder.check(built) == []


def test_blank_lines_between_cells_are_no_drift(built):
    source = built / "source" / "lecture.py"
    source.write_text(source.read_text().replace("\n# %%", "\n\n# %%"))
    assert builder.check(built) == []


def test_an_edited_text_is_drift(built):
    source = built / "source" / "lecture.py"
    source.write_text(source.read_text().replace("A lecture", "Another lecture"))
    (problem,) = builder.check(built)
    assert problem == (
        "notebooks/lecture.ipynb was built from another text. Its text is notebooks/source/lecture.py; "
        "run `make notebooks`."
    )


def change_source(notebook):
    notebook.cells[0].source += " by hand"


def change_tags(notebook):
    notebook.cells[1].metadata["tags"] = ["nbval-skip"]


def clear_outputs(notebook):
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None


def fill_reveal(notebook):
    cell = next(cell for cell in notebook.cells if cell.metadata.get("tags") == ["reveal"])
    cell.outputs = [nbformat.v4.new_output("stream", text="1,536")]


def add_widget_state(notebook):
    notebook.metadata["widgets"] = {"state": {}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_source, "was edited by hand"),
        (change_tags, "was edited by hand"),
        (add_widget_state, "was edited by hand"),
        (clear_outputs, "has cells that were not run"),
        (fill_reveal, "shows the output of a `reveal` cell"),
    ],
)
def test_a_notebook_edited_by_hand_is_drift(built, change, words):
    path = built / "lecture.ipynb"
    notebook = read(path)
    change(notebook)
    nbformat.write(notebook, path)
    (problem,) = builder.check(built)
    assert problem.startswith(f"notebooks/lecture.ipynb {words}")


def test_a_solved_cell_in_the_unsolved_homework_is_drift(built):
    shutil.copy(built / "homework" / "solutions" / "tiny.ipynb", built / "homework" / "tiny.ipynb")
    (problem,) = builder.check(built)
    assert problem.startswith("notebooks/homework/tiny.ipynb was edited by hand")


def test_a_missing_notebook_and_one_without_text_are_drift(built):
    (built / "lecture.ipynb").rename(built / "other.ipynb")
    missing, orphan = builder.check(built)
    assert missing.startswith("notebooks/lecture.ipynb is missing")
    assert orphan.startswith("notebooks/other.ipynb has no text in notebooks/source")


def test_a_traceback_put_into_a_stored_output_is_found(built):
    path = built / "lecture.ipynb"
    notebook = read(path)
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"])
    notebook.cells[1].outputs.append(error)
    nbformat.write(notebook, path)
    (problem,) = builder.check(built)
    assert "a traceback is stored: 'import os'" in problem


# ----------------------------------------------------------------------------- what is refused


def refused(folder, **texts):
    write_texts(folder, **{"lecture": None, "homework": None, **texts})
    with pytest.raises(builder.BuildError) as caught:
        builder.build(folder)
    assert not list(folder.rglob("*.ipynb")), "a refused notebook was written"
    return str(caught.value)


def test_a_failing_cell_is_refused(tmp_path):
    message = refused(tmp_path, lecture="# %%\nraise KeyError('nothing here')\n")
    assert "lecture.ipynb" in message and "KeyError: 'nothing here'" in message and "\x1b" not in message


def test_a_wrong_solution_is_refused(tmp_path):
    wrong = HOMEWORK.replace("secret = halfway * number", "secret = halfway + number")
    write_texts(tmp_path, lecture=None, homework=wrong)
    with pytest.raises(builder.BuildError, match=r"solutions/tiny.ipynb.*(?s:.*)AssertionError: tiny.square"):
        builder.build(tmp_path)
    assert not (tmp_path / "homework" / "solutions" / "tiny.ipynb").exists()


def test_outputs_that_may_not_be_stored_are_refused(tmp_path):
    cells = [
        "import warnings\nwarnings.warn('old function')",
        "import traceback\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    print(traceback.format_exc())",
        "import os\nprint(os.getcwd() + '/data')",
        "from IPython.display import HTML\nHTML('<img src=\"https://example.org/a.png\">')",
        "from IPython.display import Markdown\nMarkdown('![picture](http://example.org/a.png)')",
        "print('nothing to see, https://example.org, <img src=\"picture.png\">')",
    ]
    message = refused(tmp_path, lecture="".join(f"# %%\n{cell}\n\n" for cell in cells))
    assert "a warning is stored" in message and "'import warnings'" in message
    assert "a traceback is stored: 'import traceback'" in message
    assert "a path of this machine is stored" in message and "'import os'" in message
    assert message.count("an image from outside the repository is stored") == 2
    assert "nothing to see" not in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("### END SOLUTION\n\n", "\n"), "a region is not closed"),
        (("    ### BEGIN SOLUTION\n    return number**2\n    ### END SOLUTION\n", ""), "a starter stands alone"),
        (('# %% tags=["exercise"]\ndef square', "# %%\ndef square"), "solution and tag `exercise` go together"),
        (("points=2", ""), "a check cell states points=NUMBER"),
        (("tiny.other_square", "tiny.square"), "an exercise is checked twice"),
        (('check("tiny.square", square)', "square(3)"), 'a check cell calls check("id", ...)'),
        (('# %% tags=["check"] points=2', "# %%"), "every exercise cell is followed by one check cell"),
    ],
)
def test_homework_that_breaks_a_rule_is_refused(tmp_path, change, words):
    assert change[0] in HOMEWORK
    assert words in refused(tmp_path, homework=HOMEWORK.replace(*change, 1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('# %% tags=["reveal", "nbval-check-output"]\n1\n', "`reveal` empties what nbval would compare"),
        ("# %%\n### BEGIN SOLUTION\n1\n### END SOLUTION\n", "a solution region belongs in source/homework"),
        ("# %% [markdown]\n# ![a](https://example.org/a.png)\n", "an image from outside the repository"),
        ("# %% [raw]\n# raw\n", "a raw cell; use markdown and code"),
    ],
)
def test_a_lecture_that_breaks_a_rule_is_refused(tmp_path, text, words):
    assert words in refused(tmp_path, lecture=text)


# ----------------------------------------------------------------------------- the repository


def test_the_notebooks_of_the_course_are_current():
    assert builder.check() == []
