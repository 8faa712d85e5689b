"""Chats of agents against templates of several kinds: what the template sees, and the answers.

The reference is ``apply_chat_template`` of transformers on the rows as they are in the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from chats import byte_tokenizer, encoded, read, spec_of, write_rows

from autoquant_ray.data.chat_encoding import ConversationEncoder, Encoded
from autoquant_ray.data.chat_samples import ConversationSamples
from autoquant_ray.data.conversations import BadSample
from autoquant_ray.data.cutting import DataCounts
from autoquant_ray.models.tokenizer import TokenizerRef

CALLS = (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}"
)
TOOLS = "{% for t in tools or [] %}<tool>{{ t | tojson }}</tool>{% endfor %}"
THOUGHT = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
CONTENT = "{{ m.content if m.content is string else '' }}"
PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content or [] %}"
    "{{ p.text }};{% endfor %}{% endif %}"
)


def template(content: str = CONTENT, before: str = "", opens: str = "", check: str = "") -> str:
    """Turns in angle brackets, with tools, calls and thoughts."""
    return (
        f"{TOOLS}{before}{{% for m in messages %}}{check}<{{{{ m.role }}}}:"
        f"{{{{ m.name }}}}>{THOUGHT}{content}{CALLS}<end>{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<assistant:>{opens}{{% endif %}}"
    )


USER = {"role": "user", "content": "How warm is it?"}
ANSWER = {"role": "assistant", "content": "It is 7."}
RESULT = {"role": "tool", "name": "find", "tool_call_id": "c1", "content": "7 degrees"}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"unit": None}}}


def calling(arguments: Any, **content: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call], **content}


CHATS: dict[str, list[dict[str, Any]]] = {
    "null": [USER, calling({"city": "Oslo", "unit": None}, content=None), RESULT, ANSWER],
    "absent": [USER, calling({"city": "Oslo"}), RESULT, ANSWER],
    "text of JSON": [USER, calling('{"city": "Oslo"}', content=""), RESULT, ANSWER],
    "thoughts": [USER, ANSWER | {"reasoning_content": "I look it up."}],
    "names": [USER | {"name": "Ada"}, ANSWER | {"name": "clerk"}],
    "parts": [USER | {"content": [{"type": "text", "text": "How"}, {"type": "text", "text": "?"}]}],
}


@pytest.fixture
def encoder_of(tmp_path: Path) -> Callable[..., ConversationEncoder]:
    def build(text: str, loss_on: str = "answer") -> ConversationEncoder:
        byte_tokenizer(tmp_path / "model", text)
        return ConversationEncoder(TokenizerRef(model=str(tmp_path / "model")), loss_on)

    return build


@pytest.fixture
def written(encoder_of: Any, tmp_path: Path) -> Callable[..., str]:
    """What a template writes of a row of a file."""

    def write(text: str, row: dict[str, Any]) -> str:
        (chat,) = read(write_rows(tmp_path / "d.jsonl", [row]))
        sample = encoded(encoder_of(text, "all"), chat).sample
        return str(_tokenizer(tmp_path).decode(sample.tokens_T))

    return write


def _tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder / "model")


def answers(encoder: ConversationEncoder, row: dict[str, Any], folder: Path) -> list[str]:
    """The parts of the template's text that count in the loss."""
    (chat,) = read(write_rows(folder / "d.jsonl", [row]))
    sample = encoded(encoder, chat).sample
    marked = "".join(
        chr(token + 1) if counts else "\0"
        for token, counts in zip(sample.tokens_T, sample.in_loss_T, strict=True)
    )
    tokenizer = _tokenizer(folder)
    return [
        tokenizer.decode([ord(c) - 1 for c in part]) for part in re.split("\0+", marked) if part
    ]


@pytest.mark.parametrize("name", CHATS)
def test_template_sees_what_the_file_says(name: str, written: Any, tmp_path: Path) -> None:
    row = {"messages": CHATS[name], "tools": [TOOL]}
    text = written(template(PARTS), row)
    reference = _tokenizer(tmp_path).apply_chat_template(
        row["messages"], tools=row["tools"], tokenize=False
    )
    assert text == reference
    assert '"unit": null' in text


