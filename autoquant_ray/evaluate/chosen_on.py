"""Which data chose a solution, so that it is never measured on as if it were unseen.

Whoever chooses a plan by measurement uses some of the parts of the data
(:func:`~autoquant_ray.evaluate.plan_search.split_shards`) and says so in the ``chosen_on`` list of
the plan's ``manifest.json``: an audit uses the first part, a refinement the first two. What is made
from such a plan inherits its list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import ConfigError
from autoquant_ray.evaluate.plan_search import split_shards

if TYPE_CHECKING:
    from autoquant_ray.config.evaluation import EvaluationConfig
    from autoquant_ray.evaluate.measurement import Measurement


def chosen_on(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What chose a solution: ``data_key``, ``source`` and ``num_parts`` of each data set."""
    if "chosen_on" in manifest:
        return list(manifest["chosen_on"])
    refinement = manifest.get("refinement")  # of an earlier version
    if refinement is None:
        return []
    return [{"data_key": refinement["data_key"], "source": refinement["source"], "num_parts": 2}]


def chosen_also_on(
    manifest: Mapping[str, Any], measurement: Measurement, num_parts: int
) -> list[dict[str, Any]]:
    """The ``chosen_on`` list of a solution that is made from another one by measurement.

    Args:
        manifest: Of the solution that it began with.
        measurement: The data that chooses.
        num_parts: How many of its parts.
    """
    marks = {mark["data_key"]: mark for mark in chosen_on(manifest)}
    before = marks.get(measurement.data_key, {"num_parts": 0})["num_parts"]
    marks[measurement.data_key] = {
        "data_key": measurement.data_key,
        "source": measurement.facts["source"],
        "num_parts": max(before, num_parts),
    }
    return list(marks.values())


def made_from(command: str, config: EvaluationConfig, **options: Any) -> dict[str, Any]:
    """The ``made_from`` object of a solution that measurements made: what makes it again.

    Args:
        command: ``refine`` or ``evaluate``.
        config: As it was given.
        options: Further ones of the command.
    """
    left_out = {"run", "against", "num_random", "workers", "address"}
    given = config.model_dump(mode="json", exclude_defaults=True, exclude=left_out)
    given.pop("solution", None)
    return {"command": command, "solution": config.solution, "options": given | options}


def untouched_shards(measurement: Measurement, start: str) -> list[int] | None:
    """Shards that played no part in choosing a solution; None for all.

    Args:
        measurement: The data.
        start: Folder of the solution with a trailing slash, or '' for the scan's own.

    Raises:
        ConfigError: It was chosen on the same data cut in another way, so that this cannot be told.
    """
    manifest = measurement.state.directory.read_json(f"{start}manifest.json")
    marks = [m for m in chosen_on(manifest) if m["source"] == measurement.facts["source"]]
    for mark in marks:
        if mark["data_key"] != measurement.data_key:
            raise ConfigError(
                f"{start.rstrip('/')} was chosen on this data cut in another way; use the "
                "--samples and --seq-len of its refinement or audit, so that only what chose "
                "nothing is measured, or other data with --data"
            )
    if not marks:
        return None
    parts = split_shards(measurement.facts["num_shards"])
    (num_parts,) = {mark["num_parts"] for mark in marks}
    return [shard for part in parts[num_parts:] for shard in part]
