"""What keeps a model's layers out of a checkpoint, before anything is scored.

The checks are those that an export makes, here on the model's skeleton and the headers of its
files; ModelOpt is asked only where its exporter may stop: at experts, and at names or tensors that
transformers changes on loading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import FormatError
from autoquant_ray.export.layouts import COMPRESSED_TENSORS, LAYOUTS, MODELOPT
from autoquant_ray.export.source import Layers, problems_of
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.gguf_types import gguf_type_of
from autoquant_ray.models.layers import keep_first_of_kind
from autoquant_ray.plan.carried import keep_conversions
from autoquant_ray.runs.record import LayoutLimit
from autoquant_ray.wording import few

if TYPE_CHECKING:
    from autoquant_ray.export.carried import SourceTensors
    from autoquant_ray.models.find import ModelRef
    from autoquant_ray.plan.plan import Plan

_MOST_NAMES = 3


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of the checkpoints of a model.

    Attributes:
        whole: Layout -> why it holds no solution of the model, or only some.
        kept: Of these layouts, the groups that must stay in 16 bits there; none: it holds none.
        groups: Layout -> format -> what it cannot hold of it -> the groups that this concerns.
        gguf: Formats that are types of GGUF files, which no layout holds.
    """

    whole: Mapping[str, str]
    kept: Mapping[str, list[str]]
    groups: Mapping[str, Mapping[str, Mapping[str, list[str]]]]
    gguf: Sequence[str] = ()

    def lines(self) -> list[str]:
        """What people are told: of a layout, and what no layout can hold."""
        lines = [*dict.fromkeys(self.whole.values()), *self._of_gguf()]
        others = [layout for layout in self.groups if layout not in self.whole]
        barred = [_barred(self.groups[layout]) for layout in others]
        for layout in others[:1]:
            for problem, groups in _united(self.groups[layout], set.intersection(*barred)).items():
                lines.append(f"{problem} ({few(groups, _MOST_NAMES)})")
        return lines

    def _of_gguf(self) -> list[str]:
        if not self.gguf:
            return []
        return [
            f"{', '.join(self.gguf)}: types of GGUF files stand in no checkpoint; a recipe has "
            "them (`format` recipe, `tool` llama.cpp)"
        ]

    def for_run(self) -> dict[str, LayoutLimit]:
        """What ``run.json`` keeps, so that ``solve`` leaves out what an export would refuse."""
        return {
            layout: {"reason": reason, "groups": self.kept.get(layout, [])}
            for layout, reason in self.whole.items()
        }

    def to_json(self) -> dict[str, list[str]]:
        """Layout -> its limits; none where it holds all that is searched."""
        return {
            layout: [
                *([self.whole[layout]] if layout in self.whole else []),
                *self._of_gguf(),
                *(
                    f"{problem} ({few(names, _MOST_NAMES)})"
                    for problem, names in _united(formats, _barred(formats)).items()
                ),
            ]
            for layout, formats in self.groups.items()
        }


def checkpoint_limits(plan: Plan, ref: ModelRef) -> Limits:
    """What an export of the model could not write, whatever is chosen or for some choices.

    Args:
        plan: Of the model.
        ref: The model; its weights are not read.

    Raises:
        ModelError: The model cannot be built.
    """
    weights = [format_ for format_ in plan.formats if format_.kv is None]
    menu = [format_ for format_ in weights if gguf_type_of(format_.weight) is None]
    gguf = [format_.name for format_ in weights if format_ not in menu]
    groups = {
        layout: {f.name: problems_of(_layers(plan, f), layout) for f in menu} for layout in LAYOUTS
    }
    if not menu:
        return Limits(whole={}, kept={}, groups=groups, gguf=gguf)
    all_layers = _layers(plan, menu[0])
    whole = _whole(plan, all_layers, ref)
    kept: dict[str, list[str]] = {}
    for layouts, modules in _keepable(all_layers, whole, ref):
        open_layouts = [layout for layout in layouts if layout not in kept]
        still = _whole(plan, _without(all_layers, modules), ref) if open_layouts else whole
        names = list(dict.fromkeys(all_layers.groups[name] for name in modules))
        kept |= {layout: names for layout in open_layouts if layout not in still}
    return Limits(whole=whole, kept=kept, groups=groups, gguf=gguf)


