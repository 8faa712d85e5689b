"""Which part of a chat is its answers: in the template's text, and in its tokens.

The answer is what the template adds to the messages before it with ``add_generation_prompt``, up
to and with the end mark of its turn. That text must be the beginning of the whole chat's, which is
checked for every conversation.

Shape letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autoquant_ray.data.conversations import ANSWERING, Conversation, Message
from autoquant_ray.data.samples import Bools, Int32s
from autoquant_ray.errors import DataError

_END_OF_THOUGHTS = "</think>"

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

    Raises:
        DataError: The text of the messages before an answer is not the beginning of the whole, or
            the whole does not hold the answer.
    """
    messages = conversation.messages
    whole = render(messages, False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != ANSWERING:
            continue
        before, after = render(messages[:index], True), render(messages[: index + 1], False)
        start, end = len(before), len(after)
        if not whole.startswith(after):
            content = _text(message)
            shown = (content, content.rpartition(_END_OF_THOUGHTS)[2].strip())
            ends = (whole.find(text, start) + len(text) for text in shown if text in whole[start:])
            end = next(ends, start)
        if not whole.startswith(before) or end <= start:
            raise _cannot_tell(conversation, index)
        spans.append(AnswerSpan(start, end, index))
    return spans


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
        DataError: The tokens of a beginning are not the beginning of the tokens.
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


def _text(message: Message) -> str:
    content = message["content"]
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    return str(content).strip()


def _cannot_tell(conversation: Conversation, index: int) -> DataError:
    return DataError(
        f"{conversation.where}: where the answer of message {index + 1} begins and ends cannot be "
        "told, because the model's chat template writes the messages before it otherwise than "
        "alone; give `loss_on` all, or one answer per chat"
    )
