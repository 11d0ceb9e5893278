"""A quantised model whose scales and norm gains can be learnt: decoder layers with gradients.

The engine's ops know no gradients, so the layers are stated here once more, in float32 tensors of
Paddle. Every column of a linear and every channel of a norm has one parameter g, and counts
1 + g times: y = x W diag(1 + g). At g = 0 the model is the one in the files; folding 1 + g into the
scales of the columns and into the norms makes a file of what was learnt.

One layer is in memory at a time. Its input is kept on the way forward; on the way back the layer is
run again from it with gradients. Which experts a token goes to is decided by the model as it
stands and has no gradient; the weights that the router gives them have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import formats
from fastdeploy_lite.calibration.gradients import RotaryAttention, ScaledProduct, host, tensor_of
from fastdeploy_lite.checkpoint import Checkpoint, inventory
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.formats.ccq import to_true_order
from fastdeploy_lite.model_executor.backend import paddle
from fastdeploy_lite.model_executor.layers.rotary import cos_sin_table
from fastdeploy_lite.models.linear import Linear
from fastdeploy_lite.utils.arrays import bfloat16_to_float32

ArrayF32 = npt.NDArray[np.float32]
Key = tuple[str, int | None]
HELD_BYTES = 2 << 30
"""A model whose linears take less than this in float32 is decoded once, a larger one every time."""


@dataclass(frozen=True)
class _Layer:
    """Constants of a layer: matrices [K, N] by role and expert, norms, router."""

    linears: dict[Key, ArrayF32]
    norms: tuple[Any, Any]
    router: Any | None
    bias: ArrayF32 | None


class TrainableModel:
    """Decoder layers of a checkpoint; `gains` are the parameters by module and norm key."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read names and sizes; matrices are read when a layer runs."""
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self._linears: dict[int, dict[Key, Linear]] = {}
        for linear in model_linears(self.config):
            layer = self._linears.setdefault(linear.layer, {})
            layer[linear.role, linear.expert] = linear
        self._norm_keys = norm_keys(checkpoint)
        hidden = self.config.hidden_size
        self.gains = {key: _zeros(hidden) for keys in self._norm_keys.values() for key in keys}
        for linears in self._linears.values():
            for linear in linears.values():
                self.gains[linear.module] = _zeros(linear.out_features)
        table = cos_sin_table(
            self.config.max_position_embeddings, self.config.head_dim, self.config.rope_theta
        )
        cos, sin = np.split(table, 2, axis=1)
        self._turns = cos + np.complex64(1j) * sin
        (final,) = self._norm_keys[-1]
        self._final_norm = self._vector(final)
        self.head = self._read_head()
        weights = sum(
            linear.in_features * linear.out_features
            for linears in self._linears.values()
            for linear in linears.values()
        )
        self._held: dict[int, _Layer] | None = {} if 4 * weights <= HELD_BYTES else None

    @property
    def layers(self) -> range:
        """Numbers of the decoder layers."""
        return range(self.config.num_hidden_layers)

    def embed(self, token_ids: npt.NDArray[np.int32]) -> Any:
        """Rows of the embedding table, float32 [..., H]."""
        return paddle.to_tensor(_floats(inventory.read_embedding(self.checkpoint)[token_ids]))

    def enter_head(self, stream: Any, learnt: bool = True) -> Any:
        """The residual stream [..., H] behind the last layer as `head` takes it.

        `learnt` False leaves the gain of the last norm out.
        """
        (final,) = self._norm_keys[-1]
        return self._norm(stream, self._final_norm, final if learnt else None)

    def logits(self, stream: ArrayF32) -> ArrayF32:
        """Logits [T, V] of the residual stream [T, H] behind the last layer."""
        with paddle.no_grad():
            found: ArrayF32 = host(self.enter_head(tensor_of(stream))) @ self.head
        return found

    def run(self, layer: int, stream: Any) -> Any:
        """The residual stream [B, T, H] behind decoder layer `layer`, given that before it."""
        constants, keys = self._constants(layer), self._norm_keys[layer]
        x = self._norm(stream, constants.norms[0], keys[0])
        stream = stream + self._attention(constants, layer, x)
        x = self._norm(stream, constants.norms[1], keys[1])
        flat = x.reshape([-1, x.shape[-1]])
        out = self._mixture(constants, layer, flat)
        if ("up_gate_proj", None) in constants.linears:
            out = out + self._mlp(constants, layer, None, flat)
        return stream + out.reshape(stream.shape)

    def _norm(self, x: Any, weight: Any, key: str | None) -> Any:
        scale = paddle.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * (weight if key is None else weight * (1 + self.gains[key]))

    def _linear(self, constants: _Layer, layer: int, key: Key, x: Any) -> Any:
        gain = self.gains[self._linears[layer][key].module]
        return ScaledProduct.apply(x, gain, constants.linears[key])

    def _mlp(self, constants: _Layer, layer: int, expert: int | None, x: Any) -> Any:
        gate, up = self._linear(constants, layer, ("up_gate_proj", expert), x).chunk(2, -1)
        return self._linear(
            constants, layer, ("down_proj", expert), paddle.nn.functional.silu(gate) * up
        )

    def _attention(self, constants: _Layer, layer: int, x: Any) -> Any:
        heads, shared = self.config.num_attention_heads, self.config.num_key_value_heads
        both = self._linear(constants, layer, ("qkv_proj", None), x)
        found = RotaryAttention.apply(both, heads, shared, self._turns[: x.shape[1]])
        return self._linear(constants, layer, ("o_proj", None), found)

    def _mixture(self, constants: _Layer, layer: int, x: Any) -> Any:
        """Weighted sum of the routed experts' outputs for x [T, H]; zeros without experts."""
        if constants.router is None:
            return paddle.zeros_like(x)
        probability = paddle.nn.functional.softmax(paddle.matmul(x, constants.router), -1)
        chosen = _choose(probability.numpy(), constants.bias, self.config.moe_k)
        weight = paddle.take_along_axis(probability, paddle.to_tensor(chosen), 1)
        weight = weight / weight.sum(1, keepdim=True)
        flat = chosen.reshape(-1)
        order = np.argsort(flat, kind="stable")
        bounds = np.searchsorted(flat[order], np.arange(self.config.moe_num_experts + 1))
        outputs = []
        for expert in range(self.config.moe_num_experts):
            rows = order[bounds[expert] : bounds[expert + 1]] // chosen.shape[1]
            if len(rows):
                part = paddle.gather(x, paddle.to_tensor(rows))
                outputs.append(self._mlp(constants, layer, expert, part))
        back = paddle.to_tensor(np.argsort(order, kind="stable"))
        found = paddle.gather(paddle.concat(outputs), back)
        return (found.reshape([*chosen.shape, -1]) * weight.unsqueeze(-1)).sum(1)

    def _constants(self, layer: int) -> _Layer:
        if self._held is not None and layer in self._held:
            return self._held[layer]
        linears = {
            key: decoded(self.checkpoint, linear) for key, linear in self._linears[layer].items()
        }
        first, second = (self._vector(key) for key in self._norm_keys[layer])
        router: Any | None = None
        bias: ArrayF32 | None = None
        if self.config.is_moe_layer(layer):
            gate, bias = inventory.read_router(self.checkpoint, layer)
            router = paddle.to_tensor(gate)
        self.checkpoint.release()
        found = _Layer(linears, (first, second), router, bias)
        if self._held is not None:
            self._held[layer] = found
        return found

    def _vector(self, key: str) -> Any:
        values = inventory.read_vector(self.checkpoint, key, self.config.hidden_size)
        return paddle.to_tensor(values)

    def _read_head(self) -> ArrayF32:
        """Head [H, V]."""
        own = inventory.read_lm_head(self.checkpoint)
        if own is None:
            return np.ascontiguousarray(_floats(inventory.read_embedding(self.checkpoint)).T)
        array, transposed = own
        values = _floats(array)
        return np.ascontiguousarray(values.T if transposed else values)


