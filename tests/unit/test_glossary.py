"""The glossary names files and names that exist."""

from __future__ import annotations

import re
from pathlib import Path

import autoquant_ray

PACKAGE = Path(autoquant_ray.__file__).parent
GLOSSARY = PACKAGE.parent / "docs" / "glossary.md"


def test_glossary_says_where_things_are() -> None:
    rows = re.findall(
        r"^\| (?!term|---)(.*?) \| (.*?) \| (`.*`) \|$", GLOSSARY.read_text("utf-8"), re.M
    )
    assert len(rows) >= 25
    wrong = []
    for term, _, places in rows:
        for place in places.split(", "):
            path, *names = re.findall(r"`(.+?)`", place)
            file = PACKAGE / path
            text = file.read_text("utf-8") if file.exists() else ""
            if not text or not all(re.search(rf"\b{name}\b", text) for name in names):
                wrong.append(f"{term}: {place}")
    assert not wrong, "\n".join(wrong)


def test_terms_of_the_glossary_are_said_once() -> None:
    terms = re.findall(r"^\| (?!term|---)(.*?) \|", GLOSSARY.read_text("utf-8"), re.M)
    words = [word for term in terms for word in term.split(", ")]
    assert len(words) == len(set(words))
