"""Menus by name hold what their engine serves together, and nothing that it refuses."""

from __future__ import annotations

import itertools

import pytest

from autoquant_ray.config.files import validate
from autoquant_ray.config.search_space import SearchSpace
from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.serving.named_menus import named_menu
from autoquant_ray.serving.table import ENGINES, GENERATIONS, layouts_of
from autoquant_ray.serving.together import menus_of


@pytest.mark.parametrize(("engine", "gpu"), [*itertools.product(ENGINES, GENERATIONS)])
def test_named_menu_is_served_together_as_scans_resolve_it(engine: str, gpu: str) -> None:
    menu = named_menu(f"{engine}-{gpu}")
    assert menu
    formats = resolve_formats(menu, device="cpu")
    menus = [set(names) for _, names in menus_of(formats, engine, gpu, layouts_of(engine))]
    assert set(menu) in menus


def test_named_menu_of_hopper_mixes_int4_int8_and_fp8() -> None:
    assert {"wint4_afp16", "wint8_aint8", "wfp8_afp8"} <= set(named_menu("vllm-hopper") or ())


def test_named_menu_of_a_card_is_that_of_its_generation() -> None:
    assert named_menu("trtllm-h100") == named_menu("trtllm-hopper")
    assert named_menu("trtllm-H100") == named_menu("trtllm-hopper"), "as --gpu takes it"


def test_formats_take_a_menu_beside_a_format() -> None:
    values = {"model": "m", "formats": "wint4_g64_afp16,trtllm-hopper,wfp8_afp8"}
    assert validate(SearchSpace, values).formats == (
        "wint4_g64_afp16",
        "wfp8_afp8",
        "wint4_afp16",
    )


def test_formats_of_an_unknown_gpu_name_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="'vllm-hoper': after vllm- stands a GPU: ampere, ada"):
        validate(SearchSpace, {"model": "m", "formats": "vllm-hoper"})


@pytest.mark.parametrize("gpu", [None, "h100"])
def test_menu_that_an_engine_refuses_names_the_menu_to_scan_with(gpu: str | None) -> None:
    formats = resolve_formats(("wint8_aint8",), device="cpu")
    with pytest.raises(ConfigError, match="scan with `formats` sglang-hopper"):
        menus_of(formats, "sglang", gpu, layouts_of("sglang"))
