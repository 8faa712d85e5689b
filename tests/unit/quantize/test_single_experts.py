"""Experts told apart: their sums, their formats in ModelOpt, what cannot be told apart."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from families import family_model
from modelopt_scores import next_token_loss, of_text, quantized_by_modelopt

from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.quant_cfg import quantization_config
from autoquant_ray.calibrate.modelopt_config import load_quantization_config
from autoquant_ray.errors import ConfigError
from autoquant_ray.evaluate.runner import AllocationRunner, EvaluationSpec
from autoquant_ray.formats.algorithms import checked_algorithm
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.layers import require_gradient
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.quantize.calibration import Calibration, calibration_of_maxima
from autoquant_ray.quantize.modules import UNQUANTIZED
from autoquant_ray.quantize.quantizers import fake_quantize_weight
from autoquant_ray.score.scorer import Scorer

FORMATS = ("wint4_afp16:max", "wfp8_afp8", "wfp8_afp16")
LENGTHS = [20, 20, 20]


@dataclasses.dataclass
class Apart:
    """A family with its experts apart."""

    model: Any
    plan: Plan
    spec: Any
    samples: list[list[int]]

    @property
    def ids_BS(self) -> torch.Tensor:
        return torch.tensor(self.samples)

    @property
    def calibration(self) -> Any:
        """Made up."""
        return calibration_of_maxima(
            {
                (module.name, f"{prefix}input_amax"): 8.0
                for group in self.plan.searched
                for module in group.modules
                for prefix in module.quantizer_prefixes
            }
        )

    def score(self, **changes: Any) -> Any:
        spec = dataclasses.replace(self.spec, **changes)
        return (
            Scorer(spec, model=copy.deepcopy(self.model))
            .score(self.samples, 0, self.calibration)
            .sums
        )


@pytest.fixture(scope="module", params=["Qwen3-MoE", "DeepSeek-V3", "Nemotron-H"])
def apart(request: Any, make_spec: Any, make_samples: Any) -> Apart:
    model = family_model(request.param)
    plan = build_plan(model, resolve_formats(FORMATS, device="cpu"), expert_groups="expert")
    return Apart(model, plan, make_spec(plan), make_samples(LENGTHS, seed=1))


def _singles(plan: Plan) -> list[int]:
    return [n for n, group in enumerate(plan.searched) if group.modules[0].expert is not None]


def test_plan_has_a_group_per_expert_with_the_bytes_of_the_whole(apart: Apart) -> None:
    together = build_plan(apart.model, apart.plan.formats)
    weights = {group.name: group for group in together.groups}
    for format_ in (apart.plan.formats[0], apart.plan.formats[2], None):
        sums: dict[str, float] = {}
        for group in apart.plan.groups:
            path = group.modules[0].path
            sums[path] = sums.get(path, 0.0) + group.weight_bytes(format_)
        assert sums == {name: group.weight_bytes(format_) for name, group in weights.items()}
    assert apart.plan.flops_per_token == together.flops_per_token
    assert apart.plan.other_bytes == together.other_bytes
    assert apart.plan.other_modules == together.other_modules
    assert apart.plan.step == together.step
    for number in _singles(apart.plan):
        menu = apart.plan.menu(apart.plan.searched[number])
        assert [f.name for f in menu] == ["wint4_afp16:max", "wfp8_afp16"]


def test_sums_equal_those_of_modules_with_one_expert_replaced(apart: Apart) -> None:
    sums = apart.score(estimator="sequence")
    expected = _by_replacement(apart)
    singles = _singles(apart.plan)
    assert len(expected) == len(singles) >= 4
    for number in singles:
        name = apart.plan.searched[number].name
        for column, format_ in enumerate(apart.plan.formats):
            if format_.input is None:
                elementwise, token, sequence = expected[name][format_.name]
                assert sums.elementwise_GF[number, column] == pytest.approx(elementwise, rel=1e-4)
                assert sums.token_GF[number, column] == pytest.approx(token, rel=1e-3)
                assert sums.sequence_GF[number, column] == pytest.approx(sequence, rel=1e-3)


def _by_replacement(apart: Apart) -> dict[str, dict[str, tuple[float, ...]]]:
    """Expert -> format -> all sums: the whole module, run with one expert's weights replaced."""
    groups = [apart.plan.searched[number] for number in _singles(apart.plan)]
    calls: dict[str, tuple[Any, torch.Tensor]] = {}
    gradients: dict[str, torch.Tensor] = {}
    model = copy.deepcopy(apart.model)

    def keep(name: str, arguments: Any, output: torch.Tensor) -> None:
        calls[name] = (arguments, output.detach().clone())
        output.register_hook(lambda gradient: gradients.update({name: gradient}))

    for path in {group.modules[0].path for group in groups}:
        model.get_submodule(path).register_forward_hook(
            lambda _, arguments, output, path=path: keep(path, arguments, output)
        )
    model.get_input_embeddings().register_forward_hook(require_gradient)
    num_predicted = apart.ids_BS[:, 1:].numel()
    with torch.enable_grad():
        (next_token_loss(model, of_text(apart.ids_BS)) * num_predicted).backward()
    scores: dict[str, dict[str, tuple[float, ...]]] = {}
    for group in groups:
        (planned,) = group.modules
        arguments, output_TO = calls[planned.path]
        for format_ in apart.plan.menu(group):
            module = copy.deepcopy(apart.model.get_submodule(planned.path))
            with torch.no_grad():
                for name in planned.parameters:
                    weight_OI = getattr(module, name).data[planned.expert]
                    weight_OI.copy_(fake_quantize_weight(format_.weight, weight_OI.clone()))
                product_TO = (module(*arguments) - output_TO) * gradients[planned.path]
            product_TO = product_TO.flatten(0, -2).double()
            scores.setdefault(group.name, {})[format_.name] = (
                float(product_TO.square().sum()),
                float(product_TO.sum(dim=1).square().sum()),
                float(product_TO.unflatten(0, (len(LENGTHS), -1)).sum(dim=1).square().sum()),
            )
    return scores


