"""The model behind a checkpoint, in the type that the run computed in, packed part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import FormatError
from autoquant_ray.export.carried import (
    PackHead,
    SixteenBits,
    SourceTensors,
    carried_parts,
    read_carried,
)
from autoquant_ray.export.folder import PartFiles
from autoquant_ray.export.names import require_plain_linears
from autoquant_ray.export.parts import Part, PartedModel, are_readable, outline
from autoquant_ray.export.source import Source
from autoquant_ray.formats.format import Format
from autoquant_ray.models.find import ModelRef
from autoquant_ray.models.load import files_dtype, load_model, own_dtype
from autoquant_ray.models.of_run import require_model
from autoquant_ray.models.separate_heads import give_weight, separate_head
from autoquant_ray.models.stored_tensors import stored_tensors
from autoquant_ray.plan.carried import memory_names
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.fitted_model import Factors
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.score.loading import load_on_disk
from autoquant_ray.score.residence import StoredWeights

_16_BITS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model to export.

    Attributes:
        model: Its weights are in memory, or on the meta device.
        weights: Reads those on the meta device; None: all are in memory.
        ref: Where it is from.
        sixteen_bits: How to round what is not quantized: to the run's 16-bit type, else to the
            checkpoint's own, else to bfloat16.
    """

    model: Any
    weights: StoredWeights | None
    ref: ModelRef
    sixteen_bits: SixteenBits


def load_for_export(source: Source, *, is_whole: bool = False) -> LoadedModel:
    """Find the run's model, in the type that the run computed in, on the CPU.

    Weights stay in the model's files where these can be mapped.

    Args:
        source: What is exported.
        is_whole: Load all weights.

    Raises:
        StoreError: The model changed since the run.
        ModelError: It cannot be loaded.
        FormatError: Its files hold matrices the other way round.
    """
    import transformers

    scan = ScanConfig.model_validate(source.state.config)
    ref = require_model(source.state, scan)
    model, weights = _load(ref, scan.dtype, is_whole=is_whole)
    require_plain_linears(model)
    in_files = files_dtype(ref)
    types = (model.dtype, in_files, own_dtype(ref), torch.bfloat16)
    kept = _in_float32(model, ref) if in_files in _16_BITS else {}
    sixteen_bits = SixteenBits(dtype=next(t for t in types if t in _16_BITS), kept=kept)
    if not model.config.architectures:  # a GGUF file names none, and exporters ask for it
        model.config.architectures = [type(model).__name__]
    if ref.gguf_file is None:
        # The model's file is copied; transformers would not save again what it finds odd in it.
        model.generation_config = transformers.GenerationConfig()
    _untie_head(model, weights, source)
    return LoadedModel(model=model, weights=weights, ref=ref, sixteen_bits=sixteen_bits)


def _in_float32(model: Any, ref: ModelRef) -> dict[str, tuple[Path, str]]:
    """Tensors that the files hold in float32, by the names there and in memory -> where."""
    place_of = memory_names(model)
    places = {n: (h.file, n) for n, h in stored_tensors(ref).items() if h.dtype == "F32"}
    return {place_of(name): place for name, place in places.items()} | places


def _load(ref: ModelRef, dtype: str, *, is_whole: bool) -> tuple[Any, StoredWeights | None]:
    if not is_whole and ref.gguf_file is None:
        model, weights = load_on_disk(ref, dtype=dtype)
        if are_readable(model, weights):
            return model, weights
    return load_model(ref, dtype=dtype, device="cpu"), None


