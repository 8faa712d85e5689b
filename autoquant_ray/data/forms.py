"""Forms that chats and instructions have in files: which columns say so, and their messages.

ShareGPT, Alpaca, Dolly, pairs of a prompt and its answer, and the conversational forms of TRL. What
a message holds beside its role and text is kept as it is (:mod:`autoquant_ray.data.conversations`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from autoquant_ray.errors import DataError

Values = Mapping[str, Any]
"""Column -> value of a row."""

MESSAGES, PROMPT, CHOSEN = "messages", "prompt", "chosen"
_SHARED = ("system", "tools", "chat_template_kwargs")
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadChat(DataError):
    """A chat that cannot be used, while others of its source can."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How rows hold a chat.

    Attributes:
        name: For the log.
        columns: Columns that say so.
        optional: Columns that are read where they are there.
        messages: Makes the messages of a row; raises :class:`BadChat` where it holds none.
        joins_images: Whether the row's images stand before the first message.
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    messages: Callable[[Values], Any]
    joins_images: bool = False


def form_of(columns: Collection[str], text_field: str) -> Form | None:
    """The form of rows with these columns; None for plain text, and where nothing tells.

    Args:
        columns: Of a row, or of all.
        text_field: Column of the text. Where it names another than ``text``, rows are plain text,
            or chats in that column.
    """
    by_name = {form.columns[0]: form for form in _CHATS}
    if text_field in columns:
        return by_name.get(text_field)
    if text_field != "text":
        return None
    return next((form for form in _FORMS if set(form.columns) <= set(columns)), None)


def chats_in(column: str) -> Form:
    """Chats in a column of any name."""
    return Form(
        name=f"chats in {column!r}", columns=(column,), optional=_SHARED, messages=_chat(column)
    )


def parsed(value: Any, what: str) -> Any:
    """A value that some files hold as a text of JSON.

    Args:
        value: Anything.
        what: Names it in the error.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadChat(f"{what} is a text that is no JSON") from None


def half_a_letter(text: str) -> str | None:
    """What no text of UTF-8 has and no tokenizer takes, in words; None where all is well.

    JSON can name half of a letter that UTF-16 writes in two: programs that cut texts there do.
    """
    half = _SURROGATE.search(text)
    return f"half of a letter (\\u{ord(half[0]):x}, cut from its pair)" if half else None


def _chat(column: str) -> Callable[[Values], Any]:
    def messages(row: Values) -> Any:
        turns = parsed(row[column], f"{column!r}")
        if not isinstance(turns, list) or not turns:
            raise BadChat(f"{column!r} is not a list of messages, or an empty one")
        return [*_system_message(row, turns), *turns]

    return messages


def _system_message(row: Values, turns: list[Any]) -> list[dict[str, Any]]:
    """What a column ``system`` says, unless the chat begins with such a message."""
    text = row.get("system")
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    has_system = "system" in (first.get("role"), first.get("from"))
    if not isinstance(text, str) or not text or has_system:
        return []
    return [{"role": "system", "content": text}]


def _pair(prompt: str, answer: str) -> Callable[[Values], Any]:
    """A prompt and its answer, each a text or a list of messages."""

    def messages(row: Values) -> Any:
        answers = _turns(row[answer], "assistant", answer)
        begins = answers[0].get("role") if isinstance(answers[0], dict) else None
        asked = [] if begins in ("system", "user") else _turns(row[prompt], "user", prompt)
        turns = [*asked, *answers]  # an answer that begins with the prompt is the whole chat
        return [*_system_message(row, turns), *turns]

    return messages


def _instruction(answer: str, context: str) -> Callable[[Values], Any]:
    def messages(row: Values) -> Any:
        asked = _text(row["instruction"], "instruction")
        if extra := row.get(context):
            asked += f"\n{_text(extra, context)}"
        asking = {"role": "user", "content": asked}
        turns = [asking, *_turns(row[answer], "assistant", answer)]
        return [*_system_message(row, turns), *turns]

    return messages


def _turns(value: Any, role: str, field: str) -> list[dict[str, Any]]:
    turns = messages_in(value)
    return turns or [{"role": role, "content": _text(value, field)}]


def messages_in(value: Any) -> list[Any]:
    """The messages that a value holds, as a list or as its text of JSON; none for other texts."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return []
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return []
    is_chat = all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in turns)
    return list(turns) if is_chat else []


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        kind = "an empty list" if value == [] else type(value).__name__
        raise BadChat(f"field {field!r} holds {kind}, not text")
    return value


_CHATS = (
    Form(
        name="chats",
        columns=(MESSAGES,),
        optional=_SHARED,
        messages=_chat(MESSAGES),
    ),
    Form(
        name="chats in 'conversations' (ShareGPT's from and value, or role and content)",
        columns=("conversations",),
        optional=_SHARED,
        messages=_chat("conversations"),
    ),
    Form(
        name="chats in 'conversation'",
        columns=("conversation",),
        optional=_SHARED,
        messages=_chat("conversation"),
    ),
)

_FORMS = (
    *_CHATS,
    Form(
        name="prompts and answers",
        columns=("prompt", "answer"),
        optional=_SHARED,
        messages=_pair("prompt", "answer"),
        joins_images=True,
    ),
    *(
        Form(
            name=f"pairs of {prompt!r} and {answer!r} ({origin})",
            columns=(prompt, answer),
            optional=_SHARED,
            messages=_pair(prompt, answer),
            joins_images=True,
        )
        for prompt, answer, origin in (
            ("prompt", "completion", "TRL"),
            ("prompt", "response", "a prompt and its answer"),
            ("prompt", "chosen", "TRL's preferences, of which 'rejected' is not read"),
            ("question", "answer", "a prompt and its answer"),
        )
    ),
    Form(
        name="chats in 'chosen' (TRL's preferences, of which 'rejected' is not read)",
        columns=(CHOSEN,),
        optional=_SHARED,
        messages=_chat(CHOSEN),
    ),
    Form(
        name="instructions (Alpaca)",
        columns=("instruction", "output"),
        optional=("input", *_SHARED),
        messages=_instruction("output", "input"),
        joins_images=True,
    ),
    Form(
        name="instructions (Dolly)",
        columns=("instruction", "response"),
        optional=("context", *_SHARED),
        messages=_instruction("response", "context"),
        joins_images=True,
    ),
    Form(
        name="prompts without an answer (TRL)",
        columns=(PROMPT,),
        optional=_SHARED,
        messages=_chat(PROMPT),
    ),
)
