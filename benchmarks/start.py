"""What a start costs: CPU seconds of ``plan`` and of a whole small scan, all processes together.

The model is a random Llama of 260,032 parameters with a word tokenizer, the scan has 32 samples in
8 shards and two workers in a Ray cluster of its own: nearly all of it is importing. With
``--other`` the same runs in another checkout, in turns, and the ratio of the medians is printed.
Processes are sampled 20 times a second and count with the time that was last seen. With ``--demo``
the demo is measured too, whose model is a real one::

    python benchmarks/start.py --rounds 3 --other ../old --demo
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import transformers
from machine import describe_machine
from same_bytes import save_random

ROOT = Path(__file__).resolve().parents[1]
WORDS = 512
FORMATS = "wint4_afp16,wfp8_afp8,wint8_aint8,wfp4_afp16:max"


def main() -> None:
    """Measure in turns; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--other", type=Path, help="another checkout of this repository")
    parser.add_argument("--demo", action="store_true", help="measure the demo too")
    options = parser.parse_args()
    checkouts = {"this": ROOT} | ({"other": options.other.resolve()} if options.other else {})
    seconds: dict[str, dict[str, list[float]]] = {}
    walls: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        save_model()
        for number in range(options.rounds):
            for name, checkout in checkouts.items():
                for command, words in commands(f"{name}-{number}", options.demo).items():
                    spent, wall = cpu_seconds(checkout, words)
                    seconds.setdefault(command, {}).setdefault(name, []).append(spent)
                    walls.setdefault(command, {}).setdefault(name, []).append(wall)
                    print(
                        f"round {number + 1}, {name}: {command} {spent:.1f} s, wall {wall:.1f}",
                        flush=True,
                    )
    summary: dict[str, Any] = {**describe_machine(), "rounds": options.rounds}
    for kind, measured in {"cpu": seconds, "wall": walls}.items():
        medians = {
            command: {name: round(statistics.median(values), 2) for name, values in sides.items()}
            for command, sides in measured.items()
        }
        summary[f"{kind}_seconds"] = medians
        summary[f"{kind}_ratios"] = {
            command: round(sides["this"] / sides["other"], 3)
            for command, sides in medians.items()
            if "other" in sides
        }
    print(json.dumps(summary))


def commands(run: str, with_demo: bool) -> dict[str, list[str]]:
    """What is measured, by its name."""
    data = ["--data", "text.txt", "--samples", "32", "--shard-samples", "4", "--seq-len", "64"]
    work = ["--bits", "6", "--out", run, "--workers", "2", "--address", "local"]
    menu = ["model", "--formats", FORMATS]
    demo = {"demo": ["demo", "--out", f"{run}-demo"]} if with_demo else {}
    return {"plan": ["plan", *menu], "scan": ["scan", *menu, *data, *work], **demo}


def cpu_seconds(checkout: Path, words: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of a command of a checkout, with every process that it starts."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "RAY_AUTH_MODE": "disabled"}
    start = time.perf_counter()
    seen: dict[tuple[int, float], float] = {}
    with subprocess.Popen(
        [sys.executable, "-m", "autoquant_ray", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as command:
        root = psutil.Process(command.pid)
        while command.poll() is None:
            note(root, seen)
            time.sleep(0.05)
        wall = time.perf_counter() - start
    if command.returncode != 0:
        sys.exit(f"{' '.join(words)}: exit code {command.returncode}")
    return sum(seen.values()), wall


def note(root: psutil.Process, seen: dict[tuple[int, float], float]) -> None:
    """Note the CPU seconds of a process and of all that descend from it."""
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return
    for process in processes:
        try:
            times: Any = process.cpu_times()
            seen[process.pid, process.create_time()] = times.user + times.system
        except psutil.Error:
            continue


def save_model() -> None:
    """Write the model, its tokenizer and the text."""
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=True,
    )
    save_random(config, "model", num_words=WORDS)
    text = [f"w{position * position % 509}" for position in range(6000)]
    lines = (" ".join(text[start : start + 60]) for start in range(0, len(text), 60))
    Path("text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
