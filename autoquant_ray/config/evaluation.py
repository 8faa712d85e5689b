"""What an evaluation needs beside the run: data to measure on, rivals, workers."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from autoquant_ray.config.files import validate
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.sources import FileKind
from autoquant_ray.config.values import parse_labels, parse_seconds, parse_workers, unless_none


class EvaluationConfig(BaseModel):
    """Fields of ``evaluate``; what is not given is as in the run's scan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(description="Run directory of a finished scan.")
    solution: str = Field(
        default="",
        description="Solution to start from, a folder below solutions/. Default: the scan's own.",
    )
    data: str | None = Field(
        default=None,
        description="Data to measure on, as for scan. Default: what follows the calibration "
        "samples in the run's own data.",
    )
    read_as: FileKind | None = Field(
        default=None,
        description="What files of data hold, as for scan. Default: what their ending says; of the "
        "run's own data, as for the run.",
        json_schema_extra={"flag": "as"},
    )
    text_field: str | None = Field(default=None, description="Column that holds the text.")
    split: str | None = Field(default=None, description="Split of a dataset folder or hub id.")
    pack: bool | None = Field(
        default=None, description="Chop the text into windows of seq-len instead of samples."
    )
    samples: int | None = Field(
        default=None, ge=1, description="Number of samples to use at most. Default: the run's."
    )
    seq_len: int | None = Field(default=None, ge=2, description="Longest sample, in tokens.")
    loss_on: Literal["all", "answer"] | None = Field(
        default=None, description="Tokens that are measured: all, or answer. Default: the run's."
    )
    against: tuple[str, ...] = Field(
        default=("uniform", "modelopt", "random"),
        description="What to measure beside it under the same budget, separated by commas: "
        "uniform, modelopt, modelopt-shapley (scores that ModelOpt computes itself, from 0.48 on), "
        "random, or none. Or, at its own size, another solution of the run, or a file: AutoRound's "
        "layer_config or quantization_config, mlx-lm's quantization or sensitivities, "
        "llm-compressor's config of HIGGS; beside these, what this run's scores choose at the same "
        "size.",
    )
    num_random: int = Field(
        default=20, ge=1, description="Allocations from shuffled scores, whose mean is the null."
    )
    audit: int | None = Field(
        default=None,
        ge=1,
        description="Before that, measure this many scores, of the pairs (group, format) that "
        "matter most to the solution, each alone on half of the data, and solve the budget again "
        "with them. Writes audit.parquet and solutions/NAME-audited.",
    )
    tasks: tuple[str, ...] = Field(
        default=(),
        description="Benchmark tasks of lm-eval that the model in 16 bits, the solution and its "
        "rivals (but those of random) answer, separated by commas, such as arc_easy,gsm8k. Writes "
        "tasks.parquet. Needs the extra tasks.",
    )
    tasks_dir: str | None = Field(
        default=None, description="Folder with task files (YAML) of lm-eval, beside its own."
    )
    task_limit: int | None = Field(
        default=None, ge=1, description="Samples of each task at most. Default: all."
    )
    workers: int | str | None = Field(default=None, description="Number of workers, or auto.")
    cpus_per_worker: int | None = Field(default=None, ge=1, description="Threads per worker.")
    gpus_per_worker: float | None = Field(default=None, gt=0, description="GPUs per worker.")
    wait_for_workers: float | None = Field(
        default=None,
        description="How long to wait for the nodes of the workers, as for scan. Default: the "
        "run's.",
    )
    accelerator: str | None = Field(
        default=None, description="Accelerator of the workers' nodes, as for scan."
    )
    node_labels: dict[str, str] | None = Field(
        default=None,
        description="Label of the workers' nodes, as for scan. May be repeated.",
        json_schema_extra={"flag": "node_label"},
    )
    address: str | None = Field(default=None, description="Ray cluster, as for scan.")

    @field_validator("against", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        names = tuple(part.strip() for part in value.split(","))
        return () if names == ("none",) else names

    @field_validator("solution")
    @classmethod
    def _take_name(cls, value: str) -> str:
        """Without the slash with which shells complete a folder."""
        return value.rstrip("/") or value

    @field_validator("tasks", mode="before")
    @classmethod
    def _split_tasks(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        names = tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))
        if not names:
            raise ValueError("names no task; give one, such as arc_easy, or leave it out")
        return names

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        """What only tasks use, without tasks, and shuffles that nobody asked for."""
        given = self.model_fields_set
        for name, other, is_used in (
            ("tasks_dir", "`tasks`", bool(self.tasks)),
            ("task_limit", "`tasks`", bool(self.tasks)),
            ("num_random", "random in `against`", "random" in self.against),
        ):
            if name in given and getattr(self, name) is not None and not is_used:
                raise ValueError(f"`{name}` is for {other}; give that too, or leave it out")
        return self

    _parse_workers = field_validator("workers", mode="before")(unless_none(parse_workers))
    _parse_wait = field_validator("wait_for_workers", mode="before")(unless_none(parse_seconds))
    _parse_labels = field_validator("node_labels", mode="before")(unless_none(parse_labels))

    def scan_config(self, scan: dict[str, Any]) -> ScanConfig:
        """The run's scan with this data and these workers.

        Other data need not say its domains: all of it is measured together.

        Args:
            scan: ``config`` of ``run.json``.
        """
        shared = set(ScanConfig.model_fields) & set(type(self).model_fields)
        given = {name: getattr(self, name) for name in shared if getattr(self, name) is not None}
        if given.get("data", scan["data"]) != scan["data"]:
            given = {"domain_field": None, "read_as": None} | given
        return validate(ScanConfig, scan | given)
