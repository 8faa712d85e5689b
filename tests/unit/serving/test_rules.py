"""What engines can serve: against ModelOpt's own names, and against what each engine would do."""

from __future__ import annotations

from typing import Any

import pytest

from autoquant_ray.allocate.cards import shipped_cards
from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.menu import PAIRS, resolve_formats
from autoquant_ray.serving.compressed_table import COMPRESSED_TABLE
from autoquant_ray.serving.fused_names import missing_parts
from autoquant_ray.serving.rules import (
    LayerAlgo,
    check_target,
    describe_violations,
    layer_algo,
    servable_formats,
    violations,
)
from autoquant_ray.serving.table import CARDS, ENGINES, FUSED, GENERATIONS, TABLE, rows_of

FP8, NVFP4 = LayerAlgo("FP8"), LayerAlgo("NVFP4", 16)
PRESETS = (
    "FP8_DEFAULT_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT8_DEFAULT_CFG",
    "INT8_WEIGHT_ONLY_CFG",
    "MXFP4_DEFAULT_CFG",
    "MXFP8_DEFAULT_CFG",
    "NVFP4_DEFAULT_CFG",
    "W4A16_NVFP4_CFG",
    "W4A8_MXFP4_FP8_CFG",
    "W4A8_NVFP4_FP8_CFG",
)


def make_format(name: str) -> Format:
    """A pair or a preset by its name."""
    if name in PAIRS:
        weight, inputs = PAIRS[name]
    else:
        import modelopt.torch.quantization as mtq

        entries = {e["quantizer_name"]: e.get("cfg") for e in getattr(mtq, name)["quant_cfg"]}
        weight, inputs = dict(entries["*weight_quantizer"]), entries.get("*input_quantizer")
    return Format(name=name, weight=weight, input=inputs, modelopt_compression=1.0)


def llama(num_layers: int = 2, prefix: str = "model.") -> dict[str, LayerAlgo | None]:
    """The linears of a Llama in 16 bits."""
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    ]
    names = [f"{prefix}layers.{layer}.{part}" for layer in range(num_layers) for part in parts]
    return dict.fromkeys([*names, "lm_head"])


def given(layers: dict[str, LayerAlgo | None], **parts: LayerAlgo | None) -> dict[str, Any]:
    """The same with algorithms for all modules whose name ends with a part."""
    return {name: parts.get(name.rpartition(".")[2], algo) for name, algo in layers.items()}


