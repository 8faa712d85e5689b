"""Exports a solution as a folder that serving engines load, in order: check, pack, check, rename.

Weights stay in the model's files: one part of the model, a decoder layer mostly, is in memory at a
time, in the type that the run computed in, and what it is packed to goes to a file. At the end
these files are put together. An export that was killed goes on from the files that it finds when it
is started again with the same arguments. No data is needed: weights are calibrated by themselves,
and the maxima of inputs are the run's. The folder is written beside its place and renamed at the
end.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import ConfigError
from autoquant_ray.export.carried import PackHead, SourceTensors, ignore_carried
from autoquant_ray.export.check import check_checkpoint
from autoquant_ray.export.extra_heads import (
    QuantizedHeads,
    head_format,
    quantized_heads,
    require_heads_served,
)
from autoquant_ray.export.folder import (
    PartFiles,
    parts_beside,
    require_shard_size,
    written_beside,
)
from autoquant_ray.export.kv_caches import unread_reason
from autoquant_ray.export.layouts import COMPRESSED_TENSORS, LAYOUTS, MODELOPT, stored_as
from autoquant_ray.export.source import (
    Source,
    needs_whole,
    pick_layout,
    read_source,
    require_engine,
    require_new_folder,
    require_packable,
    served_layouts,
    serving_engine,
    target_of,
)
from autoquant_ray.formats.format import NONE, Format
from autoquant_ray.formats.smoothed import takes_factors
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.serving.rules import check_target
from autoquant_ray.serving.table import SERVE
from autoquant_ray.version import VERSION

if TYPE_CHECKING:
    from autoquant_ray.export.compressed_tensors import CompressedPacker
    from autoquant_ray.export.model import LoadedModel
    from autoquant_ray.export.modelopt import ModelOptPacker
    from autoquant_ray.quantize.calibration import Calibration

MAX_SHARD_SIZE = "50GB"
"""That of transformers' ``save_pretrained``."""
_PACKAGES = ("nvidia-modelopt", "compressed-tensors", "transformers", "torch")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A written checkpoint.

    Attributes:
        path: The folder.
        layout: ``modelopt`` or ``compressed-tensors``.
        weight_bytes: Of the whole model, as the manifest counts them.
        bytes_on_disk: Of all tensors in the folder.
        layers: What layers are called -> how many of them.
        caches: Format of the KV cache -> attentions with it.
        served_layouts: In which some engine serves the solution as it was chosen.
        num_carried: Tensors that were copied without having been loaded.
        head_layers: What quantized linears of extra heads are called -> how many of them.
        engine: That serves it: the one that was asked for, else the first; None: none does.
        unread_caches: Why no released engine reads the formats of the KV cache; None: some may.
        wider_bytes: Of what the model's own files hold in float32, beyond the 16 bits as which the
            manifest counts it.
    """

    path: str
    layout: str
    weight_bytes: float
    bytes_on_disk: int
    layers: dict[str, int]
    caches: dict[str, int]
    served_layouts: list[str]
    num_carried: int = 0
    engine: str | None = None
    unread_caches: str | None = None
    head_layers: dict[str, int] = field(default_factory=dict)
    wider_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"serve_command": self.serve_command}

    def lines(self) -> list[str]:
        """What people are told."""
        layers = ", ".join(f"{count} {name}" for name, count in self.layers.items())
        caches = [f"KV cache: {name} in {count} attentions" for name, count in self.caches.items()]
        carried = [f"copied, not loaded: {self.num_carried} tensors"] if self.num_carried else []
        heads = [f"extra heads: {count} {name}" for name, count in self.head_layers.items()]
        wider = [f"of that, in float32 as in the model's files: {self.wider_bytes:,} bytes more"]
        command = [] if self.engine is None else [f"to serve it: {self.serve_command}"]
        off = self.bytes_on_disk / self.weight_bytes - 1
        return [
            f"quantized layers: {layers}",
            *caches,
            *heads,
            *carried,
            f"weights on disk: {self.bytes_on_disk:,} bytes; the manifest says "
            f"{self.weight_bytes:,.0f} ({off:+.2%})",
            *(wider if self.wider_bytes else []),
            *command,
            self.path,
        ]

    @property
    def serve_command(self) -> str | None:
        """The command by which the engine serves the folder; None where none does."""
        return None if self.engine is None else f"{SERVE[self.engine]} {shlex.quote(self.path)}"


def export_run(
    directory: RunDirectory,
    out: str,
    *,
    solution: str = "",
    layout: str | None = None,
    engine: str | None = None,
    gpu: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    extra_heads: str | None = None,
) -> Checkpoint:
    """Write a solution as a checkpoint.

    Args:
        directory: A finished run.
        out: Folder to write; new or empty.
        solution: One of the run's solutions; '' for the scan's own.
        layout: ``modelopt`` or ``compressed-tensors``; None: the one in which the engine, or that
            of the solution, serves it; without an engine ``modelopt``.
        engine: Check that this one serves it: ``vllm``, ``sglang`` or ``trtllm``.
        gpu: On this generation or card.
        max_shard_size: Largest size of a file of weights, such as ``5GB`` or ``500MB``.
        extra_heads: Format of the linears of heads that transformers does not load, in
            ``compressed-tensors`` alone; None: 16 bits.

    Raises:
        AutoQuantError: One of its subclasses; nothing is left at ``out``.
    """
    require_shard_size(max_shard_size)
    if layout not in (None, *LAYOUTS):
        raise ConfigError(f"`format` {layout!r} is unknown; known: {', '.join(LAYOUTS)}")
    check_target(engine, gpu)
    source = read_source(directory, solution)
    target = require_new_folder(out)
    if layout is None:
        layout = COMPRESSED_TENSORS if extra_heads else pick_layout(source, engine, gpu)
    of_heads = head_format(extra_heads, source, layout) if extra_heads else None
    require_packable(source, layout)
    require_engine(source, layout, engine, gpu)
    if of_heads is not None:
        require_heads_served(of_heads, source, engine, gpu)
    _require_package(layout)
    kind = _Kind(layout=layout, engine=target_of(source, engine, gpu)[0], heads=of_heads)
    fingerprint = _fingerprint(source, kind)
    with written_beside(target) as folder, parts_beside(target, fingerprint) as parts:
        written, in_source, heads = _write(source, kind, folder, PartFiles(parts), max_shard_size)
        wider = in_source.wider_bytes(folder)
        stored = check_checkpoint(folder, written, layout, wider_bytes=wider)
        in_source.require_all_in(folder)
    names = Counter(str(stored_as(format_, layout)) for format_ in source.formats.values())
    return Checkpoint(
        path=str(target),
        layout=layout,
        weight_bytes=written.weight_bytes,
        bytes_on_disk=stored.total,
        layers=dict(names),
        caches=dict(Counter(name for name in source.caches.values() if name != NONE)),
        served_layouts=served_layouts(source),
        num_carried=len(in_source.carried) - (len(heads.shapes) if heads else 0),
        engine=serving_engine(source, layout, *target_of(source, engine, gpu)),
        unread_caches=unread_reason(source.caches),
        head_layers={str(stored_as(heads.format, layout)): len(heads.shapes)} if heads else {},
        wider_bytes=wider,
    )


def export_base(directory: RunDirectory, out: str, *, solution: str = "") -> str:
    """Write the model that a tool with a recipe starts from: in 16 bits, with folded factors.

    Rounded by its maxima, it is what a solution with ``awq`` was measured as.

    Args:
        directory: A finished run.
        out: Folder to write; new or empty.
        solution: One of the run's solutions; '' for the scan's own.

    Returns:
        The folder.

    Raises:
        AutoQuantError: One of its subclasses; nothing is left at ``out``.
    """
    from autoquant_ray.calibrate.files import calibration_of
    from autoquant_ray.export.model import BasePacker, load_for_export, pack_parts, save_config
    from autoquant_ray.export.other_files import finish_folder

    source = read_source(directory, solution)
    target = require_new_folder(out)
    fingerprint = _fingerprint(source, _Kind(layout="base"))
    with written_beside(target) as folder, parts_beside(target, fingerprint) as parts:
        files = PartFiles(parts)
        calibration = calibration_of(source.state, used=())  # factors alone
        loaded = load_for_export(source)
        in_source = SourceTensors.of(loaded.model, loaded.ref)
        save_config(loaded, folder)
        packer = BasePacker(loaded, source.formats, calibration)
        together = _together(source, calibration)
        names, _ = pack_parts(loaded, packer, together, files=files, in_source=in_source)
        files.assemble(names, folder, MAX_SHARD_SIZE)
        finish_folder(folder, loaded.ref, loaded.sixteen_bits.name)
        in_source.require_all_in(folder)
    return str(target)


def _require_package(layout: str) -> None:
    if layout == COMPRESSED_TENSORS and importlib.util.find_spec("compressed_tensors") is None:
        raise ConfigError(
            f"`format` {layout} needs the package compressed-tensors: pip install "
            "-c constraints.txt -e '.[export]' in the checkout"
        )


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What is to be written.

    Attributes:
        layout: Of the checkpoint.
        engine: That will read it; None: any.
        heads: Format of extra heads; None: 16 bits.
    """

    layout: str
    engine: str | None = None
    heads: Format | None = None


