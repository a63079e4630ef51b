"""Every check of the course in one run, on any machine and in CI: `python -m effnlp_lessons test`.

The cheap checks come first. The run stops at the first step that fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from effnlp_lessons.paths import ROOT

PYTEST_NOTHING_COLLECTED = 5


class Step(NamedTuple):
    """One check: what is printed, the command (run in the checkout), and exit codes that count as passed."""

    name: str
    command: list[str]
    passing: tuple[int, ...] = (0,)


def steps(results: Path) -> list[Step]:
    """The checks in the order in which they run; the tests' results are written to `results` as JUnit XML."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q"]
    plain = [*pytest, "-p", "no:nbval"]  # nbval is slow to load
    two = ["-n", "2", "--dist"]
    lint_imports = str(Path(sysconfig.get_path("scripts")) / "lint-imports")
    found = sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/homework/solutions/*.ipynb")])
    notebooks = [str(notebook.relative_to(ROOT)) for notebook in found] or ["notebooks"]  # none is a failure
    nbval = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300"]
    return [
        Step("ruff", [python, "-m", "ruff", "check"]),
        Step("import-linter", [lint_imports, "--no-logo"]),
        Step("notebooks are built from their text", [python, "notebooks/build.py", "check"]),
        Step(
            "tests",
            [*plain, *two, "loadfile", "-rfEs", f"--junitxml={results}", "--ignore=tests/benchmarks", "tests"],
        ),
        Step("doctests", [*plain, "--doctest-modules", "effnlp_lessons"], (0, PYTEST_NOTHING_COLLECTED)),
        Step(
            f"{len(notebooks)} notebooks under nbval",
            [*pytest, *two, "loadscope", *nbval, *notebooks],
        ),
    ]


def run() -> int:
    """Run the steps and print each with its seconds. Returns 0, or the first failing exit code."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "tests.xml"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",  # two workers at a time
            "EFFNLP_GUESSES": "recorded",
            "EFFNLP_HOME": folder,  # leaves the student's own progress alone
        }
        planned = steps(results)
        for step in planned:
            print(f"== {step.name}", flush=True)
            begun = time.perf_counter()
            code = subprocess.run(step.command, cwd=ROOT, env=environment).returncode
            print(f"== {step.name}: {time.perf_counter() - begun:.1f} s", flush=True)
            if code not in step.passing:
                print(f"FAILED at: {step.name} (exit code {code}). The steps after it did not run.", flush=True)
                return code
        print(browser_tests(results))
        print(f"All {len(planned)} steps passed in {time.perf_counter() - started:.0f} s.", flush=True)
    return 0


def browser_tests(results: Path) -> str:
    """One line on whether the browser tests ran (without a Chromium they skip), from pytest's XML file."""
    cases = ElementTree.parse(results).iter("testcase")
    browser = [case for case in cases if case.get("classname", "").startswith("tests.browser.")]
    skipped = [case.find("skipped") for case in browser if case.find("skipped") is not None]
    if not browser:
        return "Browser tests: there are none."
    if len(skipped) == len(browser):
        return f"Browser tests: NOT RUN, all {len(browser)} skipped ({skipped[0].get('message')})."
    return f"Browser tests: {len(browser) - len(skipped)} ran, {len(skipped)} skipped."
