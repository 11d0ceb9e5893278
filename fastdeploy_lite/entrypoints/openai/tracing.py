"""Traces of requests through OpenTelemetry: one span a request, its phases as children.

Off unless `FD_TRACE` or `TRACES_ENABLE` says otherwise, and then only what the extra `otel` brings
is imported. Spans are batched and sent by a thread of the SDK's: a dead collector costs spans.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastdeploy_lite import envs
from fastdeploy_lite.entrypoints.openai.middleware import App, Message, Receive, Scope, Send
from fastdeploy_lite.utils.errors import ConfigError, VariableError, one_line
from fastdeploy_lite.utils.log_sinks import LogFile
from fastdeploy_lite.utils.logging import ConsoleStream, current_request_id

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

EXPORT_SECONDS = 3  # for one batch; the end of the process waits for the last one
PHASES = ("queue", "prefill", "decode")
_TRACED = frozenset({"POST"})


class Tracer:
    """Makes the spans of one service.

    Args:
        exporters: Where they go.
    """

    def __init__(self, exporters: list[SpanExporter]) -> None:
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - the extra's
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
            TraceContextTextMapPropagator,
        )

        resource = Resource.create(
            {"service.name": envs.FD_SERVICE_NAME, "host.name": envs.FD_HOST_NAME}
        )
        self._provider = TracerProvider(resource=resource)
        for exporter in exporters:
            processor = BatchSpanProcessor(exporter, export_timeout_millis=EXPORT_SECONDS * 1000)
            self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("fastdeploy_lite")
        self._propagator = TraceContextTextMapPropagator()

    def around(self, app: App) -> App:
        """`app`, with a span for every POST request."""
        return _Traced(app, self)

    def start(self, scope: Scope) -> Any:
        """Open the span of a request, below the caller's `traceparent` if there is one.

        Args:
            scope: ASGI's.

        Returns:
            A context manager that gives the span.
        """
        from opentelemetry.trace import SpanKind  # noqa: PLC0415

        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        return self._tracer.start_as_current_span(
            f"{scope['method']} {scope['path'][:128]}",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": scope["method"],
                "url.path": scope["path"][:1024],
                "fastdeploy.request_id": current_request_id.get(),
            },
        )

    def add_phases(self, sequence: str, moments: tuple[float, ...], tokens: int) -> None:
        """Add finished child spans to the present one; see `note_phases`."""
        from opentelemetry import trace  # noqa: PLC0415

        if not trace.get_current_span().is_recording():
            return
        attributes: dict[str, Any] = {"fastdeploy.sequence": sequence, "fastdeploy.tokens": tokens}
        for name, start, end in zip(PHASES, moments, moments[1:], strict=False):
            nanoseconds = int(start * 1e9)
            span = self._tracer.start_span(name, start_time=nanoseconds, attributes=attributes)
            span.end(max(int(end * 1e9), nanoseconds))

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        self._provider.shutdown()


class _Traced:
    def __init__(self, app: App, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in _TRACED:
            await self._app(scope, receive, send)
            return
        with self._tracer.start(scope) as span:

            async def watch(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            await self._app(scope, receive, watch)


_active: Tracer | None = None


def start_tracing() -> Tracer | None:
    """The tracer that the environment asks for.

    `FD_TRACE` is `off`, `local` (JSON lines in `trace.log`), `otel` (`TRACES_EXPORTER`: `console`,
    or `otlp` to `EXPORTER_OTLP_ENDPOINT`) or `all`; `TRACES_ENABLE=true` means `otel`.

    Returns:
        The tracer, None when traces are off.

    Raises:
        ConfigError: They are wanted and the extra is not installed, or no endpoint is given.
    """
    global _active  # noqa: PLW0603 - one process, one tracer, as OpenTelemetry's own
    mode = envs.FD_TRACE
    remote = mode in ("otel", "all") or envs.TRACES_ENABLE
    exporters: list[SpanExporter] = []
    try:
        if mode in ("local", "all"):
            exporters.append(_local())
        if remote:
            exporters.append(_remote())
        _active = Tracer(exporters) if exporters else None
    except ImportError as error:
        raise ConfigError(
            "Traces need OpenTelemetry: pip install 'fastdeploy-lite[otel]', or unset FD_TRACE "
            f"and TRACES_ENABLE ({error})"
        ) from error
    return _active


def note_phases(sequence: str, moments: tuple[float, ...], tokens: int) -> None:
    """Add the phases of a sequence below the present request's span.

    Args:
        sequence: Its id.
        moments: Received, scheduled, first token, end; wall clock in seconds.
        tokens: How many were generated.
    """
    if _active is not None:
        _active.add_phases(sequence, moments, tokens)


def _local() -> SpanExporter:
    from opentelemetry.sdk.trace.export import (  # noqa: PLC0415 - the extra's
        SpanExporter,
        SpanExportResult,
    )

    class LocalExporter(SpanExporter):  # type: ignore[misc, unused-ignore]
        """One JSON object a line, in trace.log."""

        def __init__(self) -> None:
            self._file = LogFile(Path(envs.FD_LOG_DIR) / "trace.log", envs.FD_LOG_BACKUP_COUNT)

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            lines = [json.dumps(json.loads(span.to_json())) + "\n" for span in spans]
            try:
                self._file.write("".join(lines).encode())
            except OSError:
                return SpanExportResult.FAILURE
            return SpanExportResult.SUCCESS

    return LocalExporter()


def _remote() -> SpanExporter:
    if envs.TRACES_EXPORTER == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter  # noqa: PLC0415

        console: Any = ConsoleStream()
        return ConsoleSpanExporter(
            out=console, formatter=lambda span: one_line(span.to_json(indent=None)) + "\n"
        )
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )

    endpoint = envs.EXPORTER_OTLP_ENDPOINT
    if not endpoint:
        raise VariableError("TRACES_EXPORTER=otlp needs EXPORTER_OTLP_ENDPOINT, an HTTP address")
    if not urlsplit(endpoint).path.strip("/"):
        endpoint = f"{endpoint.rstrip('/')}/v1/traces"
    return OTLPSpanExporter(endpoint, headers=envs.EXPORTER_OTLP_HEADERS, timeout=EXPORT_SECONDS)
