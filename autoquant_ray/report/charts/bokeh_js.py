"""BokehJS, the library that draws the report's chart, as text to embed in a page.

The files come from the installed ``bokeh`` package, which is not imported: the import alone would
take 0.4 s of a ``solve`` that takes one second. Their licence (BSD) is in their header.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from autoquant_ray.errors import AutoQuantError

_FILES = ("bokeh.min.js", "bokeh-api.min.js")
"""The core with models and views, and the plotting interface that our script uses."""


def bokeh_scripts() -> list[str]:
    """The library's scripts in the order in which a page must run them.

    Raises:
        AutoQuantError: The package is not installed, or lacks a file.
    """
    spec = find_spec("bokeh")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    if not folders:
        raise AutoQuantError("report.html needs the package bokeh; install it: pip install bokeh")
    folder = Path(folders[0]) / "server" / "static" / "js"
    try:
        return [(folder / name).read_text(encoding="utf-8") for name in _FILES]
    except OSError as error:
        raise AutoQuantError(
            f"report.html needs {error.filename} of the package bokeh; install it again"
        ) from error
