"""Groups of config.json keys that families share, checked and converted.

Keys, defaults and rules follow FastDeploy's reader; docs/checkpoint_format.md lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fastdeploy_lite.quantization_config import QuantizationConfig
from fastdeploy_lite.utils.json_fields import JsonFields

# Bounds on what a configuration may ask for, far above any model: they keep a damaged file from
# turning into hours of work or a failed allocation.
MOST_LAYERS, MOST_EXPERTS, LARGEST_SIZE = 2048, 4096, 1 << 24


def id_or(fields: JsonFields, key: str, default: int) -> int:
    """Return a token id, or the default for an absent one."""
    value: int | None = fields.integer(key, None)
    return default if value is None else value


def weight_dtype(fields: JsonFields) -> str:
    """Return the type of unquantised weights, under FastDeploy's key or the older torch one."""
    key = "torch_dtype" if "dtype" not in fields.data and "torch_dtype" in fields.data else "dtype"
    return fields.one_of(key, "bfloat16", ("bfloat16", "float32"))


def quantization(fields: JsonFields) -> QuantizationConfig | None:
    """Return the formats that the files hold, None for unquantised ones."""
    data = fields.data.get("quantization_config")
    is_quantized = fields.boolean("is_quantized", False)
    if data is None:
        if is_quantized:
            fields.fail("quantization_config", None, "an object, because is_quantized is true")
        return None
    if not isinstance(data, Mapping):
        fields.fail("quantization_config", data, "an object")
    # Some files say it inside; like the key beside, it adds nothing to the object's presence.
    fields.section("quantization_config").boolean("is_quantized", True)
    # FastDeploy's rule: a config object alone marks quantised files, unless it only speaks of the
    # KV cache, which from_dict refuses.
    return QuantizationConfig.from_dict(data, fields.source)


def layers_without_tail(fields: JsonFields) -> tuple[int, int]:
    """Return the numbers of layers that run, and of those behind them that do not."""
    layers = cast(int, fields.integer("num_hidden_layers", minimum=1, maximum=MOST_LAYERS))
    tail = fields.data.get("remove_tail_layer", False)
    removed = int(tail) if isinstance(tail, bool) else tail
    if removed is None:
        removed = 0
    if not isinstance(removed, int) or not 0 <= removed < layers:
        fields.fail("remove_tail_layer", tail, f"a boolean or an integer in [0, {layers - 1}]")
    return layers - removed, removed


def attention_fields(fields: JsonFields, hidden: int) -> dict[str, Any]:
    """Return head counts and head size."""
    heads = fields.integer("num_attention_heads", minimum=1, maximum=LARGEST_SIZE)
    kv_heads = fields.integer("num_key_value_heads", -1, minimum=-1, maximum=heads)
    if kv_heads == -1:  # FastDeploy's default: every query head has its own
        kv_heads = heads
    if kv_heads == 0 or heads % kv_heads:
        fields.fail("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
    head_dim = fields.integer("head_dim", None, minimum=2, maximum=LARGEST_SIZE)
    head_dim = hidden // heads if head_dim is None else head_dim
    if head_dim < 2 or head_dim % 2:
        fields.fail("head_dim", head_dim, "an even number (RoPE turns pairs of features)")
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def moe_fields(fields: JsonFields, has_bias: bool) -> dict[str, Any]:
    """Return what describes routed experts; empty for a dense model.

    Args:
        fields: config.json.
        has_bias: whether routers have a selection bias where the file does not say.
    """
    experts = fields.integer("moe_num_experts", None, minimum=0, maximum=MOST_EXPERTS)
    if not experts:
        return {}
    top_k_key = "moe_topk" if "moe_k" not in fields.data and "moe_topk" in fields.data else "moe_k"
    start = fields.data.get("moe_layer_start_index", 0)
    if isinstance(start, list):
        fields.fail("moe_layer_start_index", start, "an integer (a list means a multimodal model)")
    return {
        "moe_num_experts": experts,
        "moe_k": fields.integer(top_k_key, min(8, experts), minimum=1, maximum=experts),
        "moe_intermediate_size": fields.integer(
            "moe_intermediate_size", minimum=1, maximum=LARGEST_SIZE
        ),
        "moe_num_shared_experts": fields.integer("moe_num_shared_experts", 0, maximum=1024),
        "moe_layer_start_index": fields.integer("moe_layer_start_index", 0),
        "moe_use_aux_free": fields.boolean("moe_use_aux_free", has_bias),
    }


def rope_theta(fields: JsonFields, default: float) -> float:
    """Return the base of the rotary embedding, wherever the file says it.

    Newer files of transformers put it into `rope_parameters`. ConfigError for two that differ, and
    for any scaling: it changes the angles, and nothing but plain RoPE is implemented.
    """
    theta = fields.number("rope_theta", None, minimum=1.0)
    for name in ("rope_parameters", "rope_scaling"):
        section = fields.section(name)
        inner = section.number("rope_theta", None, minimum=1.0)
        for key, value in section.data.items():
            allowed = {"rope_type": ("default", None), "type": ("default", None)}.get(
                key, (1.0, None)
            )
            if key != "rope_theta" and (isinstance(value, bool) or value not in allowed):
                section.fail(key, value, f"{allowed[0]!r} (only plain RoPE is implemented)")
        if inner is not None and theta is not None and inner != theta:
            section.fail("rope_theta", inner, f"{theta!r} as rope_theta beside it says")
        theta = inner if theta is None else theta
    return default if theta is None else float(theta)
