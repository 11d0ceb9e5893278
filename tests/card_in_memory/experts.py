"""Experts on the card in memory: weights packed by its kernels, and calls of them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from cards import bf16_bits, widen
from matrices import arrays, matrix

Array = np.ndarray[Any, Any]

CODINGS = {"ccq": 0, "int4": 1, "int8": 2}
STREAM, TILES, PLAIN, DIGITS = 0, 1, 2, 3
"""Values of the kernels' enum ExpertsPath."""


def memory(nbytes: int, fill: int = 0xFF) -> Array:
    """Bytes at an address that a card's allocator could have given."""
    raw = np.full(nbytes + 256, fill, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + nbytes]


def address(array: Array | None) -> int:
    return 0 if array is None else int(array.ctypes.data)


def block_order(columns: int) -> Array:
    """The file's column at each place of the blocks' columns."""
    place = np.arange(columns)
    return place // 16 * 8 + place % 8 + np.where(place % 16 < 8, 0, columns // 2)


class Columns:
    """Codes of N columns: code_scale and code_zp, and what the kernels make of them.

    "ccq": the fast decoder serves all of them, "ccq_wide": none of them, "ccq_far": there are some
    for every decoder that there is.
    """

    def __init__(self, card: ModuleType, kind: str, random: np.random.Generator, n: int) -> None:
        drawn = 2 * n if kind == "ccq" else n
        scale = random.uniform(90, 130, drawn).astype(np.float32)
        if kind != "ccq":
            likely = [0, 1, 0] if kind == "ccq_wide" else [0.97, 0.015, 0.015]
            scale *= random.choice(np.float32([1, 16, 4096]), drawn, p=likely)
        zero = random.uniform(-40, 300, drawn).astype(np.float32)
        exact = np.stack([scale, zero + np.float32(0.5)], axis=1)
        codes = np.empty((drawn, 4), np.uint32)
        unproven = np.zeros(1, np.int32)
        card.fit_columns(address(exact), address(codes), drawn, address(unproven), 0)
        assert int(unproven[0]) == (codes[:, 3] == 0).sum()
        kept = np.flatnonzero(codes[:, 3])[:n] if kind == "ccq" else np.arange(n)
        assert len(kept) == n
        self.scale, self.zero, self.exact, self.codes = (
            array[kept] for array in (scale, zero, exact, codes)
        )


