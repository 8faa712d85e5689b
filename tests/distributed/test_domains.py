"""Domains in a scan: shards of one domain, and scores as if each had been scanned alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import DataError
from autoquant_ray.models.tokenizer import TokenizerRef
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.scan import run_search
from autoquant_ray.stages.samples import read_samples

pytestmark = pytest.mark.usefixtures("ray_local")

LENGTHS = {"chat": [8, 30, 21, 14, 26, 11], "code": [17, 9, 24, 33, 12, 19]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, make_samples: Any) -> dict[str, Path]:
    """One file per domain, and 'all', which holds both in turn with a tag."""
    folder = tmp_path_factory.mktemp("domains")
    rows: dict[str, list[dict[str, str]]] = {}
    for seed, (name, lengths) in enumerate(LENGTHS.items()):
        texts = (" ".join(f"w{t}" for t in tokens) for tokens in make_samples(lengths, seed))
        rows[name] = [{"text": text, "kind": name} for text in texts]
    rows["all"] = [row for pair in zip(rows["chat"], rows["code"], strict=True) for row in pair]
    paths = {name: folder / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return paths


@pytest.fixture(scope="module")
def make_config(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small scan whose scores depend on its samples alone: no draws, no input maxima."""

    def build(data: Any, **changes: Any) -> ScanConfig:
        values = {
            "model": str(model_folder("llama")),
            "data": data,
            "out": str(tmp_path_factory.mktemp("run") / "run"),
            "formats": ("wint4_afp16:max", "wint8_afp16"),
            "bits": 8,
            "samples": 8,
            "shard_samples": 2,
            "labels": "data",
            "workers": 1,
        }
        return ScanConfig.model_validate(values | changes)

    return build


@pytest.fixture(scope="module")
def scanned(make_config: Any, sources: dict[str, Path]) -> Path:
    named = {name: str(sources[name]) for name in LENGTHS}
    config = make_config(named, workers=2)
    assert run_search(config).quarantined == []
    return Path(config.out)


def scores_of(path: Path, domain: str | None = None) -> dict[tuple[str, str], float]:
    rows = pq.read_table(path).to_pylist()
    return {
        (row["group"], row["format"]): row["score"]
        for row in rows
        if domain is None or row["domain"] == domain
    }


def test_domain_scores_are_those_of_a_scan_of_the_domain_alone(
    scanned: Path, make_config: Any, sources: dict[str, Path]
) -> None:
    config = make_config(str(sources["code"]), samples=4)
    run_search(config)
    alone = scores_of(Path(config.out) / "sensitivity.parquet")
    assert scores_of(scanned / "domain_sensitivity.parquet", "code") == pytest.approx(
        alone, rel=1e-6
    )
    assert not (Path(config.out) / "domain_sensitivity.parquet").exists()


def test_domain_scores_add_up_to_the_whole_by_their_tokens(scanned: Path) -> None:
    domains = json.loads((scanned / "manifest.json").read_text())["solution"]["domains"]
    tokens = {name: domains[name]["num_tokens"] for name in LENGTHS}
    parts = {name: scores_of(scanned / "domain_sensitivity.parquet", name) for name in LENGTHS}
    for key, score in scores_of(scanned / "sensitivity.parquet").items():
        mixed = sum(tokens[name] * parts[name][key] for name in LENGTHS) / sum(tokens.values())
        assert score == pytest.approx(mixed, rel=1e-12)
        assert parts["chat"][key] != parts["code"][key]


def read(config: ScanConfig, folder: Path, **options: Any) -> tuple[dict[str, Any], list[bytes]]:
    """Facts and files of the samples stage."""
    scratch = RunDirectory(str(folder))
    facts = read_samples(config, TokenizerRef(model=config.model), scratch, **options)
    return facts, [path.read_bytes() for path in sorted((folder / "samples").iterdir())]


def test_tagged_rows_in_turn_give_the_shards_of_named_sources(
    make_config: Any, sources: dict[str, Path], tmp_path: Path
) -> None:
    named = make_config({name: str(sources[name]) for name in LENGTHS})
    tagged = make_config(str(sources["all"]), domain_field="kind")
    assert read(named, tmp_path / "named") == read(tagged, tmp_path / "tagged")
    files = [(tmp_path / name / "domains.parquet").read_bytes() for name in ("named", "tagged")]
    assert files[0] == files[1]


def samples_in(folder: Path) -> list[list[tuple[int, ...]]]:
    tables = (pq.read_table(path) for path in sorted((folder / "samples").iterdir()))
    return [[tuple(tokens) for tokens in table["tokens"].to_pylist()] for table in tables]


@pytest.mark.parametrize("pack", [False, True])
def test_single_domain_gives_the_same_files_as_none(
    pack: bool, make_config: Any, sources: dict[str, Path], tmp_path: Path
) -> None:
    path = str(sources["code"])
    changes = {"pack": pack, "seq_len": 10, "samples": 7}
    plain, files = read(make_config(path, **changes), tmp_path / "plain")
    for number, config in enumerate(
        (make_config(path, domain_field="kind", **changes), make_config({"code": path}, **changes))
    ):
        facts, same = read(config, tmp_path / str(number))
        assert same == files
        assert facts.pop("domains")["code"]["num_samples"] == plain["num_samples"]
        assert facts == plain
        assert not (tmp_path / str(number) / "domains.parquet").exists()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("is_tagged", [False, True])
def test_shards_hold_one_domain_and_what_is_skipped_is_what_came_first(
    is_tagged: bool, pack: bool, make_config: Any, sources: dict[str, Path], tmp_path: Path
) -> None:
    named = {name: str(sources[name]) for name in LENGTHS}
    source: Any = str(sources["all"]) if is_tagged else named
    field = {"domain_field": "kind"} if is_tagged else {}
    config = make_config(source, pack=pack, seq_len=12, samples=5, **field)
    facts, _ = read(config, tmp_path / "first")
    rows = pq.read_table(tmp_path / "first" / "domains.parquet").to_pylist()
    owners = {
        token
        for row, shard in zip(rows, samples_in(tmp_path / "first"), strict=True)
        for sample in shard
        for token in [(row["domain"], *sample)]
    }
    own_tokens = {name: tokens_of(sources[name]) for name in LENGTHS}
    for name, *tokens in owners:
        assert " ".join(map(str, tokens)) in own_tokens[name]
    assert facts["num_samples"] == 5 == sum(row["num_samples"] for row in rows)
    assert {n: f["num_samples"] for n, f in facts["domains"].items()} == {"chat": 3, "code": 2}

    seen = {n: f["num_samples"] for n, f in facts["domains"].items()}
    read(config, tmp_path / "next", skip=5 if is_tagged else seen)
    first, later = (
        {sample for shard in samples_in(tmp_path / name) for sample in shard}
        for name in ("first", "next")
    )
    assert later
    assert not first & later


def tokens_of(path: Path) -> str:
    """All tokens of a file one after the other, as packing joins them."""
    texts = (json.loads(line)["text"] for line in path.read_text().splitlines())
    return " ".join(word[1:] for text in texts for word in text.split())


def test_nothing_left_to_measure_is_an_error(
    make_config: Any, sources: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config({name: str(sources[name]) for name in LENGTHS})
    with pytest.raises(DataError, match="holds no samples after the 12 that calibration used"):
        read(config, tmp_path / "none", skip={"chat": 6, "code": 6})
