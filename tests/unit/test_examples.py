"""The files under jobs/ and the rows in docs are read by what they are written for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autoquant_ray.config.files import load_config
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.data.texts import read_rows
from autoquant_ray.jobs.file import load_job

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda p: p.name)
def test_job_file_is_a_valid_job_of_its_kind(path: Path) -> None:
    assert load_job(str(path)).kind == path.stem


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda p: p.name)
def test_job_file_explains_every_field(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if re.match(r"[a-z_]+:", line) and not line.endswith(":"):
            assert "#" in line, f"{path.name}:{number}: {line}"


def test_job_file_of_a_scan_serves_the_scan_command() -> None:
    config = load_config(ScanConfig, str(ROOT / "jobs" / "scan.yaml"), {})
    assert isinstance(config, ScanConfig)
    assert config.bits == 6


def test_rows_of_the_data_pages_are_what_they_say(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    page += "\n## Images\n" + (ROOT / "docs" / "vision-language.md").read_text(encoding="utf-8")
    num_images: dict[str, list[int]] = {}
    for section in page.split("\n## ")[1:]:
        for row in re.findall(r"```json\n(.*?)\n```", section):
            path = tmp_path / "row.jsonl"
            path.write_text(row)
            ((content, _),) = read_rows(DataSpec(source=str(path), num_samples=1, seq_len=9))
            images = -1 if isinstance(content, str) else len(content.images)
            num_images.setdefault(section.partition("\n")[0], []).append(images)
    assert num_images == {"Text": [-1], "Chats": [0] * 8, "Domains": [-1], "Images": [1, 2, 1, 1]}