def _write(
    source: Source, kind: _Kind, folder: Path, files: PartFiles, max_shard_size: str
) -> tuple[Source, SourceTensors, QuantizedHeads | None]:
    """Fill the folder; the source by the names that its files have, the model's own files, and what
    is quantized of extra heads."""
    from autoquant_ray.calibrate.files import calibration_of
    from autoquant_ray.export.model import load_for_export, pack_parts, save_config
    from autoquant_ray.export.other_files import finish_folder, model_card

    calibration = calibration_of(source.state, source.used)
    is_whole = kind.layout == MODELOPT and needs_whole(source)
    loaded = load_for_export(source, is_whole=is_whole)
    in_source = SourceTensors.of(loaded.model, loaded.ref)
    save_config(loaded, folder)
    packed = _packing(loaded, source, calibration, kind, in_source)
    together = _together(source, calibration)
    names, facts = pack_parts(
        loaded,
        packed.packer,
        together,
        files=files,
        in_source=in_source,
        is_whole=is_whole,
        pack_head=packed.pack_head,
    )
    files.assemble(names, folder, max_shard_size)
    packed.packer.finish(folder, facts, kind.engine)
    stored, heads = packed.stored, packed.heads
    quantized = ([], []) if heads is None else (heads.shapes, heads.containers())
    ignore_carried(in_source, folder, kind.layout, *quantized)
    card = model_card(source, kind.layout)
    finish_folder(folder, loaded.ref, loaded.sixteen_bits.name, card)
    if "carried" not in source.state.plan:
        uncounted = sum(in_source.carried.values())
        stored = replace(stored, uncounted_bytes=stored.uncounted_bytes + uncounted)
    return stored, in_source, heads


