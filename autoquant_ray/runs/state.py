"""``run.json``: the resolved config, versions, fingerprints and stage states of one run.

A stage is skipped when it is done with the fingerprint that it would have now. A run is resumed
only with a config that gives the same numbers; everything else is refused with the field's name.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

from autoquant_ray.config.files import validate
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.stage_fields import changed_fields
from autoquant_ray.errors import ChangedError, ConfigError, Interrupted, StoreError, one_line
from autoquant_ray.formats.gguf_types import DISTRIBUTION, gguf_type_of
from autoquant_ray.runs.directory import SCHEMA_VERSION, RunDirectory
from autoquant_ray.runs.lease import Lease
from autoquant_ray.runs.names import (
    CALIBRATION_FILE,
    DOMAIN_RESAMPLING_FILE,
    DOMAIN_SCORES_FILE,
    DOMAINS_FILE,
    FRONTIER_FILE,
    MANIFEST_JSON,
    MANIFEST_TABLE,
    PLAN_FILE,
    RESAMPLING_FILE,
    ROUNDING,
    ROUNDING_FILE,
    RUN_FILE,
    SAMPLES,
    SCORES,
    SEARCH,
    SEARCH_FILE,
    SENSITIVITY_FILE,
    last_part,
    remedy_of,
)
from autoquant_ray.runs.part_marks import STAGE_OF
from autoquant_ray.runs.record import PlanSummary, RunRecord, StageEntry
from autoquant_ray.wording import shown

Mode = Literal["new", "resume", "overwrite"]
_OUTPUTS = {
    "plan": (PLAN_FILE,),
    "calibrate": (CALIBRATION_FILE,),
    "search": (SEARCH_FILE,),
    "fit": (ROUNDING_FILE,),
    "aggregate": (SENSITIVITY_FILE, RESAMPLING_FILE),
}
_OF_DOMAINS = {"aggregate": (DOMAIN_SCORES_FILE, DOMAIN_RESAMPLING_FILE)}
"""Of a run with several domains too."""
_MANY_SHARDS = 10_000
"""Beyond so many shards their number is checked against the files before anything is counted."""
DROPPED = "dropped"
"""State of a stage whose files were deleted on purpose."""

_NUMERIC_PACKAGES = ("autoquant-ray", "torch", "transformers", "nvidia-modelopt", "numpy")
_PACKAGES = ("autoquant-ray", "ray", "torch", "transformers", "nvidia-modelopt", "numpy", "scipy")


class RunState:
    """A run directory together with its ``run.json``.

    Args:
        directory: Where the run lives.
        record: Content of ``run.json``.
        lease: Held by whoever writes; None for readers.
    """

    def __init__(
        self, directory: RunDirectory, record: RunRecord, lease: Lease | None = None
    ) -> None:
        self.directory = directory
        self.record = record
        self._lease = lease
        self._replaces_a_run = False
        for folder, stage in STAGE_OF.items():
            entry = record.stages.get(stage)
            if entry is not None and "fingerprint" in entry:
                directory.marks[folder] = entry["fingerprint"]

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
        record = RunRecord.from_json(values, directory.path(RUN_FILE))
        if record.config is not None:
            _require_config(record.config, directory.path(RUN_FILE))
        _require_shards(record, directory)
        return cls(directory, record, lease)

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
        record = new_record(directory, {"config": config.model_dump(mode="json")} | identity)
        state = cls(directory, record, lease)
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
        self.directory.write_json(RUN_FILE, self.record.to_json())

    @property
    def plan(self) -> PlanSummary:
        """The plan's summary.

        Raises:
            StoreError: The scan has not come that far.
        """
        if self.record.plan is None:
            raise StoreError(f"{self.directory.uri} has no plan yet; finish the scan with `resume`")
        return self.record.plan

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config of the scan.

        Raises:
            StoreError: The run was imported.
        """
        if self.record.config is None:
            raise StoreError(f"{self.directory.uri} was imported: it has no config of a scan")
        return self.record.config

    def is_done(self, stage: str, fingerprint: str) -> bool:
        """Whether a stage is finished with this fingerprint and its files are there and whole."""
        entry = self.record.stages.get(stage)
        if entry is None or (entry["state"], entry.get("fingerprint")) != ("done", fingerprint):
            return False
        outputs = _OUTPUTS.get(stage, ())
        if self.directory.exists(DOMAINS_FILE):
            outputs += _OF_DOMAINS.get(stage, ())
        return all(map(self.directory.is_intact, outputs))

    @property
    def has_dropped_rounding(self) -> bool:
        """Whether what was fitted to weights was deleted on purpose."""
        entry = self.record.stages.get("fit")
        return entry is not None and entry["state"] == DROPPED

    def reopen(self, *stages: str) -> None:
        """Forget that stages are done, and delete scores that no longer hold."""
        for stage in stages:
            self.record.stages.pop(stage, None)
        for name in (SENSITIVITY_FILE, FRONTIER_FILE, MANIFEST_JSON, MANIFEST_TABLE):
            self.directory.delete(name)

    @property
    def num_shards(self) -> int:
        """Number of shards of the run's data, quarantined ones included."""
        return int(self.record.dataset["num_shards"])

    @property
    def left_out(self) -> set[int]:
        """Quarantined shards."""
        return {entry["shard"] for entry in self.record.quarantined}

    @property
    def used_shards(self) -> list[int]:
        """Shards that the result is made of: not left out, nor after the scan was stable."""
        left_out = self.left_out
        shards = [shard for shard in range(self.num_shards) if shard not in left_out]
        stopping = self.record.stopping
        return shards if stopping is None else shards[: stopping["shards_used"]]

    @contextmanager
    def stage(self, name: str, fingerprint: str) -> Iterator[None]:
        """Run a stage: notes its start, its end and its seconds."""
        start = time.perf_counter()
        entry: StageEntry = {"state": "running", "fingerprint": fingerprint}
        self.record.stages[name] = entry
        marks = {folder: fingerprint for folder, stage in STAGE_OF.items() if stage == name}
        self.directory.marks.update(marks)
        self.save()
        self.directory.append_event("stage_started", stage=name)
        try:
            yield
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
        self.record.quarantined.append({"shard": shard, "stage": stage, "reason": reason})
        self.save()

    def release_quarantine(self) -> None:
        """Let a resumed run try quarantined shards again.

        Once calibration (or AWQ's search) is finished, shards that it left out stay out: letting
        them in would change the maxima (or scales) under which the other shards were scored.
        """
        parts_of = self.directory.list_parts
        done = {stage for stage in ("calibrate", "search") if self.record.is_done(stage)}
        if self.record.quarantined:  # where a merged file was lost, parts tell what was finished
            done |= {"calibrate", "search"} if parts_of(SCORES) else set()
            done |= {"calibrate", "search"} if parts_of(ROUNDING) else set()
            done |= {"calibrate"} if parts_of(SEARCH) else set()
        kept = [entry for entry in self.record.quarantined if entry["stage"] in done]
        if len(kept) < len(self.record.quarantined):
            self.record.quarantined = kept
            self.reopen("score", "aggregate")

    def _require_same(self, config: ScanConfig, identity: dict[str, Any]) -> None:
        if self.record.config is None:
            raise StoreError(f"{self.directory.uri} was imported and cannot be resumed")
        menu = None if self.record.plan is None else self.record.plan["formats"]
        changes = changed_fields(self.record.config, config, menu)
        if changes:
            raise ChangedError(
                f"{self.directory.uri} was made with another config ({changes[0]}); use the same "
                "values, 'solve' for a new budget, or `overwrite`"
            )
        refits = self.has_dropped_rounding and config.keep_rounded
        if refits or not self.record.is_done("aggregate") or self.record.quarantined:
            self._require_same_versions()
        for kind, value in identity["fingerprints"].items():
            if self.record.fingerprints.get(kind) != value:
                raise ChangedError(
                    f"the {kind} changed since {self.directory.uri} was started; give another "
                    "`out` or `overwrite`"
                )

    def _require_same_versions(self) -> None:
        """Parts of two versions must not be mixed; a finished run is only read."""
        menu = () if self.record.plan is None else self.record.plan["formats"]
        for name, now in numeric_versions(menu).items():
            before = (self.record.versions or {}).get(name)
            if before != now:
                raise ChangedError(
                    f"{self.directory.uri} was started with {name} {before}, this is {now}; go on "
                    "with the same version, or `overwrite`"
                )


