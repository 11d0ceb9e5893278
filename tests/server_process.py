"""A real server process on a free loopback port, always killed at the end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from waiting import PATIENCE, until

REPOSITORY = Path(__file__).resolve().parent.parent
START_SECONDS = 120.0
# For servers of several processes: a small KV cache is quickly allocated, once for each of them.
SMALL = (
    "--max-model-len", "1024", "--max-num-seqs", "8", "--num-gpu-blocks-override", "160",
)  # fmt: skip
# httpx's own 5 s are too short for a machine that stalls, and certificates take 20 ms to read.
PLAIN: dict[str, Any] = {"timeout": 120.0, "verify": False}
# Below the ports that the kernel gives to connections: one of those could take a port between the
# moment it is found free and the moment a server binds it.
SERVER_PORTS = range(10_000, 32_000)
_given: set[int] = set()


def free_port() -> int:
    """A port of the loopback device that is free, and is not given to anybody else here."""
    while True:
        port = random.SystemRandom().choice(SERVER_PORTS)
        if port not in _given and _is_free(port):
            _given.add(port)
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **(extra or {})}


class ServerProcess:
    """One `api_server` process.

    Attributes:
        port: Its port.
        metrics_port: Where its metrics are; the same, unless a test sets it.
        headers: What it wants to be asked with for its metrics.
        process: The process.
    """

    def __init__(
        self,
        folder: Path,
        *flags: str,
        model: str = "demo",
        port: int | None = None,
        env: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        stderr: int | None = None,
    ) -> None:
        self.folder = folder
        self.port = self.metrics_port = free_port() if port is None else port
        self.headers: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.stderr_path = folder / "stderr.txt"
        command = [
            *prefix, sys.executable, "-m", "fastdeploy_lite.entrypoints.openai.api_server",
            "--model", model, "--host", "127.0.0.1", "--port", str(self.port), *flags,
        ]  # fmt: skip
        with self.stderr_path.open("wb") as file:
            output = file if stderr is None else stderr
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment(env), stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text(errors="replace")

    def wait_ready(self) -> ServerProcess:
        """Wait for the port, then for /health, as upstream's harnesses do."""

        def is_ready() -> bool:
            assert self.process.poll() is None, f"the server exited: {self.stderr[-3000:]}"
            with contextlib.suppress(httpx.HTTPError):
                return self.health() == 200
            return False

        until(is_ready, START_SECONDS, every=0.1, told=lambda: self.stderr[-3000:])
        return self

    def get(self, path: str, **fields: Any) -> httpx.Response:
        """Ask over a connection of its own."""
        return httpx.get(self.url + path, **{**PLAIN, **fields})

    def post(self, path: str, **fields: Any) -> httpx.Response:
        """Post over a connection of its own."""
        return httpx.post(self.url + path, **{**PLAIN, **fields})

    def says(self, text: str, file: str = "") -> str:
        """Wait until stderr, or a file in `log/`, holds a text: threads write them; gives all."""

        def said() -> str:
            path = self.folder / "log" / file
            return (path.read_text() if path.exists() else "") if file else self.stderr

        until(lambda: text in said(), told=lambda: f"{text!r} is not in {said()[-3000:]}")
        return said()

    def health(self) -> int:
        """Status of /health."""
        return self.get("/health").status_code

    def engine(self) -> psutil.Process:
        """The engine's process: the child that uses the most memory."""

        def size(child: psutil.Process) -> int:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                return int(child.memory_info().rss)
            return 0

        return max(self.family()[1:], key=size)

    def family(self) -> list[psutil.Process]:
        """The server and all its descendants."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def processes(self, module: str) -> list[psutil.Process]:
        """Its descendants that run a module; one that ends meanwhile has no command line."""

        def runs(process: psutil.Process) -> bool:
            with contextlib.suppress(psutil.NoSuchProcess):
                return any(module in word for word in process.cmdline())
            return False

        return [process for process in self.family() if runs(process)]

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for the end and return the exit status."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        """End everything that this server started."""
        with contextlib.suppress(psutil.Error):
            for process in reversed(self.family()):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def metric(self, name: str) -> float:
        """One unlabelled sample of /metrics."""
        return self.metrics(name)[0]

    def metrics(self, *names: str) -> list[float]:
        """Unlabelled samples of one moment of /metrics."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        lines = httpx.get(url, headers=self.headers, **PLAIN).text.splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if line and line[0] != "#")
        return [float(found[name]) for name in names]

    def wait_running(self, count: int) -> None:
        """Wait until so many sequences are at work."""
        until(lambda: self.metric("fastdeploy:num_requests_running") >= count)

    def wait_idle(self) -> None:
        """Wait until nothing runs and all KV blocks are back."""
        names = ("num_requests_running", "num_requests_waiting", "available_gpu_block_num",
                 "max_gpu_block_num")  # fmt: skip

        def state() -> list[float]:
            return self.metrics(*(f"fastdeploy:{name}" for name in names))

        def is_idle() -> bool:
            running, waiting, available, most = state()
            return running == waiting == 0 and available == most

        until(is_idle, told=lambda: dict(zip(names, state(), strict=True)))


@contextlib.contextmanager
def running_server(
    folder: Path,
    flags: Sequence[str] = (),
    *,
    model: str = "demo",
    env: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
    stderr: int | None = None,
) -> Iterator[ServerProcess]:
    """A ready server; killed when the block ends.

    `prefix` stands before the command, `stderr` is a descriptor instead of a file.
    """
    server = ServerProcess(folder, *flags, model=model, env=env, prefix=prefix, stderr=stderr)
    try:
        yield server.wait_ready()
    finally:
        server.kill()
