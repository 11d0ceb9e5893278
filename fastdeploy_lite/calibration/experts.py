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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.quantization import hessian

ArrayF32 = npt.NDArray[np.float32]
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


def swiglu(both: ArrayF32) -> ArrayF32:
    """silu(gate) * up of [T, 2 I], the gate first."""
    half = both.shape[1] // 2
    gate = both[:, :half]
    with np.errstate(over="ignore"):  # e^-x of a very negative gate: the quotient is then 0
        result: ArrayF32 = gate / (1 + np.exp(-gate)) * both[:, half:]
    return result


def add_outputs(
    out: ArrayF32, x: ArrayF32, routed: Sequence[Routed], read: Read, sign: float = 1.0
) -> None:
    """Add the weighted outputs of all experts on `x` [T, H] to `out` [T, H]."""
    for expert, tokens in enumerate(routed):
        up_gate, down = read("up_gate_proj", expert), read("down_proj", expert)
        for at in range(0, len(tokens), ROWS_AT_ONCE):
            rows = tokens.rows[at : at + ROWS_AT_ONCE]
            scale = sign * tokens.weights[at : at + ROWS_AT_ONCE, None]
            out[rows] += (swiglu(x[rows] @ up_gate) * scale.astype(np.float32)) @ down


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
    ) -> None:
        """Prepare the layer.

        Args:
            x, reference_x: [T, H], MLP input of the quantised and of the bf16 stream.
            target: [T, H], what the routed experts should add; changed in place.
            routed: tokens of every expert, by the quantised stream's router.
            read: bf16 weights.
            encode: makes and keeps the quantised form.
            correct: whether weights move to make up for errors before them.
        """
        self.x, self.reference_x, self.target = x, reference_x, target
        self.routed, self._read, self._encode, self._correct = routed, read, encode, correct
        self._activations: list[ArrayF32] = []

    def run(self) -> None:
        """Encode gate and up of all experts, then down of all experts."""
        pooled = hessian.second_moment(self.x)
        up_gate = [self._up_gate(expert, pooled) for expert in range(len(self.routed))]
        self._activations = [
            swiglu(self.x[tokens.rows] @ weight) * tokens.weights[:, None]
            for tokens, weight in zip(self.routed, up_gate, strict=True)
        ]
        moments = [hessian.second_moment(part) for part in self._activations]
        down = [self._read("down_proj", expert) for expert in range(len(self.routed))]
        for expert, weight in enumerate(down):
            self._subtract(expert, weight)
        if self._correct:
            for expert in range(len(self.routed)):
                down[expert] = self._corrected_down(expert, down[expert], moments[expert])
        everything = np.sum(moments, axis=0)
        total = sum(map(len, self.routed))
        for expert, weight in enumerate(down):
            blended = hessian.blend(moments[expert], len(self.routed[expert]), everything, total)
            self._subtract(expert, self._encode("down_proj", expert, weight, blended) - weight)

    def _up_gate(self, expert: int, pooled: ArrayF32) -> ArrayF32:
        tokens = self.routed[expert]
        weight = self._read("up_gate_proj", expert)
        part = self.x[tokens.rows]
        moments = hessian.second_moment(part, tokens.weights)
        if self._can_correct(expert, weight):
            drift = (self.reference_x[tokens.rows] - part) * np.square(tokens.weights)[:, None]
            weight = weight + ridge(moments, (part.T @ drift) @ weight)
        # Weighted by the router, moments are of another size than those of all tokens.
        share = float(np.square(tokens.weights).sum()) if len(tokens) else 0.0
        own = moments * np.float32(len(tokens) / share) if share > 0 else moments
        blended = hessian.blend(own, len(tokens), pooled, len(self.x))
        return self._encode("up_gate_proj", expert, weight, blended)

    def _corrected_down(self, expert: int, weight: ArrayF32, moments: ArrayF32) -> ArrayF32:
        if not self._can_correct(expert, weight):
            return weight
        missing = self._activations[expert].T @ self.target[self.routed[expert].rows]
        step = ridge(moments, missing)
        self._subtract(expert, step)
        return weight + step

    def _can_correct(self, expert: int, weight: ArrayF32) -> bool:
        return self._correct and len(self.routed[expert]) >= MIN_TOKENS_PER_ROW * len(weight)

    def _subtract(self, expert: int, weight: ArrayF32) -> None:
        """Take what `weight` gives off the target."""
        self.target[self.routed[expert].rows] -= self._activations[expert] @ weight


def ridge(moments: ArrayF32, cross: ArrayF32) -> ArrayF32:
    """Least-squares change (M + RIDGE mean(M) 1)^-1 cross; zero where nothing was seen."""
    mean = float(np.trace(moments, dtype=np.float64)) / len(moments)
    if mean <= 0:
        return np.zeros_like(cross)
    damped = moments.astype(np.float64)
    damped[np.diag_indices(len(damped))] += RIDGE * mean
    solved: Any = np.linalg.solve(damped, cross.astype(np.float64))
    return np.asarray(solved, np.float32)
