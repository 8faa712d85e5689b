"""Help pages: every command, every option, examples that exist."""

from __future__ import annotations

import re

import click
import pytest
from command_line import COMMANDS, JOBS_COMMANDS, run

from autoquant_ray.cli.main import main
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.search_space import SearchSpace


def options_of(name: str) -> list[click.Option]:
    """Options of a command, as click knows them; a group's command has two words."""
    command: click.Command = main
    for word in name.split():
        assert isinstance(command, click.Group)
        command = command.commands[word]
    return [p for p in command.params if isinstance(p, click.Option)]


def flags_of(option: click.Option) -> list[str]:
    """Long flags of an option."""
    return [flag for flag in (*option.opts, *option.secondary_opts) if flag.startswith("--")]


@pytest.mark.parametrize("name", [*COMMANDS, *JOBS_COMMANDS])
def test_help_shows_an_example_and_every_option(name: str) -> None:
    result = run(*name.split(), "--help")
    assert result.exit_code == 0
    assert re.search(rf"Example:\n +autoquant-ray {name}\b", result.stdout)
    for option in options_of(name):
        assert option.help, option.name
        assert flags_of(option)
        for flag in flags_of(option):
            assert re.search(rf"(?m)\s{flag}(\s|$)", result.stdout), flag


@pytest.mark.parametrize(("name", "model"), [("plan", SearchSpace), ("scan", ScanConfig)])
def test_help_shows_every_config_field_with_text_and_default(
    name: str, model: type[SearchSpace]
) -> None:
    shown = " ".join(run(name, "--help").stdout.replace("vision-\n", "vision-").split())
    for field_name, field in model.model_fields.items():
        if field_name in ("model", "custom_formats", "runtime_env"):  # not as flags
            continue
        flag = (field.json_schema_extra or {}).get("flag", field_name)
        start = shown.index(f"--{flag.replace('_', '-')} ")
        text = shown[start:]
        assert " ".join(field.description.split()[:4]) in text, field_name
        if (
            not field.is_required()
            and field.default not in (None, ())
            and field.annotation is not bool
        ):
            default = ",".join(field.default) if field_name == "formats" else field.default
            assert f"[default: {default}]" in text, field_name


def test_help_lists_every_command_and_exit_code() -> None:
    shown = run("--help").stdout
    assert set(main.commands) == set(COMMANDS)
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", shown, re.M)
    for code in ("0 done", "1 failed", "2 wrong usage", "4 budget infeasible", "130 interrupted"):
        assert code in shown


@pytest.mark.parametrize("name", [*COMMANDS, *JOBS_COMMANDS])
def test_help_examples_name_only_real_options(name: str) -> None:
    shown = run(*name.split(), "--help").stdout.partition("Example:")[2]
    example = re.split(r"(?m)^[A-Z]\w+:$", shown)[0]
    for line in re.split(r"\n\s*autoquant-ray ", example)[1:]:
        command, second, *_ = [*line.split(), ""]
        command = f"{command} {second}" if command == "jobs" else command
        used = re.findall(r"--[a-z-]+", line)
        flags = {flag for option in options_of(command) for flag in flags_of(option)}
        assert set(used) <= flags, line


@pytest.mark.parametrize("name", ["", "scan", "jobs list"])
def test_h_is_help(name: str) -> None:
    words = name.split()
    assert run(*words, "-h").stdout == run(*words, "--help").stdout
    assert run(*words, "-h").exit_code == 0


def test_help_lists_whole_sentences_in_the_order_of_the_work() -> None:
    shown = run("--help").stdout.partition("Commands:")[2]
    names = re.findall(r"(?m)^  ([a-z-]+) ", shown)
    assert sorted(names) == sorted(main.commands)
    assert names.index("plan") < names.index("scan") < names.index("solve")
    assert names.index("solve") < names.index("evaluate") < names.index("export")
    assert "..." not in shown


@pytest.mark.parametrize("name", ["plan", "scan"])
def test_help_of_many_options_has_headings(name: str) -> None:
    shown = run(name, "--help").stdout
    headings = re.findall(r"(?m)^([A-Z][a-z]+):$", shown)
    assert headings[0] == "Search"
    assert headings[-1] == "Run"
    assert shown.index("Search:") < shown.index("\n  --formats") < shown.index("Run:")
    assert shown.index("Run:") < shown.index("\n  --config")
