"""Chunks of text and log-probabilities from the core's tokens."""

from __future__ import annotations

import pytest
from helpers import EOS, demo_tokenizer, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_lite.engine.generation import StopFinder, end_of
from fastdeploy_lite.engine.output_processor import OutputProcessor
from fastdeploy_lite.engine.request import RequestOutput
from fastdeploy_lite.request.messages import EngineOutput, EngineRequest, Timing
from fastdeploy_lite.request.step import LOWEST, TokenLogprobs


def chunks(request: EngineRequest, outputs: list[EngineOutput]) -> list[RequestOutput]:
    processor = OutputProcessor(demo_tokenizer())
    processor.add(request, prompt="P", index=3)
    result = [processor.process(output) for output in outputs]
    with pytest.raises(KeyError):
        processor.process(outputs[-1])
    return result


def token_by_token(ids: list[int], **last: object) -> list[EngineOutput]:
    outputs = [EngineOutput("r", [token]) for token in [*ids, EOS]]
    outputs[-1].finished, outputs[-1].finish_reason = True, "stop"
    for name, value in last.items():
        setattr(outputs[-1], name, value)
    return outputs


def text_of(results: list[RequestOutput]) -> str:
    return "".join(result.outputs.text for result in results)


def test_chunks_hold_what_is_new_and_add_up() -> None:
    ids = demo_tokenizer().encode_text("Hi 李白 🙂")
    results = chunks(make_request("r", [1, 2]), token_by_token(ids))
    assert text_of(results) == "Hi 李白 🙂", "without the closing EOS"
    assert [r.outputs.token_ids for r in results] == [[t] for t in [*ids, EOS]]
    assert [r.outputs.send_idx for r in results] == list(range(len(ids) + 1))
    assert {(r.prompt, r.outputs.index) for r in results} == {("P", 3)}
    assert results[0].prompt_token_ids == [1, 2]
    assert [r.finished for r in results] == [False] * len(ids) + [True]
    assert results[-1].outputs.finish_reason == "stop"
    whole = results[0]
    for chunk in results[1:]:
        whole.add(chunk)
    assert (whole.outputs.token_ids, whole.outputs.text) == ([*ids, EOS], "Hi 李白 🙂")


def test_the_closing_eos_shows_when_asked_for() -> None:
    request = EngineRequest(
        "r", [1], make_request("r", [1]).sampling, include_stop_str_in_output=True
    )
    results = chunks(request, token_by_token(demo_tokenizer().encode_text("a")))
    assert [r.outputs.text for r in results] == ["a", "</s>"]


def test_an_incomplete_character_appears_at_the_end() -> None:
    ids = demo_tokenizer().encode_text("🙂")[:2]
    results = chunks(make_request("r", [1]), token_by_token(ids))
    assert text_of(results) == "\ufffd"
    assert results[-1].outputs.text == "\ufffd"


def test_an_aborted_answer_keeps_its_last_token() -> None:
    ids = demo_tokenizer().encode_text("ab")
    outputs = [EngineOutput("r", [token]) for token in ids]
    outputs.append(
        EngineOutput("r", finished=True, finish_reason="abort", error_code=499, error_msg="Aborted")
    )
    results = chunks(make_request("r", [1]), outputs)
    assert text_of(results) == "ab"
    assert (results[-1].error_code, results[-1].error_msg) == (499, "Aborted")


STOPS = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.text("abcd", max_size=12), STOPS, st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_an_answer_ends_with_its_stop_text_or_before_it(
    text: str, stops: list[str], size: int, least: int, strips: bool
) -> None:
    """Tokens of any length, and stops that do not count yet: what was shown stays."""
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    finder = StopFinder(stops, (), demo_tokenizer().detokenizer())
    outputs, expected, length = list[EngineOutput](), text, 0
    for token in (token for piece in pieces for token in _one(piece)):
        outputs.append(EngineOutput("r", [token]))
        before, length = length, length + len(demo_tokenizer().decode([token]))
        found = finder.feed([token])
        if isinstance(found, str) and len(outputs) > least:
            end = min(filter(None, (end_of(stop, text[:length], before) for stop in stops)))
            expected = text[: end - len(found) if strips else end]
            outputs[-1].stop_reason = found
            break
    outputs.append(EngineOutput("r", [EOS], finished=True, finish_reason="stop"))
    outputs[-1].stop_reason = outputs[-2].stop_reason if len(outputs) > 1 else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FD_LITE_STRIP_STOP_TEXT", "1" if strips else "0")
        results = chunks(make_request("r", [1], stop=tuple(stops)), outputs)
    assert text_of(results) == expected


