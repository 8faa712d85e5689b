"""ModelOpt's path integrals as a worker runs them, against a search that is called directly."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import modelopt
import modelopt.torch.quantization as mtq
import pytest
import torch
from packaging.version import Version

from autoquant_ray.errors import ScoreError
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import ModelRef
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.score.path_scores import PathScorer, PathSpec

pytestmark = pytest.mark.skipif(
    Version(modelopt.__version__) < Version("0.48rc1"), reason="ModelOpt 0.47 has no such scores"
)

PRESETS = {
    "wint4_afp16:max": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT4_AWQ_CFG": "INT4_AWQ_CFG",
    "wint8_aint8": "INT8_DEFAULT_CFG",
    "wfp8_afp8": "FP8_DEFAULT_CFG",
}


def spec_of(plan: Plan) -> PathSpec:
    return PathSpec(
        model=ModelRef(name="none", path="none"),
        dtype="float32",
        device="cpu",
        num_threads=1,
        groups={group.name: tuple(m.name for m in group.modules) for group in plan.searched},
        menus={group.name: tuple(f.name for f in plan.menu(group)) for group in plan.searched},
        formats=plan.formats,
    )


def direct_scores(
    model: Any, samples: Sequence[Sequence[int]], presets: Sequence[str], disabled: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Group -> preset -> score, of a search over ModelOpt's own presets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, state = mtq.auto_quantize(
            copy.deepcopy(model),
            constraints={"effective_bits": 12.0},
            quantization_formats=[getattr(mtq, preset) for preset in presets],
            data_loader=[torch.tensor([sample]) for sample in samples],
            forward_step=lambda m, ids: m(input_ids=ids, use_cache=False).logits[:, :-1],
            num_calib_steps=4 * len(samples),
            num_score_steps=len(samples),
            disabled_layers=list(disabled),
            method="aumann_shapley",
            verbose=False,
        )
    assert state["damage_model"]["valid"]
    return {
        name.removesuffix(".quant_recipe"): {
            str(recipe).partition("(")[0]: score
            for recipe, score in zip(stats["formats"], stats["scores"], strict=True)
        }
        for name, stats in state["candidate_stats"].items()
    }


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_scores_equal_those_of_a_direct_search(
    family: str, make_model: Any, make_samples: Any
) -> None:
    model = make_model(family)
    menu = list(PRESETS) if family == "llama" else ["wint4_afp16:max", "wint8_aint8"]
    plan = build_plan(model, resolve_formats(menu, device="cpu"), ("lm_head",))
    samples = [*make_samples([24, 17, 24], seed=1), *make_samples([9], seed=2)]
    expected = direct_scores(model, samples, [PRESETS[name] for name in menu], ["*lm_head*"])
    scored = PathScorer(spec_of(plan), copy.deepcopy(model)).score_paths(samples)
    assert scored.is_valid
    names = [group.name for group in plan.searched]
    assert {name for name, _ in scored.scores} == set(names)
    assert "lm_head" not in names
    for name in names:
        for format_ in menu:
            theirs = expected[name][PRESETS[format_]]
            assert scored.scores[name, format_] == pytest.approx(theirs, rel=1e-5), (name, format_)
    assert len({round(score, 12) for score in scored.scores.values()}) > len(names)


def test_a_group_that_modelopt_takes_with_another_is_refused(
    make_model: Any, make_samples: Any
) -> None:
    """Queries and keys apart, which ModelOpt's rules join."""
    model = make_model("llama")
    plan = build_plan(model, resolve_formats(["wint8_aint8"], device="cpu"), ("lm_head",))
    spec = spec_of(plan)
    name = next(n for n, modules in spec.groups.items() if len(modules) == 3)
    first, *others = spec.groups[name]
    apart = {**spec.groups, name: (first,), others[0]: tuple(others)}
    object.__setattr__(spec, "groups", apart)
    object.__setattr__(spec, "menus", dict.fromkeys(apart, ("wint8_aint8",)))
    with pytest.raises(ScoreError, match=f"ModelOpt has no score for {others[0]}"):
        PathScorer(spec, model).score_paths(make_samples([12], seed=1))
