"""Rotary embedding, cache writes and attention on ragged batches, from poisoned caches.

A token's attention must have the same bits however it is computed; values are compared with float64
where they may differ by rounding.
"""

from __future__ import annotations

import itertools

import cards
import numpy as np
import pytest
from oracles import attention as oracle

BLOCK = 64
Part = tuple[int, int, int]
"""Sequence, and the positions from which and up to which its tokens are queried."""


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

    def fill(self) -> np.ndarray:
        """Write the caches; returns the rotated queries of all tokens."""
        from fastdeploy_lite.model_executor import ops

        shape = [self.blocks, self.kv_heads, BLOCK, self.dim]
        self.keys, self.values = cards.poisoned(shape), cards.poisoned(shape)
        total = sum(self.contexts)
        rotated = cards.poisoned([total, self.heads * self.dim])
        ops.rope_and_cache(
            cards.put(np.concatenate(self.qkv), "bfloat16"),
            cards.put(np.concatenate([np.arange(n) for n in self.contexts]).astype(np.int32)),
            cards.put(self.cos_sin),
            cards.put(np.concatenate([self.slots(b) for b in range(len(self.contexts))])),
            self.keys,
            self.values,
            rotated,
        )
        self.queries = np.split(cards.get(rotated), np.cumsum(self.contexts)[:-1])
        return np.concatenate(self.queries)

    def attend(self, parts: list[Part], wider: int = 0) -> list[np.ndarray]:
        """Attention of each part's tokens in one step; wider: columns to add to the table."""
        from fastdeploy_lite.model_executor import ops

        query = np.concatenate([self.queries[b][start:end] for b, start, end in parts])
        ends = np.cumsum([end - start for _, start, end in parts])
        table = np.maximum(self.table[[b for b, _, _ in parts]], 0)
        out = cards.poisoned(list(query.shape))
        ops.paged_attention(
            cards.put(query, "bfloat16"),
            self.keys,
            self.values,
            cards.put(np.pad(table, ((0, 0), (0, wider)))),
            cards.put(np.concatenate([[0], ends]).astype(np.int32)),
            cards.put(np.array([end for _, _, end in parts], np.int32)),
            self.dim**-0.5,
            out,
        )
        return np.split(cards.get(out), ends[:-1])

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Rotated queries of all tokens, and the attention of each sequence's last tokens."""
        queries = self.fill()
        sizes = zip(self.contexts, self.lengths, strict=True)
        parts = [(b, n - length, n) for b, (n, length) in enumerate(sizes)]
        return queries, np.concatenate(self.attend(parts))

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
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (10, 2), (16, 1), (32, 1)])
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


def decode_in_two_ops_and_in_one(
    batch: Batch, wider: int, skipped: tuple[int, ...] = ()
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Output, keys and values after both; the cache's places of the new tokens hold NaN before."""
    from fastdeploy_lite.model_executor import ops

    batch.fill()
    count, dim = len(batch.contexts), batch.dim
    last = np.array(batch.contexts) - 1
    slots = np.array([batch.slots(b)[at] for b, at in enumerate(last)])
    keys, values = cards.get(batch.keys), cards.get(batch.values)
    keys[slots // BLOCK, :, slots % BLOCK] = np.nan
    values.reshape(batch.blocks, batch.kv_heads, dim, BLOCK)[slots // BLOCK, ..., slots % BLOCK] = (
        np.nan
    )
    kept = np.where(np.isin(np.arange(count), skipped), -1, slots).astype(np.int32)
    qkv = cards.put(np.stack([batch.qkv[b][at] for b, at in enumerate(last)]), "bfloat16")
    positions, cos_sin = cards.put(last.astype(np.int32)), cards.put(batch.cos_sin)
    table = cards.put(np.pad(np.maximum(batch.table, 0), ((0, 0), (0, wider))))
    lengths = (
        cards.put(np.arange(count + 1, dtype=np.int32)),
        cards.put((last + 1).astype(np.int32)),
    )
    results = []
    for in_one in (False, True):
        caches = (cards.put(keys, "bfloat16"), cards.put(values, "bfloat16"))
        out = cards.poisoned([count, batch.heads * dim])
        slots_given = cards.put(kept if in_one else slots.astype(np.int32))
        fresh = (qkv, positions, cos_sin, slots_given, *caches)
        if in_one:
            ops.decode_attention(*fresh, table, *lengths, dim**-0.5, out)
        else:
            query = cards.poisoned([count, batch.heads * dim])
            ops.rope_and_cache(*fresh, query)
            ops.paged_attention(query, *caches, table, *lengths, dim**-0.5, out)
        results.append([cards.get(tensor) for tensor in (out, *caches)])
    return results[0], results[1]


def same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool((found.view(np.uint32) == expected.view(np.uint32)).all())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(20, 4, 128), (64, 8, 128), (16, 1, 128), (4, 4, 64), (16, 2, 32), (32, 1, 64)],
)
@pytest.mark.parametrize(
    "contexts", [[1], [511], [700], [256, 1, 600], [*range(1, 140, 7), 255, 256, 257, 3000]]
)
def test_decoding_in_one_op_has_the_bits_of_two(
    heads: int, kv_heads: int, dim: int, contexts: list[int]
) -> None:
    batch = Batch(contexts, contexts, heads, kv_heads, dim, heads + len(contexts))
    for wider in (0, 5, 300):
        for found, expected in zip(*decode_in_two_ops_and_in_one(batch, wider), strict=True):
            assert same_bits(found, expected)


