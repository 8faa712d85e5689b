"""``import``: a manifest from a real ``mtq.auto_quantize`` run, solved as ModelOpt does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pyarrow.parquet as pq
import pytest
from command_line import refusal, run
from manifests import UNSEARCHED

NAMES_BY_BITS = {4: "INT4_AWQ_CFG", (4, 3): "FP8_DEFAULT_CFG", None: "none"}


def layers(manifest: dict[str, Any]) -> list[str]:
    """Module names in the manifest's order."""
    return [key.removesuffix(".quant_recipe") for key in manifest["layer_sensitivity"]]


def modelopt_formats(search_state: dict[str, Any], bits: float) -> dict[str, str]:
    """Format of every layer after ModelOpt's own re-solve for another budget."""
    config = mtq.get_auto_quantize_config(search_state, {"effective_bits": bits})
    weight_bits = {
        entry["quantizer_name"].removesuffix(".weight_quantizer"): entry["cfg"]["num_bits"]
        for entry in config["quant_cfg"]
        if entry["quantizer_name"].endswith(".weight_quantizer") and entry.get("cfg")
    }
    return {
        name.removesuffix(".quant_recipe"): NAMES_BY_BITS[
            weight_bits.get(name.removesuffix(".quant_recipe"))
        ]
        for name in search_state["candidate_stats"]
    }


def total(search_state: dict[str, Any], formats: dict[str, str], column: str) -> float:
    """Sum of ModelOpt's scores or costs over an allocation."""
    sums = 0.0
    for name, stats in search_state["candidate_stats"].items():
        names = [
            str(recipe).partition("(")[0].replace("NONE", "none") for recipe in stats["formats"]
        ]
        sums += stats[column][names.index(formats[name.removesuffix(".quant_recipe")])]
    return sums


def chosen(run_folder: Path, solution: str = "") -> dict[str, str]:
    """Module -> format of a written solution, in file order."""
    rows = pq.read_table(run_folder / solution / "manifest.parquet").to_pylist()
    return {row["module"]: row["format"] for row in rows}


def test_manifest_of_modelopt_has_the_expected_shape(manifest: dict[str, Any]) -> None:
    """The other tests mean nothing if ModelOpt stopped writing its formats in this way."""
    entries = manifest["layer_sensitivity"]
    assert f"{UNSEARCHED}.quant_recipe" in entries
    assert entries[f"{UNSEARCHED}.quant_recipe"]["formats"] == ["NONE(effective-bits: 16.0)"]
    assert entries["model.layers.0.self_attn.o_proj.quant_recipe"]["formats"] == [
        "INT4_AWQ_CFG(effective-bits: 4.0)",
        "FP8_DEFAULT_CFG(effective-bits: 8.0)",
        "NONE(effective-bits: 16.0)",
    ]
    assert entries["model.layers.0.self_attn.o_proj.quant_recipe"]["costs"] == [1024, 2048, 4096]


def test_import_solution_equals_modelopt_best(imported: Path, search_state: dict[str, Any]) -> None:
    best = search_state["best"]
    solution = json.loads((imported / "manifest.json").read_text())["solution"]
    assert solution["score"] == pytest.approx(best["score"], rel=1e-12)
    assert solution["is_satisfied"] is best["is_satisfied"] is True
    effective = best["constraints"]["effective_bits"]
    assert solution["modelopt_effective_bits"] == pytest.approx(effective, rel=1e-12)
    assert solution["effective_bits_all"] == pytest.approx(effective, rel=1e-12)
    expected = {
        name.removesuffix(".quant_recipe"): str(recipe).partition("(")[0].replace("NONE", "none")
        for name, recipe in best["recipe"].items()
    }
    assert chosen(imported) == expected


@pytest.mark.parametrize("bits", [6.0, 7.0, 8.5, 12.0, 16.0])
def test_solve_of_import_equals_modelopt_resolve(
    bits: float, imported: Path, search_state: dict[str, Any]
) -> None:
    options = ("--bits", bits, "--bits-over", "all", "--cost", "modelopt", "--json")
    result = run("solve", imported, *options)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    theirs = modelopt_formats(search_state, bits)
    assert printed["score"] == pytest.approx(total(search_state, theirs, "scores"), rel=1e-12)
    ours = chosen(imported, f"solutions/{printed['name']}")
    assert printed["score"] == pytest.approx(total(search_state, ours, "scores"), rel=1e-12)
    weights = sum(max(s["costs"]) for s in search_state["candidate_stats"].values())
    effective = 16 * total(search_state, ours, "costs") / weights
    assert printed["modelopt_effective_bits"] == pytest.approx(effective, rel=1e-12)
    assert effective <= bits


