"""Writes the tables of the pages that are made from the code: ``python docs/update.py``.

A test fails when a page and the code differ.
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from autoquant_ray.distributed.metrics import METRICS
from autoquant_ray.engine_formats import layer_algo
from autoquant_ray.engine_table import FUSED, TABLE
from autoquant_ray.events import Event
from autoquant_ray.formats import PAIRS, Format
from autoquant_ray.tool_formats import COUNTERPARTS

FOLDER = Path(__file__).parent
PAGE, ENGINES_PAGE = FOLDER / "metrics-and-events.md", FOLDER / "engines.md"
_JSON_TYPES = {int: "integer", float: "number", str: "string", types.NoneType: "null"}


def update(page: str) -> str:
    """A page with its generated parts made anew; the text around them stays."""
    tables = {
        "metrics": metrics_table,
        "events": events_table,
        "engines": engines_table,
        "fused": fused_table,
        "tools": tools_table,
    }
    for name, table in tables.items():
        start, end = f"<!-- {name}: made by docs/update.py -->\n", f"<!-- end of {name} -->\n"
        if start in page:
            before, _, rest = page.partition(start)
            after = rest.partition(end)[2]
            page = f"{before}{start}{table()}{end}{after}"
    return page


def metrics_table() -> str:
    """One row per metric."""
    rows = [
        f"| `{m.exported_name}` | {m.kind} | {', '.join(m.tags)} | {m.meaning} |" for m in METRICS
    ]
    return "\n".join(["| metric | kind | labels | meaning |", "|---|---|---|---|", *rows, ""])


def engines_table() -> str:
    """One row per engine and algorithm."""
    rows = [
        "| engine | quant_algo | mixed | alone | elsewhere | source |",
        "|---|---|---|---|---|---|",
    ]
    for engine, entries in TABLE.items():
        rows += [
            f"| {engine} | `{row.algo}` | {', '.join(row.mixed) or '-'} | "
            f"{', '.join(row.single) or '-'} | {row.note or '-'} | {row.source} |"
            for row in entries
        ]
    return "\n".join([*rows, ""])


def fused_table() -> str:
    """One row per fused module."""
    rows = ["| the engine's module | holds | engines |", "|---|---|---|"]
    engines: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for engine, fused in FUSED.items():
        for entry in fused:
            engines.setdefault(entry, []).append(engine)
    rows += [
        f"| `{name}` | {', '.join(f'`{shard}`' for shard in shards)} | {', '.join(of)} |"
        for (name, shards), of in engines.items()
    ]
    return "\n".join([*rows, "| `experts` | all routed experts of a layer | all |", ""])


def tools_table() -> str:
    """One row per pair of weights and inputs."""
    rows = ["| format | quant_algo | " + " | ".join(COUNTERPARTS) + " |"]
    rows.append("|---|---|" + "---|" * len(COUNTERPARTS))
    for name, (weight, inputs) in PAIRS.items():
        format_ = Format(name=name, weight=weight, input=inputs, modelopt_compression=1.0)
        algo = layer_algo(format_)
        cells = [_tool_text(of(format_)) for of in COUNTERPARTS.values()]
        own = "-" if algo is None else f"`{algo.algo}`"
        rows.append(f"| `{name}` | {own} | {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


def _tool_text(found: Any) -> str:
    if found is None:
        return "-"
    if isinstance(found, str):
        return f"`{found}`"
    shown = {k: v for k, v in found.items() if k in ("bits", "group_size", "mode", "data_type")}
    shown |= {k: v for k, v in found.items() if k == "act_bits" and v < 16}
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def events_table() -> str:
    """One row per field of every event."""
    rows = ["| event | field | type | meaning |", "|---|---|---|---|"]
    for kind in typing.get_args(Event):
        (name,) = typing.get_args(kind.model_fields["event"].annotation)
        rows.append(f"| **`{name}`** | | | {' '.join(kind.__doc__.split())} |")
        for field, info in kind.model_fields.items():
            if field not in ("time", "event"):
                rows.append(f"| | `{field}` | {_type_text(info)} | {info.description} |")
    return "\n".join([*rows, ""])


def _type_text(info: FieldInfo) -> str:
    def text(annotation: Any) -> str:
        if typing.get_origin(annotation) is typing.Literal:
            return " or ".join(f"`{value}`" for value in typing.get_args(annotation))
        if typing.get_args(annotation):
            return " or ".join(text(member) for member in typing.get_args(annotation))
        return _JSON_TYPES[annotation]

    return text(info.annotation)


if __name__ == "__main__":
    for path in (PAGE, ENGINES_PAGE):
        path.write_text(update(path.read_text(encoding="utf-8")), encoding="utf-8")
