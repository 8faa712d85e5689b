"""Job files: one YAML file that says what to run, for a laptop, a Ray job or cron.

A job is one scan, a sweep of several models and budgets, or a nightly scan. Keys that are not the
job's own are a scan's, validated by :class:`~autoquant_ray.config.scan.ScanConfig`; a file without
``kind`` is one scan, which ``autoquant-ray scan --config`` reads too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from autoquant_ray.config.files import places_in, problems_of, read_yaml
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.values import is_variable, parse_bytes
from autoquant_ray.errors import ConfigError
from autoquant_ray.runs.names import slug

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


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
        for number, text in enumerate(value, start=1):
            if is_variable(text):
                continue
            name, equals, _ = text.partition("=")
            what = f"{name}=..." if equals and is_variable(name) else f"entry {number}"
            raise ValueError(
                f"{what} is not the name of an environment variable; a secret's value does "
                "not belong in a job file"
            )
        return value

    @property
    def run_id(self) -> str:
        """Name of the job and a digest of its content: the same job gives the same id anywhere."""
        content = json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        return f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def at(self, address: str | None) -> Self:
        """The same job on another Ray cluster; None keeps the cluster that the file names."""
        if address is None:
            return self
        return self.model_copy(update={"scan": self.scan | {"address": address}})

    def require_secrets(self, environment: Mapping[str, str]) -> None:
        """Check that the variables that the job needs are set, and not empty.

        Raises:
            ConfigError: Names those that are not.
        """
        missing = [name for name in self.secrets if not environment.get(name)]
        if missing:
            raise ConfigError(
                f"job {self.name} needs the environment variable {', '.join(missing)}, which is "
                "not set here; set it where the job runs"
            )

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
    out: str = Field(min_length=1, description="Folder of the runs, one per model.")

    @field_validator("budgets", mode="before")
    @classmethod
    def _parse_budgets(cls, value: Any) -> Any:
        """Bits become floats; texts become bytes, an int."""
        if not isinstance(value, list | tuple):
            return value
        budgets = tuple(_parse_budget(budget) for budget in value)
        if len(set(budgets)) < len(budgets):
            raise ValueError("a budget is named twice")
        return budgets

    @field_validator("models")
    @classmethod
    def _check_models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        slugs = [slug(model) for model in value]
        if len(set(slugs)) < len(slugs):
            raise ValueError("two models have the same last part, the name of their run")
        return value

    def config(self, model: str, budget: Mapping[str, Any]) -> ScanConfig:
        """The scan of one model.

        Args:
            model: One of the models.
            budget: One of :meth:`budget_fields`.
        """
        return self._scan_config(model=model, out=f"{self.out.rstrip('/')}/{slug(model)}", **budget)

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
        description="False discovery rate of the groups that are reported as moved.",
    )

    def config(self, out: str) -> ScanConfig:
        """The scan of one night, into a run directory."""
        return self._scan_config(out=out)


Job = ScanJob | SweepJob | NightlyJob
_KINDS: dict[str, type[Job]] = {"scan": ScanJob, "sweep": SweepJob, "nightly": NightlyJob}


def _parse_budget(value: Any) -> float | int:
    """Average bits, a float, or bytes, an int."""
    if isinstance(value, str):
        if re.fullmatch(r"\s*[0-9.]+\s*", value):
            raise ValueError(f"{value!r} has no unit; write bits without quotes, bytes as 2.5GiB")
        return parse_bytes(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is neither a number of bits nor a text such as 2.5GiB")
    if not 0 < value <= 16:
        raise ValueError(
            f"{value} is not above 0 and at most 16 bits; bytes have a unit, such as 2.5GiB"
        )
    return float(value)


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
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(f"{path}: kind: {kind!r} is unknown; known: {', '.join(_KINDS)}")
    job_class = _KINDS[kind]
    job_fields = set(job_class.model_fields) - {"scan"}
    of_job = {key: value for key, value in values.items() if key in job_fields}
    scan = {key: value for key, value in values.items() if key not in job_fields}
    clash = sorted(job_class.LEFT_OUT & set(scan))
    if clash:
        raise ConfigError(f"{path}: {clash[0]}: a {kind} job sets it itself; leave it out")
    if kind == "scan" and "name" not in of_job:
        of_job["name"] = slug(str(scan.get("out")))
    with _one_line(path, sorted(job_fields | (set(ScanConfig.model_fields) - job_class.LEFT_OUT))):
        job = job_class.model_validate({**of_job, "scan": scan})
        _validate_scans(job)
    return job


@contextmanager
def _one_line(path: str, keys: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        line = problems_of(error, places_in(path), keys)
        raise ConfigError(line if line.startswith(path) else f"{path}: {line}") from None


def _validate_scans(job: Job) -> None:
    if isinstance(job, ScanJob):
        job.config()
    elif isinstance(job, SweepJob):
        for budget in job.budget_fields():
            job.config(job.models[0], budget)
    else:
        job.config(out="runs")


def require_runs(job: Job, runs: str | None, path: str) -> None:
    """Check that a folder of runs is given for a nightly job, and for no other.

    Args:
        job: Any job.
        runs: The folder.
        path: The job's file, for messages.

    Raises:
        ConfigError: It is missing, or does not belong there.
    """
    if isinstance(job, NightlyJob) and runs is None:
        raise ConfigError(f"{path} is a nightly job; give the folder of its runs with `runs` DIR")
    if not isinstance(job, NightlyJob) and runs is not None:
        raise ConfigError(
            f"`runs` is for nightly jobs; {path} is a {job.kind} job with its own out"
        )
