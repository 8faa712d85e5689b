"""What a row of calibration data holds: a text, a chat, or a prompt with its answer; its domain.

The columns decide. A row with the text field is a text; else ``messages`` are a chat, and
``prompt`` and ``answer`` a chat of two. Chats may come with images (``image`` or ``images``).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from autoquant_ray.data.conversations import Conversation, chat_of, pair_of
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.errors import DataError

Row = tuple[str | Conversation, str]
"""A text or a conversation, and its domain."""

IMAGE_FIELDS = ("image", "images")

_DEFAULT_FIELD, _MESSAGES, _PAIR = "text", "messages", ("prompt", "answer")
_DOMAIN = re.compile(r"[^,\x00-\x1f]+")
_MAX_DOMAIN_LENGTH = 64


def columns_of(columns: Collection[str], spec: DataSpec, where: str = "") -> list[str]:
    """The columns that are read.

    Raises:
        DataError: One is not there, or the options do not go with what they hold.
    """
    wanted = _content_fields(columns, spec)
    chat = wanted is not None
    if wanted is None:
        _require_field(spec.text_field, "`text_field`", columns, spec, where)
        wanted = [spec.text_field]
    if chat and spec.pack:
        raise DataError(
            f"data source {spec.source} holds chats or prompts, and `pack` chops one running "
            "text; leave it out"
        )
    if not chat:
        require_answers(spec)
    if spec.domain_field is not None:
        _require_field(spec.domain_field, "`domain_field`", columns, spec, where)
        wanted.append(spec.domain_field)
    return list(dict.fromkeys(wanted))


def require_answers(spec: DataSpec) -> None:
    """Check that plain text is not asked for its answers.

    Raises:
        DataError: It is.
    """
    if spec.loss_on == "answer":
        raise DataError(
            f"data source {spec.source} holds plain text, which has no answers; give rows with "
            "'messages', or with 'prompt' and 'answer', or `loss_on` all"
        )


def row_of(row: Any, spec: DataSpec, where: str) -> Row:
    """What a row holds, and its domain; '' without a ``domain_field``.

    Args:
        row: Column -> value.
        spec: What to read.
        where: ``line 7`` or ``row 7``.

    Raises:
        DataError: It lacks a field, or a field holds something else.
    """
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise DataError(f"data source {spec.source} {where} is not an object but {kind}")
    columns_of(row, spec, where)
    content = _content(row, spec, where)
    if spec.domain_field is None:
        return content, ""
    domain = _checked_text(row[spec.domain_field], spec.domain_field, spec, where).strip()
    if not domain or len(domain) > _MAX_DOMAIN_LENGTH or not _DOMAIN.fullmatch(domain):
        raise DataError(
            f"data source {spec.source} {where}: field {spec.domain_field!r} holds "
            f"{domain[:80]!r}, which is no domain: give 1 to {_MAX_DOMAIN_LENGTH} characters "
            "without commas"
        )
    return content, domain


def _content_fields(columns: Collection[str], spec: DataSpec) -> list[str] | None:
    """Columns of a chat or a prompt; None for a text."""
    field = spec.text_field
    images = [name for name in IMAGE_FIELDS if name in columns]
    if field == _MESSAGES and field in columns:
        return [_MESSAGES, *images]
    if field in columns or field != _DEFAULT_FIELD:
        return None
    if _MESSAGES in columns:
        return [_MESSAGES, *images]
    return [*_PAIR, *images] if all(name in columns for name in _PAIR) else None


def _content(row: dict[str, Any], spec: DataSpec, where: str) -> str | Conversation:
    fields = _content_fields(row, spec)
    if fields is None:
        return _checked_text(row[spec.text_field], spec.text_field, spec, where)
    images: list[Any] = []
    for name in IMAGE_FIELDS:
        value = row.get(name)
        images += value if isinstance(value, list) else [] if value is None else [value]
    place, folder = f"data source {spec.source} {where}", _folder(spec.source)
    if fields[0] == _MESSAGES:
        return chat_of(row[_MESSAGES], images, place, folder)
    prompt, answer = (_checked_text(row[name], name, spec, where) for name in _PAIR)
    return pair_of(prompt, answer, images, place, folder)


def _folder(source: str) -> Path:
    """Where paths of images begin: the file's folder, or the data set's own."""
    path = Path(source).expanduser()
    return path if path.is_dir() else path.parent


def _require_field(
    field: str, flag: str, columns: Collection[str], spec: DataSpec, where: str
) -> None:
    if field not in columns:
        place = f"{spec.source} {where}".strip()
        raise DataError(
            f"data source {place} has no field {field!r}; it has: "
            f"{', '.join(columns) or 'none'}; name one with {flag}"
        )


def _checked_text(value: Any, field: str, spec: DataSpec, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"data source {spec.source} {where}: field {field!r} holds "
            f"{type(value).__name__}, not text"
        )
    return value
