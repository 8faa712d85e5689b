"""Methods of rounding in reports: who has which, and what it saves against plain rounding."""

from __future__ import annotations

import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fastparquet
import pytest
from scored_run import put_scored_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.formats.method_names import (
    has_methods,
    names_methods,
    roundings,
    same_or_plain,
    without_method,
)
from autoquant_ray.report.expert_rows import by_format
from autoquant_ray.report.groups import GroupRow, method_section
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.solve import solve_run

PLAIN = ("wint4_afp16:max", "wint8_afp16")
_DASH = "\N{EN DASH}"
MENU = (*PLAIN, "wint4_afp16:mse", "wint4_afp16:weighted", "wint8_afp16:weighted")


def solved(folder: Path, formats: tuple[str, ...], **options: Any) -> RunDirectory:
    directory = put_scored_run(folder / "run", formats=formats)
    solve_run(directory, SolveOptions(**({"bits": 6} | options)), folder="")
    return directory


def report(directory: RunDirectory, name: str = "report.md") -> str:
    return directory.read_bytes(name).decode()


def scored_and_chosen(directory: RunDirectory) -> tuple[dict[tuple[str, str], float], Any]:
    """(group, format) -> score, and the solution's rows by module, by another Parquet reader."""
    scores = fastparquet.ParquetFile(directory.path("sensitivity.parquet")).to_pandas()
    manifest = fastparquet.ParquetFile(directory.path("manifest.parquet")).to_pandas()
    return scores.set_index(["group", "format"]).score.to_dict(), manifest.set_index("module")


def table(text: str, head: str) -> list[list[str]]:
    """Cells of the Markdown table below a headline, the row of heads first."""
    lines = [line for line in text.partition(f"\n## {head}")[2].splitlines() if line]
    start = next(n for n, line in enumerate(lines) if line.startswith("| "))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


