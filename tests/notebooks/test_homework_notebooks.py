"""Every homework notebook: the solved one runs clean, the unsolved one fails at its checks and nowhere else."""

import nbformat
import notebooks_build as builder
import pytest
from torch import nn

from effnlp_lessons.homework.lectures import MODULES, all_exercises, find_exercise

HOMEWORK = builder.HERE / "homework"
NAMES = sorted(path.name for path in HOMEWORK.glob("*.ipynb"))
SOURCES = sorted(path.stem for path in builder.HERE.glob("source/homework/*.py"))


def read(path):
    return nbformat.read(path, 4)


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in builder.tags(cell)]


def checked_id(cell):
    return builder.CHECK_CALL.search(cell.source)[1]


def errors(path):
    """The error, or None, of every code cell of the notebook, run in its folder."""
    notebook = read(path)
    builder.execute(notebook, path.parent, allow_errors=True)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [(cell, next((output for output in cell.outputs if output.output_type == "error"), None)) for cell in code]


def test_every_text_has_its_notebooks():
    assert SOURCES and [f"{name}.ipynb" for name in SOURCES] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_solutions_run_clean(name):
    assert [error.evalue for _, error in errors(HOMEWORK / "solutions" / name) if error] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_unsolved_fails_at_every_check_and_nowhere_else(name):
    ran = errors(HOMEWORK / name)
    failed = [cell.source for cell, error in ran if error]
    assert failed == [cell.source for cell in tagged(read(HOMEWORK / name), "check")]
    for cell, error in ran:
        if error:
            assert error.ename == "HomeworkError" and error.evalue.startswith(checked_id(cell))
            assert error.traceback == [f"HomeworkError: {error.evalue}"], "no stack trace"


@pytest.mark.parametrize("name", NAMES)
def test_no_line_of_a_solution_stands_in_the_unsolved(name):
    text = (builder.HERE / "source" / "homework" / name).with_suffix(".py").read_text()
    unsolved = "\n".join(cell.source for cell in read(HOMEWORK / name).cells)
    regions = list(builder.SOLUTION.finditer(text))
    assert len(regions) == len(tagged(read(HOMEWORK / name), "exercise"))
    for region in regions:
        given = (region["starter"] or "").split("\n")
        secret = [line for line in region["solution"].split("\n") if len(line.strip()) > 8]
        assert [line for line in secret if line not in given and line.strip() in unsolved] == []
        assert any(line not in given for line in secret)
    assert not builder.MARKER.search(unsolved)


@pytest.mark.parametrize("name", NAMES)
def test_minutes_and_difficulty_are_those_of_the_exercises(name):
    notebook = read(HOMEWORK / name)
    for cell in tagged(notebook, "check"):
        exercise = find_exercise(checked_id(cell))
        before = notebook.cells[: notebook.cells.index(cell)]
        text = [one.source for one in before if one.source.startswith("## Exercise")][-1]
        stated = f"{exercise.minutes} minutes, difficulty {exercise.difficulty} of 5"
        assert stated in text, exercise.id
        assert f"| {exercise.minutes} | {exercise.difficulty} of 5 |" in notebook.cells[0].source


def test_the_worked_example_of_the_first_exercise_is_right():
    block = nn.TransformerEncoderLayer(384, nhead=12, dim_feedforward=1536)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in block.named_children()}
    text = "\n".join(cell.source for cell in read(HOMEWORK / "00_start_here.ipynb").cells)
    assert f"| 4 · 384 | {counts['self_attn']:,} |" in text
    assert f"| 1536 + 384 | {counts['linear1'] + counts['linear2']:,} |" in text
    assert f"| 2 · 384 | 2 · 384 | {counts['norm1'] + counts['norm2']:,} |" in text
    assert f"| **{sum(counts.values()):,}** |" in text


def test_every_exercise_stands_in_one_homework_notebook():
    checked = [checked_id(cell) for name in NAMES for cell in tagged(read(HOMEWORK / name), "check")]
    assert sorted(checked) == sorted(all_exercises())
    assert {id.split(".")[0] for id in checked} <= set(MODULES)
