"""The facts of a report: what was scanned, the result, and how certain it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from textwrap import shorten
from typing import Any

from autoquant_ray.allocate.certainty.stopping import describe_stopping
from autoquant_ray.allocate.latency import LATENCY, describe_prediction
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.kv_cache import KV_BYTES
from autoquant_ray.models.quantized_source import describe_source
from autoquant_ray.plan.carried import describe_carried
from autoquant_ray.report.headline import budget_text
from autoquant_ray.report.sources import Sources
from autoquant_ray.runs.record import RunRecord
from autoquant_ray.wording import with_error

MEANINGS = {
    "Scheme": "The formats that were tried; of a scan also how gradients and output differences "
    "are summed, and whose labels the gradients are of.",
    "Effective bits (searched groups)": "Stored bits per weight, scales included.",
    "Effective bits (ModelOpt's cost)": "Number of weights x the smaller of weight and input bits, "
    "without scales, whatever is stored.",
    "Total score": "Sum of the chosen formats' scores.",
    "Optimality gap": "0 when the allocation is proven to be the best of all for these scores.",
    "Expected regret": "What the allocation is expected to lose because its scores are estimates; "
    "from the resamples, and too high rather than too low.",
    "Null": "The budget solved as if each group had the scores of another, drawn at random: what "
    "such allocations are predicted to lose, on average.",
}
"""Labels that need a line of explanation -> it."""
_MAX_NAMED = 5
_LONGEST_REASON = 120
"""Characters of why a sample was skipped: it may quote a template or a whole message."""


def report_facts(sources: Sources) -> list[tuple[str, str]]:
    """Collect (label, value) pairs."""
    run, manifest, table = sources.run, sources.manifest, sources.scored.rows
    solution, config = manifest["solution"], run.config
    facts = [
        ("Run", run.run_id),
        ("Scheme", scheme(run, table)),
        ("Model", run.model["name"]),
        *_source_facts(run),
        ("Dataset", dataset(run, table)),
        ("Budget", budget_text(manifest["budget"])),
        ("Effective bits (searched groups)", f"{solution['effective_bits']:.4f}"),
        ("Effective bits (all quantizable)", f"{solution['effective_bits_all']:.4f}"),
        ("Effective bits (ModelOpt's cost)", f"{solution['modelopt_effective_bits']:.4f}"),
        ("Weights of the whole model", f"{solution['weight_bytes'] / 2**20:,.1f} MiB"),
        *_carried_facts(run),
        *_cache_facts(sources),
        ("Total score", f"{solution['score']:.6g}"),
        ("Predicted KL", _predicted(sources)),
        *_drawing_facts(table),
        ("Constraint satisfied", "yes" if solution["is_satisfied"] else "no"),
        ("Optimality gap", f"{solution['optimality_gap']:.2g}"),
    ]
    for row, *_ in sources.measured:
        value = with_error(row["kl_mean"], row["kl_stderr"])
        facts.append(("Measured KL", f"{value} nats per token on {row['dataset']}"))
    if LATENCY in solution:
        facts.append(("Predicted decode speed", describe_prediction(solution[LATENCY])))
    if manifest.get("stability") and not sources.is_by_measurement:
        what = "weighted loss of the domains" if sources.is_by_domain else "predicted KL"
        facts += _stability_facts(manifest["stability"], what)
    stopping = describe_stopping(run)
    if stopping is not None:
        facts.append(("Shards used", stopping))
    if config:
        facts.append(("Compute", f"{config['dtype']} on {config['device']}"))
    return facts


def _source_facts(run: RunRecord) -> list[tuple[str, str]]:
    """The format of a checkpoint that was quantized already; empty for others."""
    format_ = None if run.plan is None else run.plan.get("source_format")
    return [] if format_ is None else [("Source", describe_source(format_))]


def _carried_facts(run: RunRecord) -> list[tuple[str, str]]:
    """Tensors that are not loaded; empty where there are none."""
    carried = run.plan.get("carried") if run.plan else None
    return [("Carried", describe_carried(carried))] if carried else []


def _cache_facts(sources: Sources) -> list[tuple[str, str]]:
    """Size of the KV cache per token of context; empty where no cache was searched."""
    size = sources.manifest["solution"].get(KV_BYTES)
    if size is None:
        return []
    whole = sum(group.cost(NONE, KV_BYTES) for group in sources.scored.problem.groups.values())
    return [("KV cache", f"{size:,.0f} bytes per token of context, {whole:,.0f} in 16 bits")]


def _drawing_facts(table: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The error of drawing rows beside that over the shards; empty where all were scored."""
    drawn = [row for row in table if row["sampling_stderr"]]
    ratios = [r["sampling_stderr"] / r["score_stderr"] for r in drawn if r["score_stderr"]]
    if not ratios:
        return []
    return [
        (
            "Rows drawn",
            f"for {len(drawn)} of {len(table)} scores; the error of the draw is "
            f"{median(ratios):.2g} of a score's standard error over the shards (median), "
            f"{max(ratios):.2g} at most",
        )
    ]


