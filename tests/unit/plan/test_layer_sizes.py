"""Sizes that differ between layers, which transformers 5.18 does not give for the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from every_family import small_model
from packaging.version import Version

from autoquant_ray.errors import ModelError
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.plan.plan import build_plan


@pytest.fixture(scope="module")
def gemma() -> Any:
    return small_model("gemma4_text")


def test_caches_and_windows_are_those_of_the_layers_themselves(gemma: Any, tmp_path: Path) -> None:
    gemma.save_pretrained(tmp_path)
    formats = resolve_formats(("kv_fp8", "wint8_aint8"), device="cpu")
    plan = build_plan(build_skeleton(find_model(str(tmp_path))), formats)
    with torch.no_grad():
        cache = gemma(input_ids=torch.arange(1, 7)[None], use_cache=True).past_key_values
    kept = [(tuple(c.keys.shape[1::2]), tuple(c.values.shape[1::2])) for c in cache.layers]
    planned = {m.name: m.cached for group in plan.groups for m in group.modules if m.is_cache}
    assert planned == {f"model.layers.{n}.self_attn": sizes for n, sizes in enumerate(kept)}
    of_steps = {entry["window"]: entry["kv_bytes"] for entry in plan.step["attention"]}
    windows = [
        gemma.config.sliding_window if kind == "sliding_attention" else None
        for kind in gemma.config.layer_types
    ]
    assert of_steps == {w: 2 * sum(h * d for h, d in k) for w, k in zip(windows, kept, strict=True)}


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="needs transformers 5.18"
)
def test_size_of_a_layer_that_is_none_is_refused(gemma: Any, tmp_path: Path) -> None:
    gemma.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["per_layer_config"]["1"]["head_dim"] > 0
    config["per_layer_config"]["1"]["head_dim"] = -4
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"head_dim -4 is no number from 0 to 100,000"):
        build_skeleton(find_model(str(tmp_path)))
