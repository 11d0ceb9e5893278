"""Where the command `fastdeploy-lite` begins: before anything that takes time to import."""

from __future__ import annotations

from fastdeploy_lite.utils.interrupts import end_on_interrupt


def main() -> None:
    """Entry point of the console script and of `python -m fastdeploy_lite`."""
    end_on_interrupt()
    from fastdeploy_lite.entrypoints.cli.main import main as rest  # noqa: PLC0415 - takes its time

    rest()
