"""What the two HTML pages share: one file that asks for nothing else, readable without JavaScript.

Jinja2 escapes every name. A page's own style and script are named by their hash in a content
security policy that forbids everything else, so that no text of a model, a job or an error could
run even if it got through.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

_ASSETS = Path(__file__).parent / "assets"


def render_page(template: str, styles: Sequence[str], scripts: Sequence[str], **values: Any) -> str:
    """Fill a template; it also gets ``style``, ``script`` and the ``policy`` that allows them.

    Args:
        template: File name among the assets.
        styles: File names of its style, in order.
        scripts: File names of its script, in order.
        values: What the template shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = _joined(styles), _joined(scripts)
    policy = (
        f"default-src 'none'; style-src 'sha256-{_hash(style)}'; "
        f"script-src 'sha256-{_hash(script)}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = environment.get_template(template).render(
        policy=policy, style=style, script=script, **values
    )
    return f"{page}\n"


def _joined(names: Sequence[str]) -> str:
    return "".join((_ASSETS / name).read_text(encoding="utf-8") for name in names)


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
