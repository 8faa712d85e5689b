"""Samples that a scan keeps for measurements where it would use its data up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from chats import with_template

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import DataError
from autoquant_ray.models.tokenizer import TokenizerRef
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.stages.samples import read_samples

NUM_ROWS = 50
"""Fewer than the 128 samples of a scan."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, make_samples: Any) -> Path:
    """Rows of 6 to 20 words."""
    path = tmp_path_factory.mktemp("rows") / "rows.txt"
    lengths = [6 + 7 * row % 15 for row in range(NUM_ROWS)]
    lines = [" ".join(f"w{token}" for token in sample) for sample in make_samples(lengths)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def scan(model_folder: Any, rows: Path, cluster_address: str) -> Any:
    """Arguments of a scan of all rows."""

    def build(out: Path, *extra: Any) -> list[Any]:
        words = ["scan", model_folder("llama"), "--data", rows, "--out", out, "--bits", "8"]
        words += ["--formats", "wint4_afp16:max,wint8_aint8", "--workers", "2"]
        return [*words, "--address", cluster_address, *extra]

    return build


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory, scan: Any, run_command: Any) -> Any:
    """A scan of fewer rows than its samples: what it printed, and its run."""
    run: Path = tmp_path_factory.mktemp("scanned") / "run"
    done = run_command(*scan(run))
    assert done.returncode == 0, done.stderr
    return done, run


