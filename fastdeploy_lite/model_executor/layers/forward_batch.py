"""The tensors of one step, as the layers see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdeploy_lite.model_executor.ops import fix
from fastdeploy_lite.model_executor.workspace import Workspace

KVCache = tuple[Any, Any]
"""Key and value blocks of one layer, each [num_blocks, Hkv, 64, D]."""


@dataclass(frozen=True)
class ForwardBatch:
    """A ragged batch: T tokens of B sequences, one after another.

    Attributes:
        token_ids: int32 [T].
        positions: int32 [T], place of each token in its sequence.
        slot_mapping: int32 [T], block * 64 + offset where keys and values go; -1 writes nothing.
        cu_seqlens_q: int32 [B + 1], where each sequence's tokens begin.
        context_lens: int32 [B], tokens of each sequence including this step's.
        block_tables: int32 [B, max_blocks].
        kv_caches: one pair per layer.
        workspace: scratch memory.
        spread: several sequences are tokens of one, which see each other's new keys.
    """

    token_ids: Any
    positions: Any
    slot_mapping: Any
    cu_seqlens_q: Any
    context_lens: Any
    block_tables: Any
    kv_caches: Sequence[KVCache]
    workspace: Workspace
    spread: bool = False

    @classmethod
    def of_buffers(
        cls,
        tensors: Mapping[str, Any],
        num_tokens: int,
        num_seqs: int,
        kv_caches: Sequence[KVCache],
        workspace: Workspace,
        spread: bool = False,
    ) -> ForwardBatch:
        """The first tokens and sequences of static buffers that are named as the attributes."""

        def head(name: str, count: int) -> Any:
            return fix(tensors[name][:count])

        return cls(
            token_ids=head("token_ids", num_tokens),
            positions=head("positions", num_tokens),
            slot_mapping=head("slot_mapping", num_tokens),
            cu_seqlens_q=head("cu_seqlens_q", num_seqs + 1),
            context_lens=head("context_lens", num_seqs),
            block_tables=head("block_tables", num_seqs),
            kv_caches=kv_caches,
            workspace=workspace,
            spread=spread,
        )

    @property
    def decode_only(self) -> bool:
        """Whether every sequence has one token and no other's new keys to see."""
        return bool(self.token_ids.shape[0] == self.context_lens.shape[0]) and not self.spread

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.token_ids.shape[0])
