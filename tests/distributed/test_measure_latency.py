"""``measure-latency`` on a real cluster: its file is a card that ``solve`` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def test_file_of_the_cluster_is_a_card_for_solve(
    tmp_path: Path, run_command: Any, scan_arguments: Any, model_folder: Any, cluster_address: str
) -> None:
    scanned = run_command(*scan_arguments(tmp_path / "run"))
    assert scanned.returncode == 0, scanned.stderr
    out = tmp_path / "hardware"
    words = ["measure-latency", model_folder("llama"), "--formats", "wint4_afp16,wint8_aint8"]
    words += ["--out", out, "--rounds", 3, "--address", cluster_address, "--json"]
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    (card,) = json.loads(done.stdout)
    assert card["file"] == f"{out}/cpu.yaml"
    figures = yaml.safe_load((out / "cpu.yaml").read_text())
    assert {"16x16", "int8xint8"} <= set(figures["matmul_rates"])
    assert {row["tokens"] for row in figures["products"]} == {1, 16, 256}
    again = run_command(*words)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    solved = run_command("solve", tmp_path / "run", "--bits", 9, "--latency", out / "cpu.yaml")
    assert solved.returncode == 0, solved.stderr
    assert "roofline bound from measured rates" in solved.stdout
