"""Records which data chose a solution, so that such data is never treated as unseen.

An audit or a refinement chooses an allocation on some parts of the data
(:func:`~autoquant_ray.evaluate.allocation_search.split_shards`): an audit on the first, a
refinement on the first two. The ``chosen_on`` list of the solution's ``manifest.json`` says so, and
solutions made from it inherit the list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import ConfigError
from autoquant_ray.evaluate.allocation_search import split_shards
from autoquant_ray.runs.names import MANIFEST_JSON

if TYPE_CHECKING:
    from autoquant_ray.config.evaluation import EvaluationConfig
    from autoquant_ray.evaluate.measurement import Measurement


def chosen_on(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Data that chose a solution: ``data_key``, ``source`` and ``num_parts`` of each data set."""
    if "chosen_on" in manifest:
        return list(manifest["chosen_on"])
    refinement = manifest.get("refinement")  # manifests of earlier versions
    if refinement is None:
        return []
    return [{"data_key": refinement["data_key"], "source": refinement["source"], "num_parts": 2}]


def chosen_also_on(
    manifest: Mapping[str, Any], measurement: Measurement, num_parts: int
) -> list[dict[str, Any]]:
    """The ``chosen_on`` list of a solution that was made from another by measurement.

    Args:
        manifest: Manifest of the original solution.
        measurement: The data that chose the new solution.
        num_parts: Number of its parts that did.
    """
    entries = {entry["data_key"]: entry for entry in chosen_on(manifest)}
    before = entries.get(measurement.data_key, {"num_parts": 0})["num_parts"]
    entries[measurement.data_key] = {
        "data_key": measurement.data_key,
        "source": measurement.facts["source"],
        "num_parts": max(before, num_parts),
    }
    return list(entries.values())


def made_from(command: str, config: EvaluationConfig, **options: Any) -> dict[str, Any]:
    """The ``made_from`` object of a solution chosen by measurement: how to make it again.

    Args:
        command: ``refine`` or ``evaluate``.
        config: The config that was given.
        options: Further options of the command.
    """
    left_out = {"run", "against", "num_random", "workers", "address"}
    given = config.model_dump(mode="json", exclude_defaults=True, exclude=left_out)
    given.pop("solution", None)
    return {"command": command, "solution": config.solution, "options": given | options}


def untouched_shards(measurement: Measurement, folder: str) -> list[int] | None:
    """Shards that played no part in choosing a solution; None if none of them did.

    Args:
        measurement: The data.
        folder: Folder of the solution with a trailing slash, or '' for the scan's own.

    Raises:
        ConfigError: The solution was chosen on the same data cut into other samples, so that these
            shards are unknown.
    """
    manifest = measurement.state.directory.read_json(f"{folder}{MANIFEST_JSON}")
    entries = [e for e in chosen_on(manifest) if e["source"] == measurement.facts["source"]]
    for entry in entries:
        if entry["data_key"] != measurement.data_key:
            raise ConfigError(
                f"{folder.rstrip('/')} was chosen on this data cut in another way; give the "
                "`samples` and `seq_len` of its refinement or audit, so that only samples that "
                "played no part in it are measured, or give other data with `data`"
            )
    if not entries:
        return None
    parts = split_shards(measurement.facts["num_shards"])
    (num_parts,) = {entry["num_parts"] for entry in entries}
    return [shard for part in parts[num_parts:] for shard in part]
