"""The edge of the program: errors become one line and an exit code, stdout stays clean."""

from __future__ import annotations

import errno
import functools
import json
import logging
import math
import os
import re
import select
import shlex
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from autoquant_ray.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    AutoQuantError,
    one_line,
)
from autoquant_ray.wording import as_flags, fitted, printable, shown

logger = logging.getLogger(__name__)

_LONGEST, _LONGEST_USAGE = 400, 370
"""Characters of the line with which a command stops."""
_LONGEST_SENTENCE = 200
"""Characters of a command's sentence in the list of all."""

_PIPED_WIDTH = 80
"""Columns of what is printed where no terminal says how many."""

_NAME = "autoquant-ray"
"""The program in files, which are read elsewhere too."""

_PACKAGE = "autoquant_ray"
"""Under whose name our own messages are logged."""

_PROGRAM = object()
"""Marks the context of a command line that is a whole process."""

_COMMON = (
    click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout; logs on stderr."),
    click.option("-v", "--verbose", is_flag=True, help="Show tracebacks and libraries' warnings."),
)


class Commands(click.Group):
    """Turns the package's errors into one line on stderr and an exit code.

    Help lists the commands in the order in which they were added, each with its whole sentence.
    """

    def list_commands(self, context: click.Context) -> list[str]:
        """Names in the order of the work."""
        return list(self.commands)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """A line or two per command."""
        rows = [
            (name, command.get_short_help_str(limit=_LONGEST_SENTENCE))
            for name, command in self.commands.items()
            if not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, context: click.Context) -> Any:
        def on_sigterm(*_: Any) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, on_sigterm)
        try:
            return super().invoke(context)
        except AutoQuantError as error:
            self._stop(self._in_words(context, f"error: {error}"), error.exit_code)
        except KeyboardInterrupt as error:
            line = str(error) or "interrupted; what was finished is kept, go on with `resume`"
            self._stop(self._in_words(context, line), EXIT_INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # noqa: BLE001 - the edge of the program
            if isinstance(error, BrokenPipeError) and _drop_stdout():
                raise click.exceptions.Exit(EXIT_FAILED) from None
            if (wrong := _wrong_place(error)) is not None:
                self._stop(wrong, EXIT_USAGE)
            self._stop(f"error: {type(error).__name__}: {one_line(error)}", EXIT_FAILED)

    def main(self, *arguments: Any, **keywords: Any) -> Any:
        """Run the program; click's own usage errors get one line too."""
        keywords["standalone_mode"] = False
        if not arguments and keywords.get("args") is None:
            keywords["obj"] = _PROGRAM
        try:
            code = super().main(*arguments, **keywords)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.ClickException as error:
            text = printable(" ".join(error.format_message().split()))
            click.echo(f"error: {fitted(text, _LONGEST_USAGE)} (see --help)", err=True)
            code = error.exit_code
        except click.Abort:
            code = EXIT_INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)

    def _in_words(self, context: click.Context, line: str) -> str:
        """A line in the words of the command that ran: not every one has ``--resume``."""
        command = self.commands.get(context.invoked_subcommand or "")
        if command is None or "resume" not in option_names(command):
            for words in ("go on with `resume`", "start again with `resume`"):
                line = line.replace(words, "start the same command again to go on")
        return as_started(as_flags(line, option_names(self)), context)

    def _stop(self, line: str, code: int) -> None:
        if logging.getLogger().isEnabledFor(logging.DEBUG) and code == EXIT_FAILED:
            logger.debug("traceback", exc_info=True)
        line = printable(" ".join(line.splitlines()))
        click.echo(fitted(line, _LONGEST), err=True)
        raise click.exceptions.Exit(code)


def _drop_stdout() -> bool:
    """Whether whoever read stdout has closed it, as ``head`` does; then nothing more goes there."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    is_closed = any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return is_closed


def _wrong_place(error: Exception) -> str | None:
    """The line for a name that no file can have, or a file that this user may not open, wherever it
    was given; None for other errors."""
    if isinstance(error, PermissionError) and error.filename is not None:
        return (
            f"error: {shown(error.filename)} is not for this user ({error.strerror}); give it the "
            "permission, or another place"
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"error: the name {shown(error.filename)} is too long for a file; give a shorter one"
    if re.search("embedded null|embedded NUL", str(error), re.IGNORECASE):
        return "error: a name holds a NUL character, which none can; leave it out"
    return None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command came to, before it is printed.

    Attributes:
        json: Makes what ``--json`` prints.
        show: Prints it for people.
        notes: Lines for stderr, printed last.
        exit_code: Of the program.
    """

    json: Callable[[], Any]
    show: Callable[[], None]
    notes: Sequence[str] = ()
    exit_code: int = EXIT_DONE


