"""What the two HTML pages share: one file that asks for nothing else, readable without JavaScript.

Jinja2 escapes every name. A page's scripts and its own style are named by their hash in a content
security policy that forbids everything else, so that no text of a model, a job or an error could
run even if it got through. A library that makes ``style`` elements while it draws needs inline
styles, which such a text could then restyle the page with; it could still load nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

_ASSETS = Path(__file__).parent / "assets"


def render_page(
    template: str,
    styles: Sequence[str],
    scripts: Sequence[str],
    *,
    libraries: Sequence[str] = (),
    **values: Any,
) -> str:
    """Fill a template; it also gets ``style``, ``scripts`` and the ``policy`` that allows them.

    Args:
        template: File name among the assets.
        styles: File names of its style, in order.
        scripts: File names of its script, in order.
        libraries: Scripts that run before its own, as text; they may make styles.
        values: What the template shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, texts = _joined(styles), [*libraries, _joined(scripts)]
    style_source = "'unsafe-inline'" if libraries else _hash(style)
    policy = (
        f"default-src 'none'; style-src {style_source}; "
        f"script-src {' '.join(map(_hash, texts))}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    page = environment.get_template(template).render(
        policy=policy, style=style, scripts=texts, **values
    )
    return f"{page}\n"


def _joined(names: Sequence[str]) -> str:
    return "".join((_ASSETS / name).read_text(encoding="utf-8") for name in names)


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
