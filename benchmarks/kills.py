"""SIGKILL at random moments, and full disks: the command, given again, ends with the same bytes.

    python benchmarks/kills.py --rounds 20 --full-disks 6 --seed 0
    python benchmarks/kills.py scan export --rounds 5

Each command (scan, evaluate, refine, nightly, export) first runs undisturbed; its files are the
reference. A round starts it again on the same input in the same place, waits for a moment drawn
evenly over the seconds that the reference took, and kills its driver, one of its workers, or the
raylet of its Ray cluster, in turns. What had ended before its moment is drawn again. Then the same
command is given again, undisturbed (an export that was killed after its folder was in its place is
refused then, exit code 2), and all files are compared with the reference: names (files
that start with a dot included) and content, without times, process numbers and the run's id.

With ``--full-disks N`` each command also runs N times on a disk that has room for a drawn share of
what it writes, and must end with exit code 1 and a line that says so; then there is room. That
mounts a tmpfs, which needs root on Linux.

Prints a line per round, a table in Markdown (``--table FILE`` writes it too), and JSON. Processes
are real and talk over Ray, but are forked from one that has torch, transformers and ModelOpt
imported (``tests/support``), so that moments fall into the work and not into imports. Only
processes that this script has started are killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import torch
import transformers
import yaml
from drill_disk import fill, small_disk
from machine import describe_machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from small_models import make_tokenizer
from warm_commands import WarmProcess, own_fork_server

NUM_LINES = 48
FORMATS = "wint4_afp16,wint4_afp16:awq,wfp8_afp8"
SCAN: dict[str, Any] = {
    "formats": FORMATS.split(","),
    "bits": 6,
    "samples": 24,
    "shard_samples": 2,
    "seq_len": 64,
    "workers": 2,
    "address": "local",
}
CLUSTER = ["--workers", "2", "--address", "local"]
NIGHTS = ("2026-11-01", "2026-11-02")
TARGETS = ("driver", "worker", "raylet")
DISK = "disk full"
IS_DONE = "is not empty"
"""What an export says of a folder that is there: the killed one had put it there, whole."""
LIMIT_S = 300.0
"""A command that takes longer hangs."""
_TIMES = ("created", "finished", "pid", "run_id", "seconds", "started", "wall_s")
"""Keys and columns that differ between two undisturbed runs."""
_UNCOMPARED = ("events.jsonl", "report.html", "run.json")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command under test.

    Attributes:
        name: Of the command.
        words: All of its arguments.
        needs: Its input below the folder of prepared inputs, copied into the place of work before
            each round; empty for none.
        targets: What may be killed: a command without a cluster has a driver only.
    """

    name: str
    words: list[str]
    needs: str = ""
    targets: tuple[str, ...] = TARGETS


@dataclass(kw_only=True)
class Round:
    """What came of a kill."""

    command: str
    target: str
    moment_s: float
    code: int | None
    ended_s: float
    error: str
    code_again: int | None = None
    differences: list[str] = field(default_factory=list)

    @property
    def is_identical(self) -> bool:
        """Whether the reference's files are there after the second command."""
        return not self.differences


