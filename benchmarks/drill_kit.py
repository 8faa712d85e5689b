"""What the fault drills are made of: a small model, and scorers that stop at a chosen shard so
that a fault lands in the middle of it.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import ray

from autoquant_ray import scan as scan_module
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.runs.names import CALIBRATION, SAMPLES

NUM_SHARDS = 12
_LIMIT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Pacing:
    """How scorers are slowed down.

    Attributes:
        folder: Where ``calls.txt`` (stage, shard, process, node of every call), ``held`` and
            ``release`` are.
        stage: Stage in which one shard is held, and ``shard`` which one; only its first call.
        used_bytes: Memory in use on the machine up to which the held call takes more and more,
            and then waits to be killed for it, instead of waiting for ``release``; 0 for none.
        pace_s: Seconds that every call takes more.
    """

    folder: str
    stage: str = ""
    shard: int = -1
    used_bytes: int = 0
    pace_s: float = 0.3


@dataclass(frozen=True, kw_only=True)
class PacedSpec:
    """Spec of a real scorer that is slowed down."""

    spec: Any
    pacing: Pacing

    def build(self) -> PacedScorer:
        """Build the real one and slow it down."""
        return PacedScorer(self.spec.build(), self.pacing)


class PacedScorer:
    """Computes what the real scorer computes, later."""

    def __init__(self, scorer: Any, pacing: Pacing) -> None:
        self._scorer = scorer
        self._pacing = pacing
        self._folder = Path(pacing.folder)

    def calibrate(self, samples: Any, shard: int) -> Any:
        """As :meth:`autoquant_ray.score.scorer.Scorer.calibrate`."""
        self._pass("calibrate", shard)
        return self._scorer.calibrate(samples, shard)

    def score(
        self, samples: Any, first_sample: int, calibration: Any, shard: int, row_shares: Any
    ) -> Any:
        """As :meth:`autoquant_ray.score.scorer.Scorer.score`."""
        self._pass("score", shard)
        return self._scorer.score(samples, first_sample, calibration, shard, row_shares)

    def _pass(self, stage: str, shard: int) -> None:
        call = f"{stage} {shard} {os.getpid()} {ray.get_runtime_context().get_node_id()}\n"
        with open(self._folder / "calls.txt", "a", encoding="utf-8") as stream:
            stream.write(call)
        time.sleep(self._pacing.pace_s)
        if (stage, shard) == (self._pacing.stage, self._pacing.shard):
            try:
                os.link(self._write_call(call), self._folder / "held")
            except FileExistsError:
                return
            self._hold()

    def _write_call(self, text: str) -> Path:
        path = self._folder / f"held-by-{os.getpid()}"
        path.write_text(text)
        return path

    def _hold(self) -> None:
        if self._pacing.used_bytes:
            _keep_in_use(self._pacing.used_bytes)
        wait_until((self._folder / "release").exists)


@dataclass
class Held:
    """The first call of the held shard, waiting in its worker."""

    folder: Path
    process: int
    node: str

    def release(self) -> None:
        """Let the call go on."""
        (self.folder / "release").touch()


@dataclass
class Drill:
    """A disturbed scan.

    Attributes:
        run: Its directory.
        pacing: How it was slowed down.
        fault_time: When the fault began, seconds since the epoch.
        notes: What the fault brought back.
    """

    run: Path
    pacing: Pacing
    fault_time: float = 0.0
    notes: list[Any] = field(default_factory=list)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The run's events of one name."""
        path = self.run / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def calls(self, stage: str) -> list[tuple[int, int, str]]:
        """Shard, process and node of every call of a stage that was started."""
        lines = [line.split() for line in (self._folder / "calls.txt").read_text().splitlines()]
        return [(int(line[1]), int(line[2]), line[3]) for line in lines if line[0] == stage]

    def next_shard_s(self) -> float:
        """Seconds from the fault to the next finished shard."""
        return min(e["time"] - self.fault_time for e in self._done_after_fault())

    def lost_shard_s(self) -> float | None:
        """Seconds from the fault to the end of the shard that it hit; None if it hit none."""
        done = self._done_after_fault(self.pacing.shard)
        return min((e["time"] - self.fault_time for e in done), default=None)

    def _done_after_fault(self, shard: int | None = None) -> list[dict[str, Any]]:
        done = [e for e in self.events("shard_done") if e["time"] >= self.fault_time]
        return [e for e in done if shard in (None, e["shard"])]

    @property
    def _folder(self) -> Path:
        return Path(self.pacing.folder)

    def wait_for_held(self) -> Held:
        """Wait until the shard is held; the fault begins now."""
        wait_until((self._folder / "held").exists)
        _, _, process, node = (self._folder / "held").read_text().split()
        self.fault_time = time.time()
        return Held(self._folder, int(process), node)

    def end_wait(self) -> None:
        """Let whoever waits for the held shard, or is held, go on."""
        (self._folder / "release").touch()
        with suppress(FileExistsError), open(self._folder / "held", "x") as stream:
            stream.write("score -1 0 none\n")


