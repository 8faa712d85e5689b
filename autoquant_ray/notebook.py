"""What a Jupyter notebook shows of our objects: lines and tables as HTML, every string escaped.

Also tells whether this is a notebook. Jupyter is no dependency: IPython is used only where a
kernel has loaded it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def notebook_display() -> Any | None:
    """IPython's ``display`` module in a Jupyter kernel; None elsewhere, also in IPython's terminal.

    A kernel's shell is the one that has a ``kernel``: Jupyter, VS Code and Colab alike.
    """
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is None:
        return None
    import importlib

    return importlib.import_module("IPython.display")


def lines_html(lines: Iterable[str]) -> str:
    """One line below the other."""
    return "".join(f"<div>{escape(line)}</div>" for line in lines)


def table_html(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a row of heads."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def facts_html(title: str, facts: Iterable[tuple[str, str]]) -> str:
    """A title over pairs of label and value."""
    rows = "".join(
        f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in facts
    )
    return f"<strong>{escape(title)}</strong><table>{rows}</table>"
