"""What a serving engine cannot serve of an allocation, and why; what it can serve of a menu.

An allocation is a checkpoint's modules, each with ModelOpt's algorithm or none. With one algorithm
the checkpoint says so once and lists what it leaves out; with several it is ``MIXED_PRECISION`` and
lists every quantized module (ModelOpt's ``process_layer_quant_config``). Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.smoothed import is_smoothed
from autoquant_ray.serving.compressed_formats import compressed_scheme
from autoquant_ray.serving.fused_names import (
    EXPERTS,
    EngineModule,
    engine_modules,
    is_kept_whole,
    served_algo,
)
from autoquant_ray.serving.layer_formats import LayerAlgo, layer_algo
from autoquant_ray.serving.row import Row
from autoquant_ray.serving.table import (
    CARDS,
    COMPRESSED_TENSORS,
    ENGINES,
    FP4_FAMILY,
    GENERATIONS,
    MODELOPT,
    rows_of,
)
from autoquant_ray.wording import few

__all__ = [
    "LayerAlgo",
    "Violation",
    "check_target",
    "describe_violations",
    "layer_algo",
    "named",
    "servable_formats",
    "target_problem",
    "violations",
]
Layers = Mapping[str, LayerAlgo | None]
"""Module of the checkpoint -> how it is quantized; None in 16 bits. All linears are there."""

_MAX_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One reason why an engine cannot serve an allocation.

    Attributes:
        modules: Modules of the checkpoint that it concerns.
        groups: Their groups, where the caller names groups; else the same modules.
        reason: What the engine would do.
        remedy: What to do.
    """

    modules: tuple[str, ...]
    groups: tuple[str, ...]
    reason: str
    remedy: str


def target_problem(engine: str | None, gpu: str | None) -> str | None:
    """What is wrong with an engine and a GPU that a user names; None if they are known.

    Args:
        engine: One of ``ENGINES``, or None.
        gpu: A generation, a card such as ``h100``, or None: any GPU.
    """
    if engine is not None and engine not in ENGINES:
        return f"`engine` {engine!r} is unknown; known: {', '.join(ENGINES)}"
    if gpu is not None and generation_of(gpu) not in GENERATIONS:
        return f"`gpu` {gpu!r} is unknown; known: {', '.join([*GENERATIONS, *CARDS])}"
    if engine is None and gpu is not None:
        return f"`gpu` {gpu} needs an engine; give `engine` {', '.join(ENGINES)}"
    return None


def generation_of(gpu: str) -> str:
    """``hopper`` for ``h100`` and ``hopper``; other texts in lower case."""
    return CARDS.get(gpu.lower(), gpu.lower())


def check_target(engine: str | None, gpu: str | None) -> str | None:
    """The generation of a GPU, for an engine of the table or for none.

    Raises:
        ConfigError: An unknown engine or GPU, or a GPU without an engine.
    """
    problem = target_problem(engine, gpu)
    if problem is not None:
        raise ConfigError(problem)
    return None if gpu is None else generation_of(gpu)


def named(format_: Format, layout: str) -> LayerAlgo | None:
    """How a layout describes layers of a format; None where no name says all of it."""
    return compressed_scheme(format_) if layout == COMPRESSED_TENSORS else layer_algo(format_)


def unserved_reason(
    algo: LayerAlgo | None,
    engine: str,
    generation: str | None,
    *,
    mixed: bool,
    layout: str = MODELOPT,
) -> str | None:
    """Why an engine does not serve an algorithm; None where it does.

    Args:
        algo: From :func:`named`.
        engine: One of ``ENGINES``.
        generation: Of the GPU; None: served on some GPU is enough.
        mixed: As one of several formats of a checkpoint, or as its only one.
        layout: Of the checkpoint.
    """
    is_modelopt = layout == MODELOPT
    if algo is None:
        whose = "ModelOpt's checkpoints have" if is_modelopt else f"{layout} has"
        return f"{whose} no name that says both its weights and its inputs"
    row = rows_of(engine, layout).get(algo.algo)
    kind = "mixed with other formats" if mixed else "as the only format"
    kind = kind if is_modelopt else f"in {layout}"
    if row is None:
        return f"{engine} does not know {algo.algo} {kind}"
    if row.blocks and algo.group_size not in row.blocks:
        sizes = ", ".join(map(str, row.blocks))
        return f"{engine} serves {algo.algo} in blocks of {sizes} only, not {algo.group_size}"
    served = row.mixed if mixed else row.single
    if generation in served or (generation is None and served):
        return None
    where = "" if generation is None else f" on {generation}"
    note = f": {row.note}" if row.note else ""
    return f"{engine}{where} does not serve {algo.algo} {kind}{note}"


