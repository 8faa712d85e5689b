"""Names of layers in the files of a model, which for some families differ from those in memory.

Engines look for the names of the model's own files. transformers renames them on loading and may
join tensors (the experts of a layer) or transpose them; ModelOpt's exporter takes most of this
back. What it does not take back is refused here, because it would be written without an error.

For the other layout fused experts are taken apart here: what transformers would do to them on
saving, done to the numbers of rows in place of weights, shows which linear of the files has which
rows of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from autoquant_ray.errors import FormatError, one_line
from autoquant_ray.export.carried import SourceTensors
from autoquant_ray.export.check import StoredTensors
from autoquant_ray.export.layouts import COMPRESSED_TENSORS, MODELOPT
from autoquant_ray.export.source import Layers
from autoquant_ray.models.quantizable import is_turned, quantizable_modules
from autoquant_ray.plan.carried import unscope_conversions
from autoquant_ray.wording import few

_COLUMNS = 2  # a single one would be dropped
_MOST_NAMES = 4

LayersT = TypeVar("LayersT", bound=Layers)


def as_stored(model: Any, source: LayersT, in_source: SourceTensors) -> LayersT:
    """The source with its modules named as ModelOpt's exporter writes them.

    Args:
        model: As transformers loaded it, or a skeleton; its conversions may be noted for all of it.
        source: By the names in memory.
        in_source: The model's own files.

    Raises:
        FormatError: The exporter cannot give the model's tensors the form of its own files, or
            would give some linears other names.
    """
    from autoquant_ray.modelopt_export import stored_names_of

    unscope_conversions(model)
    with naming():
        names_of = cache(stored_names_of(model))
    stored = source.renamed(names_of)
    _require_names_of_files(model, source, names_of, in_source)
    return stored


def require_plain_linears(model: Any) -> None:
    """Check that a model's files hold its matrices as engines read packed ones.

    Raises:
        FormatError: They hold them the other way round.
    """
    if any(map(is_turned, model.modules())):
        raise FormatError(
            f"a checkpoint of {type(model).__name__} cannot be written: its files hold matrices "
            "the other way round (Conv1D of transformers), and engines turn those that are packed "
            "too; give manifest.json's quantization_config to mtq.quantize"
        )


@contextmanager
def naming() -> Iterator[None]:
    """Inside, a ``ValueError`` says why ModelOpt cannot give tensors the names of the files.

    Raises:
        FormatError: It was raised.
    """
    try:
        yield
    except ValueError as error:
        raise FormatError(
            f"`format` {MODELOPT} cannot give this model's tensors the form of its own files "
            f"({one_line(error)}): ModelOpt's exporter does not take back what transformers does "
            "on loading"
        ) from None


def require_experts_as_stored(
    model: Any, source: Layers, stored: Layers, own_files: Path | None
) -> None:
    """Check that fused experts get the form that they have in the model's own files.

    ModelOpt's exporter writes them one by one, but for transposed ones (GPT-OSS), which it does
    not write as the scan quantizes them.

    Args:
        model: The loaded model.
        source: What is exported.
        stored: The same by stored names.
        own_files: Folder of the model's safetensors files; None: nothing to compare with.

    Raises:
        FormatError: They would get another.
    """
    transposed = {module.name for module in quantizable_modules(model) if module.is_transposed}
    wrong = [name for name in source.formats if name in transposed]
    if wrong:
        raise FormatError(
            f"`format` {MODELOPT} cannot hold transposed experts ({few(wrong, _MOST_NAMES)}); "
            "leave them in 16 bits (solve `allow` '*experts=none')"
        )
    file_sizes = StoredTensors.of(own_files).nbytes if own_files is not None else {}
    fused = [
        name
        for memory, name in zip(*(_experts(each) for each in (source, stored)), strict=True)
        if file_sizes and memory not in transposed
        if not any(f"{name.partition('.')[2]}.0." in tensor for tensor in file_sizes)
    ]
    if fused:
        raise FormatError(
            f"`format` {MODELOPT} cannot hold experts that the model's own files keep fused "
            f"({few(fused, _MOST_NAMES)}): ModelOpt writes them one by one, even in 16 bits, under "
            "names that readers of this model do not know"
        )


def _require_names_of_files(
    model: Any, source: Layers, names_of: Callable[[str], list[str]], in_source: SourceTensors
) -> None:
    """Check that linears get the names that they have in the model's own files.

    What the exporter takes back are transformers' rules, which do not give every family the names
    of its files again (DeepSeek-V4's have no ``model.`` to begin with, and keep it).
    """
    files: dict[str, set[str]] = {}
    for name in in_source.files.names:
        files.setdefault(in_source.place_of(name), set()).add(name)
    start = f"{model.base_model_prefix}."
    for module in source.modules:
        stored = {name.removeprefix(start) for name in files.get(f"{module}.weight", ())}
        given = {f"{name}.weight".removeprefix(start) for name in names_of(module)}
        if stored and stored != given and not source.is_experts(module):
            raise FormatError(
                f"`format` {MODELOPT} cannot give this model's tensors the names of its own files: "
                f"ModelOpt would write {min(given)}, and the files have {min(stored)}"
            )


def misnamed_linears(model: Any, source: Layers, in_source: SourceTensors) -> dict[str, str]:
    """Quantized linear, by its name in memory -> that of its weight in the files, where the two
    differ.

    Args:
        model: As transformers loaded it, or a skeleton.
        source: Which layers are quantized.
        in_source: The model's own files.
    """
    start = f"{model.base_model_prefix}."
    misnamed = {}
    for name in in_source.files.names:
        place = in_source.place_of(name)
        module, _, kind = place.rpartition(".")
        is_linear = kind == "weight" and module in source.formats and not source.is_experts(module)
        if is_linear and name.removeprefix(start) != place.removeprefix(start):
            misnamed[module] = name
    return misnamed


def require_names_in_memory(model: Any, source: Layers, in_source: SourceTensors) -> None:
    """Check that the files of a model name its quantized linears as transformers does in memory.

    The other layout is described by the names in memory, and its tensors have those of the files.

    Raises:
        FormatError: They have others, by which no reader would find what the config names.
    """
    misnamed = misnamed_linears(model, source, in_source)
    if misnamed:
        module, name = next(iter(misnamed.items()))
        more = f" and {len(misnamed) - 1} more" if len(misnamed) > 1 else ""
        raise FormatError(
            f"`format` {COMPRESSED_TENSORS} cannot hold layers that the model's own files name "
            f"otherwise than transformers ({name} is {module}{more}), since readers look for both; "
            f"leave them in 16 bits, or give `format` {MODELOPT}"
        )


class StoredLinear(NamedTuple):
    """A linear of the files, and where it is in memory.

    Attributes:
        name: In the files, without ``.weight``.
        parameter: Of the module of the experts.
        expert: Its number.
        first: The first of its rows.
        num_rows: How many rows.
        num_columns: Of the parameter.
    """

    name: str
    parameter: str
    expert: int
    first: int
    num_rows: int
    num_columns: int


def stored_linears(model: Any, source: Layers) -> dict[str, list[StoredLinear]]:
    """Linears of every module of fused experts, none where the files keep its experts fused.

    Args:
        model: As transformers loaded it; its weights need not be there.
        source: Which modules.

    Raises:
        FormatError: Experts are quantized that the files keep fused, or that are transposed.
    """
    linears = {
        name: _linears_of(model, name, [prefix.removesuffix("_") for prefix in facts["prefixes"]])
        for name, facts in source.modules.items()
        if source.is_experts(name)
    }
    transposed = {module.name for module in quantizable_modules(model) if module.is_transposed}
    whole = [n for n in source.formats if n in transposed or linears.get(n) == []]
    if whole:
        raise FormatError(
            f"`format` {COMPRESSED_TENSORS} cannot hold experts that the model's own files keep "
            f"fused ({few(whole, _MOST_NAMES)}): engines look for linears of each expert there; "
            "leave them in 16 bits (solve `allow` '*experts=none')"
        )
    return linears


def by_stored_names(source: LayersT, linears: Mapping[str, Sequence[StoredLinear]]) -> LayersT:
    """The source with the linears of the files in place of the fused modules that have some."""

    def unfused(content: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for key, value in content.items() for name in _names(linears, key)}

    modules = {
        name: {"prefixes": [""], "shapes": [[linear.num_rows, linear.num_columns]]}
        for of_module in linears.values()
        for name, linear in ((linear.name, linear) for linear in of_module)
    }
    return replace(
        source,
        formats=unfused(source.formats),
        groups=unfused(source.groups),
        modules=unfused(source.modules) | modules,
    )


def _experts(source: Layers) -> list[str]:
    return [module for module in source.modules if source.is_experts(module)]


def _names(linears: Mapping[str, Sequence[StoredLinear]], module: str) -> list[str]:
    return [linear.name for linear in linears.get(module, ())] or [module]


def _linears_of(model: Any, module: str, parameters: Iterable[str]) -> list[StoredLinear]:
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    linears = []
    for parameter in parameters:
        num_experts, num_rows, num_columns = getattr(model.get_submodule(module), parameter).shape
        rows_EO = torch.arange(num_experts * num_rows).reshape(num_experts, num_rows, 1)
        marks = {f"{module}.{parameter}": rows_EO.expand(-1, -1, _COLUMNS).clone()}
        try:
            stored = revert_weight_conversion(model, marks)
        except ValueError:  # files hold them joined with those of another module (ERNIE-4.5-VL)
            return []
        for name, mark in stored.items():
            if mark.dim() != 2 or mark.shape[-1] != _COLUMNS:
                return []
            if not torch.equal(mark[:, 0], mark[0, 0] + torch.arange(len(mark))):
                return []  # rows that are not one after another
            expert, first = divmod(int(mark[0, 0]), num_rows)
            linears.append(
                StoredLinear(
                    name=name.removesuffix(".weight"),
                    parameter=parameter,
                    expert=expert,
                    first=first,
                    num_rows=len(mark),
                    num_columns=num_columns,
                )
            )
    return sorted(linears, key=lambda linear: (linear.expert, linear.parameter))
