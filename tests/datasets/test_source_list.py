"""The list of sources: what is refused, and what is said."""

import re

import pytest

from effnlp_lessons import paths
from effnlp_lessons.datasets.sources import SourceError, load_sources, path, prepare


def test_unknown_names(copied):
    copied.add_wheel()
    for call in (lambda: prepare("huge"), lambda: prepare(["tiny", "huge"]), lambda: path("huge", "a")):
        with pytest.raises(SourceError, match="There is no source 'huge': known are tiny."):
            call()
    with pytest.raises(SourceError, match="'tiny' has no file 'weights.pickle': it has weights.bin."):
        path("tiny", "weights.pickle")
    with pytest.raises(SourceError, match="'tiny' are not prepared: run `python -m effnlp_lessons prepare`."):
        path("tiny", "weights.bin")


MALFORMED = {
    "no field": (lambda entry: entry.pop("citation"), "no citation"),
    "unknown field": (lambda entry: entry.update(url="x"), "unknown field 'url'"),
    "kind": (lambda entry: entry.update(kind="egg"), "kind 'egg', which must be one of wheel, sdist"),
    "hash": (lambda entry: entry.update(sha256="abc"), "sha256 'abc', which must be 64 digits"),
    "bytes": (lambda entry: entry.update(bytes="10"), "bytes '10', which must be a whole number"),
    "version range": (lambda entry: entry.update(version=">=1.0"), "odd version: '>=1.0'"),
    "option in package": (lambda entry: entry.update(package="--index-url"), "odd package: '--index-url'"),
    "two words": (lambda entry: entry.update(package="a b"), "odd package"),
    "empty text": (lambda entry: entry.update(title=" "), "title ' ', which must be a text"),
    "no files": (lambda entry: entry.update(files=[]), "at least one file"),
    "build": (lambda entry: entry.update(build=["setuptools>=3"]), "has build"),
    "member upwards": (
        lambda entry: entry["files"][0].update(member="a/../../b"),
        "member 'a/../../b', which must be",
    ),
    "member absolute": (lambda entry: entry["files"][0].update(member="/etc/passwd"), "member '/etc/passwd'"),
    "archive upwards": (
        lambda entry: entry["files"][0].update(archive="../b"),
        "archive '../b', which must be",
    ),
    "name upwards": (
        lambda entry: entry["files"][0].update(name="../b"),
        "name '../b', which must be a plain file",
    ),
    "name hidden": (lambda entry: entry["files"][0].update(name=".staging-x"), "must be a plain file name"),
    "name reserved": (
        lambda entry: entry["files"][0].update(name="Manifest.json"),
        "must be a plain file name",
    ),
    "name twice": (lambda entry: entry["files"].append(entry["files"][0]), "two files the same name"),
    "file without hash": (lambda entry: entry["files"][0].pop("sha256"), "file 1 has no sha256"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_list(world, case, no_download):
    world.add_wheel()
    load_sources()
    change, message = MALFORMED[case]
    change(world.entries["tiny"])
    world.write()
    no_download()
    with pytest.raises(SourceError, match=re.escape(message)) as error:
        prepare()
    assert str(error.value).startswith("sources.toml is malformed: [tiny]")
    assert not world.prepared.exists()


def test_list_that_is_not_toml_or_not_there(world, tmp_path):
    (world.data / "sources.toml").write_text("[tiny\n")
    with pytest.raises(SourceError, match="sources.toml is malformed: .*line 1"):
        prepare()
    (world.data / "sources.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="sources.toml is malformed"):
        prepare()
    (world.data / "sources.toml").write_text("tiny = 3\n")
    with pytest.raises(SourceError, match=r"\[tiny\] must be a table"):
        prepare()
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        load_sources(tmp_path / "none.toml")


def test_a_data_folder_without_a_list_uses_the_one_of_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFNLP_DATA", str(tmp_path / "elsewhere"))
    assert set(load_sources()) == {
        "minilm", "minilm_l3", "minilm_int8", "movie_reviews", "general_text", "mnist5k", "shakespeare",
        "django",
    }  # fmt: skip
    assert paths.prepared_dir() == tmp_path / "elsewhere" / "prepared"
