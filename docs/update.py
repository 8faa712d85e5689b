"""Writes the tables of ``metrics-and-events.md`` from the code: ``python docs/update.py``.

A test fails when the page and the code differ.
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from autoquant_ray.distributed.metrics import METRICS
from autoquant_ray.events import Event

PAGE = Path(__file__).parent / "metrics-and-events.md"
_JSON_TYPES = {int: "integer", float: "number", str: "string", types.NoneType: "null"}


def update(page: str) -> str:
    """The page with its generated parts made anew; the text around them stays."""
    for name, table in (("metrics", metrics_table()), ("events", events_table())):
        start, end = f"<!-- {name}: made by docs/update.py -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = page.partition(start)
        after = rest.partition(end)[2]
        page = f"{before}{start}{table}{end}{after}"
    return page


def metrics_table() -> str:
    """One row per metric."""
    rows = [
        f"| `{m.exported_name}` | {m.kind} | {', '.join(m.tags)} | {m.meaning} |" for m in METRICS
    ]
    return "\n".join(["| metric | kind | labels | meaning |", "|---|---|---|---|", *rows, ""])


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
    PAGE.write_text(update(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
