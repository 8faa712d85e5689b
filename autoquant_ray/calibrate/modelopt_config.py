"""A solution's ``quantization_config`` as ``mtq.quantize`` takes it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from autoquant_ray.formats.algorithms import FITTED, by_sets, in_mode
from autoquant_ray.formats.format import attributes_from_json
from autoquant_ray.formats.gguf_types import gguf_type_of
from autoquant_ray.formats.numbers import is_scaled_by_block, is_static_nvfp4
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import (
    MANIFEST_JSON,
    MANIFEST_TABLE,
    RUN_FILE,
    SOLUTIONS,
    solution_folder,
)
from autoquant_ray.runs.rounding import require_rounding
from autoquant_ray.runs.state import RunState

Device = Literal["auto", "cpu", "cuda"]


def load_quantization_config(
    source: Mapping[str, Any] | str | os.PathLike[str], *, device: Device = "auto"
) -> dict[str, Any]:
    """Give a manifest's ``quantization_config`` the Python types that ``mtq.quantize`` checks.

    ModelOpt runs NVFP4 and the MX formats by CUDA kernels only. For a model on CPU their quantizers
    name the ``backend`` that this package registers with ModelOpt
    (:mod:`autoquant_ray.quantize.backends.block_formats`); on CUDA such a quantizer still runs
    ModelOpt's kernels. Where layers are calibrated by different algorithms, the mode that this
    package registers with ModelOpt (:mod:`autoquant_ray.quantize.calibration_mode`) runs
    ModelOpt's own, one after another.

    Given a run, the config of an allocation with fitted weights names it, and ``mtq.quantize``
    takes what was scored from its files. Given a manifest alone, it fits anew, to its forward loop.

    Args:
        source: A run or the folder of one of its solutions (local path, ``s3://``, ``gs://``), the
            path of its ``manifest.json``, or that file's content. A copy of that file elsewhere is
            a manifest alone.
        device: Where the model is. ``cuda`` never names the backend, so that what is saved
            needs ModelOpt alone. ``auto``: ``cpu`` where this machine has no CUDA device.

    Returns:
        ``{"quant_cfg": [...], "algorithm": ...}`` with integer block axes and tuples.

    Raises:
        ValueError: The manifest has none, because it was imported.
        StoreError: The path has no manifest, or the run dropped what it fitted.
    """
    if isinstance(source, Mapping):
        return _config(source, device)
    path = os.fspath(source)
    if (file := Path(path).expanduser()).is_file() and file.name != MANIFEST_JSON:
        return _config(RunDirectory(str(file.parent)).read_json(file.name), device)
    folder = _folder_of(path)
    directory = RunDirectory(folder)
    if directory.exists(RUN_FILE):
        return config_of_solution(directory, device=device)
    parent, solution = _parent_run(folder)
    if parent is not None:
        return config_of_solution(parent, solution, device=device)
    return _config(directory.read_json(MANIFEST_JSON), device)


def config_of_solution(
    directory: RunDirectory, solution: str = "", *, device: Device = "auto"
) -> dict[str, Any]:
    """The config of a run's solution, which names the run where it fitted weights.

    Args:
        directory: The run.
        solution: Folder below ``solutions/``; '' for the scan's own.
        device: Where the model is.

    Raises:
        ValueError: The run was imported.
        StoreError: There is no such solution, or the run dropped what it fitted.
    """
    start = solution_folder(solution)
    config = _config(directory.read_json(f"{start}{MANIFEST_JSON}"), device)
    algorithm = config["algorithm"]
    methods = [set_["algorithm"] for set_ in algorithm["sets"]] if by_sets(algorithm) else []
    if not any(isinstance(a, Mapping) and a["method"] in FITTED for a in methods):
        return config
    import autoquant_ray.calibrate.solution_fits  # noqa: F401 (lets the mode read runs)

    rows = directory.read_table(f"{start}{MANIFEST_TABLE}").column("format").to_pylist()
    require_rounding(RunState.open(directory), dict.fromkeys(rows))
    return config | {"algorithm": algorithm | {"run": _place_of(directory), "solution": solution}}


def _folder_of(path: str) -> str:
    """The folder of a manifest, or the folder itself, whatever the working directory will be."""
    if "://" not in path:
        place = Path(path).expanduser().absolute()
        return str(place.parent if place.name == MANIFEST_JSON else place)
    base, mark, options = path.partition("?")
    return f"{base.rstrip('/').removesuffix(f'/{MANIFEST_JSON}')}{mark}{options}"


def _parent_run(folder: str) -> tuple[RunDirectory | None, str]:
    """The run that a folder is a solution of, and the solution's name; None if it is of none."""
    base, mark, options = folder.partition("?") if "://" in folder else (folder, "", "")
    above, _, name = base.rpartition("/")
    run, _, kind = above.rpartition("/")
    if kind != SOLUTIONS or not run:
        return None, ""
    parent = RunDirectory(f"{run}{mark}{options}")
    return (parent, name) if parent.exists(RUN_FILE) else (None, "")


def _place_of(directory: RunDirectory) -> str:
    """A path that means the same in another folder."""
    return directory.uri if "://" in directory.uri else str(Path(directory.path("")).absolute())


def _config(manifest: Mapping[str, Any], device: str) -> dict[str, Any]:
    config = manifest["quantization_config"]
    if config is None:
        raise ValueError("this manifest was imported and does not name all quantized modules")
    entries = [
        entry | ({"cfg": attributes_from_json(entry["cfg"])} if "cfg" in entry else {})
        for entry in config["quant_cfg"]
    ]
    return _runnable({"quant_cfg": entries, "algorithm": config["algorithm"]}, device)


def _runnable(config: dict[str, Any], device: str) -> dict[str, Any]:
    """The config with what it needs registered with ModelOpt; on CPU, with its backend named."""
    quantizers = [entry.get("cfg") or {} for entry in config["quant_cfg"]]
    by_block = any(map(is_scaled_by_block, quantizers)) and _is_on_cpu(device)
    if by_block and any(map(is_static_nvfp4, quantizers)):
        config["algorithm"] = in_mode(config["algorithm"])
    if by_sets(config["algorithm"]):
        import autoquant_ray.quantize.calibration_mode
    if any(gguf_type_of(attributes) is not None for attributes in quantizers):
        import autoquant_ray.quantize.backends.by_ggml  # noqa: F401
    if not by_block:
        return config
    from autoquant_ray.quantize.backends.block_formats import for_cpu

    return for_cpu(config)


def _is_on_cpu(device: str) -> bool:
    import torch

    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())
