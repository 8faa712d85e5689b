"""Models that answer a sample otherwise beside others: refused, or run on equal lengths."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import transformers
from every_family import small_model
from packaging.version import Version

from autoquant_ray.errors import ModelError
from autoquant_ray.evaluate.runner import AllocationRunner, EvaluationSpec
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.score.scorer import Scorer
from autoquant_ray.score.visits import VisitPacker

LENGTHS = (20, 13, 20, 5)


def samples() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 190, size=length).tolist() for length in LENGTHS]


def knows_padding(make_model: Any) -> Any:
    """A causal model that answers otherwise as soon as it is told of padding."""
    model = make_model("llama")
    original = model.model.forward

    def forward(*arguments: Any, attention_mask: Any = None, **keywords: Any) -> Any:
        output = original(*arguments, attention_mask=attention_mask, **keywords)
        if attention_mask is not None:
            output.last_hidden_state = output.last_hidden_state * 1.01
        return output

    model.model.forward = forward
    return model


NOT_CAUSAL = ["paligemma", "cpmant"]
if Version(transformers.__version__) < Version("5.18"):
    NOT_CAUSAL.append(
        "doge"
    )  # mended there: a change of later tokens leaves its logits as they were


@pytest.mark.parametrize("family", NOT_CAUSAL)
def test_model_that_attends_to_later_tokens_is_refused(family: str, make_spec: Any) -> None:
    model = small_model(family)
    plan = build_plan(model, resolve_formats(("wint8_afp16",), device="cpu"))
    with pytest.raises(ModelError, match="is not causal: what it makes of a token") as caught:
        Scorer(make_spec(plan), model=model)
    assert len(str(caught.value)) <= 400


def test_model_that_does_not_run_on_text_alone_is_refused_by_name(make_spec: Any) -> None:
    model = small_model("idefics")
    plan = build_plan(model, resolve_formats(("wint8_afp16",), device="cpu"))
    with pytest.raises(ModelError, match="IdeficsModel does not run on text alone"):
        Scorer(make_spec(plan), model=model)


def test_model_without_gradients_in_evaluation_mode_is_refused(make_spec: Any) -> None:
    model = small_model("reformer")
    plan = build_plan(model, resolve_formats(("wint8_afp16",), device="cpu"))
    assert not [group.name for group in plan.groups if group.reason is not None]
    with pytest.raises(ModelError, match="ReformerModel gives no gradients in evaluation mode"):
        Scorer(make_spec(plan), model=model)


def test_steps_hold_equal_lengths_where_padding_changes_the_answer(
    make_model: Any, make_spec: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = knows_padding(make_model)
    plan = build_plan(make_model("llama"), resolve_formats(("wint8_afp16",), device="cpu"))
    scorer = Scorer(make_spec(plan), model=model)
    assert "each step holds samples of equal length" in caplog.text
    calibration = scorer.calibrate(samples())
    together = scorer.score(samples(), 0, calibration).sums.elementwise_GF
    alone = [scorer.score([s], 0, calibration).sums.elementwise_GF for s in samples()]
    np.testing.assert_allclose(together, sum(alone), rtol=1e-4)
    spec = make_spec(plan)
    fields = {f.name for f in dataclasses.fields(EvaluationSpec)}
    given = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name in fields}
    runner = AllocationRunner(EvaluationSpec(**given, calibration=calibration), model=model)
    (losses,) = (runner.evaluate(samples(), []).reference,)
    for sample, loss in zip(samples(), losses, strict=True):
        np.testing.assert_allclose(runner.evaluate([sample], []).reference[0], loss, rtol=1e-5)


@pytest.mark.parametrize(("family", "context"), [("hrm_text", 0), ("llama", None)])
def test_what_may_share_a_step_is_told_by_the_model(
    family: str, context: int | None, make_spec: Any
) -> None:
    model = small_model(family)
    plan = build_plan(model, resolve_formats(("wint8_afp16",), device="cpu"))
    assert Scorer(make_spec(plan), model=model).joint_context == context


def test_samples_of_equal_length_share_a_step_when_no_others_may() -> None:
    visits = VisitPacker(1000, 1, 0, joint_context=0).visits(samples())
    assert sorted(step for visit in visits for step in visit) == [[0, 2], [1], [3]]
