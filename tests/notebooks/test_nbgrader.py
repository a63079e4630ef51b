"""An instructor collects and grades a class: the unsolved homework through nbgrader's own command line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import notebooks_build as builder
import pytest
from nbgrader.api import Gradebook

NAME = "00_start_here"
RIGHT = {"start.block_parameters", "start.encoder_macs"}  # what the second student solved


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course folder whose source is the unsolved notebook as it is handed out."""
    folder = tmp_path_factory.mktemp("course")
    source = folder / "source" / "homework0"
    source.mkdir(parents=True)
    shutil.copy(builder.HERE / "homework" / f"{NAME}.ipynb", source)
    shutil.copy(builder.HERE / "nbgrader_config.py", folder)
    return folder


def nbgrader(folder, *arguments):
    """Run nbgrader in the course folder. It calls its helper programs by bare name: they must be on PATH."""
    programs = Path(sys.executable).parent
    own = {name: str(folder / "jupyter") for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [programs / "nbgrader", *arguments],
        cwd=folder,
        env={**os.environ, **own, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "ERROR" not in done.stderr, done.stderr[-3000:]


def hand_in(folder, student, solve):
    """Put a released notebook, changed by `solve(cell, solved_cell)`, where a class's files are downloaded to."""
    released = nbformat.read(folder / "release" / "homework0" / f"{NAME}.ipynb", 4)
    solved = nbformat.read(builder.HERE / "homework" / "solutions" / f"{NAME}.ipynb", 4)
    for cell, right in zip(released.cells, solved.cells, strict=True):
        solve(cell, right)
    archive = folder / "downloaded" / "homework0" / "archive"
    archive.mkdir(parents=True, exist_ok=True)
    nbformat.write(released, archive / f"homework0_{student}_attempt_2026-01-31-10-00-00_{NAME}.ipynb")


def solve_all(cell, right):
    if "exercise" in builder.tags(cell):
        cell.source = right.source


def solve_two_and_cheat(cell, right):
    """Two right answers, the starter with its bug, blanks, and check cells that no longer check."""
    name = cell.metadata.get("nbgrader", {}).get("grade_id", "").replace("-", ".", 1)
    if name in RIGHT:
        cell.source = right.source
    elif "check" in builder.tags(cell) and name.removesuffix("-check") not in RIGHT:
        cell.source = "pass"


def test_a_class_is_collected_and_graded(course):
    nbgrader(course, "generate_assignment", "homework0")
    handed_out = nbformat.read(builder.HERE / "homework" / f"{NAME}.ipynb", 4)
    released = nbformat.read(course / "release" / "homework0" / f"{NAME}.ipynb", 4)
    assert [cell.source for cell in released.cells] == [cell.source for cell in handed_out.cells]

    hand_in(course, "ada", solve_all)
    hand_in(course, "ben", solve_two_and_cheat)
    nbgrader(course, "zip_collect", "homework0")
    nbgrader(course, "autograde", "homework0", "--create")

    points = {
        cell.metadata.nbgrader.grade_id: cell.metadata.nbgrader.points
        for cell in handed_out.cells
        if "check" in builder.tags(cell)
    }
    full = sum(points.values())
    two = sum(points[id.replace(".", "-") + "-check"] for id in RIGHT)
    assert 0 < two < full
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        graded = {one.student.id: one for one in gradebook.assignment_submissions("homework0")}
        assert {student: one.max_score for student, one in graded.items()} == {"ada": full, "ben": full}
        assert {student: one.score for student, one in graded.items()} == {"ada": full, "ben": two}
