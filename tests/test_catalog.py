"""The catalogue: every cell of it leads somewhere."""

import importlib
import io
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from effnlp_lessons import catalog
from effnlp_lessons.homework.lectures import find_exercise
from effnlp_lessons.paths import ROOT
from effnlp_lessons.studies.runner import find_studies, load_results

ROWS = catalog.load_catalog()
by_row = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


def headings(notebook):
    text = (ROOT / "notebooks" / "source" / f"{notebook}.py").read_text(encoding="utf-8")
    return set(re.findall(r"^# #+ (.+)$", text, re.M))


def resolve(symbol):
    module, name = symbol.split(":")
    return getattr(importlib.import_module(module), name)


@by_row
def test_symbols_and_widget_can_be_imported(row):
    for symbol in [*row.symbols, *([row.widget] if row.widget else [])]:
        assert resolve(symbol).__doc__, f"{symbol} has no docstring"


@by_row
def test_section_is_a_heading_of_a_built_notebook(row):
    notebook, heading = row.section.split("#")
    assert heading in headings(notebook)
    assert (ROOT / "notebooks" / f"{notebook}.ipynb").exists()


@by_row
def test_exercises_and_study_exist(row):
    for exercise in row.exercise or []:
        assert find_exercise(exercise).id == exercise
    if row.study:
        assert row.study in find_studies() and load_results(row.study)["runs"]


def test_tests_are_collected():
    named = {test for row in ROWS for test in row.tests}
    files = sorted({test.split("::")[0] for test in named})
    absent = [file for file in files if not (ROOT / file).exists()]
    assert not absent, f"the catalogue names files that are not there: {absent}"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:nbval", *files]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    collected = {line.split("[")[0] for line in listed.splitlines() if "::" in line}
    assert named <= collected, f"not collected: {sorted(named - collected)}"


def test_every_exercise_and_study_is_in_the_catalogue():
    from effnlp_lessons.homework import lectures

    exercises = {exercise for row in ROWS for exercise in row.exercise or []}
    lacking = sorted(set(find_studies()) - {row.study for row in ROWS if row.study})
    assert not lacking, f"studies not in the catalogue: {lacking}"
    listed = set(lectures.all_exercises())
    assert exercises <= listed and listed <= exercises, f"not in the catalogue: {sorted(listed - exercises)}"


def test_readme_lists_every_built_notebook():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        row = next((line for line in lines if f"[{path.stem}](notebooks/{path.name})" in line), "")
        assert row and "planned" not in row, f"add {path.stem} to README's table of lectures"


def test_readme_has_the_present_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert catalog.with_coverage(readme) == readme, "run: python -m effnlp_lessons.catalog"


def test_readme_shows_the_present_explorer():
    stored, drawn = (Image.open(source).convert("RGB") for source in (catalog.PICTURE, io.BytesIO(catalog.picture())))
    assert np.array_equal(np.asarray(stored), np.asarray(drawn)), "run: python -m effnlp_lessons.catalog"
    assert f"({catalog.PICTURE.relative_to(ROOT).as_posix()})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_technique_without_its_exercise_is_refused(tmp_path):
    good = (ROOT / "effnlp_lessons" / "catalog.toml").read_text(encoding="utf-8")
    file = tmp_path / "catalog.toml"
    file.write_text(re.sub(r"^exercise = .*\n", "", good, flags=re.M), encoding="utf-8")
    with pytest.raises(ValueError, match="a technique needs exercise too"):
        catalog.load_catalog(file)
    file.write_text(good.replace("study =", "studdy =", 1), encoding="utf-8")
    with pytest.raises(ValueError, match="Cost of a Transformer by part and length:.*studdy"):
        catalog.load_catalog(file)
    with pytest.raises(ValueError, match="must hold <!-- coverage: begin -->"):
        catalog.with_coverage("no markers")
