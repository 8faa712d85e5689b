"""Models, runs and exports that real tools are to read, and what they should make of them.

A case is a folder:

    case.json              layout or tool, model, and a line per layer: format, rows, columns,
                           the squared error of its weights where nothing else is quantized,
                           their digest where the tool makes the same, and of a linear of an
                           expert where it is in memory
    out/                   the checkpoint, or
    recipe                 the recipe for the tool
    inputs.safetensors     what each layer is given, (T, I); equal for layers that are fused
    outputs.safetensors    what the planned layer makes of it, (T, O)
    ids.npy                windows of text, (W, S)
    log_probs.npy          the planned model's log-probabilities of the text, (W, S - 1), in nats
    moved.npy              the same with its 16-bit weights moved by a millionth

Every format of a case is pinned to layers in turn, so that each is read beside each other, and
those that it has for experts to the experts of a layer. Four models: SmolLM2-135M, which has a tied
head, and three random ones: tied (Qwen3), untied (Llama), and one with routed experts (Qwen3-MoE,
untied), whose linears are layers by the names of its files.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from engines.in_tools.answer import digest_of
from engines.planned import expert_linears, planned_model, text_log_probs, window_logits
from safetensors.torch import load_file, save_file

import autoquant_ray
from autoquant_ray.config.demo import demo_config, find_demo_model
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.data.texts import read_pydoc
from autoquant_ray.export.source import Source, read_source
from autoquant_ray.formats.format import NONE, Format
from autoquant_ray.formats.gguf_types import GGUF_TYPES, gguf_type_of
from autoquant_ray.models.find import find_model
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer
from autoquant_ray.runs.directory import RunDirectory

MODELS = ("smollm2", "tied", "untied", "experts")
SCANNED = (
    "wint8_aint8",
    "wint8_afp16",
    "wint6_g64_afp16",
    "wint5_g64_afp16",
    "wint4_g64_afp16",
    "wint3_g64_afp16",
    "wfp8_afp8",
    "wfp8_afp16",
    "wfp4_afp16",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "NVFP4_DEFAULT_CFG",
    "MXFP8_DEFAULT_CFG",
)
_INTEGERS = tuple(name for name in SCANNED if "int" in name and name != "wint8_aint8")
GGUF = "llama.cpp, its types"
CASES = {
    "compressed-tensors": (
        "wint8_aint8",
        "wint4_g64_afp16",
        "wfp8_afp8",
        "wint8_afp16",
        "NVFP4_DEFAULT_CFG",
        "wfp8_afp16",
        "FP8_PER_CHANNEL_PER_TOKEN_CFG",
        "wfp4_afp16",
        "MXFP8_DEFAULT_CFG",
        NONE,
    ),
    "compressed-tensors, int8": ("wint8_aint8", NONE),
    "compressed-tensors, integers": ("wint8_aint8", "wint4_g64_afp16", NONE),
    "modelopt": (
        "wfp8_afp8",
        "NVFP4_DEFAULT_CFG",
        "wfp4_afp16",
        "MXFP8_DEFAULT_CFG",
        "FP8_PER_CHANNEL_PER_TOKEN_CFG",
        NONE,
    ),
    "llama.cpp": (*_INTEGERS, "wfp4_afp16", NONE),
    GGUF: (*GGUF_TYPES, NONE),
    "mlx-lm": (*_INTEGERS, "wfp4_afp16", NONE),
    "auto-round": ("wint4_g64_afp16", "wint8_afp16", "wint3_g64_afp16", NONE),
}
"""Case -> the formats that its layers have in turn."""
EXPERTS = {
    "compressed-tensors": (
        "wint4_g64_afp16",
        "wfp8_afp8",
        "wint8_afp16",
        "NVFP4_DEFAULT_CFG",
        "FP8_PER_CHANNEL_PER_TOKEN_CFG",
        "wfp4_afp16",
        "MXFP8_DEFAULT_CFG",
        NONE,
    ),
    "compressed-tensors, int8": (NONE,),
    "compressed-tensors, integers": ("wint4_g64_afp16",),
    "modelopt": ("wfp8_afp8", "NVFP4_DEFAULT_CFG", "wfp4_afp16", "MXFP8_DEFAULT_CFG", NONE),
}
"""Case -> the formats that routed experts have in turn, where these are not those of all layers."""

_LARGEST_INPUT = 15.0
"""Larger products of int8 overflow on processors without VNNI."""
_ROWS, _WINDOWS, _WINDOW = 16, 4, 64
_ALL_EXPERTS, _OF_EXPERT = ".experts", ".experts."
_FUSED = re.compile(r"\b(?:q_proj|k_proj|v_proj)$|\b(?:gate_proj|up_proj)$")


def make_model(name: str, folder: Path) -> Path:
    """A model in bfloat16 with SmolLM2's tokenizer, in the form of Hugging Face."""
    if folder.exists():
        return folder
    file = find_demo_model()
    arguments = {"gguf_file": file.name, "dtype": torch.bfloat16}
    tokenizer = load_tokenizer(TokenizerRef.of(find_model(str(file)), ""))
    if name == "smollm2":
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **arguments)
    else:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            random_config(name, tokenizer), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)
    if name == "experts":
        write_older_names(folder / "config.json")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    weights = {name: module.weight.detach().float() for name, module in linears.items()}
    for tensor, weight in load_file(folder / "model.safetensors").items():
        if _OF_EXPERT in tensor:
            weights[tensor.removesuffix(".weight")] = weight.float()
    save_file(weights, weights_file(folder))
    tokenizer.save_pretrained(folder)
    return folder


