"""An ERNIE-4.5 MoE checkpoint of random weights, to try conversions, servers and loading on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy_lite import formats
from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.checkpoint.linears import Linear, model_linears
from fastdeploy_lite.checkpoint.tensor import DTYPES, Array, float32_to_bfloat16
from fastdeploy_lite.checkpoint.writer import CheckpointWriter
from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.quantization.output_folder import prepare_output
from fastdeploy_lite.utils.errors import ConfigError

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "generation_config.json")
_HEAD_DIM = 64
_VOCABULARY = 8192  # of the demo model's tokenizer
_MULTIPLE = 128  # of every size that enters a 2-bit linear


_PUBLISHED: dict[str, dict[str, Any]] = {
    "21b": {
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2,
    },
    "300b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "moe_num_experts": 64,
        "moe_k": 8,
        "moe_intermediate_size": 3584,
        "moe_num_shared_experts": 0,
    },
}
SHAPES = tuple(_PUBLISHED)
"""Whose widths `published_shape_config` knows: ERNIE-4.5-21B-A3B and 300B-A47B."""


def published_shape_config(shape: str, layers: int, experts: int | None = None) -> dict[str, Any]:
    """A config.json with the widths of a published model and the demo model's vocabulary.

    Args:
        shape: One of `SHAPES`.
        layers: Decoder layers, at least 2; layer 0 is dense, the others are MoE.
        experts: Routed experts of a layer, at least 1; None for as many as the published model has.

    Returns:
        The parsed file.

    Raises:
        ConfigError: A size is out of range.
    """
    values = {**random_model_config(layers), **_PUBLISHED[shape]}
    if experts is not None:
        _require("experts", experts >= 1, "at least 1", experts)
        values.update(moe_num_experts=experts, moe_k=min(values["moe_k"], experts))
    return values


def random_model_config(
    layers: int = 4, hidden_size: int = 512, experts: int = 16
) -> dict[str, Any]:
    """A config.json with the demo model's vocabulary; layer 0 is dense, the others are MoE.

    Args:
        layers: Decoder layers, at least 2.
        hidden_size: Multiple of 128; the experts are half as wide, at least 128.
        experts: Routed experts of a layer, at least 1; four of them, or all, take each token.

    Returns:
        The parsed file.

    Raises:
        ConfigError: A size is out of range.
    """
    _require("layers", layers >= 2, "at least 2", layers)
    _require("hidden-size", hidden_size >= _MULTIPLE and hidden_size % _MULTIPLE == 0,
             f"a multiple of {_MULTIPLE}", hidden_size)  # fmt: skip
    _require("experts", experts >= 1, "at least 1", experts)
    wide = max(hidden_size // (2 * _MULTIPLE), 1) * _MULTIPLE
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "use_bias": False,
        "vocab_size": _VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // _HEAD_DIM,
        "num_key_value_heads": 2,
        "head_dim": _HEAD_DIM,
        "moe_num_experts": experts,
        "moe_k": min(4, experts),
        "moe_intermediate_size": wide,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": layers - 1,
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def write_random_model(
    directory: str | Path,
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    force: bool = False,
    shard_bytes: int = 4 << 30,
) -> int:
    """Write a checkpoint in the Paddle format, one tensor in memory at a time.

    A linear of K inputs has weights of standard deviation K**-0.5, so that activations keep their
    size from layer to layer.

    Args:
        directory: New folder.
        config: What `random_model_config` gives, with a `quantization_config` where linears are to
            be quantised; None takes its defaults.
        seed: The same seed and sizes give the same bytes.
        force: Replace a model in `directory`.
        shard_bytes: Size of an output file.

    Returns:
        The number of weights.

    Raises:
        CheckpointError: The folder is in use.
        ConfigError: The configuration is not possible.
    """
    directory = Path(directory)
    values = dict(random_model_config() if config is None else config)
    model = ModelConfig.from_dict(values)
    prepare_output(demo_path(), directory, force)
    random, count = np.random.default_rng(seed), 0
    with CheckpointWriter(directory, values, shard_bytes) as writer:
        for name in TOKENIZER_FILES:
            shutil.copyfile(demo_path() / name, directory / name)
        for key, array, dtype in _tensors(model, random):
            writer.add(key, array, dtype)
            count += array.size
    return count


def _tensors(model: ModelConfig, random: np.random.Generator) -> Iterator[tuple[str, Array, str]]:
    """Names, bits and types of all tensors, the linears last."""
    hidden = model.hidden_size
    yield "ernie.embed_tokens.weight", _normal(random, (model.vocab_size, hidden), hidden), "BF16"
    yield "ernie.norm.weight", _near_one(random, hidden), "BF16"
    for layer in range(model.num_hidden_layers):
        prefix = f"ernie.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", _near_one(random, hidden), "BF16"
        if model.is_moe_layer(layer):
            experts = model.moe_num_experts
            gate = random.standard_normal((hidden, experts), np.float32) / np.float32(hidden**0.5)
            yield f"{prefix}.mlp.gate.weight", gate, "F32"
            bias = np.zeros((1, experts), np.float32)
            yield f"{prefix}.mlp.moe_statics.e_score_correction_bias", bias, "F32"
    for linear in model_linears(model):
        for suffix, (array, dtype) in _linear(linear, random).items():
            yield f"{linear.module}.{suffix}", array, dtype


def _linear(linear: Linear, random: np.random.Generator) -> dict[str, tuple[Array, str]]:
    """What a file holds of a linear map: suffix -> bits, type."""
    rows, columns = linear.in_features, linear.out_features
    if linear.kind == "dense":
        return {"weight": (_normal(random, (rows, columns), rows), "BF16")}
    format_ = formats.get(linear.kind)
    arrays = format_.random(random, rows, columns)
    bytes_as = "U8" if linear.kind == "ccq" else "I8"
    found: dict[str, tuple[Array, str]] = {}
    for spec in format_.tensors(rows, columns):
        array = arrays[spec.suffix]
        if array.dtype == np.uint8:
            found[spec.suffix] = array.view(DTYPES[bytes_as]), bytes_as
        elif "F32" in spec.dtypes:
            found[spec.suffix] = array, "F32"
        else:
            found[spec.suffix] = float32_to_bfloat16(array), "BF16"
    return found


def _normal(random: np.random.Generator, shape: tuple[int, int], inputs: int) -> Array:
    return float32_to_bfloat16(random.standard_normal(shape, np.float32) / np.float32(inputs**0.5))


def _near_one(random: np.random.Generator, size: int) -> Array:
    return float32_to_bfloat16(random.uniform(0.8, 1.2, size).astype(np.float32))


def _require(name: str, holds: bool, wanted: str, value: int) -> None:
    if not holds:
        raise ConfigError(f"--{name} must be {wanted}, got {value}")
