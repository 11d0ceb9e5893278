"""Sampling parameters by slot, gathered into the device tensors of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import is_
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.layers.sampler import SamplingTensors
from fastdeploy_lite.model_executor.static_buffers import PackedBuffer
from fastdeploy_lite.request.step import SampledPart, SamplerParams, SequenceSlice

_STEP_FIELDS = ("steps", "forced")  # the only ones that change from step to step
# Column of the table and the parameter in it, where their names differ.
_PARAMETERS = {
    "repetition": "repetition_penalty",
    "frequency": "frequency_penalty",
    "presence": "presence_penalty",
    "seeds": "seed",
}
_ROW_FIELDS = {
    **{name: dtype for name, dtype in ops.SAMPLE_ROWS.items() if name not in _STEP_FIELDS},
    **dict.fromkeys(("repetition", "frequency", "presence"), "float32"),
}
_NO_LOGPROBS = -2
Edits = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]
_NO_EDITS: Edits = (np.zeros(0, np.int32), np.zeros(0, np.float32))


def _ascending(ids: npt.NDArray[np.int32], values: npt.NDArray[np.float32]) -> Edits:
    """Edits by ascending id, those of one id in their order: what `ops.process_logits` takes."""
    order = np.argsort(ids, kind="stable")
    return ids[order], values[order]


class SamplingTable:
    """Parameters of all slots.

    They are written when a slot is fresh and gathered by numpy where other sequences sample than in
    the step before, so most steps only fill what changes with every token.

    Attributes:
        logprobs_width: most alternatives that any gathered slice wants per token; None when none
            reports.
    """

    def __init__(
        self, max_seqs: int, vocab_size: int, place: Any, max_rows: int | None = None
    ) -> None:
        """Args: max_seqs: slots; place: where the step's tensors live; max_rows: rows of logits in
        a step, one a slot by default."""
        self.max_seqs = max_seqs
        self.max_rows = max_rows or max_seqs
        self.vocab_size = vocab_size
        self.place = place
        self._columns = {name: np.zeros(max_seqs, dtype) for name, dtype in _ROW_FIELDS.items()}
        self._logprobs = np.full(max_seqs, _NO_LOGPROBS, np.int64)
        self._counts_tokens = np.zeros(max_seqs, np.bool_)
        self._edits: dict[int, Edits] = {}
        self._banned: dict[int, tuple[Edits, tuple[int, ...], Edits]] = {}
        self._uploaded: list[Edits] = []
        self._inputs = PackedBuffer(
            {
                "slots": ([self.max_rows], "int32"),
                **{name: ([self.max_rows], ops.SAMPLE_ROWS[name]) for name in _STEP_FIELDS},
                "edit_offsets": ([self.max_rows + 1], "int32"),
                **{name: ([self.max_rows], dtype) for name, dtype in _ROW_FIELDS.items()},
            },
            place,
        )
        self.logprobs_width: int | None = None
        self._gathered: list[int] = []  # slots whose parameters the inputs hold
        self._counts_any = self._scales_any = False
        self._tensors: dict[tuple[int, bool], SamplingTensors] = {}
        self._edit_buffer = self._new_edit_buffer(64)
        self._occurrences: Any | None = None
        self._guided: PackedBuffer | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of static buffers and of the occurrence table."""
        buffers = [self._inputs, self._edit_buffer, self._guided]
        total = sum(buffer.nbytes for buffer in buffers if buffer is not None)
        if self._occurrences is not None:
            total += self.max_seqs * self.vocab_size * 4
        return total

    def admit(self, part: SequenceSlice) -> None:
        """Rebuild the row of a fresh slot."""
        self._write_row(part.slot, part.sampling)
        if self._counts_tokens[part.slot]:
            self._rebuild_occurrences(part)

    def gather(self, slices: Sequence[SampledPart]) -> SamplingTensors:
        """Fill and upload the tensors of the slices that sample in this step."""
        slots = [part.slot for part in slices]
        if slots != self._gathered:
            self._gather_parameters(slots)
        host, count = self._inputs.host, len(slices)
        host["steps"][:count] = [part.step for part in slices]
        host["forced"][:count] = [part.forced_token for part in slices]
        self._fill_edits(slices)
        self._inputs.upload()
        return self._tensors_of(slices)

    @property
    def changes_logits(self) -> bool:
        """Whether bans, penalties or temperatures do anything in this step, after `gather`."""
        return self._counts_any or self._scales_any or bool(self._uploaded)

    def _write_row(self, slot: int, params: SamplerParams) -> None:
        self._gathered = []
        for name, column in self._columns.items():
            column[slot] = getattr(params, _PARAMETERS.get(name, name))
        self._logprobs[slot] = _NO_LOGPROBS if params.logprobs is None else params.logprobs
        self._counts_tokens[slot] = params.uses_penalties
        edits = self._edits_of(params)
        if edits is None:
            self._edits.pop(slot, None)
        else:
            self._edits[slot] = edits

    def _edits_of(self, params: SamplerParams) -> Edits | None:
        """Bias and bans as sparse additions; an id outside the vocabulary changes nothing."""
        bias = params.logit_bias or {}
        if not bias and not params.banned_ids:
            return None
        ids = np.array([*bias.keys(), *params.banned_ids], np.int64)
        values = np.array([*bias.values(), *([-np.inf] * len(params.banned_ids))], np.float32)
        inside = (ids >= 0) & (ids < self.vocab_size)
        return _ascending(ids[inside].astype(np.int32), values[inside])

    def _with_bans(self, slot: int, banned: tuple[int, ...]) -> Edits:
        """Edits of a slot and the bans of this step, the same arrays while neither changes."""
        edits = self._edits.get(slot, _NO_EDITS)
        if not banned:
            return edits
        known = self._banned.get(slot)
        if known is None or known[0] is not edits or known[1] != banned:
            ids = np.append(edits[0], np.array(banned, np.int32))
            values = np.append(edits[1], np.full(len(banned), -np.inf, np.float32))
            known = self._banned[slot] = (edits, banned, _ascending(ids, values))
        return known[2]

    def _rebuild_occurrences(self, part: SequenceSlice) -> None:
        """Count a sequence's history anew; a slot's row is stale from its previous owner."""
        place = self.place
        if self._occurrences is None:
            shape = [self.max_seqs, self.vocab_size]
            self._occurrences = ops.fix(paddle.empty(shape, dtype="int32", device=place))
        ops.upload(np.zeros(self.vocab_size, np.int32), self._occurrences[part.slot])
        for tokens, prompt in ((part.prompt_token_ids, True), (part.output_token_ids, False)):
            if len(tokens):
                slots = np.full(len(tokens), part.slot, np.int32)
                ops.update_occurrences(
                    self._occurrences,
                    paddle.to_tensor(slots, place=place),
                    paddle.to_tensor(np.asarray(tokens, np.int32), place=place),
                    prompt=prompt,
                )

    def _gather_parameters(self, slots: list[int]) -> None:
        host, count = self._inputs.host, len(slots)
        host["slots"][:count] = slots
        for name, column in self._columns.items():
            host[name][:count] = column[slots]
        wanted = self._logprobs[slots]
        self.logprobs_width = None
        if (wanted != _NO_LOGPROBS).any():
            self.logprobs_width = self.vocab_size if (wanted == -1).any() else int(wanted.max())
        temperature = host["temperature"][:count]
        self._scales_any = bool(((temperature != 0.0) & (temperature != 1.0)).any())
        self._counts_any = bool(self._counts_tokens[slots].any())
        self._gathered = slots

    def _fill_edits(self, slices: Sequence[SampledPart]) -> None:
        offsets = self._inputs.host["edit_offsets"]
        if not self._edits and not any(part.banned_now for part in slices):
            offsets[: len(slices) + 1] = 0
            self._uploaded = []
            return
        rows = [self._with_bans(part.slot, part.banned_now) for part in slices]
        offsets[0] = 0
        np.cumsum([len(ids) for ids, _ in rows], out=offsets[1 : len(rows) + 1])
        total = int(offsets[len(rows)])
        pieces = [row for row in rows if len(row[0])]
        same = len(pieces) == len(self._uploaded) and all(map(is_, pieces, self._uploaded))
        if same:
            return
        if total > len(self._edit_buffer.host["ids"]):
            self._edit_buffer = self._new_edit_buffer(2 * total)
        if pieces:
            np.concatenate([ids for ids, _ in pieces], out=self._edit_buffer.host["ids"][:total])
            np.concatenate([v for _, v in pieces], out=self._edit_buffer.host["values"][:total])
            self._edit_buffer.upload()
        self._uploaded = pieces

    def _tensors_of(self, slices: Sequence[SampledPart]) -> SamplingTensors:
        """The first rows of all inputs.

        They are kept: to slice a tensor takes 4 to 8 us, and a step needs all of them.
        """
        key = len(slices), self._counts_any
        found = self._tensors.get(key)
        if found is None:
            found = self._tensors[key] = self._new_tensors(*key)
        bitmask, bitmask_rows = self._upload_bitmasks(slices)
        if bitmask is None:
            return found
        return replace(found, bitmask=bitmask, bitmask_rows=bitmask_rows)

    def _new_tensors(self, count: int, counts_tokens: bool) -> SamplingTensors:
        device = self._inputs.device
        named = {name: ops.fix(tensor[:count]) for name, tensor in device.items()}
        named["edit_offsets"] = ops.fix(device["edit_offsets"][: count + 1])
        draw = {name: named.pop(name) for name in ops.SAMPLE_ROWS}
        return SamplingTensors(
            **named,
            draw=draw,
            edit_ids=self._edit_buffer.device["ids"],
            edit_values=self._edit_buffer.device["values"],
            occurrences=self._occurrences if counts_tokens else None,
        )

    def _upload_bitmasks(self, slices: Sequence[SampledPart]) -> tuple[Any | None, Any | None]:
        masks = [part.bitmask for part in slices if part.bitmask is not None]
        if not masks:
            return None, None
        if self._guided is None:
            words = -(-self.vocab_size // 32)
            fields = {"rows": ([self.max_rows], "int32"), "bits": ([self.max_rows, words], "int32")}
            self._guided = PackedBuffer(fields, self.place)
        host, device = self._guided.host, self._guided.device
        np.stack(masks, out=host["bits"][: len(masks)])
        guided = np.array([part.bitmask is not None for part in slices])
        host["rows"][: len(slices)] = np.where(guided, np.cumsum(guided) - 1, -1)
        self._guided.upload()
        return device["bits"], device["rows"][: len(slices)]

    def _new_edit_buffer(self, capacity: int) -> PackedBuffer:
        self._tensors.clear()  # they hold the old one
        fields = {"ids": ([capacity], "int32"), "values": ([capacity], "float32")}
        return PackedBuffer(fields, self.place)
