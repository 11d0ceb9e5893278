"""Rotary embedding with cache writes, and paged attention, against float64 and bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_ops import ISAS, assert_same_everywhere, bits, isa, tensor, threads
from oracles import attention as oracle

from fastdeploy_lite.model_executor.ops.attention import (
    decode_attention,
    paged_attention,
    rope_and_cache,
)

BOUNDARIES = [1, 2, 63, 64, 65, 127, 128, 129]


@dataclass
class Model:
    """Random sequences with their keys and values, scattered over the blocks of a cache."""

    kv_heads: int
    group: int
    head_dim: int
    lengths: list[int]
    seed: int = 0
    query: list[np.ndarray] = field(init=False)  # per sequence [n, Hq, D]
    keys: list[np.ndarray] = field(init=False)  # per sequence [n, Hkv, D]
    values: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)

        def draw(length: int, heads: int) -> np.ndarray:
            return rng.standard_normal((length, heads, self.head_dim)).astype("f4")

        self.query = [2 * draw(n, self.kv_heads * self.group) for n in self.lengths]
        self.keys = [draw(n, self.kv_heads) for n in self.lengths]
        self.values = [draw(n, self.kv_heads) for n in self.lengths]
        self._fill_cache(rng)

    def _fill_cache(self, rng: np.random.Generator) -> None:
        blocks = [-(-n // 64) for n in self.lengths]
        total = sum(blocks) + 3
        shape = (total, self.kv_heads, 64, self.head_dim)
        # NaN in every cell that belongs to nobody: reading one would show.
        key_cache, value_cache = np.full(shape, np.nan, "f4"), np.full(shape, np.nan, "f4")
        free = iter(rng.permutation(total))
        self.tables = np.full((len(blocks), max(blocks) + 1), -1, np.int32)
        for b, count in enumerate(blocks):
            for i in range(count):
                block = self.tables[b, i] = next(free)
                part = slice(64 * i, min(64 * i + 64, self.lengths[b]))
                rows = part.stop - part.start
                key_cache[block, :, :rows] = self.keys[b][part].transpose(1, 0, 2)
                value_cache[block, :, :rows] = self.values[b][part].transpose(1, 0, 2)
        self.cache = tensor(key_cache), tensor(value_cache)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def step(self, parts: list[tuple[int, int, int]]) -> list[np.ndarray]:
        """One call for tokens [start, stop) of sequences: parts = (sequence, start, stop)."""
        query = np.concatenate([self.query[b][start:stop] for b, start, stop in parts])
        cumulative = np.cumsum([0, *(stop - start for _, start, stop in parts)])
        out = paddle.full([len(query), query[0].size], float("nan"))
        paged_attention(
            tensor(query.reshape(len(query), -1)),
            *self.cache,
            tensor(self.tables[[b for b, _, _ in parts]]),
            tensor(cumulative, "int32"),
            tensor([stop for _, _, stop in parts], "int32"),
            self.scale,
            out,
        )
        rows = out.numpy().reshape(query.shape)
        return np.split(rows, cumulative[1:-1])

    def whole(self) -> list[np.ndarray]:
        return self.step([(b, 0, n) for b, n in enumerate(self.lengths)])

    def exact(self, b: int, start: int, stop: int) -> np.ndarray:
        return oracle.attention(
            self.query[b][start:stop], self.keys[b][:stop], self.values[b][:stop], self.scale
        )


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    # Scores of size 10 in float32 carry errors near 2e-6, which the weights inherit.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 48, 64, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("name", ISAS)
def test_ragged_batches_equal_float64(name: str, group: int, head_dim: int) -> None:
    model = Model(2, group, head_dim, [70, 1, 130, 64, 33], seed=group)
    parts = [(0, 69, 70), (2, 40, 130), (1, 0, 1), (3, 63, 64), (4, 0, 33)]
    with isa(name):
        found = model.step(parts)
    for part, rows in zip(parts, found, strict=True):
        assert_close(rows, model.exact(*part))


@pytest.mark.parametrize("length", BOUNDARIES)
def test_block_boundaries(length: int) -> None:
    model = Model(2, 4, 64, [length], seed=length)
    assert_close(model.whole()[0], model.exact(0, 0, length))
    assert_close(model.step([(0, length - 1, length)])[0], model.exact(0, length - 1, length))


def test_same_bits_on_every_set_and_thread_count() -> None:
    model = Model(2, 5, 128, [200, 31, 1100, 64], seed=7)
    parts = [(0, 150, 200), (1, 0, 31), (2, 1099, 1100), (3, 60, 64)]
    assert_same_everywhere(lambda: np.concatenate(model.step(parts)))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_chunks_and_company_change_no_bit(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.sampled_from([*BOUNDARIES, 100, 200]), min_size=1, max_size=4))
    group = data.draw(st.sampled_from([1, 3, 8, 16]))
    model = Model(data.draw(st.sampled_from([1, 2])), group, 32, lengths, seed=len(lengths))
    whole = model.whole()
    done = [0] * len(lengths)
    pieces: list[list[np.ndarray]] = [[] for _ in lengths]
    while done != lengths:
        open_ones = [b for b, n in enumerate(lengths) if done[b] < n]
        chosen = data.draw(st.lists(st.sampled_from(open_ones), min_size=1, unique=True))
        parts = []
        for b in chosen:
            stop = data.draw(st.integers(done[b] + 1, lengths[b]))
            parts.append((b, done[b], stop))
            done[b] = stop
        for (b, _, _), rows in zip(parts, model.step(parts), strict=True):
            pieces[b].append(rows)
    for b, expected in enumerate(whole):
        np.testing.assert_array_equal(bits(np.concatenate(pieces[b])), bits(expected))


@pytest.mark.parametrize("length", [1023, 1024, 1025, 2048, 3000])
def test_long_contexts_split_over_threads_equal_those_in_a_batch(length: int) -> None:
    """A lone decode spreads the partitions of its context over threads; in a crowd it does not."""
    model = Model(1, 4, 16, [length, *[20] * 12], seed=length)
    crowd = [(0, length - 1, length), *((b, 0, 20) for b in range(1, 13))]
    with threads(4):
        alone = model.step(crowd[:1])[0]
        together = model.step(crowd)[0]
    with threads(1):
        chunk = model.step([(0, max(0, length - 700), length)])[0]
    np.testing.assert_array_equal(bits(together), bits(alone))
    np.testing.assert_array_equal(bits(chunk[-1:]), bits(alone))
    assert_close(alone, model.exact(0, length - 1, length))


def test_output_may_be_the_query() -> None:
    model = Model(2, 2, 16, [90], seed=3)
    place = tensor(model.query[0].reshape(90, -1))
    paged_attention(
        place,
        *model.cache,
        tensor(model.tables),
        tensor([0, 90], "int32"),
        tensor([90], "int32"),
        model.scale,
        place,
    )
    expected = model.whole()[0].reshape(90, -1)
    np.testing.assert_array_equal(bits(place.numpy()), bits(expected))


def test_sequences_without_tokens_are_skipped() -> None:
    model = Model(1, 2, 16, [5, 9], seed=4)
    out = paddle.empty([9, 32])
    paged_attention(
        tensor(model.query[1].reshape(9, -1)),
        *model.cache,
        tensor(model.tables),
        tensor([0, 0, 9], "int32"),
        tensor([0, 9], "int32"),
        model.scale,
        out,
    )
    assert_close(out.numpy().reshape(9, 2, 16), model.exact(1, 0, 9))


def test_large_scores_do_not_overflow() -> None:
    model = Model(1, 1, 16, [80], seed=5)
    model.query[0] *= 1000
    assert_close(model.whole()[0][-1:], model.exact(0, 79, 80))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_lens": [2]}, r"context_lens\[0\] is 2, less than the sequence's 3 tokens"),
        ({"context_lens": [193]}, r"context_lens\[0\] needs 4 blocks, block_tables has 3 columns"),
        ({"context_lens": [70]}, r"block_tables\[0\]\[1\] is -1, the cache has blocks 0 to 3"),
        ({"block_tables": [[4, 0, 0]]}, r"block_tables\[0\]\[0\] is 4"),
        ({"cu_seqlens_q": [0, 2]}, "cu_seqlens_q ends with 2, q has 3 tokens"),
        ({"cu_seqlens_q": [1, 3]}, "cu_seqlens_q begins with 1, expected 0"),
    ],
)
def test_contradictions_are_refused(change: dict[str, list[int]], message: str) -> None:
    indices = {"block_tables": [[0, -1, -1]], "cu_seqlens_q": [0, 3], "context_lens": [3]}
    views = {name: tensor(value, "int32") for name, value in {**indices, **change}.items()}
    cache = paddle.zeros([4, 1, 64, 16])
    query = paddle.zeros([3, 32])
    with pytest.raises(ValueError, match="paged_attention: " + message) as caught:
        paged_attention(query, cache, cache, scale=1.0, out=paddle.zeros([3, 32]), **views)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cache_shape", "width", "message"),
    [
        ([4, 1, 64, 20], 40, "head_dim 20, expected a multiple of 16"),
        ([4, 2, 64, 16], 48, "a query row has 48 elements"),
        ([4, 1, 32, 16], 32, r"key_cache has shape \[4, 1, 32, 16\]"),
    ],
)
def test_shapes_are_checked(cache_shape: list[int], width: int, message: str) -> None:
    cache, query = paddle.zeros(cache_shape), paddle.zeros([1, width])
    one = tensor([[0]], "int32"), tensor([0, 1], "int32"), tensor([1], "int32")
    with pytest.raises(ValueError, match=message):
        paged_attention(query, cache, cache, *one, 1.0, paddle.zeros([1, width]))


# --- rotary embedding and cache writes ---------------------------------------------------------


def run_rope(
    qkv: np.ndarray, positions: np.ndarray, slots: np.ndarray, kv_heads: int, head_dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries [T, Hq, D] and caches [5, kv_heads, 64, D] after the call, NaN where untouched."""
    shape = [5, kv_heads, 64, head_dim]
    keys, values = paddle.full(shape, float("nan")), paddle.full(shape, float("nan"))
    q_out = paddle.empty([len(qkv), qkv.shape[1] - 2 * kv_heads * head_dim])
    table = tensor(oracle.cos_sin_table(300, head_dim))
    indices = tensor(positions, "int32"), table, tensor(slots, "int32")
    rope_and_cache(tensor(qkv), *indices, keys, values, q_out)
    return q_out.numpy().reshape(len(qkv), -1, head_dim), keys.numpy(), values.numpy()


