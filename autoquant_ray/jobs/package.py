"""What is sent to a cluster with a job, and what must not be.

The job file, validated here, is alone in the job's working directory. With a wheel, the package
inside it is unpacked beside the file: as a wheel among ``py_modules``, it would be installed by pip
with its dependencies. Weights and secrets are never sent: models are read where the workers are,
and secrets are looked up by name in the environment of the cluster. A shell never interprets what a
user wrote: the driver's command line is made of quoted words.
"""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from autoquant_ray.config.runtime_env import SOUNDS_SECRET, RuntimeEnv
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.sources import sources_of
from autoquant_ray.config.values import place_problem
from autoquant_ray.errors import ConfigError, one_line
from autoquant_ray.jobs.file import Job, NightlyJob, SweepJob, make_job, require_runs
from autoquant_ray.jobs.names import parse_date

logger = logging.getLogger(__name__)

_JOB_FILE = "job.yaml"
_OF_THE_PACKAGE = re.compile(r"autoquant_ray(/|-[^/]*\.dist-info/)")


@dataclass(frozen=True, kw_only=True)
class Package:
    """A job that may be sent to a cluster; :func:`make_package` makes one.

    Attributes:
        job: Validated.
        run_id: Of the run and of Ray's submission; of a nightly job, its name and the date.
        command: The driver's arguments, after the program's name.
        values: Content of its file.
        env: Environment variables of the driver and the workers, shown by Ray's dashboard.
        wheel: Wheel of this package to run; None takes what is installed on the cluster.
        runtime_env: What the job file asks for besides, of the driver too.
    """

    job: Job
    run_id: str
    command: tuple[str, ...]
    values: dict[str, Any]
    env: dict[str, str]
    wheel: str | None
    runtime_env: RuntimeEnv

    def unpack(self, folder: Path) -> None:
        """Write the job's working directory: its own files, the job file and, from a wheel, the
        package.

        The package is unpacked rather than installed: Ray would let pip install the wheel's
        dependencies beside it, torch and Ray among them.
        """
        if self.runtime_env.working_dir is not None:
            shutil.copytree(self.runtime_env.working_dir, folder, dirs_exist_ok=True)
        values = {key: value for key, value in self.values.items() if key != "runtime_env"}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        (folder / _JOB_FILE).write_text(text, encoding="utf-8")
        if self.wheel is not None:
            with zipfile.ZipFile(self.wheel) as archive:
                archive.extractall(folder, _package_files(archive))

    def runtime_env_in(self, folder: str) -> dict[str, Any]:
        """Ray's ``runtime_env`` of the job: what the file asks for, with ``env`` over it.

        Args:
            folder: The working directory.
        """
        asked = self.runtime_env.to_ray()
        return asked | {"working_dir": folder, "env_vars": asked.get("env_vars", {}) | self.env}


def make_package(
    values: dict[str, Any],
    path: str,
    *,
    env: Mapping[str, str],
    wheel: str | None,
    runs: str | None = None,
) -> Package:
    """Check that a job can run on a cluster, and that nothing secret would be sent with it.

    Args:
        values: Content of the job file.
        path: Of the file, for messages.
        env: See :class:`Package`.
        wheel: See :class:`Package`.
        runs: Folder of the runs of a nightly job.

    Raises:
        ConfigError: Not a valid job, a path that means something else on the cluster, a password
            in an address, a secret in ``env``, or not a wheel of this package.
    """
    job = make_job(values, path)
    require_runs(job, runs, path)
    _require_portable(job, path, runs)
    runtime_env = _configs(job, runs)[0].runtime_env or RuntimeEnv()
    _require_folder(runtime_env, path)
    _require_no_secret(job.secrets, env)
    if wheel is not None:
        _require_wheel(wheel)
    run_id, command = _command(job, runs)
    return Package(
        job=job,
        run_id=run_id,
        command=(*command, "--address", "auto"),
        values=values,
        env=dict(env),
        wheel=wheel,
        runtime_env=runtime_env,
    )


def _command(job: Job, runs: str | None) -> tuple[str, tuple[str, ...]]:
    """Run id and arguments of the driver; of a nightly job, those of today."""
    if runs is None:
        return job.run_id, ("run", _JOB_FILE, "--run-id", job.run_id)
    date = parse_date(None)
    return f"{job.name}-{date}", ("nightly", _JOB_FILE, "--date", date, "--runs", runs)


def entrypoint(command: Sequence[str]) -> str:
    """The driver's command line, for the shell that Ray starts it with."""
    return shlex.join(["python", "-m", "autoquant_ray", *command])


def _require_portable(job: Job, path: str, runs: str | None) -> None:
    for config in _configs(job, runs):
        sources = (("data", source) for source in sources_of(config.data).values())
        for key, value in (("model", config.model), *sources, ("out", config.out)):
            where = "--runs" if runs is not None and key == "out" else f"{path}: {key}"
            if (problem := place_problem(value)) is not None:
                raise ConfigError(
                    f"{where}: {problem}; that is the cluster's, name them under secrets"
                )
            is_remote = "://" in value
            if is_remote and key != "out":
                raise ConfigError(
                    f"{where}: {value} cannot be read from there; give an absolute path that the "
                    "cluster's nodes share, or a hub id"
                )
            is_local = key == "out" or value.startswith((".", "~")) or Path(value).exists()
            if is_local and not is_remote and not Path(value).is_absolute():
                other = "s3:// or gs://" if key == "out" else "a hub id"
                raise ConfigError(
                    f"{where}: {value} would be looked for on the cluster; give an absolute "
                    f"path that its nodes share, or {other}"
                )


def _require_folder(runtime_env: RuntimeEnv, path: str) -> None:
    """Check that the working directory can be sent along with the job file."""
    folder = runtime_env.working_dir
    if folder is None:
        return
    if not Path(folder).is_dir():
        raise ConfigError(
            f"{path}: runtime_env.working_dir: {folder} is no folder of this machine, from which "
            "the job is sent; give one"
        )
    if (Path(folder) / _JOB_FILE).exists():
        raise ConfigError(
            f"{path}: runtime_env.working_dir: {folder} holds a {_JOB_FILE}, the name under which "
            "the job file is put there; rename it"
        )


def _configs(job: Job, runs: str | None) -> list[ScanConfig]:
    if isinstance(job, NightlyJob):
        return [job.config(out=str(runs))]
    if isinstance(job, SweepJob):
        return [job.config(model, job.budget_fields()[0]) for model in job.models]
    return [job.config()]


def _require_no_secret(secrets: tuple[str, ...], env: Mapping[str, str]) -> None:
    for name in env:
        if name in secrets:
            raise ConfigError(
                f"--env {name}: it is a secret of the job, and Ray's dashboard shows what --env "
                "sets; set it in the cluster's environment"
            )
        if SOUNDS_SECRET.search(name):
            logger.warning(
                "--env %s: Ray's dashboard shows its value; a secret belongs in the cluster's "
                "environment, its name under secrets",
                name,
            )


def _require_wheel(path: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = _package_files(archive)
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"--wheel {path} cannot be read: {one_line(error)}") from None
    if "autoquant_ray/__main__.py" not in names:
        raise ConfigError(f"--wheel {path} is not a wheel of autoquant-ray")


def _package_files(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in archive.namelist() if _OF_THE_PACKAGE.match(name)]
