"""Write small random checkpoints in every form that the reader knows.

The numbers are random but sane: activations keep their size from layer to layer. The tokenizer is
the demo model's, so the vocabulary is its 8192 pieces unless a test asks for another.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.checkpoint.inventory import rank_linears, read_linear
from fastdeploy_lite.checkpoint.linears import Linear, model_linears
from fastdeploy_lite.checkpoint.reader import Checkpoint
from fastdeploy_lite.checkpoint.tensor import Array, bfloat16_to_float32, float32_to_bfloat16
from fastdeploy_lite.checkpoint.writer import CheckpointWriter
from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.formats.tiles import pack_int4, pack_int8
from fastdeploy_lite.quantization_config import QuantizationConfig

# wint8, wint4: int8 dense linears with int8 or int4 experts. w4w2: the first MoE layer int4, the
# others ccq. 2bits: all experts ccq, as the demo checkpoint.
Kind = Literal["bf16", "wint8", "wint4", "w4w2", "2bits"]
KINDS: tuple[Kind, ...] = ("bf16", "wint8", "wint4", "w4w2", "2bits")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "generation_config.json")
Tensors = dict[str, tuple[Array, str]]


def tiny_config(
    kind: Kind = "2bits",
    *,
    layers: int = 3,
    experts: int = 4,
    tied: bool = True,
    shared_experts: int = 1,
    **overrides: Any,
) -> dict[str, Any]:
    """Return a config.json: layer 0 dense, then MoE; `overrides` are keys of config.json."""
    config: dict[str, Any] = {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "use_bias": False,
        "hidden_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 256,
        "vocab_size": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "moe_num_experts": experts,
        "moe_k": min(2, experts),
        "moe_intermediate_size": 256,
        "moe_num_shared_experts": shared_experts,
        "moe_layer_start_index": 1,
        "moe_use_aux_free": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config.update(overrides)
    quantization = _quantization(kind, config)
    if quantization is not None:
        config |= {"is_quantized": True, "quantization_config": quantization.to_dict()}
    return config


def tiny_tensors(config: Mapping[str, Any], seed: int = 0) -> Tensors:
    """Return random tensors (bits, safetensors dtype) for a whole, unsharded model."""
    model = ModelConfig.from_dict(config)
    random = np.random.default_rng(seed)
    hidden, vocab = model.hidden_size, model.vocab_size
    tensors: Tensors = {
        "ernie.embed_tokens.weight": _bf16(random.standard_normal((vocab, hidden)) * 0.05),
        "ernie.norm.weight": _bf16(random.uniform(0.5, 1.5, hidden)),
    }
    if not model.tie_word_embeddings:
        head = random.standard_normal((hidden, vocab)) / np.sqrt(hidden)
        tensors["lm_head.weight"] = _bf16(head)
    for layer in range(model.num_hidden_layers):
        prefix = f"ernie.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = _bf16(random.uniform(0.5, 1.5, hidden))
        if model.is_moe_layer(layer):
            experts = model.moe_num_experts
            gate = random.standard_normal((hidden, experts)) / np.sqrt(hidden)
            bias = random.standard_normal((1, experts)) * 0.05
            tensors[f"{prefix}.mlp.gate.weight"] = (gate.astype(np.float32), "F32")
            key = f"{prefix}.mlp.moe_statics.e_score_correction_bias"
            if model.moe_use_aux_free:
                tensors[key] = (bias.astype(np.float32), "F32")
    for linear in model_linears(model):
        tensors |= random_linear(linear, random)
    return tensors


def random_linear(linear: Linear, random: np.random.Generator) -> Tensors:
    """Return the tensors of one linear in its configured format, standard deviation K**-0.5."""
    k, n, module = linear.in_features, linear.out_features, linear.module
    if linear.kind == "ccq":
        return _random_ccq(module, k, n, random)
    weight = random.standard_normal((k, n)).astype(np.float32) / np.float32(np.sqrt(k))
    if linear.kind == "dense":
        return {f"{module}.weight": _bf16(weight)}
    largest, pack = (127, pack_int8) if linear.kind == "int8" else (7, pack_int4)
    bits, _ = _bf16(np.abs(weight).max(0) / largest)
    scale = bfloat16_to_float32(bits)
    codes = np.clip(np.rint(weight / scale), -largest, largest).astype(np.int8)
    return {f"{module}.quant_weight": (pack(codes), "I8"), f"{module}.weight_scale": (bits, "BF16")}


def write_tiny_model(
    directory: str | Path,
    *,
    kind: Kind = "2bits",
    seed: int = 0,
    layers: int = 3,
    experts: int = 4,
    tied: bool = True,
    shared_experts: int = 1,
    tensor_parallel_size: int = 1,
    file_format: Literal["safetensors", "pdparams"] = "safetensors",
    shard_bytes: int = 4 << 30,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint; return its folder.

    With `tensor_parallel_size` > 1 the folder is pre-sharded (`rank0/`, `rank1/` ...): slices of
    the whole model of the same seed. `overrides` are further keys of config.json.
    """
    directory = Path(directory)
    config = tiny_config(
        kind,
        layers=layers,
        experts=experts,
        tied=tied,
        shared_experts=shared_experts,
        **overrides,
    )
    tensors = tiny_tensors(config, seed)
    if tensor_parallel_size > 1:
        _write_ranks(directory, config, tensors, tensor_parallel_size, shard_bytes)
    elif file_format == "pdparams":
        directory.mkdir(parents=True, exist_ok=True)
        _write_json(directory / "config.json", config)
        write_pdparams(directory / "model_state.pdparams", tensors)
    else:
        write_tensors(directory, config, tensors, shard_bytes)
    if tokenizer:
        for name in TOKENIZER_FILES:
            shutil.copyfile(demo_path() / name, directory / name)
    return directory


