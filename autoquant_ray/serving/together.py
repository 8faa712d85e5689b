"""Which formats can stand in one checkpoint that an engine serves on one GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.format import Format
from autoquant_ray.serving.layer_formats import LayerAlgo
from autoquant_ray.serving.rules import check_target, named, servable_formats, unserved_reason
from autoquant_ray.serving.table import COMPRESSED_TENSORS, FP4_FAMILY, GENERATIONS


def menus_of(
    formats: Sequence[Format], engine: str, gpu: str | None, layouts: Sequence[str]
) -> list[tuple[str, tuple[str, ...]]]:
    """Layout and formats of each menu, all of which one GPU serves.

    Args:
        formats: To choose from.
        engine: One of ``ENGINES``.
        gpu: A generation or a card; None: any.
        layouts: Of checkpoints.

    Raises:
        ConfigError: An unknown engine or GPU, or it serves none of the formats.
    """
    generation = check_target(engine, gpu)
    menus: list[tuple[str, tuple[str, ...]]] = []
    for layout in layouts:
        menus_here: list[tuple[str, ...]] = []
        for on_gpu in GENERATIONS if generation is None else [generation]:
            menus_here += _menus_on(formats, engine, on_gpu, layout)
        largest = (
            m for m in dict.fromkeys(menus_here) if not any(set(m) < set(o) for o in menus_here)
        )
        menus += [(layout, menu) for menu in largest if menu]
    if menus:
        return menus
    # What a layout knows of a format says more than that another has no name for it.
    reasons = [servable_formats(formats, engine, gpu, layout=layout) for layout in layouts]
    best = {f.name: min((r[f.name] or "" for r in reasons), key=says_little) for f in formats}
    listed = "; ".join(f"{name}: {reason}" for name, reason in best.items())
    where = engine if gpu is None else f"{engine} on {gpu}"
    raise ConfigError(
        f"{where} serves no format of the menu ({listed}); scan with `formats` "
        f"{engine}-{generation or 'hopper'}, or "
        "choose another `engine` or `gpu` (docs/engines.md)"
    )


def says_little(reason: str) -> bool:
    """Whether a reason is only that a layout has no name for a format."""
    return "no name that says" in reason


def _menus_on(
    formats: Sequence[Format], engine: str, generation: str, layout: str
) -> list[tuple[str, ...]]:
    """Formats that stand in one checkpoint together, or alone, on one GPU."""
    algos = {f.name: algo for f in formats if (algo := named(f, layout)) is not None}

    def is_served(algo: LayerAlgo, *, mixed: bool) -> bool:
        return unserved_reason(algo, engine, generation, mixed=mixed, layout=layout) is None

    mixed = {name: algo for name, algo in algos.items() if is_served(algo, mixed=True)}
    menus = list(_together(mixed, engine, layout))
    for alone in _by_algo(algos):
        is_there = any(set(alone) <= set(menu) for menu in menus)
        if is_served(algos[alone[0]], mixed=False) and not is_there:
            menus.append(alone)
    return menus


def _together(
    mixed: Mapping[str, LayerAlgo], engine: str, layout: str
) -> Iterator[tuple[str, ...]]:
    """Menus of formats that can stand in one checkpoint.

    vLLM and SGLang read one group size for all of the NVFP4 family in ModelOpt's layout. Without a
    layer of that family SGLang misreads a checkpoint of several formats, so that at most one other
    format may stand beside it.
    """
    family = {name: algo for name, algo in mixed.items() if algo.algo in FP4_FAMILY}
    others = {name: algo for name, algo in mixed.items() if name not in family}
    if layout == COMPRESSED_TENSORS or engine == "trtllm" or not family:
        beside = [tuple(others)] if engine != "sglang" else _by_algo(others)
        yield from [(*family, *names) for names in beside]
        return
    for size in sorted({algo.group_size for algo in family.values()}):
        of_size = {name for name, algo in family.items() if algo.group_size == size}
        for names in [tuple(others)] if engine != "sglang" else (_by_algo(others) or [()]):
            yield tuple(name for name in mixed if name in of_size or name in names)


def _by_algo(algos: Mapping[str, LayerAlgo]) -> list[tuple[str, ...]]:
    """Formats that are called the same, together."""
    return [
        tuple(name for name, other in algos.items() if other == algo)
        for algo in dict.fromkeys(algos.values())
    ]
