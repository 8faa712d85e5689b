"""What ``mtq.auto_quantize`` selects from the best menu that it has, and what that loses.

Its menu: int4 in blocks of 128 by AWQ (``INT4_AWQ_CFG``), int8 per channel, FP8 per tensor,
weights alone. Its scores, its solver and its calibration, on the samples of a scan.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sides import modelopt_format

from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.data.samples import token_ids
from autoquant_ray.evaluate.table import Measured
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import build_skeleton, load_model
from autoquant_ray.models.separate_heads import give_weight
from autoquant_ray.plan.group import UNQUANTIZED_BITS
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.stages.shards import tasks_of

_INT4, _INT8, _FP8 = "INT4_AWQ_CFG", "INT8_WEIGHT_ONLY_CFG", "wfp8_afp16"
_STORED = {_INT4: "wint4_afp16:max", _INT8: "wint8_afp16", _FP8: _FP8}
"""Its format -> ours that stores as much."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A model that ModelOpt has quantized.

    Attributes:
        model: With its quantizers.
        reference: The same model without.
        candidate: What was selected; ModelOpt predicts no KL, so 0 stands there.
    """

    model: Any
    reference: Any
    candidate: Candidate

    @property
    def num_bytes(self) -> int:
        """Stored bytes of the whole model, without AWQ's factors."""
        return int(self.candidate.weight_bytes)


def select(scored: ScoredRun, bits: float) -> Selection:
    """Let ModelOpt choose formats.

    Args:
        scored: A scan; its model and its samples are used.
        bits: Average over the searched layers; ModelOpt's ``effective_bits`` counts the others too.
    """
    import modelopt.torch.quantization as mtq

    warnings.simplefilter("ignore")
    scan = ScanConfig.model_validate(scored.state.record.config)
    ref = find_model(scan.model)
    samples = [ids_of(sample) for task in tasks_of(scored.state, ()) for sample in task.samples]
    model, reference = (untied(load_model(ref, dtype="float32", device="cpu")) for _ in range(2))

    def loss_func(output: Any, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output.logits[0, :-1].float(), ids[0, 1:])

    formats = {f.name: f for f in resolve_formats(tuple(_STORED.values()), device="cpu")}
    plan = build_plan(build_skeleton(ref), list(formats.values()), scan.disable)
    searched = sum(group.num_weights for group in plan.searched)
    everything = sum(group.num_weights for group in plan.groups)
    wanted = (bits * searched + UNQUANTIZED_BITS * (everything - searched)) / everything
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": wanted},
        quantization_formats=[modelopt_format(name) for name in _STORED],
        data_loader=[torch.tensor([sample]) for sample in samples],
        forward_step=lambda model, ids: model(input_ids=ids, use_cache=False),
        loss_func=loss_func,
        num_calib_steps=4 * len(samples),  # it calibrates AWQ on a quarter of them
        num_score_steps=len(samples),
        disabled_layers=[f"*{name}*" for name in scan.disable] or None,
        verbose=False,
    )
    return Selection(model=model, reference=reference, candidate=_candidate(state, plan, formats))


def ids_of(sample: Any) -> list[int]:
    """The token ids of a sample of plain text."""
    return [int(token) for token in token_ids(sample)]


def untied(model: Any) -> Any:
    """With a head of its own: ModelOpt's AWQ would divide the embeddings too."""
    give_weight(model)
    return model


def _candidate(state: Any, plan: Plan, formats: Mapping[str, Format]) -> Candidate:
    """The selection in our terms: its formats, and the bytes that it stores."""
    chosen = {}
    for name, recipe in state["best"]["recipe"].items():
        chosen[name.removesuffix(".quant_recipe")] = _stored_format(str(recipe))
    stored: float = plan.other_bytes
    bits, num_weights, names = 0.0, 0, {}
    for group in plan.groups:
        taken = {chosen.get(m.name) for m in group.modules} - {None}
        taken |= {chosen.get(group.name)} - {None}
        names[group.name] = taken.pop() if taken else "none"
        format_ = formats.get(str(names[group.name]))
        stored += group.added_bytes(format_)
        if group.is_searched:
            bits += 8 * group.added_bytes(format_)
            num_weights += group.num_stored
    return Candidate(
        name="modelopt",
        formats={name: str(format_) for name, format_ in names.items()},
        predicted_kl=0.0,
        weight_bytes=stored,
        effective_bits=bits / num_weights,
    )


def _stored_format(recipe: str) -> str | None:
    """Ours that stores as much as a recipe of ModelOpt's, by its name; None: 16 bits."""
    if "NONE" in recipe:
        return None
    return next((ours for name, ours in _STORED.items() if name in recipe), _FP8)


@torch.no_grad()
def measure_selection(selection: Selection, samples: Sequence[Any]) -> Measured:
    """KL(P || Q) per token of the quantized model.

    Args:
        selection: From :func:`select`.
        samples: Token ids.
    """
    divergences = []
    for sample in samples:
        ids = torch.tensor([ids_of(sample)])
        log_p, log_q = (
            torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].double(), -1)
            for model in (selection.reference, selection.model)
        )
        divergences.append((log_p.exp() * (log_p - log_q)).sum(dim=1).numpy())
    return Measured(
        kl_N=np.concatenate(divergences),
        kl_S=np.array([kl_n.sum() for kl_n in divergences]),
        loss=0.0,
        reference_loss=0.0,
        num_agreeing=0,
        tokens_S=np.array([len(kl_n) for kl_n in divergences], dtype=np.float64),
    )
