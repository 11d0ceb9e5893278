"""In which row order the 2-bit experts of a checkpoint are stored, told from the weights.

Two generations of files exist whose names, shapes and config are equal (formats.ccq, RowOrder).
What tells them apart is training: a channel between the two halves of an expert that has large gate
and up columns has a large row of down, too. So the rank correlation of these sizes over an expert's
channels is clearly positive in the right order of down's rows and near zero in the other.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import formats
from fastdeploy_lite.checkpoint import inventory
from fastdeploy_lite.checkpoint.reader import Checkpoint
from fastdeploy_lite.formats import Arrays, ccq
from fastdeploy_lite.formats.ccq import RowOrder, to_true_order
from fastdeploy_lite.models.linear import Linear
from fastdeploy_lite.utils.arrays import Array

log = logging.getLogger(__name__)

WantedOrder: TypeAlias = Literal["auto", "natural", "permuted"]
NO_EXPERTS = "no 2-bit experts"
OPTION = "--wint2-row-order natural|permuted"
DECISIVE = 5.0
"""Standard errors that the two orders must be apart. Without any information in the weights their
distance is normally distributed, so each look errs with probability 5.7e-7."""
ROUNDS = (16, 32, 64)
"""Experts after which the sample is looked at; three looks err with probability below 2e-6."""
ERROR_PROBABILITY = len(ROUNDS) * math.erfc(DECISIVE / math.sqrt(2))
_MOST_MEASURED = 1024
"""Rows or columns from which a size is measured: its relative error is then 2 %."""

Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """What a sample of experts says.

    Attributes:
        experts: their number.
        natural, permuted: mean rank correlation in each order.
        distance: of the two in standard errors, positive for natural.
    """

    experts: int
    natural: float
    permuted: float
    distance: float

    @property
    def order(self) -> RowOrder | None:
        """The order that the weights show, None where they show none."""
        if abs(self.distance) < DECISIVE:
            return None
        return "natural" if self.distance > 0 else "permuted"

    def __str__(self) -> str:
        return (
            f"down rows follow gate and up columns by {self.natural:.3f} in natural and"
            f" {self.permuted:.3f} in permuted order ({self.experts} experts,"
            f" {abs(self.distance):.1f} standard errors apart)"
        )


@dataclass(frozen=True)
class Decision:
    """Which order is taken and why; `order` None where nothing decides.

    `warning` says that the weights look otherwise.
    """

    order: RowOrder | None
    reason: str
    warning: str | None = None

    def describe(self) -> str:
        """Return the start-up line, "" where there is nothing to decide."""
        if self.reason == NO_EXPERTS:
            return ""
        warned = f"; WARNING: {self.warning}" if self.warning else ""
        return f"{self.order} order, {self.reason}{warned}"


def decide(
    checkpoint: Checkpoint, wanted: WantedOrder = "auto", doubts_key: bool = False
) -> Decision:
    """Decide by the option, else by config.json's key, else by the weights.

    Where there is a key, the weights are looked at only if it is doubted: `quantize` writes it.
    """
    linears = list(first_halves(checkpoint))
    if not linears:
        return Decision("natural", NO_EXPERTS)
    configured = checkpoint.config.quantization
    written = None if configured is None else configured.row_order
    taken = written if wanted == "auto" else wanted
    reason = "by config.json" if wanted == "auto" else "as asked"
    if taken is not None and written is not None and not doubts_key:
        told = f"2-bit rows are read in {taken} order, but config.json says {written}"
        return Decision(taken, reason, None if taken == written else told)
    found = measure(checkpoint, linears)
    if taken is not None:
        return Decision(taken, reason, _contradiction(taken, found))
    if found.order is None:
        return Decision(None, f"the weights do not tell: {found}")
    return Decision(found.order, f"by the weights: {found}")


def measure(checkpoint: Checkpoint, linears: list[Linear] | None = None, seed: int = 0) -> Evidence:
    """Sample experts of all layers until they decide, at most 64."""
    candidates = list(first_halves(checkpoint)) if linears is None else linears
    chosen = np.random.default_rng(seed).permutation(len(candidates))
    found: list[tuple[float, float, int]] = []
    evidence = Evidence(0, 0.0, 0.0, 0.0)
    for stop in ROUNDS:
        sample = [candidates[int(index)] for index in chosen[len(found) : stop]]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            arrays = (expert_arrays(checkpoint, linear) for linear in sample)
            found += pool.map(lambda pair: expert_correlations(*pair), arrays)
        checkpoint.release()
        evidence = weigh(found)
        if evidence.order is not None or len(found) == len(candidates):
            break
    return evidence


def weigh(found: list[tuple[float, float, int]]) -> Evidence:
    """Combine (natural, permuted, channels) of several experts."""
    table = np.array(found, np.float64).reshape(-1, 3)
    # Under independence a rank correlation over n channels has variance 1 / (n - 1).
    error = math.sqrt(float((2 / (table[:, 2] - 1)).sum())) or 1.0
    natural, permuted = table[:, 0].mean(), table[:, 1].mean()
    distance = float((table[:, 0] - table[:, 1]).sum()) / error
    return Evidence(len(table), float(natural), float(permuted), distance)


def expert_correlations(up_gate: Arrays, down: Arrays) -> tuple[float, float, int]:
    """Rank correlation of down's rows with gate times up, in either order; and the channels.

    Args:
        up_gate, down: CCQ arrays [H, 2 I] and [I, H] of one expert, as stored.
    """
    columns = _column_sizes(up_gate)
    half = columns.shape[0] // 2
    wanted = _ranks(columns[:half] * columns[half:])
    rows = _row_sizes(down)
    natural = _correlation(_ranks(rows), wanted)
    permuted = _correlation(_ranks(to_true_order(rows, "permuted")), wanted)
    return natural, permuted, half


def _column_sizes(arrays: Arrays) -> Floats:
    """Root mean square of the columns [N], from some of the rows."""
    rows = arrays["weight_scale"].shape[0] * 128
    if rows > _MOST_MEASURED:
        start = (rows - _MOST_MEASURED) // 256 * 128
        arrays = formats.get("ccq").slice_rows(arrays, start, start + _MOST_MEASURED)
    codes, local, scale = _codes(arrays)
    sums = _squares().sum(axis=0, dtype=np.int16)[codes]
    groups = sums.reshape(len(local), -1, len(scale)).sum(axis=1, dtype=np.int64)
    mean = (groups * np.square(local, dtype=np.int64)).sum(axis=0) / (4 * len(codes))
    result: Floats = np.sqrt(mean) * scale
    return result


def _row_sizes(arrays: Arrays) -> Floats:
    """Root mean square of the stored rows [K], from some of the columns."""
    if arrays["super_scales"].shape[0] > _MOST_MEASURED:
        arrays = formats.get("ccq").slice_columns(arrays, [(0, _MOST_MEASURED)])
    codes, local, scale = _codes(arrays)
    worth = np.square(local * scale)[:, :, None]  # [K / 64, N, 1]
    grouped = codes.reshape(len(local), -1, len(scale))
    sums = [squares[grouped] @ worth for squares in _squares()]
    result: Floats = np.sqrt(np.stack(sums, axis=2).ravel() / len(scale))
    return result


@functools.cache
def _squares() -> npt.NDArray[np.int16]:
    """Square of each of the four integers that a 15-bit code stands for, [4, 32768].

    Looking squares up takes a fraction of the time that decoding the weights does.
    """
    values = ccq.code_values(np.arange(ccq.CODE_MASK + 1)).astype(np.int16)
    return np.ascontiguousarray((values * values).T)


def _codes(arrays: Arrays) -> tuple[Array, Array, Floats]:
    """15-bit codes [K / 4, N], local scales [K / 64, N] and super scales [N]."""
    codes = ccq.decode_codes(arrays["quant_weight"], arrays["code_scale"], arrays["code_zp"])
    local = ccq.unpack_local_scale(arrays["weight_scale"])
    return codes & ccq.CODE_MASK, local, arrays["super_scales"].astype(np.float64)


def _ranks(values: Floats) -> Floats:
    """Ranks 0 .. n - 1, equal values in the middle of theirs."""
    ordered = np.sort(values)
    first, last = np.searchsorted(ordered, values), np.searchsorted(ordered, values, "right")
    return (first + last - 1) / 2


def _correlation(a: Floats, b: Floats) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if size else 0.0


def first_halves(checkpoint: Checkpoint) -> Iterator[Linear]:
    """The up_gate_proj of every 2-bit expert."""
    for linear in inventory.rank_linears(checkpoint):
        if linear.expert is None or linear.role != "up_gate_proj":
            continue
        if inventory.resolve_kind(checkpoint, linear) == "ccq":
            yield linear


def expert_arrays(checkpoint: Checkpoint, linear: Linear) -> tuple[Arrays, Arrays]:
    """CCQ arrays, as stored, of an expert's up_gate_proj `linear` and of its down_proj."""
    down = inventory.other_half(checkpoint, linear)
    up_gate, below = (inventory.read_linear(checkpoint, one) for one in (linear, down))
    return up_gate.arrays, below.arrays


def _contradiction(taken: RowOrder, found: Evidence) -> str | None:
    if found.order in (None, taken):
        return None
    return f"2-bit rows are read in {taken} order, but look {found.order}: {found}"