def _keepable(
    layers: Layers, whole: Collection[str], ref: ModelRef
) -> Iterator[tuple[Collection[str], list[str]]]:
    """Layouts that do not hold a model, and modules without which they may: few first."""
    from autoquant_ray.export.carried import SourceTensors
    from autoquant_ray.export.names import misnamed_linears
    from autoquant_ray.models.load import build_skeleton

    experts = [name for name in layers.formats if layers.is_experts(name)]
    if whole and experts:
        yield whole, experts
    if COMPRESSED_TENSORS not in whole or ref.gguf_file is not None:
        return
    model = build_skeleton(ref)
    misnamed = [*misnamed_linears(model, layers, SourceTensors.of(model, ref))]
    if misnamed:
        yield [COMPRESSED_TENSORS], misnamed
    if misnamed and experts:
        yield [COMPRESSED_TENSORS], [*misnamed, *experts]


def _without(layers: Layers, modules: Sequence[str]) -> Layers:
    """The same with some modules in 16 bits."""
    formats = {n: f for n, f in layers.formats.items() if n not in set(modules)}
    return replace(layers, formats=formats)


def _layers(plan: Plan, format_: Format) -> Layers:
    """All that a format may be chosen for, in it."""
    modules = {module.name: (module, g) for g in plan.groups for module in g.modules}
    return Layers(
        formats={
            name: format_
            for name, (_, group) in modules.items()
            if group.is_searched and group.takes(format_)
        },
        groups={name: group.name for name, (_, group) in modules.items()},
        modules={name: module.to_json() for name, (module, _) in modules.items()},
        caches={},
    )


def _whole(plan: Plan, layers: Layers, ref: ModelRef) -> dict[str, str]:
    """Layout -> the check of an export of the whole model that stops it."""
    from autoquant_ray.export.carried import SourceTensors
    from autoquant_ray.export.names import require_plain_linears
    from autoquant_ray.models.load import build_skeleton

    model: Any = build_skeleton(ref)
    try:
        require_plain_linears(model)
        in_source = SourceTensors.of(model, ref)
    except FormatError as error:
        return dict.fromkeys(LAYOUTS, str(error))
    keep_conversions(model, in_source.files.names)
    is_plain = not plan.other_modules and not any(map(layers.is_experts, layers.modules))
    if is_plain and not model._weight_conversions:
        return {}
    keep_first_of_kind(model)
    here = {name for name, _ in model.named_modules()}
    layers = layers.within(here.__contains__)
    checks: dict[str, Callable[[], object]] = {
        COMPRESSED_TENSORS: lambda: _require_linears(model, layers, in_source),
        MODELOPT: lambda: _require_exporter(model, layers, in_source, ref.weights_folder),
    }
    limits: dict[str, str] = {}
    for layout, check in checks.items():
        try:
            check()
        except FormatError as error:
            limits[layout] = str(error)
        except re.error:  # of a rule for older files, which cannot be turned round
            continue
    return {layout: limits[layout] for layout in LAYOUTS if layout in limits}


def _require_linears(model: Any, layers: Layers, in_source: SourceTensors) -> None:
    """Check that the other layout has a name for all linears of a model."""
    from autoquant_ray.export import names

    names.stored_linears(model, layers)
    names.require_names_in_memory(model, layers, in_source)


def _require_exporter(
    model: Any, layers: Layers, in_source: SourceTensors, own_files: Path | None
) -> None:
    """Check that ModelOpt's exporter would write a model, which is changed."""
    from autoquant_ray.export import names
    from autoquant_ray.export.modelopt import require_preparable

    stored = names.as_stored(model, layers, in_source)
    names.require_experts_as_stored(model, layers, stored, own_files)
    require_preparable(model, layers)


def _rows(formats: Mapping[str, Mapping[str, list[str]]]) -> Iterator[tuple[str, str, str]]:
    for format_, problems in formats.items():
        for problem, groups in problems.items():
            yield from ((format_, problem, group) for group in groups)


def _barred(formats: Mapping[str, Mapping[str, list[str]]]) -> set[tuple[str, str]]:
    return {(format_, group) for format_, _, group in _rows(formats)}


def _united(
    formats: Mapping[str, Mapping[str, list[str]]], within: set[tuple[str, str]]
) -> dict[str, list[str]]:
    """Problem -> its groups, of all formats."""
    united: dict[str, dict[str, None]] = {}
    for format_, problem, group in _rows(formats):
        if (format_, group) in within:
            united.setdefault(problem, {})[group] = None
    return {problem: list(groups) for problem, groups in united.items()}
