"""Does a written checkpoint hold what the manifest says? Read back from its own files.

The names are looked up as an engine does it, so that a layer that an engine would take for
unquantized, or the other way round, is found here.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoquant_ray.errors import CheckpointError
from autoquant_ray.export.layouts import MODELOPT, stored_as
from autoquant_ray.export.source import Source
from autoquant_ray.models.stored_tensors import FLOATS
from autoquant_ray.wording import few

MOST_OFF = 0.01
"""Share by which the bytes on disk may differ from the manifest's."""
_MOST_NAMES = 4
_TENSORS: dict[str, tuple[str, ...]] = {
    "FP8": ("weight", "weight_scale", "input_scale"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("weight", "weight_scale"),
    "W8A16": ("weight", "weight_scale"),
    "W8A8_SQ_PER_CHANNEL": ("weight", "weight_scale", "input_scale"),
    "W4A16_AWQ": ("weight", "weight_scale"),
    "NVFP4": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "W4A16_NVFP4": ("weight", "weight_scale", "weight_scale_2"),
    "MXFP8": ("weight", "weight_scale"),
    "float-quantized": ("weight", "weight_scale"),
    "naive-quantized": ("weight", "weight_scale"),
    "int-quantized": ("weight", "weight_scale"),
    "nvfp4-pack-quantized": ("weight_packed", "weight_scale", "weight_global_scale"),
    "mxfp8-quantized": ("weight", "weight_scale"),
    "mxfp4-pack-quantized": ("weight_packed", "weight_scale"),
    "pack-quantized": ("weight_packed", "weight_scale", "weight_shape"),
}
"""What a packed layer consists of, by algorithm or format."""


@dataclass(frozen=True, kw_only=True)
class StoredTensors:
    """Headers of a folder's safetensors files.

    Attributes:
        nbytes: Tensor -> bytes.
        dtypes: Tensor -> type, as safetensors names it.
    """

    nbytes: Mapping[str, int]
    dtypes: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path) -> StoredTensors:
        """Read the headers: 8 bytes of length, then JSON with offsets."""
        nbytes, dtypes = {}, {}
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    nbytes[name], dtypes[name] = end - start, entry["dtype"]
        return cls(nbytes=nbytes, dtypes=dtypes)

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.nbytes.values())


def check_checkpoint(
    folder: Path, source: Source, layout: str, *, wider_bytes: int = 0
) -> StoredTensors:
    """Check a written folder against the manifest.

    Args:
        folder: The checkpoint.
        source: What was exported, by the names in the files.
        layout: Of the checkpoint.
        wider_bytes: That it holds beyond those of the manifest, which counts 16 bits.

    Raises:
        CheckpointError: A layer would be read in another format than the manifest gives it, a
            tensor is missing, or the bytes differ by more than :data:`MOST_OFF`.
    """
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored = StoredTensors.of(folder)
    resolve = _resolve_modelopt if layout == MODELOPT else _resolve_compressed
    wrong = [
        f"{module} as {format_ or '16 bits'} instead of {wanted or '16 bits'}"
        for module in source.modules
        if (format_ := resolve(config, module)) != (wanted := _wanted(source, module, layout))
    ]
    wrong += [
        f"{module} as {stored.dtypes[name]} instead of 16 bits"
        for module in source.modules
        if module not in source.formats
        and stored.dtypes.get(name := f"{module}.weight", FLOATS[0]) not in FLOATS
    ]
    if wrong:
        raise CheckpointError(f"the exporter wrote layers in other formats: {_few(wrong)}")
    missing = [
        f"{place}.{part}"
        for module, format_ in source.formats.items()
        for place in _places(source, module, stored)
        for part in _TENSORS[stored_as(format_, layout) or ""]
        if f"{place}.{part}" not in stored.nbytes
    ]
    if missing:
        raise CheckpointError(f"the exporter left tensors out: {_few(missing)}")
    off = (stored.total - wider_bytes) / source.weight_bytes - 1
    if abs(off) > MOST_OFF:
        raise CheckpointError(
            f"the exporter wrote {stored.total:,} bytes of weights, {off:+.2%} from the "
            f"{source.weight_bytes:,.0f} of the manifest"
        )
    return stored


def _places(source: Source, module: str, stored: StoredTensors) -> list[str]:
    """What must have tensors: a linear itself, or the linears of each of its experts."""
    if not source.is_experts(module):
        return [module]
    places = []
    for expert in range(source.modules[module]["shapes"][0][0]):
        start = f"{module}.{expert}."
        inside = {name.rpartition(".")[0] for name in stored.nbytes if name.startswith(start)}
        places += sorted(inside) or [f"{start}*"]
    return places


def _few(names: list[str]) -> str:
    return few(names, _MOST_NAMES)


def _wanted(source: Source, module: str, layout: str) -> str | None:
    format_ = source.formats.get(module)
    return None if format_ is None else stored_as(format_, layout)


def unlisted(config: Mapping[str, Any], source: Source) -> list[str]:
    """Modules in 16 bits that readers would take for quantized: ModelOpt lists no convolutions.

    Args:
        config: ``quantization_config`` of a checkpoint in ModelOpt's layout.
        source: What is exported, by the names in the files.
    """
    return [
        module
        for module in source.modules
        if module not in source.formats and _resolve_modelopt(config, module) is not None
    ]


def _resolve_modelopt(config: Mapping[str, Any], module: str) -> str | None:
    """Algorithm of a layer: its own entry where formats are mixed, else the one of the model."""
    if config["quant_algo"] == "MIXED_PRECISION":
        entry = config["quantized_layers"].get(module)
        return None if entry is None else str(entry["quant_algo"])
    if any(fnmatch.fnmatchcase(module, pattern) for pattern in config["ignore"]):
        return None
    return str(config["quant_algo"])


def _resolve_compressed(config: Mapping[str, Any], module: str) -> str | None:
    """Format of a layer: that of the one group which names it, unless it is ignored."""
    names = [
        str(group["format"])
        for group in config["config_groups"].values()
        if module in group["targets"]
    ]
    if len(names) > 1 or (names and module in config["ignore"]):
        return f"several: {', '.join(names)}"
    return names[0] if names else None
