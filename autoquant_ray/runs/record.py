"""``run.json``: what a run was made from, which stages are done, and what later commands need.

The file keeps the order of its keys, and entries that this version does not know. An entry that
does not apply to a run (``imported_from`` of a scan, ``stopping`` of one that was not asked to
stop) is absent, not null.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NotRequired, TypedDict

from autoquant_ray.errors import StoreError
from autoquant_ray.runs.names import RUN_FILE, remedy_of
from autoquant_ray.runs.typed import problem_of


class ModelFacts(TypedDict):
    """The model of a run."""

    name: str
    """As it was given: folder or hub id."""
    fingerprint: str | None
    """Of its files; null for an imported run."""


class DatasetFacts(TypedDict, total=False):
    """The data of a run; an imported run has only a name and what its manifest said."""

    name: str
    max_samples: int
    """How many samples were asked for."""
    seq_len: int
    """Tokens of a sample at most."""
    source_fingerprint: str
    """Of the files, or of the rows, as they were."""
    counts: dict[str, int]
    """Texts read, used and left out by reason: :class:`~autoquant_ray.data.cutting.DataCounts`."""
    num_samples: int
    num_held_out: int
    """Samples at the end of the data that were kept for measurements."""
    num_tokens: int
    num_shards: int
    """Shards that the samples make, those that are left out of the result included."""
    tokens_sha256: str
    """Of all samples in order: equal where two runs scored the very same samples."""
    num_loss_tokens: int
    """Of chats and images: tokens that count in the loss."""
    num_samples_with_images: int
    bad_samples: list[Any]
    """Why samples were left out with ``--skip-bad-samples``, the first few."""
    domains: dict[str, dict[str, int]]
    """Domain -> samples, tokens and shards, where there are domains."""
    chat_fingerprint: str
    """Of chats and images: of the model's chat template and processor."""
    source: dict[str, Any]
    """Of an imported run: the manifest's own entry."""


class StageEntry(TypedDict):
    """One stage."""

    state: str
    """``running``, ``done``, ``stopped`` by a signal, or ``dropped``: its files were deleted on
    purpose."""
    fingerprint: NotRequired[str]
    """Of everything that its result depends on; another one makes it run again."""
    seconds: NotRequired[float]
    """Of the attempt that finished it."""


class QuarantinedShard(TypedDict):
    """A shard that is left out of the result."""

    shard: int
    stage: str
    """In which it failed."""
    reason: str
    """In one line."""


class LayoutLimit(TypedDict):
    """Why a layout of checkpoints holds no solution of a model, or only some."""

    reason: str
    """In words."""
    groups: list[str]
    """Those that must stay in 16 bits there; none: it holds no solution at all."""


class PlanSummary(TypedDict):
    """What ``solve`` and ``report`` need besides ``plan.parquet``, so that they need no model."""

    formats: list[dict[str, Any]]
    """The menu; of an imported run, names only."""
    modules: dict[str, dict[str, Any]]
    """Module -> prefixes and shapes of its weights, and what else tells its kind."""
    unsearched: dict[str, str]
    """Group that stays in 16 bits -> why."""
    tied_groups: list[str]
    """Groups that share their weights with the embedding."""
    embedding: NotRequired[str]
    """Where there are such groups, its name."""
    carried: NotRequired[dict[str, int]]
    """Tensor of the model's files that is not loaded -> bytes that it takes in a checkpoint."""
    model_type: NotRequired[str]
    """As the model's config has it: other tools name some families' layers otherwise."""
    other_bytes: int
    """At 16 bits, of everything outside the groups."""
    other_modules: dict[str, int]
    """Module with weights that ModelOpt cannot quantize -> its number of weights."""
    flops_per_token: NotRequired[int]
    """Of one forward pass."""
    step: NotRequired[dict[str, Any]]
    """What a prediction of the time of a decode step needs."""
    experts: NotRequired[list[str]]
    """Groups that are one routed expert each."""
    idle_groups: NotRequired[list[str]]
    """Groups that do no work while text is generated: those of a vision tower."""
    separate_head: NotRequired[str]
    """Head that the config ties to the embedding, while the files hold another weight for it."""
    source_format: NotRequired[str]
    """Of a checkpoint that is quantized already: how; its weights are dequantized."""
    sample_limits: NotRequired[dict[str, int | None]]
    """Token ids and positions of the model: :class:`~autoquant_ray.models.context.SampleLimits`."""
    checkpoint_limits: NotRequired[dict[str, LayoutLimit]]
    """Layout of checkpoints -> its limit; layouts without are not there, nor in earlier runs."""
    folds: NotRequired[list[dict[str, Any]]]
    """Inputs whose channels can take factors: :class:`~autoquant_ray.plan.fold.Fold`."""


