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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import ConfigError
from autoquant_ray.export.carried import SourceTensors, ignore_carried
from autoquant_ray.export.check import check_checkpoint
from autoquant_ray.export.folder import (
    PartFiles,
    parts_beside,
    require_shard_size,
    written_beside,
)
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
from autoquant_ray.formats.format import NONE
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
        engine: That serves it: the one that was asked for, else the first; None: none does.
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

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"serve_command": self.serve_command}

    def lines(self) -> list[str]:
        """What people are told."""
        layers = ", ".join(f"{count} {name}" for name, count in self.layers.items())
        caches = [f"KV cache: {name} in {count} attentions" for name, count in self.caches.items()]
        carried = [f"copied, not loaded: {self.num_carried} tensors"] if self.num_carried else []
        command = [] if self.engine is None else [f"to serve it: {self.serve_command}"]
        off = self.bytes_on_disk / self.weight_bytes - 1
        return [
            f"quantized layers: {layers}",
            *caches,
            *carried,
            f"weights on disk: {self.bytes_on_disk:,} bytes; the manifest says "
            f"{self.weight_bytes:,.0f} ({off:+.2%})",
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

    Raises:
        AutoQuantError: One of its subclasses; nothing is left at ``out``.
    """
    require_shard_size(max_shard_size)
    if layout not in (None, *LAYOUTS):
        raise ConfigError(f"`format` {layout!r} is unknown; known: {', '.join(LAYOUTS)}")
    check_target(engine, gpu)
    source = read_source(directory, solution)
    target = require_new_folder(out)
    layout = pick_layout(source, engine, gpu) if layout is None else layout
    require_packable(source, layout)
    require_engine(source, layout, engine, gpu)
    _require_package(layout)
    reader = target_of(source, engine, gpu)[0]
    fingerprint = _fingerprint(source, layout, reader)
    with written_beside(target) as folder, parts_beside(target, fingerprint) as parts:
        files = PartFiles(parts)
        written, in_source = _write(source, folder, files, layout, reader, max_shard_size)
        stored = check_checkpoint(folder, written, layout)
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
        num_carried=len(in_source.carried),
        engine=serving_engine(source, layout, *target_of(source, engine, gpu)),
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
    fingerprint = _fingerprint(source, "base")
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
            "-e '.[export]' in the checkout"
        )


def _write(
    source: Source,
    folder: Path,
    files: PartFiles,
    layout: str,
    engine: str | None,
    max_shard_size: str,
) -> tuple[Source, SourceTensors]:
    """Fill the folder; the source by the names that its files have, and the model's own files."""
    from autoquant_ray.calibrate.files import calibration_of
    from autoquant_ray.export.model import load_for_export, pack_parts, save_config
    from autoquant_ray.export.other_files import finish_folder, model_card

    calibration = calibration_of(source.state, source.used)
    is_whole = layout == MODELOPT and needs_whole(source)
    loaded = load_for_export(source, is_whole=is_whole)
    in_source = SourceTensors.of(loaded.model, loaded.ref)
    save_config(loaded, folder)
    packer, stored = _packer(loaded, source, calibration, layout, in_source)
    together = _together(source, calibration)
    names, facts = pack_parts(
        loaded, packer, together, files=files, in_source=in_source, is_whole=is_whole
    )
    files.assemble(names, folder, max_shard_size)
    packer.finish(folder, facts, engine)
    ignore_carried(in_source, folder, layout)
    card = model_card(source, layout)
    finish_folder(folder, loaded.ref, loaded.sixteen_bits.name, card)
    if "carried" not in source.state.plan:
        uncounted = sum(in_source.carried.values())
        stored = replace(stored, uncounted_bytes=uncounted)
    return stored, in_source


def _packer(
    loaded: LoadedModel,
    source: Source,
    calibration: Calibration,
    layout: str,
    in_source: SourceTensors,
) -> tuple[CompressedPacker | ModelOptPacker, Source]:
    """What packs parts, and the source by the names in the files."""
    if layout == COMPRESSED_TENSORS:
        from autoquant_ray.export.compressed_tensors import CompressedPacker

        packer = CompressedPacker(loaded.model, source, calibration, loaded.sixteen_bits)
        return packer, packer.stored
    from autoquant_ray.export.modelopt import ModelOptPacker
    from autoquant_ray.export.names import as_stored, require_experts_as_stored

    stored = as_stored(loaded.model, source, in_source)
    require_experts_as_stored(loaded.model, source, stored, loaded.ref.weights_folder)
    return (
        ModelOptPacker(loaded.model, source, stored, calibration, loaded.sixteen_bits),
        stored,
    )


def _together(source: Source, calibration: Calibration) -> list[tuple[str, ...]]:
    """Modules around inputs that may have factors, each set in one part of the model."""
    readers = [name for name, format_ in source.formats.items() if takes_factors(format_)]
    folds = [calibration.folds[name] for name in readers if name in calibration.folds]
    return [(fold.producer, *fold.readers) for fold in folds]


def _fingerprint(source: Source, kind: str, engine: str | None = None) -> str:
    """Of all that decides about the parts of a checkpoint."""
    content = {
        "manifest": source.manifest,
        "model": source.state.record.fingerprints["model"],
        "kind": kind,
        "engine": engine,
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
