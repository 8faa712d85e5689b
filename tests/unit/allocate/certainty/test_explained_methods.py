"""``explain`` of a menu with methods of rounding: a row per method, and what it saves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fastparquet
import pytest
from command_line import run
from explanations import by_format, explained
from scored_run import put_scored_run

from autoquant_ray.allocate.certainty.explain import explain_group
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.solve import solve_run

MENU = ("wint4_afp16:max", "wint4_afp16:mse", "wint4_afp16:weighted", "wint8_afp16:weighted")
GROUP = "model.layers.1.mlp.down_proj"


def solved(folder: Path, formats: tuple[str, ...] = MENU) -> RunDirectory:
    directory = put_scored_run(folder / "run", formats=formats)
    solve_run(directory, SolveOptions(bits=6), folder="")
    return directory


def test_every_method_has_a_row_with_what_it_saves(tmp_path: Path) -> None:
    directory = solved(tmp_path)
    table = fastparquet.ParquetFile(directory.path("sensitivity.parquet")).to_pandas()
    scores = table[table.group == GROUP].set_index("format").score
    entries = by_format(explained(directory, GROUP))
    assert list(entries) == ["none", *MENU]
    methods = {name: (entry["method"], entry["saved"]) for name, entry in entries.items()}
    plain = scores["wint4_afp16:max"]
    assert methods == {
        "none": (None, None),
        "wint4_afp16:max": ("max", 0.0),
        "wint4_afp16:mse": ("mse", plain - scores["wint4_afp16:mse"]),
        "wint4_afp16:weighted": ("weighted", plain - scores["wint4_afp16:weighted"]),
        "wint8_afp16:weighted": ("weighted", None),
    }


def row(output: str, name: str) -> list[str]:
    (line,) = (line for line in output.splitlines() if line.strip().startswith(f"{name} "))
    return line.split()


def test_table_shows_the_saving_and_its_share(tmp_path: Path) -> None:
    directory = solved(tmp_path)
    entries = by_format(explained(directory, GROUP))
    shown = run("explain", directory.uri, GROUP).output
    assert "Saved" in row(shown, "Format")
    assert "Saved: score of the same format rounded plainly (max), minus its own" in shown
    for name in ("wint4_afp16:mse", "wint4_afp16:weighted"):
        saved, plain = entries[name]["saved"], entries["wint4_afp16:max"]["score"]
        assert f"{saved:.2e} ({saved / plain:.0%})" in " ".join(row(shown, name))
    assert "plain not scored" in " ".join(row(shown, "wint8_afp16:weighted"))
    page = explain_group(directory, GROUP)._repr_html_()
    assert re.findall(r"<th>(\w+)", page)[3:6] == ["Score", "Saved", "Resamples"]


@pytest.mark.parametrize("formats", [("wint4_afp16", "wint8_afp16")])
def test_menu_without_methods_has_no_column_for_them(
    tmp_path: Path, formats: tuple[str, ...]
) -> None:
    directory = solved(tmp_path, formats)
    entries: dict[str, Any] = by_format(explained(directory, GROUP))
    assert [entries[name]["method"] for name in formats] == ["weighted", "max"]
    assert "Saved" not in run("explain", directory.uri, GROUP).output