@pytest.mark.parametrize("name", [*PAIRS, *PRESETS])
def test_names_of_formats_are_those_that_modelopt_writes(name: str) -> None:
    """Where a format has a name, ModelOpt's exporter gives it the same, with its group size."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export.quant_utils import get_quant_config

    from autoquant_ray.allocate.quant_cfg import quantizer_entries

    format_ = make_format(name)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256))
    entries = [{"quantizer_name": "*", "enable": False}, *quantizer_entries("0.", format_)]
    mtq.quantize(model, {"quant_cfg": entries, "algorithm": None})
    theirs = get_quant_config(model)["quantization"]
    algo = layer_algo(format_)
    if algo is not None:
        assert theirs["quant_algo"].upper() == algo.algo
        assert theirs.get("group_size", algo.group_size) == algo.group_size


@pytest.mark.parametrize(
    ("name", "algo"),
    [
        ("wfp8_afp8", LayerAlgo("FP8")),
        ("wint4_afp16", LayerAlgo("W4A16_AWQ", 128)),
        ("wfp4_afp16", LayerAlgo("W4A16_NVFP4", 16)),
        ("NVFP4_DEFAULT_CFG", LayerAlgo("NVFP4", 16)),
        ("MXFP8_DEFAULT_CFG", LayerAlgo("MXFP8", 32)),
        ("FP8_PER_CHANNEL_PER_TOKEN_CFG", LayerAlgo("FP8_PER_CHANNEL_PER_TOKEN")),
        # ModelOpt calls these FP8, W4A16_AWQ, INT8 with inputs: the name drops what inputs are.
        ("wfp8_afp16", None),
        ("wfp8_aint8", None),
        ("wint4_afp8", None),
        ("wint8_afp8", None),
        ("wfp4_aint4", None),
    ],
)
def test_format_has_a_name_only_where_the_name_says_all(name: str, algo: LayerAlgo | None) -> None:
    assert layer_algo(make_format(name)) == algo


@pytest.mark.parametrize(
    ("name", "algo"),
    [
        ("wint4_afp16", LayerAlgo("W4A16_AWQ", 128)),
        ("wint4_g32_afp16", LayerAlgo("W4A16_AWQ", 32)),
        ("wfp4_afp16", LayerAlgo("W4A16_NVFP4", 16)),
        ("wfp4_afp16:max", LayerAlgo("W4A16_NVFP4", 16)),
        ("wfp4_afp8:max", LayerAlgo("W4A8_NVFP4_FP8", 16)),
        # ModelOpt calls it NVFP4, and NVFP4 has other inputs.
        ("wfp4_afp8", None),
    ],
)
def test_stored_scales_of_the_default_method_change_no_name_but_that_of_fp8_inputs(
    name: str, algo: LayerAlgo | None
) -> None:
    (format_,) = resolve_formats((name,), device="cpu")
    assert layer_algo(format_) == algo


def test_formats_that_scale_channels_have_no_name() -> None:
    """ModelOpt calls them W4A16_AWQ and the like, but exports other factors than it measured."""
    names = ("INT4_AWQ_CFG", "INT8_SMOOTHQUANT_CFG", "NVFP4_AWQ_LITE_CFG")
    assert [layer_algo(format_) for format_ in resolve_formats(names, device="cpu")] == [None] * 3


def test_table_names_generations_sources_and_all_shipped_cards() -> None:
    assert set(TABLE) == set(FUSED) == set(ENGINES)
    assert sorted(CARDS) == shipped_cards()
    releases = {"vllm": "0.33.0", "sglang": "0.5.23", "trtllm": "1.2.1"}
    for engine, rows in (*TABLE.items(), *COMPRESSED_TABLE.items()):
        assert len({row.algo for row in rows}) == len(rows)
        for row in rows:
            assert {*row.mixed, *row.single} <= set(GENERATIONS)
            assert "/" in row.source
            assert releases[engine] in row.source
            assert row.mixed or row.note


def test_menu_of_vllm_on_hopper_and_blackwell() -> None:
    menu = [make_format(n) for n in ("wint4_afp16", "wfp8_afp8", "NVFP4_DEFAULT_CFG", "wfp4_afp16")]
    hopper = servable_formats(menu, "vllm", "h100")
    assert [name for name, reason in hopper.items() if reason is None] == [
        "wfp8_afp8",
        "wfp4_afp16",
    ]
    assert "before Blackwell the inputs stay in 16 bits" in (hopper["NVFP4_DEFAULT_CFG"] or "")
    assert "vllm does not know W4A16_AWQ" in (hopper["wint4_afp16"] or "")
    blackwell = servable_formats(menu, "vllm", "blackwell")
    assert blackwell["NVFP4_DEFAULT_CFG"] is None
    assert servable_formats(menu, "vllm", None)["NVFP4_DEFAULT_CFG"] is None


def test_format_that_routed_experts_cannot_have_is_refused_there_only() -> None:
    """vLLM has no method for experts with FP8 per channel: they would stay unquantized."""
    algo = LayerAlgo("FP8_PER_CHANNEL_PER_TOKEN")
    layers = given(llama(), o_proj=algo, down_proj=FP8)
    assert violations(layers, "vllm", "hopper") == []
    (violation,) = violations(layers | experts(algo, FP8), "vllm", "hopper")
    assert "serves no routed experts as FP8_PER_CHANNEL_PER_TOKEN" in violation.reason
    assert all(".experts." in name for name in violation.modules)
    (reason,) = servable_formats(
        [make_format("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG")], "vllm", "hopper"
    ).values()
    assert "the inputs are quantized too" in (reason or "")


def test_sglang_needs_nvfp4_among_several_formats() -> None:
    """Else it takes the checkpoint for DeepSeek's W4AFP8."""
    mixed = given(llama(1), o_proj=FP8, down_proj=LayerAlgo("MXFP8", 32))
    (violation,) = violations(mixed, "sglang", "blackwell")
    assert "as W4AFP8" in violation.reason
    assert violations(mixed, "vllm", "blackwell") == []
    with_nvfp4 = given(llama(1), o_proj=FP8, down_proj=LayerAlgo("W4A16_NVFP4", 16))
    for gpu in ("ada", "hopper", "blackwell"):
        assert violations(with_nvfp4, "sglang", gpu) == []
    assert violations(with_nvfp4, "sglang", "ampere")


W4A16, W8A16 = LayerAlgo("W4A16", 128), LayerAlgo("W8A16")
INT8, FP8_BOTH = LayerAlgo("W8A8_INT8"), LayerAlgo("W8A8_FP8")
COMPRESSED = "compressed-tensors"


@pytest.mark.parametrize(
    ("gpu", "more"),
    [
        ("ampere", {"wint8_aint8"}),
        ("hopper", {"wint8_aint8", "wfp8_afp8"}),
        ("blackwell", {"wfp8_afp8", "NVFP4_DEFAULT_CFG", "MXFP8_DEFAULT_CFG"}),
    ],
)
def test_menu_of_vllm_in_compressed_tensors(gpu: str, more: set[str]) -> None:
    everywhere = {"wint4_afp16", "wint8_afp16", "wfp8_afp16", "wfp4_afp16:max"}
    others = ("wint8_aint8", "wfp8_afp8", "NVFP4_DEFAULT_CFG", "MXFP8_DEFAULT_CFG", "wint4_afp8")
    menu = resolve_formats((*everywhere, *others), device="cpu")
    reasons = servable_formats(menu, "vllm", gpu, layout=COMPRESSED)
    assert {name for name, reason in reasons.items() if reason is None} == everywhere | more


