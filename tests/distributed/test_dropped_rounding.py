"""Scans with ``--keep-rounded no``: the same allocation, nothing fitted left, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FORMATS = "wint4_g32_afp16:max,wint4_g32_afp16:weighted,wint4_g32_afp16:gptq,wfp8_afp8"
EXTRA = ("--formats", FORMATS, "--samples", "4", "--shard-samples", "1", "--disable", "lm_head")


def fits_of(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.glob("rounding*/**/*.parquet")) + [
        path.name for path in run.glob("rounding.parquet")
    ]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, run_command: Any, scan_arguments: Any
) -> dict[str, Path]:
    """A run that kept its fits, and one that dropped them."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("yes", "no"):
        words = scan_arguments(folder / name, *EXTRA, "--bits", "5", "--keep-rounded", name)
        done = run_command(*words)
        assert done.returncode == 0, done.stderr
    return {name: folder / name for name in ("yes", "no")}


def test_nothing_fitted_is_left_and_the_way_back_scores_nothing(
    runs: dict[str, Path], run_command: Any, scan_arguments: Any, watch: Any
) -> None:
    kept, run = runs["yes"], runs["no"]
    assert len(fits_of(kept)) == 4
    assert fits_of(run) == []
    for name in ("sensitivity.parquet", "manifest.parquet"):
        assert (run / name).read_bytes() == (kept / name).read_bytes()
    assert {e["stage"] for e in watch.events(run, "stage_started")} >= {"fit", "score"}

    words = scan_arguments(run, *EXTRA, "--bits", "5", "--resume")
    before = len(watch.events(run, "stage_started"))
    assert run_command(*words, "--keep-rounded", "no").returncode == 0
    assert len(watch.events(run, "stage_started")) == before
    assert fits_of(run) == []

    to = ("--out", run.parent / "out")
    for command in (("evaluate",), ("refine",), ("export", *to)):
        refused = run_command(command[0], run, *command[1:])
        assert refused.returncode == 2
        line = refused.stderr.splitlines()[-1]
        assert "scanned with --keep-rounded no" in line
        assert "--resume and --keep-rounded yes" in line
    assert not (run.parent / "out").exists()
    for command in (("solve", "--bits", "4.5"), ("report",), ("explain", "layers.0.mlp.down_proj")):
        done = run_command(command[0], run, *command[1:])
        assert done.returncode == 0, done.stderr
    assert run_command("compare", kept, run).returncode == 0

    plain = run_command(
        "solve", run, "--bits", "5", "--allow", "*=wint4_g32_afp16:max,wfp8_afp8,none"
    )
    assert plain.returncode == 0, plain.stderr
    (solution,) = [p.name for p in (run / "solutions").iterdir() if p.name != "bits-4.50"]
    measured = run_command("evaluate", run, "--solution", solution, "--num-random", "1")
    assert measured.returncode == 0, measured.stderr
    assert "cannot be measured" in measured.stderr
    exported = run_command("export", run, "--solution", solution, *to)
    assert exported.returncode == 0, exported.stderr

    integers = ("--bits", "6", "--allow", "*=wint4_g32_afp16:weighted,wint4_g32_afp16:gptq,none")
    assert run_command("solve", run, *integers).returncode == 0
    recipe = ("--format", "recipe", "--tool", "mlx-lm", "--out", run.parent / "recipe.json")
    (solution,) = [p.name for p in (run / "solutions").iterdir() if p.name.startswith("bits-6")]
    written = run_command("export", run, "--solution", solution, *recipe)
    assert written.returncode == 0, (
        written.stderr
    )  # kinds and bits alone: tools round by themselves

    scored = watch.part_times(run)
    before = len(watch.events(run, "stage_started"))
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    assert [e["stage"] for e in watch.events(run, "stage_started")[before:]] == ["fit"]
    assert watch.part_times(run) == scored
    assert (run / "rounding.parquet").read_bytes() == (kept / "rounding.parquet").read_bytes()
    done = run_command("evaluate", run, "--num-random", "1")
    assert done.returncode == 0, done.stderr
