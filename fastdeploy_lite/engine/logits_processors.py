"""Logits processors named by `--logits-processors`, adapted to one request's row of logits.

A class of a user's own has upstream's interface: `__init__(config)`, `update_state(share_inputs)`,
`apply(logits) -> logits` with Paddle tensors. Here it is built once per request and sees a batch of
one, on the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
_UPSTREAM_HOMES = ("fastdeploy.", "fastdeploy_lite.")


class LogitsProcessors:
    """The configured classes.

    Args:
        config: Names the classes, and is passed to their constructors.

    Raises:
        ConfigError: A name is unknown or cannot be imported.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self._config = config
        names = (name for name in config.logits_processors if not _is_built_in(name))
        self._classes = [_load(name) for name in names]

    def for_request(self, request: EngineRequest) -> list[LogitsProcessor] | None:
        """Processors of one request; None when no class is configured."""
        if not self._classes:
            return None
        packed = request.sampling.logits_processors_args
        arguments = msgspec.msgpack.decode(packed) if packed else {}
        with _on_the_cpu():
            processors = [cls(self._config) for cls in self._classes]
        return [_adapt(processor, request, arguments) for processor in processors]


def _is_built_in(name: str) -> bool:
    """Whether a name, maybe with the package that upstream keeps it in, is one of `BUILT_IN`."""
    module, _, attribute = name.replace(":", ".").rpartition(".")
    return attribute in BUILT_IN and (not module or module.startswith(_UPSTREAM_HOMES))


def _load(name: str) -> Callable[[RuntimeConfig], Any]:
    module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not module or not attribute:
        raise ConfigError(
            f"logits_processors: {quote(name)} is unknown; use {', '.join(BUILT_IN)} or "
            "module.path:Class"
        )
    try:
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"logits_processors: cannot load {quote(name)}: {error}") from None


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    """Let tensors that a processor makes lie where its row of logits does."""
    import paddle  # noqa: PLC0415 - configuring needs no framework

    device = paddle.device.get_device()
    if device == "cpu":
        yield
        return
    paddle.device.set_device("cpu")
    try:
        yield
    finally:
        paddle.device.set_device(device)


def _adapt(processor: Any, request: EngineRequest, arguments: dict[str, Any]) -> LogitsProcessor:
    import paddle  # noqa: PLC0415 - as above

    def apply(
        output_token_ids: Sequence[int], row: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        with _on_the_cpu():
            processor.update_state(
                {
                    "stop_flags": paddle.to_tensor([False]),
                    "logits_processors_args": [arguments],
                    "prompt_ids": [list(request.prompt_token_ids)],
                    "token_ids": [list(output_token_ids)],
                    "step_idx": paddle.to_tensor([[len(output_token_ids)]]),
                    "req_ids": [request.request_id],
                }
            )
            result = processor.apply(paddle.to_tensor(row[None, :]))
        return np.asarray(result, np.float32).reshape(-1)

    return apply