REFUSING = {
    "absent": "{% if 'content' not in m %}{{ raise_exception('no content') }}{% endif %}",
    "null": "{% if 'content' in m and m.content is none %}{{ raise_exception('none') }}{% endif %}",
    "text of JSON": "{% for c in m.tool_calls or [] %}{{ c.function.arguments.items() | string "
    "| replace('', '') | truncate(0, True, '') }}{% endfor %}",
}


@pytest.mark.parametrize("name", REFUSING)
def test_content_or_arguments_that_a_template_refuses_are_written_as_it_takes_them(
    name: str, written: Any, tmp_path: Path
) -> None:
    text = written(template(check=REFUSING[name]), {"messages": CHATS[name]})
    with pytest.raises(Exception, match=r"content|none|items"):
        _tokenizer(tmp_path).apply_chat_template(CHATS[name], tokenize=False)
    assert '<call>find {"city": "Oslo"' in text
    assert "None" not in text


def test_arguments_for_a_template_that_joins_texts_are_json(written: Any) -> None:
    joining = template().replace("c.function.arguments | tojson", "'' + c.function.arguments")
    assert '<call>find {"city": "Oslo"}</call>' in written(joining, {"messages": CHATS["absent"]})


@pytest.mark.parametrize("content", [CONTENT, "{{ m.content }}"])
def test_parts_are_joined_for_a_template_of_text_alone(content: str, written: Any) -> None:
    # Its own text of a list would be nothing, or a list of Python.
    assert written(template(content), {"messages": CHATS["parts"]}) == "<user:>How?<end>"


def test_texts_are_parts_for_a_template_of_parts_alone(written: Any) -> None:
    alone = "{% for p in m.content %}{% if p.text is defined %}{{ p.text }}{% endif %}{% endfor %}"
    text = written(template(alone), {"messages": [USER, ANSWER]})
    assert text == "<user:>How warm is it?<end><assistant:>It is 7.<end>"


RESULT_OBJECT = RESULT | {"content": {"degrees": "seven"}}
EARLIER_API = {"role": "assistant", "content": None, "function_call": {"name": "find"}}
EARLIER_API["function_call"] |= {"arguments": '{"city": "Oslo"}'}  # type: ignore[index]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([{"role": "developer", "content": "7"}, USER, ANSWER], "<system:>7<end>"),
        ([USER, calling({}), RESULT | {"role": "function"}], "<tool:find>7 degrees<end>"),
        ([USER, ANSWER | {"role": "model"}], "<assistant:>It is 7.<end>"),
        ([USER, EARLIER_API, RESULT], '<call>find {"city": "Oslo"}</call><end><tool:find>'),
        ([USER, calling({}), RESULT_OBJECT], '<tool:find>{"degrees": "seven"}<end>'),
    ],
)
@pytest.mark.parametrize("takes_objects", [False, True])
def test_messages_that_a_template_leaves_out_are_written_as_it_takes_them(
    turns: list[dict[str, Any]], expected: str, takes_objects: bool, written: Any
) -> None:
    silent = template().replace(
        "{% for m in messages %}",
        "{% for m in messages if m.role in ('system', 'user', 'assistant', 'tool') %}",
    )
    if takes_objects:  # and refuses a text of JSON
        silent = silent.replace("c.function.arguments", "dict(c.function.arguments)")
    else:
        expected = expected.replace('{"city": "Oslo"}', json.dumps('{"city": "Oslo"}'))
    assert expected in written(silent, {"messages": turns})


def test_roles_that_a_template_knows_stay(written: Any) -> None:
    turns = [{"role": "developer", "content": "7"}, USER, ANSWER | {"role": "model"}]
    assert written(template(), {"messages": turns}).count("<developer:>7<end>") == 1
    assert written(template(), {"messages": turns}).endswith("<model:>It is 7.<end>")