def test_int4_int8_and_fp8_are_served_together_by_vllm_in_compressed_tensors() -> None:
    attention = {p: W4A16 for p in ("q_proj", "k_proj", "v_proj")}
    layers = given(llama(1), **attention, o_proj=W8A16, gate_proj=INT8, up_proj=INT8)
    layers |= {"model.layers.0.mlp.down_proj": FP8_BOTH, "lm_head": W4A16}
    for gpu in ("ada", "hopper"):
        assert violations(layers, "vllm", gpu, layout=COMPRESSED) == []
    (violation,) = violations(layers, "vllm", "ampere", layout=COMPRESSED)
    assert violation.modules == ("model.layers.0.mlp.down_proj",)
    key = "model.layers.0.self_attn.k_proj"
    (violation,) = violations(layers | {key: W8A16}, "vllm", "ada", layout=COMPRESSED)
    assert "fuses" in violation.reason
    blocks = layers | {"model.layers.0.self_attn.o_proj": LayerAlgo("W4A16", 256)}
    (violation,) = violations(blocks, "vllm", "ada", layout=COMPRESSED)
    assert "in blocks of 32, 64, 128 only, not 256" in violation.reason


def test_fused_layers_without_all_parts_are_not_found_in_compressed_tensors() -> None:
    """vLLM looks for q, k and v, and reads the layer as unquantized where one is not listed."""
    layers = {n: a for n, a in llama(1).items() if not n.endswith("v_proj")}
    assert violations(layers, "vllm", "hopper", layout=COMPRESSED) == []
    names = list(layers)
    assert missing_parts(names, names) == ["model.layers.0.self_attn.v_proj"]
    assert missing_parts(list(llama(1)), list(llama(1))) == []
    layers = given(layers, q_proj=W4A16, k_proj=W4A16)
    (violation,) = violations(layers, "vllm", "hopper", layout=COMPRESSED)
    assert "as 16 bits, not W4A16" in violation.reason


def test_head_of_a_wrapped_model_is_not_found_in_compressed_tensors() -> None:
    """vLLM does not map names without a dot to those of the wrapper's parts."""
    for prefix, is_read in (("model.", True), ("model.language_model.", False)):
        layers = given(llama(1, prefix), lm_head=W8A16)
        refusals = violations(layers, "vllm", "hopper", layout=COMPRESSED)
        assert [v.modules for v in refusals] == ([] if is_read else [("lm_head",)])


def test_experts_that_compressed_tensors_has_no_method_for_are_refused() -> None:
    assert violations(experts(W4A16, INT8), "vllm", "hopper", layout=COMPRESSED) == []
    for algo in (INT8, LayerAlgo("W8A16_FP8")):
        (violation,) = violations(experts(algo, W8A16), "vllm", "hopper", layout=COMPRESSED)
        assert all(".experts." in name for name in violation.modules)


def test_allocation_with_fused_modules_in_one_format_has_no_violation() -> None:
    parts = {p: FP8 for p in ("q_proj", "k_proj", "v_proj", "down_proj")}
    layers = given(llama(), **parts, gate_proj=NVFP4, up_proj=NVFP4)
    for engine in ENGINES:
        assert violations(layers, engine, "blackwell") == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("other", [None, NVFP4])
def test_fused_modules_in_different_formats_are_named(engine: str, other: LayerAlgo | None) -> None:
    layers = given(llama(1), q_proj=FP8, k_proj=other, v_proj=FP8, down_proj=NVFP4)
    (violation,) = violations(layers, engine, "blackwell")
    assert violation.modules == tuple(f"model.layers.0.self_attn.{p}_proj" for p in "qkv")
    assert "fuses" in violation.reason
    groups = {name: "model.layers.0.self_attn.q_proj" for name in violation.modules}
    (named,) = violations(layers, engine, "blackwell", groups)
    assert named.groups == ("model.layers.0.self_attn.q_proj",)
    assert "give them the same format" in describe_violations([named], engine, "blackwell")


def test_missing_member_of_a_fused_set_is_no_violation() -> None:
    layers = {n: a for n, a in llama(1).items() if not n.endswith("v_proj")}
    layers = given(layers, q_proj=FP8, k_proj=FP8, down_proj=NVFP4)
    assert violations(layers, "vllm", "blackwell") == []