def test_solve_of_import_writes_a_named_solution(imported: Path) -> None:
    result = run("solve", imported, "--bits", 9)
    assert result.exit_code == 0, result.output
    folder = imported / "solutions" / "bits-9.00"
    names = {path.name for path in folder.iterdir()}
    assert names == {"manifest.json", "manifest.parquet", "report.md", "report.html"}
    written = json.loads((folder / "manifest.json").read_text())
    assert written["budget"]["bits"] == 9
    assert written["model"]["name"] == "example/small-llama"
    assert written["dataset"]["name"] == "random-tokens"
    assert written["solution"]["effective_bits"] <= 9
    assert written["solution"]["predicted_kl_nats"] is None
    assert written["quantization_config"] is None


def test_losses_of_an_import_have_no_unit(imported: Path, tmp_path: Path) -> None:
    shown = run("frontier", imported, "--points", 3)
    assert shown.exit_code == 0, shown.output
    assert "imported, no unit" in " ".join(shown.stdout.split())
    assert "nats" not in shown.stdout
    for words in (("--target-kl", "0.5"), ("--target-ppl-increase", "2%")):
        line = refusal(run("frontier", imported, *words))
        assert "its scores have no unit" in line
        assert "solve it with --bits" in line
    file = tmp_path / "plan.json"
    file.write_text('{"lm_head": {"bits": 4}}')
    line = refusal(run("import", file, "--into", imported))
    assert "was imported and only names its formats" in line
    assert "--engine" not in line


def test_import_keeps_the_order_of_layers(imported: Path, manifest: dict[str, Any]) -> None:
    assert list(chosen(imported)) == layers(manifest)
    plan = pq.read_table(imported / "plan.parquet").column("group").to_pylist()
    assert list(dict.fromkeys(plan)) == layers(manifest)


