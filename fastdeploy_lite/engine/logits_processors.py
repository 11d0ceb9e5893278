"""Logits processors named by `--logits-processors`, adapted to one request's row of logits.

A class of a user's own has upstream's interface: `__init__(config)`, `update_state(share_inputs)`,
`apply(logits) -> logits`. Here it is built once per request and sees a batch of one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.request.messages import EngineRequest
from fastdeploy_lite.request.step import LogitsProcessor
from fastdeploy_lite.utils.errors import ConfigError, quote

# What they do is part of sampling (logit_bias) and of generation (thinking budget) anyway.
BUILT_IN = ("LogitBiasLogitsProcessor", "ThinkingBudgetLogitsProcessor")


class LogitsProcessors:
    """The configured classes.

    Args:
        config: Names the classes, and is passed to their constructors.

    Raises:
        ConfigError: A name is unknown or cannot be imported.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self._config = config
        names = (name for name in config.logits_processors if name not in BUILT_IN)
        self._classes = [_load(name) for name in names]

    def for_request(self, request: EngineRequest) -> list[LogitsProcessor] | None:
        """Processors of one request; None when no class is configured."""
        if not self._classes:
            return None
        packed = request.sampling.logits_processors_args
        arguments = msgspec.msgpack.decode(packed) if packed else {}
        return [_adapt(cls(self._config), request, arguments) for cls in self._classes]


def _load(name: str) -> Callable[[RuntimeConfig], Any]:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"logits_processors: {quote(name)} is unknown; use {', '.join(BUILT_IN)} or "
            "module.path:Class"
        )
    try:
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"logits_processors: cannot load {quote(name)}: {error}") from None


def _adapt(processor: Any, request: EngineRequest, arguments: dict[str, Any]) -> LogitsProcessor:
    def apply(
        output_token_ids: Sequence[int], row: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        processor.update_state(
            {
                "stop_flags": [[False]],
                "logits_processors_args": [arguments],
                "prompt_ids": [request.prompt_token_ids],
                "token_ids": [list(output_token_ids)],
                "step_idx": [[len(output_token_ids)]],
            }
        )
        return np.asarray(processor.apply(row[None, :]), np.float32).reshape(-1)

    return apply
