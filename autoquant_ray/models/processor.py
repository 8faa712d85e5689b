"""Load the processor of a vision-language model, without the model."""

from __future__ import annotations

from typing import Any

from autoquant_ray.errors import DataError, ModelError, one_line
from autoquant_ray.models.find import hold_warnings
from autoquant_ray.models.tokenizer import TokenizerRef


@hold_warnings()
def load_processor(ref: TokenizerRef) -> Any:
    """Load a ``transformers`` processor that takes images.

    Where torchvision is not installed, images are resized by Pillow, and the part that reads
    videos is left out, because nothing else of it is needed.

    Raises:
        DataError: The model takes no images.
        ModelError: Pillow is missing, or the processor's files are missing or damaged.
    """
    import transformers

    arguments = {"trust_remote_code": ref.trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(ref.model, **arguments)
        if type(config) not in transformers.AutoModelForImageTextToText._model_mapping:
            raise DataError(
                f"the data has images, but model {ref.model} ({config.model_type}) takes text "
                "only; give data without images, or a vision-language model"
            )
        _require_pillow()
        if transformers.utils.is_torchvision_available():
            processor = transformers.AutoProcessor.from_pretrained(ref.model, **arguments)
        else:
            processor = _without_videos(type(config), ref, arguments)
    except (DataError, ModelError):
        raise
    except Exception as error:  # noqa: BLE001 - remote code and tokenizers raise anything
        raise ModelError(
            f"processor of model {ref.model} cannot be loaded: {one_line(error)}"
        ) from None
    if not hasattr(processor, "image_processor"):
        raise ModelError(f"model {ref.model} has no files of an image processor")
    return processor


def _require_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ModelError("images need Pillow: pip install -e '.[images]' in the checkout") from None


def _without_videos(config_class: type, ref: TokenizerRef, arguments: dict[str, Any]) -> Any:
    """A processor whose video part, which torchvision would have to be there for, is None."""
    import transformers
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    processor_class: Any = PROCESSOR_MAPPING[config_class]
    if "video_processor" not in processor_class.get_attributes():
        return transformers.AutoProcessor.from_pretrained(ref.model, **arguments)

    def check(self: Any, name: str, value: Any) -> Any:
        if value is None:
            return None
        return processor_class.check_argument_for_proper_class(self, name, value)

    imageable: Any = type(
        processor_class.__name__, (processor_class,), {"check_argument_for_proper_class": check}
    )
    values, _ = processor_class.get_processor_dict(ref.model)
    loaders = {"tokenizer": transformers.AutoTokenizer, "image_processor": AutoImageProcessor}
    parts = [
        loaders[name].from_pretrained(ref.model, **arguments) if name in loaders else None
        for name in processor_class.get_attributes()
    ]
    return imageable.from_args_and_dict(parts, values)
