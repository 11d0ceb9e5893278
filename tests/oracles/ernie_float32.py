"""A plain numpy forward pass of Ernie4_5_MoeForCausalLM, straight from checkpoint files.

The reference that the product is judged by: it shares no code with it. Files are parsed here,
packed weights are dequantised by the element formulas of docs/checkpoint_format.md, and a whole
sequence is computed at once without cache, paging or chunks. Sums that are cheap (norms, softmax)
run in float64; matrix products run in `dtype`, float32 by default.
"""

from __future__ import annotations

import functools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_DTYPES = {"BF16": np.uint16, "F32": np.float32, "U8": np.uint8, "I8": np.uint8}


class Files:
    """Tensors of a safetensors folder by key; int8 data is viewed as unsigned bytes."""

    def __init__(self, folder: Path) -> None:
        self._found: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            self._found |= {key: (file, 8 + length, entry) for key, entry in header.items()}

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def raw(self, key: str) -> Array:
        """The stored array, bf16 as its uint16 bits."""
        file, base, entry = self._found[key]
        begin, end = entry["data_offsets"]
        with file.open("rb") as stream:
            stream.seek(base + begin)
            data = np.frombuffer(stream.read(end - begin), _DTYPES[entry["dtype"]])
        return data.reshape(entry["shape"])

    def floats(self, key: str) -> Array:
        """The stored floating-point array as float32."""
        data = self.raw(key)
        if data.dtype == np.uint16:
            return (data.astype(np.uint32) << 16).view(np.float32)
        return data


