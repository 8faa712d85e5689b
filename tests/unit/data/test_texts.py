"""Reading texts, making samples of them, grouping samples into steps."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import transformers

from autoquant_ray.data.cutting import (
    DataCounts,
    SampleAssembler,
    chunk_texts,
    plan_steps,
    require_usable,
    tokenize_chunk,
)
from autoquant_ray.data.texts import DataSpec, read_texts
from autoquant_ray.errors import DataError

TEXTS = ["one two", "", " \t", "three  four five"]


def spec_of(source: Any, **changes: Any) -> DataSpec:
    arguments: dict[str, Any] = {"source": str(source), "num_samples": 100, "seq_len": 8}
    return DataSpec(**arguments | changes)


def read_all(source: Any, **changes: Any) -> list[str]:
    return list(read_texts(spec_of(source, **changes)))


def write_json_lines(path: Path, texts: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: list[Any], **options: Any) -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, **options)
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes as tokens (a letter is its code), with a special first token 256."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<s>": 256}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True)
    fast = tokenizers.Tokenizer(model)
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=4)


# ---- reading -----------------------------------------------------------------------------------


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
        ("folder", "row 2"),
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
    "source", ["/no/such/folder", "./none", "~/none", "corpus.txt", "a/b.JSONL"]
)
def test_read_missing_path_raises_at_once(source: str) -> None:
    with pytest.raises(DataError, match=f"data source {source} does not exist"):
        read_texts(spec_of(source))


def test_read_file_of_another_ending_is_read_as_lines(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("one two\nthree\n")
    assert read_all(tmp_path / "notes.md") == ["one two", "three"]


def test_read_binary_file_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"weights\.bin line 1 is not UTF-8"):
        read_all(tmp_path / "weights.bin")


def test_read_hub_id_offline_raises_in_one_line() -> None:
    with pytest.raises(DataError, match=r"nobody/nothing cannot be loaded.*Hub") as caught:
        read_all("nobody/nothing")
    assert "\n" not in str(caught.value)


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


def test_chunk_texts_reads_no_further_than_asked() -> None:
    consumed: list[int] = []

    def texts() -> Iterator[str]:
        for number in range(10):
            consumed.append(number)
            yield str(number)

    chunks = chunk_texts(texts(), 4)
    assert next(chunks) == ["0", "1", "2", "3"]
    assert consumed == [0, 1, 2, 3]
    assert list(chunks) == [["4", "5", "6", "7"], ["8", "9"]]


def test_chunk_texts_long_texts_make_short_chunks() -> None:
    texts = ["a" * 60, "b" * 50, "c" * 100, "d", "e"]
    chunks = list(chunk_texts(iter(texts), 4, max_characters=100))
    assert [[text[0] for text in chunk] for chunk in chunks] == [["a", "b"], ["c"], ["d", "e"]]


def test_import_data_loads_no_heavy_package() -> None:
    heavy = ["torch", "ray", "datasets", "transformers", "pyarrow", "numpy"]
    code = (
        f"import sys, autoquant_ray.data.cutting; print([n for n in {heavy} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- tokenizing --------------------------------------------------------------------------------


def test_tokenize_chunk_samples_carry_special_tokens(tokenizer: Any) -> None:
    token_lists = tokenize_chunk(tokenizer, ["ab", "", " "], pack=False)
    assert token_lists == [[256, 97, 98], [], [256, 32]]


def test_tokenize_chunk_packed_has_no_special_tokens(tokenizer: Any) -> None:
    assert tokenize_chunk(tokenizer, ["ab\n", "", "\n"], pack=True) == [[97, 98, 10], [], [10]]


def test_tokenize_chunk_long_text_is_not_truncated(tokenizer: Any) -> None:
    assert len(tokenize_chunk(tokenizer, ["a" * 50], pack=True)[0]) == 50


def test_tokenize_chunk_only_empty_texts_gives_empty_lists(tokenizer: Any) -> None:
    assert tokenize_chunk(tokenizer, ["", ""], pack=False) == [[], []]
    assert tokenize_chunk(tokenizer, [], pack=False) == []


# ---- samples -----------------------------------------------------------------------------------


def test_assembler_separate_texts_counts_every_fate() -> None:
    assembler = SampleAssembler(spec_of("x", seq_len=4))
    token_lists = [[1, 2], [], [9], [3], [1, 2, 3, 4, 5], [1, 2, 3, 4], []]
    texts_empty = [False, True, True, False, False, False, False]
    samples = assembler.add(token_lists, texts_empty) + assembler.finish()
    assert samples == [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4]]
    assert assembler.counts == DataCounts(read=7, used=3, empty=2, too_short=2, cut=1)


def test_assembler_full_ignores_further_texts() -> None:
    assembler = SampleAssembler(spec_of("x", num_samples=2))
    assert assembler.add([[1, 2], [3], [4, 5], [6, 7]], [False] * 4) == [[1, 2], [4, 5]]
    assert assembler.is_full
    assert assembler.add([[8, 9]], [False]) == []
    assert assembler.finish() == []
    assert assembler.counts == DataCounts(read=3, used=2, too_short=1)


def test_assembler_packed_gives_windows_and_the_last_part() -> None:
    assembler = SampleAssembler(spec_of("x", seq_len=4, pack=True))
    first = assembler.add([[1, 2, 3], [], [4, 5]], [False, True, False])
    second = assembler.add([[6, 7, 8, 9, 10, 11, 12, 13, 14]], [False])
    assert first == [[1, 2, 3, 4]]
    assert second == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert assembler.finish() == [[13, 14]]
    assert assembler.finish() == []
    assert assembler.counts == DataCounts(read=4, used=4, empty=1)


def test_assembler_packed_last_token_alone_is_too_short() -> None:
    assembler = SampleAssembler(spec_of("x", seq_len=4, pack=True))
    assert assembler.add([[1, 2, 3, 4, 5]], [False]) == [[1, 2, 3, 4]]
    assert assembler.finish() == []
    assert assembler.counts == DataCounts(read=1, used=1, too_short=1)


def test_assembler_packed_stops_within_a_text() -> None:
    assembler = SampleAssembler(spec_of("x", seq_len=2, num_samples=2, pack=True))
    assert assembler.add([list(range(9)), [1, 2]], [False] * 2) == [[0, 1], [2, 3]]
    assert assembler.is_full
    assert assembler.finish() == []
    assert assembler.counts == DataCounts(read=1, used=2)


@pytest.mark.parametrize("pack", [False, True])
def test_assembler_any_chunk_size_gives_the_same_samples(tokenizer: Any, pack: bool) -> None:
    results = []
    for chunk_size in (1, 3, 1000):
        spec = spec_of("pydoc", seq_len=512, num_samples=60, pack=pack)
        assembler = SampleAssembler(spec)
        samples: list[list[int]] = []
        for texts in chunk_texts(read_texts(spec), chunk_size):
            empty = [not text.strip() for text in texts]
            samples += assembler.add(tokenize_chunk(tokenizer, texts, pack=pack), empty)
        results.append((samples + assembler.finish(), assembler.counts))
    assert len(results[0][0]) == 60
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("pack", [False, True])
def test_assembler_arrays_give_the_samples_of_lists(pack: bool) -> None:
    lengths = [3, 0, 9, 1, 4, 17, 2]
    token_lists = [list(range(100 * n, 100 * n + length)) for n, length in enumerate(lengths)]
    arrays = [array("i", tokens) for tokens in token_lists]
    empty = [not tokens for tokens in token_lists]
    spec = spec_of("x", seq_len=4, pack=pack)
    of_lists, of_arrays = SampleAssembler(spec), SampleAssembler(spec)
    samples = of_lists.add(token_lists, empty) + of_lists.finish()
    found = of_arrays.add(arrays, empty) + of_arrays.finish()
    assert all(isinstance(sample, array) for sample in found)
    assert [sample.tolist() for sample in found] == samples
    assert of_arrays.counts == of_lists.counts


def test_assembler_packed_text_file_keeps_every_token(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "data.txt"
    path.write_text("ab\n\n  \ncd ef\nends")
    spec = spec_of(path, seq_len=5, pack=True)
    texts = list(read_texts(spec))
    assembler = SampleAssembler(spec)
    samples = assembler.add(
        tokenize_chunk(tokenizer, texts, pack=True), [not text.strip() for text in texts]
    )
    samples += assembler.finish()
    assert bytes(token for sample in samples for token in sample) == path.read_bytes()
    assert [len(sample) for sample in samples] == [5, 5, 5, 2]
    assert assembler.counts == DataCounts(read=5, used=4, empty=2)


def test_require_usable_nothing_used_names_source_and_counts() -> None:
    require_usable(DataCounts(read=1, used=1), "x.txt")
    with pytest.raises(DataError, match=r"x\.txt holds no usable.*7 texts.*4 are empty and 3 have"):
        require_usable(DataCounts(read=7, empty=4, too_short=3), "x.txt")


# ---- steps -------------------------------------------------------------------------------------


def test_plan_steps_known_lengths_gives_known_steps() -> None:
    assert plan_steps([3, 9, 3, 5, 20, 4], 10) == [[4], [1], [3, 5], [0, 2]]
    assert plan_steps([], 10) == []


@pytest.mark.parametrize("seed", range(20))
def test_plan_steps_random_lengths_fit_and_are_maximal(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 60, size=int(generator.integers(1, 50))).tolist()
    step_tokens = int(generator.integers(30, 200))
    steps = plan_steps(lengths, step_tokens)
    order = [position for step in steps for position in step]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        longest = lengths[step[0]]
        assert len(step) == 1 or len(step) * longest <= step_tokens
        assert following is None or (len(step) + 1) * longest > step_tokens