class UsedData(TypedDict):
    """What the scores are made of."""

    num_shards: int
    num_samples: int
    num_tokens: int


class Stopping(TypedDict):
    """What ``--stop-when-stable`` decided."""

    threshold: float
    """Expected regret below which a scan stops."""
    shards_used: int
    """The first so many shards make the result."""
    shards_total: int
    is_stable: bool
    expected_regret: float | None
    """Share of the predicted KL that more data would save; null if unknown."""
    checks: list[dict[str, Any]]
    """Expected regret after some numbers of shards."""


@dataclass(kw_only=True)
class RunRecord:
    """Content of ``run.json``; what is None is absent from the file, but for ``config``."""

    schema_version: int
    """Of the run directory."""
    run_id: str
    """Folder and time of the start, or what was given."""
    created: str | None = None
    """Start, UTC."""
    versions: dict[str, str] | None = None
    """Of Python and of the packages that numbers can depend on, when the run was started."""
    stages: dict[str, StageEntry]
    """Stages that were begun, in that order."""
    quarantined: list[QuarantinedShard]
    """Shards that are left out of the result."""
    config: dict[str, Any] | None
    """The resolved config of the scan; null for an imported run."""
    model: ModelFacts
    dataset: DatasetFacts
    fingerprints: dict[str, str]
    """Of ``model`` and ``data``; a run is resumed only where they are the same."""
    imported_from: str | None = None
    """The manifest that the run was made from instead of a scan."""
    import_note: str | None = None
    """What of that manifest is not taken as it says."""
    plan: PlanSummary | None = None
    """Absent until the plan stage is done."""
    weights: dict[str, str] | None = None
    """Group -> hash of its weights, in the order of the model."""
    stopping: Stopping | None = None
    """Of a scan that was asked to stop once its allocation is stable."""
    used: UsedData | None = None
    """Absent until scores are added up."""
    others: dict[str, Any] = field(default_factory=dict)
    """Entries of another version, kept as they are."""
    order: list[str] = field(default_factory=list)
    """Keys in the order of the file."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any], path: str) -> RunRecord:
        """Take the content of a file.

        Args:
            values: The content.
            path: The file, for the error.

        Raises:
            StoreError: It lacks a key that every run has, or a value has another type.
        """
        missing = sorted(_REQUIRED - set(values))
        if missing:
            raise StoreError(f"{path} is damaged: it lacks {missing}; {remedy_of(RUN_FILE)}")
        entries = {key: value for key, value in values.items() if key in _KEYS}
        hints = typing.get_type_hints(cls, include_extras=True)
        for key, value in entries.items():
            if (problem := problem_of(value, hints[key], key)) is not None:
                raise StoreError(f"{path} is damaged: {problem}; {remedy_of(RUN_FILE)}")
        others = {key: value for key, value in values.items() if key not in _KEYS}
        return cls(**entries, others=others, order=list(values))

    def to_json(self) -> dict[str, Any]:
        """Content of the file; keys that are new since the last call come last."""
        entries = {key: getattr(self, key) for key in _KEYS}
        present = {
            key: value
            for key, value in (entries | self.others).items()
            if value is not None or key in _REQUIRED or key in self.others
        }
        kept = [key for key in self.order if key in present]
        self.order = list(dict.fromkeys([*kept, *present]))
        return {key: present[key] for key in self.order}

    @property
    def is_imported(self) -> bool:
        """Whether the run was made from a manifest, not scanned."""
        return self.imported_from is not None

    def is_done(self, stage: str) -> bool:
        """Whether a stage has finished, whatever it was made from."""
        entry = self.stages.get(stage)
        return entry is not None and entry.get("state") == "done"


_FIELDS = [entry for entry in fields(RunRecord) if entry.name not in ("others", "order")]
_KEYS = tuple(entry.name for entry in _FIELDS)
_REQUIRED = {entry.name for entry in _FIELDS if entry.default is MISSING}
