"""``run.json``: the resolved config, versions, fingerprints and stage states of one run.

A stage is skipped when it is done with the fingerprint that it would have now. A run is resumed
only with a config that gives the same numbers; everything else is refused with the field's name.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.stage_fields import changed_fields
from autoquant_ray.errors import ChangedError, Interrupted, StoreError
from autoquant_ray.runs.directory import SCHEMA_VERSION, RunDirectory
from autoquant_ray.runs.lease import Lease
from autoquant_ray.runs.names import (
    CALIBRATION_FILE,
    FRONTIER_FILE,
    MANIFEST_JSON,
    MANIFEST_TABLE,
    PLAN_FILE,
    RUN_FILE,
    SCORES,
    SEARCH,
    SEARCH_FILE,
    SENSITIVITY_FILE,
)

Mode = Literal["new", "resume", "overwrite"]
_REQUIRED_KEYS = {"run_id", "config", "model", "dataset", "fingerprints", "stages", "quarantined"}
_OUTPUTS = {
    "plan": PLAN_FILE,
    "calibrate": CALIBRATION_FILE,
    "search": SEARCH_FILE,
    "aggregate": SENSITIVITY_FILE,
}
_NUMERIC_PACKAGES = ("autoquant-ray", "torch", "transformers", "nvidia-modelopt", "numpy")
_PACKAGES = ("autoquant-ray", "ray", "torch", "transformers", "nvidia-modelopt", "numpy", "scipy")


class RunState:
    """A run directory together with its ``run.json``.

    Args:
        directory: Where the run lives.
        values: Content of ``run.json``.
        lease: Held by whoever writes; None for readers.
    """

    def __init__(
        self, directory: RunDirectory, values: dict[str, Any], lease: Lease | None = None
    ) -> None:
        self.directory = directory
        self.values = values
        self._lease = lease
        self._replaces_a_run = False

    @classmethod
    def open(cls, directory: RunDirectory, lease: Lease | None = None) -> RunState:
        """Open an existing run.

        Raises:
            StoreError: Not a run, damaged, or written by a later version.
        """
        directory.require_run()
        values = directory.read_json(RUN_FILE)
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{directory.uri} has schema version {version}, this program reads {SCHEMA_VERSION}"
            )
        missing = sorted(_REQUIRED_KEYS - set(values))
        if missing:
            raise StoreError(f"{directory.path(RUN_FILE)} is damaged: it lacks {missing}")
        return cls(directory, values, lease)

    @classmethod
    def start(
        cls,
        directory: RunDirectory,
        config: ScanConfig,
        mode: Mode,
        identity: dict[str, Any],
        lease: Lease | None = None,
    ) -> RunState:
        """Prepare a new run, or go on with one. Nothing is written or deleted before
        :meth:`begin`, so that an error in between loses nothing.

        Args:
            directory: Where the run lives.
            config: Resolved config.
            mode: What to do with an existing run.
            identity: ``model``, ``dataset`` and ``fingerprints`` entries of ``run.json``, and
                ``run_id`` where it is given.
            lease: Of the directory, held while the run is written.

        Raises:
            StoreError: The run exists and neither resume nor overwrite was asked for, or it was
                made with another config, model or data.
        """
        require_target(directory, mode)
        if mode == "resume" and directory.exists():
            state = cls.open(directory, lease)
            state._require_same(config, identity)
            return state
        values = new_run_values(directory.uri) | {"config": config.model_dump(mode="json")}
        state = cls(directory, values | identity, lease)
        state._replaces_a_run = directory.exists()
        return state

    def begin(self) -> None:
        """Delete the run that this one replaces, if any, and write ``run.json``."""
        if self._replaces_a_run:
            self.directory.clear()
            self._replaces_a_run = False
        self.save()

    def require_lease(self) -> None:
        """Check that no other process may have taken the run over.

        Raises:
            HeldError: One may have.
        """
        if self._lease is not None:
            self._lease.require()

    def save(self) -> None:
        """Write ``run.json``."""
        self.directory.write_json(RUN_FILE, self.values)

    def is_done(self, stage: str, fingerprint: str) -> bool:
        """Whether a stage is finished with this fingerprint and its file is still there."""
        entry = self.values["stages"].get(stage, {})
        finished = entry.get("state") == "done" and entry.get("fingerprint") == fingerprint
        output = _OUTPUTS.get(stage)
        return bool(finished and (output is None or self.directory.exists(output)))

    def reopen(self, *stages: str) -> None:
        """Forget that stages are done, and delete scores that no longer hold."""
        for stage in stages:
            self.values["stages"].pop(stage, None)
        for name in (SENSITIVITY_FILE, FRONTIER_FILE, MANIFEST_JSON, MANIFEST_TABLE):
            self.directory.delete(name)

    @property
    def num_shards(self) -> int:
        """Number of shards of the run's data, quarantined ones included."""
        return int(self.values["dataset"]["num_shards"])

    @property
    def left_out(self) -> set[int]:
        """Quarantined shards."""
        return {entry["shard"] for entry in self.values["quarantined"]}

    @property
    def used_shards(self) -> list[int]:
        """Shards that the result is made of: not left out, nor after the scan was stable."""
        left_out = self.left_out
        shards = [shard for shard in range(self.num_shards) if shard not in left_out]
        stopping = self.values.get("stopping")
        return shards if stopping is None else shards[: stopping["shards_used"]]

    @contextmanager
    def stage(self, name: str, fingerprint: str) -> Iterator[dict[str, Any]]:
        """Run a stage: notes its start, its end, its seconds, and what the body puts in.

        Yields:
            The stage's entry of ``run.json``; the body may add facts to it.
        """
        start = time.perf_counter()
        entry: dict[str, Any] = {"state": "running", "fingerprint": fingerprint}
        self.values["stages"][name] = entry
        self.save()
        self.directory.append_event("stage_started", stage=name)
        try:
            yield entry
        except BaseException as error:
            with suppress(StoreError):  # the store may be what failed
                self.directory.append_event("stage_stopped", stage=name, error=type(error).__name__)
                if isinstance(error, Interrupted):
                    entry["state"] = "stopped"
                    self.save()
            raise
        entry["state"] = "done"
        entry["seconds"] = round(time.perf_counter() - start, 3)
        self.save()
        self.directory.append_event("stage_done", stage=name, seconds=entry["seconds"])

    def quarantine(self, shard: int, stage: str, reason: str) -> None:
        """Note a shard that is left out of the result."""
        entry = {"shard": shard, "stage": stage, "reason": reason}
        self.values["quarantined"].append(entry)
        self.save()

    def release_quarantine(self) -> None:
        """Let a resumed run try quarantined shards again.

        Once calibration (or AWQ's search) is finished, shards that it left out stay out: letting
        them in would change the maxima (or scales) under which the other shards were scored.
        """
        stages, parts_of = self.values["stages"], self.directory.list_parts
        done = {s for s in ("calibrate", "search") if stages.get(s, {}).get("state") == "done"}
        if self.values["quarantined"]:  # where a merged file was lost, parts tell what was finished
            done |= {"calibrate", "search"} if parts_of(SCORES) else set()
            done |= {"calibrate"} if parts_of(SEARCH) else set()
        kept = [entry for entry in self.values["quarantined"] if entry["stage"] in done]
        if len(kept) < len(self.values["quarantined"]):
            self.values["quarantined"] = kept
            self.reopen("score", "aggregate")

    def _require_same(self, config: ScanConfig, identity: dict[str, Any]) -> None:
        if self.values["config"] is None:
            raise StoreError(f"{self.directory.uri} was imported and cannot be resumed")
        changes = changed_fields(self.values["config"], config)
        if changes:
            raise ChangedError(
                f"{self.directory.uri} was made with another config ({changes[0]}); use the same "
                "values, 'solve' for a new budget, or --overwrite"
            )
        self._require_same_versions()
        for kind, value in identity["fingerprints"].items():
            if self.values["fingerprints"].get(kind) != value:
                raise ChangedError(
                    f"the {kind} changed since {self.directory.uri} was started; give another "
                    "--out or --overwrite"
                )

    def _require_same_versions(self) -> None:
        """Parts of two versions must not be mixed; a finished run is only read."""
        is_done = self.values["stages"].get("aggregate", {}).get("state") == "done"
        if is_done and not self.values["quarantined"]:
            return
        for name, now in _versions().items():
            before = self.values["versions"].get(name)
            if name in _NUMERIC_PACKAGES and before != now:
                raise ChangedError(
                    f"{self.directory.uri} was started with {name} {before}, this is {now}; go on "
                    "with the same version, or --overwrite"
                )


def require_target(directory: RunDirectory, mode: Mode) -> None:
    """Check that a run may be written to a directory.

    Raises:
        StoreError: It holds something else, or a run and neither resume nor overwrite was asked
            for; or its bucket is not there.
    """
    directory.require_bucket()
    if directory.exists():
        directory.require_run()
        if mode == "new":
            raise StoreError(f"{directory.uri} holds a run; give --resume or --overwrite")


def new_run_values(uri: str) -> dict[str, Any]:
    """What every ``run.json`` starts with."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": _run_id(uri),
        "created": _utc_now(),
        "versions": _versions(),
        "stages": {},
        "quarantined": [],
    }


def _run_id(uri: str) -> str:
    name = uri.partition("?")[0].rstrip("/").rpartition("/")[2] or "run"
    return f"{name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"


def numeric_versions() -> dict[str, str]:
    """Versions, now, of the packages that numbers depend on."""
    return {name: version for name, version in _versions().items() if name in _NUMERIC_PACKAGES}


def _utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}
