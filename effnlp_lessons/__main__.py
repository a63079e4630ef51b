"""The course's commands: `python -m effnlp_lessons install | prepare | lab | doctor | test`.

`install` runs on a bare checkout with the system's Python and the standard library alone. This file and
`installer.py` keep to what Python 3.8 can read, so that an old Python gets a sentence, not a traceback.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys

from effnlp_lessons.installer import SetupError, check_python, install, shown_python
from effnlp_lessons.paths import ROOT


def main(arguments: list[str]) -> int:
    """Run one command and return the exit code: 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m effnlp_lessons", description="The commands of the course.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("install", help="make .venv and install the course there with everything it uses")
    commands.add_parser("prepare", help="fetch and verify the data that the notebooks read")
    commands.add_parser("lab", help="prepare the data and open JupyterLab; further options go to JupyterLab")
    commands.add_parser("doctor", help="show what is installed and how to mend what is missing")
    commands.add_parser("test", help="run every check: linters, tests, doctests, all notebooks")
    chosen, further = parser.parse_known_args(arguments)
    if further and chosen.command != "lab":
        parser.error("unrecognized arguments: " + " ".join(further))
    try:
        check_python(sys.version_info)
        if chosen.command == "install":
            install()
        elif chosen.command == "prepare":
            prepare()
        elif chosen.command == "lab":
            prepare()
            return lab(further)
        elif chosen.command == "test":
            prepare()
            return test()
        else:
            return doctor()
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def prepare() -> None:
    """Bring what data/sources.toml names into data/prepared.

    Raises:
        SetupError: if the course is not installed in this Python, or the data cannot be had.
    """
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("jupyterlab") is None:
        raise SetupError(
            f"The course is not installed in this Python ({sys.executable}): run "
            f"`python3 -m effnlp_lessons install` once, then use {shown_python()} in place of python."
        )
    from effnlp_lessons.datasets import sources

    try:
        sources.prepare()
    except sources.SourceError as error:
        raise SetupError(str(error)) from error


def lab_command(further: list[str]) -> list[str]:
    """The command that opens JupyterLab on the first notebook; the student's own options come last."""
    return [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={ROOT}",
        "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb",
        *further,
    ]


def lab(further: list[str]) -> int:
    """Open JupyterLab. On Linux and macOS it takes this process's place, so that it alone gets Ctrl-C.

    `notebooks/.jupyter` takes the instructor's nbgrader panels out of the student's JupyterLab.
    """
    command = lab_command(further)
    configuration = [str(ROOT / "notebooks" / ".jupyter"), os.environ.get("JUPYTER_CONFIG_PATH", "")]
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, configuration))
    if os.name == "posix":
        sys.stdout.flush()
        os.execv(command[0], command)
    return subprocess.call(command)


def test() -> int:
    """Run every check of the course, in the order of `suite.py`."""
    from effnlp_lessons import suite

    return suite.run()


def doctor() -> int:
    """Print what is installed and how to mend what is missing; the exit code is 1 when something is."""
    from effnlp_lessons import environment

    findings = environment.report()
    print(environment.as_table(findings))
    return 0 if all(finding.ok for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
