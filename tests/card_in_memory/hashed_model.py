"""A model whose logits are a hash of all tokens so far, kept in a paged KV cache like keys.

Block tables, positions, lengths and slots of every step so decide what is generated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from place import memory

from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.models.ernie4_5 import FAMILY
from fastdeploy_lite.models.registry import ModelRegistry

VOCAB = 8192
EOS = 2
_WORDS = 4  # 16-bit words of a digest, the hidden state
_MIX = 0x9E3779B97F4A7C15
_POWERS = np.cumprod(np.full(4096, _MIX, np.uint64))


def digest(tokens: Any) -> np.uint64:
    """Of a sequence's tokens, from its first on."""
    wide = np.asarray(tokens, np.uint64) + np.uint64(1)
    return np.sum(wide * _POWERS[: len(wide)], dtype=np.uint64)


def logits_of(key: np.uint64) -> np.ndarray:
    """Float32 [VOCAB]; about one token in 120 ends an answer."""
    x = (np.arange(VOCAB, dtype=np.uint64) + key) * np.uint64(_MIX)
    x = (x ^ (x >> np.uint64(29))) * np.uint64(_MIX)
    row = (x >> np.uint64(40)).astype(np.float32) / np.float32(1 << 21)
    row[EOS] = 20.0 if int(key >> np.uint64(32)) % 120 == 0 else -20.0
    return row


class HashedModel:
    """See the module. `queue` takes what a card would compute."""

    family = FAMILY
    queue: Any = None

    def __init__(self, config: ModelConfig, *_: Any, **__: Any) -> None:
        self.config = config

    def __call__(self, batch: Any) -> Any:
        hidden = batch.workspace.get("hidden", [batch.num_tokens, _WORDS], "bfloat16")
        names = ("token_ids", "positions", "slot_mapping", "cu_seqlens_q", "context_lens")
        arrays = [memory(getattr(batch, name), "int32") for name in names]
        tables, keys = memory(batch.block_tables, "int32"), memory(batch.kv_caches[0][0], "uint16")
        out = memory(hidden, "uint16")
        self.queue.put(lambda: _compute(*arrays, tables, keys[:, 0, :, 0], out))
        return hidden

    def logits(self, hidden: Any, workspace: Any) -> Any:
        rows = workspace.get("logits", [hidden.shape[0], VOCAB], "float32")
        source, out = memory(hidden, "uint16"), memory(rows, "float32")

        def work() -> None:
            for row, words in enumerate(source):
                out[row] = logits_of(words.copy().view(np.uint64)[0])

        self.queue.put(work)
        return rows

    def weights(self) -> dict[str, list[Any]]:
        return {role: [] for role in ("embedding", "head", "attention", "mlp", "experts")}


def _compute(
    tokens: Any, positions: Any, slots: Any, begins: Any, lengths: Any, tables: Any, keys: Any,
    out: Any,
) -> None:  # fmt: skip
    kept = slots >= 0
    keys[slots[kept] // 64, slots[kept] % 64] = tokens[kept]
    for row, length in enumerate(lengths):
        at = np.arange(length)
        known = keys[tables[row, at // 64], at % 64]
        for token in range(begins[row], begins[row + 1]):
            out[token] = np.array([digest(known[: positions[token] + 1])]).view(np.uint16)


def model_config(longest: int) -> ModelConfig:
    """Of a HashedModel for sequences of so many tokens."""
    ModelRegistry.register_model_class(HashedModel)
    sizes = {
        "architectures": ["HashedModel"], "dtype": "bfloat16", "hidden_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "head_dim": 64, "intermediate_size": 64, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "max_position_embeddings": longest, "moe_num_experts": 0,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return ModelConfig.from_dict(sizes, "hashed")
