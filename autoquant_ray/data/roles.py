"""A message of a chat as templates take it, from the names that files give its parts.

ShareGPT's ``from`` and ``value`` become ``role`` and ``content``, and its roles those of templates.
A message with ``role`` stays as it is, but for speakers that no template knows, and a text that
stands elsewhere than in ``content``.
"""

from __future__ import annotations

from typing import Any

from autoquant_ray.data.forms import BadChat, parsed

_CALL = "function_call"

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "ai": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    _CALL: "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Speaker of a ShareGPT turn -> role."""
_NO_ROLES = frozenset({"human", "gpt", "chatgpt", "bing", "bard", "ai"})
"""Speakers that no template takes for a role."""
_TEXT_KEYS = ("value", "text", "parts")
"""Where messages with a ``role`` have their text in some files, in place of ``content``."""

NO_CONTENT = ("role", "content", "name", "weight", "id")
"""Keys that say nothing of their own."""


def role_and_content(message: Any, number: int) -> dict[str, Any]:
    """A message with its role and, unless other keys say something, its content.

    Args:
        message: As the file has it.
        number: From 1, for messages.

    Raises:
        BadChat: It is no message, or says nothing.
    """
    if isinstance(message, dict) and "role" not in message and "from" in message:
        message = _of_sharegpt(message, number)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadChat(f"message {number} is no object with a 'role'")
    named = _with_usual_names(message)
    content = named.get("content")
    if content is None and not any(
        value not in (None, [], {}, "") for key, value in named.items() if key not in NO_CONTENT
    ):
        raise BadChat(
            f"message {number} says nothing: it has no 'content', nor anything such as 'tool_calls'"
        )
    if not isinstance(content, str | list | dict | None):
        kind = type(content).__name__
        raise BadChat(f"message {number}: its content is {kind}, not a text or a list of parts")
    return named


def _with_usual_names(message: dict[str, Any]) -> dict[str, Any]:
    role = message["role"].lower()
    if role in _NO_ROLES or role in _ROLES.values():
        message = message | {"role": _ROLES[role]}
    place = next((key for key in _TEXT_KEYS if message.get(key)), None)
    if message.get("content") is not None or place is None:
        return message
    others = {key: value for key, value in message.items() if key not in ("content", place)}
    return others | {"content": message[place]}


def _of_sharegpt(turn: dict[str, Any], number: int) -> dict[str, Any]:
    speaker, value = turn["from"], turn.get("value")
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise BadChat(
            f"message {number}: it is from {str(speaker)[:40]!r}; known: {', '.join(_ROLES)}"
        )
    if not isinstance(value, str):
        raise BadChat(f"message {number}: its value is {type(value).__name__}, not a text")
    if speaker.lower() != _CALL:
        return {"role": role, "content": value}
    calls = parsed(value, f"message {number}, a function call,")
    entries = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in entries):
        raise BadChat(f"message {number}: a function call without a 'name'")
    called = [{"type": "function", "function": call} for call in entries]
    return {"role": role, "content": "", "tool_calls": called}
