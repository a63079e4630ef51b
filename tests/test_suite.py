"""The runner of all checks: their order, where it stops, and what it says about the browser tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from effnlp_lessons import suite
from effnlp_lessons.paths import ROOT
from effnlp_lessons.suite import Step

PASSES, FAILS = [sys.executable, "-c", ""], [sys.executable, "-c", "raise SystemExit(7)"]
NO_TESTS = "<testsuites><testsuite/></testsuites>"


@pytest.fixture
def checks(monkeypatch):
    """Lets a test put its own steps in place of the real ones; the tests' results are written beforehand."""

    def use(*steps):
        def chosen(results: Path):
            results.write_text(NO_TESTS)
            return list(steps)

        monkeypatch.setattr(suite, "steps", chosen)

    return use


def test_the_cheap_checks_come_first_and_every_notebook_is_run(tmp_path):
    steps = suite.steps(tmp_path / "tests.xml")
    order = ["ruff", "lint-imports", "build.py", "tests/benchmarks", "--doctest-modules", "--nbval-lax"]
    assert len(steps) == len(order)
    for step, mark in zip(steps, order, strict=True):
        assert any(mark in argument for argument in step.command), (step, mark)
    written = {str(path.relative_to(ROOT)) for path in ROOT.glob("notebooks/*.ipynb")}
    solved = {str(path.relative_to(ROOT)) for path in ROOT.glob("notebooks/homework/solutions/*.ipynb")}
    run = {argument for argument in steps[-1].command if argument.endswith(".ipynb")}
    assert run == written | solved


def test_no_notebook_at_all_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    (tmp_path / "notebooks").mkdir()
    command = suite.steps(tmp_path / "tests.xml")[-1].command
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == suite.PYTEST_NOTHING_COLLECTED


def test_all_steps_run_when_all_pass(checks, capfd):
    checks(Step("first", PASSES), Step("second", PASSES))
    assert suite.run() == 0
    printed = capfd.readouterr().out
    assert printed.index("== first: ") < printed.index("== second: ")
    assert "All 2 steps passed" in printed


def test_the_run_stops_at_the_first_failing_step(checks, capfd, tmp_path):
    mark = tmp_path / "ran"
    checks(Step("first", FAILS), Step("second", [sys.executable, "-c", f"open({str(mark)!r}, 'w')"]))
    assert suite.run() == 7
    assert "FAILED at: first (exit code 7)" in capfd.readouterr().out
    assert not mark.exists()


def test_an_exit_code_may_count_as_passed(checks):
    checks(Step("first", FAILS, (0, 7)))
    assert suite.run() == 0


def test_a_students_progress_is_left_alone(checks, monkeypatch, capfd):
    monkeypatch.setenv("EFFNLP_HOME", "the student's own")
    code = "import os; print(*[os.environ[n] for n in ('EFFNLP_GUESSES', 'OMP_NUM_THREADS', 'EFFNLP_HOME')])"
    checks(Step("show", [sys.executable, "-c", code]))
    assert suite.run() == 0
    printed = capfd.readouterr().out
    assert "recorded 1 " in printed and "the student's own" not in printed


def results(tmp_path, *cases: str) -> Path:
    file = tmp_path / "tests.xml"
    file.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return file


RAN = '<testcase classname="tests.browser.test_explorer" name="test_mouse" />'
OTHER = '<testcase classname="tests.test_measure" name="test_a"><skipped message="no GPU" /></testcase>'
SKIPPED = RAN.replace(" />", '><skipped message="no Chromium" /></testcase>')


@pytest.mark.parametrize(
    "cases, expected",
    [
        ([OTHER], "Browser tests: there are none."),
        ([OTHER, RAN], "Browser tests: 1 ran, 0 skipped."),
        ([RAN, SKIPPED], "Browser tests: 1 ran, 1 skipped."),
        ([OTHER, SKIPPED], "Browser tests: NOT RUN, all 1 skipped (no Chromium)."),
    ],
)
def test_the_last_lines_say_whether_a_browser_ran(tmp_path, cases, expected):
    assert suite.browser_tests(results(tmp_path, *cases)) == expected


def test_pytest_names_browser_tests_as_the_runner_expects(tmp_path):
    """The runner finds browser tests by their class name in the XML file, which pytest makes up."""
    folder = tmp_path / "tests" / "browser"
    folder.mkdir(parents=True)
    (folder / "test_x.py").write_text("import pytest\n@pytest.mark.skip(reason='no Chromium')\ndef test_y(): 1\n")
    file = tmp_path / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:nbval",
        "-n",
        "2",
        f"--junitxml={file}",
        "tests",
    ]
    subprocess.run([*command, "--import-mode=importlib"], cwd=tmp_path, check=True, capture_output=True)
    assert suite.browser_tests(file) == "Browser tests: NOT RUN, all 1 skipped (no Chromium)."
