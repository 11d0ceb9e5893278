"""The standard streams of a program: open, and printing whatever a text holds."""

from __future__ import annotations

import io
import os
import sys


def prepare_standard_streams() -> None:
    """Make printing safe, whatever started this process.  Idempotent.

    A console that is not UTF-8 shows escapes instead of ending the program, and input that is not
    in its encoding is read with replacement characters. A standard descriptor that is closed is
    opened to nowhere: else the next socket would take its number and receive what is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            os.set_inheritable(opened, True)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123 - for the process
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
