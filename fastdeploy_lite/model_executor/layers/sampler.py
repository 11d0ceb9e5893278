"""From logits to tokens on the device, in the order that FastDeploy documents.

guided mask -> raw log-probabilities -> custom processors -> bans and bias -> repetition, frequency,
presence -> temperature -> processed log-probabilities -> filters and draw of `ops.sample`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastdeploy_lite.model_executor import ops


@dataclass(frozen=True)
class SamplingTensors:
    """Per-row device tensors of one step; R rows.

    Attributes:
        slots: int32 [R], row of `occurrences`.
        repetition, frequency, presence: float32 [R].
        draw: what `ops.sample` takes by name, see `ops.SAMPLE_ROWS`.
        edit_offsets: int32 [R + 1] into the two below.
        edit_ids, edit_values: int32 and float32 [n], added to the logits of their row.
        occurrences: int32 [slots, V], None while no request counts tokens.
        bitmask, bitmask_rows: int32 [M, ceil(V / 32)] and int32 [R], None without guided rows.
    """

    slots: Any
    repetition: Any
    frequency: Any
    presence: Any
    draw: dict[str, Any]
    edit_offsets: Any
    edit_ids: Any
    edit_values: Any
    occurrences: Any | None = None
    bitmask: Any | None = None
    bitmask_rows: Any | None = None


def mask_guided(logits: Any, rows: SamplingTensors) -> None:
    """Set what the grammars forbid to -inf, in place."""
    if rows.bitmask is not None:
        ops.mask_logits(logits, rows.bitmask, rows.bitmask_rows)


def process(logits: Any, rows: SamplingTensors) -> None:
    """Apply bans, bias, penalties and temperature to float32 logits [R, V], in place."""
    ops.process_logits(
        logits,
        rows.slots,
        rows.occurrences,
        rows.repetition,
        rows.frequency,
        rows.presence,
        rows.draw["temperature"],
        rows.edit_offsets,
        rows.edit_ids,
        rows.edit_values,
    )


def draw(logits: Any, rows: SamplingTensors, out: Any) -> None:
    """Write one token id per row to int32 `out` [R] and count it where tokens are counted."""
    ops.sample(logits, **rows.draw, out=out)
    if rows.occurrences is not None:
        ops.update_occurrences(rows.occurrences, rows.slots, out, prompt=False)
