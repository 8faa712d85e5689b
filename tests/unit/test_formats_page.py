"""The pages of formats: their tables are those of the code, and their example can be planned."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autoquant_ray.cli.main import main
from autoquant_ray.formats.gguf_types import GGUF_WEIGHTS
from autoquant_ray.formats.menu import PAIRS, closest_formats, known_formats
from autoquant_ray.formats.numbers import describe

DOCS = Path(__file__).parents[2] / "docs"


def test_documented_tables_are_those_of_the_code(docs: Any) -> None:
    pages = [path.read_text("utf-8") for path in (docs.FORMATS_PAGE, docs.CACHES_PAGE)]
    assert pages == [docs.update(page) for page in pages], "run: python docs/update.py"
    names = [
        name
        for row in "".join(pages).splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    assert sorted(names) == sorted(known_formats())
    assert names[: len(PAIRS)] == list(PAIRS)


def test_every_format_that_runs_anywhere_runs_on_cpu(docs: Any) -> None:
    rows = docs.formats_table().splitlines()[2:]
    assert {row.rsplit("|", 2)[1].strip() for row in rows} == {"here", "ModelOpt", "ggml"}


def test_example_of_custom_formats_can_be_planned(model_folder: Any, tmp_path: Path) -> None:
    page = (DOCS / "own-formats.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    config = tmp_path / "formats.yaml"
    config.write_text(example)
    arguments = ["plan", str(model_folder("llama")), "--config", str(config)]
    result = CliRunner().invoke(main, [*arguments, "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    bits = {row["format"]: row["weight_bits"] for row in json.loads(result.stdout)["groups"]}
    assert bits["mxfp6_e2m3"] == pytest.approx(6.25, abs=0.1)
    assert bits["int4_block64"] == pytest.approx(4.25, abs=0.1)
    assert bits["int4_searched"] == bits["int4_block64"]


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        (None, "16 bits"),
        ({"num_bits": 8, "axis": 0}, "int8, a scale per output channel"),
        ({"num_bits": (4, 3), "axis": None}, "e4m3, a scale per tensor"),
        ({"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}, "int8, a scale per token"),
        ({"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 64}}, "e4m3, blocks of 64 x 128"),
        (GGUF_WEIGHTS["q4_k"], "ggml's q4_k, blocks of 256"),
        (
            {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
            "e2m1, blocks of 16, e4m3 scales",
        ),
    ],
)
def test_quantizer_in_words(attributes: Any, words: str) -> None:
    assert describe(attributes) == words


def test_closest_formats_spells_alike_where_none_contains_the_name() -> None:
    assert closest_formats("wint4_afp61", ["wfp8_afp8", "wint4_afp16"])[0] == "wint4_afp16"
    assert closest_formats("zzz", ["wfp8_afp8"]) == []
