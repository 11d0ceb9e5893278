"""The interface of logits processors, at upstream's import path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from fastdeploy_lite.config import FDConfig


class LogitsProcessor(ABC):
    """Edits the logits of each step; named by `--logits-processors module.path:Class`.

    Args:
        fd_config: Of the engine.
    """

    def __init__(self, fd_config: FDConfig) -> None:
        raise NotImplementedError

    @abstractmethod
    def update_state(self, share_inputs: dict[str, Any]) -> None:
        """Take the step's state in.

        Args:
            share_inputs: By slot: `stop_flags` (bool tensor [1]), `logits_processors_args` (the
                request's), `prompt_ids`, `token_ids` (the answer's), `step_idx` (tensor [1, 1]).
        """

    @abstractmethod
    def apply(self, logits: Any) -> Any:
        """Return the logits to sample from, float32 [1, V]; the argument may be changed."""
