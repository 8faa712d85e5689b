"""Every event that the code can write is in the schema; the documentation is made from both."""

from __future__ import annotations

import ast
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

import autoquant_ray
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.events import Event, ShardDone, parse_event

PACKAGE = Path(autoquant_ray.__file__).parent
DOCS = Path(__file__).parents[3] / "docs"
SHARD_DONE = {
    "time": 1.5,
    "event": "shard_done",
    "stage": "score",
    "shard": 3,
    "num_tokens": 100,
    "seconds": 0.5,
    "pid": 7,
}
KINDS = {
    typing.get_args(kind.model_fields["event"].annotation)[0]: kind
    for kind in typing.get_args(Event)
}


def emissions() -> Iterator[tuple[str, ast.Call]]:
    """Every call in the package that emits an event, with its place."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("append_event", "_on_event")
            ):
                yield f"{path.name}:{node.lineno}", node


def test_every_event_in_the_code_is_in_the_schema_with_its_fields() -> None:
    emitted = set()
    for place, call in emissions():
        (name,) = (argument.value for argument in call.args if isinstance(argument, ast.Constant))
        fields = {keyword.arg for keyword in call.keywords}
        assert fields == set(KINDS[name].model_fields) - {"time", "event"}, place
        emitted.add(name)
    assert emitted == set(KINDS)


def test_event_is_read_into_its_kind() -> None:
    event = parse_event(json.dumps(SHARD_DONE))
    assert isinstance(event, ShardDone)
    assert (event.shard, event.num_tokens) == (3, 100)


@pytest.mark.parametrize(
    "change",
    [
        {"event": "shard_finished"},
        {"stage": "sing"},
        {"shard": "3"},
        {"shard": -1},
        {"color": "red"},
        {"time": None},
    ],
    ids=str,
)
def test_event_outside_the_schema_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        parse_event(json.dumps(SHARD_DONE | change))


@pytest.mark.parametrize("field", sorted(SHARD_DONE))
def test_event_without_a_field_is_refused(field: str) -> None:
    with pytest.raises(pydantic.ValidationError):
        parse_event(json.dumps({k: v for k, v in SHARD_DONE.items() if k != field}))


def test_listener_gets_every_event_after_it_is_written(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    heard: list[tuple[str, dict[str, Any], int]] = []

    def listen(event: str, **details: Any) -> None:
        heard.append((event, details, directory.read_bytes("events.jsonl").count(b"\n")))

    directory.listener = listen
    directory.append_event("stage_started", stage="plan")
    directory.append_event("shard_copied", shard=2)
    assert heard == [("stage_started", {"stage": "plan"}, 1), ("shard_copied", {"shard": 2}, 2)]


def test_documented_tables_are_those_of_the_code(docs: Any) -> None:
    for path in (docs.PAGE, docs.ENGINES_PAGE):
        text = path.read_text(encoding="utf-8")
        assert text == docs.update(text), "run: python docs/update.py"
    page = docs.PAGE.read_text(encoding="utf-8")
    for name in KINDS:
        assert f"**`{name}`**" in page


def test_links_of_the_page_lead_somewhere(docs: Any) -> None:
    text = docs.PAGE.read_text(encoding="utf-8")
    targets = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert targets
    for target in targets:
        assert (DOCS / target).exists(), target
