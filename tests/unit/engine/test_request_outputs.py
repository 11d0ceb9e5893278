"""Result objects: merging, conversion, and the text that scripts print."""

from __future__ import annotations

import numpy as np

from fastdeploy_lite.engine.request import (
    CompletionOutput,
    Request,
    RequestMetrics,
    RequestOutput,
)
from fastdeploy_lite.request.outputs import Logprob, LogprobsLists


def chunk(tokens: list[int], text: str, **extra: object) -> RequestOutput:
    return RequestOutput("r", outputs=CompletionOutput(token_ids=tokens, text=text), **extra)  # type: ignore[arg-type]


def test_repr_has_upstreams_fields_in_order_and_balanced_parentheses() -> None:
    text = repr(chunk([5, 2], "hi", prompt="P", metrics=RequestMetrics(arrival_time=1.0)))
    names = [
        "RequestOutput(request_id=r", "prompt='P'", "prompt_token_ids=[]", "prompt_logprobs=None",
        "output_type=3", "outputs=CompletionOutput(index=0", "send_idx=0", "text='hi'",
        "token_ids=[5, 2]", "draft_token_ids=None", "reasoning_content=None", ", logprobs=None",
        ", top_logprobs=None", "draft_top_logprobs=None", "finished=False", "num_cached_tokens=0",
        "num_input_image_tokens=0", "num_input_video_tokens=0",
        "metrics=RequestMetrics(arrival_time=1.0", "error_code=200", "error_msg=None",
    ]  # fmt: skip
    places = [text.index(name) for name in names]
    assert places == sorted(places)
    assert text.count("(") == text.count(")")


def test_chunks_merge_into_the_whole() -> None:
    whole = chunk([5], "a", prompt_token_ids=[1, 2], num_cached_tokens=64)
    whole.outputs.logprobs = [{5: Logprob(-0.1, 1, "a")}]
    whole.outputs.top_logprobs = LogprobsLists([[5, 6]], [[-0.1, -3.0]], [1])
    later = chunk([6, 2], "b", finished=True, metrics=RequestMetrics(arrival_time=2.0))
    later.outputs.send_idx, later.outputs.finish_reason = 1, "stop"
    later.outputs.logprobs = [{6: Logprob(-0.2, 1, "b")}, {2: Logprob(-0.3, 2, "")}]
    later.outputs.top_logprobs = LogprobsLists([[6, 5], [2, 5]], [[-0.2, -2], [-0.3, -1]], [1, 2])
    whole.add(later)
    assert (whole.outputs.token_ids, whole.outputs.text) == ([5, 6, 2], "ab")
    assert whole.finished
    assert (whole.outputs.send_idx, whole.outputs.finish_reason) == (1, "stop")
    assert (whole.num_cached_tokens, whole.prompt_token_ids) == (64, [1, 2])
    assert whole.metrics is not None
    assert whole.metrics.arrival_time == 2.0
    assert [list(entry) for entry in whole.outputs.logprobs] == [[5], [6], [2]]  # type: ignore[arg-type]
    assert whole.outputs.top_logprobs.sampled_token_ranks == [1, 1, 2]


def test_dictionaries_and_back() -> None:
    whole = chunk([5], "a", prompt="p", metrics=RequestMetrics(arrival_time=3.0))
    again = RequestOutput.from_dict(whole.to_dict())
    assert repr(again) == repr(whole)
    assert whole.to_dict()["outputs"]["text"] == "a"
    assert whole.to_dict()["metrics"]["arrival_time"] == 3.0


def test_numpy_prompts_become_lists() -> None:
    output = RequestOutput("r", prompt_token_ids=np.array([1, 2]))  # type: ignore[arg-type]
    assert output.prompt_token_ids == [1, 2]
    assert type(output.prompt_token_ids[0]) is int


def test_logprobs_lists_are_cut_by_columns_and_rows() -> None:
    lists = LogprobsLists([[1, 2, 3], [4, 5, 6]], [[-1, -2, -3], [-4, -5, -6]], [1, 2])
    assert lists.slice_columns(1, 3).logprob_token_ids == [[2, 3], [5, 6]]
    assert lists.slice_rows(1, 2) == LogprobsLists([[4, 5, 6]], [[-4, -5, -6]], [2])


def test_request_from_a_flat_mapping() -> None:
    request = Request.from_dict({"prompt": "hi", "temperature": 0.5, "stream": True})
    assert (request.prompt, request.sampling_params.temperature) == ("hi", 0.5)
    flat = request.to_dict()
    assert (flat["temperature"], flat["request_id"]) == (0.5, request.request_id)