def write_older_names(config: Path) -> None:
    """Name experts and rotation as in released Qwen3-MoE; mlx-lm reads no others."""
    content = json.loads(config.read_text())
    content["num_experts"] = content.pop("num_local_experts")
    content["rope_theta"] = content.pop("rope_parameters")["rope_theta"]
    config.write_text(json.dumps(content, indent=2))


def random_config(name: str, tokenizer: Any) -> Any:
    """Config of a random model."""
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": name == "tied",
    }
    if name != "experts":
        kind = transformers.Qwen3Config if name == "tied" else transformers.LlamaConfig
        return kind(**sizes)
    sizes |= {"num_hidden_layers": len(CASES[GGUF]), "norm_topk_prob": True}  # as llama.cpp has it
    return transformers.Qwen3MoeConfig(
        **sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=512
    )


def weights_file(model: Path) -> Path:
    """The weights of a model's linears in float32, which numpy can read."""
    return model.with_suffix(".safetensors")


def make_run(model: Path, folder: Path, case: str) -> autoquant_ray.Run:
    """A small scan of a case's formats and others: to calibrate them, not for a good choice."""
    formats = SCANNED
    if case == GGUF:
        folder, formats = folder.with_name(f"{folder.name}-gguf"), tuple(GGUF_TYPES)
    if folder.exists():
        return autoquant_ray.Run.open(str(folder))
    changed = {"model": str(model), "formats": formats, "samples": 4, "seq_len": 128}
    changed |= {"engine": None, "gpu": None}
    config = demo_config(str(folder), 8.0)
    return autoquant_ray.search(ScanConfig.model_validate(config.model_dump() | changed))


def make_case(run: autoquant_ray.Run, name: str, folder: Path) -> Path:
    """Solve with every format in turn, export by the command, and write what is expected."""
    if (folder / "case.json").exists():
        return folder
    groups = list(dict.fromkeys(run.plan.column("group").to_pylist()))
    solution = run.solve(bytes=10**10, pins=pins_of(groups, name)).name
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--format", "compressed-tensors", "--out", str(folder / "out")]
    if name == "modelopt":
        options[1] = name
    elif not name.startswith("compressed-tensors"):
        tool = name.partition(", ")[0]
        options = ["--format", "recipe", "--tool", tool, "--out", str(folder / "recipe")]
    export_by_command(run.path, [*options, "--solution", solution])
    source = read_source(RunDirectory(run.path), solution)
    expected = write_expected(source, folder)
    content = {"case": name, "model": source.state.config["model"], "layers": expected}
    (folder / "case.json").write_text(json.dumps(content, indent=1))
    return folder


