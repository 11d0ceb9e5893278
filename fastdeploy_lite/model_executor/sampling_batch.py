"""One step of sampling: rows of logits in, tokens and log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.config import LogprobsMode
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.layers import sampler
from fastdeploy_lite.model_executor.layers.sampler import SamplingTensors
from fastdeploy_lite.model_executor.logprobs import log_softmax, nucleus, select
from fastdeploy_lite.model_executor.sampling_table import SamplingTable
from fastdeploy_lite.model_executor.static_buffers import PackedBuffer
from fastdeploy_lite.model_executor.workspace import Workspace
from fastdeploy_lite.request.step import (
    LOWEST,
    NOT_NUMBERS,
    SampledPart,
    SamplerParams,
    TokenLogprobs,
)


@dataclass(slots=True)
class SampledRow:
    """Result of one row: a token, its log-probabilities if asked for, or an error."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class SamplingBatch:
    """Runs the sampler on the logits of a step and brings the results to the host in one copy."""

    def __init__(
        self,
        max_seqs: int,
        vocab_size: int,
        workspace: Workspace,
        logprobs_mode: LogprobsMode,
        max_rows: int | None = None,
    ) -> None:
        """Args: max_seqs: slots; logprobs_mode: what log-probabilities are taken of; max_rows: rows
        of logits in a step, one a slot by default."""
        self.max_rows = max_rows or max_seqs
        self.vocab_size = vocab_size
        self.workspace = workspace
        self.logprobs_mode = logprobs_mode
        self.table = SamplingTable(max_seqs, vocab_size, workspace.place, self.max_rows)
        self._all_rows = PackedBuffer({"rows": ([self.max_rows], "int32")}, workspace.place)
        self._all_rows.host["rows"][:] = np.arange(self.max_rows)
        self._all_rows.upload()
        self._alternatives = 1
        self._tokens: dict[int, Any] = {}  # views of the outputs by their number of rows
        self._outputs = self._new_outputs(self._alternatives)

    @property
    def nbytes(self) -> int:
        """Bytes of static buffers and of the occurrence table."""
        return self.table.nbytes + self._outputs.nbytes + self._all_rows.nbytes

    def sample(self, logits: Any, slices: Sequence[SampledPart]) -> list[SampledRow]:
        """Sample one token per slice.

        Args:
            logits: float32 [R, V], row i belongs to slices[i]; overwritten.
            slices: the slices that sample, their slots admitted to `table`; several of one slot
                where guesses are checked.

        Returns:
            One result per slice; a row that is not numbers gives an error and leaves the others.
        """
        rows = self.table.gather(slices)
        width = self.table.logprobs_width
        self._reserve(width or 1)
        sampler.mask_guided(logits, rows)
        source = logits
        if width is not None and self.logprobs_mode.startswith("raw"):
            source = self._copy(logits)
        errors = self._run_processors(logits, slices)
        if self.table.changes_logits:
            sampler.process(logits, rows)
        tokens = self._tokens_of(len(slices))
        self._draw(logits, rows, tokens, errors)
        if width is None:
            self._outputs.download("tokens")
            return self._results(slices, errors)
        self._take_logprobs(source, tokens, max(1, width))
        results = self._results(slices, errors)
        self._attach_logprobs(results, source, slices, max(1, width))
        return results

    def _tokens_of(self, count: int) -> Any:
        tokens = self._tokens.get(count)
        if tokens is None:
            tokens = self._tokens[count] = ops.fix(self._outputs.device["tokens"][:count])
        return tokens

    def _copy(self, logits: Any) -> Any:
        copy = self.workspace.get("raw_logits", logits.shape, "float32")
        ops.gather_rows(logits, self._all_rows.device["rows"][: logits.shape[0]], copy)
        return copy

    def _run_processors(self, logits: Any, slices: Sequence[SampledPart]) -> dict[int, str]:
        """Let custom processors edit their rows; one that fails spoils its own row only."""
        errors: dict[int, str] = {}
        for row, part in enumerate(slices):
            if not part.logits_processors:
                continue
            values = self._read_row(logits, row)
            try:
                for processor in part.logits_processors:
                    edited = processor(part.output_token_ids, values)
                    if edited is not None:
                        values[:] = edited
            except Exception as error:  # user code may raise anything
                errors[row] = f"logits processor failed: {type(error).__name__}: {error}"
                values[:] = 0.0
            self._write_back(logits, row, values)
        return errors

    def _draw(
        self, logits: Any, rows: SamplingTensors, tokens: Any, errors: dict[int, str]
    ) -> None:
        """Draw tokens; rows that are not numbers are blanked, noted and drawn again.

        On a card such rows come back as token -1 instead, which costs no extra wait.
        """
        try:
            sampler.draw(logits, rows, tokens)
        except ValueError:
            spoilt = self._blank_spoilt_rows(logits)
            if not spoilt:
                raise
            errors.update(dict.fromkeys(spoilt, NOT_NUMBERS))
            sampler.draw(logits, rows, tokens)

    def _blank_spoilt_rows(self, logits: Any) -> list[int]:
        spoilt = []
        for row in range(logits.shape[0]):
            values = self._read_row(logits, row)
            if not np.isfinite(values.max()):  # NaN wins a maximum; all -inf leaves nothing
                values[:] = 0.0
                self._write_back(logits, row, values)
                spoilt.append(row)
        return spoilt

    def _read_row(self, logits: Any, row: int) -> npt.NDArray[np.float32]:
        """Row as a writable array: the memory itself on the CPU, a copy on a card."""
        tensor = logits[row]
        if tensor.place.is_cpu_place():
            return ops.host_array(tensor)
        return np.array(ops.download(tensor))

    def _write_back(self, logits: Any, row: int, values: npt.NDArray[np.float32]) -> None:
        tensor = logits[row]
        if not tensor.place.is_cpu_place():
            ops.upload(values, tensor)

    def _reserve(self, width: int) -> None:
        if width > self._alternatives:
            self._outputs = self._new_outputs(width)  # first: there may be no memory for it
            self._alternatives = width

    def _new_outputs(self, alternatives: int) -> PackedBuffer:
        self._tokens.clear()
        count, most = self.max_rows, self.max_rows * alternatives
        fields = {
            "tokens": ([count], "int32"),
            "logprob": ([count], "float32"),
            "rank": ([count], "int32"),
            "top_ids": ([most], "int32"),
            "top_logprobs": ([most], "float32"),
        }
        return PackedBuffer(fields, self.workspace.place)

    def _take_logprobs(self, source: Any, tokens: Any, width: int) -> None:
        """Compute the log-probabilities of all rows, `width` alternatives each; download all."""
        count, device = tokens.shape[0], self._outputs.device
        ops.token_logprobs(
            source,
            tokens,
            width,
            device["logprob"][:count],
            device["rank"][:count],
            device["top_ids"][: count * width].view([count, width]),
            device["top_logprobs"][: count * width].view([count, width]),
        )
        self._outputs.download()

    def _results(self, slices: Sequence[SampledPart], errors: dict[int, str]) -> list[SampledRow]:
        tokens = self._outputs.host["tokens"][: len(slices)].tolist()
        results = [SampledRow(token) for token in tokens]
        if min(tokens) < 0:  # how a card reports a row that is not numbers
            errors.update((row, NOT_NUMBERS) for row, token in enumerate(tokens) if token < 0)
        for row, error in errors.items():
            results[row].error = error
        return results

    def _attach_logprobs(
        self, results: list[SampledRow], source: Any, slices: Sequence[SampledPart], width: int
    ) -> None:
        host, count = self._outputs.host, len(slices)
        logprob = np.maximum(host["logprob"][:count], LOWEST).tolist()
        rank = host["rank"][:count].tolist()
        top_ids = host["top_ids"][: count * width].reshape(count, width)
        top_logprobs = np.maximum(host["top_logprobs"][: count * width], LOWEST)
        top_logprobs = top_logprobs.reshape(count, width)
        for row, (part, result) in enumerate(zip(slices, results, strict=True)):
            wanted = part.sampling.logprobs
            if wanted is None or result.error is not None:
                continue
            if self._needs_host(part.sampling):
                result.logprobs = self._host_logprobs(source, row, part.sampling, result.token_id)
                continue
            kept = width if wanted < 0 else wanted
            result.logprobs = TokenLogprobs(
                logprob[row],
                rank[row],
                top_ids[row, :kept].tolist(),
                top_logprobs[row, :kept].tolist(),
            )

    def _needs_host(self, params: SamplerParams) -> bool:
        scaled = params.temp_scaled_logprobs and self.logprobs_mode.startswith("raw")
        return scaled or params.top_p_normalized_logprobs or self.logprobs_mode.endswith("_logits")

    def _host_logprobs(
        self, source: Any, row: int, params: SamplerParams, token: int
    ) -> TokenLogprobs:
        """The rare forms: logits instead of probabilities, temperature-scaled, nucleus only."""
        values = self._read_row(source, row).astype(np.float64)
        if params.temp_scaled_logprobs and self.logprobs_mode.startswith("raw"):
            values /= params.temperature or 1.0
        if self.logprobs_mode.endswith("_logprobs"):
            values = log_softmax(values)
            if params.top_p_normalized_logprobs and params.top_p != 1.0:
                values = nucleus(values, params.top_p)
        return select(values, token, params.logprobs or 0)
