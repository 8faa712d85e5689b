"""Tokenizers of GGUF files, made or corrected from the files' own metadata.

transformers 5.14 reads tokenizers by the model's architecture. The scores of Gemma's vocabulary
rank merges of byte pairs; it takes them for logarithms of probabilities and cuts words elsewhere.
Llama's gets BOS for EOS, and whether the file asks for BOS and EOS around a text is ignored.

Names and meanings of the metadata: the GGUF specification (``docs/gguf.md`` of ggml), and
``src/llama-vocab.cpp`` of llama.cpp where it is silent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoquant_ray.errors import ModelError
from autoquant_ray.models.byte_pair_rules import RULES, BytePairRules
from autoquant_ray.models.gguf_parameters import opened

Metadata = Mapping[str, Any]

_KIND = "ggml.model"
_PREFIX = "tokenizer."
_NAMED_TEMPLATE = "chat_template."
_SPACE = "▁"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # values of token_type
_ROLES = ("bos", "eos", "unknown", "padding", "mask")
_TRANSFORMERS_ROLES = {"unknown": "unk", "padding": "pad"}


def read_metadata(file: Path) -> dict[str, Any]:
    """What a GGUF file says of its tokenizer: name without ``tokenizer.`` -> value.

    Raises:
        ModelError: The file cannot be read.
    """
    with opened(file) as reader:
        names = [name for name in reader.fields if name.startswith(_PREFIX)]
        return {name.removeprefix(_PREFIX): reader.fields[name].contents() for name in names}


def is_sentencepiece(metadata: Metadata) -> bool:
    """Whether the vocabulary is SentencePiece's byte pairs, whose scores rank the merges."""
    return bool(metadata.get(_KIND) == "llama")


def sentencepiece_tokenizer(metadata: Metadata) -> Any:
    """A ``transformers`` tokenizer that cuts text as SentencePiece does.

    Roles and surroundings of a text are left to :func:`apply_metadata`.

    Raises:
        ModelError: The vocabulary has no scores or types, or they do not fit it.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers

    tokens, types, ids = _vocabulary(metadata)
    unknown = metadata.get("ggml.unknown_token_id")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(tokens, metadata["ggml.scores"], types),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback="<0x00>" in ids,
        )
    )
    has_prefix = metadata.get("ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if has_prefix else spaces
    )
    strip = [decoders.Strip(content=" ", left=1)] if has_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_tokens(backend, tokens, types, has_prefix=has_prefix)
    return _wrapped(backend, metadata)


def _add_tokens(
    backend: Any, tokens: Sequence[str], types: Sequence[int], *, has_prefix: bool
) -> None:
    """Have control and user-defined tokens found in a text before anything is merged.

    Runs of spaces are found after normalization, in which spaces have become underscores. One that
    puts a prefix before every text would do so to them: there their merges must do.
    """
    import tokenizers

    of_kind = {
        wanted: [token for token, kind in zip(tokens, types, strict=True) if kind == wanted]
        for wanted in (_CONTROL, _USER_DEFINED)
    }
    make = tokenizers.AddedToken
    # All at once: every call goes through all that were added before.
    backend.add_tokens(
        [
            make(token, normalized=_SPACE in token)
            for token in of_kind[_USER_DEFINED]
            if not (has_prefix and _SPACE in token)
        ]
    )
    backend.add_special_tokens([make(token, normalized=False) for token in of_kind[_CONTROL]])


def rules_of(metadata: Metadata) -> BytePairRules | None:
    """How a vocabulary of byte pairs cuts words; None for other kinds, and where it is unknown."""
    return RULES.get(metadata.get("ggml.pre", "")) if metadata.get(_KIND) == "gpt2" else None


def byte_pair_tokenizer(metadata: Metadata, rules: BytePairRules) -> Any:
    """A ``transformers`` tokenizer of a vocabulary of byte pairs.

    Raises:
        ModelError: The vocabulary has no merges or types.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    names = ("tokens", "token_type", "merges")
    tokens, types, merges = (metadata.get(f"ggml.{name}") for name in names)
    if tokens is None or types is None or merges is None:
        raise ModelError(
            "GGUF metadata: a vocabulary of byte pairs needs tokens, token_type and merges; "
            "convert the model anew"
        )
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    ids = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocab=ids, merges=pairs, ignore_merges=rules.ignores_merges)
    backend = tokenizers.Tokenizer(model)
    words = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in rules.patterns
    ]
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*words, in_bytes])
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, tokens, types, has_prefix=False)
    return _wrapped(backend, metadata)


