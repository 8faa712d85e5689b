"""GPT-2's ``Conv1D`` is searched as the linear that it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every_family import small_model
from safetensors.torch import load_file

from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import build_skeleton, load_model
from autoquant_ray.models.quantizable import is_turned
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.score.scorer import Scorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2")
    small_model("gpt2").save_pretrained(path)
    return path


def test_loaded_model_answers_as_transformers_does(folder: Path) -> None:
    ids_BS = torch.arange(3, 23)[None]
    ref = find_model(str(folder))
    model = load_model(ref, dtype="float32", device="cpu")
    assert sum(map(is_turned, model.modules())) == 8
    with torch.no_grad():
        expected = small_model("gpt2")(input_ids=ids_BS).logits
        torch.testing.assert_close(model(input_ids=ids_BS).logits, expected)
    formats = resolve_formats(("wint8_afp16",), device="cpu")
    plan = build_plan(build_skeleton(ref), formats)
    assert plan == build_plan(model, formats)
    assert [g.name.split(".", 3)[-1] for g in plan.searched if ".h.0." in g.name] == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]
    stored = load_file(folder / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    assert plan.groups[2].modules[0].shapes == (tuple(stored.T.shape),)


def test_offloaded_layers_score_as_resident_ones(folder: Path, make_spec: Any) -> None:
    ref = find_model(str(folder))
    plan = build_plan(build_skeleton(ref), resolve_formats(("wint8_afp16",), device="cpu"))
    sums = []
    for placement in ("resident", "offload"):
        scorer = Scorer(make_spec(plan, model=ref, placement=placement))
        samples = [list(range(3, 23)), list(range(50, 63))]
        calibration = scorer.calibrate(samples)
        sums.append(scorer.score(samples, 0, calibration).sums.elementwise_GF)
    assert (sums[0] > 0).any()
    assert sums[0].tolist() == sums[1].tolist()
