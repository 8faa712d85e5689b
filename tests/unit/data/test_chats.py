"""Chats, prompts with answers and images: from rows of data to tokens with their loss."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from chats import (
    TEMPLATE,
    TURNS,
    chat,
    encoded,
    make_image,
    read,
    with_processor,
    with_template,
    write_pairs,
    write_rows,
)

from autoquant_ray.data.chat_encoding import ConversationEncoder
from autoquant_ray.data.conversations import BadSample, Conversation, load_images
from autoquant_ray.data.samples import num_predicted
from autoquant_ray.errors import AutoQuantError, DataError
from autoquant_ray.models.tokenizer import TokenizerRef

TOKENS = [240, 241, 1, 2, 243, 240, 242, 3, 4, 5, 243, 240, 241, 6, 243, 240, 242, 7, 243]
ANSWERS = [3, 4, 5, 243, 7, 243]


@pytest.fixture
def encoder_of(model_folder: Any, tmp_path: Path) -> Callable[..., ConversationEncoder]:
    """Encoder with the word tokenizer of a text model and a chat template."""

    def build(template: str = TEMPLATE, loss_on: str = "answer") -> ConversationEncoder:
        folder = with_template(model_folder("llama"), tmp_path / "model", template)
        return ConversationEncoder(TokenizerRef(model=str(folder)), loss_on)

    return build


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_with_messages_are_chats(kind: str, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    path = write_rows(tmp_path / f"d.{kind}", [{"messages": TURNS}])
    of_parts = write_rows(tmp_path / f"p.{kind}", [{"messages": turns}])
    assert [conversation.messages for conversation in read(path)] == [TURNS]
    assert [conversation.messages for conversation in read(of_parts)] == [turns]


def test_rows_with_prompt_and_answer_are_chats_of_two(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": "w1", "answer": "w2"}])
    (conversation,) = read(path)
    assert conversation.messages == [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
    ]


def test_rows_with_the_text_field_stay_texts(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"text": "w1", "messages": TURNS, "prompt": "w2"}])
    assert read(path) == ["w1"]
    assert read(path, text_field="prompt") == ["w2"]
    assert isinstance(read(path, text_field="messages")[0], Conversation)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_images_are_paths_beside_the_data_or_their_content(kind: str, tmp_path: Path) -> None:
    png = make_image(0)
    (tmp_path / "a.png").write_bytes(png)
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    forms: list[Any] = ["a.png", str(tmp_path / "a.png"), url]
    if kind == "parquet":
        forms = [{"bytes": png, "path": "elsewhere.png"}]
    for form in forms:
        row = {"prompt": "w1", "answer": "w2", "image": form}
        (conversation,) = read(write_rows(tmp_path / f"d.{kind}", [row]))
        assert [part["type"] for part in conversation.messages[0]["content"]] == ["image", "text"]
        loaded = load_images(conversation)
        assert isinstance(loaded, Conversation)
        assert [image.content for image in loaded.images] == [png]


def test_image_parts_hold_their_image_or_take_the_next_one(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    parts = [
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "b.png"}},
        {"type": "text", "text": "w1"},
    ]
    row = {"messages": [{"role": "user", "content": parts}], "images": ["a.png"]}
    (conversation,) = read(write_rows(tmp_path / "d.jsonl", [row]))
    loaded = load_images(conversation)
    assert isinstance(loaded, Conversation)
    assert [image.content for image in loaded.images] == [b"a.png", b"b.png"]


IMAGE_PART = {"type": "image"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": []}, "an empty one"),
        ({"messages": None}, "an empty one"),
        ({"messages": [{"role": "user"}]}, "message 1 says nothing"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "says nothing"),
        ({"messages": [{"content": "w1"}]}, "message 1 is no object with a 'role'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "type 'video'"),
        ({"messages": [{"role": "user", "content": [IMAGE_PART]}]}, "without an image"),
        ({"messages": TURNS, "image": "a.png"}, "1 images, more than"),
        ({"prompt": "w1", "answer": "w2", "image": "https://a/b.png"}, "is not downloaded"),
        ({"prompt": "w1", "answer": "w2", "image": 3}, "an image is int"),
        ({"prompt": "w1", "answer": "w2", "image": "data:image/png;base64,?"}, "not base64"),
        ({"prompt": "w1", "answer": None}, "field 'answer' holds NoneType"),
        ({"conversations": [{"from": "cat", "value": "w1"}]}, "from 'cat'; known: human"),
        ({"messages": TURNS, "tools": "none"}, "'tools' is a text that is no JSON"),
    ],
)
def test_row_that_is_no_chat_is_a_bad_sample(
    row: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"messages": TURNS}, row, {"messages": TURNS}])
    good, bad, after = read(path)
    assert isinstance(good, Conversation)
    assert isinstance(after, Conversation)
    assert isinstance(bad, BadSample)
    assert re.search(f"d.jsonl line 2.*{problem}", bad.reason)
    assert load_images(bad) is bad


def test_row_among_chats_that_lacks_its_messages_is_a_bad_sample(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"messages": TURNS}, {"id": 3}])
    _, bad = read(path)
    assert isinstance(bad, BadSample)
    assert bad.reason.endswith("d.jsonl line 2 has no field 'messages'")


def test_row_of_no_form_is_refused_with_its_columns(tmp_path: Path) -> None:
    for row in ({"prompt": "w1"}, {"id": 3, "prompt": "w1"}):
        path = write_rows(tmp_path / "d.jsonl", [row])
        with pytest.raises(DataError, match=r"line 1 has no field 'text'; it has: .*prompt"):
            read(path)


def test_options_that_do_not_go_with_the_rows_are_refused(tmp_path: Path) -> None:
    chats = write_rows(tmp_path / "d.jsonl", [{"messages": TURNS}])
    texts = write_rows(tmp_path / "t.jsonl", [{"text": "w1"}])
    lines = tmp_path / "t.txt"
    lines.write_text("w1\n")
    with pytest.raises(DataError, match="`pack` chops one running text"):
        read(chats, pack=True)
    for source in (texts, lines, "pydoc"):
        with pytest.raises(DataError, match=r"has no answers.*`loss_on` all"):
            read(source, loss_on="answer")


def test_loss_on_all_counts_every_token_of_the_template(encoder_of: Any) -> None:
    result = encoded(encoder_of(loss_on="all"))
    assert result.sample.tokens_T.tolist() == TOKENS
    assert result.sample.in_loss_T.all()
    assert num_predicted(result.sample) == len(TOKENS) - 1


def test_loss_on_answer_counts_the_answers_and_their_end_marks(encoder_of: Any) -> None:
    sample = encoded(encoder_of()).sample
    assert sample.tokens_T.tolist() == TOKENS
    assert sample.tokens_T[sample.in_loss_T].tolist() == ANSWERS
    assert num_predicted(sample) == len(ANSWERS)


def test_marks_of_the_template_win(encoder_of: Any) -> None:
    marked = (
        "{% for m in messages %}w240 {% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }} {% endgeneration %}{% else %}{{ m.content }} {% endif %}w243 {% endfor %}"
    )
    sample = encoded(encoder_of(marked)).sample
    assert sample.tokens_T[sample.in_loss_T].tolist() == [3, 4, 5, 7]


def test_answer_written_otherwise_as_the_last_one_ends_with_its_content(encoder_of: Any) -> None:
    thinking = TEMPLATE.replace(
        "{% if m.content is string %}",
        "{% if m.role == 'assistant' and loop.last %}w200 {% endif %}{% if m.content is string %}",
    )
    sample = encoded(encoder_of(thinking)).sample
    assert sample.tokens_T[sample.in_loss_T].tolist() == [3, 4, 5, 200, 7, 243]


def test_answers_are_found_where_the_template_counts_the_messages(encoder_of: Any) -> None:
    counting = "w{{ messages | length }} " + TEMPLATE
    sample = encoded(encoder_of(counting)).sample
    assert sample.tokens_T.tolist() == [4, *TOKENS]
    assert sample.tokens_T[sample.in_loss_T].tolist() == [3, 4, 5, 7, 243]


def test_template_that_writes_answers_otherwise_makes_a_bad_sample(encoder_of: Any) -> None:
    text = "{{ m.content if m.role == 'user' else m.content[::-1] }}"
    reversing = TEMPLATE.replace("{{ m.content }}", text) + "w{{ 200 + messages | length }}"
    result = encoder_of(reversing).encode(chat())
    assert isinstance(result, BadSample)
    assert "line 3: where the answer of message 2 begins" in result.reason


def test_template_that_refuses_a_chat_makes_a_bad_sample(encoder_of: Any) -> None:
    strict = "{{ raise_exception('roles must take turns') }}"
    result = encoder_of(strict).encode(chat())
    assert isinstance(result, BadSample)
    assert re.search("line 3: the model's chat template refuses.*take turns", result.reason)
    assert encoder_of(strict).encode(result) is result


def test_model_without_a_template_says_what_to_do(model_folder: Any) -> None:
    encoder = ConversationEncoder(TokenizerRef(model=str(model_folder("llama"))), "all")
    with pytest.raises(AutoQuantError, match=r"no chat template.*chat_template.jinja") as caught:
        encoder.encode(chat())
    assert caught.value.exit_code == 2


def test_tokenizer_without_offsets_finds_the_same_answers(tmp_path: Path) -> None:
    tokenizer = transformers.ByT5Tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    encoder = ConversationEncoder(TokenizerRef(model=str(tmp_path)), "answer")
    sample = encoded(encoder).sample
    assert not tokenizer.is_fast
    assert tokenizer.decode(sample.tokens_T[sample.in_loss_T]) == "w3 w4 w5 w243 w7 w243 "


@pytest.fixture(scope="module")
def vision_folder(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_processor(model_folder("qwen3_vl"), tmp_path_factory.mktemp("vision"))


def test_images_become_tensors_and_placeholders_do_not_count(
    vision_folder: Path, tmp_path: Path
) -> None:
    (row,) = read(write_pairs(tmp_path, [(64, 48)]))
    loaded = load_images(row)
    assert isinstance(loaded, Conversation)
    result = encoded(ConversationEncoder(TokenizerRef(model=str(vision_folder)), "all"), loaded)
    sample = result.sample
    assert sample.tokens_T[2:8].tolist() == [251, 250, 250, 250, 250, 252]
    assert result.num_fixed == 7
    assert np.flatnonzero(~sample.in_loss_T).tolist() == [3, 4, 5, 6]
    assert sample.tensors["pixel_values"].shape == (16, 1536)
    assert sample.tensors["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_images_for_a_text_model_are_refused_in_one_line(encoder_of: Any, tmp_path: Path) -> None:
    (row,) = read(write_pairs(tmp_path, [(64, 48)]))
    loaded = load_images(row)
    assert isinstance(loaded, Conversation)
    with pytest.raises(DataError, match=r"has images, but model .* \(llama\) takes text only"):
        encoder_of().encode(loaded)


def test_image_that_cannot_be_used_is_named(vision_folder: Path, tmp_path: Path) -> None:
    missing, damaged = read(write_pairs(tmp_path, [(64, 48), (32, 32)]))
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes(b"no image")
    result = load_images(missing)
    assert isinstance(result, BadSample)
    assert result.reason.endswith(
        "line 1: image " + str(tmp_path / "0.png") + " cannot be read: No such file or directory"
    )
    loaded = load_images(damaged)
    assert isinstance(loaded, Conversation)
    encoder = ConversationEncoder(TokenizerRef(model=str(vision_folder)), "all")
    result = encoder.encode(loaded)
    assert isinstance(result, BadSample)
    assert "line 2: image " in result.reason
    assert result.reason.endswith("1.png cannot be read: it is no image of a known kind")
