"""Job files: one YAML file that says what to run, for a laptop, a Ray job or a cron.

A job is one scan, a sweep of several models and budgets, or a nightly scan. Keys that are not the
job's own are a scan's, validated by :class:`~autoquant_ray.config.ScanConfig`; a file without
``kind`` is one scan, so that it also serves ``autoquant-ray scan --config``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from autoquant_ray.config import ScanConfig
from autoquant_ray.config_file import first_problem, read_yaml
from autoquant_ray.config_values import parse_bytes
from autoquant_ray.errors import ConfigError

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class _Job(BaseModel):
    """What every kind of job has.

    Attributes:
        scan: The keys of a scan, not validated before they are complete.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    LEFT_OUT: ClassVar[frozenset[str]] = frozenset()
    """Keys of a scan that this kind of job sets itself."""

    name: str = Field(description="Name of the job: lower case, digits and hyphens, at most 40.")
    secrets: tuple[str, ...] = Field(
        default=(),
        description="Environment variables that must be set where the job runs, such as HF_TOKEN. "
        "Only their names; the values come from the environment.",
    )
    scan: dict[str, Any]

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("use lower case letters, digits and hyphens, 40 at most")
        return value

    @field_validator("secrets")
    @classmethod
    def _check_secrets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(
                    f"{name.partition('=')[0]!r} is not the name of an environment variable; a "
                    "secret's value never stands in a job file"
                )
        return value

    def _scan_config(self, **values: Any) -> ScanConfig:
        return ScanConfig.model_validate(self.scan | values)


class ScanJob(_Job):
    """One scan."""

    kind: Literal["scan"] = "scan"

    def config(self) -> ScanConfig:
        """The scan."""
        return self._scan_config()


class SweepJob(_Job):
    """Several models and budgets: one scan per model, every budget solved from it."""

    LEFT_OUT = frozenset({"model", "bits", "bytes"})

    kind: Literal["sweep"]
    models: tuple[str, ...] = Field(min_length=1, description="Models, as a scan's model.")
    budgets: tuple[float | int, ...] = Field(
        min_length=1,
        description="Budgets: a number is average stored bits, a text such as 2.5GiB is bytes.",
    )
    out: str = Field(description="Folder of the runs, one per model.")

    @field_validator("budgets", mode="before")
    @classmethod
    def _parse_budgets(cls, value: Any) -> Any:
        """Bits stay floats; texts become bytes, an int."""
        if not isinstance(value, list | tuple):
            return value
        if any(isinstance(one, bool) for one in value):
            raise ValueError("must not be yes, no, true or false")
        return tuple(parse_bytes(one) if isinstance(one, str) else float(one) for one in value)

    @field_validator("models")
    @classmethod
    def _check_models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        slugs = [slug(model) for model in value]
        if len(set(slugs)) < len(slugs):
            raise ValueError("two models have the same last part, the name of their run")
        return value

    def configs(self) -> list[ScanConfig]:
        """One scan per model, each with the first budget."""
        return [
            self._scan_config(
                model=model, out=f"{self.out.rstrip('/')}/{slug(model)}", **self.budget_fields()[0]
            )
            for model in self.models
        ]

    def budget_fields(self) -> list[dict[str, Any]]:
        """Each budget as a scan's ``bits`` or ``bytes``."""
        return [
            {"bytes": budget} if isinstance(budget, int) else {"bits": budget}
            for budget in self.budgets
        ]


class NightlyJob(_Job):
    """A scan that a scheduler starts every night, compared with the last good one."""

    LEFT_OUT = frozenset({"out"})

    kind: Literal["nightly"]
    keep: int = Field(
        default=30,
        ge=1,
        description="Runs to keep; the oldest beyond are deleted, never the baseline.",
    )
    baseline: str | None = Field(
        default=None,
        description="Run to compare with, by its folder's name. Default: the last good run.",
    )
    significance: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="False discovery rate of the groups that are said to have moved.",
    )

    def config(self, out: str) -> ScanConfig:
        """The scan of one night, into a run directory."""
        return self._scan_config(out=out)


Job = ScanJob | SweepJob | NightlyJob
_KINDS: dict[str, type[Job]] = {"scan": ScanJob, "sweep": SweepJob, "nightly": NightlyJob}


def load_job(path: str) -> Job:
    """Read and validate a job file, the scans in it included.

    Raises:
        ConfigError: Unreadable file, unknown key or kind, wrong or missing value; one line with
            the file and the key.
    """
    return make_job(read_yaml(path), path)


def make_job(values: dict[str, Any], path: str) -> Job:
    """A job from the content of a file.

    Args:
        values: Keys and values.
        path: Of the file, for messages.

    Raises:
        ConfigError: As :func:`load_job`.
    """
    kind = values.get("kind", "scan")
    if kind not in _KINDS:
        raise ConfigError(f"{path}: kind: {kind!r} is unknown; known: {', '.join(_KINDS)}")
    job_class = _KINDS[kind]
    own_fields = set(job_class.model_fields) - {"scan"}
    own = {key: value for key, value in values.items() if key in own_fields}
    scan = {key: value for key, value in values.items() if key not in own_fields}
    clash = sorted(job_class.LEFT_OUT & set(scan))
    if clash:
        raise ConfigError(f"{path}: {clash[0]}: a {kind} job sets it itself; leave it out")
    if kind == "scan" and "name" not in own and isinstance(scan.get("out"), str):
        own["name"] = slug(scan["out"])
    with _one_line(path, sorted(own_fields | (set(ScanConfig.model_fields) - job_class.LEFT_OUT))):
        job = job_class.model_validate({**own, "scan": scan})
        _validate_scans(job)
    return job


@contextmanager
def _one_line(path: str, known: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        line = first_problem(error, lambda name, _root: f"{path}: {name}", known)
        raise ConfigError(line if line.startswith(path) else f"{path}: {line}") from None


def _validate_scans(job: Job) -> None:
    if isinstance(job, ScanJob):
        job.config()
    elif isinstance(job, SweepJob):
        job.configs()
    else:
        job.config(out="runs")


def slug(text: str) -> str:
    """The last part of a path or id in lower case letters, digits and hyphens, 40 at most."""
    last = re.split(r"[/\\]", text.rstrip("/\\"))[-1].lower()
    return re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:40].strip("-") or "run"
