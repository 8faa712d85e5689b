"""What ``--against modelopt-shapley`` refuses before any work."""

from __future__ import annotations

import itertools
import math
from typing import Any

import modelopt
import pytest
from command_line import run as run_command
from packaging.version import Version

from autoquant_ray.allocate.candidate import make_candidate
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.errors import ConfigError
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.evaluate.shapley import require_menu, require_shapley
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run

IS_NEW = Version(modelopt.__version__) >= Version("0.48rc1")
MAX_LENGTH = 400


def menu_of(*names: str) -> list[dict[str, Any]]:
    return [format_.to_json() for format_ in resolve_formats(names, device="cpu")]


@pytest.mark.skipif(IS_NEW, reason="ModelOpt 0.48 has these scores")
def test_an_older_modelopt_is_refused(make_run: Any) -> None:
    run = make_run(formats=("wint4_afp16:max", "wint8_aint8"))
    done = run_command("evaluate", run.uri, "--against", "uniform,modelopt-shapley")
    assert done.exit_code == 2
    line = done.stderr.strip().splitlines()[-1]
    assert len(line) <= MAX_LENGTH
    needed = f"modelopt-shapley needs nvidia-modelopt >= 0.48; {modelopt.__version__} is installed"
    assert needed in line
    assert "--against" in line
    assert not run.list_folders("evaluation")


def test_formats_of_modelopts_own_methods_are_taken() -> None:
    require_menu(menu_of("wint4_afp16:max", "wint8_aint8", "INT4_AWQ_CFG", "NVFP4_DEFAULT_CFG"))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["wint4_afp16"], r"wint4_afp16 \(method weighted\)"),
        (["wint4_afp16:max", "wint4_afp16:mse"], r"wint4_afp16:mse \(method mse\)"),
        (["wint4_afp16:gptq", "wint4_afp16:awq"], r":gptq \(method gptq\), .*:awq \(method awq\)"),
        (["wint8_aint8", "kv_fp8"], r"score kv_fp8 \(KV cache\); scan with"),
        (
            [f"w{w}_afp16:{method}" for w in ("int4", "int8") for method in ("mse", "gptq", "awq")],
            "and 2 more; scan with formats that ModelOpt's search takes",
        ),
    ],
)
def test_other_formats_are_named(names: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        require_menu(menu_of(*names))
    assert len(str(caught.value)) <= MAX_LENGTH


@pytest.mark.parametrize("robust", ["mlp", "self_attn"])
def test_the_rival_is_solved_by_its_scores(make_run: Any, robust: str) -> None:
    """Against all allocations within the budget, whatever this run's scores say."""
    losses = {"wint4_afp16:max": (1e-3, 1e3), "wint8_aint8": (1e-4, 1.0), NONE: (0.0, 0.0)}
    run = ScoredRun.read(RunState.open(make_run(formats=tuple(losses)[:2])))
    names = [group.name for group in run.problem.searched]
    shapley = {
        (name, format_): loss[robust not in name] * (1 + number / 10)
        for number, name in enumerate(names)
        for format_, loss in losses.items()
    }
    solve_run(run.state.directory, SolveOptions(bits=8), "eight")
    against = ("modelopt-shapley",)
    solution, rival = collect_candidates(run, "solutions/eight/", against, shapley=shapley)
    every = (
        make_candidate(run.problem, run.scores, "any", dict(zip(names, formats, strict=True)))
        for formats in itertools.product(losses, repeat=len(names))
    )
    best = min(
        (candidate for candidate in every if candidate.effective_bits <= 8),
        key=lambda candidate: math.fsum(shapley[pair] for pair in candidate.formats.items()),
    )
    assert rival.name == "modelopt-shapley"
    assert rival.formats == best.formats != solution.formats


@pytest.mark.skipif(not IS_NEW, reason="ModelOpt 0.47 is refused before")
def test_experts_apart_are_refused(make_run: Any) -> None:
    formats = ("wint4_afp16:max", "wint8_afp16")
    run = make_run("qwen3_moe", formats=formats, expert_groups="expert")
    with pytest.raises(ConfigError, match="this run has `expert_groups` expert"):
        require_shapley(RunState.open(run))
