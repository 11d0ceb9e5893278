"""What the handlers of one HTTP service share."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.engine_client import EngineClient
from fastdeploy_lite.engine.output_processor import OutputProcessor
from fastdeploy_lite.entrypoints.openai.errors import EngineUnavailableError, ServiceError
from fastdeploy_lite.entrypoints.openai.lanes import Lane
from fastdeploy_lite.entrypoints.openai.output_parser import OutputParsers
from fastdeploy_lite.input.preprocess import Preprocessor
from fastdeploy_lite.metrics.metrics import ServerMetrics
from fastdeploy_lite.request.messages import PAUSED
from fastdeploy_lite.request.user_request import Request
from fastdeploy_lite.utils.errors import RequestError

Result = TypeVar("Result")
PREPROCESS_THREADS = 2
COSTLY_THREADS = 2  # for templates and constraints that requests bring along
ID_PREFIXES = ("chatcmpl-", "cmpl-", "resp_")
_LONGEST_NAME = 120


@dataclass(slots=True)
class Service:
    """One model behind HTTP.

    Attributes:
        args: The engine arguments, as given.
        config: The engine's configuration.
        client: The engine.
        preprocessor: Requests to tokens.
        parsers: Reasoning and tool parsers.
        metrics: Where everything is counted.
        max_waiting_time: Seconds that a request may wait for its first token; -1 is for ever.
        active: Engine ids of requests in flight, by public id.
    """

    args: EngineArgs
    config: RuntimeConfig
    client: EngineClient
    preprocessor: Preprocessor
    parsers: OutputParsers
    metrics: ServerMetrics
    max_waiting_time: float = -1
    active: dict[str, set[str]] = field(default_factory=dict)
    outputs: OutputProcessor = field(init=False)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _plain: Lane = field(default_factory=lambda: Lane("preprocess", PREPROCESS_THREADS))
    _costly: Lane = field(default_factory=lambda: Lane("costly", COSTLY_THREADS))

    def __post_init__(self) -> None:
        self.outputs = OutputProcessor(self.tokenizer)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.preprocessor.tokenizer

    @property
    def model_name(self) -> str:
        """The name in answers: the served name, else what was given to `--model`."""
        return self.args.served_model_name or self.args.model

    def check_model(self, name: str | None) -> None:
        """Upstream's rule: names matter only with `--served-model-name`.

        Args:
            name: From the request.

        Raises:
            RequestError: Another model is served.
        """
        served = self.args.served_model_name
        if served is None or name in (None, served, "default"):
            return
        raise RequestError(
            f"Unsupported model: [{str(name)[:_LONGEST_NAME]}], support [{served}] or default",
            param="model",
            code="model_not_support",
        )

    def check_alive(self) -> None:
        """Refuse work that nobody would do.

        Raises:
            EngineUnavailableError: The engine is not there.
        """
        if not self.client.is_healthy:
            raise EngineUnavailableError("Worker Service Not Healthy")

    def check_accepting(self) -> None:
        """Refuse a request that nothing would be done about.

        Raises:
            EngineUnavailableError: The engine is not there, or paused.
        """
        self.check_alive()
        if self.client.stats.paused:
            raise EngineUnavailableError(PAUSED)

    def remaining_wait(self, arrival: float) -> float | None:
        """How much longer a request may wait for its first token.

        Args:
            arrival: When it came, seconds since the epoch.

        Returns:
            Seconds; None for ever.
        """
        if self.max_waiting_time < 0:
            return None
        return max(arrival + self.max_waiting_time - time.time(), 0.0)

    async def within_wait(self, waiting: Awaitable[Result], arrival: float) -> Result:
        """Await what comes before the first token, as long as its request may wait.

        Args:
            waiting: Cancelled when the time is over.
            arrival: When the request came, seconds since the epoch.

        Returns:
            Its result.

        Raises:
            ServiceError: The time is over.
        """
        try:
            return await asyncio.wait_for(waiting, self.remaining_wait(arrival))
        except asyncio.TimeoutError:
            text = f"Request waiting time exceeded {self.max_waiting_time:g} s"
            raise ServiceError(text, 500, "timeout_error", "timeout") from None

    def find_active(self, name: str) -> str | None:
        """The public id of a request in flight, named with or without its prefix.

        Args:
            name: `chatcmpl-x` or `x`.

        Returns:
            The id; None when there is none.
        """
        if name in self.active:
            return name
        names = (prefix + name for prefix in ID_PREFIXES)
        return next((n for n in names if n in self.active), None)

    def engine_id(self, public_id: str) -> str:
        """An id that is unique even when clients repeat theirs."""
        return f"{public_id}#{next(self._numbers)}"

    async def in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run blocking preparation beside the event loop.

        Args:
            function: What to run.
            *args: Its arguments.

        Returns:
            Its result.
        """
        return await self._plain.run(function, *args)

    async def prepare(
        self, function: Callable[..., Result], request: Request, *args: Any
    ) -> Result:
        """Run blocking preparation of a request, in the lane of what it brings along.

        Args:
            function: What to run; gets the service, the request and `args`.
            request: A template or a constraint of its own makes it costly.
            *args: Further arguments.

        Returns:
            Its result.
        """
        brings_code = request.chat_template is not None and not request.trusted_template
        guided = request.sampling_params.guided_decoding is not None
        lane = self._costly if brings_code or guided else self._plain
        return await lane.run(function, self, request, *args)

    def close(self) -> None:
        """Stop the preparation threads and their helper process."""
        self._plain.close()
        self._costly.close()
        self.preprocessor.close()
