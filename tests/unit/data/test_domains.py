"""Sources and tags of domains, and shards that hold one domain each."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from records import make_record

from autoquant_ray.cli.main import main
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.config.files import validate
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.sources import (
    MAX_DOMAINS,
    data_name,
    equal_shares,
    parse_data,
    sources_of,
)
from autoquant_ray.config.stage_fields import changed_fields, stage_fingerprints
from autoquant_ray.data.cutting import SampleAssembler
from autoquant_ray.data.domain_shards import DomainAssembler, in_turn, shards_by_domain
from autoquant_ray.data.fingerprint import fingerprint_data, fingerprint_source
from autoquant_ray.data.texts import DataSpec, read_rows
from autoquant_ray.errors import AutoQuantError, ConfigError, DataError, StoreError
from autoquant_ray.evaluate.held_out import num_seen
from autoquant_ray.jobs.file import make_job
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState

ROWS = [("a b", "x"), ("c d", "y"), ("", "x"), ("e f", "x"), ("g h", "y")]


def config(**changes: Any) -> ScanConfig:
    return validate(ScanConfig, {"model": "m", "data": "d.txt", "out": "o", "bits": 8} | changes)


def spec_of(source: Any, **changes: Any) -> DataSpec:
    arguments: dict[str, Any] = {"source": str(source), "num_samples": 100, "seq_len": 4}
    return DataSpec(**arguments | changes)


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    path = tmp_path / "tagged.jsonl"
    path.write_text("".join(json.dumps({"text": t, "kind": d}) + "\n" for t, d in ROWS))
    return path


def test_named_sources_are_domains_and_existing_paths_are_paths(tmp_path: Path) -> None:
    path = tmp_path / "code=1.txt"
    assert parse_data(["b=./b.txt", "a=x=y.txt"]) == {"a": "x=y.txt", "b": "./b.txt"}
    assert parse_data([f"code={path}"]) == {"code": str(path)}
    assert parse_data([str(path)]) == str(path)  # its name in front of '=' holds a '/'
    assert parse_data(["plain.txt"]) == "plain.txt"
    assert parse_data("code=1.txt") == "code=1.txt"


def test_existing_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_data(["code=1.txt"]) == {"code": "1.txt"}
    (tmp_path / "code=1.txt").write_text("text\n")
    assert parse_data(["code=1.txt"]) == "code=1.txt"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (["a.txt", "b=b.txt"], "'a.txt' is one of several sources and has no name"),
        (["a=a.txt", "a=b.txt"], "two sources have the name 'a'"),
        ({"a b": "a.txt"}, "'a b' is not a name"),
        ({}, "give a source"),
        (3, "must be a source"),
        ({f"d{i}": "x.txt" for i in range(MAX_DOMAINS + 1)}, "65 sources are more than 64 domains"),
    ],
)
def test_data_that_cannot_be_told_is_refused(data: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        config(data=data)
    assert str(caught.value).startswith("--data: ")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data": {"a": "a.txt"}, "domain_field": "kind"}, "`domain_field` and named sources"),
        ({"data": {"a": "a", "b": "b", "c": "c"}, "samples": 2}, "`samples` 2 is less than one"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        config(**changes)


def test_command_line_takes_several_sources(tmp_path: Path) -> None:
    arguments = ["scan", "nowhere", "--out", str(tmp_path / "run"), "--bits", "8"]
    arguments += ["--data", "code=a.txt", "--data", "b.txt"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "'b.txt' is one of several sources" in result.stderr


def test_job_file_takes_a_mapping_of_sources() -> None:
    values = {"model": "m", "data": {"chat": "b.txt", "code": "a.txt"}, "out": "o", "bits": 8}
    job: Any = make_job(values, "job.yaml")
    assert sources_of(job.config().data) == {"chat": "b.txt", "code": "a.txt"}
    assert data_name(job.config().data) == "chat=b.txt, code=a.txt"


def test_equal_shares_divide_everything() -> None:
    assert equal_shares(10, 3) == [4, 3, 3]
    assert sum(equal_shares(128, 7)) == 128


def test_domains_change_the_shards_and_nothing_before() -> None:
    kinds = [config(), config(domain_field="kind"), config(data={"a": "d.txt"})]
    marks = [stage_fingerprints(config, "m", "d") for config in kinds]
    assert len({mark["plan"] for mark in marks}) == 1
    assert len({mark["score"] for mark in marks}) == 3
    before = config().model_dump(mode="json")
    del before["domain_field"]
    assert changed_fields(before, config()) == []
    assert changed_fields(before, kinds[1]) == ["domain_field: None -> kind"]


def test_fields_that_earlier_runs_lack_change_nothing_at_their_defaults() -> None:
    plain = config(data="a.jsonl")
    before = plain.model_dump(mode="json")
    for name in ("loss_on", "skip_bad_samples", "coverage"):
        del before[name]
    assert changed_fields(before, plain) == []
    for changes, stage in (({"coverage": "full"}, "plan"), ({"loss_on": "answer"}, "shards")):
        other = config(data="a.jsonl", **changes)
        (name, value), *_ = changes.items()
        default = getattr(plain, name)
        assert changed_fields(before, other) == [f"{name}: {default} -> {value}"]
        marks = [stage_fingerprints(config, "m", "d") for config in (plain, other)]
        assert marks[0][stage] != marks[1][stage]


def test_fingerprint_of_several_sources_knows_names_and_contents(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in paths:
        path.write_text(path.name)
    first, second = map(str, paths)
    assert fingerprint_data(first) == fingerprint_source(first)
    fingerprint = fingerprint_data({"a": first, "b": second})
    assert fingerprint == fingerprint_data({"b": second, "a": first})
    assert fingerprint != fingerprint_data({"a": second, "b": first})
    paths[1].write_text("changed")
    assert fingerprint != fingerprint_data({"a": first, "b": second})


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_rows_come_with_their_domain(kind: str, tagged: Path, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"kind": [d for _, d in ROWS], "text": [t for t, _ in ROWS]}), path)
    elif kind == "json":
        path.write_text(json.dumps([{"text": t, "kind": d} for t, d in ROWS]))
    else:
        path = tagged
    assert list(read_rows(spec_of(path, domain_field="kind"))) == ROWS
    assert list(read_rows(spec_of(path))) == [(text, "") for text, _ in ROWS]


def test_shuffled_rows_keep_their_domain(tagged: Path) -> None:
    rows = list(read_rows(spec_of(tagged, domain_field="kind", shuffle_seed=3)))
    assert rows != ROWS
    assert sorted(rows) == sorted(ROWS)


def test_packed_rows_are_separated_within_their_domain(tagged: Path) -> None:
    rows = list(read_rows(spec_of(tagged, domain_field="kind", pack=True)))
    assert rows == [("a b", "x"), ("c d", "y"), ("", "x"), ("\n\ne f", "x"), ("\n\ng h", "y")]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "t"}, r"line 2 has no field 'kind'; it has: text; name one with `domain_field`"),
        ({"text": "t", "kind": " "}, r"line 2: field 'kind' holds '', which is no domain"),
        ({"text": "t", "kind": "a,b"}, r"line 2: field 'kind' holds 'a,b', which is no domain"),
        ({"text": "t", "kind": None}, r"line 2: field 'kind' holds NoneType, not text"),
    ],
)
def test_row_without_a_domain_is_named(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "t", "kind": "x"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=problem) as caught:
        list(read_rows(spec_of(path, domain_field="kind")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["lines.txt", "pydoc"])
def test_source_without_columns_has_no_domain_field(source: str, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("text\n")
    path = source if source == "pydoc" else tmp_path / source
    with pytest.raises(DataError, match="it has no columns"):
        read_rows(spec_of(path, domain_field="kind"))


def assemble(assembler: DomainAssembler[Any], lists: list[Any], domains: list[str]) -> Any:
    made = assembler.add([array("i", tokens) for tokens in lists], [not t for t in lists], domains)
    return [(domain, list(sample)) for domain, sample in made]


def test_packing_never_joins_two_domains() -> None:
    assembler: DomainAssembler[Any] = DomainAssembler(spec_of("s", pack=True))
    made = assemble(assembler, [[1, 2, 3], [11, 12, 13], [4, 5, 6], [14, 15]], ["x", "y", "x", "y"])
    assert made == [("x", [1, 2, 3, 4]), ("y", [11, 12, 13, 14])]
    assert [(d, list(s)) for d, s in assembler.finish()] == [("x", [5, 6])]
    assert assembler.counts.used == 3
    assert assembler.counts.too_short == 1  # what remained of y


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("num_samples", [3, 100])
def test_one_domain_gives_what_no_domain_gives(pack: bool, num_samples: int) -> None:
    spec = spec_of("s", pack=pack, num_samples=num_samples)
    lists = [array("i", range(n)) for n in (3, 0, 9, 1, 6, 4)]
    empty = [not tokens for tokens in lists]
    plain: SampleAssembler[Any] = SampleAssembler(spec)
    by_domain: DomainAssembler[Any] = DomainAssembler(spec)
    expected = plain.add(lists, empty) + plain.finish()
    made = by_domain.add(lists, empty, ["x"] * len(lists)) + by_domain.finish()
    assert made == [("x", sample) for sample in expected]
    assert by_domain.counts == plain.counts


@pytest.mark.parametrize("pack", [False, True])
def test_number_of_samples_counts_all_domains_and_more_of_them_only_follow(pack: bool) -> None:
    lists = [list(range(n)) for n in (4, 5, 9, 13, 6, 4)]
    domains = ["x", "y", "x", "y", "x", "z"]

    def first(num_samples: int) -> Any:
        assembler: DomainAssembler[Any] = DomainAssembler(
            spec_of("s", num_samples=num_samples, pack=pack)
        )
        made = assemble(assembler, lists, domains)
        return made + [(d, list(s)) for d, s in assembler.finish()]

    everything = first(100)
    assert {domain for domain, _ in everything} == {"x", "y", "z"}
    for count in range(1, len(everything)):
        assert first(count) == everything[:count]


def test_more_domains_than_allowed_are_refused_with_a_remedy() -> None:
    assembler: DomainAssembler[Any] = DomainAssembler(spec_of("s.jsonl", domain_field="id"))
    lists = [[1, 2]] * (MAX_DOMAINS + 1)
    with pytest.raises(DataError, match=r"field 'id' has more than 64 values.*coarser column"):
        assemble(assembler, lists, [f"d{i}" for i in range(MAX_DOMAINS + 1)])


def test_shards_hold_one_domain_and_come_when_they_are_full() -> None:
    samples = [("x", 1), ("y", 2), ("x", 3), ("y", 4), ("x", 5), ("y", 6), ("x", 7)]
    shards = list(shards_by_domain(iter(samples), 3))  # type: ignore[type-var]
    assert shards == [("x", [1, 3, 5]), ("y", [2, 4, 6]), ("x", [7])]


def test_sources_take_turns_until_all_end() -> None:
    streams = [iter("abc"), iter(""), iter("12345")]
    assert "".join(in_turn(streams)) == "a1b2c345"


def seen_state(config: ScanConfig, tmp_path: Path) -> RunState:
    facts = {"a": {"num_samples": 3}, "b": {"num_samples": 4}}
    record = make_record(
        config=config.model_dump(mode="json"),
        fingerprints={"data": fingerprint_data(config.data)},
        dataset={"num_samples": 7, "domains": facts},
    )
    return RunState(RunDirectory(str(tmp_path / "run")), record)


def measured(state: RunState, **changes: Any) -> ScanConfig:
    evaluation = EvaluationConfig.model_validate({"run": "r"} | changes)
    return evaluation.scan_config(state.record.config)


def test_what_calibration_used_is_known_for_each_source(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    sources = {name: str(tmp_path / f"{name}.txt") for name in ("a", "b")}
    state = seen_state(config(data=sources), tmp_path)
    assert num_seen(state, measured(state), is_given=False) == {"a": 3, "b": 4}
    other = measured(state, data=str(tmp_path / "c.txt"))
    assert num_seen(state, other, is_given=True) == 0
    held_out_part = measured(state, data=sources["b"])
    with pytest.raises(ConfigError, match="is the domain b of the scan"):
        num_seen(state, held_out_part, is_given=True)
    (tmp_path / "b.txt").write_text("changed")
    with pytest.raises(StoreError, match="changed since"):
        num_seen(state, measured(state), is_given=False)


def test_other_data_need_not_have_the_domain_field(tagged: Path, tmp_path: Path) -> None:
    state = seen_state(config(data=str(tagged), domain_field="kind"), tmp_path)
    assert measured(state).domain_field == "kind"
    assert measured(state, data=str(tagged)).domain_field == "kind"
    assert measured(state, data="other.txt").domain_field is None
    assert num_seen(state, measured(state), is_given=False) == 7


def test_own_data_packed_without_its_domains_is_refused(tagged: Path, tmp_path: Path) -> None:
    state = seen_state(config(data=str(tagged), domain_field="kind", pack=True), tmp_path)
    same = measured(state).model_copy(update={"domain_field": None})
    with pytest.raises(AutoQuantError, match="must be those of the scan"):
        num_seen(state, same, is_given=True)


def test_own_chats_chosen_otherwise_are_refused(tagged: Path, tmp_path: Path) -> None:
    state = seen_state(config(data=str(tagged)), tmp_path)
    assert num_seen(state, measured(state, seq_len=9), is_given=False) == 7
    state.record.dataset["num_loss_tokens"] = 12
    assert num_seen(state, measured(state), is_given=False) == 7
    for changes in ({"seq_len": 9}, {"loss_on": "answer"}):
        with pytest.raises(ConfigError, match=r"must be those of the scan .*give other data"):
            num_seen(state, measured(state, **changes), is_given=False)


@pytest.mark.parametrize(
    ("name", "scanned", "changes", "expected"),
    [
        ("a.txt", {}, {"read_as": "text"}, 7),
        ("a.txt", {"read_as": "text"}, {"data": "a.txt"}, 7),
        ("a.txt", {}, {"text_field": "content"}, 7),
        ("a.txt", {}, {"split": "test"}, 7),
        ("a.txt", {}, {"read_as": "json"}, "read as json"),
        ("a.jsonl", {}, {"read_as": "json", "split": "test"}, 7),
        ("a.jsonl", {}, {"text_field": "content"}, 0),
        ("a.jsonl", {}, {"read_as": "text"}, "read as text"),
        ("pydoc", {}, {"text_field": "content", "split": "test"}, 7),
        ("folder", {}, {"read_as": "text"}, 7),
        ("folder", {}, {"text_field": "content"}, 7),
        ("folder", {}, {"split": "test"}, 0),
    ],
)
def test_own_data_is_seen_whatever_option_says_how_it_is_read(
    name: str,
    scanned: dict[str, Any],
    changes: dict[str, Any],
    expected: int | str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only another column, or another split of what has some, is other data."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for file in ("a.txt", "a.jsonl", "folder/train.txt", "folder/test.txt"):
        Path(file).write_text('{"text": "x", "content": "y"}\n')
    state = seen_state(config(data=name, **scanned), tmp_path)
    if "data" in changes:  # another path of the same file
        changes = changes | {"data": str(tmp_path / changes["data"])}
    scan = measured(state, **changes)
    if isinstance(expected, int):
        assert num_seen(state, scan, is_given="data" in changes) == expected
        return
    with pytest.raises(ConfigError, match=f"{expected}.*or give other data") as refused:
        num_seen(state, scan, is_given=False)
    assert len(str(refused.value)) < 400


def test_calibration_file_that_grew_is_not_unseen(make_run: Any, tmp_path: Path) -> None:
    state = RunState.open(make_run())
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x"}\n')
    state.record.config["data"] = str(file)
    state.record.fingerprints["data"] = fingerprint_data(str(file))
    scan = EvaluationConfig(run="run", data=str(file)).scan_config(state.record.config)
    assert num_seen(state, scan, is_given=True) == 8
    file.write_text('{"text": "x"}\n{"text": "y"}\n')
    with pytest.raises(ConfigError, match="changed since the scan"):
        num_seen(state, scan, is_given=True)


def test_wrong_field_of_an_evaluation_is_one_line(make_run: Any) -> None:
    config = RunState.open(make_run()).record.config
    config["data"] = {"a": "a.jsonl", "b": "b.jsonl"}
    with pytest.raises(ConfigError):
        EvaluationConfig(run="run", samples=1).scan_config(config)
