"""The schema of ``events.jsonl``: one JSON object per line, one line per state change.

Every event of a run passes through :meth:`~autoquant_ray.runs.directory.RunDirectory.append_event`,
which writes the line and tells the listener (the metrics). Each class below is one kind of line; a
new kind needs one, and a test compares the package's calls with them. Docstrings and descriptions
are the documentation (``docs/metrics-and-events.md``).

Lines are in the order in which the driver learned of things. A resumed run appends. A line that a
killed driver left unfinished has no line break at its end.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Stage = Annotated[
    Literal[
        "shards",
        "plan",
        "calibrate",
        "search",
        "fit",
        "score",
        "aggregate",
        "evaluate",
        "estimate",
        "shapley",
        "tasks",
    ],
    Field(description="Its name."),
]
Shard = Annotated[
    int, Field(ge=0, description="Number of the shard; in the stage `fit`, of the decoder layer.")
]
NumWorkers = Annotated[
    int, Field(ge=0, description="Workers that have the model loaded and live, after the event.")
]
Reason = Annotated[str, Field(description="What Ray or the worker said, in one line.")]


class _Line(BaseModel):
    """What every line has."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    time: float = Field(description="Seconds since 1970-01-01 UTC, by the driver's clock.")


class StageStarted(_Line):
    """A stage begins, or goes on with what is missing."""

    event: Literal["stage_started"]
    stage: Stage


class StageDone(_Line):
    """A stage is finished and its files are written."""

    event: Literal["stage_done"]
    stage: Stage
    seconds: float = Field(description="Of this attempt; what was found finished is not in it.")


class StageStopped(_Line):
    """A stage ended early; its finished shards are kept."""

    event: Literal["stage_stopped"]
    stage: Stage
    error: str = Field(description="Class of the exception, `KeyboardInterrupt` included.")


class WorkerReady(_Line):
    """A worker has loaded the model."""

    event: Literal["worker_ready"]
    pid: int = Field(description="Its process id, on its own machine.")
    num_workers: NumWorkers


class WorkerDied(_Line):
    """A worker, or its node, is gone; another one is started while the budget lasts."""

    event: Literal["worker_died"]
    shard: int | None = Field(
        description="What it worked on; null while loading or if nobody waited for its result."
    )
    decision: Literal["retry", "quarantine"] = Field(
        description="What becomes of the shard: another worker tries it, or it is left out."
    )
    reason: Reason
    num_workers: NumWorkers


class WorkersStopped(_Line):
    """All shards have ended; the workers and their reservations are given back."""

    event: Literal["workers_stopped"]


class ShardDone(_Line):
    """A shard's part is written."""

    event: Literal["shard_done"]
    stage: Stage
    shard: Shard
    num_tokens: int = Field(ge=0, description="Tokens of the shard's samples.")
    seconds: float = Field(description="From the call to its result, as the driver saw it.")
    pid: int = Field(description="The worker that did it, as in `worker_ready`.")


class ShardCopied(_Line):
    """A slow shard was given to a second worker too; the first result counts."""

    event: Literal["shard_copied"]
    shard: Shard


class ShardFailed(_Line):
    """A worker lives and reported an error for its shard."""

    event: Literal["shard_failed"]
    shard: Shard
    decision: Literal["quarantine", "fail"] = Field(
        description="The shard is left out, or the run stops because every worker would fail."
    )
    reason: Reason


class ShardQuarantined(_Line):
    """A shard is left out of the result; exit code 3."""

    event: Literal["shard_quarantined"]
    shard: Shard
    reason: Reason


class PoolGrew(_Line):
    """The cluster has become larger, and more workers are started (`--workers auto`)."""

    event: Literal["pool_grew"]
    num_wanted: int = Field(ge=1, description="Workers from now on.")


class StopRequested(_Line):
    """SIGTERM or Ctrl-C: no more shards are handed out."""

    event: Literal["stop_requested"]
    shards: list[int] = Field(description="In flight; they get the grace period to end.")


class PartDamaged(_Line):
    """A part that an earlier attempt wrote is unreadable or incomplete; it is done again."""

    event: Literal["part_damaged"]
    part: str = Field(description="File inside the run directory.")


class PartOutdated(_Line):
    """A part was scored on other shares of the rows than `--sample-rows auto` now chooses, because
    another shard is among the first; it is done again."""

    event: Literal["part_outdated"]
    part: str = Field(description="File inside the run directory.")


class StabilityChecked(_Line):
    """`--stop-when-stable` asked whether more data is worth it."""

    event: Literal["stability_checked"]
    shards: int = Field(ge=0, description="Shards that the answer is made from.")
    expected_regret: float | None = Field(
        description="Share of the predicted KL that more data would save; null if unknown."
    )


class RunDone(_Line):
    """The scan is finished: manifests and reports are written."""

    event: Literal["run_done"]
    quarantined: int = Field(ge=0, description="Shards left out.")


class Imported(_Line):
    """The run was made from a ModelOpt manifest, not scanned."""

    event: Literal["imported"]
    source: str = Field(description="The manifest, as given.")


Event = (
    StageStarted
    | StageDone
    | StageStopped
    | WorkerReady
    | WorkerDied
    | WorkersStopped
    | ShardDone
    | ShardCopied
    | ShardFailed
    | ShardQuarantined
    | PoolGrew
    | StopRequested
    | PartDamaged
    | PartOutdated
    | StabilityChecked
    | RunDone
    | Imported
)
_LINE: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


def parse_event(line: str) -> Event:
    """Read one line of ``events.jsonl``.

    Raises:
        pydantic.ValidationError: Not a line of this version's schema.
    """
    return _LINE.validate_json(line)
