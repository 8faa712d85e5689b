"""Recipes for other tools: names against real files and maps, formats against the tools' own."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from click.testing import CliRunner
from scored_run import put_scored_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.api import Run
from autoquant_ray.cli.main import main
from autoquant_ray.config.demo import demo_config
from autoquant_ray.errors import AutoQuantError, ConfigError, FormatError
from autoquant_ray.export.recipes import TOOLS, make_recipe, recipe_notes
from autoquant_ray.export.tool_formats import COUNTERPARTS
from autoquant_ray.formats.format import NONE, Format
from autoquant_ray.formats.menu import PAIRS, resolve_formats
from autoquant_ray.solve import solve_run

_FP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
FORMATS = [
    Format(name=name, weight=weight, input=inputs, modelopt_compression=0.5)
    for name, (weight, inputs) in (PAIRS | {"nvfp4": (_FP4, _FP4)}).items()
]
BY_NAME = {format_.name: format_ for format_ in FORMATS}
SMOLLM = [
    f"model.layers.{layer}.{part}_proj"
    for layer in range(30)
    for part in (*(f"self_attn.{p}" for p in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
]


def options(recipe: str, embedding: str = "bf16") -> list[tuple[str, str]]:
    """Pattern and type of each tensor, as a shell and llama-quantize split the command."""
    words = shlex.split(recipe)
    words = [word for word in words if word != "--allow-requantize"]
    assert words[:3] == ["llama-quantize", "--token-embedding-type", embedding]
    assert words[-3:] == ["in.gguf", "out.gguf", "Q8_0"]
    assert set(words[3:-3:2]) == {"--tensor-type"}
    *pairs, last = [tuple(pair.split("=", 1)) for pair in words[4:-3:2]]
    assert last == (".*", "bf16"), "the final type would take what is not named"
    return pairs  # type: ignore[return-value]


def test_names_for_llama_cpp_leave_the_maps_of_others_alone() -> None:
    """gguf writes what only one architecture has into the table of all of them."""
    before = dict(gguf.TensorNameMap.block_mappings_cfg)
    with pytest.raises(ConfigError, match="language_model"):  # it is looked for in every map
        make_recipe({"language_model.nothing": "wint4_afp16"}, FORMATS, "llama.cpp")
    assert gguf.TensorNameMap.block_mappings_cfg == before


def test_experts_that_mlx_stacks_have_one_format() -> None:
    start = "model.layers.0.mlp.experts"
    chosen = {f"{start}.0.up_proj": "wint4_afp16", f"{start}.1.up_proj": "wint4_afp16"}
    recipe = json.loads(make_recipe(chosen, FORMATS, "mlx-lm"))
    assert recipe["model.layers.0.mlp.switch_mlp.up_proj"]["bits"] == 4
    with pytest.raises(ConfigError, match=r"mlx-lm keeps model.layers.0.mlp.switch_mlp.up_proj in"):
        make_recipe(chosen | {f"{start}.1.up_proj": NONE}, FORMATS, "mlx-lm")


def test_experts_that_files_name_otherwise_than_memory_go_by_the_files_names() -> None:
    """MLX keeps Mixtral's ``block_sparse_moe`` and Nemotron-H's ``backbone``."""
    chosen = {"model.layers.0.mlp.experts": "wint4_afp16"}
    recipe = json.loads(make_recipe(chosen, FORMATS, "mlx-lm", model_type="mixtral"))
    assert "model.layers.0.block_sparse_moe.switch_mlp.up_proj" in recipe
    chosen = {"model.layers.2.mixer.experts": "wint4_afp16"}
    recipe = json.loads(make_recipe(chosen, FORMATS, "mlx-lm", model_type="nemotron_h"))
    start = "backbone.layers.2.mixer.switch_mlp"
    assert {name for name in recipe if "." in name} == {f"{start}.fc1", f"{start}.fc2"}


def test_patterns_fit_exactly_the_tensors_of_a_real_file() -> None:
    gguf = pytest.importorskip("gguf")
    try:
        path = demo_config("runs", 6.0).model
    except AutoQuantError:
        pytest.skip("the demo's model is not installed")
    tensors = [tensor.name for tensor in gguf.GGUFReader(path).tensors]
    chosen = {m: "wint8_afp16" if "down" in m else "wint4_afp16" for m in SMOLLM}
    chosen["model.layers.3.mlp.up_proj"] = NONE
    pairs = options(make_recipe(chosen, FORMATS, "llama.cpp"))
    types = {}
    for pattern, type_ in pairs:
        (tensor,) = [name for name in tensors if re.search(pattern, name)]
        types[tensor] = type_
    assert len(types) == len(SMOLLM) == 210
    assert types["blk.7.ffn_down.weight"] == "q8_0"
    assert types["blk.7.attn_q.weight"] == "q4_0"
    assert types["blk.3.ffn_up.weight"] == "bf16"


def test_tensors_of_experts_and_of_wrapped_models() -> None:
    start = "model.language_model.layers.0."
    chosen = {f"{start}mlp.experts": "wint4_afp16", f"{start}self_attn.q_proj": NONE}
    pairs = options(
        make_recipe(chosen | {"model.visual.blocks.0.attn.qkv": NONE}, FORMATS, "llama.cpp")
    )
    assert [pattern for pattern, _ in pairs] == [
        *(rf"^blk\.0\.ffn_{part}_exps\.weight$" for part in ("gate", "up", "down")),
        r"^blk\.0\.attn_q\.weight$",
    ]
    apart = {f"model.layers.0.mlp.experts.{e}.up_proj": "wint4_afp16" for e in range(2)}
    assert len(options(make_recipe(apart, FORMATS, "llama.cpp"))) == 1
    with pytest.raises(ConfigError, match=r"blk.0.ffn_up_exps in one type.* q4_0 and q8_0"):
        make_recipe(
            apart | {"model.layers.0.mlp.experts.1.up_proj": "wint8_afp16"}, FORMATS, "llama.cpp"
        )
    with pytest.raises(ConfigError, match=r"no tensor for model\.visual\.blocks"):
        make_recipe({"model.visual.blocks.0.attn.qkv": "wint4_afp16"}, FORMATS, "llama.cpp")


def test_tensors_of_a_latent_attention_and_of_heads_inside_a_wrapper() -> None:
    """Converters split ``kv_b_proj``; a wrapper's head has a wrapper's name."""
    start = "language_model.model.layers.0."
    chosen = {f"{start}self_attn.kv_b_proj": "wint8_afp16", "language_model.lm_head": "wint8_afp16"}
    pairs = options(make_recipe(chosen, FORMATS, "llama.cpp"))
    names = ("blk.0.attn_kv_b", "blk.0.attn_k_b", "blk.0.attn_v_b", "output")
    assert [re.sub(r"[\\^$]", "", pattern) for pattern, _ in pairs] == [
        f"{name}.weight" for name in names
    ]
    in_memory = {"model.layers.0.mixer.in_proj": "wint8_afp16"}  # backbone.layers in its files
    assert (
        options(make_recipe(in_memory, FORMATS, "llama.cpp"))[0][0] == r"^blk\.0\.ssm_in\.weight$"
    )
    recipe = json.loads(make_recipe({"model.a.kv_b_proj": "wint8_afp16"}, FORMATS, "mlx-lm"))
    assert {"model.a.embed_q", "model.a.unembed_out"} <= set(recipe)
    chosen = {"model.language_model.layers.0.mlp.up_proj": NONE, "lm_head": "wint4_afp16"}
    recipe = json.loads(make_recipe(chosen, FORMATS, "mlx-lm"))
    assert recipe["language_model.lm_head"]["bits"] == 4
    assert "lm_head" not in recipe


def test_tied_head_goes_by_the_name_of_the_embedding() -> None:
    """Both tools store one matrix; ``lm_head`` and ``output`` are not there to match."""
    chosen = {"model.layers.0.mlp.up_proj": NONE, "lm_head": "wint8_afp16"}
    tied = {"lm_head": "model.embed_tokens"}
    text = make_recipe(chosen, FORMATS, "llama.cpp", tied=tied)
    assert options(text, embedding="q8_0")[-1] == (r"^token_embd\.weight$", "q8_0")
    assert "output" not in text
    recipe = json.loads(make_recipe(chosen, FORMATS, "mlx-lm", tied=tied))
    assert recipe["model.embed_tokens"]["bits"] == 8
    assert "lm_head" not in recipe
    inside = {"lm_head": "model.language_model.embed_tokens"}
    recipe = json.loads(make_recipe(chosen, FORMATS, "mlx-lm", tied=inside))
    assert recipe["language_model.model.embed_tokens"]["bits"] == 8


def test_rows_that_a_type_does_not_divide_get_what_the_tool_writes() -> None:
    """llama-quantize takes another type than it was told, or quantizes nothing; MLX stops."""
    widths = {0: 512, 1: 576, 2: 48}
    modules = {f"model.layers.{i}.mlp.up_proj": {"shapes": [[8, w]]} for i, w in widths.items()}
    (wide,) = resolve_formats(("wint6_afp16",), device="cpu")
    chosen = dict.fromkeys(modules, wide.name)
    arguments = (chosen, [wide], "llama.cpp")
    types = [type_ for _, type_ in options(make_recipe(*arguments, modules=modules))]
    assert types == ["q6_k", "q8_0", "bf16"]
    notes = recipe_notes(*arguments, tied={}, modules=modules)
    assert [re.findall(r"layers get (.*) \(", note) for note in notes] == [["q8_0"], ["16 bits"]]
    recipe = json.loads(make_recipe(chosen, [wide], "mlx-lm", modules=modules))
    entries = [recipe[name] for name in chosen]
    assert [entry and entry["group_size"] for entry in entries] == [128, 64, False]


def test_types_of_gguf_files_are_written_as_they_were_scored() -> None:
    """Rows that a type does not divide were scored with the type that they get, so no note."""
    widths = {0: 512, 1: 576}
    modules = {f"model.layers.{i}.mlp.up_proj": {"shapes": [[8, w]]} for i, w in widths.items()}
    formats = resolve_formats(("q4_k", "iq4_xs", "wint6_afp16"), device="cpu")
    for name, expected in {"q4_k": ["q4_k", "q5_0"], "iq4_xs": ["iq4_xs", "iq4_nl"]}.items():
        arguments = (dict.fromkeys(modules, name), formats, "llama.cpp")
        types = [type_ for _, type_ in options(make_recipe(*arguments, modules=modules))]
        assert types == expected
        assert recipe_notes(*arguments, tied={}, modules=modules) == []
    for tool in ("auto-round", "mlx-lm"):
        with pytest.raises(FormatError, match=f"{tool} has no counterpart of q4_k; of this run"):
            make_recipe(dict.fromkeys(modules, "q4_k"), formats, tool)


def test_layer_config_of_autoround_says_bits_groups_and_inputs() -> None:
    chosen = {"a": "wint4_afp16", "b": "wfp8_afp8", "c": NONE, "d": "wint8_aint8", "e": "nvfp4"}
    layers = json.loads(make_recipe(chosen, FORMATS, "auto-round"))
    assert layers["a"] == {
        "bits": 4, "group_size": 128, "sym": True, "data_type": "int", "act_bits": 16,
    }  # fmt: skip
    assert (layers["b"]["data_type"], layers["b"]["act_bits"], layers["b"]["group_size"]) == (
        "fp",
        8,
        0,
    )
    assert layers["c"] == {"bits": 16}
    assert (layers["d"]["group_size"], layers["d"]["act_group_size"]) == (-1, 0)
    assert (layers["e"]["data_type"], layers["e"]["act_bits"]) == ("nv_fp", 4)


def test_dictionary_of_mlx_has_defaults_and_every_layer() -> None:
    chosen = {
        "model.layers.0.mlp.down_proj": "wint4_afp16",
        "model.layers.0.mlp.experts": "wint8_afp16",
        "model.language_model.layers.1.self_attn.o_proj": "wfp4_afp16",
        "lm_head": NONE,
    }
    recipe = json.loads(make_recipe(chosen, FORMATS, "mlx-lm"))
    assert (recipe["group_size"], recipe["bits"], recipe["mode"]) == (128, 4, "affine")
    assert recipe["model.layers.0.mlp.switch_mlp.up_proj"]["bits"] == 8
    assert recipe["language_model.model.layers.1.self_attn.o_proj"]["mode"] == "nvfp4"
    assert recipe["lm_head"] is False


@pytest.mark.parametrize(
    ("tool", "refused"),
    [
        ("llama.cpp", {n for n in BY_NAME if "_afp16" not in n} | {"wfp8_afp16"}),
        ("mlx-lm", {n for n in BY_NAME if "_afp16" not in n} | {"wfp8_afp16"}),
        (
            "auto-round",
            {f"wint4_a{a}" for a in ("fp8", "int8", "int4")}
            | {f"wfp4_a{a}" for a in ("fp16", "fp8", "int8", "int4")}
            | {"wint8_afp8", "wint8_aint4", "wfp8_aint8", "wfp8_aint4"},
        ),
    ],
)
def test_formats_without_counterpart_are_named(tool: str, refused: set[str]) -> None:
    without_counterpart = {
        name for name, format_ in BY_NAME.items() if COUNTERPARTS[tool](format_) is None
    }
    assert without_counterpart == refused
    with pytest.raises(FormatError, match=f"{tool} has no counterpart of {min(refused)}; of this"):
        make_recipe({"a": min(refused), "b": "wint4_afp16"}, FORMATS, tool)


@pytest.mark.parametrize("tool", TOOLS)
def test_formats_that_scale_channels_have_no_counterpart(tool: str) -> None:
    formats = resolve_formats(("INT4_AWQ_CFG", "wint4_afp16"), device="cpu")
    with pytest.raises(FormatError, match=f"{tool} has no counterpart of INT4_AWQ_CFG; of this"):
        make_recipe({"model.layers.0.mlp.up_proj": "INT4_AWQ_CFG"}, formats, tool)


def invoke(*words: str) -> Any:
    """Run the command line."""
    return CliRunner().invoke(main, ["export", *words])


def test_export_writes_a_solutions_recipe_once(tmp_path: Path) -> None:
    run = put_scored_run(tmp_path / "run", num_layers=1, formats=("wint4_afp16", "wint8_afp16"))
    Run.open(run.uri).solve(bits=6.0)
    out = str(tmp_path / "new" / "recipe.txt")
    words = (run.uri, "--format", "recipe", "--tool", "llama.cpp", "--solution", "bits-6.00")
    result = invoke(*words, "--out", out)
    assert result.exit_code == 0, result.output
    text = Path(out).read_text()
    assert {type_ for _, type_ in options(text)} <= {"q4_0", "q8_0", "bf16"}
    rows = run.read_table("solutions/bits-6.00/manifest.parquet").to_pylist()
    assert len(options(text)) == len(rows) - 1  # all but the vision tower's
    result = invoke(*words, "--out", out)
    assert (result.exit_code, "exists; give another name" in result.output) == (2, True)
    assert invoke(*words, "--out", out, "--overwrite").exit_code == 0


def test_export_says_what_tools_do_with_a_tied_head(tmp_path: Path) -> None:
    run = put_scored_run(tmp_path / "run", num_layers=1, formats=("wint8_afp16",), model="m.gguf")
    record = run.read_json("run.json")
    record["plan"] |= {"tied_groups": ["lm_head"], "embedding": "model.embedding"}
    run.write_json("run.json", record)
    solve_run(run, SolveOptions(bytes=10**10, pins={"lm_head": "wint8_afp16"}), folder="")
    for tool, name in (("llama.cpp", "token_embd"), ("mlx-lm", "model.embedding")):
        out = tmp_path / tool
        result = invoke(run.uri, "--format", "recipe", "--tool", tool, "--out", str(out))
        assert result.exit_code == 0, result.output
        assert name in out.read_text()
        assert f"note: {tool} stores one matrix for lm_head and model.embedding" in result.stderr
        assert ("--allow-requantize" in out.read_text()) == (tool == "llama.cpp")
    result = invoke(
        run.uri, "--format", "recipe", "--tool", "auto-round", "--out", str(tmp_path / "a")
    )
    assert "note: auto-round leaves lm_head in 16 bits" in result.stderr
    assert "--pin 'lm_head=none'" in result.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--out", "x"), "--format recipe needs --tool llama.cpp, auto-round, mlx-lm"),
        (
            ("--out", "x", "--tool", "mlx-lm", "--solution", "no"),
            "does not exist; solutions of the run: bits",
        ),
        (
            ("--out", "x", "--tool", "mlx-lm", "--solution", "bits-9.00"),
            "mlx-lm has no counterpart of wfp8",
        ),
    ],
)
def test_wrong_export_is_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], line: str
) -> None:
    run = put_scored_run(tmp_path / "run", num_layers=1, formats=("wint4_afp16", "wfp8_afp8"))
    Run.open(run.uri).solve(bits=9.0)
    monkeypatch.chdir(tmp_path)
    result = invoke(run.uri, "--format", "recipe", *words)
    assert result.exit_code == 2
    assert line in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not Path("x").exists()


def relative_error(weight: torch.Tensor, second: float) -> float:
    """Of NVFP4 with blocks of 16, e4m3 scales under a scale of the whole weight."""
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    blocks = weight.reshape(-1, 16)
    wanted = blocks.abs().amax(dim=1, keepdim=True) / 6 / second
    scales = wanted.to(torch.float8_e4m3fn).float() * second
    ratios = (blocks / scales.clamp(min=1e-30)).abs()[..., None]
    rounded = numbers[(ratios - numbers).abs().argmin(dim=-1)] * blocks.sign() * scales
    return float((rounded - blocks).norm() / blocks.norm())


def test_nvfp4_of_mlx_loses_what_the_docs_say() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.005
    second = float(weight.abs().max()) / (6 * 448)
    assert relative_error(weight, 1.0) == pytest.approx(0.138, abs=0.004)  # MLX's
    assert relative_error(weight, second) == pytest.approx(0.094, abs=0.004)
