"""What a row of calibration data holds: a text, or a chat in one of its forms; its domain.

The columns decide. A row with the text field is a text; else :mod:`autoquant_ray.data.forms` knows
what it is. Chats may come with images (``image`` or ``images``).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from autoquant_ray.data.conversations import BadSample, Conversation, chat_of
from autoquant_ray.data.forms import (
    CHOSEN,
    MESSAGES,
    PROMPT,
    BadChat,
    Form,
    chats_in,
    form_of,
    half_a_letter,
    messages_in,
)
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.errors import DataError

logger = logging.getLogger(__name__)

Row = tuple[str | Conversation | BadSample, str]
"""A text, a conversation or a chat that cannot be used, and its domain."""

IMAGE_FIELDS = ("image", "images")

_DOMAIN = re.compile(r"[^,\x00-\x1f]+")
_MAX_DOMAIN_LENGTH = 64


class RowReader:
    """Reads the rows of a source, or of one of its files.

    Args:
        spec: What to read.
        place: The file, for messages; None for the source itself.
        folder: Where paths of images begin; None for the source's own folder.
        announces: Log which form of chats the rows have.
    """

    def __init__(
        self,
        spec: DataSpec,
        place: Path | None = None,
        folder: Path | None = None,
        *,
        announces: bool = True,
    ) -> None:
        self.spec = spec
        self._announces = announces
        self._place = spec.source if place is None else str(place)
        self._folder = _folder_of(spec.source) if folder is None else folder
        self._form: Form | None = None

    def columns(
        self, columns: Collection[str], where: str = "", lists: Collection[str] = ()
    ) -> list[str]:
        """The columns that are read.

        Args:
            columns: Of the row, or of all.
            where: The row, for messages.
            lists: Columns of a table that hold lists: a text field among them holds chats.

        Raises:
            DataError: One is not there, or the options do not go with what they hold.
        """
        form, spec = self._form_of(columns), self.spec
        if form is None and spec.text_field in lists:
            form = chats_in(spec.text_field)
        if form is None:
            self._require_field(spec.text_field, "`text_field`", columns, where)
            wanted = [spec.text_field]
        else:
            self._require_no_packing()
            wanted = [*form.columns, *form.optional, *IMAGE_FIELDS]
        if spec.domain_field is not None:
            self._require_field(spec.domain_field, "`domain_field`", columns, where)
            wanted.append(spec.domain_field)
        return list(dict.fromkeys(name for name in wanted if name in columns))

    def is_readable(self, row: dict[str, Any]) -> bool:
        """Whether a row has a text, or a chat in one of its forms."""
        return self.spec.text_field in row or self._form_of(row) is not None

    def read(self, row: Any, where: str, *, is_table: bool = False) -> Row:
        """What a row holds, and its domain; '' without a ``domain_field``.

        Args:
            row: Column -> value.
            where: ``line 7`` or ``row 7``.
            is_table: Whether it comes from a table, whose columns have a type: where another row
                has a key, this one holds an empty value for it, which is no value.

        Raises:
            DataError: It lacks a field, or a field holds something else.
        """
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise DataError(
                f"data source {self._place} {where} is not an object but {kind}; give rows such as "
                '{"text": "..."} or {"messages": [...]}'
            )
        form = self._form_of(row)
        if form is None and self._form is not None and self.spec.text_field not in row:
            form = self._form  # among chats, a row without is a bad one
        if form is None:
            self.columns(row, where)
            content: Any = row[self.spec.text_field]
            if isinstance(content, list):
                if self._form is None:
                    self._require_messages(content, where)
                form = chats_in(self.spec.text_field)
            else:
                require_answers(self.spec)
                content = self._checked_text(content, self.spec.text_field, where)
        if form is not None:
            content = self._chat(form, row, where, is_table=is_table)
        return content, self._domain(row, where)

    def _form_of(self, row: Collection[str]) -> Form | None:
        """The form of a row; a prompt or a preference alone is a chat only where it is a list."""
        form = form_of(row, self.spec.text_field)
        alone = None if form is None or form.columns[1:] else form.columns[0]
        if alone in (PROMPT, CHOSEN) and isinstance(row, dict):
            value = row[alone]
            return None if isinstance(value, str) and not messages_in(value) else form
        return form

    def _chat(
        self, form: Form, row: dict[str, Any], where: str, *, is_table: bool
    ) -> Conversation | BadSample:
        self._require_no_packing()
        if self._form is None:
            self._form = form
            if self._announces and form.columns != (MESSAGES,):
                logger.info("%s: its rows are %s", self._place, form.name)
        place = f"data source {self._place} {where}"
        images: list[Any] = []
        for name in IMAGE_FIELDS:
            value = row.get(name) or None
            images += value if isinstance(value, list) else [] if value is None else [value]
        missing = [name for name in form.columns if name not in row]
        if missing:
            return BadSample(f"{place} has no field {missing[0]!r}")
        try:
            return chat_of(form, row, images, place, self._folder, is_table=is_table)
        except BadChat as error:
            return BadSample(str(error) if str(error).startswith(place) else f"{place}: {error}")

    def _domain(self, row: dict[str, Any], where: str) -> str:
        field = self.spec.domain_field
        if field is None:
            return ""
        self._require_field(field, "`domain_field`", row, where)
        domain = self._checked_text(row[field], field, where).strip()
        if not domain or len(domain) > _MAX_DOMAIN_LENGTH or not _DOMAIN.fullmatch(domain):
            raise DataError(
                f"data source {self._place} {where}: field {field!r} holds {domain[:80]!r}, which "
                f"is no domain: give 1 to {_MAX_DOMAIN_LENGTH} characters without commas"
            )
        return domain

    def _require_no_packing(self) -> None:
        if self.spec.pack:
            raise DataError(
                f"data source {self._place} holds chats or prompts, and `pack` chops one running "
                "text; leave it out"
            )

    def _require_field(self, field: str, flag: str, columns: Collection[str], where: str) -> None:
        if field not in columns:
            place = f"{self._place} {where}".strip()
            shown = ", ".join(map(str, columns))[:200] or "none"
            raise DataError(
                f"data source {place} has no field {field!r}; it has: {shown}; name one with "
                f"{flag}, or give chats ('messages') or another form of docs/data.md"
            )

    def _require_messages(self, content: list[Any], where: str) -> None:
        """Refuse a list of texts, as of a file that is one object of columns: messages may be
        texts, but of JSON."""
        if content and all(isinstance(v, str) and not messages_in(f"[{v}]") for v in content):
            raise DataError(
                f"data source {self._place} {where}: field {self.spec.text_field!r} holds a list "
                f"of {len(content)} texts; give a row for each text, or messages with roles"
            )

    def _checked_text(self, value: Any, field: str, where: str) -> str:
        if not isinstance(value, str):
            raise DataError(
                f"data source {self._place} {where}: field {field!r} holds "
                f"{type(value).__name__}, not text"
            )
        if (half := half_a_letter(value)) is not None:
            raise DataError(
                f"data source {self._place} {where}: field {field!r} holds {half}; cut texts "
                "between letters, or leave the row out"
            )
        return value


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


def _folder_of(source: str) -> Path:
    """Where paths of images begin: the file's folder, or the data set's own."""
    path = Path(source).expanduser()
    return path if path.is_dir() else path.parent
