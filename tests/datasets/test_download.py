"""pip at work: it fetches from a folder that the test fills, with no network."""

import os
import signal
import subprocess
import sys

import pytest

from effnlp_lessons.datasets import download
from effnlp_lessons.datasets.sources import SourceError, load_sources, path, prepare

PROJECT = b"""
[build-system]
requires = []
build-backend = "own"
backend-path = ["."]
"""
IN_TREE_BACKEND = """
import os, pathlib
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
        assert "setuptools==1.2.3" in pathlib.Path(os.environ[name]).read_text(), name
    info = pathlib.Path(folder, "tiny_sdist-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny-sdist\\nVersion: 1.0\\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\\nTag: py3-none-any\\n")
    return info.name
"""


def test_wheel_and_sdist_with_an_archive_inside(world, capfd):
    world.add_wheel(b"\x00\x01weights")
    inner = world.tar_gz({"set/reviews.txt": b"good\nbad\n", "set/other.txt": b"other"})
    plays = b"Exeunt."
    members = {
        "tiny_sdist-1.0/pyproject.toml": PROJECT,
        "tiny_sdist-1.0/own.py": IN_TREE_BACKEND.encode(),
        "tiny_sdist-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: tiny-sdist\nVersion: 1.0\n",
        "tiny_sdist-1.0/texts/play.txt": plays,
        "tiny_sdist-1.0/more.tar.gz": inner,
    }
    files = [
        world.listed_file("reviews.txt", "set/reviews.txt", b"good\nbad\n", archive="tiny_sdist-1.0/more.tar.gz"),
        world.listed_file("play_1.txt", "tiny_sdist-1.0/texts/play.txt", plays),
    ]
    world.add("texts", "tiny_sdist-1.0.tar.gz", world.tar_gz(members), files, build="setuptools==1.2.3")

    assert prepare() == ["tiny", "texts"]

    assert path("tiny", "weights.bin").read_bytes() == b"\x00\x01weights"
    assert path("texts", "reviews.txt").read_bytes() == b"good\nbad\n"
    assert path("texts", "play_1.txt").read_bytes() == plays
    assert world.visible() == ["texts", "tiny"]
    assert sorted(os.listdir(world.prepared / "texts")) == ["manifest.json", "play_1.txt", "reviews.txt"]
    assert sorted(os.listdir(world.prepared / "tiny")) == ["manifest.json", "weights.bin"]
    printed = capfd.readouterr()
    assert printed.err == ""
    assert [line.split(":")[0] for line in printed.out.splitlines()[:-1]] == [
        "tiny",
        "tiny",
        "texts",
        "texts",
    ]
    assert printed.out.splitlines()[-1].startswith("Data are ready in ")


def test_pip_refuses_a_package_with_another_hash(world):
    world.add_wheel()
    package = world.links / "tiny_wheel-1.0-py3-none-any.whl"
    expected = world.sha256(package.read_bytes())
    package.write_bytes(world.wheel({"tiny/weights.bin": b"tampered"}))
    with pytest.raises(SourceError) as error:
        prepare()
    message = str(error.value)
    assert "tiny-wheel==1.0" in message and f"expected {expected}" in message
    assert f"got {world.sha256(package.read_bytes())}" in message and message.endswith("nothing was kept.")
    assert world.visible() == []


def test_pip_refuses_a_truncated_package(world):
    world.add_wheel()
    package = world.links / "tiny_wheel-1.0-py3-none-any.whl"
    package.write_bytes(package.read_bytes()[:200])
    with pytest.raises(SourceError, match=r"tiny-wheel==1.0 is not the file .* cut short.*; nothing was kept\."):
        prepare()
    assert world.visible() == []


def test_no_network(world, monkeypatch):
    world.add_wheel()
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(SourceError, match="could not find tiny-wheel==1.0: check the network"):
        prepare()
    assert world.visible() == []


def test_an_interrupt_ends_pip(tmp_path, monkeypatch):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(download.subprocess, "Popen", Recorded)
    monkeypatch.setattr(download, "_largest_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download._run([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), tmp_path, 1)
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("printed", "sentence"),
    [
        ("/usr/bin/python: No module named pip", "This Python has no pip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "No space is left"),
        ("error: subprocess-exited-with-error", "the build step inside the package failed"),
        ("WARNING: a\nERROR: something else\n", "pip could not fetch tiny-wheel==1.0: ERROR: something else"),
        ("", "pip could not fetch tiny-wheel==1.0: no message"),
    ],
)
def test_one_sentence_for_what_pip_printed(world, printed, sentence):
    world.add_wheel()
    message = download._explain(load_sources()["tiny"], printed)
    assert sentence in message and "\n" not in message


def test_progress_follows_the_largest_file(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "large").write_bytes(b"x" * 100)
    (tmp_path / "small").write_bytes(b"x" * 3)
    assert download._largest_file(tmp_path) == 100