class Laboratory:
    """A model, a text, prepared runs, and the place in which every command works.

    Args:
        folder: Empty; everything is below it.

    Attributes:
        reference: What :meth:`contents` gives once the command under test has ended undisturbed.
        num_written: Bytes that it has written by then.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = folder / "place"
        self.prepared = folder / "prepared"
        self.reference: dict[str, str] = {}
        self.num_written = 0
        self._write_inputs()
        scan = SCAN | {"model": str(folder / "model"), "data": str(folder / "text.txt")}
        (folder / "scan.yaml").write_text(yaml.safe_dump(scan))
        job = scan | {"kind": "nightly", "name": "tiny"}
        (folder / "job.yaml").write_text(yaml.safe_dump(job))

    def commands(self) -> dict[str, Command]:
        """All commands, by name."""
        run, runs = str(self.place / "run"), str(self.place / "runs")
        config = ["--config", str(self.folder / "scan.yaml"), "--out", run, "--resume"]
        measured = [run, "--samples", "8", "--seq-len", "64", *CLUSTER]
        night = ["nightly", str(self.folder / "job.yaml"), "--runs", runs, "--date"]
        served = ["--out", str(self.place / "served"), "--max-shard-size", "100KB"]
        commands = (
            Command(name="scan", words=["scan", *config]),
            Command(
                name="evaluate",
                words=["evaluate", *measured, "--num-random", "2", "--audit", "4"],
                needs="scanned",
            ),
            Command(name="refine", words=["refine", *measured, "--trials", "12"], needs="scanned"),
            Command(name="nightly", words=[*night, NIGHTS[1]], needs="first-night"),
            Command(
                name="export",
                words=["export", run, *served],
                needs="scanned",
                targets=("driver",),
            ),
        )
        return {command.name: command for command in commands}

    def prepare(self, names: Iterable[str]) -> None:
        """Make the inputs of commands: a finished scan, and the first night."""
        commands = self.commands()
        needed = {commands[name].needs for name in names}
        for name, command in {
            "scanned": commands["scan"].words,
            "first-night": [*commands["nightly"].words[:-1], NIGHTS[0]],
        }.items():
            if name not in needed:
                continue
            self.reset("")
            code, _, text = finish(start(command))
            if code != 0:
                sys.exit(f"{name}: exit code {code}, {text}")
            shutil.copytree(self.place, self.prepared / name)

    def reset(self, needs: str) -> None:
        """Give the place of work the content that it has before a command."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        self.fill_in(needs)

    def fill_in(self, needs: str) -> None:
        """Put a command's input into the empty place of work."""
        if needs:
            shutil.copytree(self.prepared / needs, self.place, dirs_exist_ok=True)

    def num_bytes(self) -> int:
        """Bytes in the place of work, by whole blocks of 4 KiB as a tmpfs counts them."""
        files = (path for path in self.place.rglob("*") if path.is_file())
        return sum(-(-path.stat().st_size // 4096) * 4096 for path in files)

    def contents(self) -> dict[str, str]:
        """Files of the place of work -> digests of what is compared."""
        paths = (path for path in sorted(self.place.rglob("*")) if not path.is_dir())
        return {str(path.relative_to(self.place)): digest(path) for path in paths}

    def _write_inputs(self) -> None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(self.folder / "model", max_shard_size="1MB")
        make_tokenizer().save_pretrained(self.folder / "model")
        generator = random.Random(0)
        lines = (
            " ".join(f"w{generator.randrange(256)}" for _ in range(48)) for _ in range(NUM_LINES)
        )
        (self.folder / "text.txt").write_text("\n".join(lines) + "\n")


def digest(path: Path) -> str:
    """Of a file's content without what differs between two undisturbed runs."""
    if path.name in _UNCOMPARED:
        return "not compared"
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        kept = [name for name in table.column_names if name not in _TIMES]
        if len(kept) < len(table.column_names):
            metadata = sorted((table.schema.metadata or {}).items())
            content = repr((metadata, table.select(kept).to_pylist())).encode()
        else:
            content = path.read_bytes()
    elif path.suffix == ".json":
        content = json.dumps(_without_times(json.loads(path.read_text()))).encode()
    elif path.suffix == ".md":
        text = re.sub(r"\d{8}T\d{6}Z|\d{4}-\d\d-\d\dT[\d:]+Z", "DATE", path.read_text())
        content = re.sub(r"\b[\d.,]+ (s|min|h)\b", "TIME", text).encode()
    else:
        content = path.read_bytes()
    return hashlib.sha256(content).hexdigest()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(v) for key, v in value.items() if key not in _TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def start(words: list[str]) -> WarmProcess:
    """Start the command line."""
    return WarmProcess(words, os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"})


def finish(process: WarmProcess) -> tuple[int | None, float, str]:
    """Wait for the end of a command and of its cluster.

    Returns:
        Exit code (None: it hung and was killed), seconds, stderr.
    """
    begun = time.monotonic()
    with process:
        try:
            code: int | None = process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
            process.kill()
        seconds = time.monotonic() - begun
        _, err = process.communicate()
    wait_for_cluster()
    return code, seconds, err


def error_of(stderr: str) -> str:
    """The command's line about its error, '' where there is none."""
    lines = (line for line in stderr.splitlines() if line.startswith(("error: ", "interrupted")))
    return next(lines, "")


def ray_processes() -> list[psutil.Process]:
    """Processes of clusters that commands of this script have started and that are alive."""
    alive = []
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
            if process.status() != psutil.STATUS_ZOMBIE and any("ray" in w for w in words[:2]):
                alive.append(process)
        except psutil.Error:
            continue
    return alive


def wait_for_cluster() -> None:
    """Wait until nothing is left of a killed command's cluster; what stays is killed."""
    _, alive = psutil.wait_procs(ray_processes(), timeout=30)
    for process in alive:
        process.kill()


def find_target(process: WarmProcess, target: str) -> psutil.Process | None:
    """The process to kill, None where there is none at this moment."""
    try:
        driver = psutil.Process(process.pid)
        if target == "driver":
            return driver
        raylets = [p for p in driver.children() if p.name() == "raylet"]
        if target == "raylet" or not raylets:
            return raylets[0] if raylets else None
        workers = [
            p
            for p in psutil.Process().children(recursive=True)
            if p.name().startswith("ray::ShardWorker") or "ray::ShardWorker" in p.cmdline()[0:1]
        ]
        return random.choice(workers) if workers else None
    except (psutil.Error, IndexError):
        return None


def disturb(
    laboratory: Laboratory, command: Command, target: str, moments: list[float]
) -> Round | None:
    """Kill a command once; None if it had ended before each of the moments."""
    for moment_s in moments:
        laboratory.reset(command.needs)
        process = start(command.words)
        begun = time.monotonic()
        victim = None
        while process.poll() is None:
            late_s = time.monotonic() - begun - moment_s
            if late_s >= 0 and (victim := find_target(process, target)) is not None:
                break
            time.sleep(min(0.005, max(0.0005, -late_s)))
        if victim is None:  # it has ended
            finish(process)
            continue
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            finish(process)
            continue
        killed_s = time.monotonic() - begun
        code, ended_s, stderr = finish(process)
        if code not in (0, -signal.SIGKILL) and not error_of(stderr):
            print(stderr[-2000:], file=sys.stderr, flush=True)
        return Round(
            command=command.name,
            target=target,
            moment_s=round(killed_s, 2),
            code=code,
            ended_s=round(ended_s, 1),
            error=error_of(stderr),
        )
    return None


def fill_disk(laboratory: Laboratory, command: Command, shares: list[float]) -> Round | None:
    """Run a command on a disk with room for a share of what it writes; None if all was room enough.

    The command is given again, with room, on the same disk.
    """
    for share in shares:
        shutil.rmtree(laboratory.place)
        with small_disk(laboratory.place, size_mib=32):
            laboratory.fill_in(command.needs)
            ballast = laboratory.place / "ballast"
            fill(ballast, but=int(laboratory.num_written * share))
            code, ended_s, stderr = finish(start(command.words))
            if code == 0:
                continue
            error = error_of(stderr)
            ballast.unlink()
            result = Round(
                command=command.name,
                target=DISK,
                moment_s=round(share, 2),
                code=code,
                ended_s=round(ended_s, 1),
                error=error,
            )
            result.code_again, _, stderr = finish(start(command.words))
            again = laboratory.contents() if result.code_again == 0 else {}
        if "No space left on device" not in error or len(error) > 400:
            result.differences.append(f"no line about the disk: {stderr[-500:]}")
        result.differences += compare(laboratory.reference, again) if again else [error_of(stderr)]
        return result
    return None


def compare(reference: dict[str, str], contents: dict[str, str]) -> list[str]:
    """Names of files that differ, and how."""
    lost = [f"{name} is missing" for name in reference if name not in contents]
    new = [f"{name} is left over" for name in contents if name not in reference]
    both = (name for name in reference if name in contents)
    return [*lost, *new, *(f"{n} differs" for n in both if reference[n] != contents[n])]


def rounds_of(
    laboratory: Laboratory,
    command: Command,
    number: int,
    num_full_disks: int,
    generator: random.Random,
) -> list[Round]:
    """All rounds of a command, after two undisturbed runs whose files must be the same."""
    references = []
    for _ in range(2):
        laboratory.reset(command.needs)
        num_before, begun = laboratory.num_bytes(), time.monotonic()
        code, _, stderr = finish(start(command.words))
        took_s = time.monotonic() - begun
        if code != 0:
            sys.exit(f"{command.name}: exit code {code}, {stderr}")
        references.append(laboratory.contents())
    laboratory.num_written = laboratory.num_bytes() - num_before
    laboratory.reference = reference = references[0]
    if differences := compare(*references):
        sys.exit(f"{command.name}: two undisturbed runs differ: {differences}")
    print(f"{command.name}: undisturbed {took_s:.1f} s, {len(reference)} files", flush=True)
    rounds = []
    for _ in range(num_full_disks):
        shares = sorted((generator.uniform(0, 1) for _ in range(4)), reverse=True)
        result = fill_disk(laboratory, command, shares)
        if result is not None:
            rounds.append(result)
            print(json.dumps(vars(result)), flush=True)
    for index in range(number):
        target = command.targets[index % len(command.targets)]
        moments = [generator.uniform(0, took_s) / (1 + index // 3) for index in range(12)]
        result = disturb(laboratory, command, target, moments)
        if result is None:
            print(f"{command.name}: no moment for {target}", flush=True)
            continue
        result.code_again, _, stderr = finish(start(command.words))
        result.differences = compare(reference, laboratory.contents())
        was_done = not result.differences and IS_DONE in stderr
        if result.code_again != 0 and not was_done:
            result.differences.append(stderr[-1000:])
        rounds.append(result)
        print(json.dumps(vars(result)), flush=True)
    return rounds


def table(rounds: list[Round]) -> str:
    """Markdown: a row per command and target."""
    lines = [
        "| command | killed | times | the disturbed command ended with | longest end | "
        "given again: same bytes |",
        "|---|---|---|---|---|---|",
    ]
    for command, target in dict.fromkeys((r.command, r.target) for r in rounds):
        of_row = [r for r in rounds if (r.command, r.target) == (command, target)]
        codes = Counter("a hang" if r.code is None else str(r.code) for r in of_row)
        ends = ", ".join(f"{code} ({count})" for code, count in sorted(codes.items()))
        longest_s = max(r.ended_s for r in of_row)
        same = sum(r.is_identical for r in of_row)
        lines.append(
            f"| `{command}` | {target} | {len(of_row)} | {ends} | {longest_s:.0f} s | "
            f"{same} of {len(of_row)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the rounds; print a table, and JSON at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="COMMAND", help="commands; all by default")
    parser.add_argument("--rounds", type=int, default=20, help="kills per command")
    parser.add_argument("--full-disks", type=int, default=0, help="full disks per command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--table", type=Path, help="file for the table")
    options = parser.parse_args()
    own_fork_server()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        laboratory = Laboratory(Path(folder))
        commands = laboratory.commands()
        for name in options.names:
            if name not in commands:
                parser.error(f"there is no command {name!r}; give some of {', '.join(commands)}")
        names = options.names or list(commands)
        laboratory.prepare(names)
        rounds: list[Round] = []
        for name in names:
            generator = random.Random(f"{options.seed} {name}")
            random.seed(f"{options.seed} {name}")
            rounds += rounds_of(
                laboratory, commands[name], options.rounds, options.full_disks, generator
            )
    text = table(rounds)
    print(text)
    if options.table:
        options.table.write_text(text)
    print(json.dumps({"rounds": [vars(r) for r in rounds]} | describe_machine()))
    sys.exit(not all(r.is_identical for r in rounds))


if __name__ == "__main__":
    main()
