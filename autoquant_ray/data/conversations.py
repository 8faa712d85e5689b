"""Chats, and prompts with their answers, with or without images: from a row's values.

Nothing here knows a model: a chat template and a processor make tokens of a conversation
(:mod:`autoquant_ray.data.chat_encoding`), and see its messages as the file has them. Image files
are opened only when the conversation is used.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autoquant_ray.data.forms import BadChat, Form, Values, parsed
from autoquant_ray.data.roles import role_and_content
from autoquant_ray.errors import one_line

ANSWERING = ("assistant", "model")
"""Roles of the messages that are answers."""

IMAGE_TYPES = ("image", "image_url")
_MEDIA_TYPES = ("video", "video_url", "audio", "audio_url", "input_audio", "file")
_IMAGE_KEYS = ("image", "image_url", "url", "path", "bytes")

Message = dict[str, Any]
"""``role``, ``content`` (text, parts such as ``{type: text, text: ...}`` and ``{type: image}``, or
nothing beside ``tool_calls`` and the like), and whatever else the file says."""


@dataclass(frozen=True)
class ImageFile:
    """An image of a conversation.

    Attributes:
        name: Path of its file, or its number where the row holds it.
        content: Bytes of the file; None while they have not been read.
    """

    name: str
    content: bytes | None


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A chat.

    Attributes:
        messages: In order; with images every text is a list of parts.
        images: In the order of their parts.
        where: Source and row, for messages.
        tools: Functions that the model may call, as the template takes them; None without.
        options: Further arguments of the template (TRL's ``chat_template_kwargs``).
    """

    messages: list[Message]
    images: tuple[ImageFile, ...]
    where: str
    tools: list[dict[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Characters and bytes that it holds."""
        texts = sum(_length(message, has_images=bool(self.images)) for message in self.messages)
        return texts + sum(len(image.content or b"") for image in self.images)


@dataclass(frozen=True)
class BadSample:
    """A conversation that cannot be used, and why."""

    reason: str

    def __len__(self) -> int:
        return 0


def chat_of(
    form: Form,
    row: Values,
    images: Sequence[Any],
    where: str,
    folder: Path,
    *,
    is_table: bool = False,
) -> Conversation:
    """The chat of a row.

    Args:
        form: How the row holds it.
        row: Its values.
        images: Values of its image columns. A part of a message holds its image, or takes the next
            of these.
        where: Source and row.
        folder: Where relative paths begin.
        is_table: Whether an empty value may stand for a key that another row has: see
            :meth:`~autoquant_ray.data.rows.RowReader.read`.

    Raises:
        BadChat: It is not of that form, or images are left over or missing.
    """
    clean = _without_empty if is_table else _as_it_is
    turns = form.messages(row)
    if form.joins_images and images:
        turns = _with_image_parts(turns, len(images))
    waiting = iter(images)
    image_files: list[ImageFile] = []
    messages = []
    for number, turn in enumerate(turns, start=1):
        given = parsed(turn, f"message {number}") if isinstance(turn, str) else clean(turn)
        message = role_and_content(given, number)
        messages.append(_with_images(message, waiting, image_files, folder))
    if next(waiting, None) is not None:
        raise BadChat(f"{len(images)} images, more than the messages have places for")
    if image_files:
        messages = [_in_parts(message) for message in messages]
    return Conversation(
        messages=messages,
        images=tuple(image_files),
        where=where,
        tools=_tools(row, clean),
        options=_options(row),
    )


def load_images(conversation: Conversation | BadSample) -> Conversation | BadSample:
    """The conversation with the content of its image files, or the one that cannot be read."""
    if isinstance(conversation, BadSample):
        return conversation
    read: list[ImageFile] = []
    for image in conversation.images:
        try:
            content = Path(image.name).read_bytes() if image.content is None else image.content
        except OSError as error:
            reason = error.strerror or one_line(error)
            return BadSample(f"{conversation.where}: image {image.name} cannot be read: {reason}")
        read.append(replace(image, content=content))
    return replace(conversation, images=tuple(read))


def is_text_part(part: Any) -> bool:
    """Whether a part of a message is text, of whatever name its type has."""
    return isinstance(part, str) or (
        isinstance(part, dict)
        and isinstance(part.get("text"), str)
        and part.get("type", "text") in ("text", "input_text", "output_text")
    )


def text_of_part(part: Any) -> str:
    """The text of such a part."""
    return part if isinstance(part, str) else str(part["text"])


def _with_image_parts(turns: list[Any], num_images: int) -> list[Any]:
    """The turns with images before the user's first text."""
    for place, turn in enumerate(turns):
        is_asked = isinstance(turn, dict) and turn.get("role") == "user"
        if is_asked and isinstance(turn.get("content"), str):
            text = {"type": "text", "text": turn["content"]}
            asked = turn | {"content": [*({"type": "image"} for _ in range(num_images)), text]}
            return [*turns[:place], asked, *turns[place + 1 :]]
    return turns


def _length(message: Message, *, has_images: bool) -> int:
    content = message.get("content")
    if isinstance(content, list) and not has_images:
        size = sum(len(text_of_part(part)) for part in content if is_text_part(part))
    else:
        size = len(str(content or ""))
    others = (value for key, value in message.items() if key not in ("role", "content"))
    return size + sum(len(str(value)) for value in others if value)


def _as_it_is(value: Any) -> Any:
    return value


def _without_empty(value: Any, *, is_message: bool = True) -> Any:
    """A value of a table without the keys that are there for other rows only.

    An empty ``content`` of a message stays: a message has one.
    """
    if isinstance(value, list):
        return [_without_empty(entry, is_message=False) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_empty(entry, is_message=False)
        for key, entry in value.items()
        if entry is not None or (is_message and key == "content")
    }


def _tools(row: Values, clean: Callable[[Any], Any]) -> list[dict[str, Any]] | None:
    value = row.get("tools") or None
    tools = parsed(value, "'tools'") if isinstance(value, str) else clean(value)
    if not tools:
        return None
    listed = tools if isinstance(tools, list) else [tools]
    entries = [parsed(tool, "an entry of 'tools'") for tool in listed]
    if not all(isinstance(tool, dict) for tool in entries):
        raise BadChat("'tools' is not a list of objects")
    return entries


def _options(row: Values) -> dict[str, Any]:
    options = parsed(row.get("chat_template_kwargs") or {}, "'chat_template_kwargs'")
    if not isinstance(options, dict):
        raise BadChat("'chat_template_kwargs' is not an object")
    return {name: value for name, value in options.items() if value is not None}


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return message | {"content": [{"type": "text", "text": content}]}


def _with_images(
    message: Message, waiting: Iterator[Any], image_files: list[ImageFile], folder: Path
) -> Message:
    """A message whose images have gone to the others; their parts mark the places."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _MEDIA_TYPES or not isinstance(part, dict | str):
            raise BadChat(f"a part of type {kind!r}; give parts of text and images")
        if isinstance(part, str) or kind not in IMAGE_TYPES:
            parts.append(part)
            continue
        inline = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
        value = next(waiting, None) if inline is None else inline
        if value is None:
            raise BadChat("an image part without an image")
        image_files.append(_image(value, len(image_files) + 1, folder))
        parts.append({"type": "image"})
    return message | {"content": parts}


def _image(value: Any, number: int, folder: Path) -> ImageFile:
    if isinstance(value, dict):  # as ``datasets`` stores an image
        value = next((value[key] for key in ("bytes", "url", "path") if value.get(key)), None)
    if isinstance(value, bytes):
        return ImageFile(str(number), value)
    if not isinstance(value, str) or not value:
        kind = type(value).__name__
        raise BadChat(f"an image is {kind}, not bytes or the path of a file")
    if value.startswith("data:"):
        try:
            content = base64.b64decode(value.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise BadChat(f"an image is not base64: {one_line(error)}") from None
        return ImageFile(str(number), content)
    if "://" in value:
        raise BadChat(f"image {value[:200]} is not downloaded; give files or bytes")
    return ImageFile(str(folder / value), None)
