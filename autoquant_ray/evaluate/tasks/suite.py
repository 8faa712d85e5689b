"""Tasks by name -> what lm-eval asks, and the scores of what was answered.

Everything that can be wrong about tasks is found here before a model is loaded: the package, the
names, and the data sets, which lm-eval reads when it loads a task.
"""

from __future__ import annotations

import difflib
import importlib.util
import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from autoquant_ray.errors import ConfigError, DataError, one_line
from autoquant_ray.evaluate.tasks.answers import Answer

_MOST_NAMES = 4
_BOOTSTRAPS = 1000
"""For standard errors of metrics that are no mean over the samples."""
_FEWSHOT_SEED = 1234
"""lm-eval's own: examples before a question are those that it publishes results with."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A metric of a task.

    Attributes:
        task: Name of the task, or of a group of tasks.
        version: What the task says of itself; '' where it says nothing.
        num_fewshot: Examples before each question.
        metric: Such as ``acc``.
        filter: How answers were cut out of the text; ``none`` where they were not.
        higher_is_better: None where the task does not say it.
        value: The metric.
        stderr: Its standard error; None where lm-eval gives none.
        num_samples: Samples of the task that were used.
        of_samples: The metric of each sample where the metric is their mean; else empty.
    """

    task: str
    version: str
    num_fewshot: int
    metric: str
    filter: str
    higher_is_better: bool | None
    value: float
    stderr: float | None
    num_samples: int
    of_samples: tuple[float, ...] = ()


class Suite:
    """Loaded tasks; made by :func:`load_suite`.

    Args:
        names: As they were asked for.
        loaded: What ``TaskManager.load`` gave.
        limit: Samples of each task at most; None: all.
    """

    def __init__(self, names: Sequence[str], loaded: Mapping[str, Any], limit: int | None) -> None:
        self.names = tuple(names)
        self._loaded = loaded
        self._limit = limit

    def scores(self, answer: Answer) -> list[TaskScore]:
        """Ask all tasks, and score the answers as lm-eval does.

        Args:
            answer: Answers requests; called once for each of their kinds.

        Raises:
            ConfigError: A task cannot be asked here: it runs code, or shows images.
        """
        from lm_eval import evaluator

        from autoquant_ray.evaluate.tasks.language_model import AnsweringModel

        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        stderr = sys.stderr

        def aloud(kind: str, requests: Sequence[tuple[Any, ...]]) -> Sequence[Any]:
            with redirect_stderr(stderr):
                return answer(kind, requests)

        with redirect_stderr(io.StringIO()):  # a bar for each task
            results = evaluator.evaluate(
                AnsweringModel(aloud),
                dict(self._loaded),
                limit=self._limit,
                bootstrap_iters=_BOOTSTRAPS,
            )
        return list(_scores(results))


def load_suite(names: Sequence[str], folder: str | None, limit: int | None) -> Suite:
    """Load tasks with their data.

    Args:
        names: Tasks or groups of lm-eval, or of the folder.
        folder: With more task files; those of the same name come before lm-eval's.
        limit: Samples of each task at most; None: all.

    Raises:
        ConfigError: lm-eval is not installed, or a name or the folder is unknown.
        DataError: A task's data cannot be read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "`tasks` needs the package lm-eval: pip install -e '.[tasks]' in the checkout"
        )
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"`tasks_dir` {folder} is no folder; give one with task files of lm-eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(names, folder)
    built = [_load(manager, name) for name in names]
    try:
        loaded = manager.load([part for parts in built for part in parts])
    except ValueError as error:  # a task by itself and in a group
        raise ConfigError(f"`tasks` {','.join(names)}: {one_line(error)}") from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "shows images" if getattr(task, "MULTIMODAL", False) else "runs what is answered"
            raise ConfigError(f"`tasks` {name} {what}, which is not done here; leave it out")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return Suite(names, loaded, limit)


def _manager(names: Sequence[str], folder: str | None) -> Any:
    """Knows the folder's tasks; lm-eval's 14,000 too where they are needed."""
    from lm_eval.tasks import TaskManager

    try:
        if folder is not None:
            manager = TaskManager(include_path=folder, include_defaults=False)
            if set(names) <= set(manager.all_tasks):
                return manager
        manager = TaskManager(include_path=folder)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"`tasks_dir` {folder} cannot be read: {one_line(error)}") from None
    available = manager.all_tasks
    for name in names:
        if name not in available:
            near = difflib.get_close_matches(name, available, _MOST_NAMES, cutoff=0.5)
            hint = f"near it are {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
            raise ConfigError(f"`tasks` {name!r} is no task of lm-eval or of `tasks_dir`; {hint}")
    return manager


def _load(manager: Any, name: str) -> list[Any]:
    """A task, or a group, with its data."""
    try:
        built = manager.load([name])
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise DataError(
            f"task {name} or its data cannot be read ({one_line(error, limit=120)}); load it once "
            "where there is a network and set HF_HOME to that cache, or give a copy of the task "
            "whose data_files are local with `tasks_dir`"
        ) from None
    in_groups = {child for children in built["group_map"].values() for child in children}
    roots = {**built["groups"], **built["tasks"]}
    return [part for key, part in roots.items() if key not in in_groups]


def _scores(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    for task, values in results["results"].items():
        samples = results["samples"].get(task, ())
        counts = results["n-samples"].get(task)
        for key, value in values.items():
            metric, comma, filter_ = key.partition(",")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not comma or metric.endswith("_stderr") or not is_number:
                continue
            stderr = values.get(f"{metric}_stderr,{filter_}")
            of_samples = [
                float(sample[metric])
                for sample in samples
                if sample["filter"] == filter_ and isinstance(sample.get(metric), int | float)
            ]
            mean = sum(of_samples) / len(of_samples) if of_samples else None
            is_mean = mean is not None and abs(mean - value) <= 1e-9 * max(1.0, abs(value))
            better = results["higher_is_better"].get(task, {}).get(metric)
            yield TaskScore(
                task=task,
                version=str(results["versions"].get(task, "")),
                num_fewshot=int(results["n-shot"].get(task) or 0),
                metric=metric,
                filter=filter_,
                higher_is_better=better if isinstance(better, bool) else None,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                num_samples=int(counts["effective"] if counts else values.get("sample_len") or 0),
                of_samples=tuple(of_samples) if is_mean else (),
            )
