"""Restricts a search to what an engine can serve: formats per group, groups that share one.

Which formats can stand in one checkpoint depends on the engine: those that it serves mixed, with
one group size for the NVFP4 family; or one alone that it serves only by itself. vLLM reads two
layouts, each with formats of its own. Each such set is a menu, and the search takes the best
allocation over all menus.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.format import NONE, Format
from autoquant_ray.formats.kv_cache import is_described
from autoquant_ray.formats.method_names import without_method
from autoquant_ray.serving.compressed_formats import experts_problem, shape_problem
from autoquant_ray.serving.fused_names import (
    EXPERTS,
    EngineModule,
    engine_modules,
    is_kept_whole,
    served_algo,
)
from autoquant_ray.serving.layer_formats import LayerAlgo
from autoquant_ray.serving.rules import (
    Violation,
    describe_violations,
    named,
    servable_formats,
    unserved_reason,
    violations,
)
from autoquant_ray.serving.table import (
    COMPRESSED_TENSORS,
    ENGINES,
    GENERATIONS,
    MODELOPT,
    layouts_of,
    rows_of,
)
from autoquant_ray.serving.together import menus_of, says_little

Groups = Mapping[str, Sequence[str]]
"""Group -> its modules; all groups of the model, those that are not searched too."""

Shapes = Mapping[str, Sequence[Sequence[int]]]
"""Module -> shapes of its weights, as ``(..., out, in)``."""

Limits = Mapping[str, Mapping[str, Any]]
"""Layout of checkpoints -> ``reason`` and ``groups``: those of which it cannot hold a quantized
weight; none: it holds no solution of the model."""

Holders = Sequence[tuple[EngineModule, tuple[str, ...]]]
"""Modules of the engine, each with the groups whose modules it holds."""


class NotServedError(ConfigError):
    """The constraints ask for what the engine cannot serve."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What an engine serves together.

    Attributes:
        target: The engine and the GPU in words.
        menu: Formats, without 16 bits.
        permitted: Group -> formats that it may take, 16 bits among them.
        ties: Groups that must share a format; they may round it by different methods.
        layout: Of the checkpoint.
    """

    target: str
    menu: tuple[str, ...]
    permitted: dict[str, frozenset[str]]
    ties: tuple[tuple[str, ...], ...]
    layout: str = MODELOPT

    def permits(self, formats: Mapping[str, str]) -> bool:
        """Whether an allocation keeps to it."""
        is_allowed = all(name in self.permitted[group] for group, name in formats.items())
        return is_allowed and all(
            len({without_method(formats[group]) for group in tie}) == 1 for tie in self.ties
        )


def served_sets(
    groups: Groups,
    searched: Sequence[str],
    formats: Sequence[Format],
    engine: str,
    gpu: str | None,
    shapes: Shapes | None = None,
    limits: Limits | None = None,
    unpacked: Collection[str] = (),
) -> list[Served]:
    """What an engine serves of a search: one entry per menu.

    Args:
        groups: All groups with their modules.
        searched: Those for which a format is chosen.
        formats: The menu of the search.
        engine: One of ``ENGINES``.
        gpu: A generation or a card; None: any.
        shapes: Of the modules, where formats that cannot be packed are left out.
        limits: What no checkpoint of the model can hold; None: nothing is known.
        unpacked: Groups whose weights no layout packs.

    Raises:
        ConfigError: An unknown engine or GPU, or it serves no format of the menu.
        NotServedError: It reads layouts only that hold no solution of the model.
    """
    modules = engine_modules([name for names in groups.values() for name in names], engine)
    group_of = {name: group for group, names in groups.items() for name in names}
    holders = [
        (module, tuple(dict.fromkeys(group_of[name] for name in module.members)))
        for module in modules
    ]
    target = engine if gpu is None else f"{engine} on {gpu}"
    by_name = {format_.name: format_ for format_ in formats}
    served = []
    limits = {} if limits is None else limits
    layouts = [each for each in layouts_of(engine) if is_held(each, limits)]
    if not layouts:
        reasons = dict.fromkeys(limits[layout]["reason"] for layout in layouts_of(engine))
        raise NotServedError(
            f"{engine} cannot serve this model: {'; '.join(reasons)}; solve without `engine`"
        )
    for layout, menu in menus_of(formats, engine, gpu, layouts):
        kept = {*unpacked, *(limits[layout]["groups"] if layout in limits else ())}
        algos = {name: named(by_name[name], layout) for name in menu}
        permitted = _permitted(holders, searched, algos, engine, layout)
        for group, names in permitted.items():
            shapes_of = [(shapes or {}).get(module, ()) for module in groups[group]]
            packable = {n for n in names - {NONE} if _fits(by_name[n], shapes_of, layout)}
            permitted[group] = frozenset({NONE} & names) | (set() if group in kept else packable)
        ties = joined([groups for _, groups in holders], searched)
        served.append(
            Served(target=target, menu=menu, permitted=permitted, ties=ties, layout=layout)
        )
        if layout == MODELOPT and len(set(algos.values())) > 1:
            served += _quantized_experts(served.pop(), holders, searched, engine)
    return served


def is_held(layout: str, limits: Limits, quantized: Collection[str] = ()) -> bool:
    """Whether checkpoints of a layout hold solutions of a model, as far as its limits say.

    Args:
        layout: The layout.
        limits: Of the model.
        quantized: Groups that a solution quantizes; none: it may leave any in 16 bits.
    """
    limit = limits.get(layout)
    return limit is None or (bool(limit["groups"]) and not set(quantized) & set(limit["groups"]))


def why_unheld(chosen: Mapping[str, str], limits: Limits) -> str | None:
    """Why no layout of checkpoints holds an allocation; None where one may.

    Args:
        chosen: Group -> format.
        limits: Of the model.
    """
    quantized = [group for group, name in chosen.items() if name != NONE]
    layouts = (COMPRESSED_TENSORS, MODELOPT)
    if any(is_held(layout, limits, quantized) for layout in layouts):
        return None
    reasons = dict.fromkeys(limits[layout]["reason"] for layout in layouts)
    return f"No checkpoint holds it: {'; '.join(reasons)}."


def _fits(format_: Format, shapes: Sequence[Sequence[Sequence[int]]], layout: str) -> bool:
    """Whether modules, by the shapes of their weights, can be packed in a format.

    Experts have several weights; ModelOpt packs no 4-bit integers of them.
    """
    has_experts = any(len(of) > 1 for of in shapes)
    if layout == MODELOPT and has_experts and format_.weight.get("num_bits") == 4:
        return False
    if layout == COMPRESSED_TENSORS and any(map(experts_problem, shapes)):
        return False
    return all(shape_problem(format_, shape) is None for of in shapes for shape in of)


def _quantized_experts(
    served: Served, holders: Holders, searched: Sequence[str], engine: str
) -> list[Served]:
    """Where experts in 16 bits would be read by their neighbours: two ways out.

    Either no experts stay in 16 bits, or they share their neighbours' format.
    """
    sets, experts = [], set()
    for module, groups in holders:
        for other, neighbours in holders:
            listed = dict.fromkeys(other.members, "some algorithm")
            if module.name != "experts" or other is module:
                continue
            if served_algo(module, listed, engine) is not None:
                sets.append([*groups, *neighbours])
                experts |= set(groups)
    if not sets:
        return [served]
    permitted = served.permitted
    stay = {group for together in sets if not set(together) <= set(permitted) for group in together}
    shared = {
        group: frozenset({NONE}) if group in stay else permitted[group] for group in permitted
    }
    ties = joined([*sets, *served.ties], searched)
    ways = [replace(served, permitted=shared, ties=ties)]
    if all(len(permitted.get(group, ())) > 1 for group in experts):
        quantized = {g: names - {NONE} if g in experts else names for g, names in permitted.items()}
        ways.insert(0, replace(served, permitted=quantized))
    return ways


def require_served(
    groups: Groups,
    chosen: Mapping[str, str],
    formats: Sequence[Format],
    engine: str,
    gpu: str | None,
    layout: str | None = None,
) -> None:
    """Refuse an allocation that an engine cannot serve.

    Args:
        groups: All groups with their modules.
        chosen: Group -> format; others stay in 16 bits.
        formats: The menu of the search.
        engine: One of ``ENGINES``.
        gpu: A generation or a card; None: any.
        layout: Of the checkpoint; None: any that the engine reads.

    Raises:
        NotServedError: Names groups, reasons and remedies.
    """
    problems: list[str] = []
    for candidate in layouts_of(engine) if layout is None else [layout]:
        problem = _layout_problem(groups, chosen, formats, engine, gpu, candidate)
        if problem is None:
            return
        problems.append(problem)
    # Where a layout has no name for a format, another says more.
    raise NotServedError(min(problems, key=says_little))


def _layout_problem(
    groups: Groups,
    chosen: Mapping[str, str],
    formats: Sequence[Format],
    engine: str,
    gpu: str | None,
    layout: str,
) -> str | None:
    """Why an engine cannot serve an allocation in a layout; None where it can."""
    algos = {format_.name: named(format_, layout) for format_ in formats}
    nameless = sorted({n for n in chosen.values() if n != NONE and algos[n] is None})
    if nameless:
        reason = unserved_reason(None, engine, None, mixed=True, layout=layout)
        return f"{engine} cannot serve {', '.join(nameless)}: {reason}"
    layers = {
        name: algos.get(chosen.get(group, NONE))
        for group, modules in groups.items()
        for name in modules
    }
    group_of = {name: group for group, modules in groups.items() for name in modules}
    refusals: list[Violation] = violations(layers, engine, gpu, group_of, layout)
    return describe_violations(refusals, engine, gpu) if refusals else None


def why_unserved(
    groups: Groups,
    chosen: Mapping[str, str],
    formats: Sequence[Format],
    engine: str | None,
    gpu: str | None,
    limits: Limits | None = None,
) -> str | None:
    """Why the engine, or any engine, cannot serve an allocation; None where it can.

    Args:
        groups, chosen, formats, gpu: As in :func:`require_served`.
        engine: One of ``ENGINES``; None: any of them.
        limits: What no checkpoint of the model can hold; None: nothing is known.
    """
    if (reason := why_unheld(chosen, limits or {})) is not None:
        return reason
    if engine is not None:
        try:
            require_served(groups, chosen, formats, engine, gpu)
        except NotServedError as error:
            return f"{error}. Solve it again with --engine {engine}."
        return None
    used = [format_ for format_ in formats if format_.name in set(chosen.values())]
    served = {}
    for name, generation in itertools.product(ENGINES, GENERATIONS):
        for layout in layouts_of(name):
            mixed = len({named(format_, layout) for format_ in used}) > 1
            reasons = servable_formats(used, name, generation, mixed=mixed, layout=layout)
            served[name, generation, layout] = reasons
    if any(all(reason is None for reason in reasons.values()) for reasons in served.values()):
        return None
    nowhere = [f.name for f in used if all(reasons[f.name] for reasons in served.values())]
    what = " or ".join(nowhere) if nowhere else " and ".join(f.name for f in used) + " together"
    kind = " in a checkpoint of several formats" if len(used) > 1 and nowhere else ""
    return (
        f"None of {', '.join(ENGINES)} serves {what}{kind} (docs/engines.md). 'solve' with "
        "--engine takes only what one serves."
    )


def formats_of(plan: Mapping[str, Any]) -> list[Format]:
    """The menu of a run: its formats of weights.

    Args:
        plan: The plan's summary from ``run.json``.

    Raises:
        ConfigError: An imported run, which only names its formats.
    """
    if not all(map(is_described, plan["formats"])):
        raise ConfigError(
            "`engine` needs to know what the formats are; an imported run only names them, so scan "
            "the model"
        )
    return [Format.from_json(entry) for entry in plan["formats"] if entry.get("weight")]


def _permitted(
    holders: Holders,
    searched: Sequence[str],
    algos: Mapping[str, LayerAlgo | None],
    engine: str,
    layout: str,
) -> dict[str, frozenset[str]]:
    permitted = {group: {NONE, *algos} for group in searched}
    is_listed = layout == COMPRESSED_TENSORS or len(set(algos.values())) > 1
    rows = rows_of(engine, layout)
    for module, groups in holders:
        for name, algo in algos.items():
            assert algo is not None
            # A group that is not searched is a member that stays in 16 bits.
            is_served = all(group in permitted for group in groups)
            is_served &= module.name != EXPERTS or rows[algo.algo].experts
            if layout == MODELOPT:
                is_served &= not is_kept_whole(module, engine, algo.algo)
            if is_served and is_listed:
                alone = dict.fromkeys(module.members, algo.algo)
                is_served = served_algo(module, alone, engine, layout) == algo.algo
            if not is_served:
                for group in groups:
                    permitted.get(group, set()).discard(name)
    return {group: frozenset(names) for group, names in permitted.items()}


def joined(sets: Sequence[Sequence[str]], searched: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Sets that overlap as one, in the order of the groups; those of one group are left out."""
    root = {group: group for groups in (*sets, searched) for group in groups}

    def find(group: str) -> str:
        while root[group] != group:
            group = root[group]
        return group

    for first, *others in sets:
        for other in others:
            root[find(other)] = find(first)
    members: dict[str, list[str]] = {}
    for group in searched:
        members.setdefault(find(group), []).append(group)
    return tuple(tuple(groups) for groups in members.values() if len(groups) > 1)
