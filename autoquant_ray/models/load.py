"""Find, fingerprint and load a model; build its skeleton on the meta device.

Weights are read from safetensors or GGUF only; pickled checkpoints are refused. Code that a
checkpoint brings is run only with ``trust_remote_code``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import ModelError, one_line
from autoquant_ray.models.find import ModelRef, _load_config
from autoquant_ray.models.separate_heads import untie_as_files

if TYPE_CHECKING:
    import torch


def build_skeleton(ref: ModelRef) -> torch.nn.Module:
    """Build the model on the meta device from its config: names and shapes, no weights.

    Of the files it takes no more than whether they hold a head apart from the embedding.

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
    untie_as_files(model, ref)
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
    else:
        arguments["config"] = config  # with what transformers does not read from the file
    if placing is not None:
        arguments |= placing
    elif device == "cuda":
        arguments["device_map"] = {"": torch.cuda.current_device()}
    try:
        model: torch.nn.Module = model_class.from_pretrained(ref.path, **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model {ref.name} cannot be loaded: {one_line(error)}") from None
    require_language_model(model, ref)
    untie_as_files(model, ref)
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
