"""Where the answers of a chat stand in the text of its template."""

from __future__ import annotations

from typing import Any

import pytest
from chats import chat

from autoquant_ray.data.answer_spans import answer_spans
from autoquant_ray.errors import DataError


def _without_earlier_thoughts(messages: list[dict[str, Any]], is_prompt: bool) -> str:
    """As the templates of Qwen3 and DeepSeek: only the last message keeps its thoughts."""
    last = len(messages) - 1
    texts = [
        m["content"] if number == last else m["content"].split("</think>")[-1]
        for number, m in enumerate(messages)
    ]
    turns = [f"<{m['role']}>{text}<end>" for m, text in zip(messages, texts, strict=True)]
    return "".join(turns) + ("<assistant>" if is_prompt else "")


def test_answers_whose_thoughts_the_template_drops() -> None:
    turns = [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": f"<think>{'long ' * 30}</think>first answer"},
        {"role": "user", "content": "second question"},
        {"role": "assistant", "content": "<think>short</think>second answer"},
    ]
    whole = _without_earlier_thoughts(turns, False)
    spans = answer_spans(_without_earlier_thoughts, chat(turns))
    texts = [whole[span.start : span.end] for span in spans]
    assert texts == ["first answer", "<think>short</think>second answer<end>"]


def test_answer_that_the_template_rewrites_is_refused() -> None:
    def render(messages: list[dict[str, Any]], is_prompt: bool) -> str:
        return _without_earlier_thoughts(messages, is_prompt).replace("answer<end><user>", "<user>")

    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>because</think>an answer"},
        {"role": "user", "content": "a question that is longer than what was said before it"},
    ]
    with pytest.raises(DataError, match="answer of message 2 begins and ends cannot be told"):
        answer_spans(render, chat(turns))
