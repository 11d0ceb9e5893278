"""Answer an OpenAI batch file (JSONL) with the server's own handlers, without a port."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.entrypoints.openai import api_server
from fastdeploy_lite.entrypoints.openai.app import create_application
from fastdeploy_lite.entrypoints.openai.server_args import ServerArgs
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import ConfigError, RequestError, one_line, quote
from fastdeploy_lite.utils.files import check_writable
from fastdeploy_lite.utils.logging import init_file_logging

_JSON = {"content-type": "application/json"}
URLS = ("/v1/chat/completions", "/v1/completions")


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags."""
    group = parser.add_argument_group("batch")
    add = group.add_argument
    add("-i", "--input-file", required=True, help="path or http URL of the requests")
    add("-o", "--output-file", required=True, help="path or http URL (PUT) of the answers")
    add("--output-tmp-dir", default=None, help="where answers wait for the upload")
    add("--max-waiting-time", type=int, default=-1, help="seconds to the first token, -1 for ever")
    add("--port", type=int, default=None, help="accepted, no effect")
    add("--workers", type=int, default=None, help="accepted, no effect")
    add("--max-concurrency", type=int, default=512, help="requests at the same time")
    EngineArgs.add_cli_args(parser)


def run(args: argparse.Namespace) -> int:
    """Answer all requests; the exit status is 0 even when some were refused."""
    init_file_logging()
    for name in ("port", "workers"):
        if getattr(args, name) is not None:
            print(f"--{name} has no effect: a batch needs no server", file=sys.stderr)
    if not _is_address(args.output_file):
        check_writable(args.output_file, "--output-file")
    lines = [line for line in _read(args.input_file).split(b"\n") if line.strip()]
    answers = asyncio.run(_answer_all(args, lines))
    text = "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers)
    # A lone surrogate, which only a line's own custom_id can bring here, is JSON when escaped.
    _write(args, text.encode("utf-8", "backslashreplace"))
    failed = sum(answer["error"] is not None for answer in answers)
    print(f"{len(answers)} requests, {failed} failed; written to {args.output_file}")
    return 0


def _is_address(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def _read(source: str) -> bytes:
    try:
        if _is_address(source):
            return httpx.get(source, follow_redirects=True).raise_for_status().content
        return Path(source).read_bytes()
    except OSError as error:
        raise ConfigError(f"--input-file {source}: {error.strerror or error}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"--input-file {source}: {error}") from None


def _write(args: argparse.Namespace, data: bytes) -> None:
    target = args.output_file
    try:
        if not _is_address(target):
            Path(target).write_bytes(data)
            return
        with tempfile.NamedTemporaryFile("w+b", dir=args.output_tmp_dir) as file:
            file.write(data)
            file.seek(0)
            httpx.put(target, content=file.read(), timeout=300).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise ConfigError(f"--output-file {target}: {error}") from None


async def _answer_all(args: argparse.Namespace, lines: list[bytes]) -> list[dict[str, Any]]:
    http = ServerArgs(max_concurrency=args.max_concurrency, max_waiting_time=args.max_waiting_time)
    http.check()
    server = api_server.ApiServer(http, EngineArgs.from_cli_args(args))
    service = await server.start_engine()
    try:
        app = create_application(service, max_concurrency=len(lines) + 1, with_metrics=False)
        limit = asyncio.Semaphore(args.max_concurrency)
        transport = httpx.ASGITransport(app=app.asgi)
        with tqdm(total=len(lines), desc="Processed requests") as bar:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://batch", timeout=None
            ) as client:

                async def bounded(line: bytes) -> dict[str, Any]:
                    async with limit:
                        answer = await answer_line(client, line)
                        bar.update()
                        return answer

                return list(await asyncio.gather(*map(bounded, lines)))
    finally:
        await service.client.shutdown()
        service.close()


async def answer_line(client: httpx.AsyncClient, line: bytes) -> dict[str, Any]:
    """Answer one line of a batch.

    Args:
        client: Reaches the application.
        line: JSON with custom_id, method, url and body.

    Returns:
        A line of the output: id, custom_id, response, error.
    """
    answer: dict[str, Any] = {
        "id": f"fastdeploy-{uuid.uuid4().hex}",
        "custom_id": None,
        "response": None,
        "error": None,
    }
    try:
        request = _object_of(line)
        answer["custom_id"] = _custom_id(request)
        url, body = _order(request)
        # Escaped: text that cannot be encoded is refused by its field, as for any request.
        content = json.dumps(body).encode()
        response = await client.post(url, content=content, headers=_JSON)
        answer["response"] = {
            "status_code": response.status_code,
            "request_id": f"fastdeploy-batch-{uuid.uuid4().hex}",
            "body": response.json(),
        }
        if response.status_code != 200:
            answer["error"] = response.json()
    except RequestError as error:
        answer["error"] = str(error)
    except Exception as error:  # whatever is wrong with one line is that line's own error
        answer["error"] = one_line(f"{type(error).__name__}: {error}")
    return answer


def _object_of(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the line is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise RequestError(
            f"expected an object with custom_id, method, url and body, found {quote(request)}"
        )
    return request


def _custom_id(request: dict[str, Any]) -> str:
    name = request.get("custom_id")
    if not isinstance(name, str):  # it is written back: NaN, for one, is no JSON
        raise RequestError(f"custom_id: expected text, found {quote(name)}")
    return name


def _order(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where a line's body goes, and the body."""
    url, method, body = request.get("url"), request.get("method", "POST"), request.get("body")
    if method != "POST":
        raise RequestError(f"method: expected POST, found {quote(method)}")
    if url not in URLS:
        raise RequestError(f"url: expected {' or '.join(URLS)}, found {quote(url)}")
    if not isinstance(body, dict):
        raise RequestError(f"body: expected an object, found {quote(body)}")
    if body.get("stream"):
        raise RequestError("body: a batch cannot stream; leave stream out")
    return url, body
