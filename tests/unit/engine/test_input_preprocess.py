"""From requests to tokens and numbers: defaults, limits, messages."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.request import Request
from fastdeploy_lite.engine.sampling_params import GuidedDecodingParams, SamplingParams
from fastdeploy_lite.input.preprocess import MAX_BAD_WORDS, Preprocessor, load_tokenizer
from fastdeploy_lite.request.messages import EngineSampling
from fastdeploy_lite.utils.errors import ConfigError, RequestError

RENDERED = "<|begin_of_sentence|>User: Hi\nAssistant: "
CHAT = [{"role": "user", "content": "Hi"}]


def make(**args: Any) -> Preprocessor:
    return Preprocessor(EngineArgs(model="demo", **args).create_runtime_config())


@pytest.fixture(scope="module")
def pre() -> Preprocessor:
    return make(max_model_len=256, enable_logprob=True)


def sampling(pre: Preprocessor, **params: Any) -> EngineSampling:
    return pre.process(Request(prompt="a b c", sampling_params=SamplingParams(**params))).sampling


def refused(pre: Preprocessor, **request: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        pre.process(Request(**request))
    return caught.value


def refused_sampling(pre: Preprocessor, **params: Any) -> RequestError:
    return refused(pre, prompt="a", sampling_params=SamplingParams(**params))


# Prompts -----------------------------------------------------------------------------------------


def test_forms_of_a_prompt(pre: Preprocessor) -> None:
    encode = pre.tokenizer.encode_text
    assert pre.prompt_token_ids(Request(prompt="你好 x")) == encode("你好 x")
    assert pre.prompt_token_ids(Request(prompt_token_ids=[5, 6], prompt="ignored")) == [5, 6]
    assert pre.prompt_token_ids(Request(prompt_token_ids=np.array([5, 6]))) == [5, 6]
    assert pre.prompt_token_ids(Request(messages=[5, 6])) == [5, 6]
    assert pre.prompt_token_ids(Request(messages=CHAT)) == encode(RENDERED)
    raw = [{"role": "user", "content": RENDERED}]
    assert pre.prompt_token_ids(Request(messages=raw, disable_chat_template=True)) == encode(
        RENDERED
    )
    continued = Request(messages=CHAT, completion_token_ids=[40])
    assert pre.prompt_token_ids(continued) == [*encode(RENDERED), 40]


def test_precedence_of_templates(tmp_path: Path) -> None:
    assert make(chat_template="{{ 'S' }}").render(Request(messages=CHAT)) == "S"
    own = Request(messages=CHAT, chat_template="{{ 'R' }}")
    assert make(chat_template="{{ 'S' }}").render(own) == "R"
    assert make().render(own) == "R"
    assert make().render(Request(messages=CHAT)) == RENDERED
    hostile = Request(
        messages=CHAT, chat_template="{{ ''.__class__.__mro__ }}", trusted_template=False
    )
    with pytest.raises(RequestError, match="unsafe") as caught:
        make().render(hostile)
    assert caught.value.param == "chat_template"


@pytest.mark.parametrize(
    ("request_fields", "message", "param"),
    [
        ({"prompt": ""}, "The prompt is empty", "prompt"),
        ({"prompt_token_ids": []}, "The prompt is empty", "prompt"),
        (
            {"messages": []},
            "messages can not be an empty list, unless prompt_token_ids",
            "messages",
        ),
        ({}, "messages can not be an empty list", "messages"),
        ({"prompt_token_ids": [8192]}, "token id 8192 is outside", "prompt_token_ids"),
        ({"prompt_token_ids": [-1]}, "token id -1 is outside", "prompt_token_ids"),
        ({"prompt_token_ids": [1.5]}, "expected token ids", "prompt_token_ids"),
        ({"prompt_token_ids": [True]}, "expected token ids", "prompt_token_ids"),
        ({"messages": [99999]}, "token id 99999 is outside", "messages"),
        (
            {"messages": CHAT, "chat_template_kwargs": [1]},
            "chat_template_kwargs must be a dict",
            "chat_template_kwargs",
        ),
    ],
)
def test_prompts_that_cannot_be_used(
    pre: Preprocessor, request_fields: dict[str, Any], message: str, param: str
) -> None:
    error = refused(pre, **request_fields)
    assert message in str(error)
    assert (error.param, error.code) == (param, "invalid_value")


def test_too_long_counts_min_tokens(pre: Preprocessor) -> None:
    ok = Request(prompt_token_ids=[9] * 254, sampling_params=SamplingParams(min_tokens=1))
    assert pre.process(ok).sampling.max_tokens == 2
    error = refused(pre, prompt_token_ids=[9] * 255, sampling_params=SamplingParams(min_tokens=1))
    assert str(error) == (
        "Input text is too long, input_ids_len (255) + min_tokens (1) >= max_model_len (256)"
    )
    assert error.code == "context_length_exceeded"
    assert "too long" in str(
        refused(pre, prompt="a", sampling_params=SamplingParams(min_tokens=300))
    )


def test_a_text_that_cannot_fit_is_not_tokenised(pre: Preprocessor) -> None:
    error = refused(pre, messages=[{"role": "user", "content": "x" * 30_000_000}])
    assert error.code == "context_length_exceeded"
    assert "at least" in str(error)


def test_a_model_with_fewer_rows_than_the_tokenizer_has_pieces(pre: Preprocessor) -> None:
    config = pre.config
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=1000))
    error = refused(Preprocessor(small, pre.tokenizer), prompt="李白")
    assert "outside the model's vocabulary of 1000" in str(error)


# Numbers -----------------------------------------------------------------------------------------


def test_defaults_come_from_the_caller_then_the_model_then_the_built_in(
    tmp_path: Path, pre: Preprocessor
) -> None:
    sampler = sampling(pre).sampler
    assert (sampler.temperature, sampler.top_p) == (0.8, 0.8), "generation_config.json"
    assert (sampler.repetition_penalty, sampler.frequency_penalty) == (1.0, 0.0)
    assert sampling(pre, top_p=0.1).sampler.top_p == 0.1
    folder = tmp_path / "model"
    shutil.copytree(demo_path(), folder)
    (folder / "generation_config.json").unlink()
    bare = Preprocessor(EngineArgs(model=str(folder)).create_runtime_config())
    assert (sampling(bare).sampler.temperature, sampling(bare).sampler.top_p) == (1.0, 0.7)
    assert bare.tokenizer.eos_token_ids == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.2}))
    other = Preprocessor(EngineArgs(model=str(folder)).create_runtime_config())
    assert sampling(other).sampler.repetition_penalty == 1.2


def test_lengths_are_clamped_to_the_room(pre: Preprocessor) -> None:
    length = len(pre.tokenizer.encode_text("a b c"))
    assert sampling(pre).max_tokens == 256 - length
    assert sampling(pre, max_tokens=10_000_000).max_tokens == 256 - length
    assert sampling(pre, max_tokens=7).max_tokens == 7
    assert sampling(pre).eos_token_ids == (2, 7)


@pytest.mark.parametrize(("key", "value"), [("top_k", 40), ("min_p", 0.1)])
def test_what_a_file_gives_in_vain_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, value: float
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_path(), folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({key: value, "transformers_version": "5.0"}))
    with caplog.at_level("WARNING"):
        Preprocessor(EngineArgs(model=str(folder)).create_runtime_config())
    assert [r.getMessage() for r in caplog.records if "not applied" in r.getMessage()] == [
        f"generation_config.json: {key} {value} is not applied: send it with requests"
    ]
    file.write_text(json.dumps({key: "x"}))
    with pytest.raises(ConfigError, match=key):
        Preprocessor(EngineArgs(model=str(folder)).create_runtime_config())


def test_a_broken_template_of_the_model_is_said_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_path(), folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }}")
    with caplog.at_level("WARNING"):
        pre = Preprocessor(EngineArgs(model=str(folder)).create_runtime_config())
    [record] = [r for r in caplog.records if "chat template" in r.getMessage()]
    assert "is not Jinja (line 2: " in record.getMessage()
    assert pre.prompt_token_ids(Request("r", prompt="a text", sampling_params=SamplingParams()))
    caplog.clear()
    own = EngineArgs(model=str(folder), chat_template="{{ messages[0].content }}")
    Preprocessor(own.create_runtime_config())
    assert not [r for r in caplog.records if "chat template" in r.getMessage()]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"choice": "ab"}, "guided_choice: expected a list of texts, found 'ab'"),
        ({"regex": 5}, "guided_regex: expected text, found 5"),
        ({"json": int}, "guided_json: expected a JSON schema as a dict or as text, found <class"),
        ({"json": {"const": object()}}, "is not JSON serializable"),
        ({"choice": ["a", {1}]}, "is not JSON serializable"),
    ],
)
def test_a_constraint_of_another_type_is_named(
    pre: Preprocessor, values: dict[str, Any], words: str
) -> None:
    error = refused_sampling(pre, guided_decoding=GuidedDecodingParams(**values))
    assert words in str(error)
    assert error.param == f"guided_{next(iter(values))}"


def test_top_k_off_in_both_spellings(pre: Preprocessor) -> None:
    assert [sampling(pre, top_k=k).sampler.top_k for k in (0, -1, 5)] == [0, 0, 5]


def test_bias_and_bans(pre: Preprocessor) -> None:
    bias = {"logits_processors_args": {"logit_bias": {"128": 5.0, 3: -100}}}
    assert sampling(pre, **bias).sampler.logit_bias == {128: 5.0, 3: -100.0}
    wrong = {"logits_processors_args": {"logit_bias": {"9999": 1}}}
    assert refused_sampling(pre, **wrong).param == "logit_bias"
    nan = {"logits_processors_args": {"logit_bias": {"1": float("nan")}}}
    assert refused_sampling(pre, **nan).param == "logit_bias"
    token = pre.tokenizer.token_id("▁th")
    assert token is not None
    banned = sampling(pre, bad_words=[" th", "no single token"], bad_words_token_ids=[77])
    assert set(banned.sampler.banned_ids) >= {77, token}
    assert refused_sampling(pre, bad_words_token_ids=[-4]).param == "bad_words_token_ids"


def test_many_bad_words_cost_one_line_and_little_time(
    pre: Preprocessor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "fastdeploy_lite.data_processor"):
        words = [f"no single token {i}" for i in range(MAX_BAD_WORDS)]
        assert sampling(pre, bad_words=words).sampler.banned_ids == ()
    [record] = caplog.records
    assert f"{MAX_BAD_WORDS} of {MAX_BAD_WORDS}" in record.getMessage()
    assert refused_sampling(pre, bad_words=[*words, "one more"]).param == "bad_words"


def test_long_words_and_stops_are_not_tokenised(
    pre: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    encode = pre.tokenizer.encode_text
    monkeypatch.setattr(
        pre.tokenizer, "encode_text", lambda text: lengths.append(len(text)) or encode(text)
    )
    sampling(pre, bad_words=["x" * 100_000])
    assert refused_sampling(pre, stop=["x" * 100_000]).param == "stop"
    assert max(lengths) < 1000


def test_logprobs_need_permission_and_have_a_limit(pre: Preprocessor) -> None:
    error = refused_sampling(make(), logprobs=1)
    assert str(error) == "Logprobs is disabled, please enable it in startup config."
    assert error.param == "logprobs"
    assert refused_sampling(make(), prompt_logprobs=0).param == "logprobs"
    assert sampling(pre, logprobs=20, prompt_logprobs=3).sampler.logprobs == 20
    assert "exceeds the maximum allowed value (20)" in str(refused_sampling(pre, logprobs=-1))
    free = make(enable_logprob=True, max_logprobs=-1)
    assert sampling(free, logprobs=-1).sampler.logprobs == -1


# Stops -------------------------------------------------------------------------------------------


def test_stops_become_texts_and_sequences(pre: Preprocessor) -> None:
    result = sampling(pre, stop=["User:", "", "User:"], stop_token_ids=[9, 9])
    assert result.stop == ("User:",)
    assert result.stop_token_seqs == (tuple(pre.tokenizer.encode_text("User:")), (9,))
    assert sampling(pre, stop="").stop == sampling(pre, stop=[]).stop_token_seqs == ()


def test_limits_of_stops(pre: Preprocessor, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused_sampling(pre, stop=list("abcdef"))
    assert "exceeds the limit max_stop_seqs_num (5)" in str(error)
    assert error.param == "stop"
    long = "1 2 3 4 5"
    assert "exceeds the limit stop_seqs_max_len (8)" in str(refused_sampling(pre, stop=[long]))
    monkeypatch.setenv("FD_MAX_STOP_SEQS_NUM", "6")
    monkeypatch.setenv("FD_STOP_SEQS_MAX_LEN", "9")
    assert len(sampling(pre, stop=[*"abcde", long]).stop) == 6


# Thinking and constraints ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [
        ("<think>", True),
        ("<think>x</think>", False),
        ("no marker", False),
        ("</think> then <think>\n", True),
    ],
)
def test_the_prompts_last_marker_tells_whether_the_model_thinks(
    pre: Preprocessor, prompt: str, thinking: bool
) -> None:
    assert pre.process(Request(prompt=prompt)).sampling.thinking is thinking
    assert pre.process(Request(prompt=prompt, thinking=not thinking)).sampling.thinking is (
        not thinking
    )


def test_thinking_budget_from_either_name(
    pre: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = pre.tokenizer.token_id("</think>")
    result = sampling(pre, reasoning_max_tokens=30, max_tokens=50)
    assert (result.reasoning_max_tokens, result.think_truncate_ids) == (30, (end,))
    arguments = {"thinking_budget": 20, "think_stop_sentence": "So."}
    result = sampling(pre, logits_processors_args=arguments)
    expected = (*pre.tokenizer.encode_text("So."), end)
    assert (result.reasoning_max_tokens, result.think_truncate_ids) == (20, expected)
    monkeypatch.setenv("FD_LIMIT_THINKING_CONTENT_TRUNCATE_STR", "stop")
    result = sampling(pre, reasoning_max_tokens=30)
    assert result.think_truncate_ids == (*pre.tokenizer.encode_text("stop"), end)
    assert sampling(pre).reasoning_max_tokens is None


@pytest.mark.parametrize(
    ("guided", "kind", "value"),
    [
        ({"json": {"type": "object"}}, "json_schema", '{"type": "object"}'),
        ({"json": '{"type": "array"}'}, "json_schema", '{"type": "array"}'),
        ({"json_object": True}, "json_object", ""),
        ({"regex": "a+"}, "regex", "a+"),
        ({"choice": ["好", "b"]}, "choice", '["好", "b"]'),
        ({"grammar": 'start: "a"'}, "grammar", 'start: "a"'),
    ],
)
def test_constraints_become_specifications(
    pre: Preprocessor, guided: dict[str, Any], kind: str, value: str
) -> None:
    for form in (GuidedDecodingParams(**guided), guided):
        spec = sampling(pre, guided_decoding=form).guided
        assert spec is not None
        assert (spec.kind, spec.value, spec.start_after) == (kind, value, None)
    request = Request(
        prompt="<think>",
        sampling_params=SamplingParams(guided_decoding=GuidedDecodingParams(**guided)),
    )
    spec = pre.process(request).sampling.guided
    assert spec is not None
    assert spec.start_after == "</think>"


def test_constraints_are_checked_before_the_engine_sees_them(pre: Preprocessor) -> None:
    assert refused_sampling(pre, guided_decoding={"regex": "(("}).param == "guided_regex"
    error = refused_sampling(make(guided_decoding_backend="off"), guided_decoding={"regex": "a"})
    assert "--guided-decoding-backend" in str(error)
    assert sampling(pre, guided_decoding={}).guided is None


def test_an_error_names_the_field_that_held_the_constraint(pre: Preprocessor) -> None:
    constraint = GuidedDecodingParams(json={"type": "array", "uniqueItems": True})
    assert refused_sampling(pre, guided_decoding=constraint).param == "guided_json"
    constraint.source = "response_format"
    assert refused_sampling(pre, guided_decoding=constraint).param == "response_format"
    assert GuidedDecodingParams(regex="a", source="x") == GuidedDecodingParams(regex="a")


def test_the_variable_leaves_objects_open(
    pre: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    constraint = {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    for value, closed in (("1", True), ("0", False)):
        monkeypatch.setenv("FD_GUIDANCE_DISABLE_ADDITIONAL", value)
        guided = sampling(pre, guided_decoding=constraint).guided
        assert guided is not None
        assert guided.closes_objects is closed


def test_processor_arguments_travel_only_when_a_processor_is_configured() -> None:
    arguments = {"amount": 2, "logit_bias": {1: 1.0}}
    assert sampling(make(), logits_processors_args=arguments).logits_processors_args == b""
    own = make(logits_processors=["some.module:Class"])
    assert sampling(own, logits_processors_args=arguments).logits_processors_args != b""
    wrong = {"amount": object()}
    assert refused_sampling(own, logits_processors_args=wrong).param == "logits_processors_args"


def test_the_tokenizer_may_live_elsewhere(tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(demo_path() / name, tmp_path / name)
    config = EngineArgs(model="demo", tokenizer=str(tmp_path)).create_runtime_config()
    tokenizer = load_tokenizer(config)
    assert tokenizer.name_or_path == str(tmp_path)
    assert tokenizer.eos_token_ids == (2, 7), "generation_config.json stays with the model"