def test_texts_that_the_template_leaves_out_are_told_once(
    encoder_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = "{% if m.role == 'system' and not loop.first %}{% else %}" + CONTENT + "{% endif %}"
    encoder = encoder_of(template(first), "all")
    rules = ConversationSamples(spec_of("d"), DataCounts(), skips_bad=False)
    thought = ANSWER | {"content": "<think>So.</think>It is 7."}
    middle = {"role": "system", "content": "Be brief now."}
    rows = [{"messages": [USER, thought, *more, USER]} for more in ([], [middle], [middle])]
    chats = read(write_rows(tmp_path / "d.jsonl", rows))
    assert len(list(rules.take(("", encoder.encode(chat)) for chat in chats))) == 3
    assert [record.getMessage().partition(" line ")[2] for record in caplog.records] == [
        "2: the model's chat template leaves out texts of messages of role 'system', so no sample "
        "holds them"
    ]


def test_message_that_says_nothing_to_a_template_is_refused(
    encoder_of: Any, tmp_path: Path
) -> None:
    turns = [{"role": "user", "question": "How warm?"}, ANSWER]
    (chat,) = read(write_rows(tmp_path / "d.jsonl", [{"messages": turns}]))
    result = encoder_of(template(), "all").encode(chat)
    assert isinstance(result, BadSample)
    assert "writes nothing of message 1, which has no 'content' but 'question'" in result.reason
    asking = template("{{ m.question or m.content }}")
    assert isinstance(encoder_of(asking, "all").encode(chat), Encoded)


def test_half_of_a_letter_makes_a_bad_sample(encoder_of: Any, tmp_path: Path) -> None:
    turns = [USER, ANSWER | {"content": "Warm \ud83d"}]
    (chat,) = read(write_rows(tmp_path / "d.jsonl", [{"messages": turns}]))
    result = encoder_of(template(), "all").encode(chat)
    assert isinstance(result, BadSample)
    assert "line 1: a message holds half of a letter (\\ud83d" in result.reason


@pytest.mark.parametrize(
    ("part", "is_taken"),
    [
        ({"type": "thinking", "thinking": "deep"}, True),
        ({"type": "tool_use", "id": "c1", "name": "find", "input": {"city": "Oslo"}}, False),
    ],
)
def test_part_that_no_template_writes_is_refused_unless_it_is_a_thought(
    part: dict[str, Any], is_taken: bool, encoder_of: Any, tmp_path: Path
) -> None:
    turns = [USER, ANSWER | {"content": [part, {"type": "text", "text": "It is 7."}]}]
    (chat,) = read(write_rows(tmp_path / "d.jsonl", [{"messages": turns}]))
    for text in (template(), template(PARTS)):
        result = encoder_of(text).encode(chat)
        assert isinstance(result, Encoded if is_taken else BadSample)
        if isinstance(result, BadSample):
            assert "line 1: the model's chat template does not write a part" in result.reason


def test_arguments_of_a_row_reach_the_template(written: Any) -> None:
    asking = template(before="{{ 'thinks ' if enable_thinking else '' }}")
    rows = {"messages": [USER]}
    assert written(asking, rows) == "<user:>How warm is it?<end>"
    text = written(asking, rows | {"chat_template_kwargs": {"enable_thinking": True}})
    assert text == "thinks <user:>How warm is it?<end>"


SYSTEM = "{% if messages[0].role != 'system' %}<system:>Be kind.<end>{% endif %}"
FORGETFUL = THOUGHT.replace("%}", " and loop.last %}", 1)
EMPTY_THOUGHT = "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"


@pytest.mark.parametrize(
    ("text", "turns", "expected"),
    [
        (template(), [ANSWER, USER, ANSWER], ["It is 7.<end>"] * 2),
        (template(before=SYSTEM), [ANSWER, USER, ANSWER], ["It is 7.<end>"] * 2),
        (template(opens="<think>"), [ANSWER, USER, ANSWER], ["It is 7.<end>"] * 2),
        (template(opens="<think>"), [USER, ANSWER, USER, ANSWER], ["It is 7.<end>"] * 2),
        (
            template(opens="<think>"),
            [USER, ANSWER, USER, ANSWER | {"reasoning_content": "So."}],
            ["It is 7.<end>", "So.</think>It is 7.<end>"],
        ),
        (
            template(opens="<think>").replace(THOUGHT, EMPTY_THOUGHT),
            [USER, ANSWER, USER, ANSWER],
            ["It is 7.", "</think>It is 7.<end>"],
        ),
        (
            template(opens="<think>").replace(THOUGHT, FORGETFUL),
            [USER, ANSWER | {"reasoning_content": "So."}, USER, ANSWER],
            ["It is 7.", "It is 7.<end>"],
        ),
        (
            template().replace(THOUGHT, EMPTY_THOUGHT),
            [USER, calling({"city": "Oslo"}), RESULT, ANSWER, USER, ANSWER],
            ['<call>find {"city": "Oslo"}</call><end>', "It is 7.", "<think></think>It is 7.<end>"],
        ),
    ],
)
def test_answers_are_what_the_model_writes(
    text: str,
    turns: list[dict[str, Any]],
    expected: list[str],
    encoder_of: Any,
    tmp_path: Path,
) -> None:
    assert answers(encoder_of(text), {"messages": turns}, tmp_path) == expected


def test_marks_of_a_template_see_the_tools(encoder_of: Any, tmp_path: Path) -> None:
    text = template().replace(
        CONTENT + CALLS, f"{{% generation %}}{CONTENT}{CALLS}{{% endgeneration %}}"
    )
    row = {"messages": [USER, ANSWER], "tools": [TOOL]}
    assert answers(encoder_of(text), row, tmp_path) == ["How warm is it?", "It is 7."]


ALTERNATING = (
    "{% if (m.role == 'user') != loop.first %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}"
)


def test_chats_that_cannot_be_used_are_skipped_and_counted(
    encoder_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"messages": [USER, ANSWER]}
    rows = [good, {"messages": [USER, USER]}, {"messages": []}, {"messages": None}, good, {}]
    encoder, counts = encoder_of(template(check=ALTERNATING)), DataCounts()
    rules = ConversationSamples(spec_of("d"), counts, skips_bad=True)
    contents = read(write_rows(tmp_path / "d.jsonl", rows))
    samples = list(rules.take(("", encoder.encode(chat)) for chat in contents))
    assert len(samples) == 2
    assert counts == DataCounts(read=6, used=2, cut=0, bad=4)
    assert "line 2: the model's chat template refuses it: roles must alternate" in rules.reasons[0]
    assert [reason.partition("line ")[2][0] for reason in rules.reasons] == list("2346")


def test_tools_that_the_template_does_not_know_are_told_once(
    encoder_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}<end>{% endfor %}"
    row = {"messages": CHATS["null"], "tools": [json.dumps(TOOL)]}
    encoder = encoder_of(plain, "all")
    rules = ConversationSamples(spec_of("d"), DataCounts(), skips_bad=False)
    chats = read(write_rows(tmp_path / "d.jsonl", [row] * 3))
    assert len(list(rules.take(("", encoder.encode(chat)) for chat in chats))) == 3
    assert caplog.text.count("leaves out 'tools and tool_calls'") == 1
    assert "None" not in caplog.text


def test_word_none_for_a_content_that_is_null_is_told(
    encoder_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = encoder_of(template("{{ m.content }}"), "all")
    rules = ConversationSamples(spec_of("d"), DataCounts(), skips_bad=False)
    rows = [{"messages": CHATS[name]} for name in ("absent", "null", "null")]
    chats = read(write_rows(tmp_path / "d.jsonl", rows))
    assert len(list(rules.take(("", encoder.encode(chat)) for chat in chats))) == 3
    assert caplog.text.count("line 2: the model's chat template writes the word None") == 1
    assert "line 3" not in caplog.text
