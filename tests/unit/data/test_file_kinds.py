"""Files of every kind, compressed ones and folders of several: read as what they are."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import logging
import lzma
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import spec_of

from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.config.files import validate
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.stage_fields import changed_fields, stage_fingerprints
from autoquant_ray.data.texts import read_rows, read_texts, require_source
from autoquant_ray.errors import DataError

TEXTS = ["null", "2024-01-01", "01", 'He said "no", twice.', "two\nlines", "", "é"]
"""Texts that a reader which infers types makes something else of."""


def read_all(source: Any, **changes: Any) -> list[Any]:
    return list(read_texts(spec_of(source, **changes)))


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def write(path: Path, texts: list[str]) -> Path:
    """A file of the kind that its name says."""
    table, ending = pa.table({"id": [1] * len(texts), "text": texts}), path.suffix
    if ending in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, delimiter="," if ending == ".csv" else "\t")
            writer.writerows([("id", "text"), *(("1", text) for text in texts)])
    elif ending == ".parquet":
        pq.write_table(table, path)
    elif ending in (".arrow", ".feather"):
        opened = pa.ipc.new_stream if ending == ".arrow" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
            writer.write_table(table)
    elif ending == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines(texts))
    else:
        pack: Any = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
        path.write_bytes(pack.get(ending, bytes)(lines(texts)))
    return path


NAMES = [
    "a.jsonl", "a.ndjson", "a.jsonlines", "a.JSONL", "a.json", "a.csv", "a.tsv", "a.parquet",
    "a.arrow", "a.feather", "a.jsonl.gz", "a.json.bz2", "a.ndjson.xz", "a.jsonl.zst",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_file_gives_its_texts_as_they_are(name: str, tmp_path: Path) -> None:
    assert read_all(write(tmp_path / name, TEXTS)) == TEXTS
    assert read_all(write(tmp_path / name, TEXTS), pack=True)[1] == "\n\n2024-01-01"


@pytest.mark.parametrize("name", NAMES)
def test_file_in_a_folder_gives_the_same(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, TEXTS)
    assert read_all(tmp_path) == TEXTS


def test_compressed_text_is_read_by_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\r\n\ntwo"))
    assert read_all(tmp_path / "a.txt.gz") == ["one", "", "two"]


def test_list_of_rows_is_read_whatever_the_ending(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    assert read_all(tmp_path / "a.jsonl") == TEXTS


def test_what_the_user_says_wins_over_the_ending(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(lines(TEXTS))
    assert read_all(tmp_path / "a.txt", read_as="json") == TEXTS
    assert read_all(tmp_path, read_as="json") == TEXTS


def test_text_that_looks_like_rows_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_bytes(lines(["one"]))
    assert read_all(tmp_path / "a.txt")[0].startswith("{")
    assert "is read as plain text, but its lines look like JSON" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", b"text,n\none\n", r"line 2: 1 fields, but 2 in the first line"),
        ("a.csv", b'text\n"one\n', r"after line 1 cannot be read: unexpected end of data"),
        ("a.csv", b"text,text\n", r"names a column twice"),
        ("a.csv", b"text\n\xff\n", r"is not UTF-8"),
        ("a.csv", b"body\none\n", r"line 2 has no field 'text'; it has: body"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz cannot be read: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(lines(["one"] * 99), mtime=0)[:-9],
            r"cannot be read: .*ended",
        ),
        ("a.jsonl.xz", b"plain", r"cannot be read: Input format not supported"),
        ("a.arrow", b"plain", r"cannot be read as Arrow"),
        ("a.csv", b'text,n\n"say \\"no\\"",1\n', r"cannot be read: .*every quote is doubled"),
        ("a.json", b'{\n"text": "one"\n}\n{\n}\n', r"Extra data: .*; give a list of rows"),
        ("a.json", b'{"data": [{"text": "one"}]}', r"holds a list under 'data'; give that list"),
        ("a.json", b'{\n"n": 1,\n"data": [{"text": "one"}]\n}', r"holds a list under 'data'"),
        ("a.jsonl", b'[{"role": "user", "content": "x"}]\n' * 2, r"line 1 is not an obj.* list;"),
        ("a.jsonl", b'"one"\n"two"\n', r"line 1 is not an object but str; give rows such as"),
        ("a.jsonl", b'{"text": "\\ud83d!"}\n', r"line 1: .*half of a letter \(\\ud83d"),
    ],
)
def test_damaged_file_is_named_in_one_line(
    name: str, content: bytes, problem: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        read_all(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_table_that_names_a_column_twice_is_refused(ending: str, tmp_path: Path) -> None:
    table, path = pa.table([["one"], ["two"]], names=["text", "text"]), tmp_path / f"a.{ending}"
    if ending == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=r"names a column twice: text, text"):
        read_all(path)


@pytest.mark.parametrize("indent", [None, 2])
def test_json_file_of_a_single_object_is_a_row(indent: int | None, tmp_path: Path) -> None:
    row = {"id": 7, "text": "two\nlines", "notes": [{"a": 1}]}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=indent))
    assert read_all(tmp_path / "a.json") == ["two\nlines"]


def test_domain_of_a_csv_is_a_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,kind\none,7\n")
    assert list(read_rows(spec_of(tmp_path / "a.csv", domain_field="kind"))) == [("one", "7")]


def test_folder_of_several_kinds_is_read_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.csv", "d.parquet"):
        write(tmp_path / name, [name])
    (tmp_path / "e.txt").write_text("e.txt\n")
    for name in ("README.md", "LICENSE", "picture.png", "picture.JPG", "run.sha256", "_SUCCESS"):
        (tmp_path / name).write_bytes(b"" if name == "_SUCCESS" else b"aside")
    with caplog.at_level(logging.INFO):
        assert read_all(tmp_path) == ["a.jsonl", "b.jsonl", "c.csv", "d.parquet", "e.txt"]
    assert "files of several kinds: 1 of csv, 2 of json, 1 of parquet, 1 of text" in caplog.text


def test_data_that_is_named_like_a_license_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("citations.jsonl", "LICENSES.csv", "license_texts.parquet", "README.jsonl")
    for name in names:
        write(tmp_path / name, [name])
    (tmp_path / "notices.txt").write_text("notices.txt\n")
    for name in ("LICENSE-MIT.txt", "README", "notice.txt", "CITATION.cff", "run.yaml"):
        (tmp_path / name).write_text("aside\n")
    with caplog.at_level(logging.INFO):
        assert sorted(read_all(tmp_path)) == sorted([*names, "notices.txt"])
    assert "left aside as no data: CITATION.cff, LICENSE-MIT.txt, README" in caplog.text


def test_folder_of_documents_is_read_where_the_user_says_what_they_hold(tmp_path: Path) -> None:
    for name in ("a.md", "b.rst", "c.txt", "README.md"):
        (tmp_path / name).write_text(f"{name}\n")
    assert read_all(tmp_path, read_as="text") == ["a.md", "b.rst", "c.txt"]
    assert read_all(tmp_path) == ["c.txt"]


def test_folder_gives_the_files_of_the_split(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train-2.csv", "test.csv"):
        write(tmp_path / name, [name])
    assert read_all(tmp_path) == ["train-2.csv", "train.jsonl"]
    assert read_all(tmp_path, split="test") == ["test.csv"]
    with pytest.raises(DataError, match=r"no split 'dev'; splits.*: train, test; name one"):
        read_all(tmp_path, split="dev")


def test_files_that_belong_to_no_split_and_links_to_folders_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "d"
    (folder / "more").mkdir(parents=True)
    for name in ("train.jsonl", "test.csv", "chats.csv", "more/b.parquet", ".old.jsonl"):
        write(folder / name, [name])
    (folder / "link").symlink_to(folder / "more")
    for name in ("README.md", "dataset_infos.json"):
        (folder / name).write_text("{}")
    assert read_all(folder) == ["train.jsonl"]
    expected = ("belong to no split: chats.csv, more/b.parquet", "are links to folders: link")
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: not read, as they {text}" for text in expected
    ]


@pytest.mark.parametrize("name", ["d [v1]", "d::v1"])
def test_folder_whose_path_is_a_pattern_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    write(tmp_path / name / "a.jsonl", ["one"])
    with pytest.raises(DataError, match=rf"{re.escape(name)}: a folder's path with .* a pattern"):
        read_all(tmp_path / name)


def test_folder_with_a_link_to_no_file_is_refused(tmp_path: Path) -> None:
    """As of a hub's cache whose download was cut short: half of the data would be missing."""
    write(tmp_path / "a.jsonl", ["one"])
    for name in ("b.jsonl", ".hidden.jsonl", "notes"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has links to files that are not there: b\.jsonl; get"):
        read_all(tmp_path)
    (tmp_path / "b.jsonl").unlink()
    assert read_all(tmp_path) == ["one"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_list_of_texts_in_the_text_column_is_refused(name: str, tmp_path: Path) -> None:
    """As of a table that was written as one object of columns."""
    rows = {"text": ["one", "two"], "id": [1, 2]}
    (tmp_path / name).write_text(json.dumps(rows))
    if name == "a.parquet":
        pq.write_table(pa.table({"text": [rows["text"]]}), tmp_path / name)
    with pytest.raises(
        DataError, match="field 'text' holds a list of 2 texts; give a row for each"
    ):
        read_all(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.md"])
def test_folder_without_data_is_refused_in_a_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("" if name == "a.jsonl" else "# one\n")
    with pytest.raises(DataError, match=rf"holds no data, but empty files.*`read_as` text: {name}"):
        read_all(tmp_path)


def test_folder_whose_card_names_the_files_is_read_by_it(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, [name])
    card = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: b.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    assert read_all(tmp_path) == ["b.jsonl"]


def test_folder_with_a_file_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "b.docx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"of no known kind beside others: b\.docx; take them out"):
        read_all(tmp_path)


def test_source_of_an_unknown_kind_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(b"PK")
    with pytest.raises(DataError, match="is of no kind"):
        require_source(str(tmp_path / "a.docx"))
    require_source(str(tmp_path / "a.docx"), "text")
    with pytest.raises(DataError, match="`read_as` text is for files, which pydoc is not"):
        require_source("pydoc", "text")


def config(**changes: Any) -> ScanConfig:
    return validate(ScanConfig, {"model": "m", "data": "d.txt", "out": "o", "bits": 8} | changes)


def test_saying_what_a_file_holds_changes_the_samples_and_its_absence_nothing() -> None:
    plain, said = config(), config(read_as="text")
    before = plain.model_dump(mode="json")
    del before["read_as"]
    assert changed_fields(before, plain) == []
    marks = [stage_fingerprints(config, "m", "d") for config in (plain, said)]
    assert marks[0]["plan"] == marks[1]["plan"]
    assert marks[0]["shards"] != marks[1]["shards"]


def test_other_data_of_an_evaluation_is_what_its_ending_says() -> None:
    scan = config(read_as="text").model_dump(mode="json")
    assert EvaluationConfig(run="r").scan_config(scan).read_as == "text"
    assert EvaluationConfig(run="r", data="e.csv").scan_config(scan).read_as is None
    given = EvaluationConfig(run="r", data="e.md", read_as="text")
    assert given.scan_config(scan).read_as == "text"
