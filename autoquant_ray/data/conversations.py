"""Chats, and prompts with their answers, with or without images: from a row's values.

Nothing here knows a model: a chat template and a processor make tokens of a conversation
(:mod:`autoquant_ray.data.chat_encoding`). Image files are opened only when the conversation is
used.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoquant_ray.errors import DataError, one_line

ANSWERING = "assistant"
"""Role of the messages that are answers."""

_IMAGE_KEYS = ("image", "image_url", "url", "path", "bytes")

Message = dict[str, Any]
"""``role``, and ``content``: text, or parts ``{type: text, text: ...}`` and ``{type: image}``."""


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
        messages: In order; with images every content is a list of parts, else a text.
        images: In the order of their parts.
        where: Source and row, for messages.
    """

    messages: list[Message]
    images: tuple[ImageFile, ...]
    where: str

    def __len__(self) -> int:
        """Characters and bytes that it holds."""
        texts = sum(len(str(message["content"])) for message in self.messages)
        return texts + sum(len(image.content or b"") for image in self.images)


@dataclass(frozen=True)
class BadSample:
    """A conversation that cannot be used, and why."""

    reason: str

    def __len__(self) -> int:
        return 0


def pair_of(
    prompt: str, answer: str, images: Sequence[Any], where: str, folder: Path
) -> Conversation:
    """A prompt, with images before it, and its answer.

    Args:
        prompt: What the user says.
        answer: What the model should say.
        images: Values of the row's image columns.
        where: Source and row.
        folder: Where relative paths begin.

    Raises:
        DataError: An image is neither bytes nor a path.
    """
    asked = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": asked}, {"role": ANSWERING, "content": answer}]
    return chat_of(messages, images, where, folder)


def chat_of(messages: Any, images: Sequence[Any], where: str, folder: Path) -> Conversation:
    """A chat from its ``messages``.

    Args:
        messages: Objects with ``role`` and ``content``: a text, or parts of the types ``text``
            and ``image`` (or ``image_url``). A part holds its image, or takes the next one of the
            row's image columns.
        images: Values of the row's image columns.
        where: Source and row.
        folder: Where relative paths begin.

    Raises:
        DataError: They are not of that form, or images are left over or missing.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' is not a list of messages, or an empty one")
    waiting = iter(images)
    image_files: list[ImageFile] = []
    read = [_message(message, waiting, image_files, where, folder) for message in messages]
    if next(waiting, None) is not None:
        raise DataError(f"{where}: {len(images)} images, more than the messages have places for")
    if not image_files:
        for message in read:
            message["content"] = "".join(part["text"] for part in message["content"])
    return Conversation(messages=read, images=tuple(image_files), where=where)


def load_images(conversation: Conversation) -> Conversation | BadSample:
    """The conversation with the content of its image files, or the one that cannot be read."""
    read: list[ImageFile] = []
    for image in conversation.images:
        try:
            content = Path(image.name).read_bytes() if image.content is None else image.content
        except OSError as error:
            reason = error.strerror or one_line(error)
            return BadSample(f"{conversation.where}: image {image.name} cannot be read: {reason}")
        read.append(replace(image, content=content))
    return replace(conversation, images=tuple(read))


def _message(
    message: Any, waiting: Iterator[Any], image_files: list[ImageFile], where: str, folder: Path
) -> Message:
    """A message with its content as parts; adds its images to those found."""
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(role, str) or not isinstance(content, str | list):
        raise DataError(f"{where}: a message without 'role' and 'content', or of another type")
    if isinstance(content, str):
        return {"role": role, "content": [{"type": "text", "text": content}]}
    parts: list[dict[str, str]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url"):
            inline = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
            value = next(waiting, None) if inline is None else inline
            if value is None:
                raise DataError(f"{where}: an image part without an image")
            image_files.append(_image(value, len(image_files) + 1, where, folder))
            parts.append({"type": "image"})
        else:
            raise DataError(f"{where}: a part of type {kind!r}; give parts of text and images")
    return {"role": role, "content": parts}


def _image(value: Any, number: int, where: str, folder: Path) -> ImageFile:
    if isinstance(value, dict):  # as ``datasets`` stores an image
        value = next((value[key] for key in ("bytes", "url", "path") if value.get(key)), None)
    if isinstance(value, bytes):
        return ImageFile(str(number), value)
    if not isinstance(value, str) or not value:
        kind = type(value).__name__
        raise DataError(f"{where}: an image is {kind}, not bytes or the path of a file")
    if value.startswith("data:"):
        try:
            content = base64.b64decode(value.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise DataError(f"{where}: an image is not base64: {one_line(error)}") from None
        return ImageFile(str(number), content)
    if "://" in value:
        raise DataError(f"{where}: image {value[:200]} is not downloaded; give files or bytes")
    return ImageFile(str(folder / value), None)
