"""One server for the tests that only talk to it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from server_process import ServerProcess, running_server

SHARED_FLAGS = (
    "--max-model-len", "2048", "--max-num-seqs", "16", "--enable-logprob",
    "--num-gpu-blocks-override", "256",
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def deterministic() -> Iterator[None]:
    """FD_DETERMINISTIC_MODE=1: many tests compare answers of steps in other company.

    For those who run them on a card; a CPU keeps the promise in any case.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FD_DETERMINISTIC_MODE", "1")
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model behind HTTP."""
    with running_server(tmp_path_factory.mktemp("server"), SHARED_FLAGS) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    """The real SDK, without its retries: an error must be seen."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    """Plain HTTP."""
    with httpx.Client(base_url=server.url, timeout=120) as plain:
        yield plain