def norm_keys(checkpoint: Checkpoint) -> dict[int, list[str]]:
    """Keys of the norms by layer, in the order of the model; -1 is the last norm."""
    config = checkpoint.config
    found: dict[int, list[str]] = {}
    for tensor in config.family.plain_tensors(config, config.vocab_size):
        if tensor.shapes == ((config.hidden_size,),):
            layer = config.family.layer_of(tensor.key)
            found.setdefault(-1 if layer is None else layer, []).append(tensor.key)
    return found


def decoded(checkpoint: Checkpoint, linear: Linear) -> ArrayF32:
    """What readers decode of a linear, float32 [K, N], rows in true order."""
    read = inventory.read_linear(checkpoint, linear)
    if read.kind == "dense":
        return np.ascontiguousarray(_floats(read.arrays["weight"]))
    matrix = formats.get(read.kind).decode(read.arrays)
    if read.kind == "ccq":
        quantization = checkpoint.config.quantization
        order = None if quantization is None else quantization.row_order
        matrix = to_true_order(matrix, order or "natural")
    return np.ascontiguousarray(matrix)


def _choose(probability: ArrayF32, bias: ArrayF32 | None, count: int) -> npt.NDArray[np.int64]:
    """The `count` experts of each token with the largest probability plus bias."""
    score = probability if bias is None else probability + bias
    return np.argsort(-score, axis=1, kind="stable")[:, :count].astype(np.int64)


def _zeros(size: int) -> Any:
    return paddle.zeros([size], "float32").detach()


def _floats(array: npt.NDArray[Any]) -> ArrayF32:
    found = bfloat16_to_float32(array) if array.dtype == np.uint16 else array
    return np.asarray(found, np.float32)
