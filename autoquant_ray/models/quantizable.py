"""Which modules of a model can be quantized, and which matrices are left over."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_VISION_PATTERNS = (
    "model.visual*",
    "visual*",
    "*vision_tower*",
    "*vision_model*",
    "*multi_modal_projector*",
    "*embed_vision*",
    "*image_to_text_projection*",
    "*aligner*",
)
_AUDIO_PATTERNS = ("*embed_tokens_extend*", "*audio_tower*", "*embed_audio*", "*audio_*")
TOWER_PATTERNS = (*_VISION_PATTERNS, *_AUDIO_PATTERNS[:-1])
"""Names of modules that see images or sound."""

_MARK = "is_stored_turned"
_DIMS_OF_EXPERTS = 3

_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)(?:\..+)?")


def expert_place(name: str) -> tuple[str, int] | None:
    """The module of a layer's routed experts and the number of one of them; None for other names.

    Args:
        name: ``model.layers.0.mlp.experts.3``, or a module inside such an expert.
    """
    match = None if "shared_expert" in name else _EXPERT.fullmatch(name)
    return None if match is None else (match[1], int(match[2]))


@dataclass(frozen=True, kw_only=True)
class PlannedModule:
    """One quantizable module.

    Attributes:
        name: Dotted name in the model.
        kind: ``linear``, ``experts`` (fused 3-D parameters), ``expert`` (one slice of them),
            ``convolution``, or ``attention`` (whose cache is quantized,
            :mod:`autoquant_ray.plan.kv_caches`).
        parameters: Weight parameter names inside the module, in forward order.
        shapes: Their shapes, as ``(..., out, in)``.
        is_transposed: Whether experts are stored as ``(experts, in, out)`` (GPT-OSS). ModelOpt
            quantizes such a parameter as one tensor, not expert by expert.
        expert: Of a single expert, its number, which ends its name.
        cached: What a token adds to the cache of an attention, ``(heads, width)`` of its keys and
            of its values; empty for other modules.
        is_idle: It does not run on text, but before the decoder layers: its rows are no tokens.
        shared_with: Name of the module before it in the model that holds the same weights, where
            several uses share them (Zamba2's block); they are stored once, with that module.
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_transposed: bool = False
    expert: int | None = None
    cached: tuple[tuple[int, int], ...] = ()
    is_idle: bool = False
    shared_with: str | None = None

    @property
    def path(self) -> str:
        """Name of the model's module that holds the weights."""
        return self.name if self.expert is None else self.name.rpartition(".")[0]

    @property
    def num_elements(self) -> int:
        """Number of weight elements that it computes with."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def num_weights(self) -> int:
        """Number of weight elements that are stored for it: none of those of a module before it."""
        return 0 if self.shared_with is not None else self.num_elements

    @property
    def is_cache(self) -> bool:
        """Whether what is quantized is what it caches."""
        return self.kind == "attention"

    @property
    def label(self) -> str:
        """Its name in lists of layers: a cache goes by its attention's name and ``.kv``."""
        return f"{self.name}.kv" if self.is_cache else self.name

    @property
    def quantizer_prefixes(self) -> tuple[str, ...]:
        """What stands before ``_weight_quantizer`` in ModelOpt's names: '' for a linear."""
        if self.is_cache:
            return ()
        is_fused = self.kind in ("experts", "expert")
        return tuple(f"{p}_" for p in self.parameters) if is_fused else ("",)

    def matches(self, pattern: str) -> bool:
        """Whether a glob names it, or the module that holds it."""
        names = {self.label, self.path if self.expert is not None else self.label}
        return any(fnmatch.fnmatch(name, pattern) for name in names)

    def to_json(self) -> dict[str, Any]:
        """What ``run.json`` keeps of it."""
        facts: dict[str, Any] = {
            "prefixes": list(self.quantizer_prefixes),
            "shapes": [list(shape) for shape in self.shapes],
        }
        if self.shared_with is not None:
            facts["shared_with"] = self.shared_with
        return facts if self.expert is None else facts | {"expert": self.expert}


def quantizable_modules(model: torch.nn.Module) -> Iterator[PlannedModule]:
    """The modules of a model that ModelOpt quantizes, in the model's order."""
    import torch

    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    holders: dict[tuple[int, ...], str] = {}
    for name, module in model.named_modules():
        parameters: tuple[str, ...] = ("weight",)
        is_transposed = False
        if _is_linear(module):
            kind = "linear"
        elif isinstance(module, convolutions):
            kind = "convolution"
        elif (layout := _experts_layout(module)) is not None:
            kind, (parameters, is_transposed) = "experts", layout
        else:
            continue
        weights = [getattr(module, parameter) for parameter in parameters]
        holder = holders.setdefault(tuple(map(id, weights)), name)
        yield PlannedModule(
            name=name,
            kind=kind,
            parameters=parameters,
            shapes=tuple(tuple((w.mT if is_transposed else w).shape) for w in weights),
            is_transposed=is_transposed,
            shared_with=None if holder == name else holder,
        )


def _experts_layout(module: torch.nn.Module) -> tuple[tuple[str, ...], bool] | None:
    """ModelOpt's view of fused experts; it is not imported for a module that holds none."""
    import torch

    down = getattr(module, "down_proj", None)
    if not isinstance(down, torch.Tensor) or down.dim() != _DIMS_OF_EXPERTS:
        return None
    from autoquant_ray.modelopt_api import experts_layout

    return experts_layout(module)


def _is_linear(module: torch.nn.Module) -> bool:
    """A linear that gives what a linear gives; some routers only inherit its weight."""
    import torch

    if not isinstance(module, torch.nn.Linear):
        return False
    if has_plain_forward(module):
        return True
    row = torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        output = module(row)
    except (IndexError, RuntimeError, TypeError, ValueError):  # it takes another shape
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, module.out_features)


