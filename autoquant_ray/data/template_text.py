"""What a model's chat template writes of a conversation: messages and tools as the file has them.

Templates differ in what they take. Where one refuses messages as they are, or leaves out what they
say, they are written as it takes them, and nothing else of them changes: parts of text joined, or a
text as a part; a content that is null left away, or the reverse; arguments of a call as an object,
or as a text of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from autoquant_ray.data.conversations import (
    Conversation,
    Message,
    is_text_part,
    text_of_part,
)
from autoquant_ray.data.forms import BadChat, half_a_letter
from autoquant_ray.data.roles import NO_CONTENT
from autoquant_ray.data.writings import (
    in_parts,
    is_thought,
    joined_text,
    needs_check,
    writings,
)
from autoquant_ray.errors import ModelError, one_line

_MARK = "\ue0a8"  # for private use: in no text, and no template does anything to it
_END_OF_THOUGHTS = "</think>"
_MAY_BE_LEFT_OUT = frozenset(
    {"tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"}
)
"""Keys of which a note tells, or that many templates leave out on purpose."""


def require_template(owner: Any, conversation: Conversation, model: str) -> str:
    """The chat template that a conversation goes to.

    Args:
        owner: A tokenizer or a processor.
        conversation: Its tools may have a template of their own.
        model: For the message.

    Raises:
        ModelError: There is none.
    """
    if not owner.chat_template:
        raise ModelError(
            f"model {model} has no chat template, which chats and prompts with answers need; give "
            "an instruction-tuned model, put its chat_template.jinja into the model's folder, or "
            "give plain text"
        )
    if isinstance(owner.chat_template, dict):
        name = "tool_use" if conversation.tools and "tool_use" in owner.chat_template else "default"
        return str(owner.chat_template.get(name, ""))
    return str(owner.chat_template)


def write_text(
    owner: Any, conversation: Conversation, messages: list[Message], is_prompt: bool
) -> str:
    """The template's text of messages, with the prompt of an answer or without.

    Args:
        owner: A tokenizer or a processor.
        conversation: Gives the tools and other arguments.
        messages: Some of the conversation's.
        is_prompt: Whether the prompt of an answer follows.

    Raises:
        BadChat: The template refuses them.
    """
    options: dict[str, Any] = {**conversation.options, "add_generation_prompt": is_prompt}
    if conversation.tools is not None:
        options["tools"] = conversation.tools
    try:
        text = str(owner.apply_chat_template(messages, **options, tokenize=False))
    except Exception as error:  # noqa: BLE001 - a template raises anything
        raise refused(conversation, error) from None
    if (half := half_a_letter(text)) is not None:
        raise BadChat(f"{conversation.where}: a message holds {half}; cut texts between letters")
    return text


def refused(conversation: Conversation, error: Exception) -> BadChat:
    """The error for a conversation that the template refuses."""
    return BadChat(
        f"{conversation.where}: the model's chat template refuses it: {one_line(error, 160)}"
    )


def as_template_takes_them(owner: Any, conversation: Conversation) -> Conversation:
    """The conversation with its messages as they are, or else as the template takes them.

    Args:
        owner: A tokenizer or a processor.
        conversation: As the file has it.

    Raises:
        BadChat: The template refuses it however it is written, or leaves out a part.
    """
    refusal: BadChat | None = None
    taken: tuple[list[Message], str] | None = None
    for messages in writings(conversation.messages):
        try:
            text = write_text(owner, conversation, messages, False)
        except BadChat as error:
            refusal = refusal or error
            continue
        is_whole = all(
            _writes(owner, conversation, messages, index, text)
            for index, message in enumerate(messages)
            if needs_check(message)
        )
        if is_whole or taken is None:
            taken = messages, text
        if is_whole:
            break
    if taken is None:
        assert refusal is not None
        raise refusal
    messages, text = taken
    if not conversation.images:
        messages = _with_written_contents(owner, conversation, messages, text)
        _require_written(messages, text, conversation.where)
    return replace(conversation, messages=messages)


def _writes(
    owner: Any, conversation: Conversation, messages: list[Message], index: int, text: str
) -> bool:
    """Whether the template's text holds what a message says, and not by chance."""
    message = messages[index]
    content, call = message.get("content"), message.get("function_call")
    if call and not _says(call, text):
        return False
    if isinstance(content, dict):
        return str(content) not in text and _says(content, text)
    if not content:
        return True
    mark = [{"type": "text", "text": _MARK}] if isinstance(content, list) else _MARK
    marked = [*messages[:index], message | {"content": mark}, *messages[index + 1 :]]
    try:
        return _MARK in write_text(owner, conversation, marked, False)
    except BadChat:
        return _says(content, text)


