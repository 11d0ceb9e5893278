"""Rotary embedding, cache writes and attention on ragged batches, from poisoned caches."""

from __future__ import annotations

import cards
import numpy as np
import pytest
from oracles import attention as oracle

BLOCK = 64


class Batch:
    """Random sequences in a shuffled, poisoned cache; contexts and query lengths as given."""

    def __init__(
        self,
        contexts: list[int],
        lengths: list[int],
        heads: int,
        kv_heads: int,
        dim: int,
        seed: int,
    ) -> None:
        random = np.random.default_rng(seed)
        self.contexts, self.lengths = contexts, lengths
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.blocks = sum(-(-n // BLOCK) for n in contexts) + 3
        order = random.permutation(self.blocks)
        self.table = np.full((len(contexts), max(-(-n // BLOCK) for n in contexts)), -1, np.int32)
        used = 0
        for row, context in zip(self.table, contexts, strict=True):
            count = -(-context // BLOCK)
            row[:count] = order[used : used + count]
            used += count
        width = (heads + 2 * kv_heads) * dim
        self.qkv = [cards.round_bf16(random.standard_normal((n, width))) for n in contexts]
        self.cos_sin = oracle.cos_sin_table(max(contexts), dim)

    def slots(self, b: int) -> np.ndarray:
        positions = np.arange(self.contexts[b])
        slots = self.table[b][positions // BLOCK] * BLOCK + positions % BLOCK
        return slots.astype(np.int32)

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Rotated queries of all tokens, and the attention of each sequence's last tokens."""
        from fastdeploy_lite.model_executor import ops

        shape = [self.blocks, self.kv_heads, BLOCK, self.dim]
        keys, values = cards.poisoned(shape), cards.poisoned(shape)
        total = sum(self.contexts)
        rotated = cards.poisoned([total, self.heads * self.dim])
        ops.rope_and_cache(
            cards.put(np.concatenate(self.qkv), "bfloat16"),
            cards.put(np.concatenate([np.arange(n) for n in self.contexts]).astype(np.int32)),
            cards.put(self.cos_sin),
            cards.put(np.concatenate([self.slots(b) for b in range(len(self.contexts))])),
            keys,
            values,
            rotated,
        )
        ends = np.cumsum(self.contexts)
        rows = [np.arange(e - n, e) for e, n in zip(ends, self.lengths, strict=True)]
        all_queries = cards.get(rotated)
        query = all_queries[np.concatenate(rows)]
        out = cards.poisoned(list(query.shape))
        ops.paged_attention(
            cards.put(query, "bfloat16"),
            keys,
            values,
            cards.put(np.maximum(self.table, 0)),
            cards.put(np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)),
            cards.put(np.array(self.contexts, np.int32)),
            self.dim**-0.5,
            out,
        )
        return all_queries, cards.get(out)

    def expected(self, queries: np.ndarray) -> np.ndarray:
        results, begin = [], 0
        split = (self.heads * self.dim, (self.heads + self.kv_heads) * self.dim)
        for qkv, context, length in zip(self.qkv, self.contexts, self.lengths, strict=True):
            _, k, v = np.split(qkv, split, axis=1)
            k = oracle.rotate(k.reshape(context, -1, self.dim), np.arange(context), self.cos_sin)
            query = queries[begin + context - length : begin + context]
            results.append(
                vectorised(
                    query.reshape(length, -1, self.dim),
                    cards.round_bf16(k),
                    v.reshape(context, -1, self.dim),
                    self.dim**-0.5,
                )
            )
            begin += context
        return np.concatenate(results).reshape(-1, self.heads * self.dim)


def vectorised(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """oracle.attention with matrix products; compared with it below."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("qhd,nhd->hqn", q.astype(np.float64), k) * scale
    last = len(k) - len(q) + np.arange(len(q))
    scores = np.where(np.arange(len(k)) <= last[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return np.einsum("hqn,nhd->qhd", weights / weights.sum(axis=2, keepdims=True), v)


def check(batch: Batch) -> None:
    queries, found = batch.run()
    positions = np.concatenate([np.arange(n) for n in batch.contexts])
    plain = np.concatenate(batch.qkv)[:, : batch.heads * batch.dim]
    turned = oracle.rotate(plain.reshape(len(plain), -1, batch.dim), positions, batch.cos_sin)
    assert cards.error(queries, turned.reshape(queries.shape)) < 4e-3
    assert cards.error(found, batch.expected(queries)) < 6e-3


def test_the_vectorised_oracle_is_the_oracle() -> None:
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((n, h, 16)) for n, h in ((5, 4), (9, 2), (9, 2)))
    np.testing.assert_allclose(vectorised(q, k, v, 0.3), oracle.attention(q, k, v, 0.3))


EDGES = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 500]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (16, 2), (16, 1), (20, 4), (6, 2)])
@pytest.mark.parametrize("dim", [64, 128])
def test_decode_at_block_boundaries(heads: int, kv_heads: int, dim: int) -> None:
    check(Batch(EDGES, [1] * len(EDGES), heads, kv_heads, dim, heads * dim))


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (10, 2), (16, 1)])
def test_prefill_of_whole_prompts(heads: int, kv_heads: int, dim: int) -> None:
    check(Batch(EDGES, EDGES, heads, kv_heads, dim, heads + dim))


def test_chunks_and_decodes_mix() -> None:
    contexts = [700, 64, 65, 1, 300, 129, 1000, 17, 90]
    lengths = [100, 1, 65, 1, 7, 2, 1, 17, 26]
    check(Batch(contexts, lengths, 20, 4, 128, 3))
    check(Batch(contexts, lengths, 6, 2, 64, 4))


def test_a_group_wider_than_a_warp_tile() -> None:
    check(Batch([5, 64, 130], [1, 1, 4], 32, 1, 64, 5))


def test_long_context_is_split() -> None:
    check(Batch([20000], [1], 8, 1, 128, 6))
    check(Batch([3000, 5000], [1, 1], 16, 2, 128, 7))


@pytest.mark.parametrize("sequences", [1, 3, 17, 64, 129, 256])
def test_many_ragged_sequences(sequences: int) -> None:
    random = np.random.default_rng(sequences)
    contexts = random.integers(1, 200, sequences).tolist()
    check(Batch(contexts, [1] * sequences, 8, 2, 64, sequences))
    lengths = [int(random.integers(1, n + 1)) for n in contexts]
    check(Batch(contexts, lengths, 8, 2, 64, sequences + 1))


def test_a_skipped_slot_writes_nothing() -> None:
    from fastdeploy_lite.model_executor import ops

    shape = [2, 2, BLOCK, 64]
    keys, values = cards.poisoned(shape), cards.poisoned(shape)
    ops.rope_and_cache(
        cards.put(np.ones((2, 8 * 64), np.float32), "bfloat16"),
        cards.put(np.zeros(2, np.int32)),
        cards.put(oracle.cos_sin_table(4, 64)),
        cards.put(np.full(2, -1, np.int32)),
        keys,
        values,
        cards.poisoned([2, 4 * 64]),
    )
    assert np.isnan(cards.get(keys)).all() and np.isnan(cards.get(values)).all()
