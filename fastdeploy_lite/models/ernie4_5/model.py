"""ERNIE-4.5 text models: a pre-norm decoder with grouped-query attention and a mixture of experts.

h = embed(ids); per layer h += Attention(RMSNorm(h)), h += MLP(RMSNorm(h)); logits = RMSNorm(h) Wh.
The first `moe_layer_start_index` layers have a dense MLP, the others routed and shared experts.
"""

from __future__ import annotations

from typing import Any

from fastdeploy_lite.distributed.communicator import Communicator
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.layers.attention import Attention
from fastdeploy_lite.model_executor.layers.embedding import Embedding, LogitsHead
from fastdeploy_lite.model_executor.layers.forward_batch import ForwardBatch
from fastdeploy_lite.model_executor.layers.linear import GatedMLP
from fastdeploy_lite.model_executor.layers.moe import MoE, Router
from fastdeploy_lite.model_executor.layers.normalization import RMSNorm
from fastdeploy_lite.model_executor.layers.parameters import ParameterSource
from fastdeploy_lite.model_executor.ops import ExpertWeight
from fastdeploy_lite.model_executor.workspace import Workspace
from fastdeploy_lite.models.ernie4_5 import FAMILY
from fastdeploy_lite.models.family import ModelConfig


def gated_mlp(source: ParameterSource, prefix: str) -> GatedMLP:
    """Build the SwiGLU block whose keys begin with `prefix`."""
    return GatedMLP(source.linear(f"{prefix}.up_gate_proj"), source.linear(f"{prefix}.down_proj"))


def mixture(config: ModelConfig, source: ParameterSource, layer: int) -> MoE:
    """Build the routed and shared experts of one layer."""
    router = Router(*source.router(layer), config.moe_k)
    up_gate = source.experts(layer, "up_gate_proj")
    down = source.experts(layer, "down_proj")
    shared = None
    if config.moe_num_shared_experts:
        shared = gated_mlp(source, f"ernie.layers.{layer}.mlp.shared_experts")
    return MoE(router, up_gate, down, shared)


Update = tuple[Any, Any | None]
"""What a layer adds to the residual stream, in one or two parts of [T, H]."""


class DecoderLayer:
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        source: ParameterSource,
        layer: int,
        cos_sin: Any,
        block: str | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        """Load the parameters of decoder layer `layer`, or of a dense block of another name."""
        self.communicator = communicator
        prefix, eps = block or f"ernie.layers.{layer}", config.rms_norm_eps
        self.input_norm = RMSNorm(source.vector(f"{prefix}.input_layernorm.weight"), eps)
        self.attention = Attention(
            layer,
            config.head_dim,
            source.linear(f"{prefix}.self_attn.qkv_proj"),
            source.linear(f"{prefix}.self_attn.o_proj"),
            cos_sin,
        )
        self.post_attention_norm = RMSNorm(
            source.vector(f"{prefix}.post_attention_layernorm.weight"), eps
        )
        self.mlp: MoE | GatedMLP
        if block is None and config.is_moe_layer(layer):
            self.mlp = mixture(config, source, layer)
        else:
            self.mlp = gated_mlp(source, f"{prefix}.mlp")

    def __call__(self, update: Update | None, residual: Any, batch: ForwardBatch) -> Update:
        """Add `update` to `residual` in place, run the layer, return the next update."""
        workspace = batch.workspace
        if update is None:
            x = self.input_norm(residual, workspace)
        else:
            x = self.input_norm.after_adding(update[0], residual, workspace, update[1])
        attended, _ = self._of_all_ranks((self.attention(x, batch), None))
        x = self.post_attention_norm.after_adding(attended, residual, workspace)
        if isinstance(self.mlp, MoE):
            return self._of_all_ranks(self.mlp(x, workspace))
        return self._of_all_ranks((self.mlp(x, workspace), None))

    def _of_all_ranks(self, update: Update) -> Update:
        """What all ranks' rows of the last matrix make together."""
        if self.communicator is None:
            return update
        total, other = update
        if other is not None:
            ops.add_inplace(total, other)
        self.communicator.all_reduce(total)
        return total, None


class Ernie4_5_MoeForCausalLM:  # noqa: N801 - the architecture's name in config.json
    """The whole model of one tensor-parallel rank.

    Attributes:
        family: how its files are read.
        is_replayable: between its ops nothing looks at the tensors, so that on a CPU their calls
            alone may repeat a step; a class that is derived from this one says so anew.
    """

    family = FAMILY
    is_replayable = True

    def __init__(
        self,
        config: ModelConfig,
        source: ParameterSource,
        cos_sin: Any,
        dtype: str,
        communicator: Communicator | None = None,
    ) -> None:
        """Load all parameters from `source`.

        Args:
            config: architecture.
            source: parameters in model order.
            cos_sin: float32 [max positions, head_dim], see layers.rotary.
            dtype: Paddle dtype name of activations.
            communicator: to the other ranks, None where there are none.
        """
        self.config = config
        self.communicator = communicator
        table = source.embedding()
        self.embedding = Embedding(table, dtype, communicator)
        self.layers = [
            DecoderLayer(config, source, layer, cos_sin, communicator=communicator)
            for layer in source.layers(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(source.vector("ernie.norm.weight"), config.rms_norm_eps)
        self.head = LogitsHead(source.head() or table, communicator)

    def __call__(self, batch: ForwardBatch) -> Any:
        """Return the normalised hidden states [T, H] of a step."""
        residual = self.embedding(batch.token_ids, batch.workspace)
        update: Update = self.layers[0](None, residual, batch)
        for layer in self.layers[1:]:
            update = layer(update, residual, batch)
        return self.norm.after_adding(update[0], residual, batch.workspace, update[1])

    def logits(self, hidden: Any, workspace: Workspace) -> Any:
        """Return float32 logits [R, V] of hidden states [R, H]."""
        return self.head(hidden, workspace)

    def own_logits(self, hidden: Any, workspace: Workspace) -> Any:
        """Return this rank's share of them, [R, V / ranks]."""
        return self.head.own(hidden, workspace)

    def weights(self) -> dict[str, list[ExpertWeight]]:
        """Return all matrices by role: embedding, head, attention, mlp, experts."""
        found: dict[str, list[ExpertWeight]] = {
            "embedding": [self.embedding.weight],
            "head": [] if self.head.weight is self.embedding.weight else [self.head.weight],
            "attention": [],
            "mlp": [],
            "experts": [],
        }
        for layer in self.layers:
            found["attention"] += [layer.attention.qkv.weight, layer.attention.output.weight]
            dense = layer.mlp.shared if isinstance(layer.mlp, MoE) else layer.mlp
            if dense is not None:
                found["mlp"] += [dense.up_gate.weight, dense.down.weight]
            if isinstance(layer.mlp, MoE):
                experts = (layer.mlp.up_gate, layer.mlp.down)
                found["experts"] += [weight for weight in experts if weight is not None]
        return found
