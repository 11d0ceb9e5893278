"""Speculative decoding on the demo model: the same answers, whatever is asked, only sooner."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from draft_layer import write_fitted_layer

from fastdeploy_lite import LLM, SamplingParams
from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.engine.request import RequestOutput
from fastdeploy_lite.engine.sampling_params import GuidedDecodingParams

# Repetitive on purpose: there is much to guess, and much of it is right.
POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
PROMPTS = [POEM * 3, "a b c a b c a b c a b", "User: 解析三首李白的诗\nAssistant: ", "春眠不觉晓，"]
EOS = (2, 7)  # both appear as the first
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer"}, "maxItems": 12}},
    "required": ["a"],
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "seed": 1},
    "penalties": {
        "temperature": 0.8,
        "seed": 2,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.2,
    },
    "logprobs": {"temperature": 0.8, "seed": 3, "logprobs": 4, "prompt_logprobs": 1},
    "stop text": {"temperature": 0, "stop": ["明月", "b c"]},
    "min tokens": {"temperature": 0, "min_tokens": 30},
    "bad words": {"temperature": 0, "bad_words": ["月"]},
    "bias": {
        "temperature": 0.7,
        "seed": 4,
        "logits_processors_args": {"logit_bias": {300: 2.0, 301: -5.0}},
    },
    "thinking budget": {"temperature": 0, "reasoning_max_tokens": 4, "response_max_tokens": 9},
    "schema": {"temperature": 1, "seed": 5, "guided_decoding": {"json": SCHEMA}},
    "choice": {"temperature": 0, "guided_decoding": {"choice": [POEM, POEM[:12]]}},
}


def load(**arguments: Any) -> LLM:
    return LLM(
        "demo",
        max_model_len=512,
        enable_logprob=True,
        guided_decoding_backend="auto",
        num_gpu_blocks_override=64,
        **arguments,
    )


class Plain:
    """Answers without guesses; each is asked for once, whoever is compared with it."""

    def __init__(self) -> None:
        self._llm = load()
        self._answers: dict[tuple[Any, ...], list[dict[str, Any]]] = {}

    def ask(
        self, kinds: list[str], prompts: list[str] | None = None, max_tokens: int = 48
    ) -> list[dict[str, Any]]:
        prompts = PROMPTS if prompts is None else prompts
        key = tuple(kinds), tuple(prompts), max_tokens
        if key not in self._answers:
            self._answers[key] = ask(self._llm, kinds, prompts, max_tokens)
        return self._answers[key]


@pytest.fixture(scope="module")
def plain() -> Plain:
    return Plain()


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prediction layer for the demo model, right now and then."""
    return write_fitted_layer(tmp_path_factory.mktemp("layer"), demo_path())


@pytest.fixture(scope="module", params=["ngram", "suffix", "mtp"])
def guessing(request: pytest.FixtureRequest) -> Iterator[LLM]:
    config: dict[str, Any] = {"method": request.param, "adaptive": False}
    if request.param == "mtp":
        folder = request.getfixturevalue("layer")
        config |= {"model": str(folder), "num_speculative_tokens": 3}
    llm = load(speculative_config=config)
    yield llm
    llm.llm_engine.check_integrity()


def params(kind: str, max_tokens: int = 48) -> SamplingParams:
    values = dict(KINDS[kind])
    guided = values.pop("guided_decoding", None)
    if guided is not None:
        values["guided_decoding"] = GuidedDecodingParams(**guided)
    return SamplingParams(max_tokens=max_tokens, **values)


def essence(output: RequestOutput) -> dict[str, Any]:
    """What an answer says, without times."""
    answer = output.outputs
    return {
        "ids": answer.token_ids,
        "text": answer.text,
        "reason": answer.finish_reason,
        "logprobs": answer.top_logprobs,
        "prompt": output.prompt_logprobs,
        "error": output.error_msg,
    }


def ask(
    llm: LLM, kinds: list[str], prompts: list[str] = PROMPTS, max_tokens: int = 48
) -> list[dict[str, Any]]:
    texts = [prompt for _ in kinds for prompt in prompts]
    asked = [params(kind, max_tokens) for kind in kinds for _ in prompts]
    return [essence(output) for output in llm.generate(texts, asked, use_tqdm=False)]


@pytest.mark.parametrize("kind", KINDS)
def test_guesses_change_no_answer(plain: Plain, guessing: LLM, kind: str) -> None:
    assert ask(guessing, [kind]) == plain.ask([kind])


def test_some_guesses_are_right_and_some_are_not(guessing: LLM) -> None:
    ask(guessing, ["greedy", "sampled"])
    counts = guessing.llm_engine.stats().drafts
    assert counts is not None
    assert 0 < counts.accepted < counts.drafted
    assert sum(counts.accepted_at) == counts.accepted


