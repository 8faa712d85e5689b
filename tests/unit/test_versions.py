"""The releases that are required, those that the tests run with, and those that come next."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "pyproject.toml").read_text("utf-8")
PROJECT = tomllib.loads(TEXT)["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = {
    requirement.name.lower(): requirement
    for line in [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    if (requirement := Requirement(line))
}


def pins(name: str) -> dict[str, Version]:
    """Package -> version, of a file of constraints."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {package.lower(): Version(version) for package, version in pairs}


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-next.txt"])
def test_pinned_releases_are_allowed(file: str) -> None:
    pinned = pins(file)
    assert pinned
    refused = [
        f"{name} {version}"
        for name, version in pinned.items()
        if name in REQUIRED
        if not REQUIRED[name].specifier.contains(version, prereleases=True)
    ]
    assert not refused


def test_next_releases_are_newer() -> None:
    now = pins("constraints.txt")
    old = [name for name, version in pins("constraints-next.txt").items() if version <= now[name]]
    assert not old


def test_transformers_is_bounded_where_modelopt_bounds_it() -> None:
    """Ours is the bound of the newest ModelOpt that is allowed; an older one's is below it."""
    (theirs,) = (
        requirement
        for line in importlib.metadata.requires("nvidia-modelopt") or []
        if (requirement := Requirement(line)).name == "transformers"
    )
    bounds = [upper_bound(requirement) for requirement in (theirs, REQUIRED["transformers"])]
    installed = Version(importlib.metadata.version("nvidia-modelopt"))
    if installed >= pins("constraints-next.txt")["nvidia-modelopt"]:
        assert bounds[0] == bounds[1]
    else:
        assert bounds[0] < bounds[1]


def test_page_of_versions_has_the_pins() -> None:
    now, later = pins("constraints.txt"), pins("constraints-next.txt")
    rows = re.findall(
        r"^\| ([\w-]+)[^|]*\| [^|]+ \| ([\w.]+) \| ([\w.]+) \|$",
        (ROOT / "docs" / "versions.md").read_text("utf-8"),
        re.MULTILINE,
    )
    assert {name for name, _, _ in rows} >= {*later, "torch", "ray"}
    for name, with_now, with_later in rows:
        assert Version(with_now) == now[name]
        assert Version(with_later) == (now | later)[name]


def upper_bound(requirement: Requirement) -> Version:
    """The first release that is too new."""
    (bound,) = (s.version for s in requirement.specifier if s.operator == "<")
    return Version(bound)


def test_every_upper_bound_says_why() -> None:
    bare = [
        line
        for line in TEXT.splitlines()
        if re.match(r' +"[\w\[\],-]+[<>=.\d,]*<', line) and not re.search(r"# .{12}", line)
    ]
    assert not bare
    assert "2.61 changes" not in TEXT
