"""Grouped-query attention over the paged KV cache."""

from __future__ import annotations

from typing import Any

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.layers.forward_batch import ForwardBatch
from fastdeploy_lite.model_executor.layers.linear import Linear
from fastdeploy_lite.model_executor.ops import Weight


class Attention:
    """Fused QKV projection, RoPE, causal attention, output projection."""

    def __init__(
        self, layer: int, head_dim: int, qkv: Weight, output: Weight, cos_sin: Any
    ) -> None:
        """Args: layer: index of its KV cache; cos_sin: float32 [max positions, head_dim]."""
        self.layer = layer
        self.qkv = Linear(qkv, "qkv")
        self.output = Linear(output, "attention_output")
        self.cos_sin = cos_sin
        self.scale = head_dim**-0.5

    def __call__(self, x: Any, batch: ForwardBatch) -> Any:
        """Return [T, H] for the normalised x [T, H]; writes this step's keys and values."""
        workspace = batch.workspace
        qkv = self.qkv(x, workspace)
        shape = [qkv.shape[0], self.output.weight.in_features]
        mixed = workspace.get("attention", shape, qkv.dtype)
        caches = batch.kv_caches[self.layer]
        fresh = (batch.positions, self.cos_sin, batch.slot_mapping, *caches)
        sequences = (batch.block_tables, batch.cu_seqlens_q, batch.context_lens)
        if batch.decode_only:
            ops.decode_attention(qkv, *fresh, *sequences, self.scale, mixed)
        else:
            query = workspace.get("query", shape, qkv.dtype)
            ops.rope_and_cache(qkv, *fresh, query)
            ops.paged_attention(query, *caches, *sequences, self.scale, mixed)
        return self.output(mixed, workspace)
