#!/bin/sh
# SGLang reads layers that an MXFP8 checkpoint of ModelOpt leaves out as MXFP8, and its head as 16 bits.
#
# Package: sglang 0.5.23, seen 2026-11-30.
# Expected: what `ignore` names stays in 16 bits whatever the one format of a checkpoint is. ModelOpt writes
#   patterns there, such as `model.layers.0.mlp*`, which SGLang's classes for FP8 and NVFP4 take; and these
#   quantize a head that is not named.
# Seen: MXFP8 alone goes to `Fp8Config`, which compares names and takes no patterns, so that weights of 16
#   bits are read as MXFP8. It has no branch for heads: a head in MXFP8 is read as 16 bits.
# The functions are taken out of the wheel, because the whole package needs a GPU's libraries. Prints what
# is read; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --python-version 3.11 --platform manylinux_2_34_x86_64 --dest "$folder" sglang==0.5.23
python3 -W ignore - "$folder" <<'PYTHON'
import ast
import sys
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

(wheel,) = Path(sys.argv[1]).glob("sglang-*.whl")
archive = zipfile.ZipFile(wheel)


def take(path, *names, **given):
    """Functions and constants of a file, without what stands around them."""
    tree = ast.parse(archive.read(f"sglang/srt/{path}").decode())
    nodes = []
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") in names:
            node = ast.Assign([node.target], node.value, lineno=0, col_offset=0)
        elif getattr(node, "name", "") not in names:
            continue
        else:
            node.decorator_list, node.returns = [], None
            for argument in node.args.args:
                argument.annotation = None
        nodes.append(node)
    theirs = dict(given)
    exec(compile(ast.Module(nodes, []), path, "exec"), theirs)
    return theirs


class LinearBase: ...


class FusedMoE: ...


class RadixAttention: ...


class ParallelLMHead: ...


for place, kind in (
    ("linear", LinearBase),
    ("moe.fused_moe_triton", FusedMoE),
    ("radix_attention", RadixAttention),
):
    module = types.ModuleType(f"sglang.srt.layers.{place}")
    setattr(module, kind.__name__, kind)
    sys.modules[module.__name__] = module
skipped = take(
    "layers/quantization/utils.py",
    "_module_path_match",
    "_FALLBACK_FUSED_SHARDS",
    "is_layer_skipped",
    Mapping=Mapping,
    MappingProxyType=MappingProxyType,
)["is_layer_skipped"]
method_of = take(
    "layers/quantization/fp8.py",
    "get_quant_method",
    is_layer_skipped=skipped,
    is_npu=bool,
    Fp8LinearMethod=lambda config: "MXFP8",
    UnquantizedLinearMethod=lambda: "16 bits",
    BaseKVCacheMethod=None,
)["get_quant_method"]


def read(layer, name, ignored):
    config = SimpleNamespace(
        ignored_layers=ignored,
        packed_modules_mapping={},
        use_mxfp8=True,
        kv_cache_quant_algo=None,
    )
    return method_of(config, layer, name) or "16 bits"


down, qkv = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.qkv_proj"
by_pattern = ["model.layers.0.mlp*", "model.layers.1.self_attn*"]
by_name = [down, *(qkv.replace("qkv", part) for part in "qkv")]
for name in (down, qkv):
    seen = [read(LinearBase(), name, ignored) for ignored in (by_pattern, by_name)]
    print(f"{name}: {seen[0]} where a pattern leaves it out, {seen[1]} where names do")
    assert seen == ["MXFP8", "16 bits"], "patterns or names: changed"
head = read(ParallelLMHead(), "lm_head", [])
print(f"lm_head, not left out: {head}")
assert head == "16 bits", "heads: changed"
PYTHON