def tokens_of(folder: Path) -> list[list[int]]:
    """Tokens of all samples below a folder, in order."""
    parts = sorted((folder / "samples").glob("shard-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).column("tokens").to_pylist()]


def words_of(path: Path) -> list[list[int]]:
    return [[int(w[1:]) for w in line.split()] for line in path.read_text().splitlines()]


def test_scan_of_all_its_data_keeps_a_tenth_and_says_so(scanned: Any, rows: Path) -> None:
    done, run = scanned
    assert "rows.txt holds 50 samples: the last 5 are kept" in done.stderr
    dataset = json.loads((run / "run.json").read_text())["dataset"]
    assert (dataset["num_samples"], dataset["num_held_out"]) == (45, 5)
    assert dataset["counts"]["used"] == 45
    assert tokens_of(run) == words_of(rows)[:45]
    assert "the last 5 samples kept for measurements" in (run / "report.md").read_text()


@pytest.mark.parametrize(
    "words", [("evaluate", "--num-random", "2"), ("refine", "--trials", "3")], ids=lambda w: w[0]
)
def test_measurements_take_the_samples_that_were_kept(
    words: tuple[str, ...], scanned: Any, rows: Path, tmp_path: Path, run_command: Any
) -> None:
    run = Path(shutil.copytree(scanned[1], tmp_path / "run"))
    done = run_command(words[0], run, *words[1:])
    assert done.returncode == 0, done.stderr
    (measured,) = (run / "evaluation").iterdir()
    assert tokens_of(measured) == words_of(rows)[45:]


def test_resumed_scan_finds_the_same_samples(
    scanned: Any, tmp_path: Path, scan: Any, run_command: Any
) -> None:
    run = Path(shutil.copytree(scanned[1], tmp_path / "run"))
    scores = (run / "sensitivity.parquet").read_bytes()
    shutil.rmtree(run / "samples")
    (run / "sensitivity.parquet").unlink()
    done = run_command(*scan(run, "--resume"))
    assert done.returncode == 0, done.stderr
    assert tokens_of(run) == tokens_of(scanned[1])
    assert (run / "sensitivity.parquet").read_bytes() == scores


def test_run_of_an_earlier_version_keeps_its_samples(
    scanned: Any, tmp_path: Path, rows: Path, scan: Any, run_command: Any
) -> None:
    run = tmp_path / "run"
    done = run_command(*scan(run, "--hold-out", "0"))
    assert done.returncode == 0, done.stderr
    assert "holds 50 samples, all of which are used: evaluate and refine will need" in done.stderr
    scores = (run / "sensitivity.parquet").read_bytes()
    values = json.loads((run / "run.json").read_text())
    later = json.loads((scanned[1] / "run.json").read_text())["stages"]
    del values["config"]["hold_out"]
    for stage, entry in values["stages"].items():  # those of a config without the field
        assert entry["fingerprint"] != later[stage]["fingerprint"] or stage == "plan"
        entry["fingerprint"] = later[stage]["fingerprint"]
    (run / "run.json").write_text(json.dumps(values))
    for folder in ("samples", "calibration", "scores"):
        shutil.rmtree(run / folder)
    done = run_command(*scan(run, "--resume"))
    assert done.returncode == 0, done.stderr
    assert tokens_of(run) == words_of(rows)
    assert (run / "sensitivity.parquet").read_bytes() == scores


@pytest.mark.usefixtures("ray_local")
class TestReading:
    """The stage that reads samples, without a scan."""

    @pytest.fixture
    def read(self, model_folder: Any, tmp_path: Path) -> Any:
        def read(data: Any, hold_out: Any, model: Any = None, **changes: Any) -> Any:
            values = {"model": str(model or model_folder("llama")), "data": data, "out": "unused"}
            config = ScanConfig.model_validate(
                values | {"bits": 8, "formats": ("wint8_aint8",)} | changes
            )
            folder = tmp_path / f"read-{len(list(tmp_path.iterdir()))}"
            scratch, ref = RunDirectory(str(folder)), TokenizerRef(model=config.model)
            facts = read_samples(config, ref, scratch, hold_out=hold_out)
            return facts, {p.name: p.read_bytes() for p in sorted(folder.rglob("*.parquet"))}

        return read

    @pytest.mark.parametrize("samples", [30, NUM_ROWS - 1])
    @pytest.mark.parametrize("pack", [False, True])
    def test_data_of_which_something_is_left_is_read_as_without(
        self, samples: int, pack: bool, read: Any, rows: Path
    ) -> None:
        changes = {"samples": samples, "pack": pack, "seq_len": 10 if pack else 64}
        assert read(str(rows), "auto", **changes) == read(str(rows), None, **changes)

    @pytest.mark.parametrize("samples", [NUM_ROWS, NUM_ROWS + 1, 128])
    def test_used_up_data_is_read_as_with_fewer_samples(
        self, samples: int, read: Any, rows: Path
    ) -> None:
        facts, files = read(str(rows), 0.2, samples=samples)
        fewer, same = read(str(rows), None, samples=40)
        assert files == same
        assert facts.pop("num_held_out") == 10
        assert facts.pop("counts") == fewer.pop("counts") | {"read": NUM_ROWS}
        assert facts == fewer

    def test_windows_of_packed_text_are_kept_whole(self, read: Any, rows: Path) -> None:
        whole, _ = read(str(rows), None, pack=True, seq_len=10)
        facts, files = read(str(rows), 3, pack=True, seq_len=10)
        assert facts["num_samples"] == whole["num_samples"] - 3
        fewer = whole["num_samples"] - 3
        assert files == read(str(rows), None, pack=True, seq_len=10, samples=fewer)[1]

    def test_each_source_keeps_of_its_own(self, read: Any, rows: Path, tmp_path: Path) -> None:
        short = tmp_path / "short.txt"
        short.write_text("".join(rows.read_text().splitlines(keepends=True)[:25]))
        facts, _ = read({"a": str(rows), "b": str(short)}, "auto", samples=80)
        assert {name: of["num_samples"] for name, of in facts["domains"].items()} == {
            "a": 40,
            "b": 23,
        }
        assert facts["num_held_out"] == 2

    def test_chats_are_kept_too(self, read: Any, model_folder: Any, tmp_path: Path) -> None:
        model = with_template(model_folder("llama"), tmp_path / "model")
        data = tmp_path / "chats.jsonl"
        chats = [{"prompt": f"w{n} w5", "answer": f"w{n + 1}"} for n in range(24)]
        data.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
        facts, files = read(str(data), "auto", model)
        assert (facts["num_samples"], facts["num_held_out"]) == (22, 2)
        assert files == read(str(data), None, model, samples=22)[1]
        assert read(str(data), "auto", model, samples=23) == read(
            str(data), None, model, samples=23
        )

    def test_more_than_there_is_is_refused(self, read: Any, rows: Path) -> None:
        with pytest.raises(DataError, match=r"rows\.txt holds 50 samples, and `hold_out` 60 keeps"):
            read(str(rows), 60)
