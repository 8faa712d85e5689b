"""Makes whole pages of the reference from the code; ``docs/update.py`` writes them.

Options of the commands from click, keys of job files from the config's models, names of the Python
interface from their docstrings, columns of a run's Parquet files from their schemas.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import click
import pyarrow as pa
from columns import FILES, MEANINGS
from pydantic.fields import FieldInfo

import autoquant_ray
from autoquant_ray import errors
from autoquant_ray.allocate.certainty.explanation import Explanation
from autoquant_ray.allocate.frontier import Frontier, Point
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.cli.main import main
from autoquant_ray.cli.options import SectionedCommand
from autoquant_ray.compare.verdict import Comparison
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.config.runtime_env import RuntimeEnv
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.evaluate.evaluate import Evaluation
from autoquant_ray.evaluate.refine import Refinement
from autoquant_ray.export.checkpoint import Checkpoint
from autoquant_ray.jobs.file import NightlyJob, ScanJob, SweepJob
from autoquant_ray.runs.schemas import ADDED_COLUMNS, SCHEMAS
from autoquant_ray.solve import Solution

_NOTE = "<!-- made by docs/update.py; change the code, not this page -->\n"
_TYPES = {int: "integer", float: "number", str: "text", bool: "true or false"}
_ROLE = re.compile(r":\w+:`~?([^`]+)`")
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):")
_LISTS = ("Args", "Attributes", "Raises")


def options_page() -> str:
    """Every command with its help and its options, under the headings of the help."""
    parts = [
        f"# Options\n\n{_NOTE}\nWhat `autoquant-ray COMMAND -h` says. [commands.md](commands.md) "
        "has a line per command and the exit codes.\n"
    ]
    for name, command in main.commands.items():
        parts.append(_command_part(f"autoquant-ray {name}", command))
        if isinstance(command, click.Group):
            for below, inner in command.commands.items():
                parts.append(_command_part(f"autoquant-ray {name} {below}", inner))
    return "\n".join(parts)


def _command_part(path: str, command: click.Command) -> str:
    context = click.Context(command, info_name=path, **main.context_settings)
    usage = " ".join(command.collect_usage_pieces(context))
    text, _, example = inspect.cleandoc(command.help or "").partition("\b\n")
    lines = [f"## {path.partition(' ')[2]}\n", text.strip(), "", "```console", f"$ {path} {usage}"]
    example = example.strip().removeprefix("Example:")
    lines += ["```", "", "For example:", "", "```console"] if example else []
    lines += [
        line if line.startswith("      ") else f"$ {line.strip()}"
        for line in example.splitlines()
        if line.strip()
    ]
    lines += ["```", ""]
    for title, records in _sections(command, context):
        lines += [f"**{title}**\n"] if title else []
        lines += ["| option | meaning |", "|---|---|"]
        lines += [f"| `{_flags_text(flags)}` | {_cell(help_)} |" for flags, help_ in records]
        lines.append("")
    return "\n".join(lines)


def _sections(
    command: click.Command, context: click.Context
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    if isinstance(command, SectionedCommand):
        for title, records in command.sections(context):
            yield title, [record for record in records if _is_described(record)]
        return
    records = [parameter.get_help_record(context) for parameter in command.params]
    shown = [record for record in records if record is not None and _is_described(record)]
    if shown:
        yield "", shown


def _is_described(record: tuple[str, str]) -> bool:
    """Not an argument, which the text of the command is about, nor what every program has."""
    return record[0].startswith("-") and "--help" not in record[0]


def _flags_text(flags: str) -> str:
    """Flags and what they take, without the signs that end a cell."""
    return re.sub(r"\[([^]]*\|[^]]*)\]", r"\1", flags).replace("|", "/")


def job_files_page() -> str:
    """Keys of job files: those of each kind, then those of a scan."""
    parts = [
        f"# Job files\n\n{_NOTE}\nA job file is YAML, read by `autoquant-ray run`, `submit` and "
        "`nightly`; one of a scan also by `scan --config` and `plan --config`. Examples: "
        "[jobs/scan.yaml](../jobs/scan.yaml), [jobs/sweep.yaml](../jobs/sweep.yaml), "
        "[jobs/nightly.yaml](../jobs/nightly.yaml). A key that is none of these is an error.\n"
    ]
    shared = set(ScanJob.model_fields) - {"kind", "scan"}
    parts.append("## Every job\n")
    parts.append(_fields_table(ScanJob, only=shared))
    for job, text in ((SweepJob, "`kind: sweep`"), (NightlyJob, "`kind: nightly`")):
        left_out = ", ".join(f"`{name}`" for name in sorted(job.LEFT_OUT))
        parts.append(f"## {text}\n\n{inspect.cleandoc(job.__doc__ or '')} Sets {left_out} of the ")
        parts[-1] += "scan itself.\n"
        parts.append(_fields_table(job, only=set(job.model_fields) - shared - {"kind", "scan"}))
    parts.append("## The keys of a scan\n\nOf every kind of job, and the options of `scan`, whose ")
    parts[-1] += "flags are these names with `-` for `_`.\n"
    parts.append(_fields_table(ScanConfig))
    parts += ["## The keys of runtime_env\n", _fields_table(RuntimeEnv)]
    return "\n".join(parts)


def _fields_table(model: Any, only: Iterable[str] | None = None) -> str:
    """One row per field of a model."""
    hints = typing.get_type_hints(model)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    fields: dict[str, FieldInfo] = getattr(model, "model_fields", {})
    for name, field in fields.items():
        if only is None or name in only:
            default = "needed" if field.is_required() else _default_text(field)
            meaning = _cell(field.description or "")
            rows.append(f"| `{name}` | {_type_text(hints[name])} | {default} | {meaning} |")
    return "\n".join([*rows, ""])


def _default_text(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value in (None, (), {}, ""):
        return "-"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{','.join(map(str, value)) if isinstance(value, tuple) else value}`"


def _type_text(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_text(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(a) for a in arguments if a is not types.NoneType)
    if origin is tuple:
        return f"list of {_type_text(arguments[0])}"
    if origin is dict and arguments[1] is str:
        return "mapping of text to text"
    return _TYPES.get(annotation, "mapping")


def columns_page() -> str:
    """Files of a run with their columns."""
    parts = [
        f"# Columns of a run's files\n\n{_NOTE}\nAll are Parquet, named as in "
        "[run-directory.md](run-directory.md); what the numbers mean is in "
        "[numbers.md](numbers.md). Columns marked * are null, or missing, in files of earlier "
        "versions.\n"
    ]
    for name, text in FILES.items():
        head = f"`{name}`" if name.endswith(".parquet") else f"`{name}/`"
        parts.append(f"## {head}\n\n{text}\n\n| column | type | meaning |\n|---|---|---|")
        for field in SCHEMAS[name]:
            meaning = MEANINGS.get(f"{name}: {field.name}") or MEANINGS[field.name]
            star = " *" if field.name in ADDED_COLUMNS else ""
            parts.append(f"| `{field.name}`{star} | {_arrow_text(field.type)} | {meaning} |")
        parts.append("")
    return "\n".join(parts)


def _arrow_text(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {_arrow_text(kind.value_type)}"
    return "struct" if pa.types.is_struct(kind) else str(kind)


def python_page() -> str:
    """The public names with their signatures and docstrings."""
    parts = [
        f"# Python, name by name\n\n{_NOTE}\nThe docstrings. [python-api.md](python-api.md) has a "
        "session.\n"
    ]
    names = [name for name in autoquant_ray.__all__ if name not in ("__version__", "ScanConfig")]
    for name in names:
        parts += _object_parts(f"autoquant_ray.{name}", getattr(autoquant_ray, name))
    parts.append("## What they return\n")
    for kind in _RETURNED:
        parts += [f"### {kind.__name__}\n", _docstring(kind)]
    parts.append("## Fields\n\nOf `search` and `ScanConfig`: [job-files.md](job-files.md#the-keys-")
    parts[-1] += "of-a-scan).\n"
    parts += ["### Of `solve`\n", _docstring(SolveOptions), _fields_table(SolveOptions)]
    parts += ["### Of `evaluate` and `refine`\n", _fields_table(EvaluationConfig, _EVALUATION)]
    parts += ["## Errors\n", "| class | is a | exit code | meaning |", "|---|---|---|---|"]
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, BaseException):
            base, code = error.__mro__[1].__name__, getattr(error, "exit_code", "-")
            meaning = _cell(inspect.cleandoc(error.__doc__ or "").split("\n\n")[0])
            parts.append(f"| `{error.__name__}` | `{base}` | {code} | {meaning} |")
    return "\n".join([*parts, ""])


_RETURNED = (
    *(Solution, Explanation, Frontier, Point, Comparison),
    *(Evaluation, Refinement, Checkpoint),
)
_EVALUATION = [name for name in EvaluationConfig.model_fields if name != "run"]


def _object_parts(path: str, thing: Any) -> list[str]:
    if not inspect.isclass(thing):
        return [f"## {path}\n", _signature(path, thing), _docstring(thing)]
    parts = [f"## {path}\n", _docstring(thing)]
    for name, member in vars(thing).items():
        if name.startswith("_") or not (callable(member) or isinstance(member, _MEMBERS)):
            continue
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        shown = f"{thing.__name__}.{name}"
        parts.append(f"### {shown}\n")
        if isinstance(member, property):
            kind = function.__annotations__["return"]
            parts.append(f"```python\n{shown}: {kind}\n```\n")
        else:
            parts.append(_signature(shown, function))
        parts.append(_docstring(function))
    return parts


_MEMBERS = (property, classmethod, staticmethod)


def _signature(path: str, function: Any) -> str:
    signature = inspect.signature(function)
    parameters = [p for name, p in signature.parameters.items() if name not in ("self", "cls")]
    pieces, has_star = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not has_star:
            pieces.append("*")
        has_star |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        piece = f"{stars.get(parameter.kind, '')}{parameter.name}: {parameter.annotation}"
        is_needed = parameter.default is parameter.empty
        pieces.append(piece if is_needed else f"{piece} = {parameter.default!r}")
    text = f"{path}({', '.join(pieces)}) -> {signature.return_annotation}"
    if len(text) > 90:
        inside = "".join(f"    {piece},\n" for piece in pieces)
        text = f"{path}(\n{inside}) -> {signature.return_annotation}"
    return f"```python\n{text}\n```\n"


def _docstring(thing: Any) -> str:
    """A Google docstring as Markdown: sections become lists, roles and double backticks code."""
    lines: list[str] = []
    section = ""
    for line in inspect.cleandoc(thing.__doc__ or "").splitlines():
        if (head := _SECTION.fullmatch(line)) is not None:
            section = head[1]
            lines += [f"*{section}*", ""]
        elif section in _LISTS and re.match(r"    \S", line):
            name, _, text = line.strip().partition(": ")
            lines.append(f"- `{name}`: {text}")
        else:
            section = section if not line or line.startswith(" ") else ""
            lines.append(f"  {line.strip()}" if section in _LISTS and line else line.strip())
    text = _ROLE.sub(lambda role: f"`{role[1].rpartition('.')[2]}`", "\n".join(lines))
    return f"{text.replace('``', '`')}\n"


def _cell(text: str) -> str:
    """Text inside a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


PAGES = {
    "options.md": options_page,
    "job-files.md": job_files_page,
    "python-names.md": python_page,
    "run-columns.md": columns_page,
}
"""Name of a page of docs -> makes it."""
