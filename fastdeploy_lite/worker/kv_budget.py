"""How much memory a device's KV cache may take, and what else is held there."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastdeploy_lite import envs
from fastdeploy_lite.config import BLOCK_SIZE, RuntimeConfig
from fastdeploy_lite.model_executor.prompt_logprobs import ROWS_AT_ONCE
from fastdeploy_lite.utils.errors import ConfigError


@dataclass(frozen=True)
class MemoryReport:
    """Bytes held on the device, and how densely the experts are stored.

    Attributes:
        weights: by role: embedding, head, attention, mlp, experts.
        kv_cache, workspace, sampling: bytes.
        offloaded_experts: bytes of experts in main memory beside a card; no part of the others.
        bits_per_expert_weight: 0 for a model without routed experts.
        row_order: how the rows of 2-bit experts are read and why, "" without such experts.
    """

    weights: dict[str, int] = field(default_factory=dict)
    kv_cache: int = 0
    workspace: int = 0
    sampling: int = 0
    offloaded_experts: int = 0
    bits_per_expert_weight: float = 0.0
    row_order: str = ""

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.weights.values()) + self.kv_cache + self.workspace + self.sampling


def bytes_per_block(config: RuntimeConfig, dtype: str) -> int:
    """Return a rank's bytes of one block of 64 tokens over all layers, keys and values."""
    model = config.model
    itemsize = 4 if dtype == "float32" else 2
    per_layer = 2 * local_kv_heads(config) * BLOCK_SIZE * model.head_dim * itemsize
    return per_layer * config.num_kv_layers


def local_kv_heads(config: RuntimeConfig) -> int:
    """Return how many KV heads a rank holds; ranks share heads that are fewer than they are."""
    return max(1, config.model.num_key_value_heads // config.parallel.tensor_parallel_size)


def most_useful_blocks(config: RuntimeConfig) -> int:
    """Return how many blocks all slots at full length can use: twice that when finished prefixes
    are kept, and what the scheduler keeps in reserve."""
    keep = 2 if config.cache.enable_prefix_caching else 1
    useful = keep * config.scheduler.max_num_seqs * blocks_per_sequence(config)
    return useful + int(envs.FD_ENC_DEC_BLOCK_NUM)


def blocks_per_sequence(config: RuntimeConfig) -> int:
    """Return the blocks of one sequence of max_model_len."""
    return -(-config.scheduler.max_model_len // BLOCK_SIZE)


def check_blocks(blocks: int, config: RuntimeConfig) -> int:
    """Return `blocks`; ConfigError if not even one sequence of max_model_len fits."""
    if blocks < blocks_per_sequence(config):
        raise ConfigError(
            f"the KV cache has room for {max(0, blocks) * BLOCK_SIZE} tokens but max_model_len "
            f"is {config.scheduler.max_model_len}: lower max_model_len, or raise "
            "gpu_memory_utilization or num_gpu_blocks_override"
        )
    return blocks


def largest_sampling_bytes(config: RuntimeConfig) -> int:
    """Return the bytes of tables that appear when a request first asks: token counts, a copy of
    raw logits, and as many alternatives (an id and a number each) as a request may ask for."""
    limits, columns = config.scheduler, config.model.vocab_size
    most = config.max_logprobs if config.enable_logprob else 0
    alternatives = columns if most < 0 else min(most, columns)
    rows = config.max_logit_rows
    prompt_rows = min(ROWS_AT_ONCE, limits.max_num_batched_tokens)
    return 4 * (limits.max_num_seqs + rows) * columns + 8 * (rows + prompt_rows) * alternatives
