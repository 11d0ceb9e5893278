"""Request bodies: read within bounds, weighed before they are decoded, decoded and checked once.

Decoding and validation hold the event loop, so their cost is bounded first: while the bytes arrive,
a scan counts what they will decode to (`BodyScan`), and refuses a body that costs more than a few
milliseconds or several times its own size. Text that cannot be encoded (lone surrogates) ends here,
by the name of its field: nothing behind this door meets it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema

from fastdeploy_lite.entrypoints.openai.middleware import (
    RETRY,
    App,
    Message,
    Receive,
    Scope,
    Send,
    error,
    refuse,
)
from fastdeploy_lite.utils.errors import RequestError, quote
from fastdeploy_lite.utils.text import is_encodable

Model = TypeVar("Model", bound=BaseModel)

BODY_SECONDS = 60.0  # a client that sends slower than this holds a connection for nothing
ARRIVING_BODIES = 4  # so many bodies of full size may be arriving together
KEY = "fastdeploy_lite.body"
_SIZE_KEY = "fastdeploy_lite.body_size"
_LARGE_BYTES = 64 << 10  # what costs the loop a millisecond is worth a thread
MOST_LEVELS = 128  # of nesting: whatever walks a body behind this door may recurse
CONTAINER_WEIGHT = 8  # an object, a list or a member costs as much as so many numbers
_SECOND_LOOK_BYTES = 1 << 20  # a faulty body up to this size is read again to name its fault
_SCAN_BYTES = 64 << 10
_CONTAINERS = (dict, list)  # all that JSON has; no tuple is made for each look
_REF = "#/components/schemas/{model}"


class BodyScan:
    """What a JSON body will cost, from its bytes as they arrive.

    Attributes:
        size: Bytes so far.
        weight: Values so far, texts, containers and members weighted.
        highest: The highest byte so far; says how wide the decoded text is.
        deepest: Most levels of nesting so far.
    """

    def __init__(self) -> None:
        self.size = 0
        self.weight = 0
        self.highest = 0
        self.deepest = 0
        self._level = 0
        self._in_string = False
        self._tail = b""

    def feed(self, data: bytes) -> None:
        """Take in the next bytes.

        Args:
            data: At any cut.
        """
        self.size += len(data)
        if self._tail:
            data = self._tail + data
        # An odd number of backslashes at the end escapes what comes next.
        escapes = len(data) - len(data.rstrip(b"\\"))
        cut = len(data) - escapes % 2
        data, self._tail = data[:cut], data[cut:]
        if data:
            self._count(data)

    def _count(self, data: bytes) -> None:
        if b"\\" in data:
            data = data.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        codes = np.frombuffer(data, np.uint8)
        self.highest = max(self.highest, int(codes.max()))
        quotes = codes == ord('"')
        inside = np.logical_xor.accumulate(quotes) ^ self._in_string
        outside = codes[~inside]
        self._in_string = bool(inside[-1])
        opened = (outside == ord("{")) | (outside == ord("["))
        members = int(np.count_nonzero(outside == ord(":")))
        containers = int(np.count_nonzero(opened)) + members
        commas = int(np.count_nonzero(outside == ord(",")))
        # A short text decodes to twice the bytes of a number; a member's name is counted with it.
        texts = int(np.count_nonzero(quotes & inside)) - members
        self.weight += commas + texts + CONTAINER_WEIGHT * containers
        self._follow_nesting(opened, (outside == ord("}")) | (outside == ord("]")))

    def _follow_nesting(self, opened: np.ndarray, closed: np.ndarray) -> None:
        brackets = opened | closed
        if brackets.any():
            steps = np.where(opened[brackets], 1, -1)
            levels = self._level + np.cumsum(steps)
            self.deepest = max(self.deepest, int(levels.max()))
            self._level = int(levels[-1])

    def decoded_bytes(self, data: bytes) -> int:
        """A bound on the memory of the decoded texts.

        Args:
            data: The whole body.

        Returns:
            Bytes; one wide character widens the whole text that holds it.
        """
        surrogates = b"\\ud" in data or b"\\uD" in data
        if self.highest >= 0xF0 or surrogates:
            return 4 * self.size
        return (2 if self.highest >= 0xC4 or b"\\u" in data else 1) * self.size


class BoundedBody:
    """Reads a request's body whole, within a size, a cost and a time, before the application runs.

    Args:
        app: Finds the body in the scope, see `parse`.
        limit: Most bytes.
        values: Most values (`BodyScan.weight`).
    """

    def __init__(self, app: App, limit: int, values: int) -> None:
        self._app = app
        self._limit = limit
        self._values = values
        self._arriving: dict[asyncio.Task[Any], int] = {}  # bytes so far, oldest first
        self._evicted: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body read, or answer 400, 408, 413 or 503."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"")
        if declared.isdigit() and int(declared[:20]) > self._limit:
            await self._refuse_size(send)
            return
        scan = BodyScan()
        reader = asyncio.ensure_future(self._read(receive, scan))
        self._arriving[reader] = 0
        try:
            body = await asyncio.wait_for(reader, BODY_SECONDS)
        except asyncio.TimeoutError:
            text = f"the body did not arrive within {BODY_SECONDS:.0f} s"
            await refuse(send, 408, _body_error(text))
            return
        except asyncio.CancelledError:
            if reader not in self._evicted:
                raise
            text = "too many bodies are arriving and this one is the slowest: send it again"
            await refuse(send, 503, error(text, "server_error", "connection_error"), RETRY)
            return
        finally:
            self._arriving.pop(reader, None)
            self._evicted.discard(reader)
        if body is not None and await self._is_acceptable(scan, body, send):
            scope[KEY] = body
            del body  # the handler takes it from the scope; nothing else keeps it
            await self._app(scope, _replay(scope, receive), send)

    async def _is_acceptable(self, scan: BodyScan, body: bytes, send: Send) -> bool:
        if scan.size > self._limit:
            await self._refuse_size(send)
        elif scan.weight > self._values:
            text = (
                f"the body holds more than {self._values} values (an object, a list or a member "
                f"counts as {CONTAINER_WEIGHT}): send less at once"
            )
            await refuse(send, 400, _body_error(text))
        elif scan.deepest > MOST_LEVELS:
            text = f"the body is nested deeper than {MOST_LEVELS} levels"
            await refuse(send, 400, _body_error(text))
        elif scan.decoded_bytes(body) > 2 * self._limit:
            text = f"text with characters beyond U+FFFF is limited to {self._limit // 2} bytes"
            await refuse(send, 413, _body_error(f"the body is too large: {text}"))
        else:
            return True
        return False

    async def _refuse_size(self, send: Send) -> None:
        await refuse(send, 413, _body_error(f"the body is larger than {self._limit} bytes"))

    async def _read(self, receive: Receive, scan: BodyScan) -> bytes | None:
        """The body, cut where it breaks a limit; None when the client is gone."""
        me = asyncio.current_task()
        assert me is not None
        parts = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part: bytes = message.get("body", b"")
            for start in range(0, len(part), _SCAN_BYTES):
                scan.feed(part[start : start + _SCAN_BYTES])
            parts += part
            self._arriving[me] = len(parts)
            too_much = scan.size > self._limit or scan.weight > self._values
            if too_much or scan.deepest > MOST_LEVELS or not message.get("more_body"):
                return bytes(parts)
            self._make_room(me)

    def _make_room(self, me: asyncio.Task[Any]) -> None:
        """Give up the body that began to arrive first when all together are too large."""
        if sum(self._arriving.values()) <= ARRIVING_BODIES * self._limit:
            return
        oldest = next(task for task, size in self._arriving.items() if size)
        if oldest is not me or len(self._arriving) > 1:
            self._evicted.add(oldest)
            del self._arriving[oldest]
            oldest.cancel()


def _replay(scope: Scope, receive: Receive) -> Receive:
    """For handlers that read the stream: the body once, if it has not been taken."""

    async def replay() -> Message:
        body = scope.pop(KEY, None)
        if body is None:
            return await receive()
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _body_error(message: str) -> dict[str, Any]:
    return error(message, "invalid_request_error", "invalid_value", "body")


# Decoding ----------------------------------------------------------------------------------------


async def parse(request: Request, model: type[Model]) -> Model:
    """Decode and check the body of a request.

    Args:
        request: Behind `BoundedBody`.
        model: What it must be.

    Returns:
        The checked body; the bytes are no longer kept.

    Raises:
        RequestValidationError: It is not; the first fault is named.
        RequestError: It is not JSON, or holds text that cannot be encoded.
    """
    _check_type(request)
    data = request.scope.pop(KEY, b"")
    request.scope[_SIZE_KEY] = len(data)
    if len(data) > _LARGE_BYTES:
        value = await decode_large(data)
    else:
        value = decode(data)
    del data
    await asyncio.sleep(0)  # two short stays on the loop instead of a long one
    try:
        with _without_collection():
            return model.model_validate(value)
    except ValidationError as failure:
        raise RequestValidationError(failure.errors(include_url=False)) from None


def is_large(request: Request) -> bool:
    """Whether the body that `parse` read is worth a thread for what is done with it next."""
    return bool(request.scope.get(_SIZE_KEY, 0) > _LARGE_BYTES)


def decode(body: bytes) -> Any:
    """Decode JSON whose texts can all be encoded again.

    Args:
        body: UTF-8.

    Returns:
        Plain data.

    Raises:
        RequestError: It is not JSON, or holds a lone surrogate; `param` is the field.
    """
    decoded, failure = _first_look(body)
    return decoded if failure is None else _second_look(body, failure)


async def decode_large(body: bytes) -> Any:
    """As `decode`, but what is wrong with a body is found beside the event loop."""
    decoded, failure = _first_look(body)
    if failure is None:
        return decoded
    return await asyncio.to_thread(_second_look, body, failure)


def _first_look(body: bytes) -> tuple[Any, Exception | None]:
    try:
        with _without_collection():
            return msgspec.json.decode(body), None
    except (msgspec.DecodeError, ValueError, RecursionError) as failure:
        return None, failure


def _second_look(body: bytes, failure: Exception) -> Any:
    """Read what the strict decoder refused: numbers beyond its range, or a fault with a name."""
    if len(body) > _SECOND_LOOK_BYTES:
        raise _not_json(failure) from None
    try:
        value = json.loads(body)  # knows NaN and reads lone surrogates, so that they can be named
        path = find_surrogate(value) if _may_hold_surrogates(body) else None
    except (ValueError, RecursionError) as error:
        raise _not_json(error) from None
    if path is not None:
        raise RequestError(
            f"{path}: the text holds a lone surrogate, which is no character",
            param=path.partition(".")[0].partition("[")[0] or "body",
            code="invalid_value",
        )
    return value


def _may_hold_surrogates(body: bytes) -> bool:
    """Whether a search is worth its time: they come as escapes, or as bytes that are no UTF-8."""
    plain = body.isascii() and b"\0" not in body  # with zeros it may be UTF-16
    return not plain or b"\\ud" in body.lower()


def find_surrogate(value: Any, path: str = "") -> str | None:
    """Where the first text that cannot be encoded is.

    Args:
        value: Plain data.
        path: Of the value.

    Returns:
        For instance `stop[0]`, or None.

    Raises:
        RecursionError: The data is nested too deeply.
    """
    if isinstance(value, str):
        return None if is_encodable(value) else (path or "body")
    if isinstance(value, dict):
        if not all(is_encodable(str(key)) for key in value):
            return path or "body"
        for key, item in value.items():
            if _may_hold_text(item):
                where = f"{path}.{quote(key)[1:-1]}" if path else str(key)
                if (found := find_surrogate(item, where)) is not None:
                    return found
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if _may_hold_text(item):
                found = find_surrogate(item, f"{path}[{index}]")
                if found is not None:
                    return found
    return None


def _may_hold_text(value: Any) -> bool:
    """Whether a search has to look into a value; most of the many values of a body are plain."""
    if isinstance(value, str):
        return not value.isascii()
    return isinstance(value, _CONTAINERS)


def _not_json(failure: Exception) -> RequestError:
    reason = str(failure)
    if isinstance(failure, RecursionError):
        reason = "it is nested too deeply"
    elif "integer string conversion" in reason:  # Python's words are for whoever runs it
        reason = f"an integer has more than {sys.get_int_max_str_digits()} digits"
    return RequestError(
        f"The body is not JSON that can be read: {reason}", param="body", code="invalid_value"
    )


def _check_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    # A page of another site may post text or forms without asking, but not JSON.
    if kind != "application/json" and not kind.endswith("+json"):
        raise RequestError(
            f"Content-Type must be application/json, got {quote(given)}",
            param="body",
            code="invalid_value",
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise RequestError(
            f"Content-Encoding {quote(encoding)} is not supported: send the body as it is",
            param="body",
            code="invalid_value",
        )


@contextmanager
def _without_collection() -> Iterator[None]:
    """Many small objects at once would set off the cyclic collector again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# Documentation -----------------------------------------------------------------------------------


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose handler calls `parse`.

    Args:
        model: The model of its body.

    Returns:
        The part of an OpenAPI operation.
    """
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


def document_bodies(app: FastAPI, *models: type[BaseModel]) -> None:
    """Add the models of bodies to an application's OpenAPI document.

    Args:
        app: The application.
        *models: Those that `body_of` refers to.
    """
    inner = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = inner()
            _, schema = models_json_schema(
                [(model, "validation") for model in models], ref_template=_REF
            )
            document.setdefault("components", {}).setdefault("schemas", {}).update(schema["$defs"])
        return app.openapi_schema or inner()

    app.openapi = openapi  # type: ignore[method-assign]