def servable_formats(
    formats: Iterable[Format],
    engine: str,
    gpu: str | None,
    *,
    mixed: bool = True,
    layout: str = MODELOPT,
) -> dict[str, str | None]:
    """Name of a format -> why an engine cannot serve it; None where it can.

    Args:
        formats: The menu.
        engine: One of ``ENGINES``.
        gpu: A generation or a card; None: any.
        mixed: As one of several formats of a checkpoint, or as its only one.
        layout: Of the checkpoint.

    Raises:
        ConfigError: An unknown engine or GPU.
    """
    generation = check_target(engine, gpu)
    return {
        format_.name: "its factors per input channel cannot be exported yet"
        if is_smoothed(format_)
        else unserved_reason(named(format_, layout), engine, generation, mixed=mixed, layout=layout)
        for format_ in formats
    }


def violations(
    layers: Layers,
    engine: str,
    gpu: str | None,
    group_of: Mapping[str, str] | None = None,
    layout: str = MODELOPT,
) -> list[Violation]:
    """What an engine would refuse of an allocation, or serve otherwise than it was exported.

    Args:
        layers: The allocation. Names are those of the checkpoint.
        engine: One of ``ENGINES``.
        gpu: A generation or a card; None: any.
        group_of: Module -> its group, for the violations' ``groups``.
        layout: Of the checkpoint.

    Raises:
        ConfigError: An unknown engine or GPU.
    """
    target = _Target(engine, check_target(engine, gpu), layout)
    quantized = {name: algo for name, algo in layers.items() if algo is not None}
    mixed = len(set(quantized.values())) > 1
    modules = engine_modules(layers, engine)
    refusals = [
        *_fused(layers, modules, engine),
        *_merged(_unserved(quantized, target, mixed)),
        *_merged(_no_one_gpu(quantized, target, mixed)),
        *_merged(_group_sizes(quantized, engine, mixed) if layout == MODELOPT else ()),
        *_merged(_without_family(quantized, target, mixed)),
        *_merged(_experts(layers, modules, target)),
        *_merged(_misread(layers, modules, target, mixed)),
    ]
    return [_with_groups(violation, group_of or {}) for violation in refusals]


def describe_violations(refusals: Sequence[Violation], engine: str, gpu: str | None) -> str:
    """The first violations in one line, with their groups."""
    where = engine if gpu is None else f"{engine} on {gpu}"
    texts = [f"{few(v.groups, _MAX_NAMED)}: {v.reason}; {v.remedy}" for v in refusals[:_MAX_NAMED]]
    more = len(refusals) - _MAX_NAMED
    rest = f"; and {more} more reasons" if more > 0 else ""
    return f"{where} cannot serve this allocation: {'; '.join(texts)}{rest}"


class _Target(NamedTuple):
    """Where a checkpoint is to be served, and how it is written."""

    engine: str
    generation: str | None
    layout: str

    @property
    def rows(self) -> dict[str, Row]:
        """Its table."""
        return rows_of(self.engine, self.layout)


def _unserved(
    quantized: Mapping[str, LayerAlgo], target: _Target, mixed: bool
) -> Iterator[Violation]:
    engine, generation, layout = target
    for name, algo in quantized.items():
        reason = unserved_reason(algo, engine, generation, mixed=mixed, layout=layout)
        if reason is not None:
            yield _violation([name], reason, "choose another format, engine or GPU")


def _no_one_gpu(
    quantized: Mapping[str, LayerAlgo], target: _Target, mixed: bool
) -> Iterator[Violation]:
    """Formats each of which some GPU serves, but no GPU all of them."""
    rows = [target.rows.get(algo.algo) for algo in dict.fromkeys(quantized.values())]
    gpus = [set(row.mixed if mixed else row.single) for row in rows if row is not None]
    if target.generation is None and all(gpus) and gpus and not set.intersection(*gpus):
        names = " and ".join(row.algo for row in rows if row is not None)
        reason = f"{target.engine} serves {names} on no one GPU"
        yield _violation(quantized, reason, "solve for a `gpu`")


