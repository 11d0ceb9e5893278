"""Failures that the engine reports, as the errors of an answer."""

from __future__ import annotations

import pytest

from fastdeploy_lite.entrypoints.openai import errors
from fastdeploy_lite.entrypoints.openai.choices import _raise_error
from fastdeploy_lite.request.outputs import CompletionOutput, RequestOutput


@pytest.mark.parametrize(
    ("code", "status", "kind", "retry"),
    [(400, 400, "invalid_request_error", None), (429, 429, "rate_limit_error", "1"),
     (503, 503, "server_error", "1"), (500, 500, "server_error", None)],
)  # fmt: skip
def test_a_status_of_the_core_is_the_answers(
    code: int, status: int, kind: str, retry: str | None
) -> None:
    output = RequestOutput("r", outputs=CompletionOutput(finish_reason="error"), error_code=code)
    output.error_msg = "why"
    with pytest.raises(Exception, match="why") as caught:
        _raise_error(output)
    answer = errors.from_exception(caught.value)
    assert answer.status_code == status
    assert f'"type":"{kind}"'.encode() in answer.body
    assert answer.headers.get("retry-after") == retry
