"""Texts to samples: chunks, tokens, samples and steps."""

from __future__ import annotations

import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from texts import spec_of

from autoquant_ray.data.cutting import (
    DataCounts,
    SampleAssembler,
    chunk_texts,
    opening_tokens,
    pack_steps,
    require_usable,
    tokenize_chunk,
)
from autoquant_ray.data.texts import read_texts
from autoquant_ray.errors import DataError


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


def test_tokenize_chunk_samples_carry_special_tokens(tokenizer: Any) -> None:
    token_lists = tokenize_chunk(tokenizer, ["ab", "", " "], pack=False)
    assert token_lists == [[256, 97, 98], [], [256, 32]]


def test_tokenize_chunk_packed_has_no_special_tokens(tokenizer: Any) -> None:
    assert tokenize_chunk(tokenizer, ["ab\n", "", "\n"], pack=True) == [[97, 98, 10], [], [10]]


def test_opening_tokens_are_those_before_a_text(tokenizer: Any) -> None:
    assert opening_tokens(tokenizer) == [256]
    tokenizer.backend_tokenizer.post_processor, before = (
        tokenizers.processors.TemplateProcessing(single="$A <s>", special_tokens=[("<s>", 256)]),
        tokenizer.backend_tokenizer.post_processor,
    )
    assert opening_tokens(tokenizer) == []
    tokenizer.backend_tokenizer.post_processor = before


@pytest.mark.parametrize("container", [list, lambda tokens: array("i", tokens)])
def test_pack_opens_every_window(container: Any) -> None:
    spec = spec_of("x", seq_len=4, pack=True)
    assembler: SampleAssembler[Any] = SampleAssembler(spec, opening=[256])
    windows = assembler.add([container([1, 2, 3, 4]), container([5, 6, 7])], [False, False])
    windows += assembler.finish()
    assert [list(window) for window in windows] == [[256, 1, 2, 3], [256, 4, 5, 6], [256, 7]]


def test_pack_leaves_room_for_text_in_every_window() -> None:
    spec = spec_of("x", seq_len=2, pack=True)
    assembler: SampleAssembler[list[int]] = SampleAssembler(spec, opening=[256, 257])
    assert assembler.add([[1, 2]], [False]) == [[256, 1], [256, 2]]


def test_samples_are_not_opened_twice() -> None:
    assembler: SampleAssembler[list[int]] = SampleAssembler(spec_of("x"), opening=[256])
    assert assembler.add([[256, 1]], [False]) == [[256, 1]]


def test_tokenize_chunk_long_text_is_not_truncated(tokenizer: Any) -> None:
    assert len(tokenize_chunk(tokenizer, ["a" * 50], pack=True)[0]) == 50


def test_tokenize_chunk_only_empty_texts_gives_empty_lists(tokenizer: Any) -> None:
    assert tokenize_chunk(tokenizer, ["", ""], pack=False) == [[], []]
    assert tokenize_chunk(tokenizer, [], pack=False) == []


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
    cut = of_arrays.add(arrays, empty) + of_arrays.finish()
    assert all(isinstance(sample, array) for sample in cut)
    assert [sample.tolist() for sample in cut] == samples
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


def test_pack_steps_known_lengths_gives_known_steps() -> None:
    assert pack_steps([3, 9, 3, 5, 20, 4], 10) == [[4], [1], [3, 5], [0, 2]]
    assert pack_steps([], 10) == []


@pytest.mark.parametrize("seed", range(20))
def test_pack_steps_random_lengths_fit_and_are_maximal(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 60, size=int(generator.integers(1, 50))).tolist()
    step_tokens = int(generator.integers(30, 200))
    steps = pack_steps(lengths, step_tokens)
    order = [position for step in steps for position in step]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        longest = lengths[step[0]]
        assert len(step) == 1 or len(step) * longest <= step_tokens
        assert following is None or (len(step) + 1) * longest > step_tokens
