"""Reports of a solution: what they say, what they show, and that it can be made again."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs_folder import EVIL
from scored_run import put_scored_run

from autoquant_ray.allocate.certainty.explain import explain_group
from autoquant_ray.allocate.certainty.explanation import note_lines, table_rows
from autoquant_ray.allocate.load import latency_of
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.cli.main import main
from autoquant_ray.cli.options import given_fields
from autoquant_ray.config.files import load_config
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.report.content import collect_content
from autoquant_ray.report.facts import MEANINGS
from autoquant_ray.report.groups import GroupRow
from autoquant_ray.report.heat import heat_maps
from autoquant_ray.report.html import render_html
from autoquant_ray.report.measured import merge_random
from autoquant_ray.report.reproduce import reproduction, scan_command, solve_command
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import SENSITIVITY_FILE
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import rewrite_reports, solve_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = put_scored_run(tmp_path_factory.mktemp("runs") / "run")
    solve_run(directory, SolveOptions(bits=6), folder="")
    return directory


def text_of(directory: RunDirectory, name: str = "report.md") -> str:
    return directory.read_bytes(name).decode()


# --- What is said


def test_tied_head_is_said_to_add_no_bytes(tmp_path: Path) -> None:
    directory = put_scored_run(tmp_path / "run")
    solve_run(directory, SolveOptions(bits=9, pins={"lm_head": "none"}), folder="")
    note = "lm_head in 16 bits is the input embedding too (a tied head) and adds no bytes"
    assert note not in text_of(directory, "report.html")
    record = directory.read_json("run.json")
    record["plan"]["tied_groups"] = ["lm_head"]
    directory.write_json("run.json", record)
    solve_run(directory, SolveOptions(bits=9), folder="")
    assert note in text_of(directory, "report.html")


def test_words_that_need_it_are_explained(run: RunDirectory) -> None:
    labels = [label for label, _ in collect_content(ScoredRun.read(RunState.open(run)), "").facts]
    assert set(MEANINGS) <= set(labels)
    page = unescape(text_of(run, "report.html"))
    for label, meaning in MEANINGS.items():
        assert re.search(f"<dt>{re.escape(label)}</dt>.*{re.escape(meaning)}", page), label


@pytest.mark.parametrize(("num_layers", "shown"), [(4, "0 1 2 3"), (13, "0 5 10")])
def test_strip_numbers_its_layers(tmp_path: Path, num_layers: int, shown: str) -> None:
    directory = put_scored_run(tmp_path / "run", num_layers=num_layers, formats=("wint4_afp16",))
    solve_run(directory, SolveOptions(bits=6), folder="")
    page = text_of(directory, "report.html")
    cells = re.findall(r"<td>(.*?)</td>", page.split('<tr class="layer-numbers">')[1])
    assert [cell for cell in cells[1 : num_layers + 1] if cell] == shown.split()


def test_predicted_loss_has_its_error_in_both_reports(run: RunDirectory) -> None:
    solution = run.read_json("manifest.json")["solution"]
    for name in ("report.md", "report.html"):
        match = re.search(
            r"(0\.\d+) ± (\S+) nats per token \(standard error of the total over shards\)",
            text_of(run, name),
        )
        assert match is not None
        assert float(match[1]) == pytest.approx(solution["predicted_kl_nats"], rel=1e-5)
        assert 0 < float(match[2]) < float(match[1])


def test_concerns_come_before_the_allocation(tmp_path: Path) -> None:
    directory = put_scored_run(tmp_path / "run", num_shards=4, config={"labels": "data"})
    solve_run(directory, SolveOptions(bits=4.5), folder="")
    text = text_of(directory)
    concerns = text[: text.index("## The solution")]
    for title in ("Below the range of the prediction", "Labels from the data", "Few shards"):
        assert f"**{title}.**" in concerns
        assert title in text_of(directory, "report.html")
    assert re.search(r"At 4\.4\d bits \(below 5\)", concerns)


def test_run_without_shards_has_a_bound_for_its_error(tmp_path: Path) -> None:
    directory = put_scored_run(tmp_path / "run")
    directory.delete("resampling.parquet")
    solve_run(directory, SolveOptions(bits=6), folder="")
    assert "(at most; sum of the scores' standard errors)" in text_of(directory)
    assert "Certainty" not in text_of(directory, "report.html")


def test_names_from_model_and_data_are_escaped(tmp_path: Path) -> None:
    changes = {"dataset": {"name": f"{EVIL}</script><!--"}}
    directory = put_scored_run(tmp_path / "run", model=EVIL, first_layer=f"{EVIL}.x", **changes)
    solve_run(directory, SolveOptions(bits=6), folder="")

    class Scripts(HTMLParser):
        count = 0

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.count += tag == "script"

    page = text_of(directory, "report.html")
    parser = Scripts()
    parser.feed(page)
    assert parser.count == 4, "two of the library, the data, and our own"
    assert EVIL not in page
    assert "<script>" not in text_of(directory).partition("## How to reproduce")[0]


# --- Heat map and table


def row(name: str, sensitivity: float | None, modules: tuple[str, ...] = ()) -> GroupRow:
    return GroupRow(
        name=name,
        modules=list(modules or (name,)),
        num_weights=1,
        chosen="wint4_afp16",
        num_bytes=1,
        num_bits=4,
        share=0.0,
        sensitivity=sensitivity,
        scores={},
        kept=None,
        note=None if sensitivity else "disabled",
    )


def test_heat_map_has_layers_down_and_kinds_across() -> None:
    rows = [
        row("m.layers.0.attn.q", 1e-3, ("m.layers.0.attn.q", "m.layers.0.attn.k")),
        row("m.layers.0.mlp.experts", 1.0),
        row("m.layers.1.attn.q", None),
        row("lm_head", 1e-6),
    ]
    heat = heat_maps(rows, [r.name for r in rows])
    assert heat is not None
    layers, alone = heat.maps
    assert layers.stack == "m.layers"
    assert layers.kinds == [("attn", ["q", "k"]), ("mlp", ["experts"])]
    assert [name for name, _ in layers.rows] == ["0", "1"]
    levels = [[None if cell is None else cell.level for cell in cells] for _, cells in layers.rows]
    assert levels == [[3, 6], [None, None]]
    assert layers.rows[1][1][1] is None, "no such module there"
    assert (alone.kinds, alone.rows[0][0]) == ([("", ["format"])], "lm_head")
    assert alone.rows[0][1][0] is not None
    assert alone.rows[0][1][0].level == 0
    assert heat.steps[0] == pytest.approx(1e-6)
    assert len(heat.steps) == 7


def test_scores_of_one_size_have_one_colour_and_none_no_map() -> None:
    heat = heat_maps([row("a.0.b", 0.5), row("a.1.b", 0.5)], ["a.0.b", "a.1.b"])
    assert heat is not None
    assert {cell.level for _, cells in heat.maps[0].rows for cell in cells if cell} == {0}
    assert heat_maps([row("a.0.b", None)], ["a.0.b"]) is None


def test_page_of_a_large_run_stays_below_its_limit(run: RunDirectory) -> None:
    content = collect_content(ScoredRun.read(RunState.open(run)), "")
    rows = content.groups * 200
    page = render_html(replace(content, groups=rows))
    assert len(page.encode()) < 5_000_000
    left_out = re.search(r"The (\d+) least sensitive groups are left out here", page)
    assert left_out is not None
    assert int(left_out[1]) + page.count('<tr data-format="') == len(rows)


def test_error_of_drawn_rows_stands_beside_that_over_the_shards(tmp_path: Path) -> None:
    directory = put_scored_run(tmp_path / "run")
    rows = directory.read_table(SENSITIVITY_FILE).to_pylist()
    for number, row in enumerate(rows):
        row["row_share"] = 0.4 if number % 2 else 1.0
        row["sampling_stderr"] = row["score_stderr"] * (0.04 + 0.05 * (number == 1)) * (number % 2)
    directory.write_table(SENSITIVITY_FILE, rows)
    state = RunState.open(directory)
    state.record.config |= {"sample_rows": "auto"}
    state.save()
    solve_run(directory, SolveOptions(bits=6), folder="")
    text = text_of(directory)
    share = np.mean([row["row_share"] for row in rows])
    assert f"labels from the model, {share:.0%} of the rows" in text
    assert (
        f"for {len(rows) // 2} of {len(rows)} scores; the error of the draw is 0.04 of a score's "
        "standard error over the shards (median), 0.09 at most" in text
    )
    explanation = explain_group(directory, rows[1]["group"])
    (shown,) = [row for row in table_rows(explanation) if row[0].split()[0] == rows[1]["format"]]
    assert f" ± {rows[1]['score_stderr']:.0e}, rows {rows[1]['sampling_stderr']:.0e}" in shown[3]
    assert any(line.startswith("rows: ") for line in note_lines(explanation))


# --- How to reproduce


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"disable": ["*.0.mlp.*", "lm_head"], "pack": True, "bits": None, "bytes": 123456789},
        {"model": "/a folder/it's", "stop_when_stable": 0.01, "workers": 3, "sample_rows": 0.25},
        {"keep_rounded": False, "skip_bad_samples": True, "sample_rows": "auto"},
        {"read_as": "text", "node_labels": {"pool": "a", "zone": "b"}, "hold_out": "20%"},
        {"data": {"code": "a b.jsonl", "chat": "c.jsonl"}, "wait_for_workers": 90.0},
    ],
)
def test_command_gives_the_same_config(changes: dict[str, Any], run: RunDirectory) -> None:
    config = run.read_json("run.json")["config"] | changes
    words = shlex.split(scan_command(config))
    assert words[:2] == ["autoquant-ray", "scan"]
    flags = main.commands["scan"].make_context("scan", words[2:]).params  # type: ignore[attr-defined]
    fields = {k: v for k, v in flags.items() if k in ScanConfig.model_fields}
    assert load_config(ScanConfig, None, given_fields(fields)) == ScanConfig(**config)


CUSTOM = {"mine": {"weight": {"num_bits": 4, "block_sizes": {"-1": 64}}, "input": None}}


@pytest.mark.parametrize(
    "changes",
    [
        {"custom_formats": CUSTOM, "formats": ["mine", "wint8_aint8"]},
        {"runtime_env": {"pip": ["some-package"], "env_vars": {"A": "b"}}},
    ],
)
def test_config_of_the_page_is_a_file_for_scan(changes: dict[str, Any], tmp_path: Path) -> None:
    directory = put_scored_run(tmp_path / "run")
    solve_run(directory, SolveOptions(bits=6), folder="")
    state = RunState.open(directory)
    state.record.config |= changes
    made = collect_content(ScoredRun.read(state), "").reproduction
    assert made.commands == ["autoquant-ray scan --config scan.yaml"]
    file = tmp_path / "scan.yaml"
    file.write_text(made.config)
    assert load_config(ScanConfig, str(file), {}) == ScanConfig(**state.record.config)


def test_command_of_a_speed_and_of_domains() -> None:
    options = SolveOptions(
        latency=latency_of("h100", batch=8, tokens_per_second=1500.0),
        domains={"code": 0.75, "chat": 0.25},
        cost="active_moe",
    )
    text = solve_command("runs/a", options)
    assert text == (
        "autoquant-ray solve runs/a --cost active_moe --domains chat=0.25,code=0.75 "
        "--latency h100 --batch 8 --context 1024 --tokens-per-second 1500.0"
    )
    context = main.commands["solve"].make_context("solve", shlex.split(text)[2:])  # type: ignore[attr-defined]
    assert (context.params["latency"], context.params["batch"]) == ("h100", 8)
    assert context.params["domains"] == options.domains
    budget = options.to_json()
    budget["latency"]["hardware"]["name"] = "another card"
    other = SolveOptions.from_json(budget)
    assert "--latency hardware.yaml" in solve_command("runs/a", other)


def test_another_budget_has_its_command(run: RunDirectory) -> None:
    options = SolveOptions(
        bits=9.5,
        max_formats=4,
        pins={"lm_head": "none"},
        allow={"*.down_proj": ("wint8_afp16", "none")},
    )
    solution = solve_run(run, options)
    text = text_of(run, f"solutions/{solution.name}/report.md")
    assert (
        "$ autoquant-ray solve runs/some-run --bits 9.5 --max-formats 4 --pin lm_head=none "
        "--allow '*.down_proj=wint8_afp16,none'" in text
    )
    assert "3f" * 16 in text
    assert "torch 2.13.0" in text


def test_report_again_gives_the_same_bytes(run: RunDirectory) -> None:
    before = {name: text_of(run, name) for name in ("report.md", "report.html")}
    rewrite_reports(run)
    assert {name: text_of(run, name) for name in before} == before
    assert (
        render_html(collect_content(ScoredRun.read(RunState.open(run)), ""))
        == before["report.html"]
    )


def test_commands_of_an_allocation_made_in_steps(tmp_path: Path) -> None:
    """Scan, solve, audit, refine: each with what it was given."""
    budget = {
        "bits": 6.0,
        "bytes": None,
        "bits_over": "searched",
        "cost": "storage",
        "max_formats": None,
        "pins": {},
        "allow": {},
    }
    audited = {
        "budget": budget | {"max_formats": 9},
        "made_from": {"command": "evaluate", "solution": "bits-6.00", "options": {"audit": 4}},
    }
    refined = {
        "budget": budget | {"max_formats": 9},
        "made_from": {
            "command": "refine",
            "solution": "bits-6.00-audited",
            "options": {"samples": 32, "trials": 20, "seed": 3},
        },
    }
    manifests = {"bits-6.00": {"budget": budget}, "bits-6.00-audited": audited}
    run = RunState.open(put_scored_run(tmp_path / "run")).record
    made = reproduction(run, refined, "bits-6.00-audited-refined", manifests.__getitem__)
    assert made.commands[1:] == [
        "autoquant-ray solve runs/some-run --bits 6.0",
        "autoquant-ray evaluate runs/some-run --solution bits-6.00 --audit 4",
        "autoquant-ray refine runs/some-run --solution bits-6.00-audited --samples 32 --trials 20 "
        "--seed 3",
    ]


def test_rivals_of_a_broken_allocation_may_break_too() -> None:
    rows = [
        {"name": "solution", "kl_mean": math.inf, "kl_above_solution": 0.0, "kl_stderr": None},
        {"name": "random 1", "kl_mean": math.inf, "kl_above_solution": math.inf, "kl_stderr": None},
        {"name": "random 2", "kl_mean": 0.5, "kl_above_solution": -math.inf, "kl_stderr": None},
    ]
    assert math.isnan(merge_random(rows)[-1]["kl_above_solution"])
