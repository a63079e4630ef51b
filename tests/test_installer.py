"""The install: of a project so small that it needs no network, and on a machine faked piece by piece."""

import ast
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from effnlp_lessons import __main__ as commands
from effnlp_lessons import installer
from effnlp_lessons.installer import SetupError
from effnlp_lessons.paths import ROOT

FILES_OF_INSTALL = ["__init__.py", "__main__.py", "installer.py", "paths.py"]

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "tiny"
version = "1"

[tool.ruff]
line-length = 90
"""

BACKEND = '''
"""A build backend that needs nothing: it packs the metadata alone."""
import pathlib, zipfile

INFO = {
    "tiny-1.dist-info/METADATA": "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\n",
    "tiny-1.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
}


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(pathlib.Path(wheel_directory) / "tiny-1-py3-none-any.whl", "w") as wheel:
        for name, text in INFO.items():
            wheel.writestr(name, text)
        wheel.writestr("tiny-1.dist-info/RECORD", "".join(f"{name},,\\n" for name in INFO))
    return "tiny-1-py3-none-any.whl"
'''


def make_project(folder: Path) -> Path:
    """A checkout with the course's commands and a pyproject.toml of its own that can be installed at once."""
    (folder / "effnlp_lessons").mkdir(parents=True)
    for name in FILES_OF_INSTALL:
        shutil.copy(ROOT / "effnlp_lessons" / name, folder / "effnlp_lessons" / name)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "backend.py").write_text(BACKEND)
    (folder / "constraints.txt").write_text("torch==2.13.0\n")
    return folder


def run_install(project: Path, python: str = sys.executable, **variables: str) -> subprocess.CompletedProcess:
    """`python -m effnlp_lessons install` as a student runs it, without any package index."""
    return subprocess.run(
        [python, "-m", "effnlp_lessons", "install"],
        cwd=project,
        env=without_index() | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def without_index() -> dict[str, str]:
    return {**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}


def assert_one_sentence(message: str, *words: str) -> None:
    """One line, one sentence, with the given words and no traceback."""
    assert message.strip().count("\n") == 0, message
    assert "Traceback" not in message
    assert message.strip().endswith(".")
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


@pytest.fixture(scope="module")
def mended(tmp_path_factory):
    """A project whose first install was killed while .venv was being made, and the second run's result."""
    project = make_project(tmp_path_factory.mktemp("mended") / "course")
    first = subprocess.Popen(
        [sys.executable, "-m", "effnlp_lessons", "install"],
        cwd=project,
        env=without_index(),
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (project / ".venv" / "pyvenv.cfg").exists():
        assert first.poll() is None, "the install ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not json.loads((project / ".venv" / "installed.json").read_text())["finished"]
    (project / ".venv" / "half-written").write_text("left behind by the killed install")
    return project, run_install(project)


@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
def test_a_killed_install_is_mended_by_the_next(mended):
    project, second = mended
    assert second.returncode == 0, second.stdout + second.stderr
    assert "building it anew" in second.stdout
    assert not (project / ".venv" / "half-written").exists()
    installed = [sys.executable, "-m", "pip", "--python", str(installer.venv_python(project)), "list"]
    assert "tiny" in subprocess.run(installed, capture_output=True, text=True).stdout


@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
def test_every_step_is_printed_with_its_seconds(mended):
    assert len(re.findall(r"^- .+ \.\.\.$", mended[1].stdout, re.MULTILINE)) == 2
    assert len(re.findall(r"^  \d+\.\d s$", mended[1].stdout, re.MULTILINE)) == 2
    assert re.search(r"^Installed in .venv in \d+ s\.$", mended[1].stdout, re.MULTILINE)


@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
def test_the_second_install_does_nothing(mended):
    project, _ = mended
    before = {file: file.stat().st_mtime_ns for file in (project / ".venv").iterdir()}
    again = run_install(project)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert {file: file.stat().st_mtime_ns for file in (project / ".venv").iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
def test_without_network_one_sentence_and_what_worked_works_still(mended):
    project, _ = mended
    finished = (project / "pyproject.toml").read_text()
    needing = finished.replace("requires = []", 'requires = ["setuptools>=77"]')
    (project / "pyproject.toml").write_text(needing)
    result = run_install(project)
    assert result.returncode == 1
    assert_one_sentence(result.stderr, "No network", ".venv/install.log")
    assert "No matching distribution" in (project / ".venv" / "install.log").read_text()
    (project / "pyproject.toml").write_text(finished)
    assert run_install(project).stdout == ""


def old_pythons() -> list[str]:
    """Pythons on this machine that are too old for the course: on the PATH, or kept by pyenv beside it."""
    found = [shutil.which(f"python3.{minor}") for minor in (8, 9, 10)]
    found += [str(python) for python in Path.home().glob(".pyenv/versions/3.*/bin/python3.[89]")]
    started = [subprocess.run([python, "-c", ""], capture_output=True) for python in found if python]
    return [run.args[0] for run in started if run.returncode == 0]  # a version manager's stub does not start


@pytest.mark.parametrize("name", FILES_OF_INSTALL)
def test_old_pythons_can_read_what_runs_first(name):
    ast.parse((ROOT / "effnlp_lessons" / name).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_an_old_python_gets_one_sentence(tmp_path):
    pythons = old_pythons()
    if not pythons:
        pytest.skip("no Python 3.8, 3.9 or 3.10 on this machine")
    project = make_project(tmp_path / "course")
    for python in pythons:
        result = run_install(project, python)
        assert result.returncode == 1
        assert_one_sentence(result.stderr, "Python 3.11 or newer", "make lab PY=")
    assert not (project / ".venv").exists()


@pytest.mark.parametrize("command", ["install", "prepare", "lab", "doctor", "test"])
def test_every_command_names_the_python_it_needs(command, monkeypatch, capsys):
    monkeypatch.setattr(commands.sys, "version_info", (3, 10, 13, "final", 0))
    assert commands.main([command]) == 1
    assert_one_sentence(capsys.readouterr().err, "Python 3.11 or newer", "Python 3.10")


def test_the_oldest_python_is_the_one_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=" + ".".join(map(str, installer.OLDEST_PYTHON))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A project and a machine on which every step of an install works at once and is only written down."""
    project = make_project(tmp_path / "course")
    calls = []

    def run(name, command, root, lock):
        calls.append(command)
        if "venv" in command:
            installer.venv_python(root).parent.mkdir(parents=True)
            installer.venv_python(root).touch()

    monkeypatch.setattr(installer, "run", run)
    monkeypatch.setattr(installer.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**11))
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    return SimpleNamespace(project=project, calls=calls)


def change_dependencies(project: Path) -> None:
    with open(project / "constraints.txt", "a") as file:
        file.write("triton==3.7.1\n")


def test_a_full_disk_is_told_before_anything_is_written(machine, monkeypatch):
    monkeypatch.setattr(installer.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_520_000_000))
    with pytest.raises(SetupError) as error:
        installer.install(machine.project)
    assert_one_sentence(str(error.value), "4 GB", "1.5 GB")
    assert machine.calls == [] and not (machine.project / ".venv").exists()


def test_a_missing_venv_module_is_named(machine, monkeypatch):
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else 1)
    with pytest.raises(SetupError) as error:
        installer.install(machine.project)
    assert_one_sentence(str(error.value), "python3-venv")


def test_a_venv_that_cannot_be_a_folder(machine):
    (machine.project / ".venv").write_text("a file in the way")
    with pytest.raises(SetupError) as error:
        installer.install(machine.project)
    assert_one_sentence(str(error.value), "cannot write", ".venv")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written(machine, monkeypatch, number):
    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number), str(machine.project / ".venv"))

    monkeypatch.setattr(installer.Path, "mkdir", refuse)
    with pytest.raises(SetupError) as error:
        installer.install(machine.project)
    assert_one_sentence(str(error.value), "cannot write", os.strerror(number))