def test_sums_of_a_shard_do_not_depend_on_the_shards_before(
    apart: Apart, make_samples: Any
) -> None:
    scorer = Scorer(apart.spec, model=copy.deepcopy(apart.model))
    scorer.score(make_samples([30, 7], seed=5), 0, apart.calibration)
    again = scorer.score(apart.samples, 0, apart.calibration).sums
    first = apart.score()
    assert again.elementwise_GF.tobytes() == first.elementwise_GF.tobytes()
    assert again.token_GF.tobytes() == first.token_GF.tobytes()
    assert again.expert_tokens == first.expert_tokens


def test_drawn_rows_estimate_the_sums_of_all_rows(apart: Apart) -> None:
    everything, singles = apart.score(), _singles(apart.plan)
    num_seeds = 16
    drawn = [apart.score(row_share=0.5, seed=seed) for seed in range(num_seeds)]
    assert [s.expert_tokens for s in drawn] == [everything.expert_tokens] * num_seeds
    mean_G = np.mean([sums.elementwise_GF[singles, 0] for sums in drawn], axis=0)
    variances_G = np.mean([sums.elementwise_variance_GF[singles, 0] for sums in drawn], axis=0)
    errors_G = np.sqrt(variances_G / num_seeds)
    assert (errors_G > 0).all()
    assert (np.abs(mean_G - everything.elementwise_GF[singles, 0]) < 5 * errors_G).all()


def test_mixed_experts_run_as_modelopt_quantizes_them(apart: Apart) -> None:
    """With the int4 scales of some experts searched, so that each expert has its own algorithm."""
    searched = checked_algorithm("int4", "mse")
    menu = tuple(
        dataclasses.replace(f, algorithm=searched) if f.name == "wint4_afp16:max" else f
        for f in apart.plan.formats
    )
    plan = dataclasses.replace(apart.plan, formats=menu)
    names = [format_.name for format_ in plan.formats]
    generator = np.random.default_rng(0)
    formats = {
        group.name: str(generator.choice([f.name for f in plan.menu(group)] + [NONE]))
        if group.modules[0].expert is not None
        else NONE
        for group in plan.groups
    }
    used = {formats[plan.searched[n].name] for n in _singles(plan)}
    assert used == {"wint4_afp16:max", "wfp8_afp16", NONE}
    problem = Problem.from_plan(plan.rows(), plan.summary())
    config = quantization_config(problem, formats, plan.summary())
    config = load_quantization_config({"quantization_config": config})
    entries, algorithm = config["quant_cfg"], config["algorithm"]
    quantized = quantized_by_modelopt(apart.model, [apart.ids_BS], entries, algorithm)
    fields = {f.name for f in dataclasses.fields(EvaluationSpec)} & set(vars(apart.spec))
    spec = EvaluationSpec(
        **{n: getattr(apart.spec, n) for n in fields} | {"formats": menu}, calibration=Calibration()
    )
    runner = AllocationRunner(spec, model=copy.deepcopy(apart.model))
    index = {name: number for number, name in enumerate(names)} | {NONE: UNQUANTIZED}
    choice = tuple(index[formats[group.name]] for group in plan.searched)
    ours = runner.evaluate(apart.samples, [choice]).divergences[0]
    with torch.no_grad():
        exact = apart.model(apart.ids_BS, use_cache=False).logits[:, :-1].log_softmax(-1)
        theirs = quantized(apart.ids_BS, use_cache=False).logits[:, :-1].log_softmax(-1)
    kl_BS = (exact.exp() * (exact - theirs)).sum(dim=-1)
    assert float(kl_BS.mean()) > 1e-4
    for sample, kl_S in zip(ours, kl_BS, strict=True):
        assert sample.kl_N == pytest.approx(kl_S.numpy(), rel=2e-3, abs=2e-6)


