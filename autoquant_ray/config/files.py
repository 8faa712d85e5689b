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
from autoquant_ray.errors import ConfigError, one_line

Model = TypeVar("Model", bound=BaseModel)

_NO_KEYS = ("[key]", "dict[str,any]")
"""Parts of pydantic's places that no file has: a key itself, a member of a union."""


def load_config(
    model_class: type[SearchSpace], path: str | None, flags: dict[str, Any]
) -> SearchSpace:
    """Read a YAML file, lay the flags over it, and validate.

    Args:
        model_class: :class:`ScanConfig` or :class:`SearchSpace`.
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

    def place(name: str, root: str) -> str:
        from_file = path is not None and root in values and root not in flags
        return f"{path}: {name}" if from_file else f"--{name.replace('_', '-')}"

    try:
        return model_class.model_validate(values)
    except ValidationError as error:
        raise ConfigError(first_problem(error, place, list(model_class.model_fields))) from None


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
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {one_line(error)}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"config file {path} must hold 'key: value' lines")
    return {str(key): value for key, value in loaded.items()}


def first_problem(
    error: ValidationError,
    place: Callable[[str, str], str],
    keys: Sequence[str],
    not_shown: Sequence[str] = (),
) -> str:
    """The first of pydantic's errors as one line.

    Args:
        error: What pydantic raised.
        place: Names where a key stands, from its dotted name and that name's first part.
        keys: Keys that exist, for a hint.
        not_shown: Keys whose value is not repeated.
    """
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    name = ".".join(str(part) for part in first["loc"] if part not in _NO_KEYS)
    where = place(name, str(first["loc"][0]))
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        close = difflib.get_close_matches(name, keys, n=3)
        hint = f"closest: {', '.join(close)}" if close else f"known: {', '.join(keys)}"
        return f"{where}: unknown key; {hint}"
    if first["type"] == "missing":
        return f"{where} is missing"
    shown = first["input"]
    if first["loc"][0] in not_shown or str(shown) in message:
        return f"{where}: {message}"
    return f"{where}: {message} (got {shown!r})"