def test_a_padding_row_of_a_decode_writes_nothing() -> None:
    batch = Batch([70, 1, 300, 64], [1] * 4, 8, 2, 128, 5)
    (out, *_), (padded, keys, values) = decode_in_two_ops_and_in_one(batch, 0, (1, 3))
    assert same_bits(padded[[0, 2]], out[[0, 2]])
    for b in (1, 3):
        slot = batch.slots(b)[-1]
        rows = values.reshape(batch.blocks, 2, 128, BLOCK)[slot // BLOCK, ..., slot % BLOCK]
        assert np.isnan(keys[slot // BLOCK, :, slot % BLOCK]).all() and np.isnan(rows).all()


# -- the same bits --------------------------------------------------------------------------------


def filled(contexts: list[int], heads: int, kv_heads: int, dim: int, seed: int) -> Batch:
    batch = Batch(contexts, contexts, heads, kv_heads, dim, seed)
    batch.fill()
    return batch


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Equal bits, zeros' signs included, and no NaN."""
    one, other = np.concatenate(found), np.concatenate(expected)
    assert not np.isnan(one).any()
    rows = np.flatnonzero((one.view(np.uint32) != other.view(np.uint32)).any(axis=1))
    assert rows.size == 0, f"{rows.size} of {len(one)} tokens differ, the first is {rows[0]}"


def cut(random: np.random.Generator, b: int, length: int, most: int) -> list[Part]:
    """One sequence in up to most + 1 chunks."""
    places = random.integers(0, length + 1, int(random.integers(0, most + 1)))
    edges = np.unique(np.concatenate([[0, length], places])).tolist()
    return [(b, start, end) for start, end in itertools.pairwise(edges)]


GROUPS = [(4, 4, 64), (8, 2, 128), (20, 4, 128), (16, 2, 64), (16, 1, 128), (32, 1, 64)]
GROUPS += [(2, 2, 128), (16, 2, 128), (32, 1, 128), (8, 2, 32)]
LENGTHS = [1, 2, 33, 63, 64, 65, 129, 255, 256, 257, 320, 500, 511, 512, 513, 700]


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), GROUPS)
def test_a_decoded_token_has_the_bits_of_its_prefill(heads: int, kv_heads: int, dim: int) -> None:
    batch = filled(LENGTHS, heads, kv_heads, dim, heads + dim)
    whole = batch.attend([(b, 0, n) for b, n in enumerate(LENGTHS)])
    last = batch.attend([(b, n - 1, n) for b, n in enumerate(LENGTHS)])
    same(last, [rows[-1:] for rows in whole])
    every = [(len(LENGTHS) - 1, at, at + 1) for at in range(LENGTHS[-1])]
    same(batch.attend(every), whole[-1:])


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), GROUPS)
def test_any_chunking_in_any_company_gives_the_bits_of_the_whole(
    heads: int, kv_heads: int, dim: int
) -> None:
    batch = filled(LENGTHS, heads, kv_heads, dim, heads - dim + 1000)
    whole = batch.attend([(b, 0, n) for b, n in enumerate(LENGTHS)])
    random = np.random.default_rng(dim)
    for wider in (0, 5, 300):
        parts = [part for b, n in enumerate(LENGTHS) for part in cut(random, b, n, 5)]
        random.shuffle(parts)
        chunks = [whole[b][start:end] for b, start, end in parts]
        same(batch.attend(parts, wider), chunks)
        for part, chunk in list(zip(parts, chunks, strict=True))[:8]:
            same(batch.attend([part]), [chunk])  # alone, and in a table just wide enough


def test_longer_segments_of_long_contexts_keep_the_bits() -> None:
    length = 16900  # segments of 256 tokens up to 8,192, then 512, and 1,024 from 16,385 on
    batch = filled([length, 300], 10, 2, 128, 8)
    whole = batch.attend([(0, 0, length)])[0]
    random = np.random.default_rng(8)
    edges = [256, 512, 4096, 8192, 8448, 8704, 16384, 16640]
    positions = [edge + near for edge in edges for near in (-65, -2, -1, 0, 1, 63, 64)]
    positions += random.integers(0, length, 200).tolist()
    same(batch.attend([(0, at, at + 1) for at in positions]), [whole[positions]])
    for at in (8191, 8192, 16383, 16384, 16899):
        same(batch.attend([(0, at, at + 1)], wider=256), [whole[at : at + 1]])
    for start, end in ((8100, 8300), (8191, 8193), (16300, 16500), (16383, 16900), (5000, 16800)):
        parts = [(1, 299, 300), (0, start, end), (1, 17, 90)]
        same(batch.attend(parts)[1:2], [whole[start:end]])


@pytest.mark.parametrize("sequences", [63, 256, 520])
def test_a_step_of_many_sequences_keeps_the_bits(sequences: int) -> None:
    """So many, with so wide a table, that one launch has not the scratch for all."""
    batch = filled([3000, 40, 700], 64, 8, 128, 9)
    alone = [batch.attend([(b, n - 1, n)])[0] for b, n in enumerate(batch.contexts)]
    which = [i * 7 % 3 for i in range(sequences)]
    parts = [(b, batch.contexts[b] - 1, batch.contexts[b]) for b in which]
    for _ in range(3):  # the counter of drawn segments is back at zero for the next launch
        same(batch.attend(parts, wider=512 - 47), [alone[b] for b in which])
