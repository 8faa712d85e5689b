"""Import an AutoQuant JSON manifest, as tooling around ``mtq.auto_quantize`` writes it.

Each entry of ``layer_sensitivity`` becomes a group of one module, in the manifest's order. Its
costs are in 16-bit weight equivalents (weights times bits over 16), so both of our costs are
derived from them. Its scores have no unit; no KL is predicted from them.

Where ModelOpt missed its target (``is_satisfied`` is false), what it reached is the budget.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from autoquant_ray.allocate.options import UNQUANTIZED_BITS, SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import check_feasible
from autoquant_ray.errors import DataError, one_line
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.lease import brief_lease
from autoquant_ray.runs.names import PLAN_FILE, SENSITIVITY_FILE
from autoquant_ray.runs.record import RunRecord
from autoquant_ray.runs.state import Mode, RunState, new_record, require_target
from autoquant_ray.solve import Solution, solve_run

logger = logging.getLogger(__name__)

_MOST_WEIGHTS = 2.0**53
_SUFFIX = ".quant_recipe"
_FORMAT = re.compile(r"^(?P<name>.+)\(effective-bits: (?P<bits>[0-9.]+)\)$")


def import_manifest(path: str, directory: RunDirectory, *, overwrite: bool = False) -> Solution:
    """Write a run from a manifest, and solve the manifest's own budget.

    Args:
        path: The JSON file.
        directory: Where to write the run.
        overwrite: Replace a run that is there.

    Raises:
        DataError: The file is missing or is not such a manifest; names the place.
        InfeasibleBudgetError: The manifest's own budget cannot be met.
        StoreError: The run exists.
    """
    manifest = _read(path)
    rows, scores = _rows(path, manifest)
    wanted = _budget_bits(path, manifest)
    bits = _reached_bits(manifest, rows, wanted)
    mode: Mode = "overwrite" if overwrite else "new"
    require_target(directory, mode, "`overwrite`")
    options = SolveOptions(bits=bits, bits_over="all", cost="modelopt")
    state = RunState(directory, _record(path, directory, manifest, rows))
    if bits != wanted:
        state.record.import_note = (
            f"its target of {wanted:g} bits was missed (is_satisfied: false), so the budget is the "
            f"{bits:.4f} bits that were reached"
        )
        logger.warning("manifest %s: %s", path, state.record.import_note)
    check_feasible(Problem.from_plan(rows, state.plan), options)
    with brief_lease(directory):
        require_target(directory, mode, "`overwrite`")
        with directory.together(is_new=True):
            state.save()
            directory.write_table(PLAN_FILE, rows)
            directory.write_table(SENSITIVITY_FILE, scores)
            directory.append_event("imported", source=path)
            return solve_run(directory, options, folder="")


def _read(path: str) -> dict[str, Any]:
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"manifest {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"manifest {path} is not readable JSON: {one_line(error)}") from None
    try:
        json.dumps(manifest, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"manifest {path} holds half of a surrogate pair, which is no text; write it anew"
        ) from None
    layers = manifest.get("layer_sensitivity") if isinstance(manifest, dict) else None
    if not isinstance(layers, dict) or not layers:
        raise DataError(
            f"manifest {path} has no 'layer_sensitivity' mapping of layers; a file of AutoRound, "
            "mlx-lm or llm-compressor goes into a scanned run: `into` RUN"
        )
    for section in ("scheme", "model", "dataset", "autoquant_state"):
        if not isinstance(manifest.get(section) or {}, dict):
            raise DataError(f"manifest {path}: {section} must be a mapping")
    return dict(manifest)


def _rows(
    path: str, manifest: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of ``plan.parquet`` and of ``sensitivity.parquet``."""
    plan_rows: list[dict[str, Any]] = []
    score_rows: list[dict[str, Any]] = []
    for key, layer in manifest["layer_sensitivity"].items():
        module = key.removesuffix(_SUFFIX)
        if key != module and module in manifest["layer_sensitivity"]:
            raise DataError(f"manifest {path}: layer_sensitivity has {module!r} and {key!r}")
        choices = _choices(path, key, layer)
        weights = _num_weights(path, key, choices)
        for format_, (score, cost) in choices.items():
            plan_rows.append(
                {
                    "group": module,
                    "format": format_,
                    "module_names": [module],
                    "num_weights": weights,
                    "weight_bits": cost * UNQUANTIZED_BITS / weights,
                    "weight_bytes": cost * UNQUANTIZED_BITS / 8,
                    "modelopt_cost": cost,
                    "is_searched": list(choices) != [NONE],
                }
            )
            if format_ != NONE:
                score_rows.append(_score_row(plan_rows[-1], score))
    if not score_rows:
        raise DataError(f"manifest {path}: no entry of layer_sensitivity has a format but NONE")
    return plan_rows, score_rows


