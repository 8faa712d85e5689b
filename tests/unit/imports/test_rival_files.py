"""Plans that AutoScheme and HIGGS really wrote, for a Llama of two layers, as rivals of a run.

``files/auto_scheme.json``: ``quantization_config.json`` of auto-round 0.16.1, ``AutoScheme(6.0,
"W4A16,W8A16")``. ``files/higgs_*.json``: ``get_higgs_config(...).model_dump_json()`` of
llmcompressor 0.14.1a20261020 at 6 bits, of W4A16 and W8A16, and of NVFP4A16 and FP8_DYNAMIC.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scored_run import put_scored_run

from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.cli.main import main
from autoquant_ray.errors import DataError
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.evaluate.table import Measured, evaluation_rows
from autoquant_ray.report.measured import verdict
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run

FILES = Path(__file__).parent / "files"
FP8 = "FP8_PER_CHANNEL_PER_TOKEN_CFG"
MENU = ("wint4_afp16", "wint8_afp16", "wfp4_afp16", "wfp8_afp8", FP8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("rivals") / "run"
    directory = put_scored_run(folder, formats=MENU, num_layers=2)
    solve_run(directory, SolveOptions(bits=6.0), folder="")
    return directory


def rivals(run: RunDirectory, file: Path) -> list[Candidate]:
    """The candidates that a file gives, without the run's own solution."""
    return collect_candidates(ScoredRun.read(RunState.open(run)), "", (str(file),))[1:]


def by_module(run: RunDirectory, candidate: Candidate) -> dict[str, str]:
    groups = ScoredRun.read(RunState.open(run)).problem.searched
    return {m: candidate.formats[g.name] for g in groups for m in g.module_names}


