"""Tensors that the model's files hold and transformers does not load, copied into a checkpoint.

Engines read heads that guess tokens ahead from them. They are stored in 16 bits, as all that is not
quantized, and the checkpoint's config says that they are not quantized.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import CheckpointError, FormatError
from autoquant_ray.export.check import StoredTensors
from autoquant_ray.export.layouts import MODELOPT
from autoquant_ray.models.dequantize import Read, reader
from autoquant_ray.models.find import ModelRef
from autoquant_ray.plan.carried import (
    FileTensors,
    carried_bytes,
    carried_roots,
    memory_names,
    unloaded_gguf_tensors,
)
from autoquant_ray.wording import few

if TYPE_CHECKING:
    import torch

PackHead = Callable[[str, Read], "dict[str, torch.Tensor] | None"]
"""Module of a carried weight, and what reads tensors -> the packed tensors, or None: 16 bits."""

_PACKED = (".weight_packed", ".weight")
_MOST_NAMES = 3
_MOST_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class SixteenBits:
    """Rounds what is not quantized.

    Attributes:
        dtype: ``bfloat16`` or ``float16``.
        kept: Tensors that the model's own 16-bit files hold in float32, by the names there and in
            memory -> the file and the name there.
    """

    dtype: torch.dtype
    kept: Mapping[str, tuple[Path, str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the type, as configs have it."""
        return str(self.dtype).removeprefix("torch.")

    def rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it is stored.

        Args:
            name: Of the tensor.
            tensor: As the run computes with it: one that is kept, and that nothing was folded into,
                is then the one of the files.
        """
        import torch

        if name not in self.kept:
            return tensor.to(self.dtype) if tensor.dtype == torch.float32 else tensor
        return tensor if tensor.dtype == torch.float32 else _wider(tensor, *self.kept[name])


def _wider(tensor: torch.Tensor, file: Path, name: str) -> torch.Tensor:
    """A tensor as a file has it, where it is that one rounded; else itself."""
    import torch
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        stored: torch.Tensor = tensors.get_tensor(name)
    is_same = stored.shape == tensor.shape and torch.equal(stored.to(tensor.dtype), tensor)
    return stored if is_same else tensor


@dataclass(frozen=True, kw_only=True)
class SourceTensors:
    """What the model's own files hold.

    Attributes:
        files: Their tensors; none for a GGUF file.
        carried: Tensor that is not loaded -> bytes that it takes here.
        place_of: Name in the files -> name of what transformers makes of it.
        tied: Parameter that is not stored -> the one whose weight it shares.
    """

    files: FileTensors
    carried: Mapping[str, int]
    place_of: Callable[[str], str]
    tied: Mapping[str, str]

    @classmethod
    def of(cls, model: Any, ref: ModelRef) -> SourceTensors:
        """Read the headers of the files.

        Args:
            model: As it was loaded, before anything is quantized.
            ref: Where it is from.

        Raises:
            FormatError: A checkpoint could not hold some of them; names these.
        """
        unloaded = unloaded_gguf_tensors(ref, model)
        if unloaded:
            raise FormatError(
                f"{ref.gguf_file} holds {len(unloaded)} tensors that transformers does not load "
                f"({few(unloaded, _MOST_NAMES)}), and a checkpoint would lose them; scan and "
                "export the model's safetensors"
            )
        return cls(
            files=FileTensors.of(ref),
            carried=carried_bytes(model, ref),
            place_of=memory_names(model),
            tied=dict(model.all_tied_weights_keys),
        )

    @property
    def _matrices(self) -> list[str]:
        return [name for name in self.carried if len(self.files.shape(name)) > 1]

    @property
    def unquantized(self) -> list[str]:
        """Modules of the carried matrices, by the names of their tensors."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self._matrices))

    @property
    def roots(self) -> list[str]:
        """Prefixes under which nothing but carried tensors stands, of the matrices."""
        return carried_roots(self._matrices, [n for n in self.files.names if n not in self.carried])

    def wider_bytes(self, folder: Path) -> int:
        """Bytes of a written folder beyond 16 bits: of what stays in float32, but for what is
        carried, which is counted so."""
        stored, counted = StoredTensors.of(folder), set(self.files.names) - self.carried.keys()
        kept = [name for name in counted if stored.dtypes.get(name) == "F32"]
        return sum(stored.nbytes[name] // 2 for name in kept)

    def require_all_in(self, folder: Path) -> None:
        """Check that nothing of the model's own files is missing from a written folder.

        Raises:
            CheckpointError: Tensors are; names them.
        """
        written = {self.place_of(_unpacked(name)) for name in StoredTensors.of(folder).nbytes}
        places = {name: self.place_of(name) for name in self.files.names}
        lost = [
            name
            for name, place in places.items()
            if place not in written and self.tied.get(place) not in written
        ]
        if lost:
            raise CheckpointError(
                f"the exporter left out {len(lost)} tensors of the model's own files: "
                f"{few(lost, _MOST_NAMES)}"
            )


def carried_parts(source: SourceTensors) -> Iterator[list[str]]:
    """Names of the carried tensors, in parts that fit the memory."""
    part: list[str] = []
    size = 0
    for name, nbytes in source.carried.items():
        if part and size + nbytes > _MOST_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += nbytes
    if part:
        yield part


def read_carried(
    source: SourceTensors,
    names: Iterable[str],
    sixteen_bits: SixteenBits,
    pack_head: PackHead | None = None,
) -> dict[str, torch.Tensor]:
    """Carried tensors as they are stored.

    Args:
        source: The model's own files.
        names: Of the tensors.
        sixteen_bits: Rounds them.
        pack_head: Packs the weights among them that are quantized; None: none are.
    """
    stored: dict[str, torch.Tensor] = {}
    with reader(source.files.headers, source.files.packed) as read:
        for name in names:
            module, _, kind = name.rpartition(".")
            packed = pack_head(module, read) if pack_head and kind == "weight" else None
            if packed is None:
                packed = {name: sixteen_bits.rounded(name, read(name)).contiguous()}
            stored |= packed
    return stored


def ignore_carried(
    source: SourceTensors,
    folder: Path,
    layout: str,
    quantized: Collection[str] = (),
    containers: Sequence[str] = (),
) -> None:
    """Say in a checkpoint's config that the carried tensors are not quantized.

    Args:
        source: The model's own files.
        folder: Holds a checkpoint.
        layout: Whose.
        quantized: Modules of carried weights that are quantized.
        containers: What holds those within their layers.
    """
    names = [name for name in source.unquantized if name not in quantized]
    is_modelopt = layout == MODELOPT
    patterns = [
        f"{root}.*" if is_modelopt else _all_within(root, containers) for root in source.roots
    ]
    add_ignored([*names, *patterns] if source.unquantized else [], folder, layout)


def _all_within(root: str, containers: Sequence[str]) -> str:
    """What a reader of compressed-tensors takes for all that stands below a prefix, whatever it
    calls it, but for what is in some modules."""
    inside = [name.removeprefix(f"{root}.") for name in containers if name.startswith(f"{root}.")]
    rest = "|".join(map(re.escape, inside))
    return f"re:^{re.escape(root)}\\." + (f"(?!(?:{rest})\\.)" if rest else "")


def add_ignored(names: Iterable[str], folder: Path, layout: str) -> None:
    """Add to what a checkpoint's config lists as not quantized.

    Args:
        names: Modules, or patterns as the layout's readers take them.
        folder: Holds the checkpoint.
        layout: Whose.
    """
    added = list(names)
    places = [("config.json", "quantization_config", "ignore")]
    if layout == MODELOPT:
        places.append(("hf_quant_config.json", "quantization", "exclude_modules"))
    for file, part, key in places if added else ():
        content = json.loads((folder / file).read_text())
        content[part][key] = list(dict.fromkeys([*(content[part].get(key) or ()), *added]))
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")


def _unpacked(name: str) -> str:
    """The name of a weight by that of its packed form."""
    packed, weight = _PACKED
    return name.removesuffix(packed) + weight if name.endswith(packed) else name
