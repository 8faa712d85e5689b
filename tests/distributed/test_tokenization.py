"""Tokenization in Ray tasks gives what one process gives, in order, without running ahead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from autoquant_ray.data.cutting import chunk_texts, tokenize_chunk
from autoquant_ray.distributed.tokenization import look_ahead_of, tokenize_stream
from autoquant_ray.errors import DataError, ModelError
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "",
    "pack my box with five dozen liquor jugs",
    "   ",
    "how vexingly quick daft zebras jump",
]
TEXTS = [f"{line} {number}" if line.strip() else line for number in range(9) for line in LINES]

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def tokenizer_ref(tmp_path_factory: pytest.TempPathFactory) -> TokenizerRef:
    """A byte-level BPE trained on a few lines, with a special first token."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(LINES, trainer)
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.token_to_id("<s>"))]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(folder)
    return TokenizerRef(model=str(folder))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("look_ahead", [1, 3, 100])
def test_tokenize_stream_any_look_ahead_equals_direct(
    tokenizer_ref: TokenizerRef, pack: bool, look_ahead: int
) -> None:
    chunks = list(chunk_texts(iter(TEXTS), 7))
    stream = tokenize_stream(
        iter(chunks), tokenizer_ref=tokenizer_ref, pack=pack, look_ahead=look_ahead
    )
    tokenizer = load_tokenizer(tokenizer_ref)
    expected = [
        ([not text.strip() for text in chunk], tokenize_chunk(tokenizer, chunk, pack=pack))
        for chunk in chunks
    ]
    assert len(expected) > 5
    assert [(empty, [tokens.tolist() for tokens in lists]) for empty, lists in stream] == expected


def test_tokenize_stream_uneven_chunks_keeps_order(tokenizer_ref: TokenizerRef) -> None:
    chunks = [["slow " * 50_000], ["quick"], ["fox"]]
    stream = tokenize_stream(iter(chunks), tokenizer_ref=tokenizer_ref, pack=True, look_ahead=3)
    tokenizer = load_tokenizer(tokenizer_ref)
    decoded = [tokenizer.decode(token_lists[0]) for _, token_lists in stream]
    assert decoded == [chunk[0] for chunk in chunks]


def test_tokenize_stream_reads_no_further_than_look_ahead(tokenizer_ref: TokenizerRef) -> None:
    consumed: list[int] = []
    stream = tokenize_stream(
        endless_chunks(consumed), tokenizer_ref=tokenizer_ref, pack=False, look_ahead=3
    )
    for num_taken in range(1, 6):
        next(stream)
        assert len(consumed) == num_taken + 2
    stream.close()
    assert len(consumed) == 7


def test_tokenize_stream_closed_early_leaves_ray_usable(tokenizer_ref: TokenizerRef) -> None:
    stream = tokenize_stream(
        endless_chunks([]), tokenizer_ref=tokenizer_ref, pack=False, look_ahead=20
    )
    next(stream)
    stream.close()
    assert next(stream, None) is None
    again = tokenize_stream(
        iter([["the dog"]]), tokenizer_ref=tokenizer_ref, pack=False, look_ahead=1
    )
    assert [texts_empty for texts_empty, _ in again] == [[False]]


def test_look_ahead_follows_the_cluster_and_what_is_needed() -> None:
    assert look_ahead_of(10_000) == 8  # two per CPU of the test's cluster
    assert look_ahead_of(6) == 6
    assert look_ahead_of(1) == 4


def endless_chunks(consumed: list[int]) -> Iterator[list[str]]:
    while True:
        consumed.append(len(consumed))
        yield [f"chunk {len(consumed)}"]


def test_tokenize_stream_source_error_passes_through(tokenizer_ref: TokenizerRef) -> None:
    def chunks() -> Iterator[list[str]]:
        yield ["good"]
        raise DataError("line 2 is bad")

    stream = tokenize_stream(chunks(), tokenizer_ref=tokenizer_ref, pack=False, look_ahead=1)
    next(stream)
    with pytest.raises(DataError, match="line 2 is bad"):
        next(stream)


def test_tokenize_stream_no_chunks_gives_nothing(tokenizer_ref: TokenizerRef) -> None:
    stream = tokenize_stream(iter([]), tokenizer_ref=tokenizer_ref, pack=False, look_ahead=2)
    assert list(stream) == []


def test_tokenize_stream_missing_tokenizer_raises_in_one_line(tmp_path: Path) -> None:
    ref = TokenizerRef(model=str(tmp_path))
    stream = tokenize_stream(iter([["text"]]), tokenizer_ref=ref, pack=False, look_ahead=2)
    assert_one_line_model_error(stream, str(tmp_path))


def assert_one_line_model_error(stream: Iterator[Any], name: str) -> None:
    with pytest.raises(ModelError, match=f"tokenizer of model {name} cannot be loaded") as caught:
        next(stream)
    assert type(caught.value) is ModelError
    assert "\n" not in str(caught.value)


def test_tokenize_stream_text_that_cannot_be_encoded_raises_data_error(
    tokenizer_ref: TokenizerRef,
) -> None:
    stream = tokenize_stream(
        iter([["good", "half a pair \ud800"]]),
        tokenizer_ref=tokenizer_ref,
        pack=False,
        look_ahead=1,
    )
    with pytest.raises(DataError, match="cannot be tokenized") as caught:
        next(stream)
    assert "\n" not in str(caught.value)


def test_load_tokenizer_damaged_file_names_the_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "Nonsense"}}'
    )
    with pytest.raises(ModelError, match=f"tokenizer of model {tmp_path} cannot be loaded"):
        load_tokenizer(TokenizerRef(model=str(tmp_path)))
