"""Forms of chats that other tools write, and what becomes of each."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from chats import read, write_rows

from autoquant_ray.data.conversations import BadSample, Conversation
from autoquant_ray.errors import DataError

ASKED, ANSWER = "Name a prime.", "Seven."
USER, ASSISTANT = {"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}
SYSTEM = {"role": "system", "content": "Be kind."}
SHAREGPT = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWER}]
CAPITALS = [{"from": "Human", "value": ASKED}, {"from": "GPT", "value": ANSWER}]

FORMS: dict[str, dict[str, Any]] = {
    "ShareGPT": {"id": "a1", "conversations": SHAREGPT},
    "ShareGPT's from": {"conversations": CAPITALS},
    "role and content": {"conversations": [USER, ASSISTANT]},
    "'conversation'": {"conversation": [USER, ASSISTANT]},
    "Alpaca": {"instruction": ASKED, "input": "", "output": ANSWER},
    "Dolly": {"instruction": ASKED, "context": "", "response": ANSWER, "category": "x"},
    "'prompt' and 'completion' (TRL)": {"prompt": ASKED, "completion": ANSWER},
    "pairs of 'prompt' and 'completion'": {"prompt": [USER], "completion": [ASSISTANT]},
    "'prompt' and 'response'": {"prompt": ASKED, "response": ANSWER},
    "'question' and 'answer'": {"question": ASKED, "answer": ANSWER},
    "'prompt' and 'chosen'": {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [USER]},
    "'chosen' (TRL's preferences": {"chosen": [USER, ASSISTANT], "rejected": [USER]},
    "'rejected' is not read": {"prompt": ASKED, "chosen": [USER, ASSISTANT], "rejected": [USER]},
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", FORMS)
def test_form_is_read_as_a_chat_and_named(
    name: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        chats = read(write_rows(tmp_path / f"d.{kind}", [FORMS[name]] * 2), loss_on="answer")
    assert [chat.messages for chat in chats] == [[USER, ASSISTANT]] * 2
    assert [chat.tools for chat in chats] == [None, None]
    assert caplog.text.count(name) == 1


def test_rows_with_messages_win_over_other_forms(tmp_path: Path) -> None:
    row = {"prompt": "x", "chosen": [USER], "messages": [USER, ASSISTANT]}
    (chat,) = read(write_rows(tmp_path / "d.jsonl", [row]))
    assert chat.messages == [USER, ASSISTANT]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("name", [*FORMS, "messages", "prompt and answer"])
def test_system_column_begins_a_chat_of_any_form(name: str, kind: str, tmp_path: Path) -> None:
    ours = {
        "messages": {"messages": [USER, ASSISTANT]},
        "prompt and answer": {"prompt": ASKED, "answer": ANSWER},
    }
    row = {"system": "Be kind.", **(FORMS | ours)[name]}
    (chat,) = read(write_rows(tmp_path / f"d.{kind}", [row]))
    assert chat.messages == [SYSTEM, USER, ASSISTANT]


def test_system_column_gives_way_to_a_system_message(tmp_path: Path) -> None:
    for column in ("conversations", "messages"):
        row = {"system": "Be rude.", column: [SYSTEM, USER, ASSISTANT]}
        (chat,) = read(write_rows(tmp_path / "d.jsonl", [row]))
        assert chat.messages == [SYSTEM, USER, ASSISTANT]


def test_instruction_that_is_no_text_is_a_bad_sample(tmp_path: Path) -> None:
    for change in ({"instruction": [USER, USER]}, {"instruction": []}, {"input": [USER]}):
        row = FORMS["Alpaca"] | change
        (bad,) = read(write_rows(tmp_path / "d.jsonl", [row]))
        assert isinstance(bad, BadSample)
        (field,) = change
        assert f"field {field!r} holds" in bad.reason


def test_input_of_an_instruction_follows_it(tmp_path: Path) -> None:
    row = {"instruction": "Say it in French.", "input": "Yes", "output": "Oui"}
    (chat,) = read(write_rows(tmp_path / "d.jsonl", [row]))
    assert chat.messages[0]["content"] == "Say it in French.\nYes"


def test_prompt_that_is_a_list_is_a_chat_without_an_answer(tmp_path: Path) -> None:
    (chat,) = read(write_rows(tmp_path / "d.jsonl", [{"prompt": [USER]}]))
    assert chat.messages == [USER]
    assert read(tmp_path / "d.jsonl", text_field="prompt")[0].messages == [USER]


PAIRS = {
    "prompt and completion": {"prompt": [USER], "completion": [ASSISTANT]},
    "prompt and chosen": {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [USER]},
    "chosen": {"chosen": [USER, ASSISTANT]},
    "prompt": {"prompt": [USER, ASSISTANT]},
    "messages": {"messages": [USER, ASSISTANT]},
}


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("name", PAIRS)
def test_lists_of_messages_may_be_texts_of_json(name: str, kind: str, tmp_path: Path) -> None:
    row = {key: json.dumps(value, indent=1) for key, value in PAIRS[name].items()}
    path = tmp_path / f"d.{kind}"
    if kind == "parquet":
        write_rows(path, [row])
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, row, delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerow(row)
    (chat,) = read(path)
    assert isinstance(chat, Conversation), chat
    assert chat.messages == [USER, ASSISTANT]


def test_text_that_begins_with_a_bracket_is_a_text(tmp_path: Path) -> None:
    for text in ("[1, 2]", "[INST] x", '["a"]', '[{"name": "x"}]', "[]"):
        row = {"prompt": text, "completion": text}
        (chat,) = read(write_rows(tmp_path / "d.jsonl", [row]))
        assert [message["content"] for message in chat.messages] == [text, text]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_preference_of_texts_alone_is_no_chat(kind: str, tmp_path: Path) -> None:
    row = {"chosen": "Human: x. Assistant: y.", "rejected": "Human: x. Assistant: z."}
    path = write_rows(tmp_path / f"d.{kind}", [row])
    with pytest.raises(DataError, match=r"no field 'text'; it has: chosen.*`text_field`"):
        read(path)
    assert read(path, text_field="chosen") == [row["chosen"]]


@pytest.mark.parametrize(
    ("role", "text"), [("human", "content"), ("User", "value"), ("user", "text"), ("user", "parts")]
)
def test_roles_and_texts_under_other_names(role: str, text: str, tmp_path: Path) -> None:
    asked = {"role": role, "content": None, text: [ASKED] if text == "parts" else ASKED}
    answer = {"role": "Assistant" if role == "User" else "gpt", "content": ANSWER}
    (chat,) = read(write_rows(tmp_path / "d.jsonl", [{"messages": [asked, answer]}]))
    expected = USER | ({"content": [ASKED]} if text == "parts" else {})
    assert chat.messages == [expected, ASSISTANT]


def test_named_column_may_hold_chats_of_either_form(tmp_path: Path) -> None:
    row = {"text": "x", "conversations": SHAREGPT, "dialog": [USER, ASSISTANT]}
    row |= {"system": "Be kind.", "tools": [{"name": "find"}]}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    paths = [write_rows(tmp_path / f"d.{kind}", [row]) for kind in ("jsonl", "parquet", "arrow")]
    for path in [*paths, tmp_path / "saved"]:
        for field in ("conversations", "dialog"):
            (chat,) = read(path, text_field=field, loss_on="answer")
            assert chat.messages == [SYSTEM, USER, ASSISTANT]
            assert chat.tools == [{"name": "find"}]


def test_calls_and_results_of_sharegpt_become_tool_calls(tmp_path: Path) -> None:
    call = {"name": "find", "arguments": {"city": "Oslo", "unit": None}}
    turns = [
        SHAREGPT[0],
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "7"},
        SHAREGPT[1],
    ]
    row = {"conversations": turns, "tools": json.dumps([{"name": "find"}])}
    (chat,) = read(write_rows(tmp_path / "d.jsonl", [row]))
    assert chat.messages == [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call}],
        },
        {"role": "tool", "content": "7"},
        ASSISTANT,
    ]
    assert chat.tools == [{"name": "find"}]


def calling(arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    function = {"name": "find", "arguments": arguments}
    call = {"id": "c1", "type": "function", "function": function}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]} | more]
    return {"messages": turns, "tools": [{"type": "function", "function": {"name": "find"}}]}


ROWS = [
    calling({"city": "Oslo"}),
    calling({"day": "2024-01-01", "number": 7}, reasoning_content="So it is."),
    {"messages": [USER, ASSISTANT | {"name": "clerk"}], "tools": None},
]


@pytest.mark.parametrize("place", ["file", "folder"])
def test_messages_of_json_are_what_the_file_says(place: str, tmp_path: Path) -> None:
    nothing = calling({"unit": None})
    path = write_rows(tmp_path / "d.jsonl", [*ROWS, nothing])
    chats = read(path if place == "file" else tmp_path)
    assert [chat.messages for chat in chats] == [row["messages"] for row in [*ROWS, nothing]]
    assert [chat.tools for chat in chats] == [row["tools"] for row in [*ROWS, nothing]]


@pytest.mark.parametrize("kind", ["parquet", "parquet of datasets", "saved"])
def test_keys_that_other_rows_of_a_table_have_are_not_in_a_message(
    kind: str, tmp_path: Path
) -> None:
    if kind == "parquet":
        path = write_rows(tmp_path / "d.parquet", ROWS)
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
        path = tmp_path
    else:
        path = tmp_path / "d.parquet"
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    chats = read(path)
    assert all(isinstance(chat, Conversation) for chat in chats)
    assert [chat.messages for chat in chats] == [row["messages"] for row in ROWS]
    assert [chat.tools for chat in chats] == [row["tools"] for row in ROWS]


def test_texts_of_json_are_read_as_what_they_hold(tmp_path: Path) -> None:
    row = {key: json.dumps(value) for key, value in ROWS[1].items()}
    (chat,) = read(write_rows(tmp_path / "d.jsonl", [row]))
    assert chat.messages == ROWS[1]["messages"]
    assert chat.tools == ROWS[1]["tools"]


def test_arguments_of_the_template_are_kept(tmp_path: Path) -> None:
    row = {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"enable_thinking": False}}
    (chat,) = read(write_rows(tmp_path / "d.jsonl", [row]))
    assert chat.options == {"enable_thinking": False}


def test_images_of_a_pair_stand_before_the_users_text(tmp_path: Path) -> None:
    row = {"system": "Be kind.", "instruction": ASKED, "output": ANSWER, "image": "a.png"}
    (chat,) = read(write_rows(tmp_path / "d.jsonl", [row]))
    assert [image.name for image in chat.images] == [str(tmp_path / "a.png")]
    kinds = [[part["type"] for part in message["content"]] for message in chat.messages]
    assert kinds == [["text"], ["image", "text"], ["text"]]
