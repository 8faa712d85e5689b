"""``mtq.quantize`` with the config of a run: the model that was scored, from the run's files."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
import transformers
from checkpoints import calibrated, logits_of_solution
from families import family_model
from modelopt_scores import NOTHING, quantized_by_modelopt
from object_store import ObjectStore
from small_models import make_tokenizer, small_config, small_model
from written_runs import made_up_config, made_up_run

from autoquant_ray import Run, load_quantization_config
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.quant_cfg import quantizer_entries
from autoquant_ray.calibrate.files import calibration_of, read_calibration
from autoquant_ray.calibrate.solution_fits import SolutionFits
from autoquant_ray.errors import StoreError
from autoquant_ray.formats.algorithms import SETS
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model, fingerprint_model
from autoquant_ray.models.load import load_model
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.quantize.calibration import FittedCodes, FittedWeight
from autoquant_ray.quantize.calibration_mode import READERS
from autoquant_ray.quantize.experts import FusedExperts
from autoquant_ray.quantize.fitted_model import QuantizedModule
from autoquant_ray.quantize.quantizers import quantized_weight
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.rounding import drop_rounding
from autoquant_ray.runs.state import RunState
from autoquant_ray.score.scorer import Scorer
from autoquant_ray.solve import solve_run

INT4 = "wint4_g32_afp16"
PLAIN = f"{INT4}:max"
WEIGHTED, GPTQ, AWQ = (f"{INT4}:{method}" for method in ("weighted", "gptq", "awq"))
AWQ_GPTQ = f"{INT4}:awq+gptq"
INT8, FP8, NVFP4 = "wint8_aint8:weighted", "wfp8_afp8:gptq", "wfp4_afp16:weighted"
IDS = torch.arange(1, 41)[None]
PLANS = {
    "weighted": {"*": WEIGHTED, "*1.mlp.*": "none"},
    "gptq": {"*": GPTQ, "*0.self_attn.o_proj": "none", "*1.mlp.experts": WEIGHTED},
    "several": {
        "*": GPTQ,
        "*0.self_attn.*": FP8,
        "*1.self_attn.*": NVFP4,
        "*0.mlp.down_proj": INT8,
        "*1.mlp.down_proj": "wint8_aint8",
        "*0.mlp.experts": INT8,
        "*1.mlp.experts": FP8,
        "lm_head": WEIGHTED,
    },
}
AWQ_PLAN = {
    "*": "none",
    "*0.self_attn.*": AWQ,
    "*1.self_attn.q_proj": WEIGHTED,
    "*1.self_attn.o_proj": AWQ,
    "*0.mlp.gate_proj": GPTQ,
    "*0.mlp.down_proj": AWQ,
    "*1.mlp.down_proj": AWQ_GPTQ,
    "*experts": WEIGHTED,
    "lm_head": AWQ_GPTQ,
}


@pytest.fixture
def loud_run(solved_run: Any, tmp_path: Path) -> Any:
    """A run of a model whose channels differ in size, with one solution."""

    def build(family: str, choice: dict[str, str], **more: Any) -> RunDirectory:
        model: Any = small_model(family)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.randn(len(parameter), generator=generator).exp())
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        menu = tuple(dict.fromkeys([*choice.values(), PLAIN]).keys() - {"none"})
        directory: RunDirectory = solved_run(family, choice, tuple(sorted(menu)), folder, **more)[0]
        return directory

    return build


def model_of(directory: RunDirectory) -> Any:
    config = RunState.open(directory).config
    return load_model(find_model(config["model"]), dtype="float32", device="cpu")


def quantized_by_run(source: Any, model: Any, forward_loop: Any = None) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return mtq.quantize(model, load_quantization_config(source, device="cpu"), forward_loop)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS, use_cache=False).logits
    return result


def assert_weights_are_those_of_the_run(directory: RunDirectory, model: Any, plain: Any) -> None:
    """To the bit, of all modules that are rounded as they are."""
    state = RunState.open(directory)
    scales = WeightScales(plain, calibration_of(state))
    menu = {f.name: f for f in map(Format.from_json, state.plan["formats"])}
    for row in directory.read_table("manifest.parquet").to_pylist():
        name, facts = row["module"], state.plan["modules"][row["module"]]
        if row["format"] == "none":
            continue
        format_ = menu[row["format"]]
        path = name.rpartition(".")[0] if "expert" in facts else name
        ours, theirs = plain.get_submodule(path), model.get_submodule(path)
        if facts["prefixes"] == [""]:
            expected = quantized_weight(format_, ours.weight, scales, name)
            assert torch.equal(theirs.weight_quantizer(theirs.weight), expected), name
            continue
        for parameter in (prefix.removesuffix("_") for prefix in facts["prefixes"]):
            weights, quantized = getattr(ours, parameter), getattr(theirs, parameter)
            numbers = [facts["expert"]] if "expert" in facts else range(len(weights))
            for n in numbers:
                expected = quantized_weight(format_, weights[n], scales, path, parameter, str(n))
                quantizer = getattr(theirs, f"{parameter}_weight_quantizers")[n]
                assert torch.equal(quantizer(quantized[n]), expected), (name, parameter, n)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_model_is_the_one_that_was_scored(family: str, plan: str, loud_run: Any) -> None:
    directory = loud_run(family, PLANS[plan])
    plain = model_of(directory)
    quantized = quantized_by_run(directory.uri, copy.deepcopy(plain))
    assert_weights_are_those_of_the_run(directory, quantized, plain)
    expected = logits_of_solution(directory, "", IDS)
    assert (logits(plain) - expected).std() > 0.005 * expected.std()
    torch.testing.assert_close(logits(quantized), expected, rtol=1e-6, atol=1e-6)

    def other_data(model: Any) -> None:
        model(torch.arange(200, 240)[None], use_cache=False)

    again = quantized_by_run(Path(directory.uri, "manifest.json"), plain, other_data)
    assert torch.equal(logits(again), logits(quantized))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_factors_of_the_run_are_folded(family: str, loud_run: Any) -> None:
    directory = loud_run(family, AWQ_PLAN)
    plain = model_of(directory)
    quantized = quantized_by_run(directory.uri, copy.deepcopy(plain))
    assert not any("pre_quant" in name for name in quantized.state_dict())
    changed = quantized.get_submodule("model.layers.0.input_layernorm").weight
    assert not torch.equal(changed, plain.get_submodule("model.layers.0.input_layernorm").weight)
    expected, before = logits_of_solution(directory, "", IDS), logits(plain)
    assert (before - expected).std() > 0.01 * before.std()
    torch.testing.assert_close(
        logits(quantized), expected, rtol=1e-4, atol=1e-4 * float(before.std())
    )


def test_single_experts_take_their_own_fits(loud_run: Any) -> None:
    choice = {"*": GPTQ, "*experts.*": WEIGHTED, "*experts.1": "none", "*experts.2": PLAIN}
    directory = loud_run("qwen3_moe", choice, expert_groups="expert")
    plain = model_of(directory)
    quantized = quantized_by_run(directory.uri, copy.deepcopy(plain))
    assert_weights_are_those_of_the_run(directory, quantized, plain)


def test_solution_is_found_by_its_folder(loud_run: Any) -> None:
    directory = loud_run("llama", {"*": GPTQ, "*attn*": WEIGHTED})
    groups = directory.read_table("plan.parquet").column("group").to_pylist()
    pins = {group: WEIGHTED if "mlp" in group else PLAIN for group in groups}
    solution = solve_run(directory, SolveOptions(bits=5, pins=pins))
    folder = Path(directory.uri, "solutions", solution.name)
    config = load_quantization_config(folder, device="cpu")
    assert config == load_quantization_config(str(folder / "manifest.json"), device="cpu")
    assert config == Run.open(directory.uri).quantization_config(solution.name, device="cpu")
    algorithm = config["algorithm"]
    assert json.loads(json.dumps(algorithm)) == algorithm
    assert (algorithm["run"], algorithm["solution"]) == (directory.uri, solution.name)
    quantized = quantized_by_run(folder, model_of(directory))
    expected = logits_of_solution(directory, solution.name, IDS)
    torch.testing.assert_close(logits(quantized), expected, rtol=1e-6, atol=1e-6)


def test_model_is_restored_without_its_run(loud_run: Any, tmp_path: Path) -> None:
    directory = loud_run("qwen3_moe", PLANS["gptq"])
    plain = model_of(directory)
    quantized = quantized_by_run(directory.uri, copy.deepcopy(plain))
    mto.save(quantized, tmp_path / "model.pt")
    shutil.rmtree(directory.uri)
    restored = mto.restore(plain, tmp_path / "model.pt")
    assert torch.equal(logits(restored), logits(quantized))


def test_manifest_without_its_run_fits_anew(loud_run: Any, tmp_path: Path) -> None:
    directory = loud_run("llama", PLANS["weighted"])
    manifest = directory.read_json("manifest.json")
    assert "run" not in manifest["quantization_config"]["algorithm"]
    config = load_quantization_config(manifest, device="cpu")
    assert "run" not in config["algorithm"]
    for name in ("manifest.json", "mine.json"):
        (tmp_path / name).write_bytes(directory.read_bytes("manifest.json"))
        assert load_quantization_config(tmp_path / name, device="cpu") == config
    with pytest.raises(ValueError, match="the algorithm weighted needs inputs"):
        quantized_by_run(manifest, model_of(directory))
    with pytest.raises(StoreError, match=r"nowhere/manifest.json does not exist"):
        load_quantization_config(tmp_path / "nowhere")


def test_gptq_without_its_run_is_refused_with_the_remedy(loud_run: Any) -> None:
    directory = loud_run("llama", {"*": GPTQ})
    with pytest.raises(ValueError, match=r"gptq rounds .*load_quantization_config\('RUN'\)"):
        quantized_by_run(directory.read_json("manifest.json"), model_of(directory))


def test_allocation_without_fits_names_no_run(loud_run: Any) -> None:
    directory = loud_run("llama", {"*": PLAIN})
    config = load_quantization_config(directory.uri)
    assert config == load_quantization_config(directory.read_json("manifest.json"))
    assert config["algorithm"] == "max"


def test_model_with_other_weights_is_refused_and_left_alone(loud_run: Any) -> None:
    directory = loud_run("llama", PLANS["gptq"])
    config = small_config("llama")
    config.intermediate_size = 96
    other: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in other.named_parameters()}
    with pytest.raises(ValueError, match=r"mlp\.gate_proj has weights of \[\(96, 64\)\], and the"):
        quantized_by_run(directory.uri, other)
    after = dict(other.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with pytest.raises(ValueError, match=r"has weights of no shape, and the run"):
        quantized_by_run(directory.uri, small_model("qwen3_moe"))


@pytest.mark.parametrize("name", [GPTQ, AWQ, AWQ_GPTQ])
def test_tied_head_is_not_rounded_in_the_embedding(name: str, loud_run: Any) -> None:
    directory = loud_run("qwen3", {"*": "none", "lm_head": name})
    model = model_of(directory)
    with pytest.raises(ValueError, match=r"lm_head has the input embedding's weight.*a copy"):
        quantized_by_run(directory.uri, model)
    model = model_of(directory)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    quantized = quantized_by_run(directory.uri, model)
    expected = logits_of_solution(directory, "", IDS)
    torch.testing.assert_close(logits(quantized), expected, rtol=1e-4, atol=1e-5)


def test_run_that_lost_or_dropped_its_fits_is_refused(loud_run: Any) -> None:
    directory = loud_run("llama", PLANS["gptq"])
    state = RunState.open(directory)
    with state.stage("fit", "mark"):
        pass
    config = load_quantization_config(directory.uri)
    kept = directory.read_bytes("rounding.parquet")
    directory.delete("rounding.parquet")
    with pytest.raises(StoreError, match=r"rounding.parquet is lost or damaged.*`resume`"):
        mtq.quantize(model_of(directory), config)
    directory.write_bytes("rounding.parquet", kept)
    drop_rounding(state)
    with pytest.raises(StoreError, match="scanned with `keep_rounded` no"):
        load_quantization_config(directory.uri)


def test_config_without_what_reads_runs_is_refused(
    loud_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = loud_run("llama", {"*": GPTQ})
    config = load_quantization_config(directory.uri)
    monkeypatch.delitem(READERS, SETS)
    with pytest.raises(ValueError, match="get the config from autoquant_ray"):
        mtq.quantize(model_of(directory), config)


def test_run_in_an_object_store(loud_run: Any, store: ObjectStore) -> None:
    directory = loud_run("llama", {"*": WEIGHTED})
    groups = directory.read_table("plan.parquet").column("group").to_pylist()
    pins = {group: WEIGHTED if "mlp" in group else PLAIN for group in groups}
    solution = solve_run(directory, SolveOptions(bits=5, pins=pins)).name
    remote = RunDirectory(store.uri("a/run"))
    files = [str(path.relative_to(directory.uri)) for path in Path(directory.uri).rglob("*.*")]
    for name in files:
        if Path(directory.uri, name).is_file():
            remote.write_bytes(name, directory.read_bytes(name))
    base, mark, options = remote.uri.partition("?")
    model = model_of(directory)
    for end, name in (("", ""), ("/manifest.json", ""), (f"/solutions/{solution}", solution)):
        config = load_quantization_config(f"{base}{end}{mark}{options}", device="cpu")
        assert (config["algorithm"]["run"], config["algorithm"]["solution"]) == (remote.uri, name)
        local = Path(directory.uri, "solutions", name) if name else directory.uri
        ours = quantized_by_run(f"{base}{end}{mark}{options}", copy.deepcopy(model))
        assert torch.equal(logits(ours), logits(quantized_by_run(local, copy.deepcopy(model))))


def test_caches_take_the_maxima_of_the_run(model_folder: Any, tmp_path: Path) -> None:
    folder, formats = model_folder("llama"), (WEIGHTED, "kv_fp8")
    model: Any = load_model(find_model(str(folder)), dtype="float32", device="cpu")
    plan = build_plan(model, resolve_formats(formats, device="cpu"))
    config = made_up_config(folder, tmp_path / "run", formats, kv_bytes_per_token=1000)
    directory = made_up_run(config, plan, "llama", fingerprint_model(find_model(str(folder))))
    calibrated(directory, folder, formats)
    pins = {g.name: "kv_fp8" if g.is_cache else WEIGHTED for g in plan.searched}
    options = SolveOptions(bits=16, kv_bytes_per_token=1000, pins=pins)
    solve_run(directory, options, folder="")
    quantized, calibration = quantized_by_run(directory.uri, model), read_calibration(directory)
    for number in (0, 1):
        name = f"model.layers.{number}.self_attn"
        attention, maxima = quantized.get_submodule(name), calibration.of(name).maxima
        assert attention.k_bmm_quantizer.amax.item() == maxima["k_bmm_amax"]
        assert attention.v_bmm_quantizer.amax.item() == maxima["v_bmm_amax"]
    assert logits(quantized).isfinite().all()


@pytest.mark.parametrize("family", ["Qwen3-MoE", "GPT-OSS"])
def test_experts_take_scales_numbers_and_maxima(
    family: str, make_spec: Any, make_samples: Any
) -> None:
    """Of every expert, or of all as one tensor, transposed; numbers that no rounding would give."""
    model = family_model(family)
    formats = resolve_formats(("wint8_aint8:weighted", f"{INT4}:gptq"), device="cpu")
    plan = build_plan(model, formats)
    scorer = Scorer(make_spec(plan), model=model)
    calibration = scorer.calibrate(make_samples([24, 24, 24]))
    experts = [m for g in plan.searched for m in g.modules if m.kind == "experts"]
    chosen = {planned.name: formats[number % 2] for number, planned in enumerate(experts)}
    assert len(experts) > 1
    modules = {p.name: QuantizedModule.of(p.name, p.to_json(), chosen[p.name]) for p in experts}
    entries, rounding = [*NOTHING], {}
    for planned in experts:
        format_, module = chosen[planned.name], model.get_submodule(planned.path)
        for prefix in planned.quantizer_prefixes:
            entries += quantizer_entries(f"{planned.name}.{prefix}", format_)
        for part, size in parts_of(planned, module) if format_ == formats[1] else ():
            codes = np.random.default_rng(size).integers(-7, 8, size).astype(np.int8)
            whole = codes.view(np.uint8)
            fitted = FittedWeight(codes=FittedCodes(damping=0.1, whole=whole, without=()))
            rounding[planned.path, part, format_.weight_key] = fitted
    calibration = dataclasses.replace(calibration, rounding=rounding)
    scales = WeightScales(model, calibration)
    theirs = quantized_by_modelopt(model, [torch.tensor([[1, 2]])], entries, "max")
    shapes = {planned.name: planned.shapes for planned in experts}
    fits = SolutionFits("runs/mine", modules, shapes, calibration)
    fits.require_match(theirs)
    fits.put_into(theirs)
    for planned in experts:
        format_, their = chosen[planned.name], theirs.get_submodule(planned.path)
        shadow = FusedExperts(model.get_submodule(planned.path), planned)
        for name in planned.parameters:
            ours, weights = shadow.quantized_weight(name, format_, scales), getattr(their, name)
            if planned.is_transposed:
                quantizer = getattr(their, f"{name}_weight_quantizer")
                assert torch.equal(quantizer(weights.mT.contiguous()).mT, ours)
            else:
                quantizers = getattr(their, f"{name}_weight_quantizers")
                quantized = [quantizer(weights[e]) for e, quantizer in enumerate(quantizers)]
                assert torch.equal(torch.stack(quantized), ours)
            if format_.input is not None:
                maximum = calibration.of(planned.name).maxima[f"{name}_input_amax"]
                assert getattr(their, f"{name}_input_quantizer").amax.item() == maximum


def parts_of(planned: Any, module: Any) -> Iterator[tuple[str, int]]:
    """Part and number of weights of every expert."""
    for name in planned.parameters:
        weights = getattr(module, name)
        yield from ((f"{name}.{n}", weights[n].numel()) for n in range(len(weights)))
