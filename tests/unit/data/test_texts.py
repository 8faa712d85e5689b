"""Reading texts: every kind of source, its errors, and no more memory than a part of it."""

from __future__ import annotations

import json
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import spec_of

from autoquant_ray.data.texts import read_texts
from autoquant_ray.errors import DataError

TEXTS = ["one two", "", " \t", "three  four five"]


def read_all(source: Any, **changes: Any) -> list[str]:
    return list(read_texts(spec_of(source, **changes)))


def write_json_lines(path: Path, texts: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: list[Any], **options: Any) -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, **options)
    return path


def test_read_text_file_gives_lines_without_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"\xef\xbb\xbfone two\r\n\n  three\xc3\xa9 \nlast")
    assert read_all(path) == ["one two", "", "  threeé ", "last"]


def test_read_text_file_packed_gives_the_whole_text(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("one\n\n two\nlast")
    assert "".join(read_all(path, pack=True)) == "one\n\n two\nlast"


def test_read_text_file_not_utf8_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"good\ngood\nbad \xff\n")
    texts = read_texts(spec_of(path))
    assert list(islice(texts, 2)) == ["good", "good"]
    with pytest.raises(DataError, match=r"data\.txt line 3 is not UTF-8"):
        next(texts)


@pytest.mark.parametrize(
    "kind", ["jsonl", "json lines", "json array", "parquet", "folder", "saved"]
)
def test_read_every_kind_gives_the_same_texts(tmp_path: Path, kind: str) -> None:
    source = write_source(tmp_path, kind, TEXTS)
    assert read_all(source) == TEXTS
    assert read_all(source, pack=True) == ["one two", "", "", "\n\nthree  four five"]


@pytest.mark.parametrize("kind", ["jsonl", "json array", "parquet", "folder", "saved"])
def test_read_missing_field_names_it_and_the_columns(tmp_path: Path, kind: str) -> None:
    source = write_source(tmp_path, kind, TEXTS)
    with pytest.raises(DataError, match=r"no field 'body'; it has: id, text"):
        read_all(source, text_field="body")


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("jsonl", "line 2"),
        ("json array", "row 2"),
        ("parquet", "row 2"),
        ("folder", "train.jsonl line 2"),
        ("saved", "row 2"),
    ],
)
def test_read_null_value_names_the_row(tmp_path: Path, kind: str, place: str) -> None:
    source = write_source(tmp_path, kind, ["one", None, "three"])
    with pytest.raises(DataError, match=f"{place}: field 'text' holds NoneType, not text"):
        read_all(source)


def write_source(folder: Path, kind: str, texts: list[Any]) -> Path:
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    if kind == "jsonl":
        return write_json_lines(folder / "data.jsonl", texts)
    if kind == "json lines":
        return write_json_lines(folder / "data.json", texts)
    if kind == "json array":
        (folder / "data.json").write_text("\n" + json.dumps(rows, indent=1))
        return folder / "data.json"
    if kind == "parquet":
        return write_parquet(folder / "data.parquet", texts)
    if kind == "folder":
        write_json_lines(folder / "train.jsonl", texts)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(folder)
    return folder


def test_read_saved_splits_takes_the_split(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    assert read_all(tmp_path, split="test") == ["test"]
    with pytest.raises(DataError, match=r"no split 'dev'; splits: train, test"):
        read_all(tmp_path, split="dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "good"}\n{oops\n', "line 2 is not valid JSON"),
        ('{"text": "good"}\n\n[1]\n', "line 3 is not an object but list"),
        ('{"text": "good"}\n{"body": "x"}\n', "line 2 has no field 'text'; it has: body"),
    ],
)
def test_read_bad_json_line_names_it(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    texts = read_texts(spec_of(path))
    assert next(texts) == "good"
    with pytest.raises(DataError, match=message):
        list(texts)


def test_read_damaged_parquet_raises_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"not a table")
    with pytest.raises(DataError, match=r"data\.parquet cannot be read as Parquet: ") as caught:
        read_all(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./none", "~/none", "corpus.txt", "a/b.JSONL", "rows.csv.gz"]
)
def test_read_missing_path_raises_at_once(source: str) -> None:
    with pytest.raises(DataError, match=f"data source {source} does not exist"):
        read_texts(spec_of(source))


@pytest.mark.parametrize("name", ["notes.md", "wiki.train.raw", "corpus", "data.parquet.gz"])
def test_read_file_of_an_unknown_kind_is_text_only_where_it_is_said(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("one two\nthree\n")
    with pytest.raises(DataError, match=rf"{name} is of no kind.*`read_as` \(text, json") as caught:
        read_texts(spec_of(tmp_path / name))
    assert len(str(caught.value)) - len(str(tmp_path)) < 330
    if not name.endswith(".gz"):
        assert read_all(tmp_path / name, read_as="text") == ["one two", "three"]


def test_read_binary_file_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"weights\.bin line 1 is not UTF-8"):
        read_all(tmp_path / "weights.bin", read_as="text")


@pytest.mark.parametrize("source", ["no-such/dataset", "texts"])
def test_read_hub_id_offline_says_in_one_line_what_to_do(source: str) -> None:
    with pytest.raises(DataError, match=f"source {source} is neither a file nor a") as caught:
        next(read_texts(spec_of(source)))
    message = str(caught.value)
    assert "hf download --repo-type dataset" in message
    assert len(message) <= 400
    assert "\n" not in message


def test_read_pydoc_gives_topics_in_sorted_order() -> None:
    from pydoc_data.topics import topics

    assert read_all("pydoc") == [topics[name] for name in sorted(topics)]
    joined = "".join(read_all("pydoc", pack=True))
    assert joined == "\n\n".join(topics[name] for name in sorted(topics))


def test_read_json_lines_large_file_keeps_memory_bounded(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    row = json.dumps({"text": "word " * 200}) + "\n"
    path.write_text(row * 8000 + "{never read\n")
    tracemalloc.start()
    try:
        num_read = sum(1 for _ in islice(read_texts(spec_of(path)), 8000))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_read == 8000
    assert path.stat().st_size > 8_000_000
    assert peak_bytes < 1_000_000


def test_read_parquet_reads_only_the_needed_parts(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(4000)]
    path = write_parquet(tmp_path / "data.parquet", texts, row_group_size=1000, compression="none")
    metadata = pq.ParquetFile(path).metadata
    content = bytearray(path.read_bytes())
    for group, column in ((0, 0), (3, 1)):  # another column; the last row group
        chunk = metadata.row_group(group).column(column)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        content[start : start + 64] = b"\xff" * 64
    path.write_bytes(content)
    reader = read_texts(spec_of(path))
    assert list(islice(reader, 2000)) == texts[:2000]
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        list(reader)


def test_read_parquet_holds_one_row_group_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    group = pa.table({"text": [f"{number:07d}" * 100 for number in range(1000)]})
    with pq.ParquetWriter(path, group.schema, compression="none", use_dictionary=False) as writer:
        for _ in range(30):
            writer.write_table(group)
    before = pa.total_allocated_bytes()
    most = max(
        pa.total_allocated_bytes() - before
        for number, _ in enumerate(read_texts(spec_of(path)))
        if number % 500 == 0
    )
    assert 0 < most < 4 * group.nbytes
