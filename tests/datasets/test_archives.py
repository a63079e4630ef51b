"""Archives that must not be trusted."""

import io
import os
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from effnlp_lessons.datasets import archives
from effnlp_lessons.datasets.sources import SourceError, load_sources, prepare


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def zip_with_mode(mode: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("p/a.txt")
        info.external_attr = mode << 16
        archive.writestr(info, "/etc/passwd")
    return buffer.getvalue()


def zip_of(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


GOOD = b"/etc/passwd"  # the content expected of p/a.txt; the symbolic links hold the same bytes
PLAIN = {"p/a.txt": GOOD}
EVIL = {
    "tar: symbolic link": ("sdist", {"x": link("p/a.txt", tarfile.SYMTYPE, "/etc/passwd")}, "plain file"),
    "tar: hard link": ("sdist", {"b": GOOD, "x": link("p/a.txt", tarfile.LNKTYPE, "b")}, "plain file"),
    "tar: folder": ("sdist", {"x": link("p/a.txt", tarfile.DIRTYPE, "")}, "plain file"),
    "tar: device": ("sdist", {"x": link("p/a.txt", tarfile.CHRTYPE, "")}, "plain file"),
    "tar: path upwards": ("sdist", PLAIN | {"p/../../evil.txt": b"evil"}, "odd path 'p/../../evil.txt'"),
    "tar: absolute path": ("sdist", PLAIN | {"/evil.txt": b"evil"}, "odd path '/evil.txt'"),
    "tar: missing": ("sdist", {"p/b.txt": GOOD}, "must hold p/a.txt once, it holds it 0 times"),
    "zip: symbolic link": ("wheel", zip_with_mode(0o120777), "plain file"),
    "zip: path upwards": (
        "wheel",
        zip_of(("p/a.txt", GOOD), ("../evil.txt", b"evil")),
        "odd path '../evil.txt'",
    ),
    "zip: backslashes": ("wheel", zip_of(("p/a.txt", GOOD), ("..\\evil.txt", b"evil")), "odd path"),
    "zip: drive": ("wheel", zip_of(("p/a.txt", GOOD), ("C:evil.txt", b"evil")), "odd path 'C:evil.txt'"),
    "zip: too long": ("wheel", zip_of(("p/a.txt", GOOD * 10)), "has more than 11 bytes"),
    "zip: too short": ("wheel", zip_of(("p/a.txt", GOOD[:4])), "has 4 of 11 bytes"),
    "zip: other content": ("wheel", zip_of(("p/a.txt", GOOD.upper())), "is not the file"),
    "a tar called wheel": ("wheel", PLAIN, "cannot be read as a wheel"),
    "a zip called sdist": ("sdist", zip_of(("p/a.txt", GOOD)), "cannot be read as a sdist"),
}


@pytest.mark.parametrize("case", EVIL)
def test_evil_archives_are_refused(copied, case):
    kind, content, message = EVIL[case]
    if isinstance(content, dict):
        content = copied.tar_gz(content)
    name = "evil-1.0-py3-none-any.whl" if kind == "wheel" else "evil-1.0.tar.gz"
    copied.add("evil", name, content, [copied.listed_file("a.txt", "p/a.txt", GOOD)])
    before = sorted(copied.data.parent.rglob("*"))
    with pytest.raises(SourceError, match=re.escape(message)):
        prepare()
    assert copied.visible() == []
    made = set(copied.data.parent.rglob("*")) - set(before)
    assert made == {copied.prepared, copied.prepared / ".lock"}
    assert not Path("/evil.txt").exists()


def test_a_truncated_tar_is_refused(copied):
    content = copied.tar_gz(PLAIN | {"p/b.txt": os.urandom(9_999)})[:5_000]
    copied.add("evil", "evil-1.0.tar.gz", content, [copied.listed_file("a.txt", "p/a.txt", GOOD)])
    with pytest.raises(SourceError, match="cannot be read as a sdist"):
        prepare()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_stands_twice_is_refused(copied):
    content = zip_of(("p/a.txt", GOOD), ("p/a.txt", GOOD))
    copied.add("evil", "evil-1.0-py3-none-any.whl", content, [copied.listed_file("a.txt", "p/a.txt", GOOD)])
    with pytest.raises(SourceError, match="it holds it 2 times"):
        prepare()


def test_a_plain_archive_of_the_same_kind_is_accepted(copied):
    copied.add("good", "good-1.0.tar.gz", copied.tar_gz(PLAIN), [copied.listed_file("a.txt", "p/a.txt", GOOD)])
    copied.add(
        "zip",
        "zip-1.0-py3-none-any.whl",
        zip_with_mode(0o100644),
        [copied.listed_file("a.txt", "p/a.txt", GOOD)],
    )
    assert prepare() == ["good", "zip"]


def test_a_file_larger_than_listed_is_not_written_to_its_end(copied, monkeypatch):
    monkeypatch.setattr(archives, "CHUNK", 10)
    copied.add(
        "bomb",
        "bomb-1.0-py3-none-any.whl",
        zip_of(("a", b"0" * 1000)),
        [copied.listed_file("a", "a", b"0" * 25)],
    )
    with pytest.raises(SourceError):
        archives.extract(copied.links / "bomb-1.0-py3-none-any.whl", load_sources()["bomb"], copied.data)
    assert (copied.data / "a").stat().st_size == 30