class Weight:
    """All experts of one weight, packed, and the float64 matrices [E, K, N] that they stand for."""

    def __init__(
        self, card: ModuleType, kind: str, random: np.random.Generator, k: int, n: int, experts: int
    ) -> None:
        self.card, self.shape = card, (experts, k, n)
        coding = CODINGS[kind.partition("_")[0]]
        self._each = -(-k // card.chunk_rows) * n // 16 * card.chunk_bytes(coding)
        self._chunks = memory(experts * self._each)
        self._scale = np.empty((experts, n), np.float32)
        vectors = {}
        proven = True
        if coding == CODINGS["ccq"]:
            columns = Columns(
                card, kind, random, n
            )  # those of all experts: to find them takes long
            order = block_order(n)
            self._codes = np.tile(columns.codes[order], (experts, 1))
            self._exact = np.tile(columns.exact[order], (experts, 1))
            vectors = {"code_scale": columns.scale, "code_zp": columns.zero}
            proven = bool(columns.codes[:, 3].all())
        else:
            self._codes = self._exact = None
        self.integers: list[Array] = []
        """Of each expert: its weights without any scale."""
        self.matrices = np.stack(
            [self._fill(e, kind, coding, random, vectors) for e in range(experts)]
        )
        self.native = card.ExpertWeight(
            coding=coding, chunks=address(self._chunks), codes=address(self._codes),
            exact=address(self._exact), column_scale=address(self._scale), experts=experts,
            in_features=k, out_features=n, proven=proven,
        )  # fmt: skip

    def _fill(
        self,
        expert: int,
        kind: str,
        coding: int,
        random: np.random.Generator,
        vectors: dict[str, Array],
    ) -> Array:
        _, k, n = self.shape
        found = {**arrays(kind, random, k, n), **vectors}
        scale = found["super_scales" if vectors else "weight_scale"]
        self._scale[expert] = scale[block_order(n)]
        self.card.pack_expert(
            coding, address(found["quant_weight"]),
            address(found["weight_scale"]) if vectors else 0,
            address(self._chunks) + expert * self._each, k, n, 0,
        )  # fmt: skip
        ones = {"weight_scale": np.ones(n, np.float32)}
        if vectors:
            scales = np.full_like(found["weight_scale"], 0x11)
            ones = {"weight_scale": scales, "super_scales": np.ones(n, np.float32)}
        self.integers.append(matrix(kind, {**found, **ones}, k, n))
        return matrix(kind, found, k, n)

    def decoded(self, expert: int, scaled: bool) -> Array:
        """What the kernels make of one expert: float32 [K, N]."""
        out = memory(4 * self.matrices[expert].size).view(np.float32).reshape(self.shape[1:])
        self.card.unpack_expert(self.native, expert, scaled, address(out), 0)
        return out


class CheckpointWeight:
    """2-bit experts as a checkpoint has them: the arrays of each, with columns of its own.

    Attributes:
        native: What the kernels take.
        unproven: Columns that the fast decoder does not serve.
    """

    def __init__(self, card: ModuleType, experts: list[dict[str, Array]]) -> None:
        k, n = 4 * experts[0]["quant_weight"].shape[0], experts[0]["super_scales"].size
        each = -(-k // card.chunk_rows) * n // 16 * card.chunk_bytes(CODINGS["ccq"])
        order, unproven = block_order(n), np.zeros(1, np.int32)
        self._chunks = memory(len(experts) * each)
        self._scale = np.stack([found["super_scales"][order] for found in experts])
        self._exact = np.empty((len(experts), n, 2), np.float32)
        self._codes = np.empty((len(experts), n, 4), np.uint32)
        for i, found in enumerate(experts):
            self._exact[i, :, 0] = found["code_scale"][order]
            self._exact[i, :, 1] = (found["code_zp"] + np.float32(0.5))[order]
            codes, scales = map(
                np.ascontiguousarray, (found["quant_weight"], found["weight_scale"])
            )
            card.fit_columns(
                address(self._exact[i]), address(self._codes[i]), n, address(unproven), 0
            )
            card.pack_expert(
                CODINGS["ccq"], address(codes), address(scales),
                address(self._chunks) + i * each, k, n, 0,
            )  # fmt: skip
        self.unproven = int(unproven[0])
        self.native = card.ExpertWeight(
            coding=CODINGS["ccq"], chunks=address(self._chunks), codes=address(self._codes),
            exact=address(self._exact), column_scale=address(self._scale), experts=len(experts),
            in_features=k, out_features=n, proven=self.unproven == 0,
        )  # fmt: skip


class Batch:
    """Rows of x (bf16 bits), their experts and shares."""

    def __init__(self, x: Array, ids: Array, shares: Array) -> None:
        self.x = memory(x.nbytes).view(np.uint16).reshape(x.shape)
        self.x[...] = x
        self.ids, self.shares = np.ascontiguousarray(ids), np.ascontiguousarray(shares)

    @classmethod
    def random(
        cls, random: np.random.Generator, tokens: int, hidden: int, experts: int, top_k: int
    ) -> Batch:
        ids = np.argsort(random.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
        shares = random.dirichlet(np.ones(top_k), tokens).astype(np.float32)
        return cls(bf16_bits(random.standard_normal((tokens, hidden))), ids, shares)

    def rows(self, chosen: Any) -> Batch:
        return Batch(self.x[chosen], self.ids[chosen], self.shares[chosen])

    def expected(self, up: Weight, down: Weight) -> Array:
        """Float64 products and sums, rounded to bf16 where the kernels store."""
        x, out = widen(self.x).astype(np.float64), np.zeros(self.x.shape)
        for expert in np.unique(self.ids):
            tokens, slots = np.nonzero(self.ids == expert)
            gate, rest = np.split(x[tokens] @ up.matrices[expert], 2, axis=1)
            inner = widen(bf16_bits(gate / (1 + np.exp(-gate)) * rest)).astype(np.float64)
            rows = widen(bf16_bits(inner @ down.matrices[expert])).astype(np.float64)
            np.add.at(out, tokens, self.shares[tokens, slots, None] * rows)
        return out


class Experts:
    """One layer's experts, with the state that its calls leave at zero."""

    def __init__(self, card: ModuleType, up: Any, down: Any) -> None:
        """Args: up, down: a Weight or a CheckpointWeight each."""
        self.card, self.up, self.down = card, up, down
        self._states: dict[int, Array] = {}

    @classmethod
    def random(cls, card: ModuleType, kind: str, experts: int, hidden: int, inner: int) -> Experts:
        random = np.random.default_rng(experts + hidden)
        up = Weight(card, kind, random, hidden, 2 * inner, experts)
        return cls(card, up, Weight(card, kind, random, inner, hidden, experts))

    def serves(self, batch: Batch, path: int) -> bool:
        """Whether the card in use can take this way."""
        try:
            self.card.experts_bytes(self.up.native, self.down.native, *batch.ids.shape, path, True)
        except ValueError:
            return False
        return True

    def run(self, batch: Batch, path: int) -> Array:
        """Bits of the result, bf16 [tokens, hidden]."""
        sizes = batch.ids.shape
        weights = self.up.native, self.down.native
        memory_bytes, state_bytes = self.card.experts_bytes(*weights, *sizes, path, True)
        state = self._states.setdefault(state_bytes, memory(state_bytes, 0))
        scratch = memory(memory_bytes)
        out = memory(batch.x.nbytes).view(np.uint16).reshape(batch.x.shape)
        rows = address(batch.x), address(batch.ids), address(batch.shares)
        self.card.experts(
            *rows, *weights, address(out), *sizes, path, True, address(scratch), address(state), 0
        )
        assert not state.any(), "a call left counts behind"
        return out
