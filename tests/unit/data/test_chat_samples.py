"""Samples of chats: cut, counted, skipped, stored and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from chats import made, spec_of

from autoquant_ray.data.chat_encoding import Encoded
from autoquant_ray.data.chat_samples import ConversationSamples
from autoquant_ray.data.conversations import BadSample
from autoquant_ray.data.cutting import DataCounts, require_usable
from autoquant_ray.data.sample_parts import digest_bytes, rich_part, samples_of, text_part
from autoquant_ray.data.samples import RichSample, num_predicted
from autoquant_ray.errors import DataError, StoreError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import SAMPLES, part_name


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
        "row of 9: its images end at token 7 of 9, after `seq_len` 6; raise it, or give smaller "
        "images",
    ]
    assert "skipped: row 1" in caplog.text


def test_bad_sample_stops_by_default() -> None:
    rules = ConversationSamples(spec_of("d"), DataCounts(), skips_bad=False)
    with pytest.raises(DataError, match="row 1: gone; skip such samples with `skip_bad_samples`"):
        list(rules.take([("", BadSample("row 1: gone"))]))


def test_nothing_usable_says_why() -> None:
    counts = DataCounts(read=3, no_answer=2, bad=1)
    with pytest.raises(DataError, match=r"of 3 chats read, 2 have no answer.*and 1 cannot be used"):
        require_usable(counts, "d.jsonl")
    with pytest.raises(DataError, match=r"and 1 cannot be used \(line 3: no messages\); raise"):
        require_usable(counts, "d.jsonl", ["line 3: no messages"])


def test_stored_samples_come_back_and_equal_ones_have_equal_bytes(tmp_path: Path) -> None:
    samples = [made(5, [2, 4], images=2).sample, made(3, [1]).sample]
    directories = [RunDirectory(str(tmp_path / name)) for name in ("run", "other")]
    name = part_name(SAMPLES, 0)
    for directory in directories:
        directory.write_table(name, rich_part(7, samples))
    first, second = (directory.read_bytes(name) for directory in directories)
    assert first == second
    table = directories[0].read_table(name)
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
    directory.write_table(part_name(SAMPLES, 0), part)
    samples = samples_of(directory.read_table(part_name(SAMPLES, 0)))
    assert [np.asarray(sample).tolist() for sample in samples] == [[5, 6], [7]]


@pytest.mark.parametrize("dtype", ["<f4", "|O"])
def test_damaged_tensor_is_refused(dtype: str) -> None:
    rows = rich_part(0, [made(5, [2], images=2).sample]).to_pylist()
    rows[0]["tensors"][1] |= {"dtype": dtype, "shape": [3, 3]}
    with pytest.raises(StoreError, match="'pixel_values' is damaged"):
        samples_of(pa.Table.from_pylist(rows, schema=rich_part(0, []).schema))