@pytest.mark.parametrize("missing", ["pyproject.toml", "constraints.txt"])
def test_a_folder_that_is_no_checkout(machine, missing):
    (machine.project / missing).unlink()
    with pytest.raises(SetupError) as error:
        installer.install(machine.project)
    assert_one_sentence(str(error.value), "pyproject.toml", "clone")


def test_pips_words_become_one_sentence():
    broken = "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(...)'\nERROR: x\n"
    assert_one_sentence(installer.why_it_failed(broken), "No network", ".venv/install.log")
    full = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    assert_one_sentence(installer.why_it_failed(full), "disk is full", "4 GB")
    clash = "ERROR: ResolutionImpossible: for help visit a page\n"
    assert_one_sentence(installer.why_it_failed(clash), "constraints.txt")
    other = "Collecting torch\nERROR: Package 'torch' requires a different Python\n"
    assert_one_sentence(installer.why_it_failed(other), "Package 'torch' requires a different Python")
    assert_one_sentence(installer.why_it_failed(""), "no reason")


def test_a_cuda_build_is_announced_once(tmp_path, capsys):
    (tmp_path / ".venv").mkdir()
    code = "print('Collecting torch', 'Collecting nvidia-cublas', 'Collecting nvidia-cudnn', sep='\\n')"
    with open(os.devnull) as lock:
        installer.run("packages", [sys.executable, "-c", code], tmp_path, lock)
    assert capsys.readouterr().out.count("make lab TORCH_INDEX=ADDRESS") == 1


def test_what_an_install_reads_decides_whether_it_runs_again(machine):
    installer.install(machine.project)
    first = len(machine.calls)
    pyproject = machine.project / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("line-length = 90", "line-length = 80"))
    installer.install(machine.project)
    assert len(machine.calls) == first, "a linter's setting is no reason to install"
    change_dependencies(machine.project)
    installer.install(machine.project)
    assert ["venv" in call for call in machine.calls[first:]] == [False], "pip alone, in the same .venv"
    (machine.project / "effnlp_lessons" / "__init__.py").write_text('__version__ = "9.0"\n')
    installer.install(machine.project)
    assert len(machine.calls) == first + 2, "a new version is installed"