@pytest.mark.parametrize(
    ("first", "second"), [("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")]
)
def test_linear_attention_pairs_share_a_format(first: str, second: str) -> None:
    start = "model.layers.0.linear_attn."
    names = [f"{start}{p}" for p in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")]
    layers: dict[str, LayerAlgo | None] = dict.fromkeys([*names, f"{start}out_proj"], FP8)
    assert violations(layers, "vllm", "hopper") == []
    layers[start + second] = None
    (violation,) = violations(layers, "vllm", "hopper")
    assert set(violation.modules) == {start + first, start + second}


def experts(algo: LayerAlgo | None, shared: LayerAlgo | None) -> dict[str, LayerAlgo | None]:
    """Two routed experts, apart, beside a shared one."""
    start = "model.layers.0.mlp."
    parts = ("gate_proj", "up_proj", "down_proj")
    layers = {f"{start}experts.{e}.{p}": algo for e in range(2) for p in parts}
    return layers | {f"{start}shared_expert.{p}": shared for p in parts}


def test_experts_of_a_layer_share_a_format() -> None:
    layers = experts(FP8, NVFP4)
    for engine in ENGINES:
        assert violations(layers, engine, "blackwell") == []
    layers["model.layers.0.mlp.experts.1.down_proj"] = NVFP4
    for engine in ENGINES:
        (violation,) = violations(layers, engine, "blackwell")
        assert len(violation.modules) == 6
        assert all(".experts." in name for name in violation.modules)


def test_vllm_reads_16_bit_experts_by_their_neighbours() -> None:
    layers = experts(None, FP8) | {"model.layers.0.self_attn.o_proj": NVFP4}
    (violation,) = violations(layers, "vllm", "blackwell")
    assert "would read them as FP8, not 16 bits" in violation.reason
    assert violations(layers, "sglang", "blackwell") == []


def test_one_group_size_for_all_nvfp4_layers() -> None:
    layers = given(llama(1), o_proj=NVFP4, down_proj=LayerAlgo("W4A16_NVFP4", 32))
    (violation,) = violations(layers, "vllm", "blackwell")
    assert violation.modules == ("model.layers.0.mlp.down_proj",)
    assert "group sizes 16 and 32" in violation.reason


def test_quantized_head_would_be_read_as_16_bits_by_trtllm() -> None:
    for layers in (given(llama(1), lm_head=FP8, o_proj=NVFP4), given(llama(1), lm_head=FP8)):
        (violation,) = violations(layers, "trtllm", "blackwell")
        assert violation.modules == ("lm_head",)
        assert "as 16 bits, not FP8" in violation.reason
        for engine in ("vllm", "sglang"):
            assert violations(layers, engine, "blackwell") == []


def test_trtllm_finds_standalone_linears_by_exact_names_only() -> None:
    parts = {p: FP8 for p in ("q_proj", "k_proj", "v_proj", "o_proj")}
    layers = given(llama(1, "model.language_model."), **parts, gate_proj=NVFP4, up_proj=NVFP4)
    (violation,) = violations(layers, "trtllm", "blackwell")
    assert violation.modules == ("model.language_model.layers.0.self_attn.o_proj",)
    assert violations(layers, "vllm", "blackwell") == []


def test_trtllm_does_not_find_a_checkpoints_own_fused_qkv() -> None:
    names = [
        f"model.layers.0.{p}" for p in ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    layers: dict[str, LayerAlgo | None] = dict.fromkeys(names, FP8) | {names[2]: NVFP4}
    (violation,) = violations(layers, "trtllm", "blackwell")
    assert violation.modules == (names[0],)
    assert violations(layers, "vllm", "blackwell") == []


def test_unknown_engine_and_gpu_are_named() -> None:
    assert [check_target("vllm", gpu) for gpu in ("H100", "ada", None)] == ["hopper", "ada", None]
    with pytest.raises(ConfigError, match=r"`engine` 'tgi' is unknown; known: vllm, sglang"):
        check_target("tgi", None)
    with pytest.raises(ConfigError, match=r"`gpu` 'v100' is unknown; known: ampere"):
        check_target("vllm", "v100")


def test_rows_without_a_generation_say_why() -> None:
    for engine in ENGINES:
        for row in rows_of(engine).values():
            assert row.single or row.note


def test_head_of_one_format_is_kept_where_the_engines_class_for_it_has_no_heads() -> None:
    for algo, is_read in ((LayerAlgo("MXFP8", 32), False), (NVFP4, True)):
        layers = dict.fromkeys(llama(1), algo)
        refusals = violations(layers, "sglang", "blackwell")
        assert [v.modules for v in refusals] == ([] if is_read else [("lm_head",)])
    several = dict.fromkeys(llama(1), NVFP4) | {"lm_head": LayerAlgo("MXFP8", 32)}
    assert violations(several, "sglang", "blackwell") == []
