"""The residual stream of calibration text, one decoder layer of the engine at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import device
from fastdeploy_lite.checkpoint import Checkpoint, inventory
from fastdeploy_lite.config import BLOCK_SIZE
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.backend import paddle
from fastdeploy_lite.model_executor.layers import linear as layers
from fastdeploy_lite.model_executor.layers.forward_batch import ForwardBatch
from fastdeploy_lite.model_executor.layers.moe import MoE
from fastdeploy_lite.model_executor.layers.rotary import cos_sin_table
from fastdeploy_lite.model_executor.weights import CheckpointSource
from fastdeploy_lite.model_executor.workspace import Workspace
from fastdeploy_lite.models.ernie4_5.model import DecoderLayer
from fastdeploy_lite.models.linear import Linear, Role
from fastdeploy_lite.quantization_config import WeightKind
from fastdeploy_lite.utils.arrays import Array, bfloat16_to_float32

ArrayF32 = npt.NDArray[np.float32]
See = Callable[[Role, ArrayF32], None]
"""Told what enters a linear that all tokens pass: its role in the layer, rows [T, K]."""
Made = Mapping[str, tuple[WeightKind, dict[str, Array]]]
"""Quantised linears by module: format and arrays in file layout."""


@dataclass(frozen=True)
class MlpInput:
    """What a layer's MLP is given and what its always-active part answers, for all tokens.

    Attributes:
        residual: [T, H], the stream after attention.
        x: [T, H], normalised: what enters router and experts.
        dense: [T, H], output of the dense MLP or of the shared experts; zeros where there is none.
        experts: int [T, k], chosen experts; k is 0 for a dense layer.
        weights: float32 [T, k], what the router weighs them with.
    """

    residual: ArrayF32
    x: ArrayF32
    dense: ArrayF32
    experts: npt.NDArray[np.int32]
    weights: ArrayF32


class _LayerSource(CheckpointSource):
    """Parameters of one layer: linears that were made in their format, others as in the files.

    Routed experts are left out: their products are taken one by one elsewhere.
    """

    def __init__(self, checkpoint: Checkpoint, place: Any, made: Made) -> None:
        super().__init__(checkpoint, place)
        self._made = made

    def experts(self, layer: int, name: str) -> Any:
        """Nothing."""
        return None

    def _kind(self, linear: Linear) -> WeightKind:
        return self._made[linear.module][0] if linear.module in self._made else "dense"

    def _converted(self, linear: Linear, arrays: dict[str, Array]) -> dict[str, Array]:
        return self._made[linear.module][1] if linear.module in self._made else arrays


class LayerRunner:
    """Runs attention, norms, router and dense MLP of single layers over windows of text."""

    def __init__(self, checkpoint: Checkpoint, lengths: Sequence[int]) -> None:
        """Choose the device.

        Args:
            checkpoint: the bf16 model.
            lengths: tokens of every window; the rows of a stream lie one window after another.
        """
        self.checkpoint, self.lengths = checkpoint, list(lengths)
        self.place = device.activate()
        self.dtype = device.activation_dtype(self.place)
        self._workspace = Workspace(self.place)
        config = checkpoint.config
        longest = max(self.lengths)
        table = cos_sin_table(longest, config.head_dim, config.rope_theta)
        self._cos_sin = ops.fix(paddle.to_tensor(table, place=self.place))
        blocks = -(-longest // BLOCK_SIZE)
        shape = [blocks, config.num_key_value_heads, BLOCK_SIZE, config.head_dim]
        cache = [paddle.zeros(shape, self.dtype, device=self.place) for _ in range(2)]
        self._caches = [(cache[0], cache[1])] * config.num_hidden_layers
        self._blocks = blocks

    def embed(self, token_ids: npt.NDArray[np.int32]) -> ArrayF32:
        """Rows of the embedding table, float32 [T, H]."""
        rows = np.asarray(inventory.read_embedding(self.checkpoint)[token_ids])
        return bfloat16_to_float32(rows) if rows.dtype == np.uint16 else rows.astype(np.float32)

    def enter_mlp(
        self, layer: int, stream: ArrayF32, made: Made, see: See | None = None
    ) -> MlpInput:
        """Run decoder layer `layer` up to its experts.

        Args:
            layer: number of the layer.
            stream: [n T, H], the residual stream before it; several of the same text may follow
                one another.
            made: linears of the layer that are quantised; others are taken from the files.
            see: told what enters attention's linears and those of the dense MLP or the shared
                experts, window by window.
        """
        source = _LayerSource(self.checkpoint, self.place, made)
        block = DecoderLayer(self.checkpoint.config, source, layer, self._cos_sin)
        if see is not None:
            _watch(block, see)
        parts = [self._window(block, stream[rows]) for rows in self._rows(len(stream))]
        residual, x, dense, experts, weights = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        self.checkpoint.release()
        return MlpInput(residual, x, dense, experts, weights)

    def _rows(self, count: int) -> Iterator[slice]:
        """Windows of `count` rows, those of the text over and over."""
        start = 0
        for length in itertools.cycle(self.lengths):
            if start == count:
                return
            yield slice(start, start + length)
            start += length

    def _window(self, block: DecoderLayer, stream: ArrayF32) -> tuple[Any, ...]:
        residual = paddle.to_tensor(np.ascontiguousarray(stream), place=self.place)
        residual = residual.astype(self.dtype)
        x = block.input_norm(residual, self._workspace)
        attended = block.attention(x, self._batch(len(stream)))
        x = block.post_attention_norm.after_adding(attended, residual, self._workspace)
        entered = _host(x)
        if not isinstance(block.mlp, MoE):
            none = np.zeros((len(stream), 0))
            dense = _host(block.mlp(x, self._workspace))
            return _host(residual), entered, dense, none.astype(np.int32), none.astype(np.float32)
        ids, weights = block.mlp.router(x, self._workspace)
        chosen = ops.download(ids).copy(), ops.download(weights).copy()
        shared = block.mlp.shared
        dense = np.zeros_like(entered) if shared is None else _host(shared(x, self._workspace))
        return _host(residual), entered, dense, *chosen

    def _batch(self, length: int) -> ForwardBatch:
        """One sequence from its first token; a slot is a position."""

        def tensor(values: Any) -> Any:
            return paddle.to_tensor(np.asarray(values, np.int32), place=self.place)

        positions = tensor(np.arange(length))
        return ForwardBatch(
            token_ids=positions,
            positions=positions,
            slot_mapping=positions,
            cu_seqlens_q=tensor([0, length]),
            context_lens=tensor([length]),
            block_tables=tensor(np.arange(self._blocks)[None]),
            kv_caches=self._caches,
            workspace=self._workspace,
        )


class _WatchedLinear(layers.Linear):
    """A linear that tells what enters it."""

    def __init__(self, linear: layers.Linear, see: Callable[[ArrayF32], None]) -> None:
        super().__init__(linear.weight, linear.name)
        self._see = see

    def __call__(self, x: Any, workspace: Workspace) -> Any:
        self._see(_host(x))
        return super().__call__(x, workspace)


def _watch(block: DecoderLayer, see: See) -> None:
    """Let the linears that all tokens pass tell what enters them."""
    attention = block.attention
    attention.qkv = _WatchedLinear(attention.qkv, partial(see, "qkv_proj"))
    attention.output = _WatchedLinear(attention.output, partial(see, "o_proj"))
    dense = block.mlp.shared if isinstance(block.mlp, MoE) else block.mlp
    if dense is not None:
        dense.up_gate = _WatchedLinear(dense.up_gate, partial(see, "up_gate_proj"))
        dense.down = _WatchedLinear(dense.down, partial(see, "down_proj"))


def _host(values: Any) -> ArrayF32:
    """A tensor's values as float32 of one's own."""
    found = ops.download(values)
    return bfloat16_to_float32(found) if found.dtype == np.uint16 else found.copy()
