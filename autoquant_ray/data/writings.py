"""Other ways to write the same messages, for templates that take some of them only."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

from autoquant_ray.data.conversations import Message, is_text_part, text_of_part

Rewrite = Callable[[list[Message]], list[Message]]

_THOUGHTS = ("thinking", "redacted_thinking", "reasoning")
_OTHER_ROLES = {"developer": "system", "function": "tool", "model": "assistant"}
"""Role that some templates know -> the one that the others have for it."""


def writings(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages as they are, then in other ways that say the same, the closest first."""
    choices = [
        _roles(messages),
        _texts(messages),
        _absent_contents(messages),
        _arguments(messages),
    ]
    ranks = itertools.product(*(range(len(rewrites)) for rewrites in choices))
    seen: list[list[Message]] = []
    for rank in sorted(ranks, key=lambda rank: (sum(map(bool, rank)), rank[1:])):
        written = messages
        for rewrites, number in zip(choices, rank, strict=True):
            written = rewrites[number](written)
        if written not in seen:
            seen.append(written)
            yield written


def is_thought(part: Any) -> bool:
    """Whether a part is a model's thought, which many templates leave out on purpose."""
    return isinstance(part, dict) and part.get("type") in _THOUGHTS


def needs_check(message: Message) -> bool:
    """Whether many templates leave a message out without a word, though it can be written for them.

    Args:
        message: Of a chat; its role, a call of an earlier API or an object as content is why.
    """
    is_object = isinstance(message.get("content"), dict)
    return message["role"] in _OTHER_ROLES or bool(message.get("function_call")) or is_object


def joined_text(message: Message) -> Message:
    """A message whose parts of text are one text; as it is where it has others."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part for part in content if not is_thought(part)]
    if not all(map(is_text_part, texts)):
        return message
    return message | {"content": "".join(map(text_of_part, texts))}


def in_parts(messages: list[Message]) -> list[Message]:
    """Messages whose texts are lists of a part."""
    return [
        m | {"content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m.get("content"), str)
        else m
        for m in messages
    ]


def _as_they_are(messages: list[Message]) -> list[Message]:
    return messages


def _roles(messages: list[Message]) -> list[Rewrite]:
    """Roles of some models or of an earlier API, and calls of that, as most templates know them."""
    if not any(map(needs_check, messages)):
        return [_as_they_are]
    return [_as_they_are, lambda turns: [_in_usual_roles(turn) for turn in turns]]


def _in_usual_roles(message: Message) -> Message:
    renamed = message | {"role": _OTHER_ROLES.get(message["role"], message["role"])}
    call = renamed.pop("function_call", None)
    return renamed | {"tool_calls": [{"type": "function", "function": call}]} if call else renamed


def _texts(messages: list[Message]) -> list[Rewrite]:
    rewrites = [_as_they_are, lambda turns: [joined_text(turn) for turn in turns], in_parts]
    if any(isinstance(message.get("content"), dict) for message in messages):
        rewrites.append(lambda turns: [_object_as_json(turn) for turn in turns])
    return rewrites


def _object_as_json(message: Message) -> Message:
    """A message whose content, such as a tool's result, is an object: as a text of JSON."""
    content = message.get("content")
    return message | {"content": _as_json(content)} if isinstance(content, dict) else message


def _absent_contents(messages: list[Message]) -> list[Rewrite]:
    """Where a message says something else than a content: left away, null, or an empty text."""
    if all(message.get("content") is not None for message in messages):
        return [_as_they_are]

    def rewritten(content: dict[str, Any]) -> Rewrite:
        return lambda turns: [
            {key: value for key, value in turn.items() if key != "content"} | content
            if turn.get("content") is None
            else turn
            for turn in turns
        ]

    return [
        _as_they_are,
        rewritten({}),
        rewritten({"content": None}),
        rewritten({"content": ""}),
    ]


def _arguments(messages: list[Message]) -> list[Rewrite]:
    if not any(m.get("tool_calls") or m.get("function_call") for m in messages):
        return [_as_they_are]
    return [_as_they_are, *(_with_arguments(change) for change in (_as_object, _as_json))]


def _with_arguments(change: Callable[[Any], Any]) -> Rewrite:
    def call(entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        if isinstance(entry.get("function"), dict):
            return entry | {"function": call(entry["function"])}
        return entry | {"arguments": change(entry["arguments"])} if "arguments" in entry else entry

    def rewrite(turns: list[Message]) -> list[Message]:
        return [
            turn | {"tool_calls": [call(entry) for entry in turn["tool_calls"]]}
            if isinstance(turn.get("tool_calls"), list)
            else turn
            for turn in turns
        ]

    return rewrite


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
