"""YAML file and command-line flags -> a validated config, or one line that says what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.search_space import SearchSpace
from autoquant_ray.config.values import flag_of, place_problem
from autoquant_ray.errors import ConfigError, one_line
from autoquant_ray.wording import few, fitted, shown

_NOT_SHOWN = ("secrets", "runtime_env")
"""Keys whose values no message repeats: one may be a secret, written there by mistake."""
_LONGEST_FILE, _MOST_NODES, _LONGEST_MESSAGE = 1_000_000, 100_000, 200
"""Characters, values with aliases written out, and characters of a complaint."""
_LONGEST_LINE = 360
"""Characters of all complaints together, which the command line cuts at 400."""

Model = TypeVar("Model", bound=BaseModel)
Space = TypeVar("Space", bound=SearchSpace)

_ORDER = {"extra_forbidden": 0, "unexpected_keyword_argument": 0, "missing": 2}
"""Kinds of errors as they are said, others between: a wrong key may be why another is missing."""
_NO_KEYS = ("[key]", "dict[str,any]")
"""Parts of pydantic's places that no file has: a key itself, a member of a union."""


def load_config(model_class: type[Space], path: str | None, flags: dict[str, Any]) -> Space:
    """Read a YAML file, lay the flags over it, and validate.

    Args:
        model_class: :class:`SearchSpace`, or a class with more fields.
        path: YAML file, or None. A scan's file serves a search space too.
        flags: Values given on the command line; they win over the file.

    Raises:
        ConfigError: Unreadable file, unknown key, or a wrong value; one line with its path.
    """
    values: dict[str, Any] = {}
    if path is not None:
        others = set(ScanConfig.model_fields) - set(model_class.model_fields)
        values = {key: value for key, value in read_yaml(path).items() if key not in others}
    values.update(flags)
    return validate(model_class, values, path, flags)


def validate(
    model_class: type[Model],
    values: dict[str, Any],
    path: str | None = None,
    flags: Container[str] = (),
) -> Model:
    """Validate a config.

    Args:
        model_class: Its class.
        values: All fields that are given.
        path: The YAML file that some of them come from; None if all are flags.
        flags: Those that are flags.

    Raises:
        ConfigError: Unknown key or a wrong value; one line that says where it stands.
    """
    in_file = None if path is None else places_in(path)

    def place(name: str, root: str) -> str:
        if in_file is not None and root in values and root not in flags:
            return in_file(name, root)
        return flag_of(name, model_class.model_fields.get(root))

    try:
        return model_class.model_validate(values)
    except ValidationError as error:
        raise ConfigError(problems_of(error, place, list(model_class.model_fields))) from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping with keys that differ."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is given twice; keep one", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str) -> dict[str, Any]:
    """Read the keys of a YAML file.

    Raises:
        ConfigError: Missing, unreadable, or not a mapping; one line with the path.
    """
    try:
        loaded = _load(path)
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {one_line(error)}") from None
    except RecursionError:
        raise ConfigError(f"config file {path} is nested too deeply; write it flat") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"config file {path} is not valid YAML: {one_line(error)}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"config file {path} must hold 'key: value' lines")
    return {str(key): value for key, value in loaded.items()}


def _load(path: str) -> Any:
    """Content of a YAML file, bounded in size and in what its aliases make of it."""
    with Path(path).open(encoding="utf-8") as file:
        text = file.read(_LONGEST_FILE + 1)
    if len(text) > _LONGEST_FILE:
        raise ValueError(f"it has more than {_LONGEST_FILE:,} characters; is it another file?")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded_size(node, {}) > _MOST_NODES:
            raise ValueError(
                f"its aliases (*name) stand for more than {_MOST_NODES:,} values; write them out"
            )
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of values below a node, aliases as what they stand for."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = _MOST_NODES + 1  # for an alias of a node inside itself
    total = 1
    if isinstance(node, yaml.SequenceNode):
        total += sum(_expanded_size(part, sizes) for part in node.value)
    elif isinstance(node, yaml.MappingNode):
        total += sum(_expanded_size(part, sizes) for pair in node.value for part in pair)
    sizes[id(node)] = total
    return total


def places_in(file: str) -> Callable[[str, str], str]:
    """What :func:`problems_of` takes for the keys of a file, which is named before the first.

    Args:
        file: As messages call it.
    """
    starts = iter((f"{file}: ",))
    return lambda name, _: f"{next(starts, '')}{name}"


def problems_of(
    error: ValidationError,
    place: Callable[[str, str], str],
    keys: Sequence[str],
) -> str:
    """All of pydantic's errors in one line; how many more there are, where it would be too long.

    Args:
        error: What pydantic raised.
        place: Names where a key stands, from its dotted name and that name's first part.
        keys: Keys that exist, for a hint.
    """
    entries = sorted(error.errors(), key=lambda entry: _ORDER.get(entry["type"], 1))
    texts = list(dict.fromkeys(_problem(entry, place, keys) for entry in entries))
    line = texts[0]
    for number, text in enumerate(texts[1:], start=1):
        more = len(texts) - number
        if len(line) + len(text) > _LONGEST_LINE:
            return f"{line}; and {more} more"
        line += f"; {text}"
    return line


def _problem(entry: Any, place: Callable[[str, str], str], keys: Sequence[str]) -> str:
    """One of pydantic's errors."""
    message = entry["msg"].removeprefix("Value error, ")
    if not entry["loc"]:
        return str(message)
    name = ".".join(str(part)[:60] for part in entry["loc"] if part not in _NO_KEYS)[:120]
    where = place(name, str(entry["loc"][0]))
    if entry["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(name, keys, n=3)
        hint = f"closest: {', '.join(close)}" if close else f"known: {few(keys, 12)}"
        return f"{where}: unknown key; {hint}"
    if entry["type"] == "missing":
        return f"{where} is missing"
    message = fitted(" ".join(message.split()), _LONGEST_MESSAGE)
    value = entry["input"]
    is_said = isinstance(value, str | int | float) and str(value)[:_LONGEST_MESSAGE] in message
    is_secret = isinstance(value, str) and place_problem(value) is not None
    if entry["loc"][0] in _NOT_SHOWN or is_said or is_secret or "credentials" in message:
        return f"{where}: {message}"
    return f"{where}: {message} (got {shown(value)})"
