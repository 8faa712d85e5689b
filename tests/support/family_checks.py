"""What works for a family of models, tried out: one row of the table in docs/model-families.md."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autograd_scores import autograd_scores
from families import VOCABULARY, family_model
from family_export import require_export, with_linears
from modelopt_scores import modelopt_scores, of_text, quantized_by_modelopt
from scoring_specs import scoring_spec

from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.quant_cfg import quantization_config
from autoquant_ray.calibrate.modelopt_config import load_quantization_config
from autoquant_ray.errors import AutoQuantError, one_line
from autoquant_ray.evaluate.runner import AllocationRunner, EvaluationSpec
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.models.quantizable import sees_images
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.quantize.calibration import merge_calibrations
from autoquant_ray.quantize.modules import UNQUANTIZED
from autoquant_ray.score.scorer import Scorer

PRESETS = ("INT8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG")
SHARDS = ((20, 20), (13,))
"""Lengths of the samples of each shard, in tokens."""

STOPS = {
    "BackwardHookFunction is a view": "its hooks on gradients do not go with a model that changes "
    "what a layer gives in place",
    "does not require grad": "it lets gradients begin at parameters named `embed`, and this model "
    "has none",
    "register_attention_for_kv_quant": "it rewrites the code of attentions to quantize caches, and "
    "not that of this one",
}
"""What an error of ModelOpt's search says, or a step in which it stops -> why."""

PAGE = Path(__file__).parents[2] / "docs" / "model-families.md"
START, END = "<!-- families: made by docs/update_families.py -->\n", "<!-- end of families -->\n"
_LONGEST = 260
COLUMNS = ("family", "plan", "scan", "parity with ModelOpt", "`mtq.quantize`", "export", "notes")


@dataclasses.dataclass
class Family:
    """A family while it is tried.

    Attributes:
        model: As it was made, saved in ``folder``.
        scorer: Loaded from the folder.
        scores_GF: ``elementwise / T^2`` summed over shards, as ModelOpt sums it.
        sums_GF: Elementwise sums over shards.
        num_ids: Ids of its text are below it.
    """

    name: str
    folder: Path
    model: Any
    plan: Any = None
    scorer: Any = None
    calibration: Any = None
    scores_GF: Any = None
    sums_GF: Any = None
    num_ids: int = VOCABULARY
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def shards(self) -> list[list[list[int]]]:
        """Random token ids."""
        generator = np.random.default_rng(0)
        return [
            [generator.integers(0, self.num_ids, size=length).tolist() for length in lengths]
            for lengths in SHARDS
        ]

    @property
    def batches(self) -> list[torch.Tensor]:
        """The shards as tensors ``(B, S)``."""
        return [torch.tensor(shard) for shard in self.shards]


