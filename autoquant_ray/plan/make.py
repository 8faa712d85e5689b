"""From a search space to a plan: model config, skeleton, formats, groups. No weights, no Ray."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from autoquant_ray.config.search_space import SearchSpace
from autoquant_ray.formats.checks import caution
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.gguf_types import require_library
from autoquant_ray.formats.menu import check_device, resolve_formats
from autoquant_ray.models.find import ModelRef
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.models.quantized_source import describe_source, quantized_source
from autoquant_ray.plan.carried import carried_bytes
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.serving.shared_scales import shares_scale

logger = logging.getLogger(__name__)


def make_plan(
    space: SearchSpace,
    ref: ModelRef,
    *,
    device: str,
    menu: Sequence[Mapping[str, Any]] | None = None,
    engine: str | None = None,
) -> Plan:
    """Plan a search from the model's config alone.

    Args:
        space: Formats and layers left out.
        ref: The model.
        device: ``cpu`` or ``cuda``, where the formats must run.
        menu: Formats of a run that goes on, as ``run.json`` has them: what they are counts, not
            what their names mean now.
        engine: Which fused layers have a scale in common; None: as all engines need it.

    Raises:
        AutoQuantError: Unknown format, unreadable config, nothing to search.
    """
    if menu is not None and [entry["name"] for entry in menu] == list(space.formats):
        formats = [Format.from_json({**entry}) for entry in menu]
        check_device(formats, device)
    else:
        formats = [
            replace(format_, shares_scale=format_.shares_scale and shares_scale(format_, engine))
            for format_ in resolve_formats(
                space.formats, device=device, custom=space.custom_formats
            )
        ]
    require_library({format_.name: format_.weight for format_ in formats})
    if (text := caution(formats)) is not None:
        logger.warning("%s", text)
    skeleton = build_skeleton(ref)
    carried = carried_bytes(skeleton, ref)
    plan = build_plan(
        skeleton,
        formats,
        space.disable,
        space.coverage,
        space.expert_groups,
        search_routers=space.search_routers,
    )
    plan = replace(plan, carried=carried)
    source = quantized_source(ref)
    if source is None:
        return plan
    logger.warning("the model is quantized: %s", describe_source(source.description))
    return replace(plan, source_format=source.description)
