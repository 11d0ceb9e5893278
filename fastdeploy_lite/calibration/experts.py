"""Routed experts of one layer under calibration: their tokens, moments, targets and outputs.

Two streams run side by side: the bf16 model's, and that of the model as quantised so far. An expert
is judged on the tokens that the quantised stream's router sends to it, and is asked to give what
the bf16 layer gives, so that it also makes up for what earlier layers lost:

* gate and up: W moves to the least-squares map from its inputs to the bf16 products;
* down: each expert in turn moves to the least-squares map from its activations to what is still
  missing of the bf16 stream after this layer.

Both moves are regularised towards W (`RIDGE`). Weights are then encoded under the moments of the
same inputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.quantization.products import HOST, Products

ArrayF32 = npt.NDArray[np.float32]
_Result = TypeVar("_Result")
RIDGE = 0.02
"""Share of the mean diagonal of the moments that holds a corrected weight to the original."""
ROWS_AT_ONCE = 16384
"""Tokens in one product: bounds what is held beside the streams."""
MIN_TOKENS_PER_ROW = 1.0
"""An expert with fewer tokens an input than this is encoded, but not corrected."""

Encode = Callable[[str, int, ArrayF32, ArrayF32], ArrayF32]
"""(linear, expert, weight [K, N], moments [K, K]) -> the weight that readers will see."""
Read = Callable[[str, int], ArrayF32]
"""(linear, expert) -> the bf16 weight as float32 [K, N]."""


@dataclass(frozen=True)
class Routed:
    """Tokens of one expert: their rows in the stream, and the router's weights."""

    rows: npt.NDArray[np.intp]
    weights: ArrayF32

    def __len__(self) -> int:
        return len(self.rows)


def group_by_expert(experts: npt.NDArray[np.int32], weights: ArrayF32, count: int) -> list[Routed]:
    """Tokens of each of `count` experts, in the order of the text."""
    found = []
    for expert in range(count):
        rows, slots = np.nonzero(experts == expert)
        found.append(Routed(rows, weights[rows, slots]))
    return found


def add_outputs(
    out: ArrayF32,
    x: ArrayF32,
    routed: Sequence[Routed],
    read: Read,
    products: Products = HOST,
) -> None:
    """Add the weighted outputs of all experts on `x` [T, H] to `out` [T, H]."""

    def both(expert: int) -> tuple[ArrayF32, ArrayF32]:
        return read("up_gate_proj", expert), read("down_proj", expert)

    for tokens, (up_gate, down) in zip(
        routed, in_order(both, len(routed), products.workers), strict=True
    ):
        for at in range(0, len(tokens), ROWS_AT_ONCE):
            rows = tokens.rows[at : at + ROWS_AT_ONCE]
            scale = tokens.weights[at : at + ROWS_AT_ONCE].astype(np.float32)
            out[rows] += products.outputs(x[rows], up_gate, scale, down)


def in_order(work: Callable[[int], _Result], count: int, workers: int) -> Iterator[_Result]:
    """work(0), work(1) ... in order, as many of them under way at once as there are workers."""
    if workers == 1:
        yield from map(work, range(count))
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[_Result]] = deque()
        for index in range(count):
            waiting.append(pool.submit(work, index))
            if len(waiting) == workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class LayerEncoding:
    """Encodes the routed experts of one layer.

    `target` becomes what is missing of the bf16 layer's output once everything is encoded.
    """

    def __init__(
        self,
        x: ArrayF32,
        reference_x: ArrayF32,
        target: ArrayF32,
        routed: Sequence[Routed],
        read: Read,
        encode: Encode,
        correct: bool,
        products: Products,
    ) -> None:
        """Prepare the layer.

        Args:
            x, reference_x: [T, H], MLP input of the quantised and of the bf16 stream.
            target: [T, H], what the routed experts should add; changed in place.
            routed: tokens of every expert, by the quantised stream's router.
            read: bf16 weights.
            encode: makes and keeps the quantised form.
            correct: whether weights move to make up for errors before them.
            products: takes the products of whole matrices.
        """
        self.x, self.reference_x, self.target = x, reference_x, target
        self.routed, self._read, self._encode, self._correct = routed, read, encode, correct
        self._products = products
        self._activations: list[ArrayF32] = []

    def run(self) -> None:
        """Encode gate and up of all experts, then down of all experts."""
        products, count = self._products, len(self.routed)
        pooled = products.second_moment(self.x)

        def up_gate(expert: int) -> tuple[ArrayF32, ArrayF32]:
            tokens, weight = self.routed[expert], self._up_gate(expert, pooled)
            found = products.activations(self.x[tokens.rows], weight, tokens.weights)
            return found, products.second_moment(found)

        pairs = list(in_order(up_gate, count, products.workers))
        self._activations = [activations for activations, _ in pairs]
        moments = [moment for _, moment in pairs]
        down = [self._read("down_proj", expert) for expert in range(count)]
        for expert, weight in enumerate(down):
            self._subtract(expert, weight)
        if self._correct:
            for expert in range(count):
                down[expert] = self._corrected_down(expert, down[expert], moments[expert])
        everything = np.sum(moments, axis=0)
        total = sum(map(len, self.routed))

        def encoded(expert: int) -> ArrayF32:
            own = products.blend(moments[expert], len(self.routed[expert]), everything, total)
            return self._encode("down_proj", expert, down[expert], own) - down[expert]

        for expert, step in enumerate(in_order(encoded, count, products.workers)):
            self._subtract(expert, step)

    def _up_gate(self, expert: int, pooled: ArrayF32) -> ArrayF32:
        tokens = self.routed[expert]
        weight = self._read("up_gate_proj", expert)
        part = self.x[tokens.rows]
        moments = self._products.second_moment(part, tokens.weights)
        if self._can_correct(expert, weight):
            drift = (self.reference_x[tokens.rows] - part) * np.square(tokens.weights)[:, None]
            wanted = self._products.multiply(self._products.cross_moment(part, drift), weight)
            weight = weight + self._products.ridge(moments, wanted, RIDGE)
        # Weighted by the router, moments are of another size than those of all tokens.
        share = float(np.square(tokens.weights).sum()) if len(tokens) else 0.0
        own = moments * np.float32(len(tokens) / share) if share > 0 else moments
        blended = self._products.blend(own, len(tokens), pooled, len(self.x))
        return self._encode("up_gate_proj", expert, weight, blended)

    def _corrected_down(self, expert: int, weight: ArrayF32, moments: ArrayF32) -> ArrayF32:
        if not self._can_correct(expert, weight):
            return weight
        missing = self._products.cross_moment(
            self._activations[expert], self.target[self.routed[expert].rows]
        )
        step = self._products.ridge(moments, missing, RIDGE)
        self._subtract(expert, step)
        return weight + step

    def _can_correct(self, expert: int, weight: ArrayF32) -> bool:
        return self._correct and len(self.routed[expert]) >= MIN_TOKENS_PER_ROW * len(weight)

    def _subtract(self, expert: int, weight: ArrayF32) -> None:
        """Take what `weight` gives off the target."""
        given = self._products.multiply(self._activations[expert], weight)
        self.target[self.routed[expert].rows] -= given