def family_row(name: str) -> str:
    """Try a family; its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        model = family_model(name)
        model.save_pretrained(folder)
        family = Family(name, Path(folder), model)
        steps = (try_plan, _scan_and_pad, try_parity, try_quantize, try_export)
        cells = [_try(step, family) for step in steps]
    return table_row([name, *cells, "; ".join(family.notes)])


def table_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def update(page: str, rows: Sequence[str]) -> str:
    """The page with other rows; the text around the table stays."""
    before, _, rest = page.partition(START)
    table = "\n".join([table_row(COLUMNS), "|---" * len(COLUMNS) + "|", *rows, ""])
    return f"{before}{START}{table}{END}{rest.partition(END)[2]}"


def _try(step: Callable[[Family], str], family: Family) -> str:
    try:
        return step(family)
    except Exception as error:  # noqa: BLE001  whatever stops a family is what its row says
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return f"no: {kind}{reason(error)}"


def try_plan(family: Family) -> str:
    """The plan from the config alone: that of the model itself, with every matrix in it."""
    formats = resolve_formats(PRESETS, device="cpu")
    family.plan = build_plan(build_skeleton(find_model(str(family.folder))), formats)
    loaded = with_linears(family.model)
    assert family.plan == build_plan(loaded, formats), "differs from the loaded model's plan"
    covered = {module.name for group in family.plan.groups for module in group.modules}
    covered |= {name.split(" ")[0] for name in family.plan.other_modules}
    for name, module in family.model.named_modules():
        if name not in covered and not isinstance(module, torch.nn.Embedding):
            left_out = [n for n, p in module.named_parameters(recurse=False) if p.dim() >= 2]
            assert not left_out, f"{name} is neither searched nor listed"
    family.notes += _unsearched(family.plan)
    return "yes"


def _unsearched(plan: Plan) -> list[str]:
    """What a plan leaves in 16 bits; layers taken together."""
    names = {}
    for group in plan.groups:
        if group.reason is not None and "tower" in group.reason:
            names["vision tower"] = None
        elif group.reason is not None:
            kind, _, _ = group.reason.partition(":")
            names |= {f"`{_in_layer(module.name)}` ({kind})": None for module in group.modules}
    for name in plan.other_modules:
        owner, _, kind = name.partition(" ")
        is_tower = sees_images(owner)
        names["vision tower" if is_tower else f"`{_in_layer(owner) or 'model'}` {kind}"] = None
    return [f"16 bits: {', '.join(names)}"] if names else []


def _in_layer(name: str) -> str:
    return re.sub(r"^.*?\.\d+\.", "", name)


def _scan_and_pad(family: Family) -> str:
    scanned = try_scan(family)
    try_padding(family)
    return scanned


def try_scan(family: Family) -> str:
    """Every group gets a score."""
    spec = scoring_spec(family.plan, model=find_model(str(family.folder)))
    scorer = family.scorer = Scorer(spec)
    shards = family.shards
    family.calibration = merge_calibrations(scorer.calibrate(shard) for shard in shards)
    scored = [scorer.score(shard, 0, family.calibration) for shard in shards]
    family.scores_GF = sum(
        shard_score.sums.elementwise_GF / shard_score.num_tokens**2 for shard_score in scored
    )
    assert (family.scores_GF > 0).all(), "a group has no score"
    experts = {m.planned.name for m in spec.modules if m.planned.kind == "experts"}
    assert all(set(shard_score.sums.expert_tokens) == experts for shard_score in scored), (
        "no routed tokens"
    )
    family.sums_GF = sum(shard_score.sums.elementwise_GF for shard_score in scored)
    return "yes" if scorer.is_layerwise else "yes, as one graph"


def try_padding(family: Family) -> str:
    """Samples of several lengths score together as they do alone."""
    assert family.sums_GF is not None, "not scanned"
    samples = [sample for shard in family.shards for sample in shard]
    padded = Scorer(family.scorer.spec, model=family.scorer.model)
    maxima = merge_calibrations([padded.calibrate(samples)]).maxima()
    expected = family.calibration.maxima()
    assert maxima == pytest.approx(expected, rel=1e-5), "padding changes the calibration"
    together_GF = padded.score(samples, 0, family.calibration).sums.elementwise_GF
    for index, format_ in enumerate(family.plan.formats):
        # The last bits differ, and may move an input over the edge to its next quantized value.
        tolerance = 1e-4 if format_.input is None else 0.05
        expected_G = pytest.approx(family.sums_GF[:, index], rel=tolerance)
        assert together_GF[:, index] == expected_G, "padding changes the scores"
    return "yes, equal lengths only" if padded.joint_context == 0 else "yes"


def try_parity(family: Family) -> str:
    """Scores against ModelOpt's, and where it has none, against plain autograd."""
    assert family.scores_GF is not None, "not scanned"
    theirs: dict[str, dict[str, float]] = {}
    try:
        theirs = modelopt_scores(family.model, [of_text(ids) for ids in family.batches], PRESETS)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        family.notes.append(f"ModelOpt stops: {_stop(error)}")
    searched = {group.name: group for group in family.plan.searched}
    parts = {name: [m.name for m in g.modules if m.name in theirs] for name, g in searched.items()}
    listed = {module.name for group in family.plan.groups for module in group.modules}
    assert set(theirs) <= listed, f"ModelOpt searches {set(theirs) - listed} too"
    more = set(theirs) - {name for names in parts.values() for name in names}
    apart = {part for names in parts.values() for part in names[1:]}
    alone = {name for name, names in parts.items() if not names}
    if alone:
        groups = [searched[name] for name in alone]
        try:
            defined = autograd_scores(family.model, family.batches, groups, family.plan.formats)
        except (RuntimeError, TypeError, ValueError) as error:
            where = traceback.extract_tb((error.__cause__ or error).__traceback__)[-1].name
            raise AssertionError(
                f"nothing to compare with: neither `mtq.auto_quantize` nor `mtq.quantize` runs on "
                f"it, ModelOpt stops in its `{where}`"
            ) from None
        theirs |= defined
        parts |= {name: [name] for name in alone}
    ours = dict(zip(searched, family.scores_GF, strict=True))
    expected = {
        name: [sum(theirs[part][preset] for part in parts[name]) for preset in PRESETS]
        for name in searched
    }
    others = [n for n in searched if n not in alone and not _equal(n, ours[n], expected[n])]
    if others:
        groups = [searched[name] for name in others]
        defined = autograd_scores(family.model, family.batches, groups, family.plan.formats)
        expected |= {n: [defined[n][preset] for preset in PRESETS] for n in others}
        family.notes.append(f"ModelOpt's scores of {_last(others)} are not autograd's")
    for name in searched:
        assert _equal(name, ours[name], expected[name]), name
    if apart:
        family.notes.append(f"ModelOpt has {_last(apart)} apart")
    if more:
        family.notes.append(f"ModelOpt also searches {_last(more)}")
    if not alone:
        return "yes"
    return f"yes; autograd's: {'all' if alone == set(searched) else _last(alone)}"


