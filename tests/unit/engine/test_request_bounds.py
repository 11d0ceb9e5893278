"""Whatever a request says, it is refused by name or fits every store that its numbers reach."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.input.preprocess import Preprocessor
from fastdeploy_lite.request.messages import EngineRequest
from fastdeploy_lite.request.params import (
    MAX_LOGIT_BIAS,
    MAX_TOKEN_IDS,
    GuidedDecodingParams,
    SamplingParams,
)
from fastdeploy_lite.request.user_request import Request
from fastdeploy_lite.utils.errors import RequestError

MAX_LEN = 256
CHAT = [{"role": "user", "content": "Hi"}]
EXTREME = [
    0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63) - 1, 0.0, -0.0,
    1e-320, 3.4e38, 1e39, 1.7e308, float("inf"), float("-inf"), float("nan"), True, False, None,
]  # fmt: skip
NUMBERS = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k",
    "min_p", "seed", "max_tokens", "min_tokens", "reasoning_max_tokens", "response_max_tokens",
    "logprobs", "prompt_logprobs", "n",
)  # fmt: skip


@pytest.fixture(scope="module")
def pre() -> Preprocessor:
    args = EngineArgs(model="demo", max_model_len=MAX_LEN, enable_logprob=True, max_logprobs=-1)
    return Preprocessor(args.create_runtime_config())


def process(pre: Preprocessor, **params: Any) -> EngineRequest:
    return pre.process(Request(prompt="a b c", sampling_params=SamplingParams(**params)))


def check_stores(request: EngineRequest, vocab_size: int) -> None:
    """The wire, the sampler's columns and the counters of the core."""
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=EngineRequest) == request
    sampling, sampler = request.sampling, request.sampling.sampler
    assert 0 <= sampler.top_k < vocab_size
    assert 0 <= sampler.seed < 2**63
    for name in ("temperature", "repetition_penalty"):
        value = getattr(sampler, name)
        assert value == 0 or 1e-30 < value < 1e30, (name, value)
    assert 0 <= sampler.top_p <= 1 and 0 <= sampler.min_p <= 1
    assert 1 <= sampling.max_tokens <= MAX_LEN
    limits = (sampling.min_tokens, sampling.reasoning_max_tokens, sampling.response_max_tokens)
    assert all(limit is None or 0 <= limit <= MAX_LEN for limit in limits)
    assert all(abs(v) <= 1e9 or v == float("-inf") for v in (sampler.logit_bias or {}).values())


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", EXTREME, ids=lambda v: repr(v)[:24])
def test_every_number_fits_or_is_refused(pre: Preprocessor, name: str, value: Any) -> None:
    try:
        request = process(pre, **{name: value})
    except (ValueError, TypeError):
        return
    check_stores(request, pre.config.model.vocab_size)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", EXTREME, ids=lambda v: repr(v)[:24])
def test_so_does_a_number_that_was_set_later(pre: Preprocessor, name: str, value: Any) -> None:
    params = SamplingParams()
    setattr(params, name, value)
    try:
        request = pre.process(Request(prompt="a b c", sampling_params=params))
    except RequestError:
        return
    check_stores(request, pre.config.model.vocab_size)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(NUMBERS), st.integers(-(2**70), 2**70) | st.floats()))
def test_any_numbers_together(pre: Preprocessor, params: dict[str, Any]) -> None:
    try:
        request = process(pre, **params)
    except (ValueError, TypeError):
        return
    check_stores(request, pre.config.model.vocab_size)


@pytest.mark.parametrize(
    "arguments",
    [
        {"logit_bias": {"5": 10**400}},
        {"logit_bias": {"5": True}},
        {"logit_bias": {float("inf"): 1.0}},
        {"logit_bias": {str(2**70): 1.0}},
        {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.5)},
        {"thinking_budget": True},
        {"thinking_budget": 2.5},
        {"thinking_budget": -1},
        {"think_stop_sentence": 5},
        {"think_stop_sentence": "\ud83d"},
        {"mine": 2**64},
        {"mine": "\ud83d"},
    ],
    ids=lambda v: repr(v)[:40],
)
def test_arguments_of_logits_processors_are_refused_by_name(
    pre: Preprocessor, arguments: dict[str, Any]
) -> None:
    with pytest.raises((ValueError, TypeError), match=r"logit|think_stop"):
        process(pre, logits_processors_args=arguments)


