"""A scorer on a small model in this process, and a scored run directory without Ray."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CUSTOM, calibrated
from checkpoints import FORMATS as CHECKPOINT_FORMATS
from laboratory import FORMATS as LABORATORY_FORMATS
from laboratory import Laboratory
from scoring_specs import scoring_spec
from written_runs import made_up_config, made_up_run, write_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model, fingerprint_model
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.score.scorer import Scorer
from autoquant_ray.solve import solve_run

_DOCS = Path(__file__).parents[2] / "docs"
PRESETS = (
    "INT8_DEFAULT_CFG",
    "FP8_DEFAULT_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT8_WEIGHT_ONLY_CFG",
)


@dataclasses.dataclass
class Prepared:
    """A model with its plan and scorer."""

    model: Any
    plan: Plan
    scorer: Scorer
    names: list[str]


@pytest.fixture(scope="session")
def make_spec() -> Any:
    """Spec of a scorer for a plan; keywords replace fields."""

    return scoring_spec


@pytest.fixture(scope="session")
def make_scorer(make_model: Any, make_spec: Any) -> Any:
    """Build a scorer for a family or a model; keywords replace fields of the default spec.

    In ModelOpt's form fused layers have scales of their own.
    """

    def build(
        family: Any,
        formats: tuple[str, ...] = PRESETS,
        custom: Any = None,
        is_modelopt_form: bool = False,
        **changes: Any,
    ) -> Prepared:
        model = make_model(family) if isinstance(family, str) else family
        menu = resolve_formats(formats, device="cpu", custom=custom)
        if is_modelopt_form:
            menu = [dataclasses.replace(format_, shares_scale=False) for format_ in menu]
        plan = build_plan(model, menu)
        scorer = Scorer(make_spec(plan, **changes), model=model)
        return Prepared(model, plan, scorer, [group.name for group in plan.searched])

    return build


@pytest.fixture(scope="session")
def laboratory(make_scorer: Any, make_samples: Any) -> Laboratory:
    """A tiny Llama whose plans can be measured."""
    return Laboratory(make_scorer("llama", LABORATORY_FORMATS, labels="model"), make_samples)


RUN_FORMATS = ("wint4_afp16", "wfp8_afp8", "wint8_aint8")


@pytest.fixture(scope="session", name="write_run")
def write_run_fixture() -> Any:
    """Write a scored run directory without Ray, as the stages of a scan do."""
    return write_run


@pytest.fixture
def make_run(make_model: Any, tmp_path: Path) -> Any:
    """A scored run directory without Ray: made-up sums in some shards, aggregated for real.

    The finer a format, the smaller its score; every group has its own scale. With a folder the run
    is one of the model that is there.
    """

    def build(
        family: str = "llama",
        formats: tuple[str, ...] = RUN_FORMATS,
        disable: tuple[str, ...] = ("lm_head",),
        name: str = "run",
        domains: tuple[str, ...] = (),
        num_shards: int = 2,
        folder: Path | None = None,
        custom: dict[str, Any] | None = None,
        expert_groups: Any = "layer",
    ) -> RunDirectory:
        menu = resolve_formats(formats, device="cpu", custom=custom)
        model = make_model(family)
        if folder is not None:
            model = build_skeleton(find_model(str(folder)))
        plan = build_plan(model, menu, disable, expert_groups=expert_groups)
        print_of_model = "model" if folder is None else fingerprint_model(find_model(str(folder)))
        config = made_up_config(
            family if folder is None else folder,
            tmp_path / name,
            formats,
            custom_formats=custom or {},
            disable=disable,
            bits=8,
            expert_groups=expert_groups,
        )
        return made_up_run(config, plan, family, print_of_model, num_shards, domains=domains)

    return build


@pytest.fixture
def solved_run(make_run: Any, model_folder: Any) -> Any:
    """A calibrated run of a small model with one solution: pattern -> format, the last one counts.

    Groups that no pattern names take what loses least.
    """

    def build(
        family: str,
        choice: dict[str, str],
        formats: tuple[str, ...] = CHECKPOINT_FORMATS,
        folder: Path | None = None,
        **more: Any,
    ) -> Any:
        folder = folder or model_folder(family)
        custom = {name: entry for name, entry in CUSTOM.items() if name in formats}
        directory = make_run(family, formats, disable=(), folder=folder, custom=custom, **more)
        maxima = calibrated(directory, folder, formats)
        rows = directory.read_table("plan.parquet").to_pylist()
        groups = dict.fromkeys(row["group"] for row in rows if row["is_searched"])
        pins = {g: name for p, name in choice.items() for g in groups if fnmatch.fnmatch(g, p)}
        # In bytes: a tied head that is quantized beside 16 bits takes more than 16.
        solve_run(directory, SolveOptions(bytes=10**9, pins=pins), folder="")
        return directory, folder, maxima

    return build


@pytest.fixture(scope="session")
def docs() -> Any:
    """``docs/update.py``."""
    spec = importlib.util.spec_from_file_location("docs_update", _DOCS / "update.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A running object store, and the keys for it."""
    from object_store import KEYS, ObjectStore  # boto3 and moto: not for every test

    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    started = ObjectStore()
    yield started
    started.stop()