def test_import_order_follows_the_file_not_the_alphabet(
    manifest: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    entries = manifest["layer_sensitivity"]
    manifest["layer_sensitivity"] = dict(reversed(entries.items()))
    assert run("import", write(manifest), "--out", tmp_path / "run").exit_code == 0
    assert list(chosen(tmp_path / "run")) == layers(manifest)


def test_import_keeps_scores_and_costs(imported: Path, manifest: dict[str, Any]) -> None:
    scores = {
        (row["group"], row["format"]): row["score"]
        for row in pq.read_table(imported / "sensitivity.parquet").to_pylist()
    }
    plan = pq.read_table(imported / "plan.parquet").to_pylist()
    costs = {(row["group"], row["format"]): row["modelopt_cost"] for row in plan}
    bits = {(row["group"], row["format"]): row["weight_bits"] for row in plan}
    for key, entry in manifest["layer_sensitivity"].items():
        name = key.removesuffix(".quant_recipe")
        for text, score, cost in zip(*entry.values(), strict=True):
            format_ = text.partition("(")[0].replace("NONE", "none")
            assert costs[name, format_] == cost
            assert bits[name, format_] == float(text.rpartition(" ")[2].rstrip(")"))
            assert format_ == "none" or scores[name, format_] == score


def test_import_layer_with_only_none_is_not_searched(imported: Path) -> None:
    plan = pq.read_table(imported / "plan.parquet").to_pylist()
    assert {row["group"] for row in plan if not row["is_searched"]} == {UNSEARCHED}
    assert [row["format"] for row in plan if row["group"] == UNSEARCHED] == ["none"]
    scored = pq.read_table(imported / "sensitivity.parquet").column("group").to_pylist()
    assert UNSEARCHED not in scored
    assert chosen(imported)[UNSEARCHED] == "none"
    solution = json.loads((imported / "manifest.json").read_text())["solution"]
    assert solution["effective_bits"] < solution["effective_bits_all"]


def test_import_report_lists_every_layer_unsearched_last(
    imported: Path, manifest: dict[str, Any]
) -> None:
    text = (imported / "report.md").read_text()
    table = text.partition("## Layers")[2].partition("## Scores")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == ["Layer", "Num Bits", "Sensitivity", "Size Cost", "Chosen"]
    names = [row[0] for row in rows[1:]]
    assert sorted(names) == sorted(layers(manifest))
    assert names[-1] == UNSEARCHED
    largest = {
        key.removesuffix(".quant_recipe"): max(entry["scores"])
        for key, entry in manifest["layer_sensitivity"].items()
    }
    assert names[:-1] == sorted(names[:-1], key=lambda name: -largest[name])
    by_name = {row[0]: row for row in rows[1:]}
    for name, format_ in chosen(imported).items():
        assert by_name[name][4].startswith(format_)
    assert "example/small-llama" in text
    assert "random-tokens" in text
    html = (imported / "report.html").read_text()
    assert all(f">{name}<" in html for name in layers(manifest))


@pytest.mark.parametrize("says", ["constraints", "nothing"])
def test_import_of_a_missed_target_takes_the_bits_that_were_reached(
    says: str,
    search: Any,
    search_state: dict[str, Any],
    manifest: dict[str, Any],
    write: Any,
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="minimum achievable effective bits") as refused:
        search(4.0)  # ModelOpt 0.47 stops there, earlier ones wrote what they reached
    costs = [stats["costs"] for stats in search_state["candidate_stats"].values()]
    reached = 16 * sum(map(min, costs)) / sum(map(max, costs))
    assert f"is {reached:.4f}." in str(refused.value)
    manifest["scheme"]["auto_quantize_bits"] = 4.0
    manifest["autoquant_state"] = {"is_satisfied": False}
    if says == "constraints":
        manifest["autoquant_state"]["constraints"] = {"effective_bits": reached}
    result = run("import", write(manifest), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert written["budget"]["bits"] == pytest.approx(reached, rel=1e-12)
    assert written["solution"]["effective_bits_all"] == pytest.approx(reached, rel=1e-12)
    note = "its target of 4 bits was missed (is_satisfied: false), so the budget is the "
    note += f"{reached:.4f} bits that were reached"
    assert note in result.stderr
    assert note in (tmp_path / "run" / "report.md").read_text()


def test_import_without_scheme_uses_the_constraint(
    manifest: dict[str, Any], write: Any, tmp_path: Path, search_state: dict[str, Any]
) -> None:
    del manifest["scheme"]
    assert run("import", write(manifest), "--out", tmp_path / "run").exit_code == 0
    written = json.loads((tmp_path / "run" / "manifest.json").read_text())
    effective = search_state["best"]["constraints"]["effective_bits"]
    assert written["budget"]["bits"] == effective
    assert written["solution"]["score"] == pytest.approx(search_state["best"]["score"])


def test_import_overwrite_replaces_the_run(
    imported: Path, manifest: dict[str, Any], write: Any
) -> None:
    assert run("solve", imported, "--bits", 9).exit_code == 0
    assert run("import", write(manifest), "--out", imported).exit_code == 2
    assert (imported / "solutions" / "bits-9.00").is_dir()
    result = run("import", write(manifest), "--out", imported, "--overwrite")
    assert result.exit_code == 0, result.output
    assert not (imported / "solutions").exists()


def test_import_overwrite_with_broken_manifest_keeps_the_run(
    imported: Path, manifest: dict[str, Any], write: Any
) -> None:
    before = {path: path.read_bytes() for path in imported.rglob("*") if path.is_file()}
    manifest["scheme"]["auto_quantize_bits"] = 17
    assert run("import", write(manifest), "--out", imported, "--overwrite").exit_code == 2
    assert {path: path.read_bytes() for path in imported.rglob("*") if path.is_file()} == before


def test_import_overwrite_of_a_folder_that_is_no_run_is_refused(
    manifest: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"cat")
    result = run("import", write(manifest), "--out", other, "--overwrite")
    assert result.exit_code == 2
    assert str(other) in result.stderr
    assert [path.name for path in other.iterdir()] == ["cat.jpg"]
