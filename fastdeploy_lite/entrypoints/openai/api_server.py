"""Starting, watching and stopping the HTTP service.

`python -m fastdeploy_lite.entrypoints.openai.api_server --model DIR --port 8180` serves one model.
This process never imports Paddle: the model lives in the engine's process.
"""

from __future__ import annotations

from fastdeploy_lite.utils.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()  # before the imports that take time

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn

from fastdeploy_lite import device, envs, processor
from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.engine_client import EngineClient
from fastdeploy_lite.engine.replicas import create_client
from fastdeploy_lite.entrypoints.openai.app import (
    Application,
    controller_application,
    create_application,
    metrics_application,
)
from fastdeploy_lite.entrypoints.openai.connections import (
    BACKLOG,
    Connections,
    GuardedProtocol,
    connection_limit,
)
from fastdeploy_lite.entrypoints.openai.output_parser import OutputParsers
from fastdeploy_lite.entrypoints.openai.server_args import (
    ServerArgs,
    add_arguments,
    server_args,
)
from fastdeploy_lite.entrypoints.openai.service import Service
from fastdeploy_lite.entrypoints.openai.start_lines import weight_lines
from fastdeploy_lite.entrypoints.openai.tracing import Tracer, start_tracing
from fastdeploy_lite.input.preprocess import Preprocessor
from fastdeploy_lite.metrics.metrics import ServerMetrics
from fastdeploy_lite.plugins import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    load_plugins,
    warn_about_plugins,
)
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import ConfigError, FastDeployError, exit_status, explain
from fastdeploy_lite.utils.host_memory import keep_what_is_loaded, return_freed_memory
from fastdeploy_lite.utils.logging import (
    ConsoleHandler,
    flush_logs,
    get_logger,
    init_file_logging,
)
from fastdeploy_lite.utils.ports import in_url, listen, reserve
from fastdeploy_lite.utils.standard_streams import prepare_standard_streams
from fastdeploy_lite.utils.unix_socket import UnixSocket, reserve_path

console = get_logger("console")
STATS_SECONDS = 1.0
THROUGHPUT_SECONDS = 10.0
# After the engine died: long enough for probes and clients to be told, short enough to restart.
LAST_WORDS_SECONDS = 3.0
ABORT_SECONDS = 5.0  # for aborted requests to send their last event


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: this module decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


