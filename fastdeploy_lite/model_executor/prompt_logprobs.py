"""Log-probabilities of prompt tokens, computed a few rows at a time.

A long chunk times a large vocabulary would be gigabytes of logits, so the head runs on pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.logprobs import select
from fastdeploy_lite.model_executor.workspace import Workspace
from fastdeploy_lite.request.step import LOWEST, SequenceSlice, TokenLogprobs

ROWS_AT_ONCE = 64


class PromptScorer:
    """Scores the prompt tokens of a slice from its hidden states."""

    def __init__(
        self,
        head: Callable[[Any, Workspace], Any],
        workspace: Workspace,
        as_logits: bool,
        keeps: bool = True,
    ) -> None:
        """Args: head: hidden [R, H] -> logits [R, V]; as_logits: report logits themselves;
        keeps: False where a rank only computes its share of another's logits."""
        self.keeps = keeps
        self.head = head
        self.workspace = workspace
        self.as_logits = as_logits

    def score(self, hidden: Any, first_row: int, part: SequenceSlice) -> list[TokenLogprobs]:
        """Return entries for prompt tokens `part.start + 1` onwards that this slice predicts.

        Args:
            hidden: final hidden states [T, H] of the step.
            first_row: row of the slice's first token in `hidden`.
            part: a slice whose request asks for prompt log-probabilities.
        """
        prompt = part.prompt_token_ids
        stop = min(part.start + len(part.token_ids), len(prompt) - 1)
        entries: list[TokenLogprobs] = []
        for begin in range(part.start, stop, ROWS_AT_ONCE):
            end = min(begin + ROWS_AT_ONCE, stop)
            row = first_row + begin - part.start
            targets = np.asarray(prompt[begin + 1 : end + 1], np.int32)
            logits = self.head(hidden[row : row + end - begin], self.workspace)
            if self.keeps:
                entries += self._entries(logits, targets, part.sampling.prompt_logprobs or 0)
        return entries

    def _entries(
        self, logits: Any, targets: npt.NDArray[np.int32], count: int
    ) -> list[TokenLogprobs]:
        if self.as_logits:
            rows = ops.download(logits)
            return [select(row, int(t), count) for row, t in zip(rows, targets, strict=True)]
        rows, vocab_size = logits.shape
        kept = vocab_size if count < 0 else count
        width = max(1, kept)
        get = self.workspace.get
        logprob, rank = (
            get("prompt_logprob", [rows], "float32"),
            get("prompt_rank", [rows], "int32"),
        )
        top_ids = get("prompt_top_ids", [rows, width], "int32")
        top_logprobs = get("prompt_top_logprobs", [rows, width], "float32")
        tokens = paddle.to_tensor(targets, place=self.workspace.place)
        ops.token_logprobs(logits, tokens, width, logprob, rank, top_ids, top_logprobs)
        columns = [
            np.maximum(ops.download(logprob), LOWEST).tolist(),
            ops.download(rank).tolist(),
            ops.download(top_ids)[:, :kept].tolist(),
            np.maximum(ops.download(top_logprobs), LOWEST)[:, :kept].tolist(),
        ]
        return [TokenLogprobs(*entry) for entry in zip(*columns, strict=True)]
