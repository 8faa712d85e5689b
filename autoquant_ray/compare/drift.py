"""``drift.md``: the comparison of two runs, the verdict first.

The verdict is the first line, then why and what to do, then the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from autoquant_ray.compare.verdict import MIN_REGRET, Comparison, describe_changes
from autoquant_ray.report.markdown import plain_text

_MOST_ROWS = 50
_FACTS = (
    ("Run", "run_id", ""),
    ("Model", "model", ""),
    ("Data", "data", ""),
    ("Predicted KL, nats per token", "predicted_kl_nats", ".5g"),
    ("Effective bits", "effective_bits", ".4f"),
    ("Weights of the whole model, MiB", "weight_bytes", ",.1f"),
    ("Shards", "num_shards", ""),
    ("Shards left out", "num_quarantined", ""),
)


def render_drift(comparison: Comparison, notes: Sequence[str] = (), subject: str = "") -> str:
    """A comparison as GitHub-flavoured Markdown.

    Args:
        comparison: What was found.
        notes: Sentences that the reader must see.
        subject: What was compared, for the first line; default: the two runs.
    """
    runs = (comparison.before["run_id"], comparison.after["run_id"])
    lines = [f"# {comparison.verdict}: {plain_text(subject or ' against '.join(runs))}", ""]
    lines += [plain_text(" ".join(comparison.reasons)), ""]
    lines += [f"**Why:** {plain_text(describe_changes(comparison.changes))}", ""]
    lines += [f"**What to do:** {plain_text(advice(comparison))}", ""]
    lines += _notes(notes)
    lines += _facts(comparison.before, comparison.after)
    if comparison.changes:
        rows = [(c.kind, c.name, c.before, c.after) for c in comparison.changes]
        lines += ["## What changed", "", *_table(("What", "", "Before", "After"), rows)]
    lines += [*_moved(comparison), *_allocations(comparison), *_groups(comparison)]
    correlations = [
        (name, "-" if value is None else f"{value:.4f}")
        for name, value in comparison.spearman.items()
    ]
    lines += ["## Rank correlation of the scores (Spearman)", ""]
    lines += _table(("Format", "Before and after"), correlations)
    return "\n".join(lines).rstrip() + "\n"


def render_baseline(facts: dict[str, Any], notes: Sequence[str], subject: str) -> str:
    """The same for a first run, which has nothing to be compared with."""
    lines = [f"# baseline: {plain_text(subject)}", ""]
    reason = "it is the job's first good run, or its baseline"
    lines += [f"There is nothing to compare it with: {reason}.", ""]
    lines += ["**What to do:** Nothing; the next night is compared with a good one.", ""]
    return "\n".join([*lines, *_notes(notes), *_facts(facts)]).rstrip() + "\n"


def advice(comparison: Comparison) -> str:
    """What the owner of the runs should do, in words."""
    loss = comparison.regret
    relative = None if loss is None else loss.relative
    num_changed = len(comparison.format_changes)
    if loss is None or relative is None:
        judgement = (
            "The later scores cannot judge the earlier allocation: solve again for this model."
        )
    elif relative < MIN_REGRET:
        judgement = (
            "Keep the earlier allocation: by the later scores it is within "
            f"{max(relative, 0):.2%} of the best."
        )
    else:
        judgement = (
            f"By the later scores the earlier allocation loses {relative:.1%} more "
            f"({loss.nats:.3g} nats per token) than the new allocation."
        )
    if comparison.verdict == "same":
        return "Nothing." if not num_changed else f"Nothing is wrong with the scores. {judgement}"
    if comparison.verdict == "noise":
        chance = f" {num_changed} group(s) would change their format by chance." * bool(num_changed)
        return f"Nothing. {judgement}{chance}"
    return f"{_what_to_check(comparison)} {judgement}"


def _what_to_check(comparison: Comparison) -> str:
    kinds = {change.kind for change in comparison.changes}
    if not kinds:
        return (
            "Nothing that a run records explains this: scan again, and look for other hardware or "
            "drivers."
        )
    if "model" in kinds:
        return "Find out whether the model was meant to change, first of all in the groups below."
    if "data" in kinds:
        return "Look at the new data: other text stresses other layers."
    return "Find out whether what changed was meant to."


def _notes(notes: Sequence[str]) -> list[str]:
    return ["## To know", "", *(f"- {plain_text(note)}" for note in notes), ""] if notes else []


def _facts(*sides: dict[str, Any]) -> list[str]:
    rows = [
        (label, *("-" if side[key] is None else format(side[key], spec) for side in sides))
        for label, key, spec in _FACTS
    ]
    names = ("Before", "After") if len(sides) > 1 else ("This run",)
    return ["## Runs", "", *_table(("", *names), rows)]


def _moved(comparison: Comparison) -> list[str]:
    if not comparison.moved:
        return []
    how = {
        "paired": "shard by shard (both runs scored the same samples)",
        "unpaired": "by the standard errors of both runs (t test)",
    }[comparison.test]
    text = (
        f"{comparison.num_tested} scores were compared {how}; false discovery rate "
        f"{comparison.significance:g} (Benjamini-Hochberg). Shown is the format that moved most. A "
        "layer that changed moves the scores of its neighbours too: groups whose own weights "
        "changed come first."
    )
    rows = [
        (
            group.group,
            _has_changed(comparison, group.group),
            "-" if group.change is None else f"{group.change:+.0%}",
            group.format,
            f"{group.before:.3e}",
            f"{group.after:.3e}",
            f"{group.z:+.1f}",
            f"{group.p_value:.1e}",
            str(group.num_formats),
        )
        for group in comparison.moved
    ]
    heads = ("Group", "Weights", "Change", "Format", "Before", "After", "z", "p", "Formats moved")
    return ["## Groups that moved", "", text, "", *_table(heads, rows)]


def _has_changed(comparison: Comparison, group: str) -> str:
    if comparison.changed_weights is None:
        return "unknown"
    return "changed" if group in comparison.changed_weights else "as before"


def _allocations(comparison: Comparison) -> list[str]:
    if not comparison.format_changes:
        return []
    loss = comparison.regret
    lines = ["## Formats that would change", "", "Sizes and scores are those of the later run."]
    if loss is not None:
        lines[-1] += (
            f" The earlier allocation: {loss.kept_nats:.5g} nats per token, "
            f"{loss.kept_bytes / 2**20:,.2f} MiB in the searched groups. The new allocation: "
            f"{loss.own_nats:.5g} nats per token, {loss.own_bytes / 2**20:,.2f} MiB."
        )
    rows = [
        (
            change.group,
            change.before,
            change.after,
            _mebibytes(change.bytes_before),
            _mebibytes(change.bytes_after),
            _number(change.score_before, ".3e"),
            _number(change.score_after, ".3e"),
        )
        for change in comparison.format_changes
    ]
    heads = ("Group", "Before", "After", "MiB", "New MiB", "Score", "New score")
    return [*lines, "", *_table(heads, rows)]


def _groups(comparison: Comparison) -> list[str]:
    rows = [(name, "gone") for name in comparison.only_before]
    rows += [(name, "new") for name in comparison.only_after]
    return ["## Groups of one run only", "", *_table(("Group", ""), rows)] if rows else []


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _mebibytes(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**20:,.3f}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, an empty line after it; the rest of a long one is counted."""
    all_rows = list(rows)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(map(plain_text, row))} |" for row in all_rows[:_MOST_ROWS]]
    if len(all_rows) > _MOST_ROWS:
        lines += ["", f"and {len(all_rows) - _MOST_ROWS} more"]
    return [*lines, ""]
