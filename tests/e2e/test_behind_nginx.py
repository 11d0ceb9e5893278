"""The server below a path of a real nginx, with the snippet that deploy/ ships."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from server_process import PLAIN, REPOSITORY, free_port, running_server
from waiting import PATIENCE, until

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
SNIPPET = REPOSITORY / "deploy/nginx/fastdeploy-lite.conf"
MAIN = """
daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    server {{
        listen 127.0.0.1:{port};
        include {folder}/snippet.conf;
    }}
}}
"""
pytestmark = pytest.mark.skipif(NGINX is None, reason="needs nginx: apt-get install nginx-light")


@contextlib.contextmanager
def nginx(folder: Path, server_port: int) -> Iterator[str]:
    """nginx in front of a server; gives the address below which that is found."""
    port = free_port()
    snippet = SNIPPET.read_text(encoding="utf-8")
    address = f"http://127.0.0.1:{server_port}"
    (folder / "snippet.conf").write_text(snippet.replace("http://127.0.0.1:8000", address))
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder, port=port))
    command = [str(NGINX), "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    subprocess.run([*command, "-t"], check=True, capture_output=True)
    url, log = f"http://127.0.0.1:{port}/llm", folder / "nginx.txt"
    process = subprocess.Popen(command, stderr=log.open("wb"))

    def listens() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            return bool(httpx.get(url, **PLAIN))
        return False

    try:
        until(listens, told=log.read_text)
        yield url
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo model below `/llm` of nginx."""
    flags = ("--root-path", "/llm", "--max-model-len", "1024")
    with (
        running_server(tmp_path_factory.mktemp("behind"), flags) as server,
        nginx(tmp_path_factory.mktemp("nginx"), server.port) as address,
    ):
        yield address


def test_the_page_and_all_that_it_loads_come_through(url: str) -> None:
    moved = httpx.get(url, **PLAIN)
    assert moved.status_code == 308
    assert moved.headers["location"].endswith("/llm/")
    for page in ("/", "/docs"):
        answer = httpx.get(url + page, **PLAIN)
        assert answer.status_code == 200
        files = re.findall(r'(?:src|href)="(web/[^"]*)"', answer.text)
        assert len(files) >= 4
        for file in files:
            assert httpx.get(f"{url}/{file}", **PLAIN).status_code == 200, file


def test_the_description_names_the_path_below_which_it_is_served(url: str) -> None:
    described = httpx.get(f"{url}/openapi.json", **PLAIN).json()
    assert described["servers"] == [{"url": "/llm"}]
    assert "/v1/chat/completions" in described["paths"]


def test_a_client_library_talks_through_it(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0) as client:
        assert client.models.list().data
        answer = client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": "你好"}], max_tokens=4
        )
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_tokens_are_not_held_back(url: str) -> None:
    """Who has read the first can still stop the last."""
    body = {
        "messages": [{"role": "user", "content": "《静夜思》"}], "request_id": "read",
        "max_tokens": 900, "min_tokens": 900, "stream": True,
    }  # fmt: skip
    choices, stopped = [], []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, **PLAIN) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choices.append(json.loads(line[6:])["choices"][0])
            if len(choices) == 3 and not stopped:  # the role and two tokens
                abort = httpx.post(f"{url}/v1/abort_requests", json={"req_ids": ["read"]}, **PLAIN)
                stopped = abort.json()["result"]["aborted"]
    assert len(stopped) == 1
    assert choices[-1]["finish_reason"] == "abort"
    assert len(choices) < 900


def test_a_reader_that_leaves_ends_its_request(url: str) -> None:
    body = {"prompt": "《静夜思》", "max_tokens": 900, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, **PLAIN) as answer:
        next(answer.iter_lines())
    idle = "fastdeploy:num_requests_running 0.0"
    until(lambda: idle in httpx.get(f"{url}/metrics", **PLAIN).text)