def _without_family(
    quantized: Mapping[str, LayerAlgo], target: _Target, mixed: bool
) -> Iterator[Violation]:
    """SGLang tells ModelOpt's mixed checkpoints from DeepSeek's W4AFP8 by their NVFP4 layers
    (``_parse_modelopt_quant_config`` of ``srt/configs/model_config.py``)."""
    has_family = any(algo.algo in FP4_FAMILY for algo in quantized.values())
    if target.engine == "sglang" and mixed and not has_family:
        reason = "sglang reads several formats without NVFP4 among them as W4AFP8"
        yield _violation(quantized, reason, "give some layers NVFP4, or all one format")


def _experts(
    layers: Layers, modules: Iterable[EngineModule], target: _Target
) -> Iterator[Violation]:
    for module in modules:
        algo = layers[module.members[0]] if module.name == EXPERTS else None
        row = None if algo is None else target.rows.get(algo.algo)
        if row is not None and not row.experts:
            reason = f"{target.engine} serves no routed experts as {row.algo}"
            yield _violation(module.members, reason, "give them another format")


def _group_sizes(
    quantized: Mapping[str, LayerAlgo], engine: str, mixed: bool
) -> Iterator[Violation]:
    """vLLM and SGLang read one group size, that of the first layer, for all of the family."""
    family = {n: a for n, a in quantized.items() if a.algo in FP4_FAMILY}
    sizes = sorted({algo.group_size for algo in family.values()})
    if mixed and engine != "trtllm" and len(sizes) > 1:
        first = next(iter(family.values())).group_size
        others = [name for name, algo in family.items() if algo.group_size != first]
        named = " and ".join(str(size) for size in sizes)
        reason = f"group sizes {named} are mixed, and {engine} reads all with {first}"
        yield _violation(others, reason, "give all NVFP4 formats one group size")


def _fused(layers: Layers, modules: Iterable[EngineModule], engine: str) -> Iterator[Violation]:
    for module in modules:
        if len({layers[member] for member in module.members}) > 1:
            reason = f"{engine} fuses them into one module, which has one format"
            yield _violation(module.members, reason, "give them the same format")


def _misread(
    layers: Layers, modules: Iterable[EngineModule], target: _Target, mixed: bool
) -> Iterator[Violation]:
    """Modules that are found under another algorithm than theirs, or not at all."""
    algos = {name: algo.algo for name, algo in layers.items() if algo is not None}
    engine, rows, layout = target.engine, target.rows, target.layout
    for module in modules:
        wanted = {layers[member] for member in module.members}
        wanted_algo = next(iter(wanted))
        if len(wanted) > 1 or (wanted_algo is not None and wanted_algo.algo not in rows):
            continue
        exported = None if wanted_algo is None else wanted_algo.algo
        if mixed or layout == COMPRESSED_TENSORS:
            served = served_algo(module, algos, engine, layout)
        else:
            is_kept = exported is None or is_kept_whole(module, engine, exported)
            served = None if is_kept else exported
        if served != exported:
            reason = (
                f"{engine} would read them as {served or '16 bits'}, not {exported or '16 bits'}"
            )
            remedy = "leave them in 16 bits" if exported else "give them their neighbours' format"
            yield _violation(module.members, reason, remedy)


def _violation(modules: Iterable[str], reason: str, remedy: str) -> Violation:
    return Violation(modules=tuple(modules), groups=(), reason=reason, remedy=remedy)


def _merged(refusals: Iterable[Violation]) -> list[Violation]:
    """One violation per reason."""
    merged: dict[tuple[str, str], list[str]] = {}
    for refusal in refusals:
        merged.setdefault((refusal.reason, refusal.remedy), []).extend(refusal.modules)
    return [
        _violation(dict.fromkeys(modules), reason, remedy)
        for (reason, remedy), modules in merged.items()
    ]


def _with_groups(violation: Violation, group_of: Mapping[str, str]) -> Violation:
    groups = tuple(dict.fromkeys(group_of.get(name, name) for name in violation.modules))
    return Violation(
        modules=violation.modules,
        groups=groups,
        reason=violation.reason,
        remedy=violation.remedy,
    )
