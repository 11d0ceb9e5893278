"""Errors stay one printable line; the loading bar counts bytes."""

from __future__ import annotations

import pytest

from fastdeploy_lite.checkpoint.progress import loading_bar
from fastdeploy_lite.utils.errors import (
    CheckpointError,
    ConfigError,
    FastDeployError,
    RequestError,
    one_line,
    quote,
)


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\x1b[2Jb", "a\u2028b", "a\ud800b", "a\x00b", "a\u202eb"]
)
def test_messages_are_one_printable_line(text: str) -> None:
    message = str(FastDeployError(text))
    assert message.isprintable()
    assert message.startswith("a")
    assert message.endswith("b")
    message.encode()  # a lone surrogate would not go into a log or a response


def test_ordinary_text_is_kept() -> None:
    text = "config.json: 解析三首李白的诗 'x' [1, 2] é"
    assert one_line(text) == text


def test_quotes_are_short() -> None:
    assert quote("x" * 10_000).endswith("...")
    assert len(quote("x" * 10_000)) == 120
    assert quote(10**5000) == "<int>"
    assert quote("a\nb") == r"'a\nb'"


def test_kinds_of_errors() -> None:
    for kind in (CheckpointError, ConfigError, RequestError):
        assert issubclass(kind, FastDeployError)
        assert issubclass(kind, ValueError)
    error = RequestError("bad", param="top_p", code="out_of_range")
    assert (str(error), error.param, error.code) == ("bad", "top_p", "out_of_range")


def test_loading_bar_counts_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    with loading_bar(3 << 20) as bar:
        bar.update(3 << 20)
    shown = capsys.readouterr().err
    assert "Loading Weights: 100%" in shown
    assert "3.00M/3.00M" in shown


def test_loading_bar_can_be_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with loading_bar(100, enabled=False) as bar:
        bar.update(100)
    assert capsys.readouterr().err == ""
