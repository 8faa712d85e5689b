"""Which part of a chat is its answers: in the template's text, and in its tokens.

The answer is what the template adds to the messages before it with ``add_generation_prompt``, up
to and with the end mark of its turn. That text must be the beginning of the whole chat's, which is
checked for every conversation. Where it is not, because the prompt of an answer opens a thought
that an answer of the past does not have, or there is no message before it, a mark in the place of
the answer shows where it begins and ends.

Shape letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autoquant_ray.data.conversations import (
    ANSWERING,
    Conversation,
    Message,
    is_text_part,
    text_of_part,
)
from autoquant_ray.data.forms import BadChat
from autoquant_ray.data.samples import Bools, Int32s

_END_OF_THOUGHTS = "</think>"
_MARK = "\ue0a7"  # for private use: in no text, and no template does anything to it

Render = Callable[[list[Message], bool], str]
"""Messages, and whether the prompt of an answer follows -> the template's text."""

TokensOf = Callable[[int, int], npt.NDArray[Any]]
"""First characters of the text, and how many messages they are of -> their token ids."""


@dataclass(frozen=True)
class AnswerSpan:
    """An answer in the template's text.

    Attributes:
        start: Its first character.
        end: The character after its last.
        index: Of its message.
    """

    start: int
    end: int
    index: int


def answer_spans(render: Render, conversation: Conversation) -> list[AnswerSpan]:
    """The answers of a conversation, in the template's text of the whole.

    Some templates write an answer otherwise once more messages follow it (they drop a model's
    thoughts). It then ends with its content, or what of it follows the thoughts, without an end
    mark.

    Args:
        render: Raises :class:`BadChat` where the template refuses messages.
        conversation: The chat.

    Raises:
        BadChat: The text of the messages before an answer is not the beginning of the whole, or
            the whole does not hold the answer.
    """
    messages = conversation.messages
    whole = render(messages, False)
    spans: list[AnswerSpan] = []
    for index, message in enumerate(messages):
        if message["role"] not in ANSWERING:
            continue
        earliest = spans[-1].end if spans else 0
        start = _start(render, messages, index, whole, earliest)
        end = None if start is None else _end(render, messages, index, whole, start)
        if start is None or end is None or end <= start:
            raise _cannot_tell(conversation, index)
        spans.append(AnswerSpan(start, end, index))
    return spans


def _start(
    render: Render, messages: list[Message], index: int, whole: str, earliest: int
) -> int | None:
    """Where an answer begins; None where it cannot be told."""
    prompt = None
    if index > 0:
        before = _text_or_none(render, messages[:index], is_prompt=True)
        if before is not None and whole.startswith(before):
            return len(before)
        past = _text_or_none(render, messages[:index], is_prompt=False)
        if before is not None and past is not None and before.startswith(past):
            prompt = before[len(past) :]
            earliest = max(earliest, len(past) if whole.startswith(past) else 0)
    marked = _marked(render, messages, index)
    if marked is None:
        return None
    content = _num_equal(whole, marked)
    if content < earliest:
        return None
    prompt = _prompt_of_answers(render) if prompt is None else prompt
    place = whole.rfind(prompt, earliest, content) if prompt else -1
    return content if place < 0 else place + len(prompt)


def _end(render: Render, messages: list[Message], index: int, whole: str, start: int) -> int | None:
    """Where an answer ends; None where it cannot be told."""
    after = _text_or_none(render, messages[: index + 1], is_prompt=False)
    if after is not None and whole.startswith(after):
        return len(after)
    content = "" if messages[index].get("tool_calls") else _content(messages[index])
    shown = (content, content.rpartition(_END_OF_THOUGHTS)[2].strip())
    ends = (whole.find(text, start) + len(text) for text in shown if text and text in whole[start:])
    end = next(ends, None)
    if end is not None or content:
        return end
    marked = _marked(render, messages, index)
    if marked is None or not whole.startswith(marked[: marked.find(_MARK)]):
        return None
    end = len(whole) - _num_equal(whole[::-1], marked[::-1])
    return end + len(_end_mark(render, messages, index, whole[end:]))


def _marked(render: Render, messages: list[Message], index: int) -> str | None:
    """The text with a mark instead of an answer and all that belongs to it."""
    role, content = messages[index]["role"], messages[index].get("content")
    mark = [{"type": "text", "text": _MARK}] if isinstance(content, list) else _MARK
    marked = {"role": role, "content": mark}
    text = _text_or_none(
        render, [*messages[:index], marked, *messages[index + 1 :]], is_prompt=False
    )
    return text if text is not None and _MARK in text else None


def _end_mark(render: Render, messages: list[Message], index: int, rest: str) -> str:
    """What follows an answer's content in its turn; '' where the rest does not begin so."""
    last = _marked(render, messages[: index + 1], index)
    mark = "" if last is None else last.partition(_MARK)[2]
    return mark if rest.startswith(mark) else ""


def _num_equal(first: str, second: str) -> int:
    """Characters that two texts begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _prompt_of_answers(render: Render) -> str:
    """What the template adds where an answer is to follow."""
    asked: list[Message] = [{"role": "user", "content": _MARK}]
    texts = [_text_or_none(render, asked, is_prompt=is_prompt) for is_prompt in (False, True)]
    if texts[0] is None or texts[1] is None or not texts[1].startswith(texts[0]):
        return ""
    return texts[1][len(texts[0]) :]


def _text_or_none(render: Render, messages: list[Message], *, is_prompt: bool) -> str | None:
    try:
        return render(messages, is_prompt)
    except BadChat:
        return None


def mask_by_offsets(offsets_T2: npt.NDArray[Any], spans: Sequence[AnswerSpan]) -> Bools:
    """Tokens with a character inside an answer.

    Args:
        offsets_T2: First character of each token, and the one after its last.
        spans: Answers.
    """
    starts_T, ends_T = offsets_T2.reshape(-1, 2).T
    mask_T = np.zeros(len(starts_T), dtype=np.bool_)
    for span in spans:
        mask_T |= (starts_T < span.end) & (ends_T > span.start) & (ends_T > starts_T)
    return mask_T


def mask_by_prefixes(
    tokens_T: Int32s,
    spans: Sequence[AnswerSpan],
    num_characters: int,
    tokens_of: TokensOf,
    conversation: Conversation,
) -> Bools:
    """Tokens of answers, where only whole texts can be made tokens of.

    Args:
        tokens_T: Of the whole text.
        spans: Answers.
        num_characters: Length of the text.
        tokens_of: Makes tokens of its beginning.
        conversation: For the message.

    Raises:
        BadChat: The tokens of a beginning are not the beginning of the tokens.
    """
    mask_T = np.zeros(len(tokens_T), dtype=np.bool_)
    for span in spans:
        before = tokens_of(span.start, span.index)
        is_last = span.end == num_characters
        after = tokens_T if is_last else tokens_of(span.end, span.index + 1)
        for beginning in (before, after):
            if not np.array_equal(tokens_T[: len(beginning)], beginning):
                raise _cannot_tell(conversation, span.index)
        mask_T[len(before) : len(after)] = True
    return mask_T


def _content(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(text_of_part(part) for part in content if is_text_part(part))
    return content.strip() if isinstance(content, str) else ""


def _cannot_tell(conversation: Conversation, index: int) -> BadChat:
    return BadChat(
        f"{conversation.where}: where the answer of message {index + 1} begins and ends cannot be "
        "told, because the model's chat template writes the messages before it otherwise than "
        "alone; give `loss_on` all, or one answer per chat"
    )
