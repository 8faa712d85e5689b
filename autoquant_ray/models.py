"""Find, fingerprint and load a model; build its skeleton on the meta device.

Weights are read from safetensors or GGUF only; pickled checkpoints are refused. Code that a
checkpoint brings is run only with ``trust_remote_code``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import ModelError, one_line
from autoquant_ray.fingerprint import fingerprint_files

if TYPE_CHECKING:
    import torch


TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer*.json",
    "tokenizer.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Names of files in a model's folder that may belong to its tokenizer."""

CHAT_FILES = ("chat_template*", "*preprocessor_config.json", "processor_config.json")
"""Names of files that decide which tokens and tensors a chat or an image becomes."""


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """Where a model is.

    Attributes:
        name: As the user gave it, for messages and reports.
        path: Folder or hub id, as ``from_pretrained`` takes it.
        gguf_file: File name inside the folder where the weights are GGUF.
        trust_remote_code: Whether code from the checkpoint may run.
    """

    name: str
    path: str
    gguf_file: str | None = None
    trust_remote_code: bool = False

    @property
    def weights_folder(self) -> Path | None:
        """Folder of the safetensors files; None for GGUF and for a hub id."""
        folder = Path(self.path)
        return folder if self.gguf_file is None and folder.is_dir() else None

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Arguments common to all ``from_pretrained`` calls."""
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        return arguments | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


def find_model(name: str, *, trust_remote_code: bool = False) -> ModelRef:
    """Resolve a folder, a GGUF file or a hub id.

    Raises:
        ModelError: A local path that does not exist or holds no model.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"model {name} is a file but not .gguf; give its folder")
        return ModelRef(
            name=name,
            path=str(path.absolute().parent),
            gguf_file=path.name,
            trust_remote_code=trust_remote_code,
        )
    if path.is_dir():
        gguf_file = None
        if not (path / "config.json").exists():
            found = sorted(file.name for file in path.glob("*.gguf"))
            if len(found) != 1:
                raise ModelError(f"model folder {name} holds no config.json and no single GGUF")
            gguf_file = found[0]
        return ModelRef(
            name=name,
            path=str(path.absolute()),
            gguf_file=gguf_file,
            trust_remote_code=trust_remote_code,
        )
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise ModelError(f"model {name} does not exist; give a folder, a GGUF file or a hub id")
    return ModelRef(name=name, path=name, trust_remote_code=trust_remote_code)


def require_weights(ref: ModelRef) -> None:
    """Check that a local folder holds weights that may be read.

    Raises:
        ModelError: It holds none in safetensors or GGUF.
    """
    folder = Path(ref.path)
    if folder.is_dir() and not ref.gguf_file and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model folder {ref.name} holds no safetensors or GGUF weights; convert other formats "
            "with save_pretrained(..., safe_serialization=True)"
        )


def require_mappable(ref: ModelRef) -> None:
    """Check that the weights are in files that can be memory-mapped, as offloading needs.

    Raises:
        ModelError: They are in GGUF.
    """
    if ref.gguf_file is not None:
        raise ModelError(
            f"model {ref.name} is a GGUF file, but offload needs safetensors; convert it, or give "
            "--placement resident"
        )


def fingerprint_model(ref: ModelRef) -> str:
    """Hash the config, the weight files and the tokenizer's files.

    A hub id is identified by its name and, where known, its revision.
    """
    folder = Path(ref.path)
    if not folder.is_dir():
        return f"{ref.path}@{getattr(_load_config(ref), '_commit_hash', None)}"
    patterns = TOKENIZER_FILES
    patterns += (ref.gguf_file,) if ref.gguf_file else ("config.json", "*.safetensors", "*.py")
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    return fingerprint_files(sorted(files))


def fingerprint_chats(ref: ModelRef) -> str:
    """Hash a model's chat template and processor, which samples of plain text do not depend on."""
    found = {file for pattern in CHAT_FILES for file in Path(ref.path).glob(pattern)}
    return fingerprint_files(sorted(file for file in found if file.is_file()))


