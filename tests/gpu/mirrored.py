"""Experts whose outputs show every bit of their products.

An output is rounded to bf16, which would hide most of what a sum of float32 may do wrong. So the
second half of a row of x is the first one with its sign turned, and every second column has the
same weights in both halves: all that is left of its sum is what was rounded on the way, and what
is rounded otherwise changes it altogether. The gate of every inner column is 512, from a group of
K of its own: silu leaves it as it is, so that no exponential function needs to be known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cards
import matrices
import numpy as np
from oracles.digit_product import digit_product, fused_multiply_add

from fastdeploy_lite.quantization import ccq

Arrays = dict[str, np.ndarray[Any, Any]]
ROWS = ccq.ROWS_PER_SCALE_BYTE
GATE = 512
GATE_X = 64
LARGEST_CODE = ccq.CODE_MASK  # all four fields are 63


def product(x: np.ndarray, weight: Arrays) -> np.ndarray:
    """The oracle's, of one expert's arrays: float32 [T, N]."""
    codes = ccq.decode_codes(*(weight[n] for n in ("quant_weight", "code_scale", "code_zp")))
    fields = (ccq.code_values(codes) + ccq.FIELD_OFFSET).transpose(0, 2, 1)
    return digit_product(
        x,
        fields.reshape(-1, fields.shape[2]).astype(np.uint8),
        ccq.unpack_local_scale(weight["weight_scale"]),
        weight["super_scales"],
    )


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up in float32: what a card gives for gates from 20 on, else nearly."""
    with np.errstate(over="ignore"):
        return gate / (np.float32(1) + np.exp(-gate)) * up


@dataclass(frozen=True)
class Layer:
    """Arrays of each expert: up_gate [hidden, 2 * inner], down [inner, hidden]."""

    up: list[Arrays]
    down: list[Arrays]

    def outputs(self, x: np.ndarray, ids: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """What the card's layer must give for bf16 rows x [T, hidden]: bf16 as float32."""
        slots = np.empty((*ids.shape, self.down[0]["super_scales"].size), np.float32)
        for expert in np.unique(ids):
            tokens, places = np.nonzero(ids == expert)
            inner = swiglu(*np.split(product(x[tokens], self.up[expert]), 2, axis=1))
            values = product(cards.round_bf16(inner), self.down[expert])
            slots[tokens, places] = cards.round_bf16(values)
        total = np.zeros(slots[:, 0].shape, np.float32)
        for j in range(ids.shape[1]):
            total = fused_multiply_add(shares[:, j, None], slots[:, j], total)
        return cards.round_bf16(total)


def random_layer(
    kind: str, random: np.random.Generator, experts: int, hidden: int, inner: int
) -> Layer:
    """Any weights of a kind of matrices.make."""
    return Layer(
        [matrices.arrays(kind, random, hidden, 2 * inner) for _ in range(experts)],
        [matrices.arrays(kind, random, inner, hidden) for _ in range(experts)],
    )


def mirrored_layer(
    kind: str, random: np.random.Generator, experts: int, hidden: int, inner: int
) -> Layer:
    """Weights for rows of mirrored_rows; hidden - 128 and inner are multiples of 256, and from 1024
    on there are groups enough for sums that are not exact."""
    layer = random_layer(kind, random, experts, hidden, inner)
    for up, down in zip(layer.up, layer.down, strict=True):
        _repeat_rows(up, hidden - ROWS)
        up["weight_scale"][-1, inner::2] = 0  # no gate in those columns
        up["super_scales"][inner:] *= np.exp2(random.integers(-8, 9, inner // 64)).repeat(64)
        for weight, first in ((up, inner), (down, 0)):  # large sums, in mirrored columns and others
            weight["code_scale"][first::17], weight["code_zp"][first::17] = 0, LARGEST_CODE
        _turn_columns(up, inner)
        _set_gates(up, inner)
        _repeat_rows(down, inner)
    return layer


def mirrored_rows(random: np.random.Generator, tokens: int, hidden: int) -> np.ndarray:
    """bf16 rows [tokens, hidden]: groups of zeros, of one sign and of magnitudes that no float32
    holds together, tails, largest values that are cut; and rows of magnitudes far apart."""
    half = random.standard_normal((tokens, (hidden - ROWS) // 2 // ccq.GROUP_ROWS, ccq.GROUP_ROWS))
    half *= np.exp2(random.integers(-8, 9, (*half.shape[:2], 1)))
    half *= np.exp2(random.integers(0, 12, half.shape) * (random.random(half.shape) < 0.05))
    half *= random.random((*half.shape[:2], 1)) < 0.9
    half = np.where(random.random((*half.shape[:2], 1)) < 0.2, np.abs(half), half)
    top = np.abs(half).max(axis=2)
    cut = np.ldexp(255 / 128, np.frexp(top)[1])
    half[:, :, 4] = np.where(random.random(top.shape) < 0.1, cut, half[:, :, 4])
    half *= np.exp2(np.array([0, 3, -30, 40, -110, 20])[np.arange(tokens) % 6, None, None])
    half = half.reshape(tokens, -1)
    gate = np.zeros((tokens, ROWS))
    gate[:, 0] = GATE_X
    return cards.round_bf16(np.concatenate([half, -half, gate], axis=1))


def _repeat_rows(weight: Arrays, rows: int) -> None:
    """The first half of so many rows again in the second, for every second column."""
    for name, unit in (("quant_weight", ccq.WEIGHTS_PER_BYTE), ("weight_scale", ROWS)):
        half = rows // 2 // unit
        weight[name][half : 2 * half, ::2] = weight[name][:half, ::2]


def _turn_columns(up: Arrays, inner: int) -> None:
    """The second half of the columns is the first with its sign turned: mirrored rows for down."""
    for array in up.values():
        array[..., inner + inner // 2 :] = array[..., inner : inner + inner // 2]
    up["super_scales"][inner + inner // 2 :] *= -1


def _set_gates(up: Arrays, inner: int) -> None:
    """Gates of GATE, to its last bit or two, for rows whose last two groups begin with GATE_X."""
    values = ccq.code_values(ccq.codebook(up["code_scale"], up["code_zp"]))[:, :inner, 0]
    chosen, columns = np.abs(values).argmax(axis=0), np.arange(inner)
    up["weight_scale"][:, :inner] = 0
    up["weight_scale"][-1, :inner] = 0x10  # 1 for the even group
    up["quant_weight"][-ROWS // ccq.WEIGHTS_PER_BYTE, :inner] = chosen
    up["super_scales"][:inner] = GATE / GATE_X / values[chosen, columns]
