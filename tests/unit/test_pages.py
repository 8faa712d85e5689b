"""README, docs and CONTRIBUTING name files, modules, names and places of pages that exist."""

from __future__ import annotations

import re
from pathlib import Path

import autoquant_ray

PACKAGE = Path(autoquant_ray.__file__).parent
ROOT = PACKAGE.parent
GLOSSARY = ROOT / "docs" / "glossary.md"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
_TARGET = re.compile(r"(?:\]\(|srcset=\")(?!https?:)([^)\s\"]+)[)\"]")


def is_there(dotted: str) -> bool:
    """Whether a dotted name is a module of the package, or is said in the one that holds it."""
    path, (first, *rest) = PACKAGE, dotted.split(".")[1:]
    names = [first, *rest]
    while names and (path / names[0]).is_dir():
        path, names = path / names[0], names[1:]
    if names and (path / f"{names[0]}.py").exists():
        path, names = path / f"{names[0]}.py", names[1:]
    text = (path if path.suffix else path / "__init__.py").read_text("utf-8")
    return not names or re.search(rf"\b{names[0]}\b", text) is not None


def test_pages_name_modules_and_files_that_exist() -> None:
    wrong = []
    for page in PAGES:
        text = page.read_text("utf-8")
        wrong += [
            f"{page.name}: {dotted}"
            for dotted in re.findall(r"\bautoquant_ray(?:\.\w+)+", text)
            if not is_there(dotted)
        ]
        files = re.findall(r"\b(?:tests|benchmarks|autoquant_ray)/[\w/-]+\.(?:py|md|yaml)", text)
        wrong += [f"{page.name}: {file}" for file in files if not (ROOT / file).exists()]
    assert not wrong, "\n".join(wrong)


def anchors(page: Path) -> set[str]:
    """The places of a page that links can name, as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_pages_lead_somewhere() -> None:
    wrong = []
    for page in (*PAGES, ROOT / "cluster" / "README.md"):
        for target in _TARGET.findall(page.read_text("utf-8")):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                wrong.append(f"{page.name}: {target}")
    assert not wrong, "\n".join(wrong)


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 9_000


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
