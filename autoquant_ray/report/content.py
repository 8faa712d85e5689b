"""What a report says, read from a run's files; the writers only lay it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autoquant_ray.errors import StoreError
from autoquant_ray.formats import NONE
from autoquant_ray.latency import LATENCY, describe_prediction
from autoquant_ray.manifest import allocation_key
from autoquant_ray.report.measured import MeasuredData, measured_sections
from autoquant_ray.state import RunState
from autoquant_ray.stopping import describe_stopping
from autoquant_ray.store import SOLUTIONS

_MAX_NAMED = 5
_COSTS = {
    "storage": "stored bits",
    "modelopt": "bits by ModelOpt's cost",
    "active_moe": "bits by ModelOpt's active_moe cost",
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One quantizable layer of the table.

    Attributes:
        sensitivity: Largest score of its group over the menu: what the harshest format would
            cost; None for an unsearched layer.
        note: Why it is not searched.
    """

    name: str
    group: str
    num_bits: float
    sensitivity: float | None
    size_bytes: float
    chosen: str
    note: str | None


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything a report shows.

    Attributes:
        facts: (label, value) lines of the head.
        layers: Sorted by sensitivity, unsearched ones last.
        formats: The menu.
        scores: Group -> format -> (score, standard error or None).
        unit: Unit of the scores.
        warnings: Sentences that the reader must see.
        measured: What evaluations of this solution found.
    """

    title: str
    facts: list[tuple[str, str]]
    layers: list[Layer]
    formats: list[str]
    scores: dict[str, dict[str, tuple[float, float | None]]]
    unit: str
    warnings: list[str]
    measured: list[MeasuredData]


def collect_content(state: RunState, start: str) -> ReportContent:
    """Read the report's content.

    Args:
        state: The run.
        start: Folder of the solution with a trailing slash, or '' for the scan's own.

    Raises:
        StoreError: A file is missing or damaged.
    """
    directory, run = state.directory, state.values
    manifest = directory.read_json(f"{start}manifest.json")
    if not isinstance(manifest, dict) or not {"solution", "budget"} <= set(manifest):
        name = directory.path(f"{start}manifest.json")
        raise StoreError(f"{name} is damaged: it lacks solution or budget; solve the budget again")
    rows = directory.read_table(f"{start}manifest.parquet", "manifest").to_pylist()
    table = directory.read_table("sensitivity.parquet", "sensitivity").to_pylist()
    scores: dict[str, dict[str, tuple[float, float | None]]] = {}
    for row in table:
        scores.setdefault(row["group"], {})[row["format"]] = (row["score"], row["score_stderr"])
    return ReportContent(
        title=f"Quantization plan for {run['model']['name'].rstrip('/').rpartition('/')[2]}",
        facts=_facts(run, manifest, table),
        layers=_layers(rows, scores, run["plan"]["unsearched"]),
        formats=list(dict.fromkeys(row["format"] for row in table)),
        scores=scores,
        unit="no unit (imported)" if "imported_from" in run else "nats per token",
        warnings=_warnings(run, rows),
        measured=_measured(state, start, rows),
    )


def _measured(
    state: RunState, start: str, manifest_rows: list[dict[str, Any]]
) -> list[MeasuredData]:
    if not state.directory.exists("evaluation.parquet"):
        return []
    rows = state.directory.read_table("evaluation.parquet", "evaluation").to_pylist()
    unsearched = state.values["plan"]["unsearched"]
    formats = {r["group"]: r["format"] for r in manifest_rows if r["group"] not in unsearched}
    name = start.removeprefix(f"{SOLUTIONS}/").rstrip("/")
    return measured_sections(rows, name, allocation_key(formats))


def _layers(
    rows: list[dict[str, Any]],
    scores: dict[str, dict[str, tuple[float, float | None]]],
    unsearched: dict[str, str],
) -> list[Layer]:
    layers = [
        Layer(
            name=row["module"],
            group=row["group"],
            num_bits=row["weight_bits"],
            sensitivity=max((s for s, _ in scores.get(row["group"], {}).values()), default=None),
            size_bytes=row["weight_bytes"],
            chosen=row["format"],
            note=unsearched.get(row["group"]),
        )
        for row in rows
    ]
    return sorted(layers, key=lambda x: (x.sensitivity is None, -(x.sensitivity or 0.0)))


def _facts(
    run: dict[str, Any], manifest: dict[str, Any], table: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    solution, config = manifest["solution"], run["config"]
    predicted = solution["predicted_kl_nats"]
    facts = [
        ("Run", run["run_id"]),
        ("Scheme", _scheme(run, table)),
        ("Model", run["model"]["name"]),
        ("Dataset", _dataset(run, table)),
        ("Budget", _budget(manifest["budget"])),
        ("Effective bits (searched groups)", f"{solution['effective_bits']:.4f}"),
        ("Effective bits (all quantizable)", f"{solution['effective_bits_all']:.4f}"),
        ("Effective bits (ModelOpt's cost)", f"{solution['modelopt_effective_bits']:.4f}"),
        ("Weights of the whole model", f"{solution['weight_bytes'] / 2**20:,.1f} MiB"),
        ("Total score", f"{solution['score']:.6g}"),
        ("Predicted KL", _predicted(predicted, config)),
        ("Constraint satisfied", "yes" if solution["is_satisfied"] else "no"),
        ("Optimality gap", f"{solution['optimality_gap']:.2g}"),
    ]
    if LATENCY in solution:
        facts.append(("Predicted decode speed", describe_prediction(solution[LATENCY])))
    if manifest.get("stability"):
        facts += _stability_facts(manifest["stability"])
    stopping = describe_stopping(run)
    if stopping is not None:
        facts.append(("Shards used", stopping))
    if config:
        facts.append(("Compute", f"{config['dtype']} on {config['device']}"))
    return facts


def _stability_facts(stability: dict[str, Any]) -> list[tuple[str, str]]:
    """How sure the plan is, in words."""
    tosses = stability["coin_tosses"]
    named = ", ".join(tosses[:_MAX_NAMED]) + (", ..." if len(tosses) > _MAX_NAMED else "")
    facts = [
        (
            "Decisions",
            f"{stability['num_certain']} of {stability['num_groups']} groups certain (same format "
            f"in 95% of {stability['num_resamples']} resamples of the shards), {len(tosses)} coin "
            f"tosses{': ' + named if tosses else ''}",
        ),
        ("Expected regret", f"{stability['expected_regret']:.2%} of the predicted KL"),
    ]
    if stability["null_score"] is not None:
        facts.append(
            ("Null", f"{stability['null_score']:.4g} would be lost by plans from shuffled scores")
        )
    return facts


def _predicted(predicted: float | None, config: dict[str, Any] | None) -> str:
    if predicted is None:
        return "unknown"
    is_biased = config is not None and config["labels"] == "data"
    note = " (labels from the data: biased, see the README)" if is_biased else ""
    return f"{predicted:.6g} nats per token{note}"


def format_score(entry: tuple[float, float | None] | None) -> str:
    """A score with its standard error where it has one."""
    if entry is None:
        return "-"
    score, error = entry
    return f"{score:.4e}" if error is None else f"{score:.4e} ± {error:.1e}"


def _scheme(run: dict[str, Any], table: list[dict[str, Any]]) -> str:
    formats = ", ".join(dict.fromkeys(row["format"] for row in table))
    config = run["config"]
    if not config:
        return f"{formats}; imported from {run['imported_from']}"
    draws = f" ({config['label_draws']} draws)" if config["label_draws"] > 1 else ""
    share = config.get("sample_rows", 1)  # runs of earlier versions lack it
    rows = "" if share == 1 else f", {share:.0%} of the rows"
    return f"{formats}; {config['estimator']} sums, labels from the {config['labels']}{draws}{rows}"


def _dataset(run: dict[str, Any], table: list[dict[str, Any]]) -> str:
    """What the scores were measured on; where shards were not used, also what there was."""
    dataset = run["dataset"]
    if "num_samples" not in dataset:
        return str(dataset.get("name", "unknown"))
    counts = dataset["counts"]
    shards = table[0]["num_shards"] if table else 0
    used = run.get("used", dataset)
    if used["num_samples"] < dataset["num_samples"]:
        amount = (
            f"{used['num_tokens']} of {dataset['num_tokens']} tokens, {used['num_samples']} of "
            f"{dataset['num_samples']} samples (at most {dataset['max_samples']})"
        )
    else:
        amount = (
            f"{dataset['num_tokens']} tokens, {dataset['num_samples']} of at most "
            f"{dataset['max_samples']} samples"
        )
    text = (
        f"{dataset['name']}: {amount}, sequence length {dataset['seq_len']}, {shards} of "
        f"{dataset['num_shards']} batches (shards)"
    )
    notes = [f"{counts[key]} {key.replace('_', ' ')}" for key in ("cut", "empty", "too_short")]
    return f"{text}; {', '.join(notes)}"


def _budget(budget: dict[str, Any]) -> str:
    parts = []
    if budget["bits"] is not None:
        over = "searched groups" if budget["bits_over"] == "searched" else "all quantizable weights"
        cost = _COSTS[budget["cost"]]
        parts.append(f"{budget['bits']:g} {cost} over {over}")
    if budget["bytes"] is not None:
        parts.append(f"{budget['bytes']} bytes for the whole model")
    if budget.get("latency"):
        parts += _speed(budget["latency"])
    if budget["max_formats"] is not None:
        parts.append(f"at most {budget['max_formats']} formats")
    parts.extend(f"{group} = {format_}" for group, format_ in budget["pins"].items())
    parts.extend(f"{pattern} in {', '.join(f)}" for pattern, f in budget["allow"].items())
    return "; ".join(parts)


def _speed(latency: dict[str, Any]) -> list[str]:
    """The speed asked for; empty where only a prediction was."""
    limits = {
        "ms_per_token": "at most {:g} ms per token",
        "tokens_per_second": "at least {:g} tokens/s",
    }
    return [
        f"{text.format(latency[key])} on {latency['hardware']['name']}"
        for key, text in limits.items()
        if latency[key] is not None
    ]


def _warnings(run: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    warnings = [
        f"Shard {entry['shard']} was left out while {entry['stage']}: {entry['reason']}"
        for entry in run["quarantined"]
    ]
    chosen = {row["group"]: row["format"] for row in rows}
    for group in run["plan"]["tied_groups"]:
        if chosen.get(group, NONE) == NONE:
            text = "it stays in 16 bits and shares the embedding's bytes"
        else:
            added = sum(row["weight_bytes"] for row in rows if row["group"] == group)
            text = (
                "quantized, it is stored beside the embedding and adds "
                f"{added / 2**20:,.1f} MiB to the model. A budget in bytes counts that; one in "
                "bits counts it as a saving"
            )
        warnings.append(f"{group} is tied to the input embedding: {text}.")
    others = run["plan"]["other_modules"]
    if others:
        names = ", ".join(list(others)[:3]) + (", ..." if len(others) > 3 else "")
        warnings.append(
            f"{len(others)} modules hold matrices that stay in 16 bits, not searched: {names}"
        )
    return warnings