@pytest.mark.parametrize("spoil", ["moved", "other Python", "no stamp", "broken stamp", "python gone"])
def test_a_venv_that_is_not_to_be_trusted_is_built_anew(machine, spoil, tmp_path):
    installer.install(machine.project)
    project, stamp = machine.project, machine.project / ".venv" / "installed.json"
    if spoil == "moved":
        project = project.rename(tmp_path / "elsewhere")
    elif spoil == "other Python":
        stamp.write_text(stamp.read_text().replace("CPython 3", "CPython 2"))
    elif spoil == "no stamp":
        stamp.unlink()
    elif spoil == "broken stamp":
        stamp.write_text(stamp.read_text()[:20])
    else:
        installer.venv_python(project).unlink()
    (project / ".venv" / "old").touch()
    installer.install(project)
    assert not (project / ".venv" / "old").exists()
    assert installer.is_up_to_date(project, "")


def test_a_finished_install_needs_no_right_to_write(machine, monkeypatch):
    installer.install(machine.project)

    def refuse(root):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(root))

    monkeypatch.setattr(installer, "one_at_a_time", refuse)
    installer.install(machine.project)
    change_dependencies(machine.project)
    with pytest.raises(SetupError):
        installer.install(machine.project)


def test_a_failed_update_leaves_what_worked(machine, monkeypatch):
    installer.install(machine.project)
    stamp = installer.read_stamp(machine.project)
    change_dependencies(machine.project)

    def fail(name, command, root, lock):
        assert not installer.read_stamp(root)["finished"], "a kill at this moment must be noticed"
        raise SetupError("No network.")

    monkeypatch.setattr(installer, "run", fail)
    with pytest.raises(SetupError):
        installer.install(machine.project)
    assert installer.read_stamp(machine.project) == stamp
    assert not installer.is_up_to_date(machine.project, "")


def test_a_failed_first_install_is_not_taken_for_one_that_worked(machine, monkeypatch):
    def fail(name, command, root, lock):
        raise SetupError("No network.")

    monkeypatch.setattr(installer, "run", fail)
    with pytest.raises(SetupError):
        installer.install(machine.project)
    assert not installer.read_stamp(machine.project)["finished"]


def test_a_failed_rebuild_is_not_taken_for_the_install_before_it(machine, monkeypatch):
    installer.install(machine.project)
    installer.venv_python(machine.project).unlink()

    def make_venv_then_fail(name, command, root, lock):
        if "venv" not in command:
            raise SetupError("No network.")
        installer.venv_python(root).parent.mkdir(parents=True)
        installer.venv_python(root).touch()

    monkeypatch.setattr(installer, "run", make_venv_then_fail)
    with pytest.raises(SetupError):
        installer.install(machine.project)
    assert not installer.is_up_to_date(machine.project, "")


def test_torch_comes_first_from_the_index_that_is_named(machine, monkeypatch):
    monkeypatch.setenv("TORCH_INDEX", "https://torch.example/cpu")
    installer.install(machine.project)
    venv, torch, course = machine.calls
    assert torch[torch.index("--index-url") + 1] == "https://torch.example/cpu"
    assert torch[-1] == "torch" and "--no-deps" in torch and "constraints.txt" in torch
    assert course[-1] == f".[{installer.EXTRAS}]"
    monkeypatch.delenv("TORCH_INDEX")
    installer.install(machine.project)
    assert len(machine.calls) == 3, "the index is remembered"
    monkeypatch.setenv("TORCH_INDEX", "https://torch.example/cuda")
    installer.install(machine.project)
    assert "--force-reinstall" in machine.calls[3], "another build of the same version replaces the first"


def test_two_installs_take_turns(machine, capsys):
    if os.name != "posix":
        pytest.skip("there is no lock on Windows")
    with installer.one_at_a_time(machine.project):
        second = threading.Thread(target=installer.install, args=[machine.project])
        second.start()
        second.join(0.3)
        assert second.is_alive() and machine.calls == []
    second.join(20)
    assert "waiting" in capsys.readouterr().out
    assert installer.is_up_to_date(machine.project, "")


@pytest.mark.skipif(os.name != "posix", reason="there is no lock on Windows")
def test_a_killed_installs_pip_still_keeps_others_out(machine):
    import fcntl

    (machine.project / ".venv").mkdir()
    step = [sys.executable, "-c", "import time; print('at it', flush=True); time.sleep(2)"]
    code = (
        "from pathlib import Path; from effnlp_lessons import installer\n"
        f"root = Path({str(machine.project)!r})\n"
        f"with installer.one_at_a_time(root) as lock: installer.run('pip', {step}, root, lock)"
    )
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    log = machine.project / ".venv" / "install.log"
    while not log.exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    with open(machine.project / "pyproject.toml", "r+b") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_EX)  # free once the orphan has ended


def test_no_python_deletes_the_venv_it_runs_in(machine, monkeypatch):
    (machine.project / ".venv").mkdir()
    monkeypatch.setattr(installer.sys, "prefix", str(machine.project / ".venv"))
    with pytest.raises(SetupError) as error:
        installer.install(machine.project)
    assert_one_sentence(str(error.value), "deactivate")
    assert (machine.project / ".venv").exists()