class ApiServer:
    """One service from its first line to its last.

    Args:
        http: Arguments of the HTTP side.
        engine: Arguments of the engine.
    """

    def __init__(self, http: ServerArgs, engine: EngineArgs) -> None:
        self._http = http
        self._engine = engine
        self._servers: list[tuple[_Server, socket.socket]] = []
        self._unix_socket: UnixSocket | None = None
        self._connections = Connections(connection_limit())
        self._stopping = asyncio.Event()
        self._stopped_by: signal.Signals | None = None
        self._exit_code = 0
        self._cause: str | None = None
        self._tracer: Tracer | None = None
        self._service: Service
        self._application: Application

    async def run(self) -> int:
        """Serve until a signal or the engine's end.

        Returns:
            The process's exit status.

        Raises:
            FastDeployError: The service cannot start.
        """
        sockets = self._reserve_ports()
        if (shortage := self._connections.shortage(self._http.max_concurrency)) is not None:
            console.warning(shortage)
        self._tracer = start_tracing()
        try:
            with _stop_on_signals(self._stop):
                await self.start_engine()
                self._create_servers(sockets)
                await self._open(sockets)
                keep_what_is_loaded()
                return await self._serve()
        finally:
            for bound in sockets.values():
                bound.close()
            if self._unix_socket is not None:
                self._unix_socket.close()
            if self._tracer is not None:
                self._tracer.close()

    def _stop(self, number: signal.Signals) -> None:
        """A first signal stops in good order, a second one at once."""
        if self._stopping.is_set():
            os._exit(130)
        self._stopped_by = number
        self._stopping.set()

    def _reserve_ports(self) -> dict[str, socket.socket]:
        http = self._http
        wanted = {} if http.uds is not None else {"port": http.port}
        if not http.shares_metrics:
            wanted["metrics_port"] = http.metrics_port or 0
        if http.controller_port >= 0:
            wanted["controller_port"] = http.controller_port
        probe = not http.skip_port_check
        found = {name: reserve(name, http.host, port, probe) for name, port in wanted.items()}
        if http.uds is not None:
            self._unix_socket = reserve_path(http.uds)
            found["port"] = self._unix_socket.socket
        return found

    # Start ---------------------------------------------------------------------------------------

    async def start_engine(self) -> Service:
        """Load the model, without any port.

        Returns:
            The service; its client must be shut down.

        Raises:
            FastDeployError: The model cannot be loaded.
        """
        console.info("Number of api-server workers: 1.")
        for line in self._http.without_effect():
            console.warning(line)
        console.info("Internal ports: none; the engine is reached through private local sockets")
        config = self._engine.create_runtime_config()
        preprocessor = Preprocessor(config)
        preprocessor.try_constraints_apart()
        warn_about_plugins()
        load_plugins(REASONING_PARSERS)
        load_plugins(TOOL_PARSERS)
        parsers = OutputParsers.create(
            preprocessor.tokenizer,
            self._engine.reasoning_parser,
            self._engine.tool_call_parser,
            self._engine.tool_parser_plugin,
        )
        client = self._create_client()
        replicas = self._engine.data_parallel_size
        metrics = ServerMetrics(
            config.scheduler.max_num_seqs, dataclasses.asdict(config.cache), replicas
        )
        self._service = Service(
            self._engine, config, client, preprocessor, parsers, metrics,
            self._http.max_waiting_time,
        )  # fmt: skip
        await self._launch(config)
        return self._service

    def _create_client(self) -> EngineClient:
        return create_client(self._engine, restart=self._http.restart_engine)

    async def _launch(self, config: RuntimeConfig) -> None:
        """Start the engine; a signal meanwhile stops it."""
        client = self._service.client
        console.info("Waiting for worker processes to be ready...")
        started = time.monotonic()
        starting = asyncio.ensure_future(client.start())
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await client.shutdown()
            if self._stopped_by is signal.SIGINT:
                raise KeyboardInterrupt
            raise ConfigError("Stopped by a signal while the model was loading")
        starting.result()
        self._announce(config, time.monotonic() - started)

    def _announce(self, config: RuntimeConfig, seconds: float) -> None:
        ready, size = self._service.client.ready, config.cache.block_size
        blocks = ready.num_blocks if ready is not None else 0
        length = config.scheduler.max_model_len
        fitting = blocks * size // length
        most = min(config.scheduler.max_num_seqs, max(fitting, 1))
        console.info("Worker processes are launched with %.1f seconds.", seconds)
        if ready is not None:
            on_card, same_bits = device.decide().is_cuda, envs.FD_DETERMINISTIC_MODE
            for line in weight_lines(config.model, ready, on_card, same_bits):
                console.info("%s", line)
        if device.decide().kind == "cpu":
            console.info("Processor: %s", processor.describe())
        console.info(
            "Detected %d gpu blocks and 0 cpu blocks in cache (block size: %d).", blocks, size
        )
        if self._engine.data_parallel_size > 1:
            console.info("So does each of %d replicas.", self._engine.data_parallel_size)
        console.info(
            "FastDeploy will be serving %d running requests if each sequence reaches its maximum "
            "length: %d", most, length,
        )  # fmt: skip
        get_logger("config").info(
            "Reset block num, the total_block_num:%d, prefill_kvcache_block_num:%d", blocks, blocks
        )
        get_logger("config").info("engine: %s", self._engine.shown())
        get_logger("api_server").info("server: %s", self._http.shown())

    def _create_servers(self, sockets: dict[str, socket.socket]) -> None:
        http, service = self._http, self._service
        exposure = http.exposure(self._tracer)
        self._application = create_application(
            service,
            max_concurrency=min(http.max_concurrency, envs.FD_SUPPORT_MAX_CONNECTIONS),
            with_metrics=http.shares_metrics,
            exposure=exposure,
        )
        self._add(self._application.asgi, sockets["port"])
        if "metrics_port" in sockets:
            self._add(metrics_application(service, exposure), sockets["metrics_port"])
        if "controller_port" in sockets:
            self._add(controller_application(service, exposure), sockets["controller_port"])

    def _add(self, app: object, bound: socket.socket) -> None:
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            http=partial(GuardedProtocol, connections=self._connections),  # type: ignore[arg-type]
            ws="none",
            access_log=False,
            log_config=None,
            lifespan="off",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
            backlog=BACKLOG,
            server_header=False,
            proxy_headers=False,
            **self._http.tls,
        )
        self._servers.append((_Server(config), bound))

    async def _open(self, sockets: dict[str, socket.socket]) -> None:
        try:
            for name, bound in sockets.items():
                if bound.family != socket.AF_UNIX:
                    listen(name, bound, BACKLOG)
                elif self._unix_socket is not None:
                    self._unix_socket.listen(BACKLOG)
        except ConfigError:
            await self._service.client.shutdown()
            raise

    # Life ----------------------------------------------------------------------------------------

    async def _serve(self) -> int:
        _adopt_other_logs()
        serving = [
            asyncio.ensure_future(server.serve(sockets=[bound])) for server, bound in self._servers
        ]
        background = [
            asyncio.ensure_future(self._watch_engine()),
            asyncio.ensure_future(self._report()),
            asyncio.ensure_future(self._connections.watch()),
        ]
        self._announce_urls()
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait([*serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        for task in serving:
            if task.done() and not task.cancelled() and task.exception() is not None:
                self._exit_code, self._cause = 1, f"a port cannot be served: {task.exception()!r}"
        await self._drain()
        for task in background:
            task.cancel()
        for server, _ in self._servers:
            server.should_exit = True
        await asyncio.gather(*serving, *background, return_exceptions=True)
        await self._service.client.shutdown()
        self._service.close()
        if self._cause is not None:  # last, where a user looks first
            console.error("Ended, because %s", self._cause)
        return self._exit_code

    def _announce_urls(self) -> None:
        (base, where), *others = [self._place(bound) for _, bound in self._servers]
        metrics = (base, where) if self._http.shares_metrics else others[0]
        console.info("Launching metrics service at %s/metrics%s", *metrics)
        console.info("Launching chat completion service at %s/v1/chat/completions%s", base, where)
        console.info("Launching completion service at %s/v1/completions%s", base, where)
        # uvicorn's own words, which it keeps to itself when it is given sockets.
        console.info("Application startup complete.")
        console.info("Uvicorn running on %s%s (Press CTRL+C to quit)", base, where)

    def _place(self, bound: socket.socket) -> tuple[str, str]:
        """Where a socket is reached: the beginning of its URLs, and what does not fit into one."""
        scheme = "https" if self._http.tls else "http"
        if bound.family == socket.AF_UNIX:
            return f"{scheme}://localhost", f" on Unix socket {bound.getsockname()}"
        return f"{scheme}://{in_url(self._http.host)}:{bound.getsockname()[1]}", ""

    async def _drain(self) -> None:
        """Refuse new requests, let the running ones finish for a while, abort the rest."""
        admission = self._application.admission
        admission.closed_reason = "The server is shutting down"
        seconds = self._http.timeout_graceful_shutdown
        if admission.active and self._service.client.is_healthy:
            console.info("Shutting down: %d requests get %d s to finish", admission.active, seconds)
            if seconds and await admission.wait_idle(seconds):
                return
            await self._service.client.abort(None)
            await admission.wait_idle(ABORT_SECONDS)

    async def _watch_engine(self) -> None:
        """Exit, or restart the engine, when it dies."""
        while True:
            reason = await self._service.client.wait_dead()
            if self._stopping.is_set():
                return
            console.error("The engine is dead: %s", reason)
            if not self._http.restart_engine:
                self._application.admission.closed_reason = "Worker Service Not Healthy"
                self._exit_code, self._cause = 1, f"the engine is dead: {reason}"
                await asyncio.sleep(LAST_WORDS_SECONDS)
                self._stopping.set()
                return
            await self._restart()

    async def _restart(self) -> None:
        admission = self._application.admission
        admission.closed_reason = "The engine is starting"
        try:
            old, self._service.client = self._service.client, self._create_client()
            await old.shutdown()
            await self._launch(self._service.config)
        except (FastDeployError, RuntimeError, OSError) as error:
            console.error("The engine cannot be restarted: %s", error)
            self._exit_code = 1
            self._stopping.set()
        else:
            admission.closed_reason = None

    async def _report(self) -> None:
        """Keep the rates current; print a throughput line while there is traffic."""
        metrics, last_line, last_total = self._service.metrics, time.monotonic(), 0
        while True:
            await asyncio.sleep(STATS_SECONDS)
            client = self._service.client
            stats = client.stats
            metrics.update(stats)
            metrics.update_replicas(client.replicas_healthy, client.replica_stats)
            if time.monotonic() - last_line < THROUGHPUT_SECONDS:
                continue
            last_line = time.monotonic()
            total = stats.prompt_tokens + stats.generation_tokens
            if total == last_total and not stats.num_running and not stats.num_waiting:
                continue
            last_total = total
            used = stats.num_blocks - stats.num_free_blocks
            console.info(
                "Throughput: prompt %.1f tokens/s, generation %.1f tokens/s; running %d, "
                "waiting %d, KV cache usage %.1f%%, prefix cache hit rate %.1f%%",
                metrics.rates.prompt, metrics.rates.generation, stats.num_running,
                stats.num_waiting, 100.0 * used / max(stats.num_blocks, 1),
                100.0 * stats.prefix_hit_tokens / max(stats.prefix_query_tokens, 1),
            )  # fmt: skip


@contextlib.contextmanager
def _stop_on_signals(stop: Callable[[signal.Signals], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call `stop`."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _adopt_other_logs() -> None:
    """Lines of uvicorn and asyncio in this package's layout, by the way that never blocks."""
    for name in ("uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(ConsoleHandler())
        logger.setLevel(logging.INFO if name == "uvicorn.error" else logging.WARNING)
        logger.propagate = False


def serve(args: argparse.Namespace) -> int:
    """Run the server for parsed arguments.

    Args:
        args: What the parser gave.

    Returns:
        The process's exit status; what went wrong with a failed start is on the console.
    """
    return start(lambda: asyncio.run(_run(ApiServer(server_args(args), _engine_args(args)))))


def start(run: Callable[[], int]) -> int:
    """Set up logging and run; a failed start ends with its reason as the last line.

    Args:
        run: The service.

    Returns:
        The process's exit status.
    """
    prepare_standard_streams()
    return_freed_memory()
    try:
        init_file_logging()
        for line in envs.check():
            console.warning(line)
        return run()
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # whatever it is: one line for the user, the traceback in the log
        _print_failure(error)
        return exit_status(error)


def _engine_args(args: argparse.Namespace) -> EngineArgs:
    return EngineArgs.from_cli_args(args)


async def _run(server: ApiServer) -> int:
    return await server.run()


def _print_failure(error: Exception) -> None:
    """The reason last, where a user looks first."""
    log = get_logger("api_server")
    if log.handlers:  # or the traceback would end up on the console, below the reason
        log.error("start failed", exc_info=error)
    console.error("Failed to start: %s", explain(error))
    flush_logs()


def main() -> None:
    """Entry point of `python -m`."""
    parser = FlexibleArgumentParser(prog="fastdeploy_lite.entrypoints.openai.api_server")
    add_arguments(parser)
    status = serve(parser.parse_args())
    end_on_interrupt()
    sys.exit(status)


if __name__ == "__main__":
    main()