@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(6, 2, 64), (4, 4, 16), (5, 1, 128)])
def test_rope_and_cache(q_heads: int, kv_heads: int, head_dim: int) -> None:
    rng = np.random.default_rng(head_dim)
    tokens = 40
    positions = rng.integers(0, 300, tokens)
    slots = rng.permutation(5 * 64)[:tokens].astype(np.int32)
    slots[[3, 11]] = -1
    qkv = rng.standard_normal((tokens, (q_heads + 2 * kv_heads) * head_dim)).astype("f4")
    query, keys, values = run_rope(qkv, positions, slots, kv_heads, head_dim)

    table = oracle.cos_sin_table(300, head_dim)
    parts = qkv.reshape(tokens, -1, head_dim)
    turned = oracle.rotate(parts[:, : q_heads + kv_heads], positions, table)
    np.testing.assert_allclose(query, turned[:, :q_heads], rtol=0, atol=1e-6)
    kept = slots >= 0
    where = slots[kept] // 64, slice(None), slots[kept] % 64
    np.testing.assert_allclose(keys[where], turned[kept, q_heads:], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(values[where], parts[kept, q_heads + kv_heads :])
    assert np.isfinite(keys).all(axis=-1).sum() == kept.sum() * kv_heads  # nothing else written
    assert np.isfinite(values).all(axis=-1).sum() == kept.sum() * kv_heads


def test_rope_same_bits_everywhere_and_alone() -> None:
    rng = np.random.default_rng(2)
    qkv = rng.standard_normal((50, 10 * 64)).astype("f4")
    positions, slots = np.arange(50) * 5, np.arange(50) * 3

    def compute() -> np.ndarray:
        return np.concatenate([part.ravel() for part in run_rope(qkv, positions, slots, 2, 64)])

    assert_same_everywhere(compute)
    query = run_rope(qkv, positions, slots, 2, 64)[0]
    alone = run_rope(qkv[7:8], positions[7:8], slots[7:8], 2, 64)[0]
    np.testing.assert_array_equal(bits(alone[0]), bits(query[7]))


@pytest.mark.parametrize(
    ("positions", "slots", "message"),
    [
        ([0, 300], [0, 1], r"positions\[1\] is 300, cos_sin has rows 0 to 299"),
        ([-1, 0], [0, 1], r"positions\[0\] is -1"),
        ([0, 1], [0, 320], r"slot_mapping\[1\] is 320, the cache has slots 0 to 319"),
        ([0, 1], [-2, 0], r"slot_mapping\[0\] is -2"),
    ],
)
def test_rope_names_the_bad_index(positions: list[int], slots: list[int], message: str) -> None:
    with pytest.raises(ValueError, match="rope_and_cache: " + message):
        run_rope(np.ones((2, 4 * 16), "f4"), np.array(positions), np.array(slots), 1, 16)


def test_rope_checks_shapes() -> None:
    cache = paddle.zeros([1, 1, 64, 16])
    indices = tensor([0], "int32"), paddle.zeros([4, 16]), tensor([0], "int32")
    with pytest.raises(ValueError, match=r"qkv has shape \[1, 48\], expected \[1, 64\]"):
        rope_and_cache(paddle.zeros([1, 48]), *indices, cache, cache, paddle.zeros([1, 32]))


def test_decode_attention_is_the_two_in_one() -> None:
    heads, kv_heads, dim, contexts = 6, 2, 32, [1, 64, 65, 130]
    rng = np.random.default_rng(11)
    table = np.array([[0, 0, 0], [1, 0, 0], [2, 3, 0], [4, 5, 6]], np.int32)
    last = np.array(contexts) - 1
    slots = table[np.arange(4), last // 64] * 64 + last % 64
    slots[1] = -1  # of a padding row; here the cache holds its key already
    qkv = tensor(rng.standard_normal((4, (heads + 2 * kv_heads) * dim)).astype("f4"))
    caches = rng.standard_normal((2, 7, kv_heads, 64, dim)).astype("f4")
    fresh = [tensor(last.astype("i4")), tensor(oracle.cos_sin_table(200, dim))]
    fresh.append(tensor(slots.astype("i4")))
    batch = [tensor(table), tensor(np.arange(5, dtype="i4")), tensor(np.array(contexts, "i4"))]
    apart, at_once = [[tensor(cache) for cache in caches] for _ in range(2)]
    query, expected, found = (paddle.empty([4, heads * dim]) for _ in range(3))
    rope_and_cache(qkv, *fresh, *apart, query)
    paged_attention(query, *apart, *batch, 0.2, expected)
    decode_attention(qkv, *fresh, *at_once, *batch, 0.2, found)
    for one, other in zip([found, *at_once], [expected, *apart], strict=True):
        np.testing.assert_array_equal(bits(one.numpy()), bits(other.numpy()))
    with pytest.raises(ValueError, match="decode_attention: positions has shape"):
        decode_attention(qkv, tensor(np.zeros(3, "i4")), *fresh[1:], *at_once, *batch, 0.2, found)
