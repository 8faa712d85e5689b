"""Names in ``report.md`` are text, whatever they hold: another program's reading of them."""

from __future__ import annotations

import html
import re

import pytest
from markdown_it import MarkdownIt

from autoquant_ray.report.markdown import plain_text

NAMES = [
    "model.layers.0.self_attn.o_proj",
    "![t](https://example.com/a.png)",
    "[click](javascript:alert(1))",
    "[a]: https://example.com",
    "*bold* **bolder** _it_ __it__ ~~gone~~",
    "`code` ``more`` $x^2$",
    "<script>alert(1)</script>",
    "<https://example.com>",
    "&lt;b&gt; &#60;b&#62; &amp",
    "a | b || c",
    "# heading",
    "> quoted",
    "- item",
    "+ item",
    "1. first",
    "1) first",
    "---",
    "===",
    "\\\\ \\* \\[",
    "_start _mid_ end_ a_b",
    "*o_proj",
    "a & b",
]


def paragraph(text: str) -> str:
    """What a reader of Markdown shows for a text by itself, tags and all."""
    shown: str = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    return shown.strip()


@pytest.mark.parametrize("name", NAMES)
def test_name_is_shown_as_it_is(name: str) -> None:
    escaped = plain_text(name)
    inside = re.fullmatch(r"<p>(.*)</p>", paragraph(escaped), re.DOTALL)
    assert inside is not None, paragraph(escaped)
    assert "<" not in inside[1]
    assert html.unescape(inside[1]) == " ".join(name.split())


@pytest.mark.parametrize("name", NAMES)
def test_name_in_a_cell_stays_in_its_cell(name: str) -> None:
    table = paragraph(f"| a | b |\n|---|---|\n| {plain_text(name)} | last |")
    cells = re.findall(r"<td>(.*?)</td>", table, re.DOTALL)
    assert len(cells) == 2
    assert html.unescape(cells[0]) == " ".join(name.split())


def test_addresses_become_no_links_where_readers_make_them_of_text() -> None:
    for address in ("https://example.com", "HTTP://example.com", "www.example.com", "ftp://e.com"):
        assert address not in plain_text(f"see {address} now")


def test_control_characters_are_written_out() -> None:
    assert plain_text("a\x1b[31mred\x07\u202eb") == r"a\\x1b\[31mred\\x07\\u202eb"
