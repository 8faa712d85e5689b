"""Weights that several layers share: one group, stored once, scored as the sum over its uses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from small_models import VOCABULARY, random_samples

from autoquant_ray.allocate.manifest import manifest_rows
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.errors import FormatError
from autoquant_ray.export.source import Source, require_packable
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import ModelRef
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.quantize.calibration import Calibration

FORMATS = ("wint8_afp16", "wint4_afp16:mse")


def zamba2_config(**changes: Any) -> Any:
    """Four layers, of which the first three run a shared block of attention and MLP."""
    return transformers.Zamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        layers_block_type=["hybrid", "hybrid", "hybrid", "mamba"],
        num_attention_heads=4,
        num_key_value_heads=4,
        mamba_d_state=16,
        n_mamba_heads=4,
        mamba_ngroups=1,
        chunk_size=16,
        adapter_rank=8,
        use_mamba_kernels=False,
        num_logits_to_keep=0,
        architectures=["Zamba2ForCausalLM"],
        **{"num_mem_blocks": 1, "initializer_range": 0.2} | changes,
    )


def zamba2(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        zamba2_config(**changes), dtype=torch.float32
    )
    return model.eval().requires_grad_(False)


def untied(model: Any) -> Any:
    """The same numbers, every module with weights of its own."""
    apart = copy.deepcopy(model)
    seen: set[int] = set()
    for module in apart.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                clone = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
                setattr(module, name, clone)
            seen.add(id(parameter))
    return apart


@pytest.mark.parametrize("num_mem_blocks", [1, 2])
def test_shared_block_is_counted_once(num_mem_blocks: int, tmp_path: Path) -> None:
    zamba2_config(num_mem_blocks=num_mem_blocks).save_pretrained(tmp_path)
    model = build_skeleton(ModelRef(name="m", path=str(tmp_path)))
    plan = build_plan(model, resolve_formats(FORMATS, device="cpu"))
    problem = Problem.from_plan(plan.rows(), plan.summary())
    stored = sum(parameter.numel() for parameter in model.parameters())
    sizes = sum(group.cost("none", "storage") for group in problem.groups.values())
    assert problem.other_bytes > 0
    assert problem.other_bytes + sizes == 2 * stored
    names = {module.name for group in plan.groups for module in group.modules}
    start = "model.layers.{}.shared_transformer.feed_forward.down_proj"
    uses = [[start.format(n) for n in (0, 1, 2)], [start.format(n) for n in (0, 2)]]
    (group,) = [g for g in plan.groups if g.name == start.format(0)]
    assert [module.name for module in group.modules] == uses[num_mem_blocks - 1]
    assert len(names) == sum(len(group.modules) for group in plan.groups)
    weight = model.model.layers[0].shared_transformer.feed_forward.down_proj.weight
    assert group.num_weights == weight.numel()
    chosen = {g.name: "wint8_afp16" if g.is_searched else "none" for g in plan.groups}
    scores = dict.fromkeys(plan.score_keys, 0.0)
    rows = manifest_rows(problem, chosen, scores, plan.summary())
    of_groups = sum(
        group.added_bytes(plan.formats[0] if group.is_searched else None) for group in plan.groups
    )
    assert sum(row["weight_bytes"] for row in rows) == pytest.approx(of_groups)


def test_score_of_shared_weights_is_the_sum_over_their_uses(make_scorer: Any) -> None:
    model = zamba2()
    ids = random_samples([12, 9])
    shared = make_scorer(model, FORMATS)
    apart = make_scorer(untied(model), FORMATS)
    sums = {
        name: row
        for name, row in zip(
            apart.names, apart.scorer.score(ids, 0, Calibration()).sums.elementwise_GF, strict=True
        )
    }
    got = shared.scorer.score(ids, 0, Calibration()).sums.elementwise_GF
    assert len(shared.names) < len(apart.names)
    groups = {g.name: g for g in apart.plan.groups}
    num_uses: list[int] = []
    for group, row in zip(shared.plan.searched, got, strict=True):
        members = {module.name for module in group.modules}
        parts = [n for n in sums if members & {module.name for module in groups[n].modules}]
        expected = np.nansum([sums[name] for name in parts], axis=0)
        num_uses.append(len(parts))
        np.testing.assert_allclose(row, expected, rtol=1e-5)
    assert num_uses.count(3) == 4  # attention's inputs and output, and the MLP's two matrices
    assert set(num_uses) == {1, 3}  # an adapter is used in one place


def test_methods_that_fit_weights_to_inputs_are_left_out_for_shared_weights() -> None:
    menu = resolve_formats(("wint8_afp16", "wint4_afp16", "wint4_afp16:awq"), device="cpu")
    plan = build_plan(zamba2(), menu)
    names = {group.name: [f.name for f in plan.menu(group)] for group in plan.searched}
    assert names["model.layers.0.shared_transformer.feed_forward.down_proj"] == ["wint8_afp16"]
    assert "wint4_afp16" in names["model.layers.3.mamba.out_proj"]


def test_quantized_shared_weights_are_not_packed() -> None:
    (format_,) = resolve_formats(("wint8_afp16",), device="cpu")
    plan = build_plan(zamba2(), (format_,))
    name = "model.layers.2.shared_transformer.feed_forward.down_proj"
    holder = name.replace(".2.", ".0.")
    modules = plan.summary()["modules"]
    assert modules[name]["shared_with"] == holder
    unused: Any = None
    source = Source(
        state=unused,
        manifest={},
        formats={holder: format_, name: format_},
        groups={holder: holder, name: holder},
        modules={holder: modules[holder], name: modules[name]},
        caches={},
    )
    with pytest.raises(FormatError, match=f"several layers share are not packed.*{holder}"):
        require_packable(source, "modelopt")
