"""Chats, prompts with answers and images: from rows of data to samples with their loss."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from chats import TEMPLATE, make_image, with_processor, with_template, write_pairs

from autoquant_ray.data.answer_spans import answer_spans
from autoquant_ray.data.chat_encoding import ConversationEncoder, Encoded
from autoquant_ray.data.chat_samples import ConversationSamples
from autoquant_ray.data.conversations import BadSample, Conversation, load_images
from autoquant_ray.data.cutting import DataCounts, require_usable
from autoquant_ray.data.sample_parts import digest_bytes, rich_part, samples_of, text_part
from autoquant_ray.data.samples import RichSample, num_predicted
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.data.texts import read_rows
from autoquant_ray.errors import AutoQuantError, DataError, StoreError
from autoquant_ray.models.tokenizer import TokenizerRef
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.score.visits import VisitPlanner, make_step, predicting_rows

TURNS = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3 w4 w5"},
    {"role": "user", "content": "w6"},
    {"role": "assistant", "content": "w7"},
]
TOKENS = [240, 241, 1, 2, 243, 240, 242, 3, 4, 5, 243, 240, 241, 6, 243, 240, 242, 7, 243]
ANSWERS = [3, 4, 5, 243, 7, 243]


def spec_of(source: Any, **changes: Any) -> DataSpec:
    return DataSpec(**{"source": str(source), "num_samples": 100, "seq_len": 64} | changes)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, **changes: Any) -> list[Any]:
    return [content for content, _ in read_rows(spec_of(path, **changes))]


@pytest.fixture
def encoder_of(model_folder: Any, tmp_path: Path) -> Callable[..., ConversationEncoder]:
    """Encoder with the word tokenizer of a text model and a chat template."""

    def build(template: str = TEMPLATE, loss_on: str = "answer") -> ConversationEncoder:
        folder = with_template(model_folder("llama"), tmp_path / "model", template)
        return ConversationEncoder(TokenizerRef(model=str(folder)), loss_on)

    return build


def chat(turns: list[dict[str, Any]] = TURNS) -> Conversation:
    return Conversation(messages=turns, images=(), where="data source d.jsonl line 3")


def encoded(encoder: ConversationEncoder, conversation: Conversation | None = None) -> Encoded:
    found = encoder.encode(conversation or chat())
    assert isinstance(found, Encoded)
    return found


# ---- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_with_messages_are_chats(kind: str, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    path = write_rows(tmp_path / f"d.{kind}", [{"messages": TURNS}])
    of_parts = write_rows(tmp_path / f"p.{kind}", [{"messages": turns}])
    assert [one.messages for one in read(path)] == [TURNS]
    assert [m["content"] for one in read(of_parts) for m in one.messages] == ["w1 w2", "w1 w2"]


def test_rows_with_prompt_and_answer_are_chats_of_two(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": "w1", "answer": "w2"}])
    (found,) = read(path)
    assert found.messages == [
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
        (found,) = read(write_rows(tmp_path / f"d.{kind}", [row]))
        assert [part["type"] for part in found.messages[0]["content"]] == ["image", "text"]
        loaded = load_images(found)
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
    (found,) = read(write_rows(tmp_path / "d.jsonl", [row]))
    loaded = load_images(found)
    assert isinstance(loaded, Conversation)
    assert [image.content for image in loaded.images] == [b"a.png", b"b.png"]


IMAGE_PART = {"type": "image"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": []}, "an empty one"),
        ({"messages": [{"role": "user"}]}, "without 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "type 'video'"),
        ({"messages": [{"role": "user", "content": [IMAGE_PART]}]}, "without an image"),
        ({"messages": TURNS, "image": "a.png"}, "1 images, more than"),
        ({"prompt": "w1", "answer": "w2", "image": "https://a/b.png"}, "is not downloaded"),
        ({"prompt": "w1", "answer": "w2", "image": 3}, "an image is int"),
        ({"prompt": "w1", "answer": "w2", "image": "data:image/png;base64,?"}, "not base64"),
        ({"prompt": "w1", "answer": None}, "field 'answer' holds NoneType"),
        ({"prompt": "w1"}, "has no field 'text'; it has: prompt"),
    ],
)
def test_row_that_is_no_chat_is_named(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [row])
    with pytest.raises(DataError, match=f"d.jsonl line 1.*{problem}"):
        read(path)


def test_options_that_do_not_go_with_the_rows_are_refused(tmp_path: Path) -> None:
    chats = write_rows(tmp_path / "d.jsonl", [{"messages": TURNS}])
    texts = write_rows(tmp_path / "t.jsonl", [{"text": "w1"}])
    lines = tmp_path / "t.txt"
    lines.write_text("w1\n")
    with pytest.raises(DataError, match="--pack chops one running text"):
        read(chats, pack=True)
    for source in (texts, lines, "pydoc"):
        with pytest.raises(DataError, match=r"has no answers.*--loss-on all"):
            read(source, loss_on="answer")


# ---- answers ------------------------------------------------------------------------------------


def test_loss_on_all_counts_every_token_of_the_template(encoder_of: Any) -> None:
    found = encoded(encoder_of(loss_on="all"))
    assert found.sample.tokens_T.tolist() == TOKENS
    assert found.sample.in_loss_T.all()
    assert num_predicted(found.sample) == len(TOKENS) - 1


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


def test_template_that_writes_the_past_otherwise_is_refused(encoder_of: Any) -> None:
    counting = "w{{ messages | length }} " + TEMPLATE
    with pytest.raises(DataError, match="line 3: where the answer of message 2 begins"):
        encoder_of(counting).encode(chat())
    assert encoded(encoder_of(counting, "all")).sample.tokens_T[0] == 4


def test_template_that_refuses_a_chat_names_the_row(encoder_of: Any) -> None:
    strict = "{{ raise_exception('roles must take turns') }}"
    with pytest.raises(DataError, match=r"line 3: the model's chat template refuses.*take turns"):
        encoder_of(strict).encode(chat())


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


# ---- images -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vision_folder(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_processor(model_folder("qwen3_vl"), tmp_path_factory.mktemp("vision"))


def test_images_become_tensors_and_placeholders_do_not_count(
    vision_folder: Path, tmp_path: Path
) -> None:
    (row,) = read(write_pairs(tmp_path, [(64, 48)]))
    loaded = load_images(row)
    assert isinstance(loaded, Conversation)
    found = encoded(ConversationEncoder(TokenizerRef(model=str(vision_folder)), "all"), loaded)
    sample = found.sample
    assert sample.tokens_T[2:8].tolist() == [251, 250, 250, 250, 250, 252]
    assert found.num_fixed == 7
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
    found = load_images(missing)
    assert isinstance(found, BadSample)
    assert found.reason.endswith(
        "line 1: image " + str(tmp_path / "0.png") + " cannot be read: No such file or directory"
    )
    loaded = load_images(damaged)
    assert isinstance(loaded, Conversation)
    encoder = ConversationEncoder(TokenizerRef(model=str(vision_folder)), "all")
    result = encoder.encode(loaded)
    assert isinstance(result, BadSample)
    assert "line 2: image " in result.reason
    assert result.reason.endswith("1.png cannot be read: it is no image of a known kind")


# ---- samples ------------------------------------------------------------------------------------


def made(length: int, in_loss: list[int], images: int = 0, fixed: int = 0) -> Encoded:
    tensors: dict[str, Any] = {}
    if images:
        tensors = {
            "mm_token_type_ids": np.ones((1, length), dtype=np.int64),
            "pixel_values": np.full((images, 3), length, dtype=np.float32),
        }
    mask = np.zeros(length, dtype=np.bool_)
    mask[in_loss] = True
    sample = RichSample(tokens_T=np.arange(length, dtype=np.int32), in_loss_T=mask, tensors=tensors)
    return Encoded(sample=sample, num_fixed=fixed, where=f"row of {length}")


def test_samples_are_cut_counted_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    counts = DataCounts()
    rules = ConversationSamples(spec_of("d", seq_len=6, num_samples=2), counts, skips_bad=True)
    rows: list[Encoded | BadSample] = [
        BadSample("row 1: image a.png cannot be read"),
        made(8, [7]),  # its answer is cut off
        made(1, [0]),
        made(9, [5, 7], images=2, fixed=7),
        made(8, [1, 5, 7], images=2, fixed=4),
        made(4, [3]),
        made(4, [3]),
    ]
    samples = [sample for _, sample in rules.take(("", row) for row in rows)]
    assert [len(sample) for sample in samples] == [6, 4]
    assert samples[0].tensors["mm_token_type_ids"].shape == (1, 6)
    assert [num_predicted(sample) for sample in samples] == [2, 1]
    assert counts == DataCounts(read=6, used=2, too_short=1, cut=1, no_answer=1, bad=2)
    assert rules.reasons == [
        "row 1: image a.png cannot be read",
        "row of 9: its images end at token 7 of 9, after --seq-len 6; raise it, or give smaller "
        "images",
    ]
    assert "skipped: row 1" in caplog.text


def test_bad_sample_stops_by_default() -> None:
    rules = ConversationSamples(spec_of("d"), DataCounts(), skips_bad=False)
    with pytest.raises(DataError, match="row 1: gone; skip such samples with --skip-bad-samples"):
        list(rules.take([("", BadSample("row 1: gone"))]))


def test_nothing_usable_says_why() -> None:
    counts = DataCounts(read=3, no_answer=2, bad=1)
    with pytest.raises(DataError, match=r"of 3 chats read, 2 have no answer.*and 1 have an image"):
        require_usable(counts, "d.jsonl")


def test_stored_samples_come_back_and_equal_ones_have_equal_bytes(tmp_path: Path) -> None:
    samples = [made(5, [2, 4], images=2).sample, made(3, [1]).sample]
    directory = RunDirectory(str(tmp_path / "run"))
    for name in ("a.parquet", "b.parquet"):
        directory.write_table(name, "samples", rich_part(7, samples))
    assert directory.read_bytes("a.parquet") == directory.read_bytes("b.parquet")
    table = directory.read_table("a.parquet", "samples")
    assert table.column("sample").to_pylist() == [7, 8]
    for before, after in zip(samples, samples_of(table), strict=True):
        assert isinstance(after, RichSample)
        assert np.array_equal(after.tokens_T, before.tokens_T)
        assert np.array_equal(after.in_loss_T, before.in_loss_T)
        assert set(after.tensors) == set(before.tensors)
        for name, tensor in before.tensors.items():
            assert after.tensors[name].dtype == tensor.dtype
            assert np.array_equal(after.tensors[name], tensor)
    assert digest_bytes(samples) != digest_bytes([samples[1], samples[0]])


def test_stored_texts_have_two_columns_and_come_back_plain(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path / "run"))
    part = text_part(0, np.array([2, 1], dtype=np.int32), np.array([5, 6, 7], dtype=np.int32))
    assert part.column_names == ["sample", "tokens"]
    directory.write_table("a.parquet", "samples", part)
    found = samples_of(directory.read_table("a.parquet", "samples"))
    assert [np.asarray(one).tolist() for one in found] == [[5, 6], [7]]


@pytest.mark.parametrize("dtype", ["<f4", "|O"])
def test_damaged_tensor_is_refused(dtype: str) -> None:
    rows = rich_part(0, [made(5, [2], images=2).sample]).to_pylist()
    rows[0]["tensors"][1] |= {"dtype": dtype, "shape": [3, 3]}
    with pytest.raises(StoreError, match="'pixel_values' is damaged"):
        samples_of(pa.Table.from_pylist(rows, schema=rich_part(0, []).schema))


def test_steps_hold_samples_of_one_kind_and_join_their_images() -> None:
    samples: list[Any] = [
        np.arange(4, dtype=np.int32),
        made(3, [2], images=2).sample,
        made(5, [2, 4], images=1).sample,
        [1, 2],
    ]
    (first, second), *rest = [
        step for visit in VisitPlanner(100, 1, 0).visits(samples) for step in visit
    ]
    assert [sorted((first, second)), *map(sorted, rest)] == [[0, 3], [1, 2]]
    chosen = [samples[position] for position in rest[0]]
    step = make_step(chosen, torch.device("cpu"))
    assert step.ids_BS.shape == (2, 5)
    assert step.inputs["pixel_values"][:, 0].tolist() == [5, 3, 3]
    assert step.inputs["mm_token_type_ids"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert predicting_rows(chosen).tolist() == [1, 3, 6]


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
    found = [whole[span.start : span.end] for span in spans]
    assert found == ["first answer", "<think>short</think>second answer<end>"]


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
