"""The runs that one nightly job has made in a folder: their names, which is good, which may go."""

from __future__ import annotations

import logging
import re

from autoquant_ray.compare.history import is_run, run_folder
from autoquant_ray.errors import ConfigError, HeldError, StoreError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.lease import lease
from autoquant_ray.runs.names import MANIFEST_JSON
from autoquant_ray.runs.state import RunState

logger = logging.getLogger(__name__)


class Nights:
    """The runs of one job.

    Args:
        folder: Where the runs of all jobs are.
        job: The job's name.
    """

    def __init__(self, folder: RunDirectory, job: str) -> None:
        self._folder = folder
        self._job = job
        self._pattern = re.compile(re.escape(job) + r"-(\d{4}-\d{2}-\d{2})")

    def name(self, date: str) -> str:
        """Name of the run of a day."""
        return f"{self._job}-{date}"

    def date(self, name: str) -> str:
        """Day of a run of this job."""
        return name.removeprefix(f"{self._job}-")

    def is_run(self, name: str) -> bool:
        """Whether a run of that name is there."""
        return is_run(run_folder(self._folder, name))

    def all(self) -> list[str]:
        """Names of the job's runs, oldest first."""
        names = self._folder.list_folders("")
        return [name for name in names if self._pattern.fullmatch(name) and self.is_run(name)]

    def before(self, date: str) -> list[str]:
        """Names of the job's runs of earlier days, oldest first."""
        return [name for name in self.all() if name < self.name(date)]

    def last_good(self, names: list[str]) -> str | None:
        """The last of some runs that is finished without a quarantined shard."""
        good = (name for name in reversed(names) if is_good(run_folder(self._folder, name)))
        return next(good, None)

    def baseline(self, wanted: str | None, date: str) -> str | None:
        """Name of the run with which to compare that of a day; None where there is none yet.

        Args:
            wanted: The run that the job names, or None for the last good one.
            date: The day.

        Raises:
            ConfigError: The run that the job names is not there or not finished.
        """
        if wanted is None:
            return self.last_good(self.before(date))
        if wanted == self.name(date):
            return None
        if "/" in wanted or "\\" in wanted or wanted.startswith("."):
            raise ConfigError(f"baseline {wanted!r} is not the name of a run: it may hold no path")
        if not is_good(run_folder(self._folder, wanted)):
            raise ConfigError(
                f"baseline {wanted!r} is not a finished run in {self._folder.uri}; name one, or "
                "leave baseline out to compare with the last good run"
            )
        return wanted

    def retire(self, keep: int, protected: set[str]) -> list[str]:
        """Delete the oldest runs beyond a number; returns their names.

        Args:
            keep: Runs to keep.
            protected: Runs that stay whatever their age, besides the last good one.
        """
        names = self.all()
        protected = protected | {self.last_good(names) or ""}
        deleted = []
        for name in names[: max(0, len(names) - keep)]:
            directory = run_folder(self._folder, name)
            if name in protected:
                continue
            try:
                with lease(directory):
                    directory.clear()
            except HeldError as error:
                logger.warning("%s is kept, it is in use: %s", name, error)
                continue
            deleted.append(name)
        return deleted


def is_finished(directory: RunDirectory) -> bool:
    """Whether a directory holds a run whose scan came to its end."""
    try:
        state = RunState.open(directory)
    except StoreError:
        return False
    is_scored = state.record.is_done("aggregate")
    return is_scored and directory.exists(MANIFEST_JSON)


def is_good(directory: RunDirectory) -> bool:
    """Whether a run is finished and no shard was left out."""
    return is_finished(directory) and not RunState.open(directory).record.quarantined
