"""Names of the tensors of ERNIE-4.5, as Paddle files spell them and as Hugging Face files do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fastdeploy_lite.models.ernie4_5.config import read_config
from fastdeploy_lite.models.family import Location, ModelConfig, ModelFamily, PlainTensor, Shape
from fastdeploy_lite.models.linear import Linear
from fastdeploy_lite.models.sharding import Shard
from fastdeploy_lite.utils.json_fields import JsonFields

DRAFT_BLOCK = "ernie.mtp_block.0"
_PADDLE, _HUGGING_FACE = "ernie.", "model."
_LAYER = re.compile(r"ernie\.layers\.(\d+)\.")
_TURNED = re.compile(r"(layers|mtp_block)\.\d+\.(self_attn|mlp)\..*\.weight")
_STACKED = re.compile(r"(layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)")
_STACKED_NAMES = {"gate_up_proj": "up_gate_proj", "down_proj": "down_proj"}


class Ernie45(ModelFamily):
    """`Ernie4_5_MoeForCausalLM` and the dense `Ernie4_5ForCausalLM`."""

    name = "ernie4_5"
    architectures = ("Ernie4_5_MoeForCausalLM", "Ernie4_5ForCausalLM")
    embedding_key = "ernie.embed_tokens.weight"
    head_key = "lm_head.weight"
    model = "fastdeploy_lite.models.ernie4_5.model:Ernie4_5_MoeForCausalLM"
    draft_model = "fastdeploy_lite.models.ernie4_5.draft:Ernie4_5_MTP"

    def read_config(self, fields: JsonFields) -> ModelConfig:
        """See ModelFamily."""
        return read_config(fields)

    def linears(self, config: ModelConfig, size: int = 1, rank: int = 0) -> Iterator[Linear]:
        """See ModelFamily."""
        shard = Shard(config, size, rank)
        for layer in range(config.num_hidden_layers):
            prefix = f"ernie.layers.{layer}"
            yield shard.qkv(f"{prefix}.self_attn", layer)
            yield shard.o_proj(f"{prefix}.self_attn", layer)
            prefix = f"{prefix}.mlp"
            if not config.is_moe_layer(layer):
                yield from shard.mlp(prefix, layer, config.intermediate_size, config.linear_kind)
                continue
            kind, width = config.expert_kind(layer), config.moe_intermediate_size
            for expert in range(config.moe_num_experts):
                yield from shard.mlp(f"{prefix}.experts.{expert}", layer, width, kind, expert)
            if config.shared_intermediate_size:
                width = config.shared_intermediate_size
                yield from shard.mlp(f"{prefix}.shared_experts", layer, width, config.linear_kind)

    def draft_linears(self, config: ModelConfig, size: int = 1, rank: int = 0) -> Iterator[Linear]:
        """See ModelFamily: a block with a dense MLP, never quantised."""
        shard, prefix, layer = Shard(config, size, rank), DRAFT_BLOCK, config.num_hidden_layers
        attention = f"{prefix}.self_attn"
        mlp = shard.mlp(f"{prefix}.mlp", layer, config.intermediate_size, "dense")
        for linear in (shard.qkv(attention, layer), shard.o_proj(attention, layer), *mlp):
            yield replace(linear, kind="dense")

    def plain_tensors(self, config: ModelConfig, vocab_size: int) -> Iterator[PlainTensor]:
        """See ModelFamily."""
        hidden, experts = config.hidden_size, config.moe_num_experts
        yield PlainTensor(self.embedding_key, ((vocab_size, hidden),))
        yield PlainTensor("ernie.norm.weight", ((hidden,),))
        yield PlainTensor(self.head_key, ((hidden, vocab_size), (vocab_size, hidden)))
        for layer in range(config.num_hidden_layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield PlainTensor(f"ernie.layers.{layer}.{name}.weight", ((hidden,),))
            if config.is_moe_layer(layer):
                gate, bias = self.router_keys(config, layer)
                yield PlainTensor(gate, ((hidden, experts),))
                if bias is not None:
                    yield PlainTensor(bias, ((1, experts), (experts,)))

    def router_keys(self, config: ModelConfig, layer: int) -> tuple[str, str | None]:
        """See ModelFamily."""
        prefix = f"ernie.layers.{layer}.mlp"
        bias = f"{prefix}.moe_statics.e_score_correction_bias" if config.moe_use_aux_free else None
        return f"{prefix}.gate.weight", bias

    def expert_module(self, layer: int, expert: int, name: str) -> str:
        """See ModelFamily."""
        return f"ernie.layers.{layer}.mlp.experts.{expert}.{name}"

    def layer_of(self, key: str) -> int | None:
        """See ModelFamily."""
        match = _LAYER.match(key)
        return None if match is None else int(match[1])

    def locate(self, shapes: Mapping[str, Shape]) -> dict[str, Location] | None:
        """See ModelFamily: Hugging Face files keep linears and routers as [out, in]."""
        if _is_paddle(shapes):
            return None
        found: dict[str, Location] = {}
        for key, shape in shapes.items():
            if not key.startswith(_HUGGING_FACE):
                found[key] = Location(key, transposed=key == self.head_key and len(shape) == 2)
                continue
            rest = key.removeprefix(_HUGGING_FACE)
            stack = _STACKED.fullmatch(rest)
            if stack is not None and len(shape) == 3:
                found |= {
                    f"{_PADDLE}{stack[1]}.{expert}.{_STACKED_NAMES[stack[2]]}.weight": Location(
                        key, expert, transposed=True
                    )
                    for expert in range(min(shape[0], 1 << 16))
                }
                continue
            turned = _TURNED.fullmatch(rest) is not None and len(shape) == 2
            rest = rest.replace(".mlp.gate.moe_statics.", ".mlp.moe_statics.")
            found[_PADDLE + rest] = Location(key, transposed=turned)
        return found

    def spelling(self, keys: Mapping[str, Shape]) -> str:
        """See ModelFamily."""
        return "Paddle names" if _is_paddle(keys) else "Hugging Face names"

    def convert_config(self, config: ModelConfig) -> dict[str, Any]:
        """See ModelFamily: FastDeploy takes `dtype` for the mark of its own layout."""
        raw = dict(config.raw)
        for key in ("torch_dtype", "transformers_version", "rope_parameters", "rope_scaling"):
            raw.pop(key, None)
        if raw != dict(config.raw):
            raw |= {
                "dtype": config.dtype,
                "rope_theta": config.rope_theta,
                "moe_use_aux_free": config.moe_use_aux_free,
            }
        return raw


def _is_paddle(keys: Mapping[str, Shape]) -> bool:
    """Whether names begin as Paddle's do; a folder with both is read as Paddle's."""
    return any(key.startswith(_PADDLE) for key in keys) or not any(
        key.startswith(_HUGGING_FACE) for key in keys
    )