def build_skeleton(ref: ModelRef) -> torch.nn.Module:
    """Build the model on the meta device from its config alone: names and shapes, no weights.

    Raises:
        ModelError: The config cannot be read, or describes no language model.
    """
    import torch

    config = _load_config(ref)
    model_class = _model_class(config, ref)
    with torch.device("meta"):
        model: torch.nn.Module = model_class.from_config(
            config, trust_remote_code=ref.trust_remote_code, dtype=torch.bfloat16
        )
    model.tie_weights()
    require_language_model(model, ref)
    return model.eval()


def load_model(
    ref: ModelRef, *, dtype: str, device: str, placing: Mapping[str, Any] | None = None
) -> torch.nn.Module:
    """Load the weights for scoring: evaluation mode, no parameter takes a gradient.

    Args:
        ref: Model to load.
        dtype: ``float32`` or ``bfloat16``.
        device: ``cpu`` or ``cuda``.
        placing: Arguments of ``from_pretrained`` that say where each part goes; None: all of it
            to the device.

    Raises:
        ModelError: Weights missing, unreadable, or not in safetensors or GGUF.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = _load_config(ref)
    model_class = _model_class(config, ref)
    arguments = ref.load_arguments | {"dtype": getattr(torch, dtype)}
    if ref.gguf_file is None:
        arguments["use_safetensors"] = True
    if placing is not None:
        arguments |= placing
    elif device == "cuda":
        arguments["device_map"] = {"": torch.cuda.current_device()}
    try:
        model: torch.nn.Module = model_class.from_pretrained(ref.path, **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model {ref.name} cannot be loaded: {one_line(error)}") from None
    require_language_model(model, ref)
    model.requires_grad_(False)
    return model.eval()


def own_dtype(ref: ModelRef) -> torch.dtype | None:
    """The type of a checkpoint's weights as its config states it; None where it does not."""
    import torch

    config = _load_config(ref)
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    dtype = getattr(torch, stated, None) if isinstance(stated, str) else stated
    return dtype if isinstance(dtype, torch.dtype) else None


def require_language_model(model: torch.nn.Module, ref: ModelRef) -> None:
    """Check that the model ends in a linear head over a vocabulary.

    Raises:
        ModelError: It does not.
    """
    import torch

    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if not isinstance(head, torch.nn.Linear):
        kind = type(model).__name__
        raise ModelError(f"model {ref.name} is a {kind}, not a decoder-only language model")


def _load_config(ref: ModelRef) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(ref.path, **ref.load_arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        needs_code = "trust_remote_code" in str(error)
        hint = " (its own code needs --trust-remote-code)" if needs_code else ""
        raise ModelError(f"config of model {ref.name}: {one_line(error)}{hint}") from None


def _model_class(config: Any, ref: ModelRef) -> Any:
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {ref.name} is an encoder-decoder, not a decoder-only model")
    # BERT-like encoders have a causal class too; is_decoder tells which one the checkpoint is.
    is_masked = type(config) in transformers.AutoModelForMaskedLM._model_mapping
    if is_masked and getattr(config, "is_decoder", True) is False:
        raise ModelError(f"model {ref.name} is an encoder, not a decoder-only language model")
    remote = ref.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    with_images = transformers.AutoModelForImageTextToText._model_mapping.get(type(config), None)
    # Some families have a class without the vision tower for the same config (Qwen3.5, Llama 4);
    # the checkpoint names its own.
    is_whole = with_images is not None and with_images.__name__ in (config.architectures or ())
    has_causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    if remote or (has_causal and not is_whole):
        return transformers.AutoModelForCausalLM
    if with_images is not None:
        return transformers.AutoModelForImageTextToText
    raise ModelError(
        f"model {ref.name} has type {config.model_type!r}, which is not a language model that "
        "transformers can load with AutoModelForCausalLM"
    )
