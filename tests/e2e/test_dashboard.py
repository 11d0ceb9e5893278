"""Every panel of the dashboard and every alert, asked of a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from server_process import PLAIN, REPOSITORY, ServerProcess, free_port, running_server
from waiting import PATIENCE, until

PROMETHEUS = shutil.which("prometheus")
DASHBOARD = REPOSITORY / "deploy/grafana/dashboards/fastdeploy-lite.json"
ALERTS = REPOSITORY / "deploy/prometheus/alerts.yml"
pytestmark = [
    pytest.mark.skipif(PROMETHEUS is None, reason="needs Prometheus: apt-get install prometheus"),
    pytest.mark.slow,
]


@contextlib.contextmanager
def prometheus(folder: Path, target: int) -> Iterator[str]:
    """A Prometheus with our configuration, aimed at the port `target`; gives its address."""
    source = REPOSITORY / "deploy/prometheus/prometheus.yml"
    config = yaml.safe_load(source.read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ALERTS)]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{target}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        str(PROMETHEUS), f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=folder, stderr=(folder / "log.txt").open("wb"))
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: is_ready(url), told=(folder / "log.txt").read_text)
        yield url
    finally:
        process.terminate()
        process.wait(PATIENCE)


def is_ready(url: str) -> bool:
    """Whether Prometheus answers questions: it listens before, and says 503."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/-/ready", **PLAIN).status_code == httpx.codes.OK
    return False


def ask(url: str, expression: str) -> list[dict[str, Any]]:
    """The samples of an instant query."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expression}, **PLAIN)
    body = answer.json()
    assert body["status"] == "success", body
    return list(body["data"]["result"])


def make_traffic(server: ServerProcess, is_seen: Callable[[], bool]) -> None:
    """Answers, whole and streamed, until they are seen; the same text, so that prefixes hit."""
    body = {"messages": [{"role": "user", "content": "解析三首李白的诗" * 20}], "max_tokens": 30}

    def answer_and_look() -> bool:
        for stream in (False, True):
            server.post("/v1/chat/completions", json={**body, "stream": stream})
        return is_seen()

    until(answer_and_look)


def panels() -> list[tuple[str, list[str]]]:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [
        (panel["title"], [target["expr"] for target in panel["targets"]])
        for panel in board["panels"]
        if panel["type"] != "row"
    ]


def test_every_panel_shows_something(tmp_path: Path) -> None:
    flags = ("--speculative-config", '{"method": "ngram"}', "--max-model-len", "1024",
             "--enable-prefix-caching")  # fmt: skip
    (tmp_path / "prometheus").mkdir()
    with (
        running_server(tmp_path / "server", flags) as server,
        prometheus(tmp_path / "prometheus", server.port) as url,
    ):
        make_traffic(server, lambda: is_growing(url))
        until(lambda: ask(url, "up")[0]["value"][1] == "1")  # a scrape has half a second
        for title, expressions in panels():
            for expression in expressions:
                query = expression.replace("$__rate_interval", "1m").replace("$instance", ".*")
                until(
                    partial(ask, url, query), told=lambda title=title, query=query: (title, query)
                )
        until(lambda: {rule["health"] for rule in rules(url)} == {"ok"}, told=lambda: rules(url))
        until(
            lambda: {rule["state"] for rule in rules(url)} == {"inactive"}, told=lambda: rules(url)
        )


def is_growing(url: str) -> bool:
    """Whether Prometheus has seen tokens being made."""
    return bool(ask(url, "increase(fastdeploy:generation_tokens_total[1m]) > 0"))


def rules(url: str) -> list[dict[str, Any]]:
    """The alerts as they are judged; "unknown" until that has been done once."""
    answer = httpx.get(f"{url}/api/v1/rules", **PLAIN).json()
    return list(answer["data"]["groups"][0]["rules"])
