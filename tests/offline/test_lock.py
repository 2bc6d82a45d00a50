"""The lock is within pyproject's ranges and whole, and a release that is not is told."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.offline.lock import LOCK, PYTHONS, closure, project_requirements, read_lock

PINS = read_lock()


def test_every_dependency_of_the_project_is_pinned_within_its_range() -> None:
    requirements = project_requirements()
    assert {"torch", "deepspeed", "torch-fidelity"} <= {requirement.name for requirement in requirements}
    assert len(requirements) == 22
    for requirement in requirements:
        version = PINS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: the lock has {version}"


@pytest.mark.parametrize("python", PYTHONS)
def test_what_the_pinned_releases_need_is_pinned_too(python: str) -> None:
    """By what the installed ones say of themselves; where another release is installed, its word does not count."""
    installed = {name for name, version in PINS.items() if _version(name) == version}
    if not {"torch", "deepspeed", "timm"} <= installed:
        pytest.skip("another environment than the lock's")
    for name, requirements in closure(python).items():
        assert name in PINS, f"{name} is needed for Python {python}: python -m tests.offline.lock --write"
        for requirement in requirements:
            assert requirement.specifier.contains(PINS[name], prereleases=True), (
                f"{requirement}: {PINS[name]} is locked"
            )


def test_nothing_else_is_in_the_lock() -> None:
    if any(_version(name) != version for name, version in PINS.items()):
        pytest.skip("another environment than the lock's")
    assert set(PINS) == {name for python in PYTHONS for name in closure(python)}


def test_the_lock_names_no_place() -> None:
    text = LOCK.read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*-", text, re.MULTILINE)  # no option such as --index-url
    assert list(PINS) == sorted(PINS)


def test_a_line_that_is_no_pin_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text("numpy>=2\n")
    with pytest.raises(ValueError, match="'numpy>=2' is no NAME==VERSION"):
        read_lock(tmp_path / "lock.txt")


def _version(name: str) -> str:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return ""