def _says(part: Any, text: str) -> bool:
    """Whether a text holds the longest of the texts within a part."""
    said = sorted(_texts(part), key=len)
    return not said or _is_in(said[-1], text)


def _require_written(messages: list[Message], text: str, where: str) -> None:
    """Check that something is written of each message that says what it says in keys of its own.

    Raises:
        BadChat: Nothing is.
    """
    for number, message in enumerate(messages, start=1):
        if message.get("content") is not None or message.keys() & _MAY_BE_LEFT_OUT:
            continue
        others = {key: value for key, value in message.items() if key not in NO_CONTENT}
        if not _says(others, text):
            raise BadChat(
                f"{where}: the model's chat template writes nothing of message {number}, which has "
                f"no 'content' but {', '.join(map(repr, others))[:80]}; put its text into 'content'"
            )


def _with_written_contents(
    owner: Any, conversation: Conversation, messages: list[Message], text: str
) -> list[Message]:
    """The messages with their texts in the form in which the template writes them."""
    said = [m["content"].strip() for m in messages if isinstance(m.get("content"), str)]
    if any(said) and not any(_is_in(content, text) for content in said if content):
        listed = in_parts(messages)  # the template knows parts alone
        try:
            of_parts = write_text(owner, conversation, listed, False)
        except BadChat:
            return messages
        return listed if all(_is_in(content, of_parts) for content in said) else messages
    return [_joined(message, text, conversation.where) for message in messages]


def _joined(message: Message, text: str, where: str) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    if str(content) not in text and all(_is_written(part, text) for part in content):
        return message
    texts = [part for part in content if not is_thought(part)]
    other = next((part for part in texts if not is_text_part(part)), None)
    if other is not None:
        kind = other.get("type") if isinstance(other, dict) else type(other).__name__
        raise BadChat(
            f"{where}: the model's chat template does not write a part of type {kind!r}; give it "
            "as text, or as the key of a message that the template knows"
        )
    return joined_text(message)


def _is_written(part: Any, text: str) -> bool:
    """Whether the template's text holds what a part says, and does not hold it as Python's."""
    if isinstance(part, dict) and str(part) in text:
        return False
    if is_text_part(part):
        return _is_in(text_of_part(part), text)
    if is_thought(part):
        return bool(text)
    return _says(part, text)


def _texts(part: Any, key: str = "") -> Iterator[str]:
    """Texts within a part, without its type and numbers of calls."""
    if isinstance(part, str) and key not in ("type", "id", "tool_use_id"):
        yield part
    values = part.items() if isinstance(part, dict) else enumerate(part or ())
    if isinstance(part, dict | list):
        for name, value in values:
            yield from _texts(value, str(name))


def _is_in(said: str, text: str) -> bool:
    return said.strip() in text or any(
        json.dumps(said, ensure_ascii=is_ascii)[1:-1] in text for is_ascii in (True, False)
    )


def template_notes(owner: Any, conversation: Conversation, text: str) -> tuple[str, ...]:
    """What to tell of how the template writes a conversation.

    Args:
        owner: A tokenizer or a processor.
        conversation: The chat.
        text: What the template wrote.
    """
    messages = conversation.messages
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    calls += [message["function_call"] for message in messages if message.get("function_call")]
    held = {"tools": conversation.tools or [], "tool_calls": calls}
    left_out = " and ".join(
        name
        for name, entries in held.items()
        if any(not _is_in(_function_name(entry), text) for entry in entries)
    )
    notes = []
    if left_out:
        notes.append(
            f"leaves out '{left_out}', so no sample holds them; a model that is served with tools "
            "has a template that writes them"
        )
    for role in _left_out_roles(messages, text):
        notes.append(f"leaves out texts of messages of role {role!r}, so no sample holds them")
    if _says_none(owner, conversation, text):
        notes.append("writes the word None for a content that is null; leave such a content away")
    return tuple(notes)


def _left_out_roles(messages: list[Message], text: str) -> list[str]:
    """Roles of messages whose texts, but for thoughts, the template did not write."""
    return sorted(
        {
            message["role"]
            for message in messages
            if isinstance(content := message.get("content"), str)
            and not _is_in(content.rpartition(_END_OF_THOUGHTS)[2], text)
        }
    )


def _says_none(owner: Any, conversation: Conversation, text: str) -> bool:
    messages = conversation.messages
    if "None" not in text or all(message.get("content", "") is not None for message in messages):
        return False
    empty = [m | {"content": ""} if m.get("content", "") is None else m for m in messages]
    try:
        return write_text(owner, conversation, empty, False).count("None") < text.count("None")
    except BadChat:
        return False


def _function_name(entry: Any) -> str:
    function = entry.get("function", entry) if isinstance(entry, dict) else {}
    return str(function.get("name", "")) if isinstance(function, dict) else ""
