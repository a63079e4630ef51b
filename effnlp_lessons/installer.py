"""Makes `.venv` in the checkout and installs the course there: `python3 -m effnlp_lessons install`.

Runs on the system's Python with the standard library alone. A stamp in `.venv` says what was installed: it is
written as unfinished before the first step and as finished after the last. A `.venv` without a finished stamp
(a killed install, or one made by other means) is built anew; one that is up to date is left alone. Whatever
can go wrong on a student's machine ends in a `SetupError` of one sentence.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from effnlp_lessons.paths import ROOT

OLDEST_PYTHON = (3, 11)
EXTRAS = "test,author,scale,grading"
NEEDED_BYTES = 4_000_000_000  # 2.5 GB of packages with the CPU build of torch, and pip's working copies
NEEDED_WITH_CUDA = "8 GB with a CUDA build of torch"
UPDATE_BYTES = 1_000_000_000  # to change packages of a finished .venv
TELLING = re.compile(r"^ *Downloading .*(\d\d(\.\d+)? MB|GB)\)|^Installing collected packages")
CUDA_HINT = (
    "    pip takes the CUDA build of torch, several GB. Without an NVIDIA GPU you can stop it (Ctrl-C) and set\n"
    "    TORCH_INDEX to the CPU address that PyTorch's installation page shows: make lab TORCH_INDEX=ADDRESS"
)
UNREACHABLE = (  # what pip's output holds when it could not talk to its index
    "Retrying (Retry(",
    "NewConnectionError",
    "Failed to establish a new connection",
    "name resolution",
    "ConnectTimeout",
    "ReadTimeout",
    "ProxyError",
    "SSLError",
    "Connection aborted",
    "Connection broken",
)


class SetupError(Exception):
    """What keeps the course from being set up, in one sentence for the student."""


def venv_python(root: Path = ROOT) -> Path:
    """Where the Python of the checkout's virtual environment is, or will be."""
    return root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def shown_python() -> str:
    """The Python of `.venv` as a student types it in the checkout: `.venv/bin/python`."""
    return os.path.relpath(venv_python(), ROOT)


def check_python(version: tuple) -> None:
    """Raise SetupError unless `version` (as `sys.version_info`) is one that the course runs on."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        raise SetupError(
            f"The course needs Python 3.11 or newer, and {sys.executable} is Python "
            f"{version[0]}.{version[1]}: use a newer one, as in `make lab PY=python3.12` or "
            "`python3.12 -m effnlp_lessons install`."
        )


def check_venv_module() -> None:
    """Raise SetupError unless this Python can make virtual environments (Debian ships that part apart)."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            f"{sys.executable} has no complete venv module: install it (on Debian and Ubuntu "
            "`sudo apt-get install python3-venv`), then give the same command again."
        )


def check_disk(root: Path, needed: int) -> None:
    """Raise SetupError unless `needed` bytes are free on the disk that holds `root`."""
    free = shutil.disk_usage(root).free
    if free < needed:
        raise SetupError(
            f"The install needs about {needed / 1e9:.0f} GB of disk space ({NEEDED_WITH_CUDA}), and "
            f"{free / 1e9:.1f} GB are free at {root}: make room, then give the same command again."
        )


def wanted_stamp(root: Path, torch_index: str) -> dict:
    """The stamp of a finished install of this checkout with this Python.

    `home` is what cannot change without building `.venv` anew: the folder (its scripts name it), the Python.
    `packages` is a hash of what an install reads: dependencies, extras, tested versions, and the course's own
    version. The other parts of pyproject.toml are left out, so that a changed linter setting costs no install.
    """
    import tomllib  # since Python 3.11

    pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    tools = pyproject.get("tool", {}).get("setuptools")
    constraints = (root / "constraints.txt").read_text(encoding="utf-8")
    version = (root / "effnlp_lessons" / "__init__.py").read_text(encoding="utf-8")
    parts = [pyproject.get("build-system"), pyproject.get("project"), tools, version, EXTRAS, constraints]
    return {
        "finished": True,
        "home": f"{root}, {platform.python_implementation()} {sys.version_info[0]}.{sys.version_info[1]}",
        "packages": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        "torch_index": torch_index,
    }


