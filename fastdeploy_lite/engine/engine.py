"""The engine inside this process: what `LLM` drives."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

from fastdeploy_lite import envs
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.engine_core import EngineCore, create_core
from fastdeploy_lite.engine.output_processor import OutputProcessor
from fastdeploy_lite.input.preprocess import Preprocessor
from fastdeploy_lite.request.messages import EngineRequest, EngineStats, Ready
from fastdeploy_lite.request.outputs import RequestOutput
from fastdeploy_lite.utils.errors import ConfigError
from fastdeploy_lite.utils.interrupts import interrupts_deferred

_log = logging.getLogger(__name__)


class LLMEngine:
    """Preprocessor, engine core and output processor in one process.

    Several threads, or several half-consumed streams of one thread, may use it at the same time:
    whoever waits for an output runs the next step, for everybody.

    Args:
        preprocessor: Requests to tokens.
        core: The engine core.
        ready: What there is to say about it.
    """

    def __init__(self, preprocessor: Preprocessor, core: EngineCore, ready: Ready) -> None:
        self.preprocessor = preprocessor
        self.config = preprocessor.config
        self.ready = ready
        self._core = core
        self._outputs = OutputProcessor(preprocessor.tokenizer)
        self._mailboxes: dict[str, deque[RequestOutput]] = {}
        self._lock = threading.RLock()

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLMEngine:
        """Load the model that `args` names.

        Args:
            args: Of the engine.

        Returns:
            An engine that is ready.

        Raises:
            FastDeployError: Arguments, model or memory do not allow it; one line says why.
        """
        if args.data_parallel_size > 1:
            raise ConfigError(
                f"data_parallel_size {args.data_parallel_size}: replicas are for a server or"
                " AsyncLLM: leave it out here, or start one process a replica"
            )
        for line in envs.check():
            _log.warning(line)
        preprocessor = Preprocessor(args.create_runtime_config())
        core, ready = create_core(preprocessor.config, preprocessor.tokenizer)
        return cls(preprocessor, core, ready)

    def run(
        self, requests: Sequence[EngineRequest], prompts: Sequence[Any]
    ) -> Generator[RequestOutput, None, None]:
        """Generate answers.

        Args:
            requests: What to generate.
            prompts: What the user passed, for the results.

        Yields:
            Chunks as they come, `outputs.index` telling whose; leaving early aborts what is left.
        """
        todo = deque(enumerate(zip(requests, prompts, strict=True)))
        alive: set[str] = set()
        box: deque[RequestOutput] = deque()
        try:
            while todo or alive:
                with self._lock, interrupts_deferred():
                    self._feed(todo, alive, box)
                    if not box:
                        self._step()
                while box:
                    chunk = box.popleft()
                    if chunk.finished:
                        alive.discard(chunk.request_id)
                        self._mailboxes.pop(chunk.request_id, None)
                    yield chunk
        finally:
            self._drop(alive)

    def _feed(
        self,
        todo: deque[tuple[int, tuple[EngineRequest, Any]]],
        alive: set[str],
        box: deque[RequestOutput],
    ) -> None:
        """Give the core what it can use soon: a batch of any length needs a short queue only."""
        while todo and self._core.num_waiting < self.config.scheduler.max_num_seqs:
            index, (request, prompt) = todo.popleft()
            self._mailboxes[request.request_id] = box
            self._outputs.add(request, prompt, index)
            alive.add(request.request_id)
            self._core.add(request)

    def _step(self) -> None:
        for output in self._core.step():
            box = self._mailboxes.get(output.request_id)
            if box is not None:
                box.append(self._outputs.process(output))

    def _drop(self, names: set[str]) -> None:
        """Abort requests whose outputs nobody will read."""
        if not names:
            return
        with self._lock, interrupts_deferred():
            for name in names:
                self._mailboxes.pop(name, None)
                self._outputs.discard(name)
            self._core.abort(names)
            self._step()

    def check_integrity(self) -> None:
        """Verify that no KV block and no request is lost.

        Raises:
            RuntimeError: Something is.
        """
        with self._lock:
            self._core.check_integrity()

    def stats(self) -> EngineStats:
        """The core's counters."""
        return self._core.stats()

    def shutdown(self) -> None:
        """Stop helper threads; the memory goes with the object."""
        self._core.shutdown()
