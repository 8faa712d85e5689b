"""Run without our package: what llama.cpp makes of a recipe.

    python with_llama_cpp.py CASE FOLDER

``FOLDER`` is that of ``build_llama_cpp.sh``. Converts the model, runs the recipe as it is, reads
the types of the written file, and lets ``llama-perplexity`` read a text, which transformers reads
too with the same file dequantized. Prints a line of JSON: versions, each layer's type, how often
its weights lose what the plan's lose, which have other weights than the plan where they should be
the same, and by how much the logarithms of the perplexities differ.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from answer import as_answer, digest_of, layers_of, losses_of, model_of

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.*)")
CONTEXT = 64


class Weights:
    """The weights of a GGUF file of Llama, Qwen3 or Qwen3-MoE, by the names of modules."""

    def __init__(self, file: Path) -> None:
        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        self._dequantized: dict[str, Any] = {}

    def type_of(self, module: str) -> str:
        """That of the tensor which holds a module."""
        name: str = self._tensors[self._place_of(module)[0]].tensor_type.name
        return name

    def of(self, module: str) -> Any:
        """What a module's weights stand for, float32 ``(O, I)``."""
        name, expert = self._place_of(module)
        if name not in self._dequantized:
            tensor = self._tensors[name]
            self._dequantized[name] = gguf.dequantize(tensor.data, tensor.tensor_type)
        weights = self._dequantized[name]
        return weights if expert is None else weights[expert]

    def _place_of(self, module: str) -> tuple[str, int | None]:
        """The tensor that holds a module, and the number of an expert where it holds several."""
        if module == "lm_head":
            name = "output.weight"
            return name if name in self._tensors else "token_embd.weight", None
        _, _, number, part = module.split(".", 3)
        if expert := EXPERT.fullmatch(part):
            part = PARTS[f"mlp.{expert[2]}"]
            return f"blk.{number}.{part}_exps.weight", int(expert[1])
        return f"blk.{number}.{PARTS[part]}.weight", None


def run(command: list[str], folder: Path, binaries: str) -> str:
    """What a command says, in a folder."""
    environment = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-1500:]}")
    return done.stdout + done.stderr


@torch.no_grad()
def text_loss(file: Path, config: Any, text: str, tokenizer: Any) -> float:
    """Nats per token as ``llama-perplexity`` counts: of the second half of each context."""
    arguments = {"gguf_file": file.name, "dtype": torch.float32, "config": config}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **arguments)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    losses = []
    for start in range(0, len(ids) - CONTEXT + 1, CONTEXT):
        window = ids[start : start + CONTEXT]
        log_probs = model(window[None]).logits[0].double().log_softmax(-1)
        following = range(CONTEXT // 2 + 1, CONTEXT)
        losses += [-float(log_probs[place - 1, window[place]]) for place in following]
    return float(np.mean(losses))


def plain_words(text: str) -> str:
    """Words alone: of spaces and digits llama.cpp makes other tokens than transformers does."""
    return re.sub(r"[^a-z]+", " ", text.lower()).strip()


def main(case: Path, built: Path) -> None:
    binaries = str(built / "build" / "bin")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_of(case))
    config = transformers.AutoConfig.from_pretrained(model_of(case))  # GGUF: no width of heads
    text = plain_words(tokenizer.decode(np.load(case / "ids.npy").reshape(-1)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "text").write_text(text)
        converter = str(built / "source" / "convert_hf_to_gguf.py")
        options = ["--outfile", "in.gguf", "--outtype", "bf16"]
        run([sys.executable, converter, model_of(case), *options], folder, binaries)
        run(["sh", str(case / "recipe")], folder, binaries)
        options = ["-m", "out.gguf", "-f", "text", "-c", str(CONTEXT), "-b", str(CONTEXT)]
        said = run(["llama-perplexity", *options], folder, binaries)
        (perplexity,) = re.findall(r"Final estimate: PPL = ([\d.]+)", said)
        original, written = Weights(folder / "in.gguf"), Weights(folder / "out.gguf")
        layers = layers_of(case)
        types = {name: written.type_of(name) for name in layers}
        errors = {
            name: float(((written.of(name).astype(np.float64) - original.of(name)) ** 2).sum())
            for name in layers
        }
        others = [
            name
            for name, layer in layers.items()
            if "digest" in layer and digest_of(written.of(name)) != layer["digest"]
        ]
        expected = text_loss(folder / "out.gguf", config, text, tokenizer)
    as_answer(
        versions={"llama.cpp": "b11434", "gguf": version("gguf")},
        kinds=types,
        weight_losses=losses_of(case, errors),
        other_weights=others,
        runner_difference=abs(math.log(float(perplexity)) - expected),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
