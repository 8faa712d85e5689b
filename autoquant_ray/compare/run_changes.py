"""What two runs were made from, and in what that differs: model, data, formats, config, versions.

Everything is read from ``run.json``; what stands there is a fingerprint, so a change is seen but
not shown. Two names of what has one fingerprint, such as a relative and an absolute path, are no
change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from autoquant_ray.config.stage_fields import ADDED_FIELDS, STAGE_FIELDS
from autoquant_ray.formats.method_names import roundings
from autoquant_ray.runs.record import RunRecord

Kind = Literal["model", "data", "formats", "config", "versions"]
_SHOWN_ELSEWHERE = {"model", "data", "formats"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One difference in what two runs were made from.

    Attributes:
        kind: Which part.
        name: What of it, such as a field of the config or a package.
        before: Its value in the first run, for people.
        after: Its value in the second run.
    """

    kind: Kind
    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name} {self.before} -> {self.after}"


def find_changes(before: RunRecord, after: RunRecord) -> list[Change]:
    """Compare the records of two runs; an imported run has a name and no fingerprints."""
    rows = [*_identities(before, after), *_menus(before, after), *_configs(before, after)]
    versions = before.versions or {}, after.versions or {}
    rows += [("versions", name, *_both(name, *versions)) for name in versions[0] | versions[1]]
    return [
        Change(kind=kind, name=name, before=_shown(old), after=_shown(new))
        for kind, name, old, new in rows
        if old != new
    ]


def changed_weights(before: RunRecord, after: RunRecord) -> list[str] | None:
    """Groups whose weights differ, in the model's order; None where a run has no hashes."""
    old, new = before.weights, after.weights
    if not old or not new:
        return None
    return [name for name in new if name in old and old[name] != new[name]]


def same_tokens(before: RunRecord, after: RunRecord) -> bool:
    """Whether both runs scored the very same samples."""
    hashes = [run.dataset.get("tokens_sha256") for run in (before, after)]
    return hashes[0] is not None and hashes[0] == hashes[1]


Row = tuple[Kind, str, Any, Any]


def is_same_place(before: Any, after: Any) -> bool:
    """Whether two values of a config's ``model`` or ``data`` name the same files of this machine.

    Args:
        before: A path or another name, or several by their domains.
        after: The other.
    """
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = before.keys() | after.keys()
        return all(is_same_place(before.get(name), after.get(name)) for name in names)
    if not (isinstance(before, str) and isinstance(after, str)):
        return bool(before == after)
    paths = [Path(name).expanduser() for name in (before, after)]
    return before == after or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))


def _identities(before: RunRecord, after: RunRecord) -> Iterator[Row]:
    if not _has_same("fingerprint", before.model, after.model):
        yield "model", "name", *_both("name", before.model, after.model)
        yield "model", "fingerprint of the files", *_both("fingerprint", before.model, after.model)
    if not _has_same("source_fingerprint", before.dataset, after.dataset):
        yield "data", "name", *_both("name", before.dataset, after.dataset)
    sources = (
        ("fingerprint of the source", "source_fingerprint"),
        ("hash of the tokens", "tokens_sha256"),
        ("samples", "num_samples"),
        ("tokens", "num_tokens"),
    )
    for name, key in sources:
        yield "data", name, *_both(key, before.dataset, after.dataset)


def _has_same(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether both sides have a value, and it is the same."""
    old, new = _both(key, before, after)
    return old is not None and bool(old == new)


def _menus(before: RunRecord, after: RunRecord) -> Iterator[Row]:
    plans = (run.plan for run in (before, after))
    old, new = ([entry["name"] for entry in plan["formats"]] for plan in plans if plan is not None)
    yield "formats", "menu", old, new
    yield from _methods(before, after)


def _methods(before: RunRecord, after: RunRecord) -> Iterator[Row]:
    """Formats of one name that are rounded by another method since."""
    old, new = (roundings(run.plan["formats"] if run.plan else []) for run in (before, after))
    for name in new:
        if name in old:
            yield "formats", f"rounding of {name}", old[name].method, new[name].method


def _configs(before: RunRecord, after: RunRecord) -> Iterator[Row]:
    if before.config is None or after.config is None:
        return
    configs = (ADDED_FIELDS | before.config, ADDED_FIELDS | after.config)
    for fields in STAGE_FIELDS.values():
        for name in fields:
            if name not in _SHOWN_ELSEWHERE:
                yield "config", name, *_both(name, *configs)


def _both(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Any, Any]:
    return before.get(key), after.get(key)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    text = "none" if value is None else str(value)
    return f"{text[:12]}..." if len(text) in (32, 64) and text.isalnum() else text