def _wrapped(backend: Any, metadata: Metadata) -> Any:
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("chat_template"),
        clean_up_tokenization_spaces=False,
    )


def apply_metadata(tokenizer: Any, metadata: Metadata) -> None:
    """Give a tokenizer the roles of tokens, BOS and EOS around a text, and chat templates of names
    of their own, such as the template for chats with tools, that the file has.

    Raises:
        ModelError: A role's token is not in the vocabulary.
    """
    for role in _ROLES:
        number = metadata.get(f"ggml.{role}_token_id")
        if number is None:
            continue
        token = tokenizer.convert_ids_to_tokens(int(number))
        if token is None:
            raise ModelError(
                f"GGUF metadata: {role}_token_id {number} is beyond the vocabulary of "
                f"{len(tokenizer)}; convert the model anew"
            )
        setattr(tokenizer, f"{_TRANSFORMERS_ROLES.get(role, role)}_token", token)
    named = {
        name.removeprefix(_NAMED_TEMPLATE): template
        for name, template in metadata.items()
        if name.startswith(_NAMED_TEMPLATE)
    }
    if named:
        plain = metadata.get("chat_template")
        tokenizer.chat_template = ({"default": plain} if plain else {}) | named
    rules = rules_of(metadata)
    default = is_sentencepiece(metadata) or (rules is not None and rules.has_bos)
    before, after = metadata.get("ggml.add_bos_token", default), metadata.get("ggml.add_eos_token")
    if before or after is not None or "ggml.add_bos_token" in metadata:
        _surround(tokenizer, "bos" if before else None, "eos" if after else None)


def _surround(tokenizer: Any, before: str | None, after: str | None) -> None:
    """Have the tokenizer put the tokens of these roles around every text."""
    from tokenizers import processors

    names = [
        None if role is None else getattr(tokenizer, f"{role}_token") for role in (before, after)
    ]
    first, last = names
    single = [*([first] if first else []), "$A", *([last] if last else [])]
    second = [*([f"{first}:1"] if first else []), "$B:1", *([f"{last}:1"] if last else [])]
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in names if name}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, *second], special_tokens=list(ids.items())
    )


def _vocabulary(metadata: Metadata) -> tuple[list[str], list[int], dict[str, int]]:
    """Tokens as SentencePiece writes them, their types, and token -> id."""
    columns = [metadata.get(f"ggml.{name}") for name in ("tokens", "token_type", "scores")]
    if None in columns or len({len(column or ()) for column in columns}) > 1:
        raise ModelError(
            "GGUF metadata: the SentencePiece vocabulary needs tokens, token_type and scores of "
            "one length; convert the model anew"
        )
    texts, types, _ = columns
    # Converters write the spaces of user-defined tokens plainly.
    tokens = [
        text.replace(" ", _SPACE) if kind == _USER_DEFINED else text
        for text, kind in zip(texts or (), types or (), strict=True)
    ]
    return tokens, list(types or ()), {token: number for number, token in enumerate(tokens)}


def _merges(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Pairs of tokens that make a third, those of the highest score first.

    User-defined tokens come before all others: SentencePiece never cuts them.
    """
    whole = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_NORMAL, _USER_DEFINED)
    }

    def rank(token: str) -> float:
        number = whole[token]
        return float("-inf") if types[number] == _USER_DEFINED else -scores[number]

    merges: list[tuple[str, str]] = []
    for token in sorted(whole, key=rank):
        merges += sorted(_halves(token, whole), key=lambda pair: (whole[pair[0]], whole[pair[1]]))
    return merges


def _halves(token: str, whole: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for cut in range(1, len(token)):
        if (left := token[:cut]) in whole and (right := token[cut:]) in whole:
            yield left, right