def test_null_arguments_are_absent_ones(pre: Preprocessor) -> None:
    arguments = {"thinking_budget": None, "think_stop_sentence": None, "logit_bias": None}
    sampling = process(pre, logits_processors_args=arguments).sampling
    assert sampling.reasoning_max_tokens is None
    with_budget = process(pre, logits_processors_args={**arguments, "thinking_budget": 3}).sampling
    assert with_budget.think_truncate_ids == (pre.tokenizer.token_id("</think>"),)


def test_lists_of_ids_have_a_limit(pre: Preprocessor) -> None:
    for name in ("stop_token_ids", "bad_words_token_ids"):
        ids = [5 + i % 100 for i in range(MAX_TOKEN_IDS + 1)]
        with pytest.raises(ValueError, match=f"{name} must have at most {MAX_TOKEN_IDS}"):
            process(pre, **{name: ids})
        process(pre, **{name: ids[:-1]})


@pytest.mark.parametrize(
    "request_fields",
    [
        {"prompt": "a", "sampling_params": SamplingParams(stop=["\ud83d"])},
        {"prompt": "a", "sampling_params": SamplingParams(bad_words=["\ud83d"])},
        {"prompt": "a", "request_id": "id\udc00"},
        *(
            {"prompt": "a", "sampling_params": SamplingParams(guided_decoding=guided)}
            for guided in (
                GuidedDecodingParams(choice=["\ud83d", "b"]),
                GuidedDecodingParams(regex="\ud83d"),
                GuidedDecodingParams(json={"const": "\ud83d"}),
                GuidedDecodingParams(grammar='start: "\ud83d"'),
                GuidedDecodingParams(structural_tag="\ud83d"),
            )
        ),
    ],
    ids=lambda v: repr(v)[-60:],
)
def test_half_of_a_surrogate_pair_is_refused(
    pre: Preprocessor, request_fields: dict[str, Any]
) -> None:
    with pytest.raises(RequestError) as caught:
        pre.process(Request(**request_fields))
    assert caught.value.param
    str(caught.value).encode()


def test_variables_of_a_template_may_be_anything(pre: Preprocessor) -> None:
    for value in (10**5000, float("nan"), {"deep": 1}, "\ud83d", 2**64):
        request = Request(
            messages=CHAT, chat_template="{{ x }}a", chat_template_kwargs={"x": value},
            trusted_template=False,
        )  # fmt: skip
        try:
            pre.process(request)
        except RequestError as error:
            assert error.param == "chat_template"


def test_an_empty_template_is_a_template(pre: Preprocessor) -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        pre.process(Request(messages=CHAT, chat_template=""))


@pytest.mark.parametrize(
    ("guided", "message"),
    [
        ({"json": False}, "the schema false allows no value"),
        ({"regex": ""}, "allows nothing but an empty output"),
        ({"choice": []}, "a non-empty list"),
        ({"grammar": ""}, "Invalid grammar"),
        ({"json": ""}, "Invalid json_schema"),
        ({"structural_tag": ""}, "Invalid structural_tag"),
    ],
)
def test_an_empty_constraint_is_not_an_absent_one(
    pre: Preprocessor, guided: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        process(pre, guided_decoding=GuidedDecodingParams(**guided))


def test_schemas_true_and_empty_allow_any_json(pre: Preprocessor) -> None:
    for schema in (True, {}, "true", "{}"):
        spec = process(pre, guided_decoding=GuidedDecodingParams(json=schema)).sampling.guided
        assert spec is not None and spec.kind == "json_schema"
    off = GuidedDecodingParams(json_object=False)
    assert process(pre, guided_decoding=off).sampling.guided is None
    with pytest.raises(ValueError, match="json, choice"):
        GuidedDecodingParams(json=False, choice=["a"])
