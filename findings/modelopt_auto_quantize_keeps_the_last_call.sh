#!/bin/sh
# ModelOpt's auto_quantize scores a linear that runs twice by the differences of its last call alone.
#
# Packages: nvidia-modelopt 0.47.0, torch 2.13.0 (transformers 5.14.1 for Zaya), seen 2026-11-30.
# Expected: a module's score sums gradient times difference of the output over all of its calls in a step.
# Seen: each call overwrites the differences that the call before left, and the gradients of every call are
#   multiplied with those of the last. A linear that runs on the tokens, and then once more on a constant row of
#   zeros (the delayed value of Zaya's attention: what stands before the first token), scores 0, and the search
#   gives it the fewest bits whatever that costs. With the two calls in the other order it has its true score.
# Prints the scores of both orders and of a Zaya; fails if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# modelopt.torch imports the last two and does not require them.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.14.1 torch==2.13.0 \
    nvidia-modelopt==0.47.0 accelerate==1.15.0 requests==2.34.2 huggingface_hub==1.33.0
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import contextlib
import io

import modelopt
import modelopt.torch.quantization as mtq
import torch
import transformers


class Delayed(torch.nn.Module):
    """Every position sees the one before it; the first one sees what zeros give."""

    def __init__(self, zeros_last):
        super().__init__()
        torch.manual_seed(0)
        self.zeros_last = zeros_last
        self.embedding = torch.nn.Embedding(32, 16)
        self.delayed = torch.nn.Linear(16, 16)
        self.other = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 32)

    def forward(self, ids):
        states = self.embedding(ids)
        zeros = states.new_zeros(len(ids), 1, 16)
        if self.zeros_last:
            tokens = self.delayed(states)
            first = self.delayed(zeros)
        else:
            first = self.delayed(zeros)
            tokens = self.delayed(states)
        return self.head(torch.cat([first, tokens[:, :-1]], dim=1) + self.other(states))


def scores(model, ids, logits):
    def loss(output, batch):
        return torch.nn.functional.cross_entropy(logits(output)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    with contextlib.redirect_stdout(io.StringIO()):
        _, state = mtq.auto_quantize(
            model.eval(),
            constraints={"effective_bits": 12.0},
            quantization_formats=[mtq.INT8_DEFAULT_CFG],
            data_loader=[ids],
            forward_step=lambda m, batch: m(batch),
            loss_func=loss,
            num_calib_steps=1,
            num_score_steps=1,
            verbose=False,
        )
    stats = state["candidate_stats"].items()
    return {name.removesuffix(".quant_recipe"): entry["scores"][0] for name, entry in stats}


generator = torch.Generator().manual_seed(0)
ids = torch.randint(0, 32, (2, 12), generator=generator)
print("nvidia-modelopt", modelopt.__version__, "torch", torch.__version__)
last, first = (scores(Delayed(order), ids, lambda output: output)["delayed"] for order in (True, False))
print(f"zeros last: {last:.3e}, zeros first: {first:.3e}")
config = transformers.ZayaConfig(
    vocab_size=32, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=1,
    initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)
torch.manual_seed(0)
zaya = scores(transformers.AutoModelForCausalLM.from_config(config), ids, lambda output: output.logits)
delayed = {name: score for name, score in zaya.items() if name.endswith("v_proj_delayed")}
for name, score in delayed.items():
    print(f"{name}: {score:.3e}")
assert last == 0 < first, "both orders have a score: changed"
assert delayed and not any(delayed.values()), "Zaya's has a score: changed"
PYTHON