def wait_until(condition: Callable[[], Any]) -> None:
    """Poll; gives up with an error after two minutes."""
    end = time.monotonic() + _LIMIT_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"never came true: {condition}")
        time.sleep(0.02)


def _keep_in_use(used_bytes: int) -> None:
    """Take memory whenever the machine uses less than that; gives up after two minutes."""
    taken = []
    end = time.monotonic() + _LIMIT_S
    while time.monotonic() < end:
        memory = psutil.virtual_memory()
        if memory.total - memory.available < used_bytes:
            taken.append(b"\1" * (64 * 2**20))
        else:
            time.sleep(0.02)
    raise TimeoutError(f"{used_bytes} bytes were in use on the machine and nobody minded")


@contextmanager
def paced(pacing: Pacing) -> Iterator[None]:
    """Scans that start in this process get scorers that are slowed down."""
    make = scan_module._scoring_spec

    def make_paced(*arguments: Any) -> PacedSpec:
        return PacedSpec(spec=make(*arguments), pacing=pacing)

    with mock.patch.object(scan_module, "_scoring_spec", make_paced):
        yield


def disturb(config: ScanConfig, pacing: Pacing, fault: Callable[[Drill, Held], Any]) -> Drill:
    """Go on with a scan in a thread of this process; the fault happens once the shard is held.

    Ray starts nodes in the main thread only, so the fault has it.

    Raises:
        BaseException: What the scan or the fault raised.
    """
    drill, errors = Drill(Path(config.out), pacing), []

    def scan() -> None:
        try:
            with paced(pacing):
                scan_module.run_search(config, "resume")
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)
            drill.end_wait()

    thread = threading.Thread(target=scan, name="scan")
    thread.start()
    try:
        held = drill.wait_for_held()
        if not errors:
            drill.notes.append(fault(drill, held))
    except BaseException:
        drill.end_wait()
        raise
    finally:
        thread.join()
    if errors:
        raise errors[0]
    return drill


def make_inputs(folder: Path) -> dict[str, Any]:
    """A random Llama of two layers with a word tokenizer, and a text; fields of a ScanConfig."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = {f"w{index}": index for index in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(folder / "model")
    tokens_NT = np.random.default_rng(0).integers(0, 256, size=(NUM_SHARDS, 24))
    lines = [" ".join(f"w{token}" for token in tokens_T) for tokens_T in tokens_NT]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    return {
        "model": str(folder / "model"),
        "data": str(folder / "text.txt"),
        "formats": ("wint4_afp16:max", "wint8_aint8"),
        "bits": 8,
        "shard_samples": 1,
        "device": "cpu",
    }


def rewind(finished: Path, target: Path, stage: str) -> Path:
    """Copy a finished run as it was before a stage (``calibrate`` or ``score``)."""
    kept = ["shards", "plan"]
    target.mkdir(parents=True, exist_ok=True)
    shutil.copytree(finished / SAMPLES, target / SAMPLES)
    shutil.copy(finished / "plan.parquet", target)
    if stage == "score":
        kept.append("calibrate")
        shutil.copytree(finished / CALIBRATION, target / CALIBRATION)
        shutil.copy(finished / "calibration.parquet", target)
    values = json.loads((finished / "run.json").read_text())
    values["stages"] = {name: values["stages"][name] for name in kept}
    (target / "run.json").write_text(json.dumps(values))
    return target
