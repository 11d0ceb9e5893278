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


SAME_BITS = {"FD_DETERMINISTIC_MODE": "1"}
"""Many tests compare answers of steps in other company, which a card promises with it alone."""


@pytest.fixture(autouse=True, scope="module")
def deterministic() -> Iterator[None]:
    """Models and servers that a test starts itself; taken back for the tests of other folders."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SAME_BITS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model behind HTTP."""
    folder = tmp_path_factory.mktemp("server")
    with running_server(folder, SHARED_FLAGS, env=SAME_BITS) as process:
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
