"""Lines of a batch: each wrong one says what is wrong with it, in words for who wrote it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastdeploy_lite.entrypoints.cli import main
from fastdeploy_lite.entrypoints.cli.run_batch import answer_line

GOOD: dict[str, Any] = {
    "custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"},
}  # fmt: skip


def answered(line: Any) -> dict[str, Any]:
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=request.content))

    async def run() -> dict[str, Any]:
        async with httpx.AsyncClient(transport=transport, base_url="http://batch") as client:
            return await answer_line(client, data)

    return asyncio.run(run())


def test_a_line_that_is_right() -> None:
    answer = answered(GOOD)
    assert (answer["custom_id"], answer["error"]) == ("a", None)
    assert answer["response"]["body"] == GOOD["body"]
    assert answered({k: v for k, v in GOOD.items() if k != "method"})["error"] is None


@pytest.mark.parametrize(
    ("line", "name", "words"),
    [
        ([1], None, "expected an object with custom_id, method, url and body, found [1]"),
        (None, None, "expected an object with custom_id, method, url and body, found None"),
        (b"{", None, "the line is not JSON"),
        (b"\xff", None, "the line is not JSON"),
        (b"[" * 100_000, None, "the line is not JSON"),
        ({**GOOD, "custom_id": 5}, None, "custom_id: expected text, found 5"),
        ({"body": {}}, None, "custom_id: expected text, found None"),
        ({**GOOD, "method": "GET"}, "a", "method: expected POST, found 'GET'"),
        ({**GOOD, "url": "/v1/files"}, "a", "or /v1/completions, found '/v1/files'"),
        ({**GOOD, "url": ["x"]}, "a", "url: expected /v1/chat/completions or"),
        ({"custom_id": "a", "body": {}}, "a", "url: expected /v1/chat/completions or"),
        ({**GOOD, "body": None}, "a", "body: expected an object, found None"),
        ({**GOOD, "body": []}, "a", "body: expected an object, found []"),
        ({**GOOD, "body": {"stream": True}}, "a", "body: a batch cannot stream"),
    ],
)
def test_a_wrong_line_is_told_what_is_wrong(line: Any, name: str | None, words: str) -> None:
    answer = answered(line)
    assert words in answer["error"]
    assert "Error:" not in answer["error"]
    assert (answer["custom_id"], answer["response"]) == (name, None)


@pytest.mark.parametrize("target", ["missing/answers.jsonl", ".", "locked"])
def test_an_output_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "locked").symlink_to("/proc/nobody/writes/here")
    (tmp_path / "in.jsonl").write_text(json.dumps(GOOD))
    # There is no such model: the error would be about it if anything had been loaded.
    status = main.run(["run-batch", "-i", "in.jsonl", "-o", target, "--model", "/nonexistent"])
    assert status == 1
    assert f"--output-file {target}: " in capsys.readouterr().err
