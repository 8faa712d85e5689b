"""Values of config fields as people write them: bytes, shares, ``auto`` or a number."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from pydantic.fields import FieldInfo

_BYTE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_LONGEST_PLACE = 4096
_SECRET_NAME = re.compile(
    r"secret|token|passw|credential|signature|access_?key|account_?key|api_?key|^sig$|^sas$"
)
_AZURE = "give them as AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET in the environment"
_GOOGLE = "give them as GOOGLE_APPLICATION_CREDENTIALS in the environment"
_AMAZON = "give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
_CREDENTIALS = {"s3": _AMAZON, "s3a": _AMAZON, "gs": _GOOGLE, "gcs": _GOOGLE}
_CREDENTIALS |= dict.fromkeys(("abfs", "abfss", "az", "adl"), _AZURE)
_CREDENTIALS["hf"] = "give them as HF_TOKEN in the environment"
_OTHER_CREDENTIALS = "give them in the environment"

_BYTE_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECONDS = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([smh])?\s*$", re.IGNORECASE)
_TIME_UNITS = {"s": 1, "m": 60, "h": 3600}
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL_KEY = re.compile(rf"([A-Za-z0-9][A-Za-z0-9.-]{{0,252}}/)?{_LABEL_VALUE.pattern}")
_BYTES = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*$", re.IGNORECASE)


def parse_bytes(value: int | str) -> int:
    """Parse a byte count such as ``1500000``, ``2.5GiB`` or ``800MB``.

    Raises:
        ValueError: The text is not a positive byte count.
    """
    match = _BYTES.match(str(value))
    if match is None:
        raise ValueError(f"{value!r} is not a byte count; write for example 2.5GiB or 800MB")
    number = round(float(match[1]) * _BYTE_UNITS[(match[2] or "").lower()])
    if number <= 0:
        raise ValueError(f"{value!r} must be more than 0 bytes")
    return number


def flag_of(name: str, field: FieldInfo | None) -> str:
    """The option of the command line that gives a field.

    Args:
        name: Of the field; what stands behind a dot is kept.
        field: It; some name a flag of their own (``json_schema_extra``). None: there is none.
    """
    extra = None if field is None else field.json_schema_extra
    short = extra.get("flag") if isinstance(extra, dict) else None
    root, dot, rest = name.partition(".")
    return f"--{short or root}{dot}{rest}".replace("_", "-")


def unless_none(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A parser of a field that may be left out: None stays None."""

    def parse_given(value: Any) -> Any:
        return None if value is None else parse(value)

    return parse_given


def is_variable(text: str) -> bool:
    """Whether a text can be the name of an environment variable."""
    return bool(_VARIABLE.fullmatch(text))


def checked_places(value: Any) -> Any:
    """A field's value, once all paths and URIs in it are checked.

    Args:
        value: A place, or several in a list or as name -> place; others are left to pydantic.

    Raises:
        ValueError: What :func:`place_problem` says of the first that is wrong.
    """
    parts = value.values() if isinstance(value, dict) else value
    for text in parts if isinstance(value, list | tuple | dict) else [value]:
        if isinstance(text, str) and (problem := place_problem(text)) is not None:
            raise ValueError(problem)
    return value


def place_problem(place: str) -> str | None:
    """What is wrong with a path or a URI, whatever it is for; None where nothing is.

    A URI must not hold credentials: it is printed, and written to files. The message shows none.
    """
    if not place.strip():
        return "a path is empty; give a folder or a URI"
    if "\0" in place:
        return "a path holds a NUL character; leave it out"
    if len(place) > _LONGEST_PLACE:
        return f"a path of {len(place):,} characters is too long"
    if "://" not in place:
        return None
    scheme, _, rest = place.partition("://")
    authority, _, _ = rest.partition("/")
    user, at, _ = authority.rpartition("@")
    options = place.partition("?")[2]
    names = {part.partition("=")[0].lower() for part in re.split("[&;]", options)}
    secret = next((name for name in sorted(names) if _SECRET_NAME.search(name)), None)
    is_key_id = scheme in ("s3", "s3a") and at
    if secret is None and not (at and ":" in user) and not is_key_id:
        return None
    shown_place = f"{scheme}://{authority.rpartition('@')[2]}/..."
    what = "credentials" if secret is None else f"credentials ({secret}=)"
    return f"{shown_place} holds {what}; {_CREDENTIALS.get(scheme, _OTHER_CREDENTIALS)}"


def parse_share(value: float | str) -> float:
    """Parse a share such as ``0.01`` or ``1%``.

    Raises:
        ValueError: Not a number, or not between 0 and 1.
    """
    text = str(value).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{value!r} is not a share; write for example 0.01 or 1%") from None
    if not 0 < share < 1:
        raise ValueError(f"{value!r} must be above 0 and below 1, for example 0.01 or 1%")
    return share


def parse_seconds(value: float | str) -> float:
    """Parse a time such as ``90``, ``90s``, ``20m`` or ``2h``.

    Returns:
        Seconds.

    Raises:
        ValueError: Not a time above 0.
    """
    match = _SECONDS.match(str(value))
    seconds = 0.0 if match is None else float(match[1]) * _TIME_UNITS[(match[2] or "s").lower()]
    if seconds <= 0:
        raise ValueError(f"{value!r} is not a time above 0; write for example 90s, 20m or 2h")
    return seconds


def parse_labels(value: Any) -> dict[str, str]:
    """Parse labels of nodes: a mapping, or texts of the form ``KEY=VALUE``.

    Raises:
        ValueError: One is not a label as Ray and Kubernetes have them, or is given twice.
    """
    if isinstance(value, dict):
        pairs = [(str(key), str(text)) for key, text in value.items()]
    else:
        texts = [value] if isinstance(value, str) else list(value)
        pairs = [(key, text) for key, _, text in (str(text).partition("=") for text in texts)]
    for key, text in pairs:
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(text):
            raise ValueError(
                f"{f'{key}={text}'[:80]!r} is no label of a node; write KEY=VALUE, of letters, "
                "digits, '-', '_' and '.', 63 at most each"
            )
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a label of nodes is given twice; give each key once")
    return dict(pairs)


def parse_gib(value: float | str) -> float | Literal["auto"]:
    """Parse ``auto`` or a number of GiB, such as ``2`` or ``500MiB``.

    Raises:
        ValueError: Neither, or below 0 or not finite.
    """
    if value == "auto":
        return "auto"
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = _gib_of(str(value))
    if not 0 <= number < float("inf"):
        raise ValueError(f"{value!r} is neither 'auto' nor a number of GiB, 0 or more")
    return number


def _gib_of(text: str) -> float:
    """Of a byte count with a unit; -1 for anything else."""
    try:
        return parse_bytes(text) / 2**30
    except ValueError:
        return -1.0


def parse_row_share(value: float | str) -> float | Literal["auto"]:
    """Parse ``auto`` or a share above 0.

    Raises:
        ValueError: Neither.
    """
    if value == "auto":
        return "auto"
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number <= 1:
        raise ValueError(f"{value!r} is neither 'auto' nor a share, more than 0 and at most 1")
    return number


def parse_workers(value: int | str) -> int | Literal["auto"]:
    """Parse ``auto`` or a number of workers.

    Raises:
        ValueError: Neither, or below 1.
    """
    if value == "auto":
        return "auto"
    if not str(value).isdecimal():
        raise ValueError(f"{value!r} is neither 'auto' nor a number of workers")
    if int(value) < 1:
        raise ValueError(f"{value} must be at least 1")
    return int(value)