def _untie_head(model: Any, weights: StoredWeights | None, source: Source) -> None:
    """Give a quantized head that shares the embedding's weight a weight of its own.

    A head that has one already, whatever the config says, is stored: then too the config must not
    tie it, or an engine would read the embedding in its place.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    is_copied = head.weight is embedding.weight and name in source.formats
    if is_copied:
        give_weight(model)
        if weights is not None:
            shared = next(n for n, module in model.named_modules() if module is embedding)
            weights.share(f"{name}.weight", f"{shared}.weight")
    if not is_copied and separate_head(model) is None:
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def largest_input(calibration: Calibration, module: str, statistic: str) -> float:
    """Largest absolute input of a module in the scan's calibration.

    Args:
        calibration: Of the run.
        module: Its name.
        statistic: Which of its inputs, ``input_amax`` of a linear.

    Raises:
        FormatError: It saw none.
    """
    maximum = calibration.of(module).maxima.get(statistic)
    if maximum is None:
        raise FormatError(
            f"{module} saw no input in the scan's calibration, so its input has no scale; "
            "scan with more samples, or pin its group to a format with inputs in 16 bits"
        )
    return maximum


def distinct_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers; of those that share their memory the first."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def as_saved(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a part by the names in the files, as ``save_pretrained`` writes them.

    Args:
        model: As transformers loaded it, or its outline.
        tensors: By the names in memory.
    """
    from transformers.core_model_loading import revert_weight_conversion

    left_out = model._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    saved: dict[str, torch.Tensor] = revert_weight_conversion(model, kept)
    return saved


class BasePacker:
    """Gives the parts of a model with the factors of a solution folded in, in 16 bits.

    Args:
        loaded: The model.
        formats: Quantized module -> its format.
        calibration: From the scan; factors alone.
    """

    def __init__(
        self, loaded: LoadedModel, formats: Mapping[str, Format], calibration: Calibration
    ) -> None:
        self._outline, self._formats = outline(loaded.model), formats
        self._rounded = loaded.sixteen_bits.rounded
        self._scales = WeightScales(loaded.model, calibration)

    def pack(self, shell: Any, part: Part) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """See :class:`Packer`."""
        formats = {name: f for name, f in self._formats.items() if part.holds(name)}
        Factors(shell, formats, self._scales).fold()
        tensors = {name: self._rounded(name, tensor) for name, tensor in distinct_tensors(shell)}
        return as_saved(self._outline, tensors), {}


class Packer(Protocol):
    """Makes the stored tensors of a part of a model."""

    def pack(self, shell: Any, part: Part) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Pack a part whose weights are in memory.

        Args:
            shell: A model that holds it alone; it may be changed.
            part: Which.

        Returns:
            Its tensors by the names in the files, and what is to be remembered: plain values.
        """
        ...


def pack_parts(
    loaded: LoadedModel,
    packer: Packer,
    together: Iterable[tuple[str, ...]],
    *,
    files: PartFiles,
    in_source: SourceTensors,
    is_whole: bool = False,
    pack_head: PackHead | None = None,
) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Pack what is not in a file yet.

    Args:
        loaded: The model; its parts are taken out of it.
        packer: Packs one.
        together: Sets of modules that must be in memory together.
        files: Where the parts go.
        in_source: What the model's own files hold beside it.
        is_whole: The model is one part.
        pack_head: Packs weights that are carried; None: all stay in 16 bits.

    Returns:
        Names of the files in the order of the checkpoint, and what was remembered of each part.
    """
    model = PartedModel(loaded.model, loaded.weights, together, is_whole=is_whole)
    names = [f"part-{part.number:05d}" for part in model.parts]
    for name, part in zip(names, model.parts, strict=True):
        if name not in files:
            with model.loaded(part) as shell:
                files.write(name, *packer.pack(shell, part))
    facts = [files.facts(name) for name in names]
    for number, tensors in enumerate(carried_parts(in_source)):
        name = f"carried-{number:05d}"
        if name not in files:
            carried = read_carried(in_source, tensors, loaded.sixteen_bits, pack_head)
            files.write(name, carried, {})
        names.append(name)
    return names, facts


def save_config(loaded: LoadedModel, folder: Path) -> None:
    """Write what ``save_pretrained`` does beside weights: configs, code of the model."""
    loaded.model.save_pretrained(folder, state_dict={})
