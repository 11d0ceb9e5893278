"""Every field of SamplingParams: default, range, message."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from fastdeploy_lite.engine.sampling_params import (
    BeamSearchParams,
    GuidedDecodingParams,
    RequestOutputKind,
    SamplingParams,
)

POSITIONAL_ORDER = [
    "n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature",
    "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "stop_seqs_len", "max_tokens",
    "reasoning_max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "temp_scaled_logprobs",
    "top_p_normalized_logprobs", "bad_words", "guided_decoding", "bad_words_token_ids",
    "logits_processors_args",
]  # fmt: skip

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"n": 0}, ValueError, "n must be at least 1, got 0."),
    ({"n": 1.5}, ValueError, "n must be an int, but is of type"),
    ({"n": True}, ValueError, "n must be an int, but is of type"),
    ({"presence_penalty": 2.1}, ValueError, "presence_penalty must be in [-2, 2], got 2.1."),
    ({"presence_penalty": math.nan}, ValueError, "presence_penalty must be in [-2, 2], got nan."),
    ({"frequency_penalty": -3}, ValueError, "frequency_penalty must be in [-2, 2], got -3."),
    ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must be greater than zero"),
    ({"repetition_penalty": math.inf}, ValueError, "repetition_penalty must be greater than zero"),
    ({"temperature": -0.1}, ValueError, "temperature must be non-negative, got -0.1."),
    ({"temperature": math.nan}, ValueError, "temperature must be non-negative, got nan."),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got str"),
    ({"top_p": 1.5}, ValueError, "top_p must be in [0, 1], got 1.5."),
    ({"top_p": -0.5}, ValueError, "top_p must be in [0, 1], got -0.5."),
    ({"top_k": -2}, ValueError, "top_k must be 0 or -1 (disable), or at least 1, got -2."),
    ({"top_k": 1.0}, TypeError, "top_k must be an integer, got float"),
    ({"min_p": 1.01}, ValueError, "min_p must be in [0,1]"),
    ({"seed": -1}, ValueError, "seed must be in [0, 922337203685477580], got -1."),
    ({"seed": 922337203685477581}, ValueError, "seed must be in [0, 922337203685477580]"),
    ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0."),
    ({"max_tokens": 2.0}, TypeError, "max_tokens must be an integer"),
    (
        {"max_tokens": 5, "reasoning_max_tokens": 6},
        ValueError,
        "reasoning_max_tokens must be less than max_tokens, got 6.",
    ),
    ({"reasoning_max_tokens": 0}, ValueError, "reasoning_max_tokens must be at least 1"),
    ({"min_tokens": -1}, ValueError, "min_tokens must be greater than or equal to 0"),
    ({"min_tokens": 9, "max_tokens": 8}, ValueError, "less than or equal to max_tokens=8, got 9."),
    ({"logprobs": -2}, ValueError, "logprobs must be a non-negative value or -1, got -2."),
    (
        {"logprobs": 21},
        ValueError,
        "Invalid value for 'top_logprobs': must be less than or equal to 20.",
    ),
    ({"prompt_logprobs": -2}, ValueError, "prompt_logprobs must be a non-negative value or -1"),
    ({"stop": 5}, TypeError, "stop must be text or a list of texts, got int"),
    ({"stop": ["a", 5]}, TypeError, "stop must be text or a list of texts, found an item of type"),
    ({"stop_token_ids": 5}, TypeError, "stop_token_ids must be a list of token ids, got int"),
    ({"stop_token_ids": ["a"]}, TypeError, "stop_token_ids must be a list of token ids, found"),
    ({"bad_words": "abc"}, TypeError, "bad_words must be a list of words, got str"),
    ({"bad_words": [5]}, TypeError, "bad_words must be a list of words, found an item of type int"),
    ({"bad_words_token_ids": 5}, TypeError, "bad_words_token_ids must be a list of token ids"),
    ({"guided_decoding": "yes"}, TypeError, "guided_decoding must be GuidedDecodingParams, got"),
    ({"logits_processors_args": [1]}, TypeError, "logits_processors_args must be a dict, got list"),
    ({"logits_processors_args": {"logit_bias": [1]}}, TypeError, "logit_bias must be a dict"),
    ({"logits_processors_args": {"logit_bias": {"a": 1}}}, TypeError, "logit_bias must be a dict"),
]

RIGHT: list[dict[str, Any]] = [
    {"presence_penalty": -2, "frequency_penalty": 2},
    {"temperature": 0, "top_p": 0},
    {"top_k": -1},
    {"top_k": np.int64(5), "temperature": np.float32(0.5)},
    {"seed": 0},
    {"seed": 922337203685477580},
    {"max_tokens": 1, "min_tokens": 1},
    {"max_tokens": 4, "reasoning_max_tokens": 4},
    {"min_tokens": 0},
    {"logprobs": -1, "prompt_logprobs": -1},
    {"stop": "a", "stop_token_ids": np.array([3]), "bad_words": ("b",), "bad_words_token_ids": [4]},
    {"logprobs": 20},
    {"logits_processors_args": {"logit_bias": {"128": 5.0}}},
]


@pytest.mark.parametrize(("values", "error", "message"), WRONG, ids=str)
def test_values_out_of_range(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        SamplingParams(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize("values", RIGHT, ids=str)
def test_values_at_the_edges(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    for name, value in values.items():
        assert getattr(params, name) == value


@pytest.mark.parametrize("name", ["stop", "bad_words", "stop_token_ids", "bad_words_token_ids"])
def test_none_in_a_list_is_an_item(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be .*, found an item of type NoneType"):
        SamplingParams(**{name: [None]})


def test_fields_come_in_upstreams_order() -> None:
    assert [f.name for f in fields(SamplingParams)][: len(POSITIONAL_ORDER)] == POSITIONAL_ORDER


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.n, params.top_k, params.min_p, params.min_tokens) == (1, 0, 0.0, 1)
    unset = set(POSITIONAL_ORDER) - {
        "n", "top_k", "min_p", "seed", "min_tokens", "temp_scaled_logprobs",
        "top_p_normalized_logprobs",
    }  # fmt: skip
    assert all(getattr(params, name) is None for name in unset)


def test_seed_is_drawn_per_object_and_kept_when_given() -> None:
    seeds = {SamplingParams().seed for _ in range(20)}
    assert len(seeds) == 20
    assert SamplingParams(seed=5).seed == 5


def test_more_than_twenty_logprobs_behind_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_USE_GET_SAVE_OUTPUT_V1", "1")
    assert SamplingParams(logprobs=100).logprobs == 100


def test_from_dict_ignores_what_it_does_not_know() -> None:
    params = SamplingParams.from_dict({"temperature": 0.3, "stream": True})
    assert params.temperature == 0.3
    assert params.top_p is None


def test_from_optional_fills_upstreams_values() -> None:
    params = SamplingParams.from_optional(temperature=None, top_p=None, n=None, max_tokens=None)
    assert (params.temperature, params.repetition_penalty, params.max_tokens) == (1.0, 1.0, 8192)
    assert (params.presence_penalty, params.frequency_penalty, params.top_p) == (0.0, 0.0, None)
    assert SamplingParams.from_optional(temperature=0.2, max_tokens=3).max_tokens == 3


def test_guided_decoding_takes_one_kind() -> None:
    with pytest.raises(ValueError, match="You can only use one kind of guided decoding"):
        GuidedDecodingParams(json="{}", regex="a")
    assert GuidedDecodingParams(choice=["a"]).to_dict() == {"guided_choice": ["a"]}
    assert GuidedDecodingParams(json_object=True).to_dict() == {"guided_json_object": True}
    assert GuidedDecodingParams(structural_tag="{}").to_dict() == {"structural_tag": "{}"}
    assert GuidedDecodingParams().to_dict() == {}


def test_names_that_scripts_import() -> None:
    assert BeamSearchParams(beam_width=2, max_tokens=3).length_penalty == 1.0
    assert [kind.value for kind in RequestOutputKind] == [0, 1, 2]
