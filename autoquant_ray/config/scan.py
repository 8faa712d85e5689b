"""The one validated description of a scan: YAML in, command-line flags over it, JSON out.

A field is written once, here or in :mod:`autoquant_ray.config.search_space`: the command line
builds its options from these fields, a YAML file uses the same names, and ``run.json`` holds the
resolved values. Which stage a field belongs to stands in :mod:`autoquant_ray.config.stage_fields`.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from autoquant_ray.config.expert_groups import LAYER
from autoquant_ray.config.hold_out import HoldOut, parse_hold_out
from autoquant_ray.config.runtime_env import RuntimeEnv
from autoquant_ray.config.search_space import SearchSpace
from autoquant_ray.config.sources import Data, FileKind, parse_data
from autoquant_ray.config.values import (
    checked_places,
    parse_bytes,
    parse_gib,
    parse_labels,
    parse_row_share,
    parse_seconds,
    parse_share,
    parse_workers,
    unless_none,
)
from autoquant_ray.formats.kv_cache import kv_names, limit_problem
from autoquant_ray.serving.rules import target_problem

LARGEST_SEED = 2**63 - 1
"""What generators of random numbers and Parquet files take."""


class ScanConfig(SearchSpace):
    """Everything that one scan needs, from the data to the budget and the workers."""

    data: Data = Field(
        description="Calibration data: file of text, JSONL, CSV or Parquet (texts, chats, "
        "image-text pairs), folder of them, hub id, or 'pydoc' (English text that comes with "
        "Python); docs/data.md shows each. Several, each given as NAME=SOURCE, are domains with "
        "scores of their own; an existing path with '=' in it is a path."
    )
    domain_field: str | None = Field(
        default=None,
        description="Column that holds the domain of each text. Scores are kept per domain, so "
        "that solve can weigh them.",
    )
    out: str = Field(description="Run directory to write: local path, s3:// or gs://.")
    read_as: FileKind | None = Field(
        default=None,
        description="What files of data hold: text (a sample per line), json (rows, one per line "
        "or in a list), csv, tsv, parquet or arrow. Default: what their ending says.",
        json_schema_extra={"flag": "as"},
    )
    text_field: str = Field(default="text", description="Column that holds the text.")
    split: str = Field(default="train", description="Split of a dataset folder or hub id.")
    pack: bool = Field(
        default=False, description="Chop the text into windows of seq-len instead of samples."
    )
    samples: int = Field(
        default=128,
        ge=1,
        description="Number of samples to use at most: the first ones, whatever their domain-field "
        "says; of several sources an equal share each, which others do not fill up.",
    )
    hold_out: HoldOut = Field(
        default="auto",
        description="Of a source that the scan would use up, how much is kept for evaluate and "
        "refine, from its end: a number of samples, or a share such as 20%. auto: a tenth, at "
        "least 2 samples, where there are 20.",
    )
    data_seed: int | None = Field(
        default=None,
        ge=0,
        le=LARGEST_SEED,
        description="Shuffle the texts with this seed, through a buffer of 10,000, so that another "
        "subset of them is used. Default: the first ones, in the data's own order.",
    )
    seq_len: int = Field(default=512, ge=2, description="Longest sample, in tokens.")
    loss_on: Literal["all", "answer"] = Field(
        default="all",
        description="Tokens that count in the loss: all, or only the answers of chats and prompts.",
    )
    skip_bad_samples: bool = Field(
        default=False,
        description="Skip and count chats that cannot be used, instead of stopping: an image is "
        "damaged, the model's template refuses them, they hold no messages.",
    )
    step_tokens: int = Field(
        default=2048, ge=2, description="Tokens (padding included) per forward and backward step."
    )
    shard_samples: int = Field(
        default=8, ge=1, description="Samples per shard, the unit of work that is never lost."
    )
    stop_when_stable: float | None = Field(
        default=None,
        description="Stop scoring once the expected regret is below this share of the predicted "
        "KL, such as 0.01 or 1%: what the allocation at the scan's budget would lose because its "
        "scores are estimates. Looked at after 8, 12, 18, 27, ... shards; --max-formats is not "
        "considered. Calibration still reads all shards. Default: score all shards.",
    )
    bits: float | None = Field(
        default=None,
        gt=0,
        le=16,
        description="Budget: average stored bits per searched weight; a tied head's weights are "
        "not among them, and what quantizing it adds is.",
    )
    bytes: int | None = Field(
        default=None, description="Budget: bytes of the whole model's weights, e.g. 2.5GiB."
    )
    kv_bytes_per_token: float | None = Field(
        default=None,
        description="Limit on the KV cache: bytes that a token of context takes over all layers; "
        "with formats of the KV cache (kv_fp8, kv_nvfp4) only.",
    )
    bits_over: Literal["searched", "all"] = Field(
        default="searched",
        description="Weights that --bits averages over: searched groups, or all quantizable ones "
        "as ModelOpt does.",
    )
    cost: Literal["storage", "modelopt", "active_moe"] = Field(
        default="storage",
        description="Cost that --bits counts: stored bytes with scales, or ModelOpt's number; "
        "active_moe: of routed experts only the share that a token visits.",
    )
    max_formats: int | None = Field(
        default=None,
        ge=1,
        description="At most this many distinct formats: 16 bits are not counted, and a format "
        "rounded by several methods counts once.",
    )
    engine: str | None = Field(
        default=None, description="Only allocations that this can serve: vllm, sglang or trtllm."
    )
    gpu: str | None = Field(
        default=None, description="On ampere, ada, hopper, blackwell, or a card such as h100."
    )
    estimator: Literal["elementwise", "token", "sequence"] = Field(
        default="elementwise",
        description="Sum behind the score: per output element (diagonal Fisher), per token "
        "(keeps correlation across channels, noisier), or per output channel over each sample's "
        "tokens, which share a weight's error (needs all rows, noisier).",
    )
    labels: Literal["model", "data"] = Field(
        default="model",
        description="Labels of the loss: sampled from the model (true Fisher, predicts KL), or "
        "the next tokens of the data (as ModelOpt).",
    )
    label_draws: int = Field(
        default=1, ge=1, description="Label draws per token when labels come from the model."
    )
    sample_rows: float | Literal["auto"] = Field(
        default=1.0,
        description="Share of each module's rows (tokens) to score, drawn by importance: unbiased, "
        "faster, less exact. 1 scores all. auto: after the first shards, for each group and format "
        "so many that the error of the draw is a tenth of the error over the data.",
    )
    min_expert_tokens: int = Field(
        default=32,
        ge=0,
        description="Tokens below which the report names a routed expert, whose share of the "
        "scores rests on few tokens, or on none. The methods weighted and gptq leave its weights "
        "to plain rounding.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=LARGEST_SEED,
        description="Seed of the label draws and of drawn rows.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Compute type. auto: float32 on CPU, bfloat16 on CUDA."
    )
    difference_dtype: (
        Literal["auto", "float32", "bfloat16", "int8", "int8+float32", "int8+bfloat16"] | None
    ) = Field(
        default=None,
        description="Type of the products that give output differences, which sums need to about "
        "1%. auto: bfloat16 where every node multiplies it fast (CUDA from 8.0 on, CPUs with "
        "AVX512-BF16 or AMX), else float32; in a float32 model on GPUs of CUDA 8, 9 or 12 also "
        "int8: integers are multiplied where a linear's weight and input are such, with a scale "
        "per channel and per token or tensor. int8: these on any device, and the others as by "
        "auto, or in the type after the plus. Default: the compute type.",
    )
    placement: Literal["auto", "resident", "offload", "split"] = Field(
        default="auto",
        description="Where a worker's weights are. resident: all on its device. offload: decoder "
        "layers stay in the safetensors files, one at a time is on the device. split: spread over "
        "the worker's GPUs. auto: resident where it fits, else split with --gpus-per-worker 2 or "
        "more, else offload.",
    )
    keep_rounded: bool = Field(
        default=True,
        description="Keep what weighted and gptq fitted to weights once they are scored. no: for "
        "the allocation alone; evaluate, refine and export then refuse formats that need it, until "
        "a scan with --resume and yes fits them again.",
    )
    weight_cache_gib: float | Literal["auto"] = Field(
        default="auto",
        description="Memory for quantized weights per worker. auto: what one visit of a layer or "
        "of the head uses again, 2 GiB at most.",
    )
    activation_cache_gib: float = Field(
        default=1.0,
        ge=0,
        description="Memory for layer inputs per worker: half for the steps that visit a layer "
        "together, half to keep calibrated shards for scoring.",
    )
    keep_graphs: float | Literal["auto"] = Field(
        default="auto",
        description="Memory per worker, in GiB, for the graphs of as many layers as fit: the "
        "results of their matrix products and attentions, which the backward pass then does not "
        "compute again. 0: none. auto: on cpu a fifth of what a worker needs without, on cuda "
        "what is free. No number depends on it.",
    )
    workers: int | Literal["auto"] = Field(
        default="auto", description="Number of workers. auto: as many as the cluster has room for."
    )
    gpus_per_worker: float | None = Field(
        default=None, ge=0, description="GPUs each worker reserves. Default: 1 on cuda, 0 on cpu."
    )
    cpus_per_worker: int = Field(
        default=1,
        ge=1,
        description="CPUs each worker reserves and computes with. Part of the result: another "
        "number of threads may change the last bits of a sum.",
    )
    wait_for_workers: float | None = Field(
        default=None,
        description="How long to wait for a cluster that has too little for the workers, such as "
        "20m: its autoscaler is asked for the nodes. auto workers wait for the first. Say --device "
        "cuda where the cluster begins without GPUs. Default: such a cluster is an error at once.",
    )
    accelerator: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        description="Run workers only on nodes with this accelerator, by Ray's name for it, such "
        "as H100 or A100-80G.",
    )
    node_labels: dict[str, str] = Field(
        default_factory=dict,
        description="Run workers only on nodes that Ray was started on with this label. May be "
        "repeated.",
        json_schema_extra={"flag": "node_label"},
    )
    grace_s: float = Field(
        default=20.0,
        ge=0,
        description="On SIGTERM or Ctrl-C, seconds to wait for shards in flight; a second signal "
        "stops at once. Keep it below Kubernetes' terminationGracePeriodSeconds.",
    )
    address: str = Field(
        default="auto",
        description="Ray cluster: auto (that of RAY_ADDRESS or of 'ray start' on this machine, "
        "else local), local (of this command alone), or an address such as ray://HOST:10001.",
    )

    runtime_env: RuntimeEnv | None = Field(
        default=None,
        description="What workers get besides what their nodes have: pip or uv, env_vars, "
        "working_dir, as Ray's runtime_env has them.",
    )

    @field_validator("data", "out", "address", mode="before")
    @classmethod
    def _refuse_credentials(cls, value: Any) -> Any:
        return checked_places(value)

    @field_validator("data", mode="before")
    @classmethod
    def _parse_data(cls, value: Any) -> Any:
        if not isinstance(value, str | list | tuple | dict):
            raise ValueError("must be a source, or several as name: source")
        return parse_data(value)

    _parse_bytes = field_validator("bytes", mode="before")(unless_none(parse_bytes))
    _parse_hold_out = field_validator("hold_out", mode="before")(parse_hold_out)
    _parse_share = field_validator("stop_when_stable", mode="before")(unless_none(parse_share))
    _parse_workers = field_validator("workers", mode="before")(parse_workers)
    _parse_wait = field_validator("wait_for_workers", mode="before")(unless_none(parse_seconds))
    _parse_row_share = field_validator("sample_rows", mode="before")(parse_row_share)
    _parse_rooms = field_validator("weight_cache_gib", "keep_graphs", mode="before")(parse_gib)

    @field_validator("node_labels", mode="before")
    @classmethod
    def _parse_labels(cls, value: Any) -> Any:
        return parse_labels(value) if isinstance(value, str | list | tuple | dict) else value

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.bits is None and self.bytes is None:
            raise ValueError(
                "give a budget: `bits` B (average stored bits) or `bytes` N (whole model)"
            )
        if (problem := target_problem(self.engine, self.gpu)) is not None:
            raise ValueError(problem)
        limit = self.kv_bytes_per_token
        if (problem := limit_problem(bool(kv_names(self.formats)), limit)) is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _check_estimator(self) -> Self:
        if self.estimator == "sequence" and self.sample_rows != 1:
            raise ValueError(
                "`estimator` sequence adds up over all tokens of a sample, and `sample_rows` "
                f"{self.sample_rows} draws some; leave out one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        if self.expert_groups != LAYER and self.stop_when_stable is not None:
            raise ValueError(
                "`stop_when_stable` cannot judge experts apart, some of which see no token in the "
                "first shards; leave it out, or `expert_groups`"
            )
        return self

    @model_validator(mode="after")
    def _check_domains(self) -> Self:
        if isinstance(self.data, str):
            return self
        if self.domain_field is not None:
            raise ValueError(
                "`domain_field` and named sources both name domains; give one source without a "
                "name, or leave out `domain_field`"
            )
        if self.samples < len(self.data):
            raise ValueError(
                f"`samples` {self.samples} is less than one for each of {len(self.data)} sources; "
                "give more samples"
            )
        return self

    @model_validator(mode="after")
    def _check_accelerator_is_used(self) -> Self:
        if self.accelerator is not None and self.device == "cpu" and not self.gpus_per_worker:
            raise ValueError(
                f"`accelerator` {self.accelerator} is a kind of GPU, and `device` cpu computes on "
                "none; leave out one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_split_has_gpus(self) -> Self:
        if self.placement == "split" and (self.device == "cpu" or (self.gpus_per_worker or 0) < 2):
            raise ValueError(
                "`placement` split spreads a model over the GPUs of one worker; give "
                "`gpus_per_worker` 2 or more and a `device` that is not cpu"
            )
        return self
