"""Load the tokenizer of a model, without the model."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoquant_ray.errors import ModelError, one_line
from autoquant_ray.models.find import TOKENIZER_FILES, ModelRef, hold_warnings
from autoquant_ray.models.gguf_tokenizer import (
    apply_metadata,
    byte_pair_tokenizer,
    is_sentencepiece,
    read_metadata,
    rules_of,
    sentencepiece_tokenizer,
)

logger = logging.getLogger(__name__)

_NOT_TEXT = re.compile("image|audio|video|vision|pad", re.IGNORECASE)
"""Names of tokens that no text becomes: some models have none in their embedding on purpose."""


@dataclass(frozen=True, kw_only=True)
class TokenizerRef:
    """Where a tokenizer is; hashable and picklable.

    Attributes:
        model: Folder or hub id, as ``from_pretrained`` takes it.
        gguf_file: File name inside the folder where the tokenizer is part of a GGUF file.
        trust_remote_code: Whether code from the checkpoint may run.
        fingerprint: Content of the files; a process keeps a loaded tokenizer while it is equal.
    """

    model: str
    gguf_file: str | None = None
    trust_remote_code: bool = False
    fingerprint: str = ""

    @classmethod
    def of(cls, ref: ModelRef, fingerprint: str) -> TokenizerRef:
        """The tokenizer that belongs to a model with this fingerprint."""
        return cls(
            model=ref.path,
            gguf_file=ref.gguf_file,
            trust_remote_code=ref.trust_remote_code,
            fingerprint=fingerprint,
        )


@hold_warnings()
def load_tokenizer(ref: TokenizerRef) -> Any:
    """Load a ``transformers`` tokenizer.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    metadata = {} if ref.gguf_file is None else read_metadata(Path(ref.model) / ref.gguf_file)
    if is_sentencepiece(metadata):
        tokenizer = sentencepiece_tokenizer(metadata)
    elif (rules := rules_of(metadata)) is not None:
        tokenizer = byte_pair_tokenizer(metadata, rules)
    else:
        if pre := metadata.get("ggml.pre"):
            logger.warning(
                "how the tokenizer %r cuts words is not known here; transformers decides it, by "
                "the model's architecture",
                pre,
            )
        tokenizer = _load_with_transformers(ref)
    if metadata:
        apply_metadata(tokenizer, metadata)
    if len(tokenizer) == 0:
        raise ModelError(f"model {ref.model} has no tokenizer files")
    return tokenizer


def require_ids_within(ref: ModelRef, num_rows: int) -> None:
    """Check that a model's embedding has every token of its tokenizer.

    A GGUF file has both in one list. Nothing is checked where there is no tokenizer, which a plan
    does not need. Placeholders of images and the token of padding may be beyond: Gemma-3 270M has
    one of them.

    Args:
        ref: The model.
        num_rows: Of its embedding.

    Raises:
        ModelError: It has not; names the numbers.
    """
    folder = Path(ref.path)
    has_files = any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern))
    if ref.gguf_file is not None or (folder.is_dir() and not has_files):
        return
    try:
        tokenizer = load_tokenizer(TokenizerRef.of(ref, ""))
    except ModelError:
        return  # a scan says so when it reads the data
    beyond = {
        token: number for token, number in tokenizer.get_vocab().items() if number >= num_rows
    }
    missing = sorted(
        (number, token) for token, number in beyond.items() if not _NOT_TEXT.search(token)
    )
    if missing:
        number, token = missing[0]
        raise ModelError(
            f"model {ref.name}: {len(missing)} tokens of its tokenizer, the first {token!r} with "
            f"number {number}, have no row in its embedding, which has {num_rows}; resize it with "
            "resize_token_embeddings, or take these tokens out of the tokenizer"
        )


def _load_with_transformers(ref: TokenizerRef) -> Any:
    import transformers

    arguments: dict[str, Any] = {"trust_remote_code": ref.trust_remote_code}
    if ref.gguf_file is not None:
        arguments["gguf_file"] = ref.gguf_file
    try:
        return transformers.AutoTokenizer.from_pretrained(ref.model, **arguments)
    # The Rust code of tokenizers raises a bare Exception for a damaged file.
    except Exception as error:  # noqa: BLE001
        raise ModelError(
            f"tokenizer of model {ref.model} cannot be loaded: {one_line(error)}"
        ) from None
