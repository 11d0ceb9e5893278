"""Routing and expert layers against numpy, from one token to a prefill, for every kind."""

from __future__ import annotations

import cards
import matrices
import numpy as np
import pytest


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def moe_oracle(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, up: np.ndarray, down: np.ndarray
) -> np.ndarray:
    out = np.zeros((len(x), down.shape[2]))
    for expert in np.unique(ids):
        tokens, slots = np.nonzero(ids == expert)
        gate, rest = np.split(x[tokens].astype(np.float64) @ up[expert], 2, axis=1)
        inner = silu(gate) * rest
        np.add.at(out, tokens, weights[tokens, slots, None] * (inner @ down[expert]))
    return out


@pytest.mark.parametrize(
    ("kind", "mode"), [("ccq", "0"), ("ccq", "1"), ("int4", "0"), ("int8", "0"), ("dense", "0")]
)
@pytest.mark.parametrize(
    ("experts", "top_k", "hidden", "inner"),
    [(16, 4, 384, 256), (8, 1, 256, 128), (64, 6, 640, 384)],
)
def test_fused_moe(
    kind: str,
    mode: str,
    experts: int,
    top_k: int,
    hidden: int,
    inner: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastdeploy_lite.model_executor import ops

    monkeypatch.setenv("FD_DETERMINISTIC_MODE", mode)
    random = np.random.default_rng(experts * top_k)
    up_weight, up = matrices.make(kind, random, hidden, 2 * inner, experts)
    down_weight, down = matrices.make(kind, random, inner, hidden, experts)
    for tokens in (1, 2, 3, 8, 13, 16, 30, 64, 150, 300, 1500):
        x = cards.round_bf16(random.standard_normal((tokens, hidden)))
        ids = np.argsort(random.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
        if tokens % 2 == 0:  # a crowded expert fills several tiles
            ids[:, 0] = 3
            ids[:, 1:] = np.where(ids[:, 1:] == 3, 0, ids[:, 1:])
        weights = random.dirichlet(np.ones(top_k), tokens).astype(np.float32)
        out = cards.poisoned([tokens, hidden])
        tensors = (cards.put(x, "bfloat16"), cards.put(ids), cards.put(weights))
        ops.fused_moe(*tensors, up_weight, down_weight, out, cards.Workspace())
        expected = moe_oracle(x, ids, weights, up, down)
        assert cards.error(cards.get(out), expected) < 8e-3, tokens


# 8,192 columns: rows of more than one group do not fit into a block of the persistent kernel
@pytest.mark.parametrize("kind", ["ccq", "ccq_wide", "ccq_mixed", "int4", "int8", "dense"])
@pytest.mark.parametrize(
    ("experts", "top_k", "hidden", "inner"),
    [
        (16, 4, 384, 256),
        (8, 1, 256, 128),
        (64, 6, 640, 384),
        (64, 8, 2048, 896),
        (4, 2, 8192, 128),
    ],
)
def test_a_token_has_the_same_bits_in_any_batch_and_tile(
    kind: str,
    experts: int,
    top_k: int,
    hidden: int,
    inner: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastdeploy_lite.model_executor import ops
    from fastdeploy_lite.model_executor.ops import cuda_moe

    monkeypatch.setenv("FD_DETERMINISTIC_MODE", "1")
    random = np.random.default_rng(experts + hidden)
    up, _ = matrices.make(kind, random, hidden, 2 * inner, experts)
    down, _ = matrices.make(kind, random, inner, hidden, experts)
    count = 300
    x = cards.round_bf16(random.standard_normal((count, hidden)))
    ids = np.argsort(random.random((count, experts)), axis=1)[:, :top_k].astype(np.int32)
    ids[::3, 0] = 3  # a crowded expert, for some tokens twice
    weights = random.dirichlet(np.ones(top_k), count).astype(np.float32)

    def run(rows: slice) -> np.ndarray:
        out = cards.poisoned([len(x[rows]), hidden])
        tensors = (cards.put(x[rows], "bfloat16"), cards.put(ids[rows]), cards.put(weights[rows]))
        ops.fused_moe(*tensors, up, down, out, cards.Workspace())
        return cards.get(out)

    alone = np.concatenate([run(slice(i, i + 1)) for i in range(count)])
    for tokens in (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 100, 128, 129, count):
        rows = slice(count - tokens, count)
        for forced in (-1, 0, 8, 16, 32, 64) if kind == "dense" else (-1, 0, 1, 2):
            if kind == "dense":  # heights of tiles; 0: a tile for each slot
                monkeypatch.setattr(cuda_moe, "CHOSEN_TILE", forced)
            elif forced == 0 and (
                tokens * top_k > 256 or (kind == "int8" and hidden == 8192 and tokens > 5)
            ):
                continue  # the persistent kernel takes few tokens, whose rows have to fit
            else:
                monkeypatch.setattr(cuda_moe, "CHOSEN_PATH", forced)
            np.testing.assert_array_equal(
                run(rows), alone[rows], err_msg=f"{tokens} tokens, tiles or path {forced}"
            )


@pytest.mark.parametrize("kind", ["ccq", "ccq_mixed", "int4", "int8"])
@pytest.mark.parametrize("tiles", ["low", "short", "tall"])
def test_every_height_of_a_tile_gives_the_bits_of_the_plain_kernel(
    kind: str, tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts with numbers of rows at and beside the edges between the kernels' tiles."""
    from fastdeploy_lite.model_executor import ops
    from fastdeploy_lite.model_executor.ops import cuda_moe

    random = np.random.default_rng(91)
    experts, hidden, inner = 64, 1152, 640
    edges = [8, 16, 24, 32, 40, 48, 64, 96, 128, 144, 288][: 4 if tiles == "low" else None]
    rows = [1, *edges, *(edge + 1 for edge in edges)]
    rows += [48 if tiles == "tall" else 0] * (experts - len(rows))  # the mean decides the kernel
    ids = random.permutation(np.repeat(np.arange(experts), rows)).astype(np.int32)[:, None]
    tokens = len(ids)
    up, _ = matrices.make(kind, random, hidden, 2 * inner, experts)
    down, _ = matrices.make(kind, random, inner, hidden, experts)
    x = cards.round_bf16(random.standard_normal((tokens, hidden)))
    weights = np.ones((tokens, 1), np.float32)

    def run(path: int) -> np.ndarray:
        monkeypatch.setattr(cuda_moe, "CHOSEN_PATH", path)
        out = cards.poisoned([tokens, hidden])
        tensors = (cards.put(x, "bfloat16"), cards.put(ids), cards.put(weights))
        ops.fused_moe(*tensors, up, down, out, cards.Workspace())
        return cards.get(out)

    np.testing.assert_array_equal(run(1), run(2))


@pytest.mark.parametrize("mode", ["0", "1"])
def test_a_batch_beside_others_on_its_own_stream_and_scratch(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runners of one process: each call has its own memory, so they may overlap."""
    from fastdeploy_lite import _ops_cuda
    from fastdeploy_lite.model_executor import ops
    from fastdeploy_lite.model_executor.ops import cuda_runtime
    from fastdeploy_lite.model_executor.workspace import Workspace

    monkeypatch.setenv("FD_DETERMINISTIC_MODE", mode)
    random = np.random.default_rng(77)
    hidden, inner, experts, top_k = 2048, 1024, 16, 4
    up, _ = matrices.make("ccq", random, hidden, 2 * inner, experts)
    down, _ = matrices.make("ccq", random, inner, hidden, experts)
    batches = []
    for tokens in (4, 16, 300):
        x = cards.put(cards.round_bf16(random.standard_normal((tokens, hidden))), "bfloat16")
        order = np.argsort(random.random((tokens, experts)), axis=1)
        ids = cards.put(order[:, :top_k].astype(np.int32))
        weights = cards.put(random.dirichlet(np.ones(top_k), tokens).astype(np.float32))
        out, workspace = cards.poisoned([tokens, hidden]), Workspace(cards.place())
        ops.fused_moe(x, ids, weights, up, down, out, workspace)
        batches.append((x, ids, weights, up, down, out, workspace))
    expected = [cards.get(batch[5]).copy() for batch in batches]
    streams = [int(_ops_cuda.create_stream()) for _ in batches]
    for _ in range(30):
        for batch, stream in zip(batches, streams, strict=True):
            with cuda_runtime.use_stream(stream):
                ops.fused_moe(*batch)
    for stream in streams:
        _ops_cuda.synchronize(stream)
    for batch, one in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(cards.get(batch[5]), one)


@pytest.mark.parametrize(
    ("hidden", "experts", "top_k"), [(384, 16, 4), (2560, 64, 6), (8192, 64, 8)]
)
@pytest.mark.parametrize("tokens", [1, 5, 16, 33, 257])
def test_route(hidden: int, experts: int, top_k: int, tokens: int) -> None:
    from fastdeploy_lite.model_executor import ops

    random = np.random.default_rng(tokens)
    x = cards.round_bf16(random.standard_normal((tokens, hidden)))
    gate = (random.standard_normal((hidden, experts)) * hidden**-0.5).astype(np.float32)
    bias = (random.standard_normal(experts) * 0.01).astype(np.float32)
    ids = cards.poisoned([tokens, top_k], "int32")
    weights = cards.poisoned([tokens, top_k], "float32")
    ops.route(cards.put(x, "bfloat16"), cards.put(gate), cards.put(bias), top_k, ids, weights)
    logits = x.astype(np.float64) @ gate
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    found = cards.get(ids)
    order = np.argsort(-(p + bias), axis=1, kind="stable")[:, :top_k]
    score = np.take_along_axis(p + bias, found, axis=1)
    best = np.take_along_axis(p + bias, order, axis=1)
    np.testing.assert_allclose(score, best, atol=1e-6)  # ids may differ where float32 cannot tell
    assert (found == order).mean() > 0.99
    chosen = np.take_along_axis(p, found, axis=1)
    expected = chosen / chosen.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(cards.get(weights), expected, rtol=2e-5)


def test_route_prefers_the_lower_id_and_never_repeats_one() -> None:
    from fastdeploy_lite.model_executor import ops

    x = np.ones((3, 64), np.float32)
    x[2] = np.nan
    ids = cards.poisoned([3, 4], "int32")
    weights = cards.poisoned([3, 4], "float32")
    gate = np.zeros((64, 16), np.float32)
    ops.route(cards.put(x, "bfloat16"), cards.put(gate), None, 4, ids, weights)
    found = cards.get(ids)
    np.testing.assert_array_equal(found[:2], [[0, 1, 2, 3]] * 2)
    assert len(set(found[2])) == 4 and found.min() >= 0 and found.max() < 16
    np.testing.assert_allclose(cards.get(weights)[:2], 0.25)
