"""A small client of OpenAI-compatible servers, for `chat`, `complete` and `bench serve`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import httpx

from fastdeploy_lite.utils.errors import ConfigError, FastDeployError, RequestError, one_line

DEFAULT_URL = "http://localhost:9904/v1"


def add_arguments(parser: Any, url: str | None) -> None:
    """Add the flags that say which server and which model.

    Args:
        parser: Where to.
        url: Default of `--url`.
    """
    parser.add_argument("--url", default=url, help="server, such as http://localhost:8000")
    parser.add_argument("--model-name", default=None, help="default: the server's first model")
    parser.add_argument("--api-key", default=None, help="default: OPENAI_API_KEY, else EMPTY")


class Client:
    """One server.

    Args:
        url: With or without `/v1`; without a scheme it is HTTP.
        model: Name of the model; None asks the server.
        api_key: None takes `OPENAI_API_KEY`.

    Raises:
        FastDeployError: There is no address, or the server cannot be reached.
    """

    def __init__(self, url: str, model: str | None, api_key: str | None) -> None:
        if not url.strip():  # an unset variable of a script; the demo model must not answer for it
            raise ConfigError("--url is empty: give a server such as http://localhost:8000")
        key = api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        self._http = httpx.Client(
            base_url=api_base(url), headers={"Authorization": f"Bearer {key}"}, timeout=None
        )
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        try:
            response = self._http.get("/models", timeout=10)
        except httpx.HTTPError as error:
            raise FastDeployError(f"No server at {self._http.base_url}: {error}") from None
        if response.status_code != 200:
            raise FastDeployError(f"{self._http.base_url}: {response.status_code} {response.text}")
        return str(response.json()["data"][0]["id"])

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Post a request and give its events.

        Args:
            path: `/chat/completions` or `/completions`.
            body: The request, without model and stream.

        Yields:
            Choice objects.

        Raises:
            FastDeployError: The server refuses or fails.
        """
        request = {"model": self.model, "stream": True, **body}
        try:
            with self._http.stream("POST", path, json=request) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                yield from _choices(response.iter_lines())
        except httpx.HTTPError as error:
            raise FastDeployError(f"The connection failed: {error}") from None

    def count(self, messages: list[dict[str, str]]) -> tuple[int, int] | None:
        """Tokens of a rendered conversation and of the whole context.

        Args:
            messages: In OpenAI's form.

        Returns:
            Both, or None where the server has no `/tokenize` of this form.
        """
        url = f"{str(self._http.base_url).rstrip('/').removesuffix('/v1')}/tokenize"
        try:
            response = self._http.post(url, json={"messages": messages}, timeout=30)
            value = response.json()
            return int(value["count"]), int(value["max_model_len"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None


def api_base(url: str) -> str:
    """The address that ends in `/v1`.

    Args:
        url: As a person writes it: `localhost:8000`, `http://host/prefix/`, `http://host/v1`.

    Returns:
        With scheme and `/v1`, without a slash at the end.
    """
    base = (url if "://" in url else f"http://{url}").rstrip("/")
    return base if base.endswith("/v1") else f"{base}/v1"


def _refusal(response: httpx.Response) -> FastDeployError:
    """What a server said, in one line; a request's fault is told from the server's."""
    try:
        error = response.json()["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        text = response.text
    kind = RequestError if response.status_code == 400 else FastDeployError
    return kind(one_line(f"{response.status_code}: {text}"))


def _choices(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.startswith("data: ") or line.startswith("data: [DONE]"):
            continue
        value = json.loads(line[len("data: ") :])
        if "error" in value:
            raise FastDeployError(str(value["error"].get("message")))
        yield from value.get("choices", [])


def completion_text(client: Client, prompt: str, body: dict[str, Any]) -> Iterator[str]:
    """The pieces of a completion."""
    for choice in client.stream("/completions", {"prompt": prompt, **body}):
        yield choice.get("text") or ""
