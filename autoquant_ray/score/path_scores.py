"""ModelOpt's own scores by path integrals, of a whole model on the samples of a scan.

``mtq.auto_quantize(method="aumann_shapley")`` of ModelOpt 0.48 (https://arxiv.org/abs/2607.12266)
compares formats at points between the model in 16 bits and the quantized one, and fits its scores
to what all groups together lose in their smallest formats. Nothing is added up over shards, so a
single worker runs all of it. The formats, the groups and the tokens that count are the scan's.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autoquant_ray.allocate.quant_cfg import quantizer_entries
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.data.samples import Samples
from autoquant_ray.errors import ScoreError
from autoquant_ray.formats.format import Format
from autoquant_ray.modelopt_api import QuantRecipe, mtq
from autoquant_ray.models.find import ModelRef
from autoquant_ray.plan.plan import Plan
from autoquant_ray.quantize.backends.block_formats import for_cpu
from autoquant_ray.score.loading import set_up_model
from autoquant_ray.score.visits import make_step, predicting_rows


@dataclass(frozen=True, kw_only=True)
class PathSpec:
    """What a worker needs; small and picklable.

    Attributes:
        model: Model to load.
        dtype: ``float32`` or ``bfloat16``.
        device: ``cpu`` or ``cuda``.
        num_threads: Threads of CPU kernels.
        groups: Searched group -> names of its modules.
        menus: Searched group -> names of its formats.
        formats: All formats.
        placement: ``resident``.
    """

    model: ModelRef
    dtype: str
    device: str
    num_threads: int
    groups: Mapping[str, tuple[str, ...]]
    menus: Mapping[str, tuple[str, ...]]
    formats: tuple[Format, ...]
    placement: str = "resident"

    @classmethod
    def of(cls, scan: ScanConfig, ref: ModelRef, plan: Plan) -> PathSpec:
        """That of a scan's model and plan."""
        return cls(
            model=ref,
            dtype=scan.dtype,
            device=scan.device,
            num_threads=scan.cpus_per_worker,
            groups={group.name: tuple(m.name for m in group.modules) for group in plan.searched},
            menus={group.name: tuple(f.name for f in plan.menu(group)) for group in plan.searched},
            formats=plan.formats,
        )

    def build(self) -> PathScorer:
        """Load the model; called in the worker process."""
        return PathScorer(self)


@dataclass(frozen=True, kw_only=True)
class PathScores:
    """What ModelOpt says of the groups.

    Attributes:
        scores: (group, format) -> score, without unit.
        is_valid: Whether ModelOpt calls the fit behind them valid.
    """

    scores: dict[tuple[str, str], float]
    is_valid: bool


class PathScorer:
    """Scores a loaded model once; its modules are ModelOpt's afterwards.

    Args:
        spec: What to load and what to score.
        model: Use this loaded model instead of loading ``spec.model``.
    """

    def __init__(self, spec: PathSpec, model: Any = None) -> None:
        self.spec = spec
        self.model, _ = set_up_model(spec, model)

    def score_paths(self, samples: Samples) -> PathScores:
        """Scores of all groups in all of their formats.

        A group of ours that ModelOpt takes apart has the sum of the scores of its parts.

        Args:
            samples: All samples; each is a step.

        Raises:
            ScoreError: ModelOpt has no score for a pair.
        """
        device = self.model.get_input_embeddings().weight.device
        steps = [(make_step([s], device), predicting_rows([s])) for s in samples]
        groups, menus = self.spec.groups, self.spec.menus
        torch.manual_seed(0)  # ModelOpt leaves dropout on
        by_module, is_valid = _search(
            self.model,
            steps,
            _logits,
            {format_.name: self._config(format_) for format_ in self.spec.formats},
            {module: menus[group] for group, modules in groups.items() for module in modules},
        )
        scores = {}
        for group, modules in groups.items():
            parts = [by_module[module] for module in modules if module in by_module]
            for format_ in menus[group]:
                if not parts or any(format_ not in part for part in parts):
                    raise ScoreError(
                        f"ModelOpt has no score for {group} in {format_}; leave modelopt-shapley "
                        "out of `against`"
                    )
                scores[group, format_] = sum(part[format_] for part in parts)
        return PathScores(scores=scores, is_valid=is_valid)

    def _config(self, format_: Format) -> dict[str, Any]:
        """What ``mtq.quantize`` takes for a format everywhere."""
        entries = [{"quantizer_name": "*", "enable": False}, *quantizer_entries("*", format_)]
        config = {"quant_cfg": entries, "algorithm": format_.algorithm or "max"}
        return for_cpu(config) if self.spec.device == "cpu" else config


def _logits(model: Any, step_and_rows: Any) -> torch.Tensor:
    """Logits ``(N, V)`` of the N tokens of a step that count in the loss."""
    step, rows_N = step_and_rows
    output = model(
        input_ids=step.ids_BS, attention_mask=step.mask_BS, use_cache=False, **step.inputs
    )
    logits: torch.Tensor = output.logits.flatten(0, 1)
    return logits[rows_N.to(logits.device)]


def _search(
    model: Any,
    steps: Sequence[Any],
    forward_step: Callable[[Any, Any], torch.Tensor],
    configs: Mapping[str, dict[str, Any]],
    menus: Mapping[str, Sequence[str]],
) -> tuple[dict[str, dict[str, float]], bool]:
    """Scores of ``mtq.auto_quantize(method="aumann_shapley")``, since 0.48; the model is changed.

    Args:
        model: Whole, on one device.
        steps: What ``forward_step`` takes, one after the other; all calibrate, all are scored.
        forward_step: Model and step -> logits ``(..., V)`` of the tokens that count.
        configs: Format -> what ``mtq.quantize`` takes.
        menus: Module -> its formats; modules that are not named stay in 16 bits.

    Returns:
        First module of a group -> format -> score, without unit, and whether ModelOpt calls its fit
        valid. A format that breaks the model has no score.
    """
    spaces: dict[tuple[str, ...], list[str]] = {}
    for module, names in menus.items():
        spaces.setdefault(tuple(names), []).append(module)
    others = [name for name, _ in model.named_modules() if name and name not in menus]
    named = {name: (config, name) for name, config in configs.items()}
    silence = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(silence),
    ):
        warnings.simplefilter("ignore")
        _, state = mtq.auto_quantize(
            model,
            constraints={"effective_bits": 16.0},
            quantization_formats=list(named.values()),
            module_search_spaces=[
                {
                    "module_name_patterns": modules,
                    "quantization_formats": [named[name] for name in names],
                }
                for names, modules in spaces.items()
            ],
            data_loader=steps,
            forward_step=forward_step,
            disabled_layers=others,
            num_calib_steps=4 * len(steps),  # AWQ takes a quarter of them
            num_score_steps=len(steps),
            method="aumann_shapley",
            verbose=False,
        )
    recipes = {name: QuantRecipe(config, name=name) for name, config in configs.items()}
    scores: dict[str, dict[str, float]] = {}
    for group, stats in state["candidate_stats"].items():
        by_recipe = dict(zip(stats["formats"], stats["scores"], strict=True))
        scores[group.removesuffix(".quant_recipe")] = {
            name: float(by_recipe[recipe])
            for name, recipe in recipes.items()
            if recipe in by_recipe
        }
    return scores, bool(state["damage_model"]["valid"])