def _choices(path: str, key: str, layer: Any) -> dict[str, tuple[float, float]]:
    """Format name -> (score, cost), in the manifest's order."""

    def refuse(problem: str) -> NoReturn:
        raise DataError(f"manifest {path}: layer_sensitivity[{key!r}] {problem}")

    if not isinstance(layer, dict) or not {"formats", "scores", "costs"} <= set(layer):
        refuse("must have formats, scores and costs")
    columns = [layer["formats"], layer["scores"], layer["costs"]]
    if not all(isinstance(column, list) for column in columns):
        refuse("must have lists of formats, scores and costs")
    if len({len(column) for column in columns}) != 1 or not columns[0]:
        refuse("has lists of different or no length")
    choices: dict[str, tuple[float, float]] = {}
    for text, score, cost in zip(*columns, strict=True):
        match = _FORMAT.match(str(text))
        name = (match["name"] if match else str(text)).strip()
        if not (_is_number(score) and _is_number(cost)):
            refuse(f"has a score or cost for {name} that is not a number of at least 0")
        if cost > _MOST_WEIGHTS:
            refuse(f"has a cost for {name} of {cost:g}, more weights than any model has")
        choices[NONE if name == "NONE" else name] = (float(score), float(cost))
    if len(choices) != len(columns[0]):
        refuse("names a format twice")
    return choices


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number of at least 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= sys.float_info.max


def _num_weights(path: str, key: str, choices: Mapping[str, tuple[float, float]]) -> int:
    if NONE not in choices or round(choices[NONE][1]) < 1:
        raise DataError(
            f"manifest {path}: layer_sensitivity[{key!r}] needs the format NONE with a cost of "
            "at least 1, which tells the number of weights"
        )
    return round(choices[NONE][1])


def _score_row(plan_row: Mapping[str, Any], score: float) -> dict[str, Any]:
    return {
        "group": plan_row["group"],
        "format": plan_row["format"],
        "score": score,
        "modelopt_score": score,
        "weight_bits": plan_row["weight_bits"],
        "weight_bytes": plan_row["weight_bytes"],
    }


def _budget_bits(path: str, manifest: Mapping[str, Any]) -> float:
    scheme = manifest.get("scheme") or {}
    state = manifest.get("autoquant_state") or {}
    wanted = scheme.get("auto_quantize_bits")
    if wanted is None:
        constraints = state.get("constraints")
        wanted = constraints.get("effective_bits") if isinstance(constraints, dict) else None
    if wanted is None:
        raise DataError(
            f"manifest {path} has no scheme.auto_quantize_bits and no "
            "autoquant_state.constraints.effective_bits"
        )
    if not (_is_number(wanted) and 0 < wanted <= UNQUANTIZED_BITS):
        raise DataError(
            f"manifest {path}: the budget {wanted!r} (scheme.auto_quantize_bits, else "
            "autoquant_state.constraints.effective_bits) is not a number above 0 and at most 16"
        )
    return float(wanted)


def _reached_bits(manifest: Mapping[str, Any], rows: list[dict[str, Any]], wanted: float) -> float:
    """The bits of the manifest's allocation where it missed its target, else the target.

    Where the manifest does not say them, they are the fewest that its formats allow.
    """
    state = manifest.get("autoquant_state") or {}
    places = [part for part in (state, state.get("best"), manifest) if isinstance(part, dict)]
    if not any(part.get("is_satisfied") is False for part in places):
        return wanted
    costs: dict[str, list[float]] = {}
    for row in rows:
        costs.setdefault(row["group"], []).append(row["modelopt_cost"])
    total = sum(map(max, costs.values()))
    fewest = UNQUANTIZED_BITS * sum(map(min, costs.values())) / total
    stated = [part["constraints"] for part in places if isinstance(part.get("constraints"), dict)]
    reached = [bits for entry in stated if _is_number(bits := entry.get("effective_bits"))]
    return max(fewest, *(float(bits) for bits in reached if bits <= UNQUANTIZED_BITS), wanted)


def _record(
    path: str, directory: RunDirectory, manifest: Mapping[str, Any], rows: list[dict[str, Any]]
) -> RunRecord:
    weights = {row["group"]: row["num_weights"] for row in rows}
    names = list(dict.fromkeys(row["format"] for row in rows if row["format"] != NONE))
    unsearched = [row["group"] for row in rows if not row["is_searched"]]
    dataset = manifest.get("dataset") or {}
    model = manifest.get("model") or {}
    entries = {
        "imported_from": path,
        "config": None,
        "model": {"name": str(model.get("id", "unknown")), "fingerprint": None},
        "dataset": {"name": str(dataset.get("name", "unknown")), "source": dataset},
        "fingerprints": {},
        "plan": {
            "formats": [{"name": name} for name in names],
            "modules": {name: {"prefixes": [""], "shapes": [[n]]} for name, n in weights.items()},
            "unsearched": dict.fromkeys(unsearched, "the manifest offers only NONE"),
            "tied_groups": [],
            "other_bytes": 0,
            "other_modules": {},
        },
    }
    return new_record(directory, entries)