class Cells(HTMLParser):
    """Rows of the table of groups: the text of every cell and its number."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, str | None]]] = []
        self._is_open = False
        self.feed(page[page.index('id="groups-table"') :].partition("</table>")[0])

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(("", dict(attrs).get("data-number")))
        self._is_open = tag in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._is_open and self.rows:
            text, number = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data.strip(), number)


def method_in(format_: str) -> str:
    """The method of a format of ``MENU``."""
    return format_.partition(":")[2] or "max"


def saved(scores: dict[tuple[str, str], float], group: str, chosen: str) -> float:
    base = chosen.partition(":")[0]
    return (
        scores[group, "wint4_afp16:max" if base == "wint4_afp16" else base] - scores[group, chosen]
    )


def test_every_layer_has_its_method_and_what_that_saves(tmp_path: Path) -> None:
    directory = solved(tmp_path, MENU, pins={"lm_head": "wint4_afp16:mse"})
    scores, chosen = scored_and_chosen(directory)
    heads, *rows = table(report(directory), "Layers")
    assert heads[-2:] == ["Method", "Saved"]
    methods = Counter()
    for name, *_, method, shown in rows:
        group, format_ = chosen.loc[name, "group"], chosen.loc[name, "format"]
        methods[method] += 1
        assert method == ("-" if format_ == "none" else method_in(format_))
        if method in ("-", "max"):
            assert shown == "-"
        else:
            assert float(shown) == pytest.approx(saved(scores, group, format_), rel=1e-4)
    assert methods["weighted"] > 5
    assert (methods["mse"], methods["-"]) == (1, 1), "the pinned head, the vision tower"


def test_groups_of_the_page_have_the_same_numbers(tmp_path: Path) -> None:
    directory = solved(tmp_path, MENU)
    scores, chosen = scored_and_chosen(directory)
    heads, *rows = Cells(report(directory, "report.html")).rows
    names = [text for text, _ in heads]
    method, at = names.index("Method"), names.index("Saved")
    for row in rows:
        group, format_ = row[0][0], chosen.loc[row[0][0], "format"]
        if format_ != "none":
            assert row[method][0] == method_in(format_)
        if method_in(format_) not in ("none", "max"):
            assert float(row[at][1] or "nan") == saved(scores, group, format_)
            assert float(row[at][0]) == pytest.approx(saved(scores, group, format_), rel=1e-4)
        elif format_ == "none":
            assert (row[method][0], row[at]) == (_DASH, (_DASH, ""))
    assert len(rows) == len(set(chosen.group))


def test_totals_per_method_are_those_of_the_groups(tmp_path: Path) -> None:
    pins = {"lm_head": "wint4_afp16:mse", "model.layers.1.mlp.down_proj": "wint4_afp16:max"}
    directory = solved(tmp_path, MENU, pins=pins)
    scores, chosen = scored_and_chosen(directory)
    groups = chosen.drop_duplicates("group").set_index("group")["format"].to_dict()
    weights = fastparquet.ParquetFile(directory.path("plan.parquet")).to_pandas()
    weights = weights.drop_duplicates("group").set_index("group").num_weights
    heads, *rows = table(report(directory), "Rounding")
    assert heads == [
        "Method",
        "Groups",
        "Weights",
        "Predicted loss",
        "Saved against plain rounding",
    ]
    assert {row[0] for row in rows} == {"weighted", "mse", "max"}
    assert rows[-1][0] == "mse", "it loses more than plain rounding: last"
    total = lost = 0.0
    for method, number, num_weights, loss, shown in rows:
        of_method = {
            group: format_
            for group, format_ in groups.items()
            if format_ != "none" and method_in(format_) == method
        }
        assert int(number) == len(of_method)
        assert int(num_weights.replace(",", "")) == sum(weights[group] for group in of_method)
        expected = math.fsum(scores[pair] for pair in of_method.items())
        assert float(loss) == pytest.approx(expected, rel=1e-3)
        if method == "max":
            assert shown == "-"
            continue
        assert float(shown) == pytest.approx(
            sum(saved(scores, *pair) for pair in of_method.items()), rel=1e-3
        )
        total, lost = total + float(shown), lost + expected
    text = report(directory).partition("\n## Rounding")[2]
    match = re.search(r"Together (\S+): .* to lose (\S+) in place of (\S+)\.\n", text)
    assert match is not None
    numbers = [float(number) for number in match.groups()]
    assert numbers == pytest.approx([total, total + lost, lost], rel=1e-3)
    assert text.partition("\n")[2].split("\n")[1] in report(directory, "report.html")


def test_method_without_a_plain_score_says_so(tmp_path: Path) -> None:
    directory = solved(tmp_path, ("wint4_afp16:weighted", "wint8_afp16"), bits=4.2)
    rows = {row[0]: row[-1] for row in table(report(directory), "Rounding")}
    assert rows["weighted"] == "plain not scored"
    assert "Together" not in report(directory)
    layers = {row[-2:][0]: row[-1] for row in table(report(directory), "Layers")}
    assert layers["weighted"] == "plain not scored"
    page = Cells(report(directory, "report.html")).rows
    assert ("plain not scored", "") in [cell for row in page for cell in row]


def without_algorithms(directory: RunDirectory) -> RunDirectory:
    """The run as earlier versions wrote it, when a bare name meant plain rounding."""
    record = directory.read_json("run.json")
    for entry in record["plan"]["formats"]:
        entry.pop("algorithm", None)
    directory.write_json("run.json", record)
    return directory


def test_menu_of_bare_names_says_how_they_are_rounded_once(tmp_path: Path) -> None:
    directory = solved(tmp_path, ("wint4_afp16", "wint8_afp16"))
    rows = {row[0]: row[-1] for row in table(report(directory), "Rounding")}
    assert rows == {
        "Method": "Saved against plain rounding",
        "weighted": "plain not scored",
        "max": "-",
    }
    assert "What that saves was not scored" in report(directory)
    assert table(report(directory), "Layers")[0][-1] == "Chosen"
    assert "Saved" not in [text for text, _ in Cells(report(directory, "report.html")).rows[0]]
    assert "What that saves was not scored" in report(directory, "report.html")


@pytest.mark.parametrize("is_old", [False, True], ids=["eight bits", "an earlier version"])
def test_menu_without_methods_has_no_word_of_them(tmp_path: Path, is_old: bool) -> None:
    if is_old:
        directory = put_scored_run(tmp_path / "run", formats=("wint4_afp16", "wint8_afp16"))
        solve_run(without_algorithms(directory), SolveOptions(bits=6), folder="")
    else:
        directory = solved(tmp_path, ("wfp8_afp16", "wint8_afp16"), bits=9)
    assert table(report(directory), "Layers")[0][-1] == "Chosen"
    for name in ("report.md", "report.html"):
        assert not {"Rounding", "Saved", "Method"} & set(
            re.findall(r"\w+", report(directory, name))
        )


def test_experts_shown_together_save_together() -> None:
    menu = resolve_formats(MENU, device="cpu")
    rounded = roundings([format_.to_json() for format_ in menu])
    scores = {
        f"mlp.experts.{n}": {
            "wint4_afp16:max": (1.0 + n, None),
            "wint4_afp16:weighted": (0.5, None),
        }
        for n in range(3)
    }
    rows = [
        GroupRow(
            name=name,
            modules=[name],
            num_weights=10,
            chosen="wint4_afp16:weighted",
            num_bytes=5,
            num_bits=4,
            share=0.1,
            sensitivity=1.0,
            scores=of_group,
            kept=None,
            note=None,
            rounding=rounded["wint4_afp16:weighted"],
        )
        for name, of_group in scores.items()
    ]
    (together,) = by_format(rows, {name: n for n, name in enumerate(scores)})
    assert together.saved == 0.5 + 1.5 + 2.5
    section = method_section(rows, "nats per token", is_per_layer=True)
    assert section is not None
    assert section.rows == [("weighted", "3", "30", "1.5", "4.5")]


def test_names_tell_methods_and_their_plain_format() -> None:
    names = ("wfp4_afp16:weighted", "wfp4_afp16", "wint4_afp16:mse", "wint4_afp16:max", "kv_fp8")
    names = (*names, "wint8_afp16:weighted", "INT4_AWQ_CFG", "wint4_afp16")
    menu = resolve_formats(names, device="cpu")
    rounded = roundings([format_.to_json() for format_ in menu])
    assert {name: (r.method, r.plain) for name, r in rounded.items()} == {
        "wfp4_afp16:weighted": ("weighted", None),
        "wfp4_afp16": ("weighted", None),
        "wint4_afp16": ("weighted", "wint4_afp16:max"),
        "wint4_afp16:mse": ("mse", "wint4_afp16:max"),
        "wint4_afp16:max": ("max", "wint4_afp16:max"),
        "wint8_afp16:weighted": ("weighted", None),
        "INT4_AWQ_CFG": ("awq_lite", None),
    }
    assert [without_method(name) for name in ("a:mse", "a:b", ":mse", "a")] == [
        "a",
        "a:b",
        ":mse",
        "a",
    ]
    assert names_methods(["a", "a:mse"])
    assert not names_methods(["a", "int4:g128", "kv_fp8"])
    assert roundings([{"name": "INT4"}, {"name": "INT4:mse"}]) == {}, "imported: names only"


def test_bare_name_in_an_earlier_run_is_plain(tmp_path: Path) -> None:
    names = ("wint4_afp16", "wint4_afp16:weighted", "wint8_afp16")
    menu = [format_.to_json() for format_ in resolve_formats(names, device="cpu")]
    menu[0].pop("algorithm")
    assert {name: (r.method, r.plain) for name, r in roundings(menu).items()} == {
        "wint4_afp16": ("max", "wint4_afp16"),
        "wint4_afp16:weighted": ("weighted", "wint4_afp16"),
        "wint8_afp16": ("max", "wint8_afp16"),
    }
    assert not has_methods([menu[0], menu[2]])
    assert has_methods([menu[0], menu[1]])


def test_formats_in_place_of_a_missing_method() -> None:
    menu = ["wint4_afp16", "wint4_afp16:max", "wint4_afp16:gptq", "wint8_afp16"]
    assert same_or_plain("wint4_afp16", menu) == "wint4_afp16"
    assert same_or_plain("wint4_afp16:awq", menu) == "wint4_afp16:max"
    assert same_or_plain("wint4_afp16:awq", ["wint4_afp16:gptq", "wint4_afp16"]) == "wint4_afp16"
    assert same_or_plain("wfp8_afp16", menu) is None