def _equal(name: str, ours_F: Any, expected_F: Sequence[float]) -> bool:
    tolerance = 1e-3 if name.endswith("experts") else 1e-4
    return bool(ours_F == pytest.approx(expected_F, rel=tolerance))


def _stop(error: Exception) -> str:
    """Why ModelOpt's search stops; where it does, if that is not known."""
    cause = error.__cause__ or error
    frames = traceback.extract_tb(cause.__traceback__)
    steps = [frame.name for frame in frames if f"{os.sep}modelopt{os.sep}" in frame.filename]
    for part, why in STOPS.items():
        if part in steps or part in str(cause):
            return why
    return f"in its `{steps[-1]}` ({type(cause).__name__}: {one_line(cause).partition('. ')[0]})"


def _last(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in sorted({n.rpartition(".")[2] for n in names}))


def try_quantize(family: Family) -> str:
    """A manifest's config makes ``mtq.quantize`` run the model that ``evaluate`` measures."""
    assert family.scores_GF is not None, "not scanned"
    plan = family.plan
    menu = [format_.name for format_ in plan.formats]
    choice = tuple([*range(len(menu)), UNQUANTIZED][i % 3] for i in range(len(plan.searched)))
    formats = {group.name: NONE for group in plan.groups}
    formats |= {
        group.name: menu[index]
        for group, index in zip(plan.searched, choice, strict=True)
        if index != UNQUANTIZED
    }
    config = quantization_config(
        Problem.from_plan(plan.rows(), plan.summary()), formats, plan.summary()
    )
    entries = load_quantization_config({"quantization_config": config})["quant_cfg"]
    quantized = quantized_by_modelopt(family.model, family.batches, entries)
    spec = family.scorer.spec
    evaluation = EvaluationSpec(
        model=spec.model,
        dtype="float32",
        device="cpu",
        num_threads=1,
        modules=spec.modules,
        formats=spec.formats,
        calibration=family.calibration,
        step_tokens=100_000,
    )
    runner = AllocationRunner(evaluation, model=family.scorer.model)
    for shard, ids_BS in zip(family.shards, family.batches, strict=True):
        (ours,) = runner.evaluate(shard, [choice]).divergences
        theirs_BN = _divergence(family.model, quantized, ids_BS)
        for divergence, theirs_N in zip(ours, theirs_BN, strict=True):
            assert divergence.kl_N == pytest.approx(theirs_N.numpy(), rel=1e-2, abs=1e-5)
    return "yes"


def try_export(family: Family) -> str:
    """A plan in FP8 and 16 bits, exported and read back, is what was planned."""
    assert family.calibration is not None, "not scanned"
    refusal = _refusal(family)
    if refusal is None:
        return "yes"
    has_experts = any(m.kind == "experts" for group in family.plan.searched for m in group.modules)
    is_due_to_them = has_experts and _refusal(family, sixteen_bits="*experts") is None
    return f"no: {refusal}{'; yes with experts in 16 bits' if is_due_to_them else ''}"


def _refusal(family: Family, **options: str) -> str | None:
    """An export's error; None where there is none."""
    try:
        require_export(family.folder, family.model, family.calibration, **options)
    except AutoQuantError as error:
        return reason(error)
    return None


def reason(error: BaseException) -> str:
    """What a cell says of an error: its line, whole unless it is long."""
    text = one_line(error).replace("|", "/")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


@torch.no_grad()
def _divergence(model: Any, quantized: Any, ids_BS: torch.Tensor) -> torch.Tensor:
    """KL divergence ``(B, N)`` of every prediction in nats."""
    exact, changed = (
        network(input_ids=ids_BS, use_cache=False).logits[:, :-1].double().log_softmax(dim=-1)
        for network in (model, quantized)
    )
    return (exact.exp() * (exact - changed)).sum(dim=-1)
