"""The sides that ``vs_modelopt.py`` compares: ModelOpt, our scoring core, our scan through Ray.

Each runs alone in its own process on one case, and reports seconds of calibration and scoring
(loading the model and reading the data are not counted), its peak memory (of the process, or what
torch allocated on a CUDA device) and its scores in ModelOpt's scale.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from kl_prediction import make_spec, read_samples

from autoquant_ray import ScanConfig
from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.config.values import parse_row_share
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.data.texts import read_texts
from autoquant_ray.distributed.host_memory import reuse_freed_memory
from autoquant_ray.distributed.scoring import DrawingTrial
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.formats.smoothed import needs_calibration
from autoquant_ray.models.find import ModelRef, find_model
from autoquant_ray.models.load import build_skeleton, load_model
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer
from autoquant_ray.plan.memory import footprint, kept_graphs
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.quantize.calibration import merge_calibrations
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.score.drawing.shares import MIN_SAMPLES, MIN_SHARDS, choose_shares
from autoquant_ray.score.scorer import Scorer

PRESETS = (
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT8_DEFAULT_CFG",
    "FP8_DEFAULT_CFG",
    "INT8_WEIGHT_ONLY_CFG",
)
PAIRS = tuple(
    f"w{w}_a{a}{method}"
    for w, method in (("int4", ":max"), ("fp8", ""), ("int8", ""))
    for a in ("fp16", "fp8", "int8", "int4")
)
"""Rounded by the maximum, as ModelOpt's search does it."""
WEIGHT_ONLY = (
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT8_WEIGHT_ONLY_CFG",
    "wfp8_afp16",
    "W4A16_NVFP4_CFG",
)
"""Menu that calibrates nothing."""
PADDED_LENGTH = 512


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        formats: The menu.
        is_captions: Short captions, which ModelOpt's side pads to 512 tokens; else full windows.
    """

    formats: tuple[str, ...]
    is_captions: bool = False


CASES = {
    "unpadded": Case(PRESETS),
    "captions": Case(PRESETS, is_captions=True),
    "formats": Case(PAIRS),
    "fp4": Case(("NVFP4_DEFAULT_CFG", "MXFP4_DEFAULT_CFG")),
    "weight-only": Case(WEIGHT_ONLY),
}


def side(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one side: ``modelopt``, ``core[:SHARE]`` or ``ray[:SHARE]`` a share of rows or auto.

    ``core+GIB`` and ``ray+GIB`` keep graphs in so much memory, ``core+0`` none; ``core@TYPE`` and
    ``ray@TYPE`` take that type for the products of output differences.
    """
    torch.set_num_threads(options.threads)
    name, _, share = name.partition(":")
    name, _, dtype = name.partition("@")
    kind, _, graphs = name.partition("+")
    if kind == "modelopt":
        return _run_modelopt(options)
    run: Callable[..., dict[str, Any]] = _run_core if kind == "core" else _run_ray
    return run(options, parse_row_share(share or 1), graphs or "auto", dtype or None)


def _model(options: argparse.Namespace) -> ModelRef:
    return find_model(options.model or str(find_demo_model()))


def _captions(options: argparse.Namespace) -> list[str]:
    """Sentences of 60 to 180 characters of the text that comes with Python."""
    text = " ".join(read_texts(DataSpec(source="pydoc", num_samples=1, seq_len=2, pack=True)))
    sentences = [" ".join(sentence.split()) for sentence in text.split(". ")]
    return [s for s in sentences if 60 <= len(s) <= 180][: options.samples]


def _samples(options: argparse.Namespace, ref: ModelRef) -> list[list[int]]:
    """Token ids of every sample, unpadded."""
    if CASES[options.case].is_captions:
        tokenizer = load_tokenizer(_tokenizer_ref(options, ref))
        samples = [tokenizer(text)["input_ids"] for text in _captions(options)]
    else:
        samples = read_samples(_tokenizer_model(options, ref), options.samples, options.seq_len)
    size = build_skeleton(ref).config.vocab_size
    return [[token % size for token in sample] for sample in samples]


def _tokenizer_model(options: argparse.Namespace, ref: ModelRef) -> ModelRef:
    """A random model borrows the demo model's tokenizer; ids are taken modulo its vocabulary."""
    return find_model(str(find_demo_model())) if options.model else ref


def _tokenizer_ref(options: argparse.Namespace, ref: ModelRef) -> TokenizerRef:
    owner = _tokenizer_model(options, ref)
    return TokenizerRef(model=owner.path, gguf_file=owner.gguf_file)


