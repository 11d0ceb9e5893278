"""A real server process on a free loopback port, always killed at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
START_SECONDS = 120.0
# For servers of several processes: a small KV cache is quickly allocated, once for each of them.
SMALL = (
    "--max-model-len", "1024", "--max-num-seqs", "8", "--num-gpu-blocks-override", "160",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(ready: Callable[[], bool], seconds: float) -> float:
    """Wait until `ready`; returns for how long."""
    started = time.monotonic()
    while not ready():
        assert time.monotonic() - started < seconds
        time.sleep(0.05)
    return time.monotonic() - started


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **(extra or {})}


class ServerProcess:
    """One `api_server` process.

    Attributes:
        port: Its port.
        metrics_port: Where its metrics are; the same, unless a test sets it.
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
        self.started = time.monotonic()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text(errors="replace")

    def wait_ready(self) -> ServerProcess:
        """Wait for the port, then for /health, as upstream's harnesses do."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server exited: {self.stderr[-3000:]}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            time.sleep(0.1)
        raise AssertionError(f"the server did not start: {self.stderr[-3000:]}")

    def health(self) -> int:
        """Status of /health."""
        return httpx.get(f"{self.url}/health", timeout=10).status_code

    def engine(self) -> psutil.Process:
        """The engine's process: the child that uses the most memory."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return max(children, key=lambda child: child.memory_info().rss)

    def family(self) -> list[psutil.Process]:
        """The server and all its descendants."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        """End everything that this server started."""
        with contextlib.suppress(psutil.Error):
            for process in reversed(self.family()):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def metric(self, name: str) -> float:
        """One unlabelled sample of /metrics."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics").text
        line = next(x for x in text.splitlines() if x.startswith(f"{name} "))
        return float(line.split()[1])

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Wait until nothing runs and all KV blocks are back."""
        deadline = time.monotonic() + seconds
        state: dict[str, float] = {}
        while time.monotonic() < deadline:
            names = ("num_requests_running", "num_requests_waiting", "available_gpu_block_num",
                     "max_gpu_block_num")  # fmt: skip
            state = {name: self.metric(f"fastdeploy:{name}") for name in names}
            running, waiting, available, most = state.values()
            if running == waiting == 0 and available == most:
                return
            time.sleep(0.05)
        raise AssertionError(f"the engine did not become idle: {state}")


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
