"""Clients that people use, each against a real server; `pip install 'fastdeploy-lite[clients]'`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
from server_process import ServerProcess, running_server

FLAGS = ("--max-model-len", "1024", "--enable-logprob", "--num-gpu-blocks-override", "128")


def library(name: str) -> Any:
    """A client library; skips where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is not installed: pip install 'fastdeploy-lite[clients]'")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model behind HTTP."""
    with running_server(tmp_path_factory.mktemp("server"), FLAGS) as process:
        yield process


class Weather(pydantic.BaseModel):
    """What is asked for."""

    raining: bool
    degrees: int = pydantic.Field(ge=0, le=40)


def test_langchain(server: ServerProcess) -> None:
    chat = library("langchain_openai").ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="x", model="demo", max_tokens=300, temperature=0
    )
    whole = chat.invoke("Hello")
    assert whole.content == "".join(chunk.content for chunk in chat.stream("Hello"))
    for method in ("function_calling", "json_schema"):
        found = chat.with_structured_output(Weather, method=method).invoke("Hello")
        assert isinstance(found, Weather)


def test_litellm(server: ServerProcess) -> None:
    litellm = library("litellm")
    fields = {
        "model": "openai/demo", "api_base": f"{server.url}/v1", "api_key": "x", "max_tokens": 20,
        "messages": [{"role": "user", "content": "Hello"}], "temperature": 0,
    }  # fmt: skip
    whole = litellm.completion(**fields).choices[0].message.content
    chunks = litellm.completion(**fields, stream=True)
    assert whole == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_instructor(server: ServerProcess) -> None:
    import openai

    instructor = library("instructor")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as plain:
        client = instructor.from_openai(plain)  # its default mode forces a tool
        found = client.chat.completions.create(
            model="demo", max_tokens=100, max_retries=0, response_model=Weather,
            messages=[{"role": "user", "content": "Hello"}],
        )  # fmt: skip
    assert isinstance(found, Weather)


def test_pydantic_ai(server: ServerProcess) -> None:
    agents = library("pydantic_ai")
    models, providers = (
        library("pydantic_ai.models.openai"),
        library("pydantic_ai.providers.openai"),
    )
    provider = providers.OpenAIProvider(base_url=f"{server.url}/v1", api_key="x")
    model = models.OpenAIChatModel("demo", provider=provider)
    agent = agents.Agent(model, output_type=Weather, model_settings={"max_tokens": 100})
    assert isinstance(agent.run_sync("Hello").output, Weather)
