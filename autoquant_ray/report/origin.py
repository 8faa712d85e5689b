"""What a plan was made from, in words: menu, scoring, data."""

from __future__ import annotations

from typing import Any


def scheme(run: dict[str, Any], table: list[dict[str, Any]]) -> str:
    """The menu, and how it was scored."""
    formats = ", ".join(dict.fromkeys(row["format"] for row in table))
    config = run["config"]
    if not config:
        return f"{formats}; imported from {run['imported_from']}"
    draws = f" ({config['label_draws']} draws)" if config["label_draws"] > 1 else ""
    share = config.get("sample_rows", 1)  # runs of earlier versions lack it
    rows = "" if share == 1 else f", {share:.0%} of the rows"
    return f"{formats}; {config['estimator']} sums, labels from the {config['labels']}{draws}{rows}"


def dataset(run: dict[str, Any], table: list[dict[str, Any]]) -> str:
    """What the scores were measured on; where shards were not used, also what there was."""
    data = run["dataset"]
    if "num_samples" not in data:
        return str(data.get("name", "unknown"))
    counts = data["counts"]
    shards = table[0]["num_shards"] if table else 0
    used = run.get("used", data)
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
    return f"{text}; {', '.join(notes)}"
