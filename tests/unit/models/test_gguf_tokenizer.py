"""Tokenizers of GGUF files, compared with SentencePiece and with what the files ask for."""

from __future__ import annotations

import io
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import transformers
from gguf_files import finish, load_gguf_tokenizer, random_llama, write_llama

from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.errors import ModelError
from autoquant_ray.models.find import find_model
from autoquant_ray.models.gguf_tokenizer import read_metadata
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer

TEXTS = [
    *list(pydoc_data.topics.topics.values())[:40],
    "Hello  world",
    "   leading, trailing   ",
    "tabs\t\tand\n\n\nlines\n",
    "é à 日本語 😀 ‰ unknown bytes",
    "<table> a user's token </table> <mask>",
    "def f(x):\n    return x  # four spaces",
    "",
]
USER_DEFINED = ["<table>", "</table>", "\n\n", "▁▁", "▁▁▁▁"]


def train(**changes: Any) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model of byte pairs, trained on Python's own documentation."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(pydoc_data.topics.topics.values()).splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        control_symbols=["<start_of_turn>"],
        pad_id=3,
        minloglevel=2,
        **{"user_defined_symbols": USER_DEFINED} | changes,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_gguf(
    file: Path,
    pieces: sentencepiece.SentencePieceProcessor,
    user_defined: Sequence[str] = USER_DEFINED,
    **metadata: Any,
) -> Path:
    """The vocabulary in a GGUF file, as llama.cpp's converter writes it."""
    numbers = range(pieces.vocab_size())

    def kind(number: int) -> int:
        kinds = gguf.TokenType
        if pieces.is_unknown(number):
            return kinds.UNKNOWN
        if pieces.is_control(number):
            return kinds.CONTROL
        if pieces.is_byte(number):
            return kinds.BYTE
        is_user_defined = pieces.id_to_piece(number) in user_defined
        return kinds.USER_DEFINED if is_user_defined else kinds.NORMAL

    def text(number: int) -> str:
        piece = pieces.id_to_piece(number)
        return piece.replace("▁", " ") if piece in user_defined else piece

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text(number) for number in numbers])
    writer.add_token_scores([pieces.get_score(number) for number in numbers])
    writer.add_token_types([kind(number) for number in numbers])
    for role in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{role}_token_id")(getattr(pieces, f"{role}_id")())
    for name, value in metadata.items():
        getattr(writer, f"add_{name}")(value)
    finish(writer)
    return file


@pytest.mark.parametrize("has_prefix", [True, False])
def test_sentencepiece_vocabulary_cuts_as_sentencepiece_does(
    tmp_path: Path, has_prefix: bool
) -> None:
    # Behind a user's token llama.cpp puts a prefix and SentencePiece none, so none of them there.
    user_defined = ["▁▁"] if has_prefix else USER_DEFINED
    pieces = train(add_dummy_prefix=has_prefix, user_defined_symbols=user_defined)
    file = write_gguf(tmp_path / "x.gguf", pieces, user_defined, add_space_prefix=has_prefix)
    tokenizer = load_gguf_tokenizer(file)
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text), text
        assert tokenizer.decode(pieces.encode(text)) == text


def test_roles_and_surroundings_are_those_of_the_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", train(), add_bos_token=True, add_eos_token=True)
    tokenizer = load_gguf_tokenizer(file)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    assert [getattr(tokenizer, name) for name in names] == ["<s>", "</s>", "<unk>", "<pad>"]
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert tokenizer("a")["input_ids"] == [1, *letter, 2]
    assert tokenizer("a", "a")["input_ids"] == [1, *letter, 2, 1, *letter, 2]
    assert "<start_of_turn>" in tokenizer.tokenize("<start_of_turn>user")


@pytest.mark.parametrize("asked", [False, None])
def test_bos_without_word_is_sentencepieces_habit(tmp_path: Path, asked: bool | None) -> None:
    metadata = {} if asked is None else {"add_bos_token": asked}
    tokenizer = load_gguf_tokenizer(write_gguf(tmp_path / "x.gguf", train(), **metadata))
    assert (tokenizer("a")["input_ids"][0] == 1) is (asked is None)


def test_template_for_tools_is_that_of_the_file(tmp_path: Path) -> None:
    plain, of_tools = ("{% for m in messages %}" + word + "{% endfor %}" for word in ("w5", "w6"))
    templates = {"chat_template": plain, "chat_template.tool_use": of_tools}
    metadata = {f"tokenizer.{name}": text for name, text in templates.items()}
    tokenizer = load_gguf_tokenizer(write_llama(tmp_path / "x.gguf", random_llama(), metadata))
    tokenizer.save_pretrained(tmp_path / "saved")
    for read in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert read.get_chat_template() == plain
        assert read.get_chat_template(tools=[{"name": "find"}]) == of_tools


def test_saved_tokenizer_reads_back_the_same(tmp_path: Path) -> None:
    tokenizer = load_gguf_tokenizer(write_gguf(tmp_path / "x.gguf", train(), add_bos_token=True))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.eos_token == "</s>"
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_demo_model_ends_with_the_token_that_its_file_names() -> None:
    ref = find_model(str(find_demo_model()))
    metadata = read_metadata(Path(ref.path) / str(ref.gguf_file))
    tokenizer = load_tokenizer(TokenizerRef.of(ref, ""))
    assert tokenizer.eos_token_id == metadata["ggml.eos_token_id"]
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")


def test_role_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", train(), mask_token_id=5000)
    with pytest.raises(ModelError, match="mask_token_id 5000 is beyond the vocabulary of 1000"):
        load_gguf_tokenizer(file)


def test_vocabulary_without_scores_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "a"])
    finish(writer)
    with pytest.raises(ModelError, match="needs tokens, token_type and scores of one length"):
        load_gguf_tokenizer(tmp_path / "x.gguf")
