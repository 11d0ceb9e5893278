"""Tests that ask another process give it time for its answer.

The five seconds that httpx waits by itself are a stall of a busy machine, not a fault.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ASKS = {"get", "post", "head", "options", "request", "stream", "Client", "AsyncClient"}
BOUNDED = {"timeout", "transport", None}  # a transport asks nobody; None is `**fields`


def impatient_calls(code: str) -> Iterator[int]:
    """Lines that ask through httpx without saying for how long."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="httpx"), attr=name), keywords=given
            ):
                if name in ASKS and not BOUNDED & {keyword.arg for keyword in given}:
                    yield node.lineno


def test_httpx_is_told_how_long_to_wait() -> None:
    assert list(impatient_calls("httpx.get(url)\nhttpx.get(url, timeout=9)\nhttpx.get(**f)")) == [1]
    files = [*TESTS.rglob("*.py")]
    assert len(files) > 100
    found = [
        f"{file}:{line}" for file in files for line in impatient_calls(file.read_text("utf-8"))
    ]
    assert found == []