@dataclass(frozen=True, kw_only=True)
class _Packing:
    """What makes the stored tensors.

    Attributes:
        packer: Packs parts.
        stored: The source by the names in the files.
        heads: What is quantized of extra heads.
        pack_head: Packs it.
    """

    packer: CompressedPacker | ModelOptPacker
    stored: Source
    heads: QuantizedHeads | None = None
    pack_head: PackHead | None = None


def _packing(
    loaded: LoadedModel,
    source: Source,
    calibration: Calibration,
    kind: _Kind,
    in_source: SourceTensors,
) -> _Packing:
    from autoquant_ray.export.names import (
        as_stored,
        require_experts_as_stored,
        require_names_in_memory,
    )

    if kind.layout == COMPRESSED_TENSORS:
        from autoquant_ray.export.compressed_tensors import CompressedPacker

        require_names_in_memory(loaded.model, source, in_source)
        packer = CompressedPacker(loaded.model, source, calibration, loaded.sixteen_bits)
        if kind.heads is None:
            return _Packing(packer=packer, stored=packer.stored)
        heads = quantized_heads(kind.heads, packer.stored, in_source)
        packer.add_heads(heads)
        return _Packing(
            packer=packer, stored=packer.stored, heads=heads, pack_head=packer.pack_head
        )
    from autoquant_ray.export.modelopt import ModelOptPacker

    stored = as_stored(loaded.model, source, in_source)
    require_experts_as_stored(loaded.model, source, stored, loaded.ref.weights_folder)
    packs = ModelOptPacker(loaded.model, source, stored, calibration, loaded.sixteen_bits)
    return _Packing(packer=packs, stored=stored)


def _together(source: Source, calibration: Calibration) -> list[tuple[str, ...]]:
    """Modules around inputs that may have factors, each set in one part of the model."""
    readers = [name for name, format_ in source.formats.items() if takes_factors(format_)]
    folds = [calibration.folds[name] for name in readers if name in calibration.folds]
    return [(fold.producer, *fold.readers) for fold in folds]


def _fingerprint(source: Source, kind: _Kind) -> str:
    """Of all that decides about the parts of a checkpoint."""
    content = {
        "manifest": source.manifest,
        "model": source.state.record.fingerprints["model"],
        "kind": kind.layout,
        "engine": kind.engine,
        "heads": None if kind.heads is None else kind.heads.to_json(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "version": VERSION,
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