def test_plan_of_auto_scheme_is_read_as_it_is_written(run: RunDirectory) -> None:
    rival, _ = rivals(run, FILES / "auto_scheme.json")
    formats, content = by_module(run, rival), json.loads((FILES / "auto_scheme.json").read_text())
    layers = {name: entry["bits"] for name, entry in content["extra_config"].items()}
    ours = {4: "wint4_afp16", 8: "wint8_afp16", 16: "none"}
    assert {name: formats[name] for name in layers} == {n: ours[b] for n, b in layers.items()}
    attention = {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"}
    assert {formats[name] for name in attention} == {"wint8_afp16"}, "k has 4 bits, q and v 8"
    assert formats["model.layers.1.mlp.gate_proj"] == "wint4_afp16", "the file's default"


@pytest.mark.parametrize(
    ("file", "ours"),
    [
        ("higgs_int.json", {4: "wint4_afp16", 8: "wint8_afp16"}),
        ("higgs_float.json", {4: "wfp4_afp16", 8: FP8}),
    ],
)
def test_plan_of_higgs_is_read_as_it_is_written(
    run: RunDirectory, caplog: pytest.LogCaptureFixture, file: str, ours: dict[int, str]
) -> None:
    with caplog.at_level(logging.INFO):
        rival, _ = rivals(run, FILES / file)
    formats, content = by_module(run, rival), json.loads((FILES / file).read_text())
    named: set[str] = set()
    for group in content["config_groups"].values():
        names = {t.removeprefix("re:^").rstrip("$").replace("\\", "") for t in group["targets"]}
        assert {formats[name] for name in names} == {ours[group["weights"]["num_bits"]]}
        assert f"is {ours[group['weights']['num_bits']]} here, {len(names)} layers" in caplog.text
        named |= names
    assert {formats[name] for name in formats.keys() - named} == {"none"}
    assert formats.keys() - named == {"lm_head"}
    inside = {"model_type": "llama", "quantization_config": content}
    path = Path(run.uri).parent / f"inside-{file}"
    path.write_text(json.dumps(inside))
    assert rivals(run, path)[0].formats == rival.formats


def test_formats_without_the_same_scales_are_those_of_the_same_numbers(
    tmp_path: Path,
) -> None:
    directory = put_scored_run(
        tmp_path / "run", formats=("wfp4_afp16", "wfp8_afp8", "wint4_afp8"), num_layers=2
    )
    solve_run(directory, SolveOptions(bits=7.0), folder="")
    rival, _ = rivals(directory, FILES / "higgs_float.json")
    assert set(rival.formats.values()) == {"wfp4_afp16", "wfp8_afp8", "none"}


@pytest.mark.parametrize("file", ["auto_scheme.json", "higgs_int.json", "higgs_float.json"])
def test_the_run_is_compared_at_the_same_bytes(run: RunDirectory, file: str) -> None:
    rival, equal = rivals(run, FILES / file)
    assert equal.name == f"at the size of file {file}"
    assert equal.weight_bytes <= rival.weight_bytes
    assert equal.predicted_kl <= rival.predicted_kl
    problem = ScoredRun.read(RunState.open(run)).problem
    saved = min(
        problem.groups[group].cost(other, "storage") - problem.groups[group].cost(chosen, "storage")
        for group, chosen in equal.formats.items()
        for other in problem.groups[group].rows
        if problem.groups[group].cost(other, "storage")
        > problem.groups[group].cost(chosen, "storage")
    )
    assert rival.weight_bytes - equal.weight_bytes < saved, "no group could take more bytes"


def test_nothing_within_the_constraints_is_as_small(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = put_scored_run(tmp_path / "run", formats=MENU, num_layers=2)
    allow = {"*": ("none",)}
    solve_run(directory, SolveOptions(bits=16.0, allow=allow), folder="")
    (_,) = rivals(directory, FILES / "higgs_int.json")
    assert "nothing is measured at the size of file higgs_int.json" in caplog.text


def test_files_of_one_name_are_told_apart_and_each_is_compared_at_its_size(
    run: RunDirectory, tmp_path: Path
) -> None:
    """Tools write ``config.json`` into their folders."""
    files = {"ar/config.json": "auto_scheme.json", "h/config.json": "higgs_int.json"}
    for name, original in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text((FILES / original).read_text())
    alone = {name: rivals(run, FILES / original) for name, original in files.items()}
    paths = [str(tmp_path / name) for name in files]
    again = f"{tmp_path}/ar/../ar/config.json"
    candidates = collect_candidates(
        ScoredRun.read(RunState.open(run)), "", (*paths, again, "uniform", paths[0])
    )
    by_name = {candidate.name: candidate for candidate in candidates}
    assert len(by_name) == len(candidates)
    assert sum("file" in name for name in by_name) == 4
    for name, (rival, equal) in alone.items():
        assert by_name[f"file {name}"].formats == rival.formats
        assert by_name[f"at the size of file {name}"].formats == equal.formats


def test_types_of_gguf_files_are_no_counterparts(tmp_path: Path) -> None:
    directory = put_scored_run(tmp_path / "run", formats=("q4_k", "wint8_afp16"), num_layers=2)
    solve_run(directory, SolveOptions(bits=7.0), folder="")
    with pytest.raises(DataError, match="it could take wint8_afp16"):
        rivals(directory, FILES / "higgs_int.json")


def refused(run: RunDirectory, content: Any) -> str:
    path = Path(run.uri).parent / "refused.json"
    path.write_text(json.dumps(content))
    result = CliRunner().invoke(main, ["evaluate", run.uri, "--against", str(path)])
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1
    assert len(result.output.strip()) <= 400
    return result.output


def test_what_has_no_counterpart_is_refused_by_name(run: RunDirectory) -> None:
    content = json.loads((FILES / "higgs_int.json").read_text())
    group = content["config_groups"]["group_0"]

    def changed(place: dict[str, Any], **values: Any) -> dict[str, Any]:
        before = copy.deepcopy(place)
        place |= values
        text = copy.deepcopy(content)
        place.clear()
        place |= before
        return text

    assert "model.layers.0.mlp.gate_proj has {'bits': 3, " in refused(
        run, changed(group["weights"], num_bits=3)
    )
    assert "weights are asymmetric" in refused(run, changed(group["weights"], symmetric=False))
    assert "{'num_bits': 'four'" in refused(run, changed(group, weights={"num_bits": "four"}))
    assert "target 're:^vision' fits no layer" in refused(
        run, changed(group, targets=["re:^vision"])
    )
    assert "'re:(' is no regular expression" in refused(run, changed(group, targets=["re:("]))
    assert "has no list of targets" in refused(run, changed(group, targets="Linear"))
    assert "input_activations 'x' have no num_bits" in refused(
        run, changed(group, input_activations="x")
    )
    assert "type 'nf4' is unknown; known: int, float" in refused(
        run, changed(group["weights"], type="nf4")
    )
    assert "kv_cache_scheme {'num_bits': 8} has no counterpart" in refused(
        run, changed(content, kv_cache_scheme={"num_bits": 8})
    )
    for ignore in ("lm_head", 7):
        assert f"ignore {ignore!r} is no list" in refused(run, changed(content, ignore=ignore))
    assert "config_groups {} has no groups" in refused(run, changed(content, config_groups={}))


def test_difference_at_the_same_bytes_is_paired() -> None:
    names = ("solution", "file a.json", "at the size of file a.json")
    candidates = [
        Candidate(name=n, formats={"g": n}, predicted_kl=1.0, weight_bytes=8.0, effective_bits=4.0)
        for n in names
    ]
    losses_S = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 8.0, 9.0], [4.0, 5.0, 7.0, 8.0]])
    measured = [
        Measured(
            kl_N=np.repeat(kl_S / 2, 2),
            kl_S=kl_S,
            loss=1.0,
            reference_loss=1.0,
            num_agreeing=0,
            tokens_S=np.full(4, 2.0),
        )
        for kl_S in losses_S
    ]
    labels = {"solution": "", "dataset": "d", "data_key": "k"}
    rows = evaluation_rows(candidates, measured, labels)
    assert [row["kl_above_equal"] for row in rows] == [None, 0.5, None]
    assert rows[1]["kl_above_equal_stderr"] == pytest.approx(0.0, abs=1e-12)
    text = verdict(rows)
    assert "file a.json loses 0.5 ± " in text
    assert "nats per token more than what this run chooses at its 8 bytes." in text
    same = verdict([rows[0], rows[1] | {"kl_above_equal": 0.0}])
    assert "file a.json loses exactly what this run's choice at its 8 bytes loses." in same
