"""Which linears of heads that transformers does not load are quantized, and in which formats.

Such a head (``mtp.*``, ``model.layers.N.*`` beyond the last layer) is carried in 16 bits unless a
format is named for it. Nothing scores it, and no calibration sees its inputs: weights are rounded
by their maxima, in a format whose inputs stay in 16 bits or are scaled while the model runs.

Engines build a head of the model's own decoder layer and of what joins that with the model. So the
linears are quantized that are named within the head's layer as those of the model's own layers are
that can be; what joins them (``eh_proj``, ``fc``), routers, embeddings and outputs stay in 16 bits,
which is how vLLM 0.32.0 has them (``model_executor/models/*_mtp.py``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import ConfigError, FormatError
from autoquant_ray.export.carried import SourceTensors
from autoquant_ray.export.layouts import (
    COMPRESSED_TENSORS,
    SIXTEEN_BITS,
    fitting_format,
    shape_problem,
    stored_as,
)
from autoquant_ray.export.source import Source
from autoquant_ray.formats.algorithms import MAX
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.menu import WEIGHTED_BY_DEFAULT, resolve_formats
from autoquant_ray.formats.numbers import has_calibrated_maximum
from autoquant_ray.formats.smoothed import method_of
from autoquant_ray.formats.stored_size import stored_bits
from autoquant_ray.serving.compressed_formats import compressed_scheme
from autoquant_ray.serving.rules import check_target, unserved_reason
from autoquant_ray.serving.table import rows_of
from autoquant_ray.wording import few

READ_BY_VLLM = (
    "deepseek_v3",
    "deepseek_v32",
    "exaone_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "nemotron_h",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
)
"""Types of models whose heads vLLM 0.32.0 quantizes by the names of the files: its classes give
their decoder layers the config and these names. (Step-3.5's have others, and MiMo's and ERNIE's are
not called ``layers``.)"""
_IN_LAYER = re.compile(r"^(?:.*\.)?layers\.\d+\.")
_EXPERT = re.compile(r"^.*\.experts\.\d+(?=\.)")
_EXPERT_LINEARS = 3
"""Of an expert with a gate; vLLM finds no others in this layout."""
_MOST_NAMES = 3
_OPTION = "`extra_heads`"


@dataclass(frozen=True, kw_only=True)
class QuantizedHeads:
    """Linears of extra heads in one format.

    Attributes:
        format: Theirs.
        shapes: Module -> ``(out, in)``, in the order of the files.
        carried_bytes: What they would take in 16 bits.
    """

    format: Format
    shapes: Mapping[str, tuple[int, int]]
    carried_bytes: int

    def added_to(self, stored: Source) -> Source:
        """A source with these linears among its own: in their format, counted as they are packed.

        Args:
            stored: By the names in the files.
        """
        facts = {name: {"prefixes": [""], "shapes": [[*s]]} for name, s in self.shapes.items()}
        packed = sum(stored_bits(self.format.weight, shape) // 8 for shape in self.shapes.values())
        return replace(
            stored,
            formats={**stored.formats, **dict.fromkeys(self.shapes, self.format)},
            groups={**stored.groups, **{name: name for name in self.shapes}},
            modules={**stored.modules, **facts},
            uncounted_bytes=stored.uncounted_bytes + packed - self.carried_bytes,
        )

    def containers(self) -> list[str]:
        """What holds the linears within their layers, such as ``mtp.layers.0.mlp``."""
        matches = (_IN_LAYER.match(name) for name in self.shapes)
        ends = [match.end() if match else 0 for match in matches]
        names = (
            f"{name[:end]}{name[end:].partition('.')[0]}"
            for name, end in zip(self.shapes, ends, strict=True)
        )
        return list(dict.fromkeys(names))


def head_format(name: str, source: Source, layout: str) -> Format:
    """The format of extra heads.

    Args:
        name: Of the run's formats, or any other that the export can round to on a CPU.
        source: What is exported.
        layout: Of the checkpoint.

    Raises:
        ConfigError: The layout takes no quantized heads.
        FormatError: An unknown format, or one that needs statistics, or has no packed form.
    """
    if layout != COMPRESSED_TENSORS:
        raise ConfigError(
            f"{_OPTION} {name}: heads are quantized with `format` {COMPRESSED_TENSORS} alone; give "
            "that, or leave them in 16 bits"
        )
    custom = ScanConfig.model_validate(source.state.config).custom_formats
    is_weighted = name in WEIGHTED_BY_DEFAULT and name not in custom
    plain = f"{name}:{MAX}" if is_weighted else name
    (format_,) = resolve_formats((plain,), device="cpu", custom=custom)
    is_calibrated = format_.input is not None and has_calibrated_maximum(format_.input)
    if is_calibrated or method_of(format_) != MAX or not format_.weight:
        raise FormatError(
            f"{_OPTION} {name}: nothing is known of what a head reads, so its inputs must stay in "
            f"{SIXTEEN_BITS} or be scaled while the model runs, and its weights be rounded by "
            "their maxima; give a format such as wint4_afp16, wint8_afp16 or "
            "FP8_PER_CHANNEL_PER_TOKEN_CFG"
        )
    if stored_as(format_, layout) is None:
        raise FormatError(f"{_OPTION} {name}: `format` {layout} has no packed form of it")
    return format_


def quantized_heads(format_: Format, stored: Source, in_source: SourceTensors) -> QuantizedHeads:
    """The linears of extra heads that a format is for.

    Experts without a gate are not among them.

    Args:
        format_: From :func:`head_format`.
        stored: What is exported, by the names in the files.
        in_source: The model's own files.

    Raises:
        FormatError: There are none, or the format does not fit their rows.
    """
    paths = {_path(name) for name in stored.modules}
    shapes = {}
    for tensor in in_source.carried:
        module, _, kind = tensor.rpartition(".")
        shape = in_source.files.shape(tensor)
        if kind == "weight" and len(shape) == 2 and _path(module) in paths - {""}:
            shapes[module] = (shape[0], shape[1])
    of_expert = Counter(filter(None, map(_expert, shapes)))
    shapes = {
        module: shape
        for module, shape in shapes.items()
        if of_expert.get(_expert(module), _EXPERT_LINEARS) == _EXPERT_LINEARS
    }
    if not shapes:
        held = few(list(in_source.carried), _MOST_NAMES) or "nothing beside what is loaded"
        raise FormatError(
            f"{_OPTION} {format_.name}: the model's files hold no head with linears of a decoder "
            f"layer ({held}); leave it out"
        )
    for module, shape in shapes.items():
        if (problem := shape_problem(format_, shape)) is not None:
            other = fitting_format(format_, list(shapes.values())) or "another"
            raise FormatError(f"{_OPTION} {format_.name}: {problem} ({module}); give {other}")
    carried = sum(in_source.carried[f"{module}.weight"] for module in shapes)
    return QuantizedHeads(format=format_, shapes=shapes, carried_bytes=carried)


def require_heads_served(
    format_: Format, source: Source, engine: str | None, gpu: str | None
) -> None:
    """Check that an engine reads a quantized head as it is written.

    Args:
        format_: Of the head.
        source: What is exported.
        engine: One of ``ENGINES``; None: any.
        gpu: A generation or a card; None: any.

    Raises:
        ConfigError: It does not, by what was read of it.
    """
    if engine is None:
        return
    kind = source.state.plan.get("model_type", "")
    if engine != "vllm" or kind not in READ_BY_VLLM:
        raise ConfigError(
            f"{_OPTION}: no source says that {engine} reads a quantized head of "
            f"{kind or 'this model'} in {COMPRESSED_TENSORS} (docs/export.md); leave it out"
        )
    scheme, generation = compressed_scheme(format_), check_target(engine, gpu)
    reason = unserved_reason(scheme, engine, generation, mixed=True, layout=COMPRESSED_TENSORS)
    has_experts = any(map(source.is_experts, source.modules))
    if reason is None and scheme is not None and has_experts:
        row = rows_of(engine, COMPRESSED_TENSORS)[scheme.algo]
        reason = None if row.experts else f"{engine} serves no routed experts in it: {row.note}"
    if reason is not None:
        raise ConfigError(f"{_OPTION} {format_.name}: {reason}")


def _expert(module: str) -> str:
    """The routed expert that a linear is of; '' where it is of none."""
    match = _EXPERT.match(module)
    return "" if match is None else match[0]


def _path(module: str) -> str:
    """A module's name within its layer; '' outside of layers."""
    match = _IN_LAYER.match(module)
    return "" if match is None else module[match.end() :]