def unpack_int8(stored: Array, scale: Array, k: int, n: int) -> Array:
    """W [k, n] from the nominal [n, k] bytes: position formula of "int8 linears", one by one."""
    row, col = np.arange(k)[:, None], np.arange(n)[None, :]
    position = (
        ((col // 2) * (k // 64) + row // 64) * 128
        + (col % 2) * 64
        + ((row % 64) // 16) * 16
        + 2 * (row % 8)
        + (row % 16) // 8
    )
    return (stored.reshape(-1)[position].astype(np.float32) - 128) * scale


def unpack_int4(stored: Array, scale: Array, k: int, n: int) -> Array:
    """W [k, n] from the nominal [n / 2, k] bytes: nibble formula of "int4 experts"."""
    row, col = np.arange(k)[:, None], np.arange(n)[None, :]
    nibble = (
        ((col // 4) * (k // 64) + row // 64) * 256
        + (col % 4) * 64
        + ((row % 64) // 32) * 32
        + 4 * (row % 8)
        + (row % 32) // 8
    )
    byte = stored.reshape(-1)[nibble // 2]
    value = np.where(nibble % 2 == 0, byte & 15, byte >> 4)
    return (value.astype(np.float32) - 8) * scale


def unpack_ccq(
    stored: Array, local: Array, super_scale: Array, code_scale: Array, code_zp: Array
) -> Array:
    """W [K, N] of "2-bit experts", one row of a byte at a time.

    float64 holds byte * code_scale exactly (8 + 24 bits), and the sum too unless the addends'
    exponents are more than 20 apart, which no trained checkpoint has; adversarial values are the
    business of the tests of quantization/ccq.py.
    """
    offset = code_zp + np.float32(0.5)
    exact = stored.astype(np.float64) * code_scale.astype(np.float64) + offset.astype(np.float64)
    code = np.floor(exact.astype(np.float32)).astype(np.int64)
    weight = np.empty((stored.shape[0] * 4, stored.shape[1]), np.float32)
    for row in range(weight.shape[0]):
        group = row // 64
        shift = 4 if group % 2 == 0 else 0
        scale = (local[group // 2] >> shift) & 15
        field = ((code[row // 4] >> (9 - 3 * (row % 4))) & 63) - 32
        weight[row] = (field * scale).astype(np.float32) * super_scale
    return weight


class ErnieFloat32:
    """The model of one folder; `logits(ids)` is float32 [T, V] for a sequence from position 0.

    After a run `margin` [T] holds, per token, the smallest distance in any layer between the router
    score of the last expert chosen and of the first one not chosen. Where it is within rounding
    (below 1e-6) another implementation may rightly choose the other one, and then this token and
    those that attend to it differ by more than rounding.
    """

    def __init__(self, folder: str | Path, dtype: Any = np.float32) -> None:
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.files = Files(folder)
        self.dtype = dtype
        self.margin: Array = np.empty(0)
        self._weights: dict[str, Array] = {}

    def weight(self, module: str, k: int, n: int) -> Array:
        """Matrix [k, n] of a linear in whatever form the files hold it, cached."""
        if module not in self._weights:
            self._weights[module] = self._read(module, k, n).astype(self.dtype)
        return self._weights[module]

    def _read(self, module: str, k: int, n: int) -> Array:
        if f"{module}.weight" in self.files:
            return self.files.floats(f"{module}.weight").reshape(k, n)
        stored = self.files.raw(f"{module}.quant_weight")
        if f"{module}.super_scales" in self.files:
            return unpack_ccq(
                stored,
                self.files.raw(f"{module}.weight_scale"),
                self.files.floats(f"{module}.super_scales"),
                self.files.floats(f"{module}.code_scale"),
                self.files.floats(f"{module}.code_zp"),
            )
        scale = self.files.floats(f"{module}.weight_scale")
        unpack = unpack_int8 if stored.size == k * n else unpack_int4
        return unpack(stored, scale, k, n)

    def logits(self, token_ids: list[int]) -> Array:
        """Next-token logits after every token."""
        hidden = self.hidden(token_ids)
        return (hidden.astype(self.dtype) @ self._head()).astype(np.float32)

    def hidden(self, token_ids: list[int]) -> Array:
        """Final-norm output [T, H]."""
        config = self.config
        self.margin = np.full(len(token_ids), np.inf)
        x = self.files.floats("ernie.embed_tokens.weight")[token_ids].astype(self.dtype)
        for layer in range(config["num_hidden_layers"]):
            prefix = f"ernie.layers.{layer}"
            x = x + self._attention(self._norm(x, f"{prefix}.input_layernorm"), prefix)
            normed = self._norm(x, f"{prefix}.post_attention_layernorm")
            x = x + self._feed_forward(normed, layer, f"{prefix}.mlp")
        return self._norm(x, "ernie.norm")

    @functools.cache  # noqa: B019 - the model lives as long as the test
    def _head(self) -> Array:
        hidden = self.config["hidden_size"]
        if self.config.get("tie_word_embeddings") and "lm_head.weight" not in self.files:
            return self.files.floats("ernie.embed_tokens.weight").T.astype(self.dtype)
        head = self.files.floats("lm_head.weight")
        return (head if head.shape[0] == hidden else head.T).astype(self.dtype)

    def _norm(self, x: Array, name: str) -> Array:
        wide = x.astype(np.float64)
        mean = np.mean(wide * wide, axis=-1, keepdims=True)
        scale = self.files.floats(f"{name}.weight")
        return (wide / np.sqrt(mean + self.config.get("rms_norm_eps", 1e-5)) * scale).astype(
            self.dtype
        )

    def _attention(self, x: Array, prefix: str) -> Array:
        heads, kv_heads, dim = self._heads()
        width = (heads + 2 * kv_heads) * dim
        qkv = x @ self.weight(f"{prefix}.self_attn.qkv_proj", x.shape[1], width)
        q, k, v = np.split(qkv, [heads * dim, (heads + kv_heads) * dim], axis=1)
        q = self._rotate(q.reshape(-1, heads, dim))
        k = self._rotate(k.reshape(-1, kv_heads, dim))
        v = v.reshape(-1, kv_heads, dim)
        mixed = np.empty_like(q)
        for head in range(heads):
            group = head // (heads // kv_heads)
            mixed[:, head] = causal_attention(q[:, head], k[:, group], v[:, group])
        flat = mixed.reshape(len(x), heads * dim)
        return flat @ self.weight(f"{prefix}.self_attn.o_proj", heads * dim, x.shape[1])

    def _heads(self) -> tuple[int, int, int]:
        config = self.config
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads", heads)
        return heads, kv_heads, config.get("head_dim") or config["hidden_size"] // heads

    def _rotate(self, x: Array) -> Array:
        """Adjacent-pair RoPE; the angle is a float32 product, as in training."""
        count, _, dim = x.shape
        theta = self.config.get("rope_theta", 10000.0)
        frequency = np.array([theta ** (2 * i / dim) for i in range(dim // 2)], np.float32)
        frequency = np.float32(1) / frequency
        angle = np.arange(count, dtype=np.float32)[:, None, None] * frequency
        cos, sin = np.cos(angle.astype(np.float64)), np.sin(angle.astype(np.float64))
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = np.empty(x.shape, np.float64)
        turned[..., 0::2] = even * cos - odd * sin
        turned[..., 1::2] = odd * cos + even * sin
        return turned.astype(self.dtype)

    def _feed_forward(self, x: Array, layer: int, prefix: str) -> Array:
        config = self.config
        experts = config.get("moe_num_experts") or 0
        if not experts or layer < config.get("moe_layer_start_index", 0):
            return self._mlp(x, prefix, config["intermediate_size"])
        width = config["moe_intermediate_size"]
        ids, weights = self._route(x, prefix)
        out = np.zeros_like(x)
        for expert in range(experts):
            token, slot = np.nonzero(ids == expert)
            if token.size:
                part = self._mlp(x[token], f"{prefix}.experts.{expert}", width)
                out[token] += weights[token, slot][:, None].astype(self.dtype) * part
        shared = config.get("moe_num_shared_experts") or 0
        if shared:
            out = out + self._mlp(x, f"{prefix}.shared_experts", shared * width)
        return out

    def _mlp(self, x: Array, prefix: str, width: int) -> Array:
        both = x @ self.weight(f"{prefix}.up_gate_proj", x.shape[1], 2 * width)
        gate, up = both[:, :width].astype(np.float64), both[:, width:]
        inner = (gate / (1 + np.exp(-gate)) * up).astype(self.dtype)
        return inner @ self.weight(f"{prefix}.down_proj", width, x.shape[1])

    def _route(self, x: Array, prefix: str) -> tuple[Array, Array]:
        """Chosen experts [T, k] and their weights; equal scores go to the lower id."""
        gate = self.files.floats(f"{prefix}.gate.weight").astype(self.dtype)
        p = softmax(x @ gate)
        bias = f"{prefix}.moe_statics.e_score_correction_bias"
        score = p + (self.files.floats(bias).reshape(-1) if bias in self.files else 0)
        count = self.config["moe_k"]
        ids = np.argsort(-score, axis=1, kind="stable")[:, :count]
        if count < score.shape[1]:
            ordered = np.sort(score, axis=1)[:, ::-1]
            self.margin = np.minimum(self.margin, ordered[:, count - 1] - ordered[:, count])
        chosen = np.take_along_axis(p, ids, axis=1)
        return ids, chosen / chosen.sum(axis=1, keepdims=True)


def softmax(x: Array) -> Array:
    """Row softmax in float64."""
    wide = x.astype(np.float64)
    power = np.exp(wide - wide.max(axis=-1, keepdims=True))
    result: Array = power / power.sum(axis=-1, keepdims=True)
    return result


def causal_attention(q: Array, k: Array, v: Array) -> Array:
    """One head: softmax(q k^T / sqrt(D)) v with position t seeing 0..t; q, k, v [T, D]."""
    out = np.empty_like(q)
    for begin in range(0, len(q), 256):  # bounds the score matrix for long documents
        end = min(begin + 256, len(q))
        score = (q[begin:end] @ k[:end].T) / np.sqrt(q.shape[1]).astype(q.dtype)
        hidden = np.arange(end)[None, :] > np.arange(begin, end)[:, None]
        out[begin:end] = softmax(np.where(hidden, -np.inf, score)).astype(q.dtype) @ v[:end]
    return out
