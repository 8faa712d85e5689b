"""Scores for the rival ``modelopt-shapley``: ModelOpt's path integrals on the scan's own samples.

They are computed once, by a single worker that holds the whole model, and kept below
``RUN/evaluation/``.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.config.expert_groups import is_apart
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.distributed.task import ShardTask
from autoquant_ray.errors import ConfigError, WorkerError
from autoquant_ray.evaluate.held_out import shapley_key
from autoquant_ray.evaluate.measurement import Measurement
from autoquant_ray.formats.algorithms import AWQ_LITE, MAX
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.gguf_types import gguf_type_of
from autoquant_ray.formats.smoothed import method_of
from autoquant_ray.runs.names import EVALUATION, SHAPLEY, part_name
from autoquant_ray.runs.state import RunState
from autoquant_ray.stages.shards import tasks_of
from autoquant_ray.wording import few

logger = logging.getLogger(__name__)

_SINCE = (0, 48)
_METHODS = (MAX, AWQ_LITE)
_MOST_NAMED = 4


def require_shapley(state: RunState) -> None:
    """Check that ModelOpt can score a run by path integrals.

    Args:
        state: The run.

    Raises:
        ConfigError: ModelOpt is too old, or cannot take a format, the experts or the placement.
        StoreError: The run was imported.
    """
    version = importlib.metadata.version("nvidia-modelopt")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _SINCE:
        raise ConfigError(
            f"modelopt-shapley needs nvidia-modelopt >= 0.48; {version} is installed: upgrade it, "
            "or leave modelopt-shapley out of `against`"
        )
    scan = ScanConfig.model_validate(state.config)
    require_menu(state.plan["formats"])
    if is_apart(scan.expert_groups):
        raise ConfigError(
            "modelopt-shapley scores the experts of a layer together, but this run has "
            f"`expert_groups` {scan.expert_groups}; leave it out of `against`"
        )
    if scan.placement in ("offload", "split"):
        raise ConfigError(
            "modelopt-shapley needs the whole model on one device, but this run has `placement` "
            f"{scan.placement}; leave it out of `against`"
        )


def require_menu(menu: Sequence[Mapping[str, Any]]) -> None:
    """Check that ModelOpt's search takes every format of a run.

    Args:
        menu: Formats as ``run.json`` has them.

    Raises:
        ConfigError: It does not; names them.
    """
    refused = [text for entry in menu for text in _refusals(Format.from_json({**entry}))]
    if refused:
        raise ConfigError(
            f"modelopt-shapley cannot score {few(refused, _MOST_NAMED)}; scan with formats that "
            "ModelOpt's search takes, such as wint4_afp16:max, or leave it out of `against`"
        )


def _refusals(format_: Format) -> Iterator[str]:
    """Why ModelOpt's search does not take a format; nothing where it does."""
    if format_.kv is not None:
        yield f"{format_.name} (KV cache)"
    elif gguf_type_of(format_.weight) is not None:
        yield f"{format_.name} (type of GGUF files)"
    elif method_of(format_) not in _METHODS:
        yield f"{format_.name} (method {method_of(format_)})"


def shapley_scores(run: ScoredRun, measurement: Measurement) -> dict[tuple[str, str], float]:
    """(group, format) -> ModelOpt's score, without unit; computed where the run has none.

    Raises:
        WorkerError: They could not be computed.
        StoreError: The part is damaged.
    """
    directory = run.state.directory
    key = shapley_key(run.state, [group.name for group in run.problem.searched])
    name = part_name(f"{EVALUATION}/{key}/{SHAPLEY}", 0)
    if not directory.exists(name):
        directory.write_table(name, _compute(run, measurement))
    rows = directory.read_table(name).to_pylist()
    if not all(row["is_valid"] for row in rows):
        logger.warning("modelopt-shapley: ModelOpt calls the fit behind its scores not valid")
    return {(row["group"], row["format"]): row["score"] for row in rows}


def _compute(run: ScoredRun, measurement: Measurement) -> list[dict[str, Any]]:
    samples = [sample for task in tasks_of(run.state, ()) for sample in task.samples]
    logger.info("modelopt-shapley: ModelOpt scores %d samples in a single worker", len(samples))
    task = ShardTask(shard=0, first_sample=0, samples=samples)
    outcomes = measurement.score_paths(task)
    with closing(outcomes):
        (outcome,) = outcomes
    if outcome.reason is not None:
        raise WorkerError(f"modelopt-shapley: {outcome.reason}")
    result = outcome.result
    return [
        {"group": group, "format": format_, "score": score, "is_valid": result.is_valid}
        for (group, format_), score in result.scores.items()
    ]
