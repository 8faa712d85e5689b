#!/bin/sh
# transformers unpacks all experts by the first group of compressed-tensors' config, and packed integers alone.
#
# Packages: transformers 5.14.1, compressed-tensors 0.20.0 (torch 2.13.0, accelerate 1.15.0), seen 2026-11-30.
# Expected: linears of experts are unpacked by the group that names them, as other linears are, and whatever the
#   format of a group can be for other linears: packed integers, FP8, int8.
# Seen: experts are one tensor in memory, and `DecompressExperts` takes the numbers of the first group for all of
#   them: int4 experts in the second group beside int8 queries stop the loading ("issues during automatic conversion of
#   the weights"), and so do FP8 experts, whose tensors no rule fits. In the first group packed integers are right.
# Prints the largest relative error of the unpacked experts, or the error; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.14.1 accelerate==1.15.0 compressed-tensors==0.20.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import json
import pathlib

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from safetensors.torch import load_file, save_file

EXPERTS, QUERIES = "model.layers.0.mlp.experts", "model.layers.0.self_attn.q_proj"
config = transformers.Qwen3MoeConfig(
    vocab_size=64, hidden_size=128, intermediate_size=128, moe_intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=2, num_experts_per_tok=1,
    architectures=["Qwen3MoeForCausalLM"],
)
torch.manual_seed(0)
transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained("plain")
plain = load_file("plain/model.safetensors")
matrices = [name.removesuffix(".weight") for name in plain if name.endswith("_proj.weight")]
experts = [name for name in matrices if name.startswith(EXPERTS)]


def packed(scheme, weight):
    """A weight packed by the package's own compressor, with the scales of its largest values."""
    bits, group = scheme.weights.num_bits, scheme.weights.group_size
    if scheme.weights.type == "float":
        scale = weight.abs().max().reshape(1) / 448
    else:
        scale = weight.unflatten(-1, (-1, group or weight.shape[-1])).abs().amax(-1) / (2 ** (bits - 1) - 1)
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
    return compressor.compress({"weight": weight, "weight_scale": scale}, scheme)


def outcome(folder, groups):
    """Largest relative error of the experts of a checkpoint with these groups, or what is raised."""
    schemes, tensors = {}, dict(plain)
    for number, (preset, stored, names) in enumerate(groups):
        scheme = preset_name_to_scheme(preset, names).model_copy(update={"format": stored})
        schemes[f"group_{number}"] = scheme
        for name in names:
            parts = packed(scheme, tensors.pop(f"{name}.weight"))
            tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    pathlib.Path(folder).mkdir()
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    targets = [name for scheme in schemes.values() for name in scheme.targets]
    described = QuantizationConfig(
        config_groups=schemes, format="mixed-precision", quantization_status="compressed",
        ignore=["lm_head", *(name for name in matrices if name not in targets)],
    )
    content = json.loads(pathlib.Path("plain/config.json").read_text())
    content["quantization_config"] = described.model_dump(mode="json")
    pathlib.Path(folder, "config.json").write_text(json.dumps(content))
    unpack = transformers.CompressedTensorsConfig(run_compressed=False)
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=unpack
        )
    except RuntimeError as error:
        return str(error)
    module = loaded.get_submodule(EXPERTS)
    errors = []
    for number in range(2):
        gate, up, down = (plain[f"{EXPERTS}.{number}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        for read, weight in ((module.gate_up_proj[number], torch.cat([gate, up])), (module.down_proj[number], down)):
            errors.append(float((read.float() - weight).norm() / weight.norm()))
    return max(errors)


QUERIES_8, EXPERTS_8 = ("W8A8", "int-quantized", [QUERIES]), ("W8A16", "pack-quantized", experts)
EXPERTS_4, EXPERTS_FP8 = ("W4A16", "pack-quantized", experts), ("FP8", "float-quantized", experts)
seen = {
    name: outcome(name.replace(" ", "-"), groups)
    for name, groups in {
        "int4 experts, in the first group": [EXPERTS_4, QUERIES_8],
        "int8 experts, in the first group": [EXPERTS_8],
        "int4 experts, in the second group": [QUERIES_8, EXPERTS_4],
        "FP8 experts": [EXPERTS_FP8],
    }.items()
}
print("transformers", transformers.__version__)
for name, result in seen.items():
    print(f"{name}: {result}")
first, first_int8, second, fp8 = seen.values()
assert first < 0.15 and first_int8 < 0.01, "experts of the first group: changed"
assert "automatic conversion of the weights" in str(second), "experts of another group: changed"
assert "automatic conversion of the weights" in str(fp8), "FP8 experts: changed"
PYTHON