@pytest.mark.parametrize(
    ("family", "formats", "said"),
    [
        ("Llama", FORMATS, "has no routed experts to tell apart; leave out `expert_groups`"),
        ("GPT-OSS", FORMATS, "quantized by ModelOpt as one tensor"),
        ("Qwen3-MoE", ("wfp8_afp8",), "and wfp8_afp8 quantizes them; add one such as wint4_afp16"),
        ("Qwen3-MoE", ("wfp8_afp8", "kv_fp8"), "and wfp8_afp8 quantizes them; add one"),
        (
            "Qwen3-MoE",
            ("wint4_g32_afp16:awq", "wint8_aint8"),
            r"no routed expert is searched \(takes no format of the menu\); leave it out",
        ),
    ],
)
def test_experts_that_cannot_be_apart_are_refused(
    family: str, formats: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        build_plan(
            family_model(family), resolve_formats(formats, device="cpu"), expert_groups="expert"
        )


def test_experts_that_are_all_disabled_cannot_be_apart() -> None:
    """The scan would find no scores of single experts, and ask for a scan as it is."""
    disable = ("*.mlp.experts",)
    with pytest.raises(
        ConfigError, match=r"searched \(disabled by '\*.mlp.experts'\); leave it out"
    ):
        build_plan(
            family_model("Qwen3-MoE"),
            resolve_formats(FORMATS, device="cpu"),
            disable,
            expert_groups="expert",
        )


class _Expert(torch.nn.Module):
    def __init__(self, gate_up_OI: torch.Tensor, down_OI: torch.Tensor) -> None:
        super().__init__()
        parts = {"gate_proj": gate_up_OI.chunk(2)[0], "up_proj": gate_up_OI.chunk(2)[1]}
        for name, weight_OI in (parts | {"down_proj": down_OI}).items():
            linear = torch.nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
            linear.weight.data = weight_OI.clone()
            setattr(self, name, linear)

    def forward(self, states_TH: torch.Tensor) -> torch.Tensor:
        gate = torch.nn.functional.silu(self.gate_proj(states_TH))
        return self.down_proj(gate * self.up_proj(states_TH))


class _ExpertsOfLinears(torch.nn.ModuleList):
    """As models with code of their own have them."""

    def forward(self, states_TH: Any, routes_TK: Any, weights_TK: Any) -> torch.Tensor:
        output_TH = torch.zeros_like(states_TH)
        for number, expert in enumerate(self):
            rows, places = (routes_TK == number).nonzero(as_tuple=True)
            if len(rows):
                states_RH = expert(states_TH[rows]) * weights_TK[rows, places, None]
                output_TH = output_TH.index_add(0, rows, states_RH)
        return output_TH


def test_experts_of_linears_are_apart_too_and_their_tokens_are_counted(
    make_spec: Any, make_samples: Any
) -> None:
    fused, model = family_model("Qwen3-MoE"), family_model("Qwen3-MoE")
    for layer in model.model.layers:
        old = layer.mlp.experts
        pairs = zip(old.gate_up_proj, old.down_proj, strict=True)
        layer.mlp.experts = _ExpertsOfLinears([_Expert(*pair) for pair in pairs])
    model.requires_grad_(False)
    menu = resolve_formats(FORMATS, device="cpu")
    samples = make_samples(LENGTHS, seed=1)

    def sums(scored_model: Any, plan: Plan) -> Any:
        return Apart(scored_model, plan, make_spec(plan), samples).score()

    plan = build_plan(model, menu, expert_groups="expert")
    name = "model.layers.0.mlp.experts"
    (group,) = [g for g in plan.searched if g.name == f"{name}.3.gate_proj"]
    assert [m.name for m in group.modules] == [
        f"{name}.3.{part}" for part in ("gate_proj", "up_proj", "down_proj")
    ]
    assert [f.name for f in plan.menu(group)] == list(FORMATS)
    assert plan.summary()["experts"] == [
        f"model.layers.{layer}.mlp.experts.{n}.gate_proj" for layer in range(2) for n in range(4)
    ]
    counted = sums(fused, build_plan(fused, menu)).expert_tokens
    assert sums(model, build_plan(model, menu)).expert_tokens == {
        f"{path}.0.gate_proj": tokens for path, tokens in counted.items()
    }
    assert sums(model, plan).expert_tokens == {
        f"{path}.{n}.gate_proj": [count]
        for path, tokens in counted.items()
        for n, count in enumerate(tokens)
    }
