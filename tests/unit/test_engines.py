"""What real tools make of exports: how answers are judged, and the table of ``docs/engines.md``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
LAYERS = {
    "q": {"format": "wint8_aint8", "columns": 64},
    "o": {"format": "none", "columns": 64},
}
RIGHT: dict[str, Any] = {
    "kinds": {"q": "int8 channel, int8 tensor", "o": "16 bits"},
    "output_errors": {"q": 1e-7, "o": 0.0},
    "log_probs": [[-1.0, -2.0]],
}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The driver of ``make engines``."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from engines import check

    return check


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A case of two layers, whose text has a noise of 0.02 nats per token."""
    (tmp_path / "case.json").write_text(json.dumps({"layers": LAYERS}))
    np.save(tmp_path / "log_probs.npy", [[-1.0, -2.0]])
    np.save(tmp_path / "moved.npy", [[-1.0, -2.04]])
    return tmp_path


def test_right_answer_has_nothing_wrong(engines: Any, case: Path) -> None:
    judged = engines.judge(engines.TOOLS["transformers"], RIGHT, case)
    assert judged["wrong"] == []
    assert (judged["num_right"], judged["num_layers"], judged["num_formats"]) == (2, 2, 2)
    assert judged["noise"] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kinds": {"q": "16 bits", "o": "16 bits"}}, "q: 16 bits instead of int8 channel"),
        ({"kinds": {"q": "int8 channel, int8 tensor"}}, "o: None instead of 16 bits"),
        ({"output_errors": {"q": 0.003, "o": 0.0}}, "q: its outputs are off by 0.003"),
        ({"output_errors": {"q": float("nan"), "o": 0.0}}, "q: its outputs are off by nan"),
        ({"log_probs": [[-1.0, -2.2]]}, "the text is off by 0.1 nats"),
        ({"log_probs": [[-1.0, float("nan")]]}, "the text is off by nan nats"),
        ({"weight_losses": {"q": 3.0}}, "weights lose 3 times"),
        ({"missing": ["lm_head"]}, "never asked for lm_head"),
        ({"unfilled": ["q.weight"]}, "not in the checkpoint: q.weight"),
    ],
)
def test_each_difference_is_wrong(
    changed: dict[str, Any], said: str, engines: Any, case: Path
) -> None:
    (wrong,) = engines.judge(engines.TOOLS["transformers"], RIGHT | changed, case)["wrong"]
    assert said in wrong


def test_experts_have_kinds_of_their_own(engines: Any) -> None:
    """transformers unpacks them, and vLLM has other classes for them."""
    layer = {"format": "wint4_g64_afp16", "columns": 64}
    for tool, linear, expert in (
        ("transformers", "int4 group 64, 16 bits", "unpacked"),
        ("vllm-schemes", "CompressedTensorsWNA16", "CompressedTensorsWNA16MoEMethod, int4 group"),
        ("mlx-lm", "affine 4 g64", "affine 4 g64"),
    ):
        kinds = [engines.TOOLS[tool].kind_of(row) for row in (layer, {**layer, "expert": {}})]
        assert kinds == [linear, expert]


def test_experts_have_their_formats_in_turn(engines: Any) -> None:
    from engines.cases import CASES, EXPERTS, pins_of

    groups = [f"model.layers.{i}.{part}" for i in range(10) for part in ("mlp.experts", "q", "o")]
    pins = pins_of(groups, "compressed-tensors")
    of_experts = [format_ for group, format_ in pins.items() if group.endswith("experts")]
    others = [format_ for group, format_ in pins.items() if not group.endswith("experts")]
    assert tuple(of_experts[: len(EXPERTS["compressed-tensors"])]) == EXPERTS["compressed-tensors"]
    assert tuple(others[: len(CASES["compressed-tensors"])]) == CASES["compressed-tensors"]
    assert set(pins) == set(groups)


def test_error_that_is_no_surprise_is_a_line_and_another_is_wrong(engines: Any, case: Path) -> None:
    """mlx-lm's script, which a Python without that package cannot run."""
    content = {"case": "mlx-lm", "model": "somewhere/tied", "layers": LAYERS}
    (case / "case.json").write_text(json.dumps(content))
    for refusal, is_right in (("No module named 'mlx'", True), ("No backend", False)):
        refusals = {("mlx-lm", "tied"): refusal}
        tool = dataclasses.replace(engines.TOOLS["mlx-lm"], refusals=refusals, names=("numpy",))
        line = engines.check(tool, sys.executable, case, case)
        assert line.get("refused") == (refusal if is_right else None)
        assert line.get("versions") == ({"numpy": np.__version__} if is_right else None)
        assert (line["wrong"] == []) == is_right
        others = dataclasses.replace(tool, refusals={("mlx-lm", "smollm2"): refusal})
        assert "refused" not in engines.check(others, sys.executable, case, case)


def test_refusal_is_in_the_table(engines: Any) -> None:
    from engines.page import results_table

    row = {"tool": "vllm", "case": "c", "model": "m", "refused": "No backend.", "wrong": []}
    assert "| m | refused: `No backend.` | - |" in results_table([row | {"date": "2026-11-30"}])


def test_table_is_made_of_the_results(engines: Any) -> None:
    from engines.page import PAGE, RESULTS, results_table

    table = results_table(json.loads(RESULTS.read_text(encoding="utf-8")))
    assert table in PAGE.read_text(encoding="utf-8"), "run: make engines"
