"""Run by a Python that has vLLM, without this package: how vLLM reads the KV caches of checkpoints.

    python vllm_caches.py FOLDER...

Prints a JSON object: folder -> what ``--kv-cache-dtype auto`` becomes, and whether an attention
gets what reads its scales.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import get_kv_cache_quant_algo_string
from vllm_layers import choose_no_kernel, read_config

if __name__ == "__main__":
    choose_no_kernel()
    read = {}
    for folder in sys.argv[1:]:
        content = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
        attention = Attention.__new__(Attention)
        torch.nn.Module.__init__(attention)
        method = read_config(Path(folder)).get_quant_method(attention, "model.layers.0.self_attn")
        read[folder] = [get_kv_cache_quant_algo_string(content), method is not None]
    sys.stdout.write(f"{json.dumps(read)}\n")
