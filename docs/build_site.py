"""Builds the site of README and docs: ``make docs``, or ``python docs/build_site.py FOLDER``.

Needs the package of the extra ``docs``. ``zensical.toml`` has the navigation. The pages are laid
out under the paths that they have here, so the links of the Markdown hold in the site too; files
that they link to come along. A link or an anchor that leads nowhere ends the build. The diagram of
README is a picture there of ``docs/update_pictures.py``, since a browser would fetch Mermaid.
Of a block that shows a console, the button copies the commands alone.
"""

from __future__ import annotations

import html
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "zensical.toml"
DIAGRAM = ROOT / "docs" / "images" / "pipeline.svg"
MERMAID = re.compile(r"^```mermaid\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"<pre>(<span></span><code>(.*?)</code></pre>)", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_PROMPT = "$ "
_LINK = re.compile(r"(?:\]\(|srcset=\")(?!https?:)([^)#\s\"]+)")


def pages() -> list[str]:
    """Paths of all pages, as the navigation names them."""

    def within(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        entries = entry.values() if isinstance(entry, dict) else entry
        return [page for part in entries for page in within(part)]

    return within(tomllib.loads(CONFIG.read_text("utf-8"))["project"]["nav"])


def build(out: Path) -> None:
    """Build the site.

    Args:
        out: Folder of the site; what is there is replaced.

    Raises:
        SystemExit: A link or an anchor leads nowhere; the lines above say which.
    """
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        shutil.copy(CONFIG, folder)
        for page in pages():
            _lay_out(page, folder / "pages")
        shutil.copytree(ROOT / "docs" / "site", folder / "pages" / "docs" / "site")
        command = [sys.executable, "-m", "zensical", "build", "--strict"]
        done = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}")
        for file in (folder / "site").rglob("*.html"):
            page = file.read_text("utf-8")
            file.write_text(_CODE.sub(_with_commands, page), encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder / "site", out)


def commands_of(block: str) -> str:
    """Commands of what a console shows, without prompts and without what they print.

    Args:
        block: Lines; a command begins with ``$`` and goes on after a backslash and within quotes.

    Returns:
        Their lines; empty where no command is shown.
    """
    lines: list[str] = []
    command = ""
    for line in block.splitlines():
        if not command and not line.startswith(_PROMPT):
            continue
        text = line if command else line.removeprefix(_PROMPT)
        lines.append(text)
        command += f"{text}\n"
        try:
            shlex.split(command.removesuffix("\n"), comments=True)
        except ValueError:  # within quotes, or after a backslash
            continue
        command = ""
    return "\n".join(lines)


def _with_commands(code: re.Match[str]) -> str:
    """A block of code; with the attribute that the theme's script copies in place of the text."""
    commands = commands_of(html.unescape(_TAG.sub("", code[2])))
    if not commands:
        return code[0]
    value = html.escape(commands).replace("\n", "&#10;")
    return f'<pre data-copy="{value}">{code[1]}'


def _lay_out(page: str, folder: Path) -> None:
    """A page with the files that it links to; its diagram as the picture of it."""
    text = (ROOT / page).read_text("utf-8")
    for target in _LINK.findall(text):
        path = ((ROOT / page).parent / target).resolve().relative_to(ROOT)
        if (ROOT / path).is_file() and path.suffix != ".md":
            _copy(str(path), folder)
    if MERMAID.search(text):
        up = "../" * page.count("/")
        picture = DIAGRAM.relative_to(ROOT)
        text = MERMAID.sub(f"![The stages of a run]({up}{picture})\n", text)
        _copy(str(picture), folder)
    (folder / page).parent.mkdir(parents=True, exist_ok=True)
    (folder / page).write_text(text, encoding="utf-8")


def _copy(path: str, folder: Path) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / path, folder / path)


if __name__ == "__main__":
    site = Path(*sys.argv[1:])
    build(site)
    sys.stdout.write(f"open {site / 'index.html'}\n")
