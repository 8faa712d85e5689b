"""Exports a solution as a folder that serving engines load, in order: check, pack, check, rename.

The model is loaded whole, in the type that the run computed in, so it must fit the memory of the
machine. No data is needed: weights are calibrated by themselves, and the maxima of inputs are the
run's. The folder is written beside its place and renamed at the end.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoquant_ray.errors import ConfigError
from autoquant_ray.export.carried import SourceTensors, add_ignored, copy_carried, ignore_carried
from autoquant_ray.export.check import check_checkpoint, unlisted
from autoquant_ray.export.folder import written_beside
from autoquant_ray.export.layouts import COMPRESSED_TENSORS, LAYOUTS, stored_as
from autoquant_ray.export.source import (
    Source,
    pick_layout,
    read_source,
    require_engine,
    require_new_folder,
    require_packable,
    served_layouts,
    target_of,
)
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.serving.rules import check_target


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
    """

    path: str
    layout: str
    weight_bytes: float
    bytes_on_disk: int
    layers: dict[str, int]
    caches: dict[str, int]
    served_layouts: list[str]
    num_carried: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What people are told."""
        layers = ", ".join(f"{count} {name}" for name, count in self.layers.items())
        caches = [f"KV cache: {name} in {count} attentions" for name, count in self.caches.items()]
        carried = [f"copied, not loaded: {self.num_carried} tensors"] if self.num_carried else []
        off = self.bytes_on_disk / self.weight_bytes - 1
        return [
            f"quantized layers: {layers}",
            *caches,
            *carried,
            f"weights on disk: {self.bytes_on_disk:,} bytes; the manifest says "
            f"{self.weight_bytes:,.0f} ({off:+.2%})",
            self.path,
        ]


def export_run(
    directory: RunDirectory,
    out: str,
    *,
    solution: str = "",
    layout: str | None = None,
    engine: str | None = None,
    gpu: str | None = None,
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

    Raises:
        AutoQuantError: One of its subclasses; nothing is left at ``out``.
    """
    if layout not in (None, *LAYOUTS):
        raise ConfigError(f"`format` {layout!r} is unknown; known: {', '.join(LAYOUTS)}")
    check_target(engine, gpu)
    source = read_source(directory, solution)
    target = require_new_folder(out)
    layout = pick_layout(source, engine, gpu) if layout is None else layout
    require_packable(source, layout)
    require_engine(source, layout, engine, gpu)
    _require_package(layout)
    with written_beside(target) as folder:
        written, in_source = _write(source, folder, layout, target_of(source, engine, gpu)[0])
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
    from autoquant_ray.export.model import distinct_tensors, load_for_export
    from autoquant_ray.export.other_files import finish_folder
    from autoquant_ray.quantize.fitted_model import Factors
    from autoquant_ray.quantize.weight_search import WeightScales

    source = read_source(directory, solution)
    target = require_new_folder(out)
    calibration = calibration_of(source.state, used=())  # factors alone
    model, ref, sixteen_bits = load_for_export(source)
    in_source = SourceTensors.of(model, ref)
    Factors(model, source.formats, WeightScales(model, calibration)).fold()
    tensors = {name: sixteen_bits.rounded(name, t) for name, t in distinct_tensors(model)}
    with written_beside(target) as folder:
        model.save_pretrained(folder, state_dict=tensors)
        copy_carried(in_source, folder, sixteen_bits)
        finish_folder(folder, ref, sixteen_bits.name)
        in_source.require_all_in(folder)
    return str(target)


def _require_package(layout: str) -> None:
    if layout == COMPRESSED_TENSORS and importlib.util.find_spec("compressed_tensors") is None:
        raise ConfigError(
            f"`format` {layout} needs the package compressed-tensors: pip install "
            "'autoquant-ray[export]'"
        )


def _write(
    source: Source, folder: Path, layout: str, engine: str | None
) -> tuple[Source, SourceTensors]:
    """Fill the folder; the source by the names that its files have, and the model's own files."""
    from autoquant_ray.calibrate.files import calibration_of
    from autoquant_ray.export.model import load_for_export
    from autoquant_ray.export.other_files import finish_folder

    calibration = calibration_of(source.state, source.used)
    model, ref, sixteen_bits = load_for_export(source)
    in_source = SourceTensors.of(model, ref)
    stored = source
    if layout == COMPRESSED_TENSORS:
        from autoquant_ray.export.compressed_tensors import write_compressed

        write_compressed(model, source, calibration, folder, sixteen_bits)
    else:
        from autoquant_ray.export.modelopt import (
            name_fused_layers,
            round_to_16_bits,
            write_modelopt,
        )
        from autoquant_ray.export.names import as_stored, require_experts_as_stored

        stored = as_stored(model, source)
        require_experts_as_stored(model, source, stored, ref.weights_folder)
        write_modelopt(model, source, calibration, folder)
        round_to_16_bits(folder, stored, sixteen_bits)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        add_ignored(unlisted(config, stored), folder, layout)
        if engine == "sglang":
            name_fused_layers(folder, stored)
    copy_carried(in_source, folder, sixteen_bits)
    ignore_carried(in_source, folder, layout)
    finish_folder(folder, ref, sixteen_bits.name)
    if "carried" not in source.state.plan:
        uncounted = sum(in_source.carried.values())
        stored = replace(stored, uncounted_bytes=uncounted)
    return stored, in_source
