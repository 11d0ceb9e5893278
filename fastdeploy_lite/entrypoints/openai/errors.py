"""From failures to HTTP answers: upstream's bodies, and statuses that say whose fault it was.

Upstream answers 500 to every fault of a client; SDKs then retry.  Here a client's fault is a 400
(`FD_LITE_STRICT_STATUS=1` brings the 500 back), and no body carries a traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from fastdeploy_lite import envs
from fastdeploy_lite.engine.engine_core import EngineDeadError
from fastdeploy_lite.utils.errors import RequestError, one_line
from fastdeploy_lite.utils.logging import get_logger

_log = get_logger("api_server")
_LONGEST_MESSAGE = 2000
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


class ServiceError(Exception):
    """A failure that is not the client's fault; becomes an error body with its own status."""

    def __init__(self, message: str, status: int, kind: str, code: str | None = None) -> None:
        super().__init__(one_line(message))
        self.status = status
        self.kind = kind
        self.code = code


class EngineUnavailableError(ServiceError):
    """The engine is starting, draining or dead; the client may try again later."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 503, "server_error", "connection_error")


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON response, encoded by msgspec.

    Args:
        value: Plain data.
        status: HTTP status.
        headers: More headers.

    Returns:
        The response.
    """
    body = msgspec.json.encode(value)
    return Response(body, status, dict(headers or {}), media_type="application/json")


def error_body(
    message: str, kind: str | None = None, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """The error body, all four keys present.

    Args:
        message: What went wrong; shortened and made one line.
        kind: One of upstream's error types.
        param: The request field.
        code: One of upstream's codes.

    Returns:
        `{"error": {...}}`.
    """
    text = one_line(message[: _LONGEST_MESSAGE + 1])
    if len(text) > _LONGEST_MESSAGE:
        text = text[:_LONGEST_MESSAGE] + "…"
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def client_status() -> int:
    """Status of a client's fault that only the handler can see."""
    return 500 if envs.FD_LITE_STRICT_STATUS else 400


def describe(error: Exception) -> tuple[int, dict[str, dict[str, str | None]]]:
    """Status and body of any exception.

    Args:
        error: What a handler raised.

    Returns:
        The HTTP status and the error body.
    """
    if isinstance(error, RequestError):
        code = error.code or "invalid_value"
        return client_status(), error_body(str(error), "invalid_request_error", error.param, code)
    if isinstance(error, ServiceError):
        return error.status, error_body(str(error), error.kind, None, error.code)
    if isinstance(error, EngineDeadError):
        return 500, error_body(str(error), "server_error", None, "internal_error")
    _log.error("unexpected error", exc_info=error)
    text = f"Internal error: {type(error).__name__}; see api_server.log"
    return 500, error_body(text, "internal_error", None, "internal_error")


def from_exception(error: Exception) -> Response:
    """The response of any exception."""
    status, body = describe(error)
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return json_response(body, status, headers)


def renamed(error: RequestError, param: str | None) -> RequestError:
    """The same error about a field that the client calls by another name.

    Args:
        error: Names a field, perhaps at the start of its message too.
        param: The client's name for it.

    Returns:
        The error, a new one where the names differ.
    """
    if param == error.param:
        return error
    text = str(error)
    if error.param and text.startswith(error.param):
        text = f"{param}{text[len(error.param) :]}"
    return RequestError(text, param=param, code=error.code)


def from_validation(
    errors: Sequence[Any], field_of: Callable[[str], str | None] = lambda name: name
) -> Response:
    """The response of pydantic's complaints: the first one, in upstream's wording.

    Args:
        errors: `RequestValidationError.errors()`.
        field_of: From a field's name to the client's name for it.

    Returns:
        A 400.
    """
    first = errors[0] if errors else {"type": "", "msg": "Invalid request", "loc": ("body",)}
    # The field comes first; the branch of a union, an index or a nested key may follow.
    location = [str(part) for part in first.get("loc", ()) if part != "body"] or ["body"]
    param = field_of(location[0])
    code = "missing_required_parameter" if first.get("type") == "missing" else "invalid_value"
    message = str(first.get("msg", "Invalid request"))
    return json_response(error_body(message, "invalid_request_error", param, code), 400)


def install(app: FastAPI) -> None:
    """Register the handlers on an application.

    Args:
        app: The application.
    """

    async def on_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors())

    async def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        if error.status_code == 400:  # a body that cannot be parsed, for instance nested too deeply
            return json_response(
                error_body(str(error.detail), "invalid_request_error", "body", "invalid_value"), 400
            )
        code = _HTTP_CODES.get(error.status_code, "invalid_value")
        body = error_body(str(error.detail), "invalid_request_error", None, code)
        return json_response(body, error.status_code, error.headers)

    async def on_any(_: Request, error: Exception) -> Response:
        return from_exception(error)

    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(StarletteHTTPException, on_http)
    app.add_exception_handler(RequestError, on_any)
    app.add_exception_handler(ServiceError, on_any)
    app.add_exception_handler(Exception, on_any)
