"""The commands `python -m effnlp_lessons ...`, without opening or running anything."""

import os
import subprocess
import sys

import pytest

from effnlp_lessons import __main__ as commands
from effnlp_lessons import environment, suite
from effnlp_lessons.datasets import sources
from effnlp_lessons.environment import Finding
from effnlp_lessons.paths import ROOT


@pytest.fixture
def done(monkeypatch):
    """What the commands did, in order, as a list of names; JupyterLab's command line stands as it is."""
    calls = []
    monkeypatch.setattr(sources, "prepare", lambda: calls.append("prepare"))
    monkeypatch.setattr(commands, "install", lambda: calls.append("install"))
    monkeypatch.setattr(suite, "run", lambda: calls.append("test") or 3)
    monkeypatch.setattr(commands.os, "execv", lambda program, command: calls.append([program, *command]) or 0)
    monkeypatch.setattr(commands.os, "name", "posix")
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "")  # `lab` sets it; put back afterwards
    return calls


@pytest.mark.parametrize("command, expected", [("install", ["install"]), ("prepare", ["prepare"])])
def test_install_and_prepare_do_that_alone(done, command, expected):
    assert commands.main([command]) == 0
    assert done == expected


def test_lab_prepares_the_data_and_opens_the_first_notebook(done):
    commands.main(["lab", "--no-browser", "--port", "8899"])
    assert done[0] == "prepare"
    program, *command = done[1]
    assert program == sys.executable
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert f"--ServerApp.root_dir={ROOT}" in command
    assert "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb" in command
    assert command[-3:] == ["--no-browser", "--port", "8899"]


def test_lab_shows_students_no_grading_panels(done, monkeypatch):
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "their-own")
    commands.main(["lab"])
    ours, theirs = os.environ["JUPYTER_CONFIG_PATH"].split(os.pathsep)
    assert ours == str(ROOT / "notebooks" / ".jupyter") and theirs == "their-own"
    listed = subprocess.run(
        [sys.executable, "-m", "jupyter", "labextension", "list"], capture_output=True, text=True, check=True
    )
    line = next(line for line in (listed.stdout + listed.stderr).splitlines() if "@jupyter/nbgrader v" in line)
    assert "disabled" in line


def test_test_prepares_the_data_and_gives_the_exit_code_on(done):
    assert commands.main(["test"]) == 3
    assert done == ["prepare", "test"]


@pytest.mark.parametrize("command", ["prepare", "lab", "test"])
def test_data_that_cannot_be_had_stop_the_command(done, command, monkeypatch, capsys):
    def refuse():
        raise sources.SourceError("No network: connect and try again.")

    monkeypatch.setattr(sources, "prepare", refuse)
    assert commands.main([command]) == 1
    assert capsys.readouterr().err == "No network: connect and try again.\n"
    assert done == []


@pytest.mark.parametrize("command", ["prepare", "lab", "test"])
def test_a_python_without_the_course_names_the_one_with_it(done, command, monkeypatch, capsys):
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: None)
    assert commands.main([command]) == 1
    message = capsys.readouterr().err
    assert "python3 -m effnlp_lessons install" in message and ".venv" in message
    assert message.count("\n") == 1
    assert done == []


@pytest.mark.parametrize("ok, code", [(True, 0), (False, 1)])
def test_doctor_fails_when_something_is_to_be_mended(monkeypatch, capsys, ok, code):
    monkeypatch.setattr(environment, "report", lambda: [Finding("disk", "1.0 GB free", ok, "" if ok else "mend")])
    assert commands.main(["doctor"]) == code
    assert "1.0 GB free" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["sleep"], ["install", "--fast"]])
def test_unknown_commands_and_options_are_refused(done, arguments):
    with pytest.raises(SystemExit) as stop:
        commands.main(arguments)
    assert stop.value.code == 2
    assert done == []


def test_a_stop_from_the_keyboard_shows_no_traceback(done, monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "install", stop)
    assert commands.main(["install"]) == 130
    assert "Stopped" in capsys.readouterr().err
