"""What both HTML pages share: a self-contained file, readable without JavaScript.

Jinja2 escapes every name. The content security policy allows only the page's scripts and style, by
their hashes, so that text from a model, a job or an error could not run even if it were not
escaped. A library that creates ``style`` elements while it draws needs inline styles; unescaped
text could then restyle the page, but still load nothing.
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
    """Render a template; it also gets ``style``, ``scripts`` and the ``policy`` that allows them.

    Args:
        template: File name among the assets.
        styles: File names of style sheets, in order.
        scripts: File names of scripts, in order.
        libraries: Scripts that run before those, as text; they may create styles.
        values: Variables of the template.
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
