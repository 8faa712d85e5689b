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
    if "num_loss_tokens" in data:
        notes.append(f"{data['num_loss_tokens']} tokens in the loss")
        notes.append(f"{data['num_samples_with_images']} samples with images")
    if counts.get("no_answer"):
        notes.append(f"{counts['no_answer']} without an answer")
    if counts.get("bad"):
        notes.append(f"{counts['bad']} skipped, the first because of {data['bad_samples'][0]}")
    return f"{text}; {', '.join(notes)}"