def pins_of(groups: Sequence[str], name: str) -> dict[str, str]:
    """Group -> its format: those of a case in turn, and those for experts in turn."""
    experts = [group for group in groups if group.endswith(_ALL_EXPERTS)]
    others = [group for group in groups if group not in experts]
    menus = (others, CASES[name]), (experts, EXPERTS.get(name, CASES[name]))
    pins = {
        group: formats[number % len(formats)]
        for members, formats in menus
        for number, group in enumerate(members)
    }
    if name == "auto-round" and "lm_head" in pins:
        pins["lm_head"] = NONE  # it keeps tied heads
    return pins


def export_by_command(run: str, options: Sequence[str]) -> None:
    """``autoquant-ray export``, in a process of its own, which must end well."""
    command = [sys.executable, "-m", "autoquant_ray", "export", run, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-3000:]}")


def write_expected(source: Source, folder: Path) -> dict[str, Any]:
    """What layers and the whole make of fixed inputs; returns each layer's format and shape."""
    scan = source.state.config
    ids_WS = token_ids(scan["model"])
    np.save(folder / "ids.npy", ids_WS)
    layers: dict[str, Any] = {}
    inputs, outputs = {}, {}
    with planned_model(source) as model:
        np.save(folder / "log_probs.npy", text_log_probs(window_logits(model, ids_WS), ids_WS))
        for module in (name for name in source.modules if not source.is_experts(name)):
            linear, format_ = model.get_submodule(module), source.formats.get(module)
            inputs[module] = layer_input(module, linear.weight.shape[1])
            outputs[module] = linear(inputs[module])
            is_alone = format_ is not None and format_.input is None
            quantized_OI = linear(torch.eye(linear.weight.shape[1])).T if is_alone else None
            layers[module] = facts(format_, linear.weight, quantized_OI)
        for name, expert in expert_linears(model, source):
            inputs[name] = layer_input(name, expert.weight_OI.shape[1])
            outputs[name] = expert(inputs[name])
            layers[name] = facts(expert.format, expert.weight_OI, expert.quantized_OI)
            layers[name]["expert"] = expert.place
    save_file(inputs, folder / "inputs.safetensors")
    save_file(outputs, folder / "outputs.safetensors")
    with planned_model(source, moved=1e-6) as model:
        np.save(folder / "moved.npy", text_log_probs(window_logits(model, ids_WS), ids_WS))
    return layers


def facts(
    format_: Format | None, weight_OI: torch.Tensor, quantized_OI: torch.Tensor | None
) -> dict[str, Any]:
    """A layer's line in ``case.json``; errors and digests are of layers whose inputs stay."""
    rows, columns = weight_OI.shape
    line = {"format": NONE if format_ is None else format_.name, "rows": rows, "columns": columns}
    if format_ is not None and format_.input is None and quantized_OI is not None:
        line["squared_error"] = float((quantized_OI - weight_OI).double().square().sum())
        if gguf_type_of(format_.weight) is not None:
            line["digest"] = digest_of(quantized_OI.numpy())
    return line


def layer_input(module: str, columns: int) -> torch.Tensor:
    """``(T, I)``, exact in bfloat16: the same for layers that are fused."""
    seed = sum(map(ord, _FUSED.sub("fused", module)))
    generator = torch.Generator().manual_seed(seed)
    states_TI = 3 * torch.randn(_ROWS, columns, generator=generator)
    return states_TI.clamp(-_LARGEST_INPUT, _LARGEST_INPUT).bfloat16().float()


def token_ids(model: str) -> Any:
    """Windows of the end of the demo's text, which the scan does not reach; ``(W, S)``."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    text = "\n".join(list(read_pydoc())[-40:])
    with warnings.catch_warnings(action="ignore"):
        ids = tokenizer(text)["input_ids"][-_WINDOWS * _WINDOW :]
    return np.array(ids).reshape(_WINDOWS, _WINDOW)
