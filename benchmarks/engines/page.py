"""Writes the table of what real tools read into ``docs/engines.md``, from ``results.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
_START = "<!-- real tools: made by make engines -->\n"
_END = "<!-- end of real tools -->\n"


def write_page() -> None:
    """Make the table anew; the text around it stays."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(_START)
    after = rest.partition(_END)[2]
    table = results_table(json.loads(RESULTS.read_text()))
    PAGE.write_text(f"{before}{_START}{table}{_END}{after}", encoding="utf-8")


def results_table(rows: list[dict[str, Any]]) -> str:
    """A line per tool, case and model."""
    lines = [
        "| tool | read | model | layers of the planned kind | formats | outputs of layers, at most "
        "| loss of weights, of the plan's | text, nats per token | noise of the plan | date |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_line, rows), ""])


def _line(row: dict[str, Any]) -> str:
    versions = row.get("versions", {"": row["tool"]})
    tool = ", ".join(f"{name} {version}".strip() for name, version in versions.items())
    if "num_layers" in row:
        layers = f"{row['num_right']} of {row['num_layers']}"
    elif "refused" in row:
        layers = f"refused: `{row['refused']}`"
    else:
        layers = f"none: {row['wrong'][0].splitlines()[-1][:120]}"
    output, text, noise = (
        _number(row, key) for key in ("worst_output_error", "difference", "noise")
    )
    losses = " to ".join(f"{ratio:.2f}" for ratio in row.get("weight_losses", ())) or "-"
    numbers = [str(row.get("num_formats", "-")), output, losses, text, noise]
    cells = [tool, row["case"], row["model"], layers, *numbers]
    return f"| {' | '.join([*cells, row['date']])} |"


def _number(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.2g}" if key in row else "-"