def _batches(options: argparse.Namespace, samples: list[Any]) -> list[list[Any]]:
    return [samples[i : i + options.batch] for i in range(0, len(samples), options.batch)]


def _result(seconds: float, peak: float, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {"seconds": seconds, "peak_gib": peak, "scores": scores}


def _own_peak_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def now(device: str) -> float:
    """Seconds of the clock once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def score_shards(
    scorer: Scorer, shards: list[list[Any]], shard_samples: int, calibration: Any
) -> Iterator[Any]:
    """Scores of every shard; where the share of rows is auto, the first ones say the others'.

    As a scan does it, but for shards that are too few: there all rows are scored here too.
    """
    trials: list[DrawingTrial] = []
    shares_GF = None
    num_first = max(MIN_SHARDS, -(-MIN_SAMPLES // shard_samples))
    if scorer.spec.row_share == "auto" and num_first > len(shards) // 2:
        num_groups = 1 + max(scored.group for scored in scorer.spec.modules)
        shares_GF = np.ones((num_groups, len(scorer.spec.formats)))
    for number, shard in enumerate(shards):
        if shares_GF is None and len(trials) == num_first:
            shares_GF = choose_shares(trials)
        first = number * shard_samples
        result = scorer.score(shard, first, calibration, number, shares_GF)
        if result.trial is not None:
            trials.append(result.trial)
        yield result


RowShare = float | Literal["auto"]


def _run_core(
    options: argparse.Namespace, share: RowShare, graphs: str, difference_dtype: str | None
) -> dict[str, Any]:
    """Our scoring core in this process; shards of several batches of as many tokens each."""
    ref, formats = _model(options), CASES[options.case].formats
    samples = _samples(options, ref)
    size = options.shard_samples
    shards = [samples[i : i + size] for i in range(0, len(samples), size)]
    plan = build_plan(build_skeleton(ref), resolve_formats(formats, device=options.device))
    spec = dataclasses.replace(
        make_spec(ref, plan, "data"),
        device=options.device,
        dtype=options.dtype,
        step_tokens=options.step_tokens,
        row_share=share,
        difference_dtype=difference_dtype,
        **_room(options, plan, graphs),
    )
    reuse_freed_memory()
    scorer = Scorer(spec)
    start = now(options.device)
    calibrated = enumerate(shards) if needs_calibration(plan.formats) else ()
    calibration = merge_calibrations(scorer.calibrate(shard, n) for n, shard in calibrated)
    total, results = 0.0, score_shards(scorer, shards, size, calibration)
    for shard, result in zip(shards, results, strict=True):
        per_batch = result.num_tokens * options.batch / len(shard)
        total = total + result.sums.elementwise_GF / per_batch**2
    seconds = now(options.device) - start
    scores = {
        group.name: dict(zip(formats, map(float, total[index]), strict=True))
        for index, group in enumerate(plan.searched)
    }
    return _result(seconds, _own_peak_gib(options.device), scores)


def _room(options: argparse.Namespace, plan: Plan, graphs: str) -> dict[str, int | None]:
    """Memory for graphs and work, as a scan of the same samples would say it."""
    config = ScanConfig(
        model="benchmark",
        data="pydoc",
        out="nowhere",
        bits=8,
        samples=options.samples,
        seq_len=PADDED_LENGTH if CASES[options.case].is_captions else options.seq_len,
        step_tokens=options.step_tokens,
        dtype=options.dtype,
        device=options.device,
        placement="resident",
        keep_graphs=graphs,
    )
    memory = footprint(plan, config)
    kept = kept_graphs(plan, config, memory)
    return {"graph_bytes": kept.nbytes, "work_bytes": memory.work_bytes}


def _run_ray(
    options: argparse.Namespace, share: RowShare, graphs: str, difference_dtype: Any
) -> dict[str, Any]:
    """Our whole scan; seconds from ready workers to the last shard. Not for a random model."""
    from autoquant_ray import run_search

    with tempfile.TemporaryDirectory() as folder:
        data: dict[str, Any] = {"data": "pydoc", "pack": True, "seq_len": options.seq_len}
        if CASES[options.case].is_captions:
            lines = "\n".join(_captions(options))
            Path(folder, "captions.txt").write_text(lines)
            data = {"data": f"{folder}/captions.txt", "seq_len": PADDED_LENGTH}
        config = ScanConfig(
            model=_model(options).name,
            out=f"{folder}/run",
            formats=CASES[options.case].formats,
            samples=options.samples,
            shard_samples=options.shard_samples,
            step_tokens=options.step_tokens,
            labels="data",
            sample_rows=share,
            keep_graphs=graphs,
            difference_dtype=difference_dtype,
            device=options.device,
            dtype=options.dtype,
            workers=options.workers,
            cpus_per_worker=options.threads,
            address="local",
            bits=8,
            **data,
        )
        with _watching_workers() as peak:
            run_search(config)
        directory = RunDirectory(config.out)
        seconds = scoring_seconds(directory)
        scores: dict[str, dict[str, float]] = {}
        for row in directory.read_table("sensitivity.parquet").to_pylist():
            # Per shard in the file; a batch is one of several equal parts of a shard.
            score = row["modelopt_score"] * (options.shard_samples / options.batch) ** 2
            scores.setdefault(row["group"], {})[row["format"]] = score
    return _result(seconds, peak[0], scores)


def scoring_seconds(directory: RunDirectory) -> float:
    """From the moment that the last worker was ready to the last finished shard."""
    text = directory.read_bytes("events.jsonl").decode()
    events = [json.loads(line) for line in text.splitlines()]
    times: dict[str, list[float]] = {"worker_ready": [], "shard_done": []}
    for event in events:
        if event["event"] in times:
            times[event["event"]].append(event["time"])
    return max(times["shard_done"]) - max(times["worker_ready"])


@contextmanager
def _watching_workers() -> Iterator[list[float]]:
    """Highest peak memory of any scoring worker, in GiB, in a list of one number."""
    import psutil

    peak, stopped = [0.0], threading.Event()

    def watch() -> None:
        while not stopped.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "ShardWorker" in " ".join(process.cmdline()):
                        peak[0] = max(peak[0], _peak_gib(process.pid))
                except (psutil.Error, OSError):
                    continue

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peak
    stopped.set()
    thread.join()


def _peak_gib(process_id: int) -> float:
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def _run_modelopt(options: argparse.Namespace) -> dict[str, Any]:
    """``mtq.auto_quantize`` with all formats in one search."""
    import modelopt.torch.quantization as mtq

    ref, case = _model(options), CASES[options.case]
    batches = [
        _padded(batch, case, options.device) for batch in _batches(options, _samples(options, ref))
    ]
    model = load_model(ref, dtype=options.dtype, device=options.device)

    def loss_func(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = output.logits[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())

    start = now(options.device)
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": 8.0},
        quantization_formats=[modelopt_format(name, options.device) for name in case.formats],
        data_loader=batches,
        forward_step=lambda model, batch: model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ),
        loss_func=loss_func,
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        verbose=False,
    )
    seconds = now(options.device) - start
    scores = {
        name.removesuffix(".quant_recipe"): {
            _format_name(recipe, case): float(score)
            for recipe, score in zip(stats["formats"], stats["scores"], strict=True)
        }
        for name, stats in state["candidate_stats"].items()
    }
    return _result(seconds, _own_peak_gib(options.device), scores)


def _padded(batch: list[list[int]], case: Case, device: str) -> dict[str, Any]:
    """What a tokenizer with ``padding="max_length"`` gives; labels ignore the padding."""
    length = PADDED_LENGTH if case.is_captions else max(map(len, batch))
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    mask = torch.zeros(len(batch), length, dtype=torch.long)
    for row, sample in enumerate(batch):
        ids[row, : len(sample)] = torch.tensor(sample)
        mask[row, : len(sample)] = 1
    ids, mask = ids.to(device), mask.to(device)
    labels = ids.masked_fill(mask == 0, -100)
    return {
        "input_ids": ids,
        "attention_mask": mask if case.is_captions else None,
        "labels": labels,
    }


def modelopt_format(name: str, device: str = "cpu") -> Any:
    """A preset of ModelOpt, or a pair of the menu as a config with the same quantizers.

    On CPU, fp4 and MX quantizers name our backend, as ModelOpt has none for them there.
    """
    import modelopt.torch.quantization as mtq

    from autoquant_ray.quantize.backends.block_formats import for_cpu

    adapted = for_cpu if device == "cpu" else dict
    if hasattr(mtq, name):
        return adapted(getattr(mtq, name))
    (format_,) = resolve_formats([name], device=device)
    entries: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": format_.weight, "enable": True},
    ]
    if format_.input is not None:
        entries.append({"quantizer_name": "*input_quantizer", "cfg": format_.input, "enable": True})
    return adapted({"quant_cfg": entries, "algorithm": "max"})


def _format_name(recipe: Any, case: Case) -> str:
    """Our name of a recipe; ModelOpt names a config that is none of its presets by position."""
    name = str(recipe).partition("(")[0]
    position = name.removeprefix("CUSTOM_")
    return case.formats[int(position)] if position.isdecimal() else name
