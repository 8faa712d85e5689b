"""Vocabularies of byte pairs in GGUF files, compared with the package tokenizers' own parts."""

from __future__ import annotations

import json
import logging
import pydoc_data.topics
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from gguf_files import finish, load_gguf_tokenizer
from tokenizers import models, pre_tokenizers, trainers

from autoquant_ray.errors import ModelError
from autoquant_ray.models.byte_pair_rules import RULES

SPECIAL = ["<|begin|>", "<|end|>"]
TEXTS = [
    *list(pydoc_data.topics.topics.values())[:40],
    "In 2024 we'll see 1234567 items.\n\n\n1. DON'T   stop  ",
    "é 日本語 😀\r\n\tx",
    "",
]
# What HF's tokenizers do by themselves; the second is how SmolLM2's tokenizer.json says it.
PARTS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
}


def train(pre: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PARTS[pre])
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    return tokenizer


def write(
    file: Path, tokenizer: tokenizers.Tokenizer, pre: str, *, without: str = "", **metadata: Any
) -> Path:
    """Write a vocabulary, without the merges that make one token."""
    model = json.loads(tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = gguf.TokenType
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.CONTROL if t in SPECIAL else kinds.NORMAL for t in tokens])
    merges = [pair for pair in model["merges"] if "".join(pair) != without]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in metadata.items():
        getattr(writer, f"add_{name}")(value)
    finish(writer)
    return file


@pytest.mark.parametrize("pre", PARTS)
def test_tokens_are_those_of_the_tokenizer_that_was_written(tmp_path: Path, pre: str) -> None:
    twin = train(pre)
    tokenizer = load_gguf_tokenizer(write(tmp_path / "x.gguf", twin, pre))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == twin.encode(text).ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer("<|begin|>a<|end|>")["input_ids"][::2] == [0, 1]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|end|>")


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("llama-bpe", "x 1234567 We'LL go!!\n\n", "x| |123|456|7| We|'LL| go|!!\n\n"),
        ("llama-bpe", "a  b\tc", "a| | b|\tc"),
        ("qwen2", "x 123 don't", "x| |1|2|3| don|'t"),
        ("tekken", "HTMLParser's 12", "HTMLParser|'s| |1|2"),
        ("gpt-4o", "camelCase's 1234 a/b/\n", "camel|Case's| |123|4| a|/b|/\n"),
        ("starcoder", "x=12", "x|=|1|2"),
    ],
)
def test_words(pre: str, text: str, words: str) -> None:
    cutter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
            for pattern in RULES[pre].patterns
        ]
    )
    assert "|".join(word for word, _ in cutter.pre_tokenize_str(text)) == words


@pytest.mark.parametrize(("asked", "has_bos"), [(None, True), (False, False), (True, True)])
def test_bos_of_llama3_unless_the_file_says_otherwise(
    tmp_path: Path, asked: bool | None, has_bos: bool
) -> None:
    metadata = {} if asked is None else {"add_bos_token": asked}
    tokenizer = load_gguf_tokenizer(
        write(tmp_path / "x.gguf", train("gpt-2"), "llama-bpe", **metadata)
    )
    assert (tokenizer("a")["input_ids"][0] == 0) is has_bos


def test_a_word_of_the_vocabulary_is_a_token_where_merges_are_ignored(tmp_path: Path) -> None:
    twin = train("gpt-2")
    whole = max((t for t in twin.get_vocab() if t.isascii() and t.isalpha()), key=len)
    pieces = load_gguf_tokenizer(write(tmp_path / "x.gguf", twin, "gpt-2", without=whole))
    assert len(pieces(whole)["input_ids"]) > 1
    tokenizer = load_gguf_tokenizer(write(tmp_path / "y.gguf", twin, "llama-bpe", without=whole))
    assert tokenizer(whole, add_special_tokens=False)["input_ids"] == [twin.token_to_id(whole)]


def test_rules_that_are_not_listed_are_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "x.gguf", train("gpt-2"), "a-new-kind")
    with caplog.at_level(logging.WARNING):
        load_gguf_tokenizer(file)
    assert "'a-new-kind'" in caplog.text


def test_vocabulary_without_merges_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(["a"])
    finish(writer)
    with pytest.raises(ModelError, match="needs tokens, token_type and merges"):
        load_gguf_tokenizer(tmp_path / "x.gguf")