def _stability_facts(stability: dict[str, Any], what: str) -> list[tuple[str, str]]:
    """How certain the solution is, in words.

    Args:
        stability: The ``stability`` object of ``manifest.json``.
        what: The quantity that the solution minimizes.
    """
    tosses = stability["coin_tosses"]
    named = ", ".join(tosses[:_MAX_NAMED]) + (", ..." if len(tosses) > _MAX_NAMED else "")
    facts = [
        (
            "Decisions",
            f"{stability['num_certain']} of {stability['num_groups']} groups certain (same format "
            f"in 95% of {stability['num_resamples']} resamples of the shards), {len(tosses)} coin "
            f"tosses{': ' + named if tosses else ''}",
        ),
        ("Expected regret", f"{stability['expected_regret']:.2%} of the {what}"),
    ]
    if stability["null_score"] is not None:
        facts.append(("Null", f"{stability['null_score']:.4g}: {what} with shuffled scores"))
    return facts


def _predicted(sources: Sources) -> str:
    predicted, error = sources.manifest["solution"]["predicted_kl_nats"], sources.error
    if predicted is None:
        return "unknown"
    if error is None:
        return f"{predicted:.6g} nats per token"
    kind = "standard error of the total over shards"
    if error.is_bound:
        kind = "at most; sum of the scores' standard errors"
    return f"{predicted:.6g} ± {error.stderr:.2g} nats per token ({kind})"


def scheme(run: RunRecord, table: Sequence[Mapping[str, Any]]) -> str:
    """The menu of formats, and how it was scored."""
    formats = ", ".join(dict.fromkeys(row["format"] for row in table))
    config = run.config
    if not config:
        note = "" if run.import_note is None else f"; {run.import_note}"
        return f"{formats}; imported from {run.imported_from}{note}"
    draws = f" ({config['label_draws']} draws)" if config["label_draws"] > 1 else ""
    share = config.get("sample_rows", 1)  # not in runs of earlier versions
    if share == "auto":
        shares = [row["row_share"] for row in table]
        share = sum(shares) / len(shares)
    rows = "" if share == 1 else f", {share:.0%} of the rows"
    dtype = config.get("difference_dtype")
    types = "" if dtype in (None, config.get("dtype")) else str(dtype).replace("+", " and ")
    products = types and f", differences in {types}"
    labels = f"labels from the {config['labels']}{draws}"
    return f"{formats}; {config['estimator']} sums, {labels}{rows}{products}"


def dataset(run: RunRecord, table: Sequence[Mapping[str, Any]]) -> str:
    """The data of the scores; where some shards were not used, also how much there was."""
    data = run.dataset
    if "num_samples" not in data:
        return str(data.get("name", "unknown"))
    counts = data["counts"]
    shards = table[0]["num_shards"] if table else 0
    used = run.used or data
    if used["num_samples"] < data["num_samples"]:
        amount = (
            f"{used['num_tokens']} of {data['num_tokens']} tokens, {used['num_samples']} of "
            f"{data['num_samples']} samples (at most {data['max_samples']})"
        )
    else:
        amount = (
            f"{data['num_tokens']} tokens, {data['num_samples']} of at most "
            f"{data['max_samples']} samples"
        )
    text = (
        f"{data['name']}: {amount}, sequence length {data['seq_len']}, {shards} of "
        f"{data['num_shards']} batches (shards)"
    )
    notes = [f"{counts[key]} {key.replace('_', ' ')}" for key in ("cut", "empty", "too_short")]
    if "num_loss_tokens" in data:
        notes.append(f"{data['num_loss_tokens']} tokens in the loss")
        notes.append(f"{data['num_samples_with_images']} samples with images")
    if num_held_out := data.get("num_held_out"):
        notes.append(f"the last {num_held_out} samples kept for measurements")
    if counts.get("no_answer"):
        notes.append(f"{counts['no_answer']} without an answer")
    if counts.get("bad"):
        reason = shorten(str(data["bad_samples"][0]), _LONGEST_REASON)
        notes.append(f"{counts['bad']} skipped, the first because of {reason}")
    return f"{text}; {', '.join(notes)}"
