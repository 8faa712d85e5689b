"""Menus by name: ``vllm-hopper`` is what vLLM serves together on that generation of GPUs.

Made from the engines' tables, so that a menu cannot name what its engine refuses. Integers come in
blocks of 128; a model whose rows those do not divide takes ``wint4_g64_afp16`` beside them.
"""

from __future__ import annotations

from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.menu import PAIRS
from autoquant_ray.serving.rules import generation_of
from autoquant_ray.serving.table import CARDS, ENGINES, GENERATIONS, layouts_of
from autoquant_ray.serving.together import menus_of

_NVFP4 = "NVFP4_DEFAULT_CFG"
"""ModelOpt's preset of NVFP4 weights and inputs, which no pair has."""


def named_menu(name: str) -> tuple[str, ...] | None:
    """The formats of a menu; None where the name is none of a menu.

    Args:
        name: ``ENGINE-GPU`` such as ``vllm-hopper`` or ``trtllm-h100``.

    Raises:
        ConfigError: An engine without such a GPU.
    """
    engine, dash, gpu = name.partition("-")
    if not dash or engine not in ENGINES:
        return None
    generation = generation_of(gpu)
    if generation not in GENERATIONS:
        raise ConfigError(
            f"menu {name!r}: after {engine}- stands a GPU: {', '.join([*GENERATIONS, *CARDS])}"
        )
    pairs = {**PAIRS, _NVFP4: (PAIRS["wfp4_afp16"][0], PAIRS["wfp4_afp16"][0])}
    formats = [
        Format(name=name, weight=weight, input=input_, modelopt_compression=1.0)
        for name, (weight, input_) in pairs.items()
    ]
    menus = menus_of(formats, engine, generation, layouts_of(engine))
    return max((menu for _, menu in menus), key=len)
