"""BokehJS, the library that draws the report's chart, as text to be put into a page.

The files are those of the installed ``bokeh`` package, found without importing it: the import alone
takes 0.4 s of a ``solve`` that takes one second. Their licence (BSD) stands at their head.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from autoquant_ray.errors import AutoQuantError

_FILES = ("bokeh.min.js", "bokeh-api.min.js")
"""The models and their views; the functions by which a script makes a figure."""


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