def read_stamp(root: Path) -> dict:
    """The stamp of `.venv`. One that is absent or unreadable counts as unfinished."""
    unfinished = {"finished": False, "home": "", "packages": "", "torch_index": ""}
    try:
        stamp = json.loads((root / ".venv" / "installed.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return unfinished
    return stamp if isinstance(stamp, dict) and stamp.keys() == unfinished.keys() else unfinished


def write_stamp(root: Path, stamp: dict) -> None:
    """Put the stamp in place in one move, so that nobody ever reads half of it."""
    draft = root / ".venv" / "installed.json.draft"
    draft.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, root / ".venv" / "installed.json")


def install(root: Path = ROOT) -> None:
    """Make `.venv` in the checkout and install the course there; do nothing when that is done already.

    The environment variable TORCH_INDEX, if set, is the address of the package index that torch comes from.

    Raises:
        SetupError: in one sentence, what this machine lacks.
    """
    check_python(sys.version_info)
    if not (root / "pyproject.toml").is_file() or not (root / "constraints.txt").is_file():
        raise SetupError(f"There are no pyproject.toml and constraints.txt in {root}: run this in a full clone.")
    torch_index = os.environ.get("TORCH_INDEX", "")
    try:
        if is_up_to_date(root, torch_index):
            return
        with one_at_a_time(root) as lock:
            if not is_up_to_date(root, torch_index):  # another install may just have ended
                bring_up_to_date(root, torch_index, lock)
    except OSError as error:
        raise SetupError(
            f"The install cannot write {error.filename or root} ({error.strerror or error}): "
            "see that the course's folder is yours to write in and that its disk has room."
        ) from error


@contextlib.contextmanager
def one_at_a_time(root: Path):
    """Hold the checkout's install lock, which lies on pyproject.toml; gives the open file.

    pip inherits the file, so that the pip of a killed install keeps the lock until it has ended too. Windows
    has no such lock, and some network disks have none: there the install goes without.
    """
    with open(root / "pyproject.toml", "r+b") as lock:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Another install of this folder is running: waiting for it to end.", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                pass
        yield lock


def is_up_to_date(root: Path, torch_index: str) -> bool:
    """Whether `.venv` holds a finished install of what is wanted now."""
    before = read_stamp(root)
    return venv_python(root).exists() and before == wanted_stamp(root, torch_index or before["torch_index"])


def bring_up_to_date(root: Path, torch_index: str, lock) -> None:
    """The install itself, once the lock is held. With no `torch_index` that of the last install holds."""
    before = read_stamp(root)
    wanted = wanted_stamp(root, torch_index or before["torch_index"])
    usable = before["finished"] and before["home"] == wanted["home"] and venv_python(root).exists()
    started = time.perf_counter()
    if not usable:
        check_venv_module()
        remove_venv(root)
    check_disk(root, UPDATE_BYTES if usable else NEEDED_BYTES)
    (root / ".venv").mkdir(exist_ok=True)
    write_stamp(root, {**wanted, "finished": False})
    (root / ".venv" / "install.log").write_text("", encoding="utf-8")
    try:
        if not usable:
            run("virtual environment .venv", [sys.executable, "-m", "venv", ".venv"], root, lock)
        other_torch = usable and wanted["torch_index"] != before["torch_index"]
        for name, arguments in pip_installs(wanted["torch_index"], other_torch):
            run(name, [str(venv_python(root)), "-m", "pip", "install", *arguments], root, lock)
    except SetupError:
        if usable:  # pip takes back what it could not finish, so what worked before works still
            write_stamp(root, before)
        raise
    write_stamp(root, wanted)
    print(f"Installed in .venv in {time.perf_counter() - started:.0f} s.", flush=True)


def pip_installs(torch_index: str, other_torch: bool) -> list[tuple[str, list[str]]]:
    """What pip is asked to install, in order: pairs of a name to print and the arguments of `pip install`.

    With a `torch_index` torch comes from there first, in place of an installed one if `other_torch`. The
    second call may look there too, since what a CUDA or ROCm build of torch needs can lie there alone.
    """
    common = ["--disable-pip-version-check", "-c", "constraints.txt"]
    course = ("the course and its packages, minutes the first time", [*common, "-e", f".[{EXTRAS}]"])
    if not torch_index:
        return [course]
    again = ["--force-reinstall"] if other_torch else []
    torch = [*common, *again, "--no-deps", "--index-url", torch_index, "torch"]
    name, arguments = course
    return [("torch from TORCH_INDEX", torch), (name, ["--extra-index-url", torch_index, *arguments])]


def remove_venv(root: Path) -> None:
    """Delete a `.venv` that is not to be trusted, if there is one."""
    venv = root / ".venv"
    if not os.path.lexists(venv):
        return
    if Path(sys.prefix).resolve() == venv.resolve():
        raise SetupError(
            f"{sys.executable} lies in .venv, which has to be built anew: `deactivate` it, then try again."
        )
    print(".venv holds no finished install for this folder and this Python: building it anew.", flush=True)
    shutil.rmtree(venv)


def run(name: str, command: list[str], root: Path, lock) -> None:
    """Run one step of the install: its name and seconds are printed, its output is added to the log.

    Long downloads and the unpacking are announced; otherwise a line of its output is shown every 15 seconds.
    A CUDA build of torch is announced before pip fetches it.

    Raises:
        SetupError: one sentence on why the step failed.
    """
    print(f"- {name} ...", flush=True)
    started = shown = time.perf_counter()
    lines = []
    process = subprocess.Popen(
        command,
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=[lock.fileno()] if os.name == "posix" else (),
    )
    with process, open(root / ".venv" / "install.log", "a", encoding="utf-8") as log:
        for line in process.stdout:
            log.write(line)
            if line.startswith("Collecting nvidia-") and "Collecting nvidia-" not in "".join(lines):
                print(CUDA_HINT, flush=True)
            lines.append(line)
            if TELLING.search(line) or time.perf_counter() - shown > 15:
                shown = time.perf_counter()
                line = re.sub(r"-\d\S*\.whl", "", line.strip())  # the name and the size are enough
                print(f"    {shown - started:.0f} s: {line[:90]}", flush=True)
    if process.returncode:
        raise SetupError(why_it_failed("".join(lines)))
    print(f"  {time.perf_counter() - started:.1f} s", flush=True)


def why_it_failed(output: str) -> str:
    """One sentence for the student from what pip, or the making of the environment, printed."""
    errors = re.findall(r"^ *(?:ERROR|error|Error): (.+)$", output, re.MULTILINE)
    if "No space left on device" in output:
        reason = f"The disk is full: make room (about {NEEDED_BYTES / 1e9:.0f} GB in all, {NEEDED_WITH_CUDA})"
    elif "ResolutionImpossible" in output:
        reason = "pip found no versions that fit together: undo changes to pyproject.toml and constraints.txt"
    elif any(words in output for words in UNREACHABLE):
        reason = "No network: pip could not reach its package index; check the connection (and the proxy)"
    elif "(from versions: none)" in output:
        reason = (
            "No network, or an index without packages for this Python: pip found no version at all of "
            "something it needs; check the connection, pip's settings (PIP_NO_INDEX) and TORCH_INDEX"
        )
    else:
        last = errors[-1] if errors else "it gave no reason"
        reason = f"The install failed ({last}): mend that"
    return f"{reason}, then give the same command again; the full output is in .venv/install.log."
