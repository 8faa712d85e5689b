"""A budget's options are described once: flags, folder name, manifest and command follow."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from autoquant_ray.allocate.load import latency_of
from autoquant_ray.allocate.options import SolveOptions, written_options
from autoquant_ray.cli.main import main
from autoquant_ray.cli.solve import take_budget
from autoquant_ray.errors import ConfigError
from autoquant_ray.report.reproduce import solve_command

EVERYTHING = {
    "bits": 4.5,
    "bytes": 1_500_000,
    "kv_bytes_per_token": 1024.0,
    "bits_over": "all",
    "cost": "modelopt",
    "max_formats": 3,
    "max_group_kl": 0.25,
    "pins": {"lm_head": "none"},
    "allow": {"*.o_proj": ("wfp8_afp8", "none")},
    "domains": {"chat": 0.25, "code": 0.75},
    "latency": latency_of("h100", batch=8, tokens_per_second=1500.0),
    "engine": "vllm",
    "gpu": "hopper",
    "expert_groups": 4,
}


def test_every_option_can_be_asked_for_in_the_command_that_a_report_prints() -> None:
    assert {*EVERYTHING, "worst_domain"} == set(SolveOptions.model_fields)
    options = SolveOptions(**EVERYTHING)
    for asked in (options, options.replaced(domains={}, worst_domain=True)):
        words = shlex.split(solve_command("runs/a", asked))[2:]
        context = main.commands["solve"].make_context("solve", words)  # type: ignore[attr-defined]
        others = ("run", "num_trials", "as_json", "verbose")
        flags = {name: v for name, v in context.params.items() if name not in others}
        assert take_budget(flags) == asked


def test_manifest_holds_every_option_and_gives_it_back() -> None:
    options = SolveOptions(**EVERYTHING)
    budget = options.to_json()
    assert list(budget)[-2:] == ["kv_bytes_per_token", "max_group_kl"]
    assert set(budget) == set(SolveOptions.model_fields)
    assert SolveOptions.from_json(budget) == options
    assert "kv_bytes_per_token" not in SolveOptions(bits=5).to_json()


@pytest.mark.parametrize("name", [name for name in EVERYTHING if name != "bits"])
def test_every_option_is_in_the_name_of_the_folder(name: str) -> None:
    more: dict[str, Any] = {name: EVERYTHING[name]}
    if name == "gpu":
        more["engine"] = "vllm"
    before = SolveOptions(bits=5, **{key: more[key] for key in more if key != name})
    after = SolveOptions(bits=5, **more)
    assert before.name != after.name
    assert SolveOptions(bits=5).name == "bits-5.00"
    assert set(written_options()) == set(SolveOptions.model_fields)


def test_names_of_folders_stay_what_they_were() -> None:
    before = {name: value for name, value in EVERYTHING.items() if name != "max_group_kl"}
    assert SolveOptions(**before).name == (
        "bits-4.50-bytes-1500000-kv-1024-tps-1500-vllm-hopper-experts-4-190eff"
    )
    assert SolveOptions(bytes=10, cost="modelopt", bits_over="all").name == "bytes-10"
    assert SolveOptions(bits=5, pins={"b": "x", "a": "y"}).name == "bits-5.00-2edf94"
    assert SolveOptions(bits=5, domains={"a": 1, "b": 3}).name == "bits-5.00-6dae4f"
    worst = SolveOptions(bits=5.123, worst_domain=True, allow={"*": ("a",)})
    assert worst.name == "bits-5.123-worst-domain-8e1f07"


def test_wrong_value_is_one_line_that_names_the_field() -> None:
    with pytest.raises(ConfigError, match=r"^bits: Input should be a valid number"):
        SolveOptions(bits="many")
    with pytest.raises(ConfigError, match=r"^bitz: unknown key; closest: bits"):
        SolveOptions(bitz=4)


@pytest.mark.parametrize(
    ("bits", "name"),
    [(4.5, "bits-4.50"), (4.125000000004126, "bits-4.125"), (4.1234567, "bits-4.1234567")],
)
def test_name_of_a_budget_has_no_noise_of_its_last_digits(bits: float, name: str) -> None:
    assert SolveOptions(bits=bits).name == name
