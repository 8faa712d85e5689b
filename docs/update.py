"""Writes the tables of the pages beside it from the code: ``python docs/update.py``.

Pages that are made from the code as a whole are those of ``reference.py``. A test fails when a page
and the code differ.
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from reference import PAGES

from autoquant_ray.distributed.metrics import METRICS
from autoquant_ray.errors import FormatError
from autoquant_ray.export.tool_formats import COUNTERPARTS
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.gguf_types import gguf_type_of
from autoquant_ray.formats.kv_cache import KV_FORMATS, KV_PRESETS, KV_VALUES, cache_bytes
from autoquant_ray.formats.menu import OURS, known_formats, resolve_formats
from autoquant_ray.formats.numbers import describe, is_scaled_by_block
from autoquant_ray.formats.smoothed import method_of
from autoquant_ray.formats.stored_size import format_bits
from autoquant_ray.runs.events import Event
from autoquant_ray.serving.compressed_formats import SCHEMES
from autoquant_ray.serving.compressed_table import COMPRESSED_TABLE
from autoquant_ray.serving.kv_cache import CACHE_TABLE
from autoquant_ray.serving.layer_formats import layer_algo
from autoquant_ray.serving.row import Row
from autoquant_ray.serving.table import FUSED, TABLE

PAGE = Path(__file__).parent / "metrics-and-events.md"
FORMATS_PAGE, ENGINES_PAGE = PAGE.with_name("formats.md"), PAGE.with_name("engines.md")
CACHES_PAGE = PAGE.with_name("kv-caches.md")
_JSON_TYPES = {int: "integer", float: "number", str: "string", types.NoneType: "null"}


def update(page: str) -> str:
    """The page with its generated parts made anew; the text around them stays."""
    for name, make_table in TABLES.items():
        start, end = f"<!-- {name}: made by docs/update.py -->\n", f"<!-- end of {name} -->\n"
        if start not in page:
            continue
        table = make_table()
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


def engines_table() -> str:
    """One row per engine and algorithm."""
    rows = [
        "| engine | quant_algo | mixed | alone | fused layers | elsewhere | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for engine, entries in TABLE.items():
        rows += [
            f"| {engine} | `{row.algo}` | {', '.join(row.mixed) or '-'} | "
            f"{', '.join(row.single) or '-'} | {_scale_text(row)} | {row.note or '-'} | "
            f"{row.source} |"
            for row in entries
        ]
    return "\n".join([*rows, ""])


def compressed_table() -> str:
    """One row per engine and scheme of compressed-tensors."""
    kinds = {scheme: " and ".join(grids) for grids, scheme in SCHEMES.items()}
    rows = [
        "| engine | scheme | weights and inputs | served on | fused layers | elsewhere | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for engine, entries in COMPRESSED_TABLE.items():
        rows += [
            f"| {engine} | `{row.algo}` | {kinds.get(row.algo, f'those of `{row.algo}`')} | "
            f"{', '.join(row.mixed) or '-'} | {_scale_text(row)} | {row.note or '-'} | "
            f"{row.source} |"
            for row in entries
        ]
    return "\n".join([*rows, ""])


def _scale_text(row: Row) -> str:
    return "one scale" if row.one_scale else "-"


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
    for name in OURS:
        (format_,) = resolve_formats((name,), device="cuda")
        algo = layer_algo(format_)
        cells = [_tool_text(of(format_)) for of in COUNTERPARTS.values()]
        algo_text = "-" if algo is None else f"`{algo.algo}`"
        rows.append(f"| `{name}` | {algo_text} | {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


def _tool_text(counterpart: Any) -> str:
    if counterpart is None:
        return "-"
    if isinstance(counterpart, str):
        return f"`{counterpart}`"
    shown = {
        k: v for k, v in counterpart.items() if k in ("bits", "group_size", "mode", "data_type")
    }
    shown |= {k: v for k, v in counterpart.items() if k == "act_bits" and v < 16}
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


def formats_table() -> str:
    """One row per format that can be scanned."""
    rows = ["| format | weights | inputs | calibration | bits per weight | on CPU |"]
    rows.append("|---|---|---|---|---|---|")
    for name in known_formats():
        format_ = _scanned(name)
        if isinstance(format_, Format) and format_.kv is None:
            bits = format_bits(format_, MATRIX) / (MATRIX[0] * MATRIX[1])
            shown = f"{bits:.3f}".rstrip("0").rstrip(".")
            quantizers = f"{describe(format_.weight)} | {describe(format_.input)}"
            is_gguf = gguf_type_of(format_.weight) is not None
            quantizers += f" | {'-' if is_gguf else method_of(format_)}"
            rows.append(f"| `{name}` | {quantizers} | {shown} | {_on_cpu(format_)} |")
    return "\n".join([*rows, ""])


def caches_table() -> str:
    """One row per format of the KV cache."""
    rows = [
        "| format | keys and values | bits per element | ModelOpt's preset |",
        "|---|---|---|---|",
    ]
    presets = {name: preset for preset, name in KV_PRESETS.items()}
    for name, attributes in KV_FORMATS.items():
        values = KV_VALUES.get(name)
        bits = 8 * cache_bytes(attributes, [(8, 128)] * 2, values) / (2 * 8 * 128)
        quantizers = describe(attributes)
        if values is not None:
            quantizers = f"keys {quantizers}; values {describe(values)}"
        preset = f"`{presets[name]}`" if name in presets else "-"
        rows.append(f"| `{name}` | {quantizers} | {bits:g} | {preset} |")
    return "\n".join([*rows, ""])


def engine_caches_table() -> str:
    """One row per engine and format of the KV cache."""
    rows = ["| engine | format | served on | elsewhere | source |", "|---|---|---|---|---|"]
    for engine, entries in CACHE_TABLE.items():
        rows += [
            f"| {engine} | `{row.format}` | {', '.join(row.gpus) or '-'} | {row.note or '-'} | "
            f"{row.source} |"
            for row in entries
        ]
    return "\n".join([*rows, ""])


def refused_table() -> str:
    """One row per reason for which presets cannot be scanned."""
    presets: dict[str, list[str]] = {}
    for name in known_formats():
        error = _scanned(name)
        if not isinstance(error, Format):
            presets.setdefault(error.removeprefix(f"format {name} "), []).append(f"`{name}`")
    rows = [f"| {', '.join(names)} | {reason} |" for reason, names in sorted(presets.items())]
    return "\n".join(["| presets | reason |", "|---|---|", *rows, ""])


def _scanned(name: str) -> Format | str:
    """The format, or why it cannot be scanned anywhere."""
    try:
        return resolve_formats((name,), device="cuda")[0]
    except FormatError as error:
        return str(error)


def _on_cpu(format_: Format) -> str:
    try:
        resolve_formats((format_.name,), device="cpu")
    except FormatError:
        return "no"
    if gguf_type_of(format_.weight) is not None:
        return "ggml"
    parts = (format_.weight, format_.input or {})
    return "here" if any(map(is_scaled_by_block, parts)) else "ModelOpt"


MATRIX = (4096, 4096)
TABLES = {
    "metrics": metrics_table,
    "events": events_table,
    "formats": formats_table,
    "caches": caches_table,
    "engine caches": engine_caches_table,
    "refused": refused_table,
    "engines": engines_table,
    "compressed": compressed_table,
    "fused": fused_table,
    "tools": tools_table,
}

if __name__ == "__main__":
    for path in (PAGE, FORMATS_PAGE, CACHES_PAGE, ENGINES_PAGE):
        path.write_text(update(path.read_text(encoding="utf-8")), encoding="utf-8")
    for name, make_page in PAGES.items():
        PAGE.with_name(name).write_text(make_page(), encoding="utf-8")
