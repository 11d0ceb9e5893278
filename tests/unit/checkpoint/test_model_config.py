"""config.json and generation_config.json: defaults, rules and refusals."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from tiny_model import tiny_config

from fastdeploy_lite.config import (
    CacheConfig,
    GenerationDefaults,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    QuantizationConfig,
    SchedulerConfig,
)
from fastdeploy_lite.utils.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 1000,
}
PUBLISHED_300B: dict[str, Any] = {
    "dense_quant_type": "wint8",
    "moe_quant_type": "w4w2",
    "quantization": "wint2",
    "moe_quant_config": {
        "moe_w4_quant_config": {
            "quant_type": "wint4",
            "quant_granularity": "per_channel",
            "quant_start_layer": 0,
            "quant_end_layer": 6,
        },
        "moe_w2_quant_config": {
            "quant_type": "wint2",
            "quant_granularity": "pp_acc",
            "quant_group_size": 64,
            "quant_start_layer": 7,
            "quant_end_layer": 53,
        },
    },
}


def refused(change: dict[str, Any], *parts: str, base: dict[str, Any] = MINIMAL) -> None:
    """`base` with `change` raises a one-line ConfigError that has all `parts`."""
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**base, **change}, "here/config.json")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("here/config.json", *parts):
        assert part in message, message


def test_defaults_are_fastdeploys() -> None:
    config = ModelConfig.from_dict(MINIMAL)
    assert config.num_key_value_heads == 4
    assert config.head_dim == 32
    assert config.rms_norm_eps == 1e-5
    assert config.rope_theta == 10000.0
    assert config.max_position_embeddings == 512
    assert not config.tie_word_embeddings
    assert config.moe_num_experts == 0
    assert not any(config.is_moe_layer(i) for i in range(4))
    assert config.quantization is None
    assert config.linear_kind == config.expert_kind(3) == "dense"
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, (2,), 0)


def test_demo_config(demo_dir: Path) -> None:
    config = ModelConfig.from_dir(demo_dir)
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (384, 7, 64)
    assert (config.moe_num_experts, config.moe_k, config.moe_intermediate_size) == (16, 4, 256)
    assert [config.is_moe_layer(i) for i in range(3)] == [False, True, True]
    assert config.linear_kind == "int8"
    assert {config.expert_kind(i) for i in range(1, 7)} == {"ccq"}
    assert config.raw["initializer_range"] == 0.02


def test_published_quantization_round_trips_and_splits_at_layer_six() -> None:
    quantization = QuantizationConfig.from_dict(PUBLISHED_300B)
    assert quantization.to_dict() == PUBLISHED_300B
    assert [quantization.expert_kind(i) for i in (0, 6, 7, 53)] == ["int4", "int4", "ccq", "ccq"]
    assert quantization.linear_kind == "int8"


def test_quantization_defaults() -> None:
    quantization = QuantizationConfig.from_dict({"quantization": "wint2"})
    assert [quantization.expert_kind(i) for i in (6, 7)] == ["int4", "ccq"]
    assert quantization.dense_quant_type == "wint8"


def test_quantization_config_alone_means_quantised() -> None:
    config = ModelConfig.from_dict({**MINIMAL, "quantization_config": PUBLISHED_300B})
    assert config.is_quantized
    assert config.quantization is not None


@pytest.mark.parametrize(
    ("scheme", "linear", "expert"),
    [
        ({"quantization": "wint8"}, "int8", "int8"),
        ({"quantization": "wint4"}, "int8", "int4"),
        (
            {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4"},
            "int8",
            "int4",
        ),
    ],
)
def test_weight_only_schemes(scheme: dict[str, Any], linear: str, expert: str) -> None:
    config = ModelConfig.from_dict({**MINIMAL, "quantization_config": scheme})
    assert (config.linear_kind, config.expert_kind(0)) == (linear, expert)
    assert config.quantization is not None
    assert QuantizationConfig.from_dict(config.quantization.to_dict()) == config.quantization


@pytest.mark.parametrize(
    ("wanted", "linear", "expert"),
    [
        ("wint8", "int8", "int8"),
        ("wint4", "int8", "int4"),
        ({"quantization": "wint4"}, "int8", "int4"),
        ({"quantization": "wint4", "dense_quant_type": "wint4"}, "int4", "int4"),
        (
            {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4"},
            "int8",
            "int4",
        ),
    ],
)
def test_a_bf16_model_takes_the_wanted_quantisation(
    wanted: str | dict[str, Any], linear: str, expert: str
) -> None:
    plain = ModelConfig.from_dict(MINIMAL)
    config = plain.with_quantization(wanted)
    assert (config.linear_kind, config.expert_kind(0)) == (linear, expert)
    assert config.quantizes_on_load
    assert not config.is_quantized, "the files are not"
    assert not plain.quantizes_on_load
    assert plain.with_quantization(None) is plain


def test_formats_are_described_for_people(demo_dir: Path) -> None:
    plain = ModelConfig.from_dict({**MINIMAL, "moe_num_experts": 4, "moe_intermediate_size": 64})
    assert plain.describe_weights() == "bf16 linears, bf16 experts"
    wint4 = "int8 linears, int4 experts, quantised while loading"
    assert plain.with_quantization("wint4").describe_weights() == wint4
    assert ModelConfig.from_dict(MINIMAL).describe_weights() == "bf16 linears"
    published = dict(plain.raw) | {"num_hidden_layers": 9, "quantization_config": PUBLISHED_300B}
    both = ModelConfig.from_dict(published).describe_weights()
    assert both == "int8 linears, int4 and ccq experts"
    assert ModelConfig.from_dir(demo_dir).describe_weights() == "int8 linears, ccq experts"


def test_a_checkpoints_own_quantisation_beats_the_wanted_one() -> None:
    config = ModelConfig.from_dict({**MINIMAL, "quantization_config": PUBLISHED_300B})
    for wanted in ("wint8", "wint2", "w4a8", {"quantization": "wint4"}):
        assert config.with_quantization(wanted) is config
    assert not config.quantizes_on_load


@pytest.mark.parametrize(
    ("wanted", "parts"),
    [
        ("wint2", ("--quantization wint2", "fastdeploy-lite quantize --model", "--output")),
        ({"quantization": "wint2"}, ("--quantization wint2", "fastdeploy-lite quantize")),
        ("w4a8", ("'w4a8'", "does not read", "wint4, wint8, mix_quant")),
        ("block_wise_fp8", ("'block_wise_fp8'", "does not read")),
        ("weight_only", ("'weight_only'", "does not read", "wint4, wint8, mix_quant")),
        ("mix_quant", ("--quantization: dense_quant_type", "found nothing", "'wint8' or 'wint4'")),
        ("wint3", ("Invalid quantization method: 'wint3'",)),
        ({"quantization": "wint8", "kv_cache_quant_type": "int8"}, ("kv_cache_quant_type",)),
    ],
)
def test_wanted_quantisations_that_loading_cannot_do(
    wanted: str | dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(MINIMAL).with_quantization(wanted)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, ("architectures", "LlamaForCausalLM")),
        ({"architectures": None}, ("architectures",)),
        ({"hidden_size": None}, ("hidden_size",)),
        ({"hidden_size": 0}, ("hidden_size", "found 0")),
        ({"hidden_size": -5}, ("hidden_size", "-5")),
        ({"hidden_size": 128.0}, ("hidden_size", "128.0", "integer")),
        ({"hidden_size": True}, ("hidden_size", "True", "integer")),
        ({"hidden_size": "128"}, ("hidden_size", "'128'")),
        ({"hidden_size": 10**30}, ("hidden_size",)),
        ({"num_key_value_heads": 3}, ("num_key_value_heads", "divisor")),
        ({"num_key_value_heads": 0}, ("num_key_value_heads",)),
        ({"head_dim": 33}, ("head_dim", "even")),
        ({"rms_norm_eps": float("nan")}, ("rms_norm_eps", "nan")),
        ({"rms_norm_eps": -1e-5}, ("rms_norm_eps",)),
        ({"rope_theta": 0}, ("rope_theta",)),
        ({"rope_theta": "10000"}, ("rope_theta",)),
        ({"rope_theta": 10**400}, ("rope_theta",)),
        ({"rope_scaling": {"type": "yarn"}}, ("rope_scaling", "yarn")),
        ({"compression_ratio": 2.0}, ("compression_ratio",)),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu")),
        ({"tie_word_embeddings": 1}, ("tie_word_embeddings", "true or false")),
        ({"dtype": "float16"}, ("dtype", "float16")),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers",)),
        ({"remove_tail_layer": 4}, ("remove_tail_layer",)),
        ({"eos_token_id": [2, "x"]}, ("eos_token_id",)),
        ({"moe_num_experts": [64, 64]}, ("moe_num_experts", "multimodal", "not supported")),
        ({"moe_num_experts": 8}, ("moe_intermediate_size",)),
        (
            {"moe_num_experts": 8, "moe_k": 9, "moe_intermediate_size": 128},
            ("moe_k", "found 9"),
        ),
        ({"is_quantized": True}, ("quantization_config", "is_quantized")),
        ({"quantization_config": []}, ("quantization_config", "an object")),
        ({"quantization_config": {}}, ("quantization_config.quantization", "nothing")),
        (
            {"quantization_config": {"quantization": "wint3"}},
            ("Invalid quantization method: 'wint3'", "wint2"),
        ),
        ({"quantization_config": {"quantization": ["wint2"]}}, ("Invalid quantization method",)),
        ({"quantization_config": {"quantization": "w4a8"}}, ("'w4a8'", "does not read")),
        (
            {"quantization_config": {"quantization": "wint2", "kv_cache_quant_type": "int8"}},
            ("kv_cache_quant_type", "int8"),
        ),
        (
            {"quantization_config": {"quantization": "wint2", "dense_quant_type": "fp8"}},
            ("dense_quant_type", "fp8"),
        ),
        (
            {"quantization_config": {"quantization": "wint2", "moe_quant_config": 3}},
            ("moe_quant_config", "an object"),
        ),
        (
            {
                "quantization_config": {
                    "quantization": "wint2",
                    "moe_quant_config": {"quant_type": "w4a8"},
                }
            },
            ("moe_quant_config.quant_type", "w4a8"),
        ),
        (
            {
                "quantization_config": {
                    "quantization": "wint2",
                    "moe_quant_config": {"moe_w4_quant_config": {"quant_end_layer": "six"}},
                }
            },
            ("moe_w4_quant_config.quant_end_layer", "six"),
        ),
        (
            {"quantization_config": {"quantization": "mix_quant", "dense_quant_type": "wint8"}},
            ("moe_quant_type",),
        ),
    ],
)
def test_refusals_name_file_key_value_and_expectation(
    change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    refused(change, *parts)


def test_missing_required_keys_are_named() -> None:
    for key in MINIMAL:
        if key == "dtype":
            continue
        with pytest.raises(ConfigError, match=key):
            ModelConfig.from_dict({k: v for k, v in MINIMAL.items() if k != key})


def test_tail_layers_are_removed() -> None:
    layers = [
        ModelConfig.from_dict({**MINIMAL, "remove_tail_layer": value}).num_hidden_layers
        for value in (False, True, 2, None)
    ]
    assert layers == [4, 3, 2, 4]


def test_moe_topk_is_the_older_name() -> None:
    moe = {"moe_num_experts": 16, "moe_intermediate_size": 128}
    top_k = [
        ModelConfig.from_dict({**MINIMAL, **moe, **extra}).moe_k
        for extra in ({}, {"moe_topk": 5}, {"moe_k": 6, "moe_topk": 5})
    ]
    assert top_k == [8, 5, 6]


def test_torch_dtype_names_the_type_too() -> None:
    data = {k: v for k, v in MINIMAL.items() if k != "dtype"}
    assert ModelConfig.from_dict({**data, "torch_dtype": "float32"}).dtype == "float32"
    assert ModelConfig.from_dict(data).dtype == "bfloat16"


def test_the_base_of_rope_is_read_wherever_it_is() -> None:
    data = {k: v for k, v in MINIMAL.items() if k != "rope_theta"}
    inner = {"rope_type": "default", "rope_theta": 500000.0}
    assert ModelConfig.from_dict({**data, "rope_parameters": inner}).rope_theta == 500000.0
    both = {**data, "rope_theta": 500000, "rope_parameters": inner, "rope_scaling": None}
    assert ModelConfig.from_dict(both).rope_theta == 500000.0
    assert ModelConfig.from_dict(data).rope_theta == 10000.0
    assert ModelConfig.from_dict({**data, "transformers_version": "5"}).rope_theta == 500000.0


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ("rope_parameters.rope_type",)),
        ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, ("factor", "4.0")),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope_scaling.type", "'linear'")),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 7.0}}, ("7.0", "beside it")),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ("partial_rotary_factor", "0.5")),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, ("full_attention",)),
        ({"rope_parameters": [1]}, ("rope_parameters", "an object")),
        ({"moe_layer_interval": 2}, ("moe_layer_interval", "2")),
        ({"moe_gate_act": "sigmoid"}, ("moe_gate_act",)),
        ({"use_rmsnorm": False}, ("use_rmsnorm",)),
        (
            {
                "moe_num_experts": 4,
                "moe_intermediate_size": 64,
                "moe_k": 2,
                "moe_layer_end_index": 1,
            },
            ("moe_layer_end_index", "the last layer"),
        ),
    ],
)
def test_what_changes_the_arithmetic_is_refused(
    extra: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**MINIMAL, "rope_theta": 10000.0, **extra})
    assert all(part in str(caught.value) for part in parts)


def test_the_end_of_the_experts_may_be_the_last_layer() -> None:
    moe = {"moe_num_experts": 4, "moe_intermediate_size": 64, "moe_k": 2}
    for end in (-1, 3, 7, None):
        assert ModelConfig.from_dict({**MINIMAL, **moe, "moe_layer_end_index": end}).moe_k == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '{"a": NaN}', "[" * 100_000, '{"a": ' + "9" * 10_000 + "}", "\udcff"],
)
def test_unreadable_json_names_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dir(tmp_path)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_config_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        ModelConfig.from_dir(tmp_path)


def test_config_crosses_process_boundaries(demo_dir: Path) -> None:
    config = ModelConfig.from_dir(demo_dir)
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert again.raw == config.raw


def test_generation_defaults(demo_dir: Path, tmp_path: Path) -> None:
    assert GenerationDefaults.from_dir(tmp_path) == GenerationDefaults()
    demo = GenerationDefaults.from_dir(demo_dir)
    assert (demo.temperature, demo.top_p, demo.eos_token_id) == (0.8, 0.8, (2, 7))
    assert not demo.others


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", -1), ("top_p", 1.5), ("eos_token_id", [-1])],
)
def test_generation_refusals(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({key: value}), encoding="utf-8")
    with pytest.raises(ConfigError, match=key):
        GenerationDefaults.from_dir(tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CacheConfig(block_size=16),
        lambda: CacheConfig(num_blocks=0),
        lambda: CacheConfig(gpu_memory_utilization=1.5),
        lambda: SchedulerConfig(max_num_seqs=0),
        lambda: SchedulerConfig(max_num_seqs=257),
        lambda: SchedulerConfig(max_model_len=8),
        lambda: SchedulerConfig(max_num_batched_tokens=4),
        lambda: SchedulerConfig(
            max_num_seqs=8, max_num_batched_tokens=1024, enable_chunked_prefill=False
        ),
        lambda: ParallelConfig(0),
        lambda: ParallelConfig(2, 2),
        lambda: LoadConfig("fast"),  # type: ignore[arg-type]
    ],
)
def test_runtime_values_are_checked(make: Any) -> None:
    with pytest.raises(ConfigError, match="must be"):
        make()


def test_tiny_config_is_a_published_shape() -> None:
    quantization = tiny_config("2bits")["quantization_config"]
    assert quantization.keys() == PUBLISHED_300B.keys()
    assert quantization["moe_quant_config"].keys() == PUBLISHED_300B["moe_quant_config"].keys()