def write_tensors(
    directory: Path,
    config: Mapping[str, Any] | None,
    tensors: Tensors,
    shard_bytes: int = 4 << 30,
) -> None:
    """Write given tensors as safetensors, and config.json unless it is None."""
    with CheckpointWriter(directory, config, shard_bytes) as writer:
        for key, (array, dtype) in tensors.items():
            writer.add(key, array, dtype)


def write_pdparams(path: Path, tensors: Tensors, protocol: int = 4) -> None:
    """Write what `paddle.save` writes for a state dict: a pickle of name -> numpy array."""
    state: dict[str, Any] = {key: array for key, (array, _) in tensors.items()}
    state["StructuredToParameterName@@"] = {key: key.replace(".", "_") for key in tensors}
    with path.open("wb") as file:
        pickle.dump(state, file, protocol=protocol)


def _quantization(kind: Kind, config: Mapping[str, Any]) -> QuantizationConfig | None:
    last, first_moe = config["num_hidden_layers"] - 1, config["moe_layer_start_index"]
    if kind == "bf16":
        return None
    if kind in ("wint4", "wint8"):
        return QuantizationConfig(kind, "wint8", kind)
    end = first_moe if kind == "w4w2" else first_moe - 1
    # Random weights cannot tell their row order, so config.json does.
    return QuantizationConfig(
        w4_end_layer=end, w2_start_layer=end + 1, w2_end_layer=last, row_order="natural"
    )


def _random_ccq(module: str, k: int, n: int, random: np.random.Generator) -> Tensors:
    # Codes spread over the 15 bits, so fields have a deviation near 18; local scales average 8.
    super_scales = random.uniform(0.8, 1.2, n) / (18 * 8 * np.sqrt(k))
    return {
        f"{module}.quant_weight": (random.integers(0, 256, (k // 4, n), np.uint8), "U8"),
        f"{module}.weight_scale": (random.integers(0, 256, (k // 128, n), np.uint8), "U8"),
        f"{module}.super_scales": _bf16(super_scales),
        f"{module}.code_scale": (random.uniform(100, 127, n).astype(np.float32), "F32"),
        f"{module}.code_zp": (random.uniform(0, 300, n).astype(np.float32), "F32"),
    }


def _write_ranks(
    directory: Path, config: dict[str, Any], tensors: Tensors, size: int, shard_bytes: int
) -> None:
    whole = directory / "whole.tmp"
    write_tensors(whole, config, tensors)
    for rank in range(size):
        checkpoint = Checkpoint.open(whole, size, rank)
        write_tensors(
            directory / f"rank{rank}", None, _rank_tensors(checkpoint, tensors), shard_bytes
        )
    shutil.rmtree(whole)
    _write_json(directory / "config.json", config)


def _rank_tensors(checkpoint: Checkpoint, tensors: Tensors) -> Tensors:
    rank, size = checkpoint.rank, checkpoint.tensor_parallel_size
    share = checkpoint.config.vocab_size // size
    part = slice(rank * share, (rank + 1) * share)
    linears = {linear.module for linear in rank_linears(checkpoint)}
    result = {k: v for k, v in tensors.items() if k.rpartition(".")[0] not in linears}
    table, dtype = tensors["ernie.embed_tokens.weight"]
    result["ernie.embed_tokens.weight"] = (table[part], dtype)
    if "lm_head.weight" in tensors:
        result["lm_head.weight"] = (tensors["lm_head.weight"][0][:, part], dtype)
    for linear in rank_linears(checkpoint):
        for name, array in read_linear(checkpoint, linear).arrays.items():
            original, dtype = tensors[f"{linear.module}.{name}"]
            bits = float32_to_bfloat16(array) if dtype == "BF16" and array.dtype == "f4" else array
            result[f"{linear.module}.{name}"] = (bits.view(original.dtype), dtype)
    return result


def split_fused(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Return bf16 tensors with q/k/v and gate/up stored apart, as some exports have them."""
    result = dict(tensors)
    for linear in model_linears(ModelConfig.from_dict(config)):
        if not linear.parts:
            continue
        weight, dtype = result.pop(f"{linear.module}.weight")
        for (module, _), (start, stop) in zip(linear.parts, linear.column_ranges, strict=True):
            result[f"{module}.weight"] = (weight[:, start:stop], dtype)
    return result


def _bf16(values: Array) -> tuple[Array, str]:
    return float32_to_bfloat16(np.asarray(values, np.float32)), "BF16"


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