def _require_config(config: dict[str, Any], path: str) -> None:
    """Check the values of a scan's config; fields that a version lacks or has more are its own.

    Raises:
        StoreError: A value is none that its field can have.
    """
    values = {key: value for key, value in config.items() if key in ScanConfig.model_fields}
    try:
        validate(ScanConfig, values)
    except ConfigError as error:
        reason = one_line(error, limit=200).removeprefix("--")
        raise StoreError(f"{path} is damaged: `config`: {reason}; {remedy_of(RUN_FILE)}") from None


def _require_shards(record: RunRecord, directory: RunDirectory) -> None:
    """Check that there are files of about as many shards as a run says that it has.

    Raises:
        StoreError: It says far more.
    """
    count = record.dataset.get("num_shards", 0)
    if count <= _MANY_SHARDS:
        return
    lists = [directory.list_parts(folder) for folder in (SAMPLES, SCORES)]
    parts = max((numbers[-1] + 1 for numbers in lists if numbers), default=0)
    if count > parts:
        raise StoreError(
            f"{directory.path(RUN_FILE)} is damaged: `dataset.num_shards` is {shown(count)}, and "
            f"there are parts of {parts} shards; restore it, or scan again with `overwrite`"
        )


def require_target(
    directory: RunDirectory, mode: Mode, advice: str = "`resume` or `overwrite`"
) -> None:
    """Check that a run may be written to a directory.

    Args:
        directory: The directory.
        mode: What to do with a run that is there.
        advice: Options that the command has for one.

    Raises:
        StoreError: It holds something else, or a run and neither resume nor overwrite was asked
            for; or its bucket is not there.
    """
    directory.require_bucket()
    if directory.exists():
        directory.require_run()
        if mode == "new":
            raise StoreError(f"{directory.uri} holds a run; give {advice}")