def _one(piece: str) -> list[int]:
    return demo_tokenizer().encode_text(piece)


@pytest.mark.parametrize(("strips", "expected"), [("0", "ab c"), ("1", "a")])
def test_what_a_token_says_after_the_stop_text_is_left_out(
    monkeypatch: pytest.MonkeyPatch, strips: str, expected: str
) -> None:
    monkeypatch.setenv("FD_LITE_STRIP_STOP_TEXT", strips)
    outputs = [EngineOutput("r", _one(text)) for text in ("ab", " cd")]
    outputs[-1].stop_reason = "b c"
    outputs.append(EngineOutput("r", [EOS], finished=True, finish_reason="stop", stop_reason="b c"))
    request = make_request("r", [1], stop=("b c",))
    assert text_of(chunks(request, outputs)) == expected


def test_stop_text_is_kept_by_default() -> None:
    ids = demo_tokenizer().encode_text("ab。")
    request = make_request("r", [1], stop=("。",))
    outputs = token_by_token(ids, stop_reason="。")
    outputs[-2].stop_reason = "。"
    results = chunks(request, outputs)
    assert text_of(results) == "ab。"
    assert text_of(results[:1]) != "", "nothing is held back"


def test_logprobs_take_upstreams_forms() -> None:
    outputs = token_by_token([30])
    outputs[0].new_logprobs = [TokenLogprobs(-2.0, 3, [40, 41], [-0.5, -1.0])]
    outputs[0].prompt_logprobs = [TokenLogprobs(-1.5, 2, [50], [-0.1])]
    first = chunks(make_request("r", [5, 6]), outputs)[0]
    assert first.outputs.logprob == -2.0
    assert first.outputs.logprobs is not None
    entry = first.outputs.logprobs[0]
    assert entry is not None
    assert {token: (p.logprob, p.rank) for token, p in entry.items()} == {
        40: (-0.5, 1),
        41: (-1.0, 2),
    }
    assert entry[40].decoded_token == demo_tokenizer().decode([40])
    lists = first.outputs.top_logprobs
    assert lists == ([[30, 40, 41]], [[-2.0, -0.5, -1.0]], [3])
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert {i: p.logprob for i, p in (first.prompt_logprobs[1] or {}).items()} == {
        6: -1.5,
        50: -0.1,
    }


def test_what_could_not_come_is_no_alternative() -> None:
    outputs = token_by_token([30])
    outputs[0].new_logprobs = [TokenLogprobs(0.0, 1, [30, 0, 1], [0.0, LOWEST, LOWEST])]
    first = chunks(make_request("r", [5]), outputs)[0].outputs
    assert first.logprobs is not None
    assert list(first.logprobs[0] or {}) == [30]
    assert first.top_logprobs is not None
    assert first.top_logprobs.alternatives(0, -1) == [(30, 0.0)]
    assert first.top_logprobs.logprobs == [[0.0, 0.0, LOWEST, LOWEST]], "rows are of one length"


def test_metrics_are_durations_and_times() -> None:
    request = EngineRequest("r", [1], make_request("r", [1]).sampling, 100.0, 100.5)
    outputs = token_by_token([30], timing=Timing(101.0, 103.0, 104.0))
    metrics = chunks(request, outputs)[-1].metrics
    assert metrics is not None
    assert (metrics.arrival_time, metrics.inference_start_time) == (100.0, 103.0)
    assert (metrics.first_token_time, metrics.time_in_queue) == (1.0, 2.0)
    assert metrics.preprocess_cost_time == 0.5