def test_everything_mixed_in_one_batch(plain: Plain, guessing: LLM) -> None:
    assert ask(guessing, list(KINDS)) == plain.ask(list(KINDS))


def test_preemption_and_guesses(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that is too small for the batch: guesses take no block from anybody."""
    monkeypatch.setenv("FD_ENC_DEC_BLOCK_NUM", "0")  # admit without looking ahead
    kinds = ["greedy", "sampled", "penalties", "logprobs"]
    prompts = ["a b c a b c a b c a b", POEM]
    expected = plain.ask(kinds, prompts, 100)
    small = LLM(
        "demo",
        max_model_len=192,
        enable_logprob=True,
        num_gpu_blocks_override=5,
        max_num_seqs=8,
        enable_prefix_caching=False,
        speculative_config={"method": "ngram", "adaptive": False},
    )
    assert ask(small, kinds, prompts, 100) == expected
    stats = small.llm_engine.stats()
    assert stats.preemptions > 0
    assert stats.num_free_blocks == 5
    small.llm_engine.check_integrity()


def test_a_stream_is_the_answer(guessing: LLM) -> None:
    """Chunks of several tokens add up to the whole."""
    whole = guessing.generate(PROMPTS[0], params("greedy"), use_tqdm=False)[0].outputs
    steps = list(guessing.generate(PROMPTS[0], params("greedy"), use_tqdm=False, stream=True))
    chunks = [chunk.outputs for step in steps for chunk in step if chunk is not None]
    assert max(len(chunk.token_ids) for chunk in chunks) > 1
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert "".join(chunk.text for chunk in chunks) == whole.text


def test_sampled_answers_have_the_distribution_of_the_model(guessing: LLM) -> None:
    """Pairs of tokens of many seeds against the probabilities that the model gives.

    Two more tokens follow them, so that the second is checked beside further guesses.
    FD_LITE_DISTRIBUTION_SAMPLES raises the number of answers.
    """
    count = int(os.environ.get("FD_LITE_DISTRIBUTION_SAMPLES", "600"))
    prompt = "a b c a b c a b"  # the guess is " c" and " a", which are often not what is drawn
    asked = [
        SamplingParams(temperature=1.0, top_p=1.0, top_k=4, seed=seed, max_tokens=4)
        for seed in range(count)
    ]
    outputs = guessing.generate([prompt] * count, asked, use_tqdm=False)
    drawn = Counter(tuple(output.outputs.token_ids[:2]) for output in outputs)
    expected = pair_probabilities(guessing, prompt, drawn)
    assert sum(expected.values()) > 0.99
    # Pearson's statistic; cells that are too rare for it are put together.
    frequent = [pair for pair, share in expected.items() if share * count >= 5]
    observed = [drawn[pair] for pair in frequent]
    wanted = [expected[pair] * count for pair in frequent]
    observed.append(count - sum(observed))
    wanted.append(max(count - sum(wanted), 1.0))
    statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
    freedom = len(observed) - 1
    # The normal approximation of the chi-square distribution: one false alarm in 30,000.
    assert statistic < freedom + 4.0 * np.sqrt(2.0 * freedom)


def pair_probabilities(
    llm: LLM, prompt: str, drawn: Counter[tuple[int, ...]]
) -> dict[tuple[int, ...], float]:
    """Probability of each pair that was drawn: top 4, renormalised, twice."""

    def best(token_ids: list[int]) -> dict[int, float]:
        one = SamplingParams(temperature=0, max_tokens=2, logprobs=4)
        answer = llm.generate([token_ids], one, use_tqdm=False)[0].outputs
        entry = answer.logprobs[0]
        shares = {token: float(np.exp(found.logprob)) for token, found in entry.items()}
        total = sum(shares.values())
        return {token: share / total for token, share in shares.items()}

    start = llm.llm_engine.preprocessor.tokenizer.encode_text(prompt)
    first = best(start)
    result: dict[tuple[int, ...], float] = {}
    for token in {pair[0] for pair in drawn}:
        if token in EOS:
            result[EOS[0],] = sum(first.get(end, 0.0) for end in EOS)
            continue
        for other, share in best([*start, token]).items():
            pair = token, EOS[0] if other in EOS else other
            result[pair] = result.get(pair, 0.0) + first.get(token, 0.0) * share
    return result


def test_json_is_still_json(guessing: LLM) -> None:
    for answer in ask(guessing, ["schema"]):
        if answer["reason"] == "stop":
            assert "a" in json.loads(answer["text"])