def new_record(directory: RunDirectory, entries: dict[str, Any]) -> RunRecord:
    """The record of a run that starts now.

    Args:
        directory: Where the run will live.
        entries: What it is made from; a ``run_id`` instead of folder and time.
    """
    values = {
        "schema_version": SCHEMA_VERSION,
        "run_id": _run_id(directory.uri),
        "created": _utc_now(),
        "versions": _versions(),
        "stages": {},
        "quarantined": [],
    }
    return RunRecord.from_json(values | entries, directory.path(RUN_FILE))


def _run_id(uri: str) -> str:
    return f"{last_part(uri) or 'run'}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"


def numeric_versions(menu: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Versions, now, of the packages that numbers depend on.

    Args:
        menu: Formats as ``run.json`` has them: ggml's library counts where it quantizes any.
    """
    by_ggml = any(gguf_type_of(entry.get("weight") or {}) is not None for entry in menu)
    packages = (*_NUMERIC_PACKAGES, DISTRIBUTION) if by_ggml else _NUMERIC_PACKAGES
    return {name: version for name, version in _versions().items() if name in packages}


def _utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    with suppress(importlib.metadata.PackageNotFoundError):
        packages[DISTRIBUTION] = importlib.metadata.version(DISTRIBUTION)
    return {"python": platform.python_version(), **packages}
