"""What this machine has of what the course uses, and how to mend what it lacks. Standard library only.

Notebook 00 and `python -m effnlp_lessons doctor` show it:
`print(environment.as_table(environment.report()))`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from typing import NamedTuple

from effnlp_lessons import paths
from effnlp_lessons.installer import OLDEST_PYTHON, shown_python, venv_python

DISTRIBUTION = "effnlp-lessons"
SPARE_BYTES = 1_000_000_000  # room for what the notebooks and the homework write


class Finding(NamedTuple):
    """One row of the report: `found` is what is there, `mend` one command, empty when `ok`."""

    what: str
    found: str
    ok: bool
    mend: str


def report() -> list[Finding]:
    """Look at this machine: Python, packages, data, teacher, disk. Nothing heavy is imported.

    torch's threads and device are told only when torch is imported already.
    """
    return [
        python_finding(),
        package_finding("torch", note=torch_note()),
        package_finding("transformers"),
        triton_finding(),
        package_finding("ipywidgets"),
        data_finding(),
        teacher_finding(),
        disk_finding(),
    ]


def as_table(findings: list[Finding]) -> str:
    """The report as plain text: a line for each finding, under a failing one what mends it."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{'ok' if finding.ok else 'MEND':<6}{finding.what:<{width}}  {finding.found}")
        if not finding.ok:
            lines.append(f"{'':<6}{'':<{width}}  run: {finding.mend}")
    return "\n".join(lines)


def python_command() -> str:
    """This Python as one types it in the checkout: `.venv/bin/python`, elsewhere `python`."""
    inside = os.path.realpath(sys.prefix) == os.path.realpath(venv_python().parent.parent)
    return shown_python() if inside else "python"


def install_command() -> str:
    """The command that installs into this very environment whatever it lacks."""
    return f"{python_command()} -m pip install -c constraints.txt -e ."


def python_finding() -> Finding:
    ok = sys.version_info[:2] >= OLDEST_PYTHON
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("Python", found, ok, "" if ok else "make lab PY=python3.12")


def package_finding(package: str, note: str = "") -> Finding:
    """The installed version of a package against the oldest that pyproject.toml allows; `note` follows it."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Finding(package, "not installed", False, install_command())
    oldest = oldest_version(package)
    if release(version) < release(oldest):
        return Finding(package, f"{version}, and the course needs {oldest}", False, install_command())
    return Finding(package, version + note, True, "")


def oldest_version(package: str) -> str:
    """The oldest version that the installed course asks for, such as "2.9"; "0" when it names none."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return "0"
    for requirement in requirements:
        match = re.match(rf"{re.escape(package)}\s*>=\s*([\d.]+)", requirement)
        if match:
            return match[1]
    return "0"


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    return tuple(int(number) for number in re.match(r"[\d.]*", version)[0].split(".") if number)


def torch_note() -> str:
    """Threads and device of a torch that is imported already; otherwise nothing."""
    torch = sys.modules.get("torch")
    if torch is None:
        return ""
    threads = torch.get_num_threads()
    device = f"CUDA ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "CPU"
    return f", {threads} thread{'s' if threads > 1 else ''}, {device}"


def triton_finding() -> Finding:
    if not sys.platform.startswith("linux"):
        return Finding("triton", "Linux only; everything but the Triton cells works without it", True, "")
    finding = package_finding("triton")
    if finding.ok:
        return finding
    return finding._replace(found=f"{finding.found}; everything but the Triton cells works without it")


def data_finding() -> Finding:
    from effnlp_lessons.datasets import sources

    mend = f"{python_command()} -m effnlp_lessons prepare"
    try:
        wanted = sources.load_sources()
    except sources.SourceError as error:
        return Finding("data", str(error), False, "git checkout -- data/sources.toml")
    missing = [name for name in wanted if not is_prepared(name)]
    if missing:
        return Finding("data", f"not prepared: {', '.join(missing)}", False, mend)
    return Finding("data", f"{len(wanted)} of {len(wanted)} sources prepared", True, "")


def is_prepared(source: str) -> bool:
    """Whether every file of a data source is in its place."""
    from effnlp_lessons.datasets import sources

    try:
        for file in sources.load_sources()[source].files:
            sources.path(source, file.name)
    except sources.SourceError:
        return False
    return True


def teacher_finding() -> Finding:
    file = paths.checkpoints_dir() / "teacher.safetensors"
    if file.is_file():
        return Finding("teacher", f"checkpoint of {file.stat().st_size / 1e6:.1f} MB", True, "")
    return Finding("teacher", "its checkpoint is missing", False, "git checkout -- data/checkpoints")


def disk_finding() -> Finding:
    free = shutil.disk_usage(paths.ROOT).free
    ok = free >= SPARE_BYTES
    found = f"{free / 1e9:.1f} GB free" + ("" if ok else f", and {SPARE_BYTES / 1e9:.0f} GB are wanted")
    return Finding("disk", found, ok, "" if ok else f"{python_command()} -m pip cache purge")
