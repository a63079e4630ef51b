"""The report on a machine: what it finds, and that each failing row says what mends it."""

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import pytest

from effnlp_lessons import environment
from effnlp_lessons.datasets import sources
from effnlp_lessons.environment import Finding
from effnlp_lessons.paths import ROOT

ROWS = ["Python", "torch", "transformers", "triton", "ipywidgets", "data", "teacher", "disk"]


def row(what: str) -> Finding:
    (found,) = [finding for finding in environment.report() if finding.what == what]
    return found


@pytest.fixture
def packages(monkeypatch):
    """The installed packages as a dict to change: name -> version, absent if not installed."""
    real = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "ipywidgets")}
    versions = {**real, "triton": "3.7.1"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(environment.importlib.metadata, "version", version)
    return versions


def test_the_rows_are_always_the_same():
    assert [finding.what for finding in environment.report()] == ROWS


def test_this_machine_has_the_packages():
    assert [what for what in ROWS[:5] if not row(what).ok] == []


@pytest.mark.parametrize("package", ["torch", "transformers", "triton", "ipywidgets"])
def test_a_missing_package_is_told_with_its_command(packages, package, monkeypatch):
    monkeypatch.setattr(environment.sys, "platform", "linux")
    del packages[package]
    finding = row(package)
    assert not finding.ok and "not installed" in finding.found
    assert "-m pip install -c constraints.txt -e ." in finding.mend


@pytest.mark.parametrize("version, ok", [("2.8.1", False), ("2.9", True), ("2.13.0+cpu", True), ("10.0", True)])
def test_versions_are_compared_as_numbers(packages, version, ok):
    packages["torch"] = version
    assert row("torch").ok is ok
    assert version in row("torch").found


def test_triton_is_no_loss_where_it_cannot_be(packages, monkeypatch):
    del packages["triton"]
    assert "everything but the Triton cells" in row("triton").found
    monkeypatch.setattr(environment.sys, "platform", "darwin")
    assert row("triton").ok and "everything but the Triton cells" in row("triton").found


def test_torch_is_asked_only_when_it_is_there_already():
    code = "import sys; from effnlp_lessons import environment as e; e.report(); print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout == "False\n"


@pytest.mark.parametrize("gpu", [False, True])
def test_threads_and_device_of_an_imported_torch(monkeypatch, gpu):
    cuda = SimpleNamespace(is_available=lambda: gpu, get_device_name=lambda: "Test GPU")
    torch = SimpleNamespace(get_num_threads=lambda: 3, cuda=cuda)
    monkeypatch.setitem(environment.sys.modules, "torch", torch)
    assert environment.torch_note() == f", 3 threads, {'CUDA (Test GPU)' if gpu else 'CPU'}"


def test_data_that_are_not_prepared_are_named(tmp_path, monkeypatch):
    (tmp_path / "sources.toml").write_text((ROOT / "data" / "sources.toml").read_text(encoding="utf-8"))
    monkeypatch.setenv("EFFNLP_DATA", str(tmp_path))
    finding = row("data")
    assert not finding.ok and finding.mend.endswith("-m effnlp_lessons prepare")
    assert all(name in finding.found for name in sources.load_sources())


def test_prepared_data_are_counted(monkeypatch):
    monkeypatch.setattr(environment, "is_prepared", lambda source: source != "shakespeare")
    assert row("data").found == "not prepared: shakespeare"
    monkeypatch.setattr(environment, "is_prepared", lambda source: True)
    assert row("data").ok


def test_the_teachers_checkpoint_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFNLP_DATA", str(tmp_path))
    assert not row("teacher").ok and row("teacher").mend.startswith("git checkout")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "teacher.safetensors").write_bytes(b"x" * 2_500_000)
    assert row("teacher").ok and "2.5 MB" in row("teacher").found


@pytest.mark.parametrize("free, ok", [(900_000_000, False), (5_000_000_000, True)])
def test_the_disk_has_room_or_not(monkeypatch, free, ok):
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert row("disk").ok is ok
    assert bool(row("disk").mend) is not ok
    assert f"{free / 1e9:.1f} GB free" in row("disk").found


def test_a_finding_that_fails_names_a_command_and_no_other_does(packages, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFNLP_DATA", str(tmp_path))
    packages.clear()
    findings = environment.report()
    assert sum(not finding.ok for finding in findings) >= 5
    assert [finding for finding in findings if finding.ok == bool(finding.mend)] == []


def test_the_table_shows_what_mends_under_what_fails():
    findings = [
        Finding("torch", "2.13.0", True, ""),
        Finding("data", "not prepared: minilm", False, "do this"),
    ]
    assert environment.as_table(findings).splitlines() == [
        "ok    torch  2.13.0",
        "MEND  data   not prepared: minilm",
        "             run: do this",
    ]


def test_commands_are_typed_as_in_the_checkout(monkeypatch):
    monkeypatch.setattr(environment.sys, "prefix", str(ROOT / ".venv"))
    assert environment.python_command() in (".venv/bin/python", ".venv\\Scripts\\python.exe")
    monkeypatch.setattr(environment.sys, "prefix", "/opt/conda")
    assert environment.python_command() == "python"