def has_plain_forward(module: torch.nn.Module) -> bool:
    """Whether a linear runs ``torch.nn.Linear``'s own forward."""
    import torch

    return type(module).forward is torch.nn.Linear.forward


def other_modules(model: torch.nn.Module, modules: list[PlannedModule]) -> dict[str, int]:
    """Owners of weight matrices that are neither quantizable nor embeddings -> elements."""
    import torch

    planned = {module.path for module in modules if not module.is_cache}
    return {
        f"{name} ({type(module).__name__})": sum(
            p.numel() for p in module.parameters(recurse=False) if p.dim() >= 2
        )
        for name, module in model.named_modules()
        if name not in planned
        and not isinstance(module, torch.nn.Embedding)
        and any(p.dim() >= 2 for p in module.parameters(recurse=False))
    }


def modules_of_several(model: torch.nn.Module) -> set[str]:
    """Names of modules with a parameter that another module holds too."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    return {name for names in owners.values() if len(names) > 1 for name in names}


def is_of_tower(name: str) -> bool:
    """Whether a module or parameter is not run on text: part of a vision or audio tower."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in TOWER_PATTERNS)


def hears(name: str) -> bool:
    """Whether the name of a module that does not run on text says that it hears sound."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in _AUDIO_PATTERNS)


def sees_images(name: str) -> bool:
    """Whether a module or parameter is part of a vision tower, or of what joins it to the text."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in _VISION_PATTERNS)


def with_plain_linears(model: Any) -> list[str]:
    """Put a linear in the place of every ``Conv1D`` of transformers (GPT-2), with the same product.

    It is no convolution: it multiplies by a weight ``(in, out)``. ModelOpt quantizes it as the
    linear that it is, with the weight turned, and so does everything here.

    Args:
        model: Loaded, or a skeleton; weights on the meta device stay there.

    Returns:
        Names of the linears, whose weights are the files' turned round.
    """
    from transformers.pytorch_utils import Conv1D

    names = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _linear(model.get_submodule(name)))
    return names


def _linear(module: Any) -> torch.nn.Linear:
    import torch

    with torch.device("meta"):
        linear = torch.nn.Linear(module.nx, module.nf)
    turned = module.weight.detach().T.contiguous()
    linear.weight = torch.nn.Parameter(turned, requires_grad=module.weight.requires_grad)
    linear.bias = module.bias
    setattr(linear, _MARK, True)
    return linear.train(module.training)


def is_turned(module: Any) -> bool:
    """Whether a module is a linear whose weight is the other way round in the model's files."""
    return getattr(module, _MARK, False) is True
