"""Batch files of lines that no client writes: each line costs its own answer and nothing else.

Bodies at and beyond every bound (`http_messages`), envelopes of wrong types, damaged bytes, and
plain lines among them. The suite tries some hundreds; `FD_LITE_FUZZ_REQUESTS=4000` that many.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from http_messages import COMPLETION, NUMBERS, TEXTS, body_of
from server_process import environment

LINES = int(os.environ.get("FD_LITE_FUZZ_REQUESTS", "200"))
PLAIN = {"custom_id": "plain", "method": "POST", "url": COMPLETION,
         "body": {"prompt": "hello", "max_tokens": 4, "temperature": 0}}  # fmt: skip
PLAIN_EVERY = 10


def deep(levels: int) -> Any:
    value: Any = 0
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def batch_line(number: int) -> bytes:
    """The line of a number, without a line feed."""
    if number % PLAIN_EVERY == 0:
        return json.dumps(PLAIN).encode()
    rng = random.Random(number)
    path, body = body_of(rng)
    request: dict[str, Any] = {"custom_id": f"line {number}", "method": "POST",
                               "url": path, "body": body}  # fmt: skip
    kind = rng.random()
    if kind < 0.4:
        name = rng.choice(list(request))
        odd = [*NUMBERS, *TEXTS, deep(100), deep(300), deep(400), deep(480)]
        request[name] = rng.choice(odd)
    elif kind < 0.5:
        del request[rng.choice(list(request))]
    data = json.dumps(request, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind > 0.85:
        at = rng.randrange(len(data))
        piece = rng.choice((b"", b"\x00", b"\xff", b"[", b'"', b"9" * 5000, b"\r", b"\xe2\x80\xa8",
                            b"[" * 3000, b"\xed\xa0\x80", b"\xef\xbb\xbf"))  # fmt: skip
        data = data[:at] + piece + data[at + rng.choice((0, 1, 5)) :]
    return data.replace(b"\n", b" ")


def refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.timeout(3600)
def test_each_line_has_its_own_answer(tmp_path: Path) -> None:
    lines = [batch_line(number) for number in range(LINES)]
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\n \n")
    command = [sys.executable, "-m", "fastdeploy_lite.entrypoints.cli.main", "run-batch"]
    command += ["-i", "in.jsonl", "-o", "out.jsonl", "--model", "demo", "--max-model-len", "96",
                "--enable-logprob", "--num-gpu-blocks-override", "64"]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    texts = (tmp_path / "out.jsonl").read_bytes().decode().split("\n")
    assert texts.pop() == ""
    answers = [json.loads(text, parse_constant=refuse_constant) for text in texts]
    assert len(answers) == LINES
    for number, answer in enumerate(answers):
        shown = f"{lines[number][:300]!r}: {str(answer)[:500]}"
        assert set(answer) == {"id", "custom_id", "response", "error"}, shown
        assert answer["custom_id"] is None or isinstance(answer["custom_id"], str), shown
        status = (answer["response"] or {}).get("status_code", 400)
        assert status in (200, 400, 501, 503), shown
        assert (status == 200) is (answer["error"] is None), shown
        if number % PLAIN_EVERY == 0:
            assert answer["custom_id"] == "plain", shown
    plain = [a["response"]["body"]["choices"] for a in answers[::PLAIN_EVERY]]
    assert all(choices == plain[0] for choices in plain)
    assert sum(a["error"] is None for a in answers) > LINES // 6
    assert sum(a["error"] is not None for a in answers) > LINES // 4
