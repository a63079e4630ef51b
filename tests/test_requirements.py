"""pyproject.toml, constraints.txt and environment.yml say the same, and the machine has what they say."""

import importlib.metadata
import os
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from effnlp_lessons import __version__, installer
from effnlp_lessons.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements() -> dict[str, Requirement]:
    """Every direct dependency of an install, by name: the course's own and those of the installed extras."""
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [line for extra in installer.EXTRAS.split(",") for line in extras[extra]]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def exact(constraint: Requirement) -> str:
    (specifier,) = constraint.specifier
    assert specifier.operator == "=="
    return specifier.version


def test_every_direct_dependency_has_a_tested_version():
    assert sorted(constraints()) == sorted(requirements())


def test_every_tested_version_is_in_the_range():
    for name, constraint in constraints().items():
        assert requirements()[name].specifier.contains(exact(constraint)), name


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="only CI promises the tested versions")
def test_the_tested_versions_are_installed():
    wanted = [name for name, needed in requirements().items() if not needed.marker or needed.marker.evaluate()]
    installed = {name: Version(importlib.metadata.version(name)).public for name in wanted}
    assert installed == {name: exact(constraints()[name]) for name in wanted}


def test_triton_is_asked_for_on_linux_only():
    marker = requirements()["triton"].marker
    assert marker.evaluate({"sys_platform": "linux"})
    assert not marker.evaluate({"sys_platform": "darwin"})
    assert not marker.evaluate({"sys_platform": "win32"})
    others = [name for name, requirement in requirements().items() if requirement.marker and name != "triton"]
    assert others == []


def test_conda_installs_what_pip_does():
    (pip,) = [entry["pip"] for entry in conda_environment()["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-c constraints.txt", f"-e .[{installer.EXTRAS}]"]


def test_conda_adds_no_versions_but_that_of_python():
    plain = [entry for entry in conda_environment()["dependencies"] if isinstance(entry, str)]
    assert [re.split("[=<>]", entry)[0] for entry in plain if re.search("[=<>]", entry)] == ["python"]
    (python,) = [entry.removeprefix("python=") for entry in plain if entry.startswith("python=")]
    assert tuple(map(int, python.split("."))) >= installer.OLDEST_PYTHON


def conda_environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def test_the_installed_course_is_this_checkout():
    assert importlib.metadata.version("effnlp-lessons") == __version__
