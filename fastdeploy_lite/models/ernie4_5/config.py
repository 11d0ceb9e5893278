"""config.json of ERNIE-4.5 text models, as FastDeploy or as transformers write it.

Keys, defaults and rules follow FastDeploy's reader; docs/checkpoint_format.md lists them.
"""

from __future__ import annotations

from fastdeploy_lite.models import config_fields as keys
from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.utils.errors import ConfigError, quote
from fastdeploy_lite.utils.json_fields import JsonFields

# Keys whose other values change the arithmetic; a model that has them would run and be wrong.
_ONLY_VALUES: dict[str, tuple[object, ...]] = {
    "compression_ratio": (1.0, None),
    "hidden_act": ("silu",),
    "moe_gate_act": ("softmax", None),
    "moe_layer_interval": (1, None),
    "partial_rotary_factor": (1.0, None),
    "sliding_window": (None,),
    "use_rmsnorm": (True, None),
}
_THETA, _TRANSFORMERS_THETA = 10000.0, 500000.0


def read_config(fields: JsonFields) -> ModelConfig:
    """Check and convert the keys; ConfigError names file, key, value and expectation."""
    _check_semantics(fields)
    quantization = keys.quantization(fields)
    hidden = fields.integer("hidden_size", minimum=1, maximum=keys.LARGEST_SIZE)
    # What transformers leaves out has its defaults, not FastDeploy's: its routers have a bias.
    is_transformers = "transformers_version" in fields.data
    theta = _TRANSFORMERS_THETA if is_transformers else _THETA
    layers, removed = keys.layers_without_tail(fields)
    _check_end_index(fields, layers)
    return ModelConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        removed_layers=removed,
        **keys.attention_fields(fields, hidden),
        intermediate_size=fields.integer("intermediate_size", minimum=1, maximum=keys.LARGEST_SIZE),
        vocab_size=fields.integer("vocab_size", minimum=1, maximum=keys.LARGEST_SIZE),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-5, minimum=0.0, maximum=1.0),
        rope_theta=keys.rope_theta(fields, theta),
        max_position_embeddings=fields.integer("max_position_embeddings", 512, minimum=1),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        **keys.moe_fields(fields, has_bias=is_transformers),
        is_quantized=quantization is not None,
        quantization=quantization,
        dtype=keys.weight_dtype(fields),
        bos_token_id=keys.id_or(fields, "bos_token_id", 1),
        eos_token_id=fields.token_ids("eos_token_id", (2,)),
        pad_token_id=keys.id_or(fields, "pad_token_id", 0),
        source=fields.source,
        raw=dict(fields.data),
    )


def _check_semantics(fields: JsonFields) -> None:
    experts = fields.data.get("moe_num_experts")
    if isinstance(experts, list):
        raise ConfigError(
            f"{fields.source}: moe_num_experts: found {quote(experts)}: a list of expert counts"
            " means a multimodal model, which is not supported; use a text-only model"
        )
    for key, allowed in _ONLY_VALUES.items():
        value = fields.data.get(key, allowed[0])
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            if value is None and None in allowed:
                continue
            fields.fail(key, value, f"{allowed[0]!r} (nothing else is implemented)")


def _check_end_index(fields: JsonFields, layers: int) -> None:
    """Refuse dense layers after the MoE ones; -1 means the last layer."""
    end = fields.data.get("moe_layer_end_index")
    if isinstance(end, list):
        fields.fail("moe_layer_end_index", end, "an integer (a list means a multimodal model)")
    end = fields.integer("moe_layer_end_index", None, minimum=-1)
    if end is not None and end != -1 and end < layers - 1 and fields.data.get("moe_num_experts"):
        fields.fail("moe_layer_end_index", end, f"{layers - 1}, the last layer, or -1")
