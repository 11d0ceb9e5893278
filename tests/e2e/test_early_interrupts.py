"""Ctrl-C while a command is still importing, loading, or about to end: silence and status 130."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from server_process import environment, free_port
from waiting import PATIENCE

SERVE = ("serve", "--model", "demo", "--host", "127.0.0.1")
COMMANDS = {
    "chat": ("-m", "fastdeploy_lite", "chat"),
    "serve": ("-m", "fastdeploy_lite.entrypoints.cli.main", *SERVE),
    "api_server": ("-m", "fastdeploy_lite.entrypoints.openai.api_server", *SERVE[1:]),
}
# Modules in the order of their import; the signal comes as soon as one of them is there.
FRONT = ("argparse", "yaml", "pydantic", "uvicorn", "starlette.routing", "fastapi")
MARKS = {
    "chat": ("argparse", "yaml", "numpy", "paddle.base", "paddle"),
    "serve": FRONT,
    "api_server": FRONT,
}


class Command:
    """A command whose imports can be watched.

    Attributes:
        process: It.
    """

    def __init__(self, folder: Path, arguments: tuple[str, ...]) -> None:
        port = ["--port", str(free_port())] if "--host" in arguments else []
        self.process = subprocess.Popen(
            # A shell that starts the tests in the background lets them ignore Ctrl-C, and children
            # inherit that.
            ["env", "--default-signal=INT", sys.executable, "-X", "importtime", *arguments, *port],
            cwd=folder, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()

    def wait_import(self, module: str) -> None:
        """Wait until a module has been imported."""

        def there() -> bool:
            return any(line.split()[-1:] == [module] for line in self._lines)

        with self._changed:
            assert self._changed.wait_for(there, 120), f"{module} was not imported"

    def interrupt(self) -> tuple[int, str]:
        """Ctrl-C; gives the exit status as a shell shows it, and what was said besides imports."""
        os.kill(self.process.pid, signal.SIGINT)
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)  # until the last line of all that write there
        assert not self._reader.is_alive()
        said = "".join(line for line in self._lines if not line.startswith("import time:"))
        return (128 - status if status < 0 else status), said

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


def check_silence(status: int, said: str) -> None:
    assert status == 130, said
    assert "Traceback" not in said
    assert "KeyboardInterrupt" not in said
    assert "Error" not in said


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_between_imports_is_silent(name: str, tmp_path: Path) -> None:
    for module in MARKS[name]:
        command = Command(tmp_path, COMMANDS[name])
        try:
            command.wait_import(module)
            check_silence(*command.interrupt())
        finally:
            command.kill()


@pytest.mark.parametrize("delay", [0.5, 1.0, 1.6, 2.5, 4.0])
@pytest.mark.parametrize("name", ["chat", "api_server"])
def test_an_interrupt_at_any_later_time_is_silent(name: str, delay: float, tmp_path: Path) -> None:
    command = Command(tmp_path, COMMANDS[name])
    try:
        command.wait_import("argparse")
        time.sleep(delay)
        status, said = command.interrupt()
        assert "Traceback" not in said
        assert "KeyboardInterrupt" not in said
        # A server that is ready stops in good order.
        assert status == (0 if "Application startup complete" in said else 130), said
    finally:
        command.kill()
