"""Checks of what a command was given, before it imports anything heavy.

They are also made where the work begins; here they take a tenth of a second, and say all that is
wrong at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.search_space import SearchSpace
from autoquant_ray.data.texts import require_rows
from autoquant_ray.distributed.this_machine import require_gpu
from autoquant_ray.errors import AutoQuantError, ConfigError
from autoquant_ray.formats.menu import require_names
from autoquant_ray.models.find import find_model
from autoquant_ray.stages.sources import data_specs


def require_input(space: SearchSpace, *, keeps_menu: bool = False) -> None:
    """Check names of formats, the model's folder or file, the data, and that a GPU is possible.

    Args:
        space: What to plan or to scan.
        keeps_menu: A run goes on, whose formats count as they are written there.

    Raises:
        AutoQuantError: The only complaint, or a ConfigError of all of them.
    """
    problems = []
    for check in _checks(space, keeps_menu):
        try:
            check()
        except AutoQuantError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError("; ".join(map(str, problems)))


def _checks(space: SearchSpace, keeps_menu: bool) -> Iterator[Callable[[], Any]]:
    if not keeps_menu:
        yield partial(require_names, space.formats, space.custom_formats)
    yield partial(find_model, space.model, trust_remote_code=space.trust_remote_code)
    if isinstance(space, ScanConfig):
        yield partial(require_gpu, space)
        for spec in data_specs(space).values():
            yield partial(require_rows, spec, skips_bad=space.skip_bad_samples)
