"""A family that the package does not know, added from outside: config, names, model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_driver import make_runner
from tiny_model import Tensors, tiny_config, tiny_tensors, write_tensors

from fastdeploy_lite.model_executor.layers.attention import Attention
from fastdeploy_lite.model_executor.layers.embedding import Embedding, LogitsHead
from fastdeploy_lite.model_executor.layers.linear import GatedMLP
from fastdeploy_lite.model_executor.layers.moe import MoE, Router
from fastdeploy_lite.model_executor.layers.normalization import RMSNorm
from fastdeploy_lite.models import family as families
from fastdeploy_lite.models.family import ModelConfig, ModelFamily, PlainTensor
from fastdeploy_lite.models.linear import Linear
from fastdeploy_lite.models.registry import ModelRegistry
from fastdeploy_lite.models.sharding import Shard
from fastdeploy_lite.utils.json_fields import JsonFields

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 8192, 40)]


class BlockFamily(ModelFamily):
    """Other keys in config.json (GPT-2's habits), other names, experts in every block."""

    name = "blocks"
    architectures = ("BlockLM",)
    embedding_key = "wte.weight"
    head_key = "head.weight"

    def read_config(self, fields: JsonFields) -> ModelConfig:
        hidden, heads = fields.integer("n_embd"), fields.integer("n_head")
        return ModelConfig(
            hidden_size=hidden,
            num_hidden_layers=fields.integer("n_layer"),
            num_attention_heads=heads,
            num_key_value_heads=fields.integer("n_kv"),
            head_dim=64,
            intermediate_size=1,
            vocab_size=fields.integer("n_vocab"),
            tie_word_embeddings=True,
            moe_num_experts=fields.integer("n_expert"),
            moe_k=2,
            moe_intermediate_size=fields.integer("n_inner"),
            source=fields.source,
            raw=dict(fields.data),
        )

    def linears(self, config: ModelConfig, size: int = 1, rank: int = 0) -> Iterator[Linear]:
        shard = Shard(config, size, rank)
        for layer in range(config.num_hidden_layers):
            yield shard.qkv(f"h.{layer}.attn", layer)
            yield shard.o_proj(f"h.{layer}.attn", layer)
            for expert in range(config.moe_num_experts):
                prefix = f"h.{layer}.experts.{expert}"
                kind = config.expert_kind(layer)
                yield from shard.mlp(prefix, layer, config.moe_intermediate_size, kind, expert)

    def plain_tensors(self, config: ModelConfig, vocab_size: int) -> Iterator[PlainTensor]:
        hidden = config.hidden_size
        yield PlainTensor(self.embedding_key, ((vocab_size, hidden),))
        yield PlainTensor("ln_f.weight", ((hidden,),))
        for layer in range(config.num_hidden_layers):
            yield PlainTensor(f"h.{layer}.ln_1.weight", ((hidden,),))
            yield PlainTensor(f"h.{layer}.ln_2.weight", ((hidden,),))
            yield PlainTensor(f"h.{layer}.router.weight", ((hidden, config.moe_num_experts),))

    def router_keys(self, config: ModelConfig, layer: int) -> tuple[str, str | None]:
        return f"h.{layer}.router.weight", None

    def expert_module(self, layer: int, expert: int, name: str) -> str:
        return f"h.{layer}.experts.{expert}.{name}"

    def layer_of(self, key: str) -> int | None:
        parts = key.split(".")
        return int(parts[1]) if parts[0] == "h" else None


class BlockLM:
    family = BlockFamily()

    def __init__(self, config: ModelConfig, source: Any, cos_sin: Any, dtype: str) -> None:
        table = source.embedding()
        self.embedding = Embedding(table, dtype)
        self.blocks = []
        for i in source.layers(config.num_hidden_layers):
            norms = [RMSNorm(source.vector(f"h.{i}.ln_{n}.weight"), 1e-5) for n in (1, 2)]
            qkv, out = source.linear(f"h.{i}.attn.qkv_proj"), source.linear(f"h.{i}.attn.o_proj")
            attention = Attention(i, config.head_dim, qkv, out, cos_sin)
            experts = [source.experts(i, name) for name in ("up_gate_proj", "down_proj")]
            moe = MoE(Router(*source.router(i), config.moe_k), *experts, None)
            self.blocks.append((norms, attention, moe))
        self.norm = RMSNorm(source.vector("ln_f.weight"), 1e-5)
        self.head = LogitsHead(table)

    def __call__(self, batch: Any) -> Any:
        residual = self.embedding(batch.token_ids, batch.workspace)
        update = None
        for (first, second), attention, moe in self.blocks:
            x = (
                first(residual, batch.workspace)
                if update is None
                else first.after_adding(update, residual, batch.workspace)
            )
            x = second.after_adding(attention(x, batch), residual, batch.workspace)
            update, _ = moe(x, batch.workspace)  # no shared experts
        return self.norm.after_adding(update, residual, batch.workspace)

    def logits(self, hidden: Any, workspace: Any) -> Any:
        return self.head(hidden, workspace)

    def weights(self) -> dict[str, list[Any]]:
        mlp: list[GatedMLP] = []
        return {"embedding": [self.embedding.weight], "experts": [], "mlp": mlp}


def renamed(tensors: Tensors) -> Tensors:
    """The same numbers under the other family's names."""
    result = {}
    for name, value in tensors.items():
        key = name
        for old, new in (
            ("ernie.embed_tokens", "wte"),
            ("ernie.norm", "ln_f"),
            ("ernie.layers.", "h."),
            ("self_attn", "attn"),
            ("mlp.gate.", "router."),
            ("mlp.", ""),
            ("input_layernorm", "ln_1"),
            ("post_attention_layernorm", "ln_2"),
        ):
            key = key.replace(old, new)
        result[key] = value
    return result


@pytest.mark.parametrize("kind", ["bf16", "w4w2"])
def test_a_family_from_outside_runs_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setattr(families, "_registered", dict(families._registered))
    monkeypatch.setattr(ModelRegistry, "_classes", dict(ModelRegistry._classes))
    ModelRegistry.register_model_class(BlockLM)
    assert "BlockLM" in ModelRegistry.get_supported_archs()

    ernie = tiny_config(
        "bf16", moe_layer_start_index=0, shared_experts=0, moe_use_aux_free=False, layers=2
    )
    tensors = tiny_tensors(ernie, seed=2)
    write_tensors(tmp_path / "ernie", ernie, tensors)
    sizes = {"n_embd": 128, "n_head": 4, "n_kv": 2, "n_layer": 2, "n_vocab": 8192}
    blocks = {"architectures": ["BlockLM"], **sizes, "n_expert": 4, "n_inner": 256}
    write_tensors(tmp_path / "blocks", blocks, renamed(tensors))
    model = ModelConfig.from_dir(tmp_path / "blocks")
    if kind != "bf16":
        model = model.with_quantization("wint4")
        reference = ModelConfig.from_dir(tmp_path / "ernie").with_quantization("wint4")
    else:
        reference = ModelConfig.from_dir(tmp_path / "ernie")
    found = make_runner(tmp_path / "blocks", model=model)
    assert type(found.model) is BlockLM
    wanted = make_runner(tmp_path / "ernie", model=reference)
    np.testing.assert_array_equal(found.logits(IDS), wanted.logits(IDS))
    dummy = make_runner(tmp_path / "blocks", model=model, load=_dummy())
    assert np.isfinite(dummy.logits(IDS)).all()


def _dummy() -> Any:
    from fastdeploy_lite.config import LoadConfig

    return LoadConfig("dummy")
