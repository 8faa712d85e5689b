"""How vocabularies of byte pairs cut a text into words before pairs are merged, by name.

The names are those of ``tokenizer.ggml.pre`` in GGUF files; the expressions are those of the
models' ``tokenizer.json``, as ``src/llama-vocab.cpp`` of llama.cpp lists them (November 2026).
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASHED_ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _of_cl100k(digits: str) -> str:
    return rf"{_CONTRACTIONS}|{_START}\p{{L}}+|{digits}|{_ENDS}"


def _of_o200k(contractions: str, digits: str) -> str:
    words = (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
    cased = "|".join(f"{_START}{word}{contractions}" for word in words)
    return f"{cased}|{digits}|{_SLASHED_ENDS}"


@dataclass(frozen=True, kw_only=True)
class BytePairRules:
    """How one kind of vocabulary cuts a text.

    Attributes:
        patterns: Expressions whose matches stand alone, one after the other.
        has_bos: Whether BOS comes before a text where the file does not say.
        ignores_merges: Whether a word that is in the vocabulary is its token, whatever the merges.
    """

    patterns: tuple[str, ...]
    has_bos: bool = False
    ignores_merges: bool = False


_ONE, _THREE = r"\p{N}", r"\p{N}{1,3}"
_LLAMA3 = BytePairRules(patterns=(_of_cl100k(_THREE),), has_bos=True, ignores_merges=True)
_DIGITS_APART = BytePairRules(patterns=(_ONE, _GPT2))
_PLAIN = BytePairRules(patterns=(_GPT2,))
_QWEN2 = BytePairRules(patterns=(_of_cl100k(_ONE),))
_O200K = BytePairRules(patterns=(_of_o200k(f"{_CONTRACTIONS}?", _THREE),))

RULES: dict[str, BytePairRules] = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _LLAMA3,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), BytePairRules(patterns=_LLAMA3.patterns)),
    "tekken": BytePairRules(patterns=(_of_o200k("", _ONE),), has_bos=True, ignores_merges=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "kormo", "megrez"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), _O200K),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _DIGITS_APART,
    ),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "mellum"), _PLAIN),
}