def prints_result(command: Callable[..., Result]) -> Callable[..., None]:
    """Add ``--json`` and ``--verbose``; set up logging, run the command, print what it returns."""

    @functools.wraps(command)
    def run(*arguments: Any, as_json: bool, verbose: bool, **options: Any) -> None:
        set_up_logging(verbose)
        result = command(*arguments, **options)
        if as_json:
            click.echo(json.dumps(_as_json(result.json()), indent=2, allow_nan=False))
        else:
            result.show()
        for note in result.notes:
            click.echo(printable(as_started(note)), err=True)
        if result.exit_code != EXIT_DONE:
            raise click.exceptions.Exit(result.exit_code)

    decorated: Callable[..., None] = run
    for option in _COMMON:
        decorated = option(decorated)
    return decorated


def _as_json(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite, which it lacks, are null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _as_json(part) for key, part in value.items()}
    return [_as_json(part) for part in value] if isinstance(value, list | tuple) else value


def grave_notes(grave: Iterable[str]) -> list[str]:
    """Reasons not to use a solution, as the last lines that people see."""
    return [f"grave concern: {' '.join(text.split())}" for text in grave]


def page_width() -> int:
    """Columns of the terminal, or of ``COLUMNS``; else those of a pipe."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _PIPED_WIDTH


def show_lines(lines: Iterable[str]) -> None:
    """Print lines on stdout, each wrapped at words, its rest indented.

    What is copied stays whole: a long word, such as a path, and a command, which begins with
    blanks or "next:".
    """
    for line in lines:
        text = printable(as_started(line))
        if not text.startswith(("  ", "next: ")):
            text = textwrap.fill(
                text,
                page_width(),
                subsequent_indent="  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        click.echo(text)


def wants_json() -> bool:
    """Whether the command that runs was given ``--json``; for those that print as they go."""
    return bool(click.get_current_context().params["as_json"])


def is_program() -> bool:
    """Whether the command that runs is the whole process, not called by other code."""
    context = click.get_current_context(silent=True)
    return context is not None and context.find_root().obj is _PROGRAM


def as_started(text: str, context: click.Context | None = None) -> str:
    """A text whose commands can be typed into the shell from which the program was started.

    Args:
        text: Names them ``autoquant-ray COMMAND``, as files do.
        context: Of a command; default the one that runs in this thread.
    """
    context = context or click.get_current_context(silent=True)
    root = None if context is None else context.find_root()
    if root is None or root.obj is not _PROGRAM or not isinstance(root.command, click.Group):
        return text
    commands = "|".join(map(re.escape, root.command.commands))
    return re.sub(rf"(?<![\w./-]){_NAME}(?= (?:{commands})\b)", lambda _: _program(), text)


def _program() -> str:
    """How the program was started; its name where nobody can tell."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        python = sys.orig_argv[0]  # sys.executable is another while workers are forked
        return f"{_typed(python) if os.sep in python else python} -m autoquant_ray"
    return _typed(sys.argv[0]) if os.access(script, os.X_OK) and script.is_file() else _NAME


def _typed(program: str) -> str:
    """The name of a program that ``PATH`` leads to, else its path, the shorter of two."""
    path = Path(program)
    on_path = shutil.which(path.name)
    if on_path is not None and _place(on_path) == _place(path):
        return path.name
    relative = os.path.relpath(path)
    relative = relative if os.sep in relative else os.path.join(os.curdir, relative)
    return shlex.quote(min(relative, os.path.abspath(path), key=len))


def _place(program: str | Path) -> Path:
    """Where a program lies; a link in a virtual environment stays one."""
    return Path(program).parent.resolve() / Path(program).name


def option_names(command: click.Command) -> set[str]:
    """Options of a command and of all commands below it, as Python names them."""
    flags = (flag for parameter in command.params for flag in parameter.opts)
    names = {flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return names.union(*map(option_names, below))


class _FlagFormatter(logging.Formatter):
    """Log lines; our own in the words of the command line."""

    def __init__(self, context: click.Context | None) -> None:
        super().__init__("%(message)s")
        self._context = context
        self._names = set() if context is None else option_names(context.find_root().command)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.name.partition(".")[0] == _PACKAGE:
            text = as_started(as_flags(text, self._names), self._context)
        return printable(text)


def set_up_logging(verbose: bool) -> None:
    """Our own messages on stderr; libraries' warnings only with ``--verbose``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_FlagFormatter(click.get_current_context(silent=True)))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(_PACKAGE).setLevel(logging.DEBUG if verbose else logging.INFO)
    if verbose:
        logging.getLogger().setLevel(logging.DEBUG)
    else:
        warnings.simplefilter("ignore")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # not each try of an absent hub


@contextmanager
def only_ours_on_stdout() -> Iterator[None]:
    """Send what libraries write to file descriptor 1 (HiGHS does, from C++) to stderr."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        yield
        return
    sys.stdout.flush()
    saved = os.dup(descriptor)
    os.dup2(sys.stderr.fileno(), descriptor)
    try:
        yield
    finally:
        os.dup2(saved, descriptor)
        os.close(saved)
