"""The engine of a server for programs that bring their own event loop."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, cast

from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.output_processor import OutputProcessor
from fastdeploy_lite.engine.replicas import create_client
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.input.preprocess import Preprocessor
from fastdeploy_lite.request.outputs import RequestOutput
from fastdeploy_lite.request.params import SamplingParams
from fastdeploy_lite.request.user_request import Request
from fastdeploy_lite.utils.errors import RequestError

Prompt = str | Sequence[int] | Mapping[str, Any]


class AsyncLLM:
    """One engine process, or replicas of it, driven from one event loop.

    Args:
        args: Of the engine.
    """

    def __init__(self, args: EngineArgs) -> None:
        self.preprocessor = Preprocessor(args.create_runtime_config())
        self._client = create_client(args)
        self._outputs = OutputProcessor(self.preprocessor.tokenizer)
        self._names: dict[str, str] = {}  # the caller's, to the engine's

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, pid: int | None = None) -> AsyncLLM:
        """Read the model's files; `start` then loads it.

        Args:
            engine_args: Of the engine.
            pid: Upstream names its sockets after it; unused here.

        Returns:
            An engine that has not been started.

        Raises:
            FastDeployError: The model cannot be run; one line says why.
        """
        return cls(engine_args)

    async def start(self) -> bool:
        """Start the engine's process and wait until the model is loaded.

        Returns:
            True.

        Raises:
            EngineDeadError: It ended instead; the message is the root cause.
        """
        await self._client.start()
        return True

    async def init_connections(self) -> None:
        """Upstream's second step of a start; `start` has done it."""

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **fields: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Continue a prompt; leaving early aborts it.

        Args:
            prompt: Text, token ids, or a mapping with `prompt`, `prompt_token_ids` or `messages`.
            sampling_params: None takes the defaults and the room that is left.
            request_id: Unique among the requests alive; None makes one.
            **fields: Further fields of `Request`.

        Yields:
            Chunks that hold what is new; the last one is `finished`.

        Raises:
            TypeError: The prompt has another type.
            RequestError: The request is at fault.
            EngineDeadError: The engine is dead or dies meanwhile.
        """
        name = request_id or str(uuid.uuid4())
        if name in self._names:
            raise RequestError(f"request_id {name!r} is in use", param="request_id")
        request = _request(prompt, sampling_params, name, fields)
        self._names[name] = name
        try:
            prepared = await asyncio.to_thread(self.preprocessor.process, request)
            self._outputs.add(prepared, prompt)
            stream = self._client.generate(prepared)
            async with aclosing(cast("Any", stream)):
                async for news in stream:
                    yield self._outputs.process(news)
        finally:
            self._outputs.discard(name)
            del self._names[name]

    async def abort_request(self, request_id: str | Iterable[str]) -> None:
        """End requests; their last chunk says so. Unknown ids are ignored."""
        names = [request_id] if isinstance(request_id, str) else list(request_id)
        await self._client.abort(names)

    abort = abort_request

    async def get_tokenizer(self) -> Ernie4_5Tokenizer:
        """The model's tokenizer."""
        return self.preprocessor.tokenizer

    async def get_model_config(self) -> ModelConfig:
        """The model's configuration."""
        return self.preprocessor.config.model

    async def check_health(self) -> bool:
        """Whether the engine lives."""
        return self._client.is_healthy

    @property
    def is_running(self) -> bool:
        """Whether the engine lives."""
        return self._client.is_healthy

    async def shutdown(self) -> None:
        """End the engine's process; idempotent."""
        await self._client.shutdown()


AsyncLLMEngine = AsyncLLM


def _request(
    prompt: Prompt, params: SamplingParams | None, name: str, fields: Mapping[str, Any]
) -> Request:
    given = dict(fields)
    if isinstance(prompt, str):
        given["prompt"] = prompt
    elif isinstance(prompt, Mapping):
        given.update(prompt)
    elif hasattr(prompt, "__iter__"):
        given["prompt_token_ids"] = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    else:
        raise TypeError(
            f"Invalid type for 'prompt': {type(prompt).__name__}, expected text, a list of token "
            "ids or a dict"
        )
    given["request_id"] = name
    given["arrival_time"] = time.time()
    if params is not None:
        given["sampling_params"] = params
    return Request.from_dict(given)
