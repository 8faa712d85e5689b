"""An engine on a small model in this process."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from autoquant_ray.engine import Engine, EngineSpec
from autoquant_ray.formats import resolve_formats
from autoquant_ray.models import ModelRef
from autoquant_ray.plan import Plan, build_plan
from autoquant_ray.sensitivity import ScoredModule

PRESETS = (
    "INT8_DEFAULT_CFG",
    "FP8_DEFAULT_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT8_WEIGHT_ONLY_CFG",
)


@dataclasses.dataclass
class Prepared:
    """A model with its plan and engine."""

    model: Any
    plan: Plan
    engine: Engine
    names: list[str]


@pytest.fixture(scope="session")
def make_engine(make_model: Any) -> Any:
    """Build an engine; keywords replace fields of the default spec."""

    def build(family: str, formats: tuple[str, ...] = PRESETS, **changes: Any) -> Prepared:
        model = make_model(family)
        plan = build_plan(model, resolve_formats(formats, device="cpu"))
        spec = EngineSpec(
            model=ModelRef(name=family, path="unused"),
            dtype="float32",
            device="cpu",
            num_threads=1,
            modules=tuple(
                ScoredModule(group=index, planned=module)
                for index, group in enumerate(plan.searched)
                for module in group.modules
            ),
            formats=plan.formats,
            step_tokens=100_000,
            labels="data",
            label_draws=1,
            seed=0,
        )
        engine = Engine(dataclasses.replace(spec, **changes), model=model)
        return Prepared(model, plan, engine, [group.name for group in plan.searched])

    return build
