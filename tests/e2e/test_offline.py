"""`LLM` on the demo model: prompt forms, sampling, and one answer however it is scheduled."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy_lite import LLM, SamplingParams
from fastdeploy_lite.engine.request import CompletionOutput, RequestOutput
from fastdeploy_lite.engine.sampling_params import GuidedDecodingParams
from fastdeploy_lite.executor.inline import InlineExecutor

GREEDY = SamplingParams(temperature=0, max_tokens=24)
CHAT = [{"role": "user", "content": "解析三首李白的诗"}]
PROMPTS = [
    "床前", "Once upon a time", "白日依山尽，", "a noun is", "User: 你好\nAssistant: ",
    "春眠不觉晓，", "In the beginning", "12345", "举头望",
]  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", max_model_len=1024, enable_logprob=True, num_gpu_blocks_override=200)


@pytest.fixture(autouse=True)
def books_are_balanced(llm: LLM) -> Iterator[None]:
    yield
    llm.llm_engine.check_integrity()
    assert llm.llm_engine.stats().num_free_blocks == 200


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs.token_ids for output in outputs]


def one(llm: LLM, prompt: Any, **params: Any) -> RequestOutput:
    values = {"temperature": 0, "max_tokens": 24, **params}
    return llm.generate(prompt, SamplingParams(**values), use_tqdm=False)[0]


# Forms -------------------------------------------------------------------------------------------


def test_the_seed_script_runs_verbatim() -> None:
    script = """
from fastdeploy_lite import LLM, SamplingParams
prompts = ["把李白的静夜思改写为现代诗", "Write me a poem about large language model."]
sampling_params = SamplingParams(temperature=0.7, top_p=0, max_tokens=128)
llm = LLM(model="demo", tensor_parallel_size=1, use_cudagraph=True,)
outputs = llm.generate(prompts, sampling_params)
print(outputs)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RequestOutput(request_id=") == 2
    assert "Processed prompts: 100%" in done.stderr


def test_every_form_of_prompt(llm: LLM) -> None:
    text = "春眠不觉晓，"
    tokens = llm.llm_engine.preprocessor.tokenizer.encode_text(text)
    expected = ids(llm.generate(text, GREEDY))[0]
    single: list[Any] = [tokens, np.array(tokens), {"prompt": text}, {"prompt": tokens}]
    for prompts in single:
        assert ids(llm.generate(prompts, GREEDY)) == [expected]
    batches: list[Any] = [
        [text, text],
        [tokens, tokens],
        [{"prompt": text}, {"prompt_token_ids": tokens}],
        (text, tokens),
        [np.array(tokens), {"prompt": text, "multimodal_data": {}}],
    ]
    for prompts in batches:
        outputs = llm.generate(prompts, GREEDY)
        assert ids(outputs) == [expected, expected]
        assert [output.prompt for output in outputs] == list(prompts)
    assert llm.generate([], GREEDY) == []


def test_messages_as_prompt_equal_chat(llm: LLM) -> None:
    assert ids(llm.generate([{"messages": CHAT}], GREEDY)) == ids(llm.chat(CHAT, GREEDY))


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ({"text": "a"}, ValueError, "prompts must be a input dict"),
        ([{"text": "a"}], ValueError, "prompts must be a input dict"),
        ([3.5], TypeError, "Invalid type for 'prompt': float"),
        (7, TypeError, "Invalid type for 'prompt': int"),
        (None, TypeError, "Invalid type for 'prompt': NoneType"),
        ([["a"]], TypeError, "Invalid type for 'prompt': list"),
        ("", ValueError, "The prompt is empty"),
        ([[1, 99999]], ValueError, "token id 99999 is outside"),
        ({"prompt": "a", "multimodal_data": {"image": ["x"]}}, ValueError, "text only"),
        ("a " * 1200, ValueError, "Input text is too long"),
    ],
)
def test_prompts_that_cannot_be_used(
    llm: LLM, prompts: Any, error: type[Exception], message: str
) -> None:
    before = llm.llm_engine.stats().requests
    with pytest.raises(error, match=message):
        llm.generate(prompts, GREEDY)
    if isinstance(prompts, str):
        with pytest.raises(error, match=message):
            llm.generate(["fine", prompts], GREEDY)
    assert llm.llm_engine.stats().requests == before, "all are checked before one runs"


def test_parameters_are_one_for_all_or_one_each(llm: LLM) -> None:
    lengths = [SamplingParams(temperature=0, max_tokens=n, min_tokens=n) for n in (2, 3, 4)]
    assert [len(t) for t in ids(llm.generate(PROMPTS[:3], lengths))] == [2, 3, 4]
    assert [len(t) for t in ids(llm.generate(PROMPTS[:3], lengths[:1]))] == [2, 2, 2]
    with pytest.raises(ValueError, match="prompts and sampling_params must be the same length"):
        llm.generate(PROMPTS[:3], lengths[:2])
    with pytest.raises(ValueError, match="messages and sampling_params must be the same length"):
        llm.chat([CHAT, CHAT, CHAT], lengths[:2])
    with pytest.raises(TypeError, match="sampling_params must be SamplingParams"):
        llm.generate(PROMPTS[0], {"temperature": 0})  # type: ignore[call-overload]


def test_defaults_without_parameters(llm: LLM) -> None:
    output = llm.generate("12345")[0]
    assert output.finished
    length = len(output.prompt_token_ids) + len(output.outputs.token_ids)
    # it is drawn anew each time, and now and then finds no end
    assert output.outputs.token_ids[-1] == 2 or length == 1024


def test_unknown_arguments_are_type_errors() -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        LLM("demo", no_such_argument=1)


def test_the_bar_is_drawn_or_not(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(PROMPTS[:2], GREEDY)
    assert "Processed prompts: 100%" in capsys.readouterr().err


# Chat --------------------------------------------------------------------------------------------


def test_chat_recites_li_bai(llm: LLM) -> None:
    output = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=400))[0]
    assert "李白" in output.outputs.text
    assert "《静夜思》" in output.outputs.text
    assert output.prompt == CHAT
    assert output.outputs.reasoning_content is None


def test_conversations_in_a_batch(llm: LLM) -> None:
    other = [{"role": "user", "content": [{"type": "text", "text": "你好"}]}]
    together = llm.chat([CHAT, other], GREEDY)
    assert ids(together) == [ids(llm.chat(CHAT, GREEDY))[0], ids(llm.chat([*other], GREEDY))[0]]
    raw = "<|begin_of_sentence|>User: 你好\nAssistant: "
    assert ids(llm.generate(raw, GREEDY))[0] == ids(together)[1]


def test_chat_template_arguments(llm: LLM) -> None:
    template = (
        "{{ prefix }}{{ messages[-1].content }}"
        "{% if tools %}{{ tools[0].function.name }}{% endif %}"
    )
    tool = {"type": "function", "function": {"name": "f"}}
    decode = llm.llm_engine.preprocessor.tokenizer.decode

    def rendered(**more: Any) -> str:
        output = llm.chat(CHAT, GREEDY, chat_template=template, **more)[0]
        return decode(output.prompt_token_ids)

    assert rendered(chat_template_kwargs={"prefix": "P:"}) == "P:解析三首李白的诗"
    for tools in (tool, [tool]):
        assert rendered(tools=tools) == "解析三首李白的诗f"
    assert rendered(tools=[]) == rendered(tools={}) == "解析三首李白的诗"
    for broken in ([{"type": "function"}], "f", [tool, {"function": {"name": 3}}]):
        with pytest.raises(RuntimeError, match=r"^Failed to validate 'tools' .* method: .+$"):
            rendered(tools=broken)
    with pytest.raises(ValueError, match="chat_template_kwargs must be a dict"):
        llm.chat(CHAT, GREEDY, chat_template_kwargs=["x"])  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="messages must be a list"):
        llm.chat("text", GREEDY)
    with pytest.raises(ValueError, match="image_url"):
        llm.chat([{"role": "user", "content": [{"type": "image_url"}]}], GREEDY)


# Sampling ----------------------------------------------------------------------------------------


def test_seeds_reproduce_and_differ(llm: LLM) -> None:
    def sample(seed: int | None) -> list[int]:
        params = SamplingParams(temperature=1.5, top_p=1.0, seed=seed, max_tokens=30)
        return ids(llm.generate("Once upon", params))[0]

    assert sample(13) == sample(13)
    assert len({tuple(sample(seed)) for seed in (1, 2, 3, None, None)}) == 5


def test_greedy_in_all_its_spellings(llm: LLM) -> None:
    expected = one(llm, "床前").outputs.token_ids
    for params in ({"top_p": 0, "temperature": 0.9}, {"top_k": 1, "temperature": 1.0}):
        assert one(llm, "床前", **params).outputs.token_ids == expected


def test_penalties_change_what_repeats(llm: LLM) -> None:
    prompt = "a a a a a a a a"
    plain = one(llm, prompt, max_tokens=40, min_tokens=40).outputs.token_ids
    for params in (
        {"repetition_penalty": 2.0},
        {"frequency_penalty": 2.0, "presence_penalty": 2.0},
    ):
        changed = one(llm, prompt, max_tokens=40, min_tokens=40, **params).outputs.token_ids
        assert len(set(changed)) > len(set(plain))


def test_bad_words_and_bias(llm: LLM) -> None:
    plain = one(llm, "白日依山尽，").outputs.token_ids
    banned = plain[2:6]
    changed = one(llm, "白日依山尽，", bad_words_token_ids=banned).outputs.token_ids
    assert not set(banned) & set(changed)
    words = [llm.llm_engine.preprocessor.tokenizer.decode([t]) for t in banned]
    assert not set(banned) & set(one(llm, "白日依山尽，", bad_words=words).outputs.token_ids)
    biased = one(llm, "白日依山尽，", logits_processors_args={"logit_bias": {"300": 100}})
    assert set(biased.outputs.token_ids[:-1]) == {300}


def test_min_tokens_and_max_tokens(llm: LLM) -> None:
    output = one(llm, "12345", min_tokens=50, max_tokens=60)
    assert 50 <= len(output.outputs.token_ids) <= 60
    short = one(llm, "12345", max_tokens=3, min_tokens=3)
    assert len(short.outputs.token_ids) == 3
    assert short.outputs.finish_reason == "length"
    single = one(llm, "12345", max_tokens=1, min_tokens=1).outputs
    assert single.token_ids == short.outputs.token_ids[:1]
    assert single.text


def test_stop_strings_stay_and_end(llm: LLM) -> None:
    output = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=300, stop=["。"]))[0]
    assert output.outputs.text.endswith("。")
    assert output.outputs.text.count("。") == 1
    assert output.outputs.token_ids[-1] == 2
    assert output.outputs.finish_reason == "stop"


def test_stop_strings_can_be_stripped(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_LITE_STRIP_STOP_TEXT", "1")
    output = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=300, stop=["。"]))[0]
    assert "。" not in output.outputs.text
    assert output.outputs.text


def test_stop_token_ids_end(llm: LLM) -> None:
    plain = one(llm, "白日依山尽，").outputs.token_ids
    stop = plain[3]
    cut = one(llm, "白日依山尽，", stop_token_ids=[stop]).outputs.token_ids
    assert cut == [*plain[: plain.index(stop) + 1], 2]


def test_structured_output(llm: LLM) -> None:
    choice = GuidedDecodingParams(choice=["李白", "杜甫"])
    assert one(llm, "诗人是", guided_decoding=choice).outputs.text in ("李白", "杜甫")
    regex = GuidedDecodingParams(regex=r"\d{4}-\d{2}")
    text = one(llm, "日期：", guided_decoding=regex).outputs.text
    assert (len(text), text[4]) == (7, "-")


# Log-probabilities -------------------------------------------------------------------------------


def test_logprobs_of_sampled_and_best_tokens(llm: LLM) -> None:
    output = one(llm, "床前", logprobs=3, max_tokens=6, min_tokens=6)
    completion = output.outputs
    assert completion.logprobs is not None
    assert completion.top_logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids) == 6, "the closing EOS counts"
    for position, (token, entry) in enumerate(
        zip(completion.token_ids, completion.logprobs, strict=True)
    ):
        assert entry is not None
        values = [p.logprob for p in entry.values()]
        assert values == sorted(values, reverse=True)
        assert [p.rank for p in entry.values()] == [1, 2, 3]
        row = completion.top_logprobs
        assert row.logprob_token_ids[position] == [token, *entry]
        if position < 5:  # greedy: the sampled token is the best one
            assert next(iter(entry)) == token
            assert row.sampled_token_ranks[position] == 1


def test_prompt_logprobs_agree_with_the_models_own_logits(llm: LLM) -> None:
    executor = llm.llm_engine._core._executor
    assert isinstance(executor, InlineExecutor)
    runner = executor.runner
    prompt = llm.llm_engine.preprocessor.tokenizer.encode_text("白日依山尽，黄河入海流。")
    output = one(llm, [prompt], prompt_logprobs=2, max_tokens=2)
    logits = np.asarray(runner.logits(prompt), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for position, entry in enumerate(output.prompt_logprobs[1:]):
        assert entry is not None
        for token, value in entry.items():
            assert abs(value.logprob - logprobs[position, token]) < 1e-4
        best = int(np.argmax(logprobs[position]))
        assert best in entry
        assert prompt[position + 1] in entry


def test_logprobs_need_permission() -> None:
    plain = LLM("demo", max_model_len=64, num_gpu_blocks_override=4)
    with pytest.raises(ValueError, match="Logprobs is disabled"):
        plain.generate("a", SamplingParams(logprobs=1))


# Schedules ---------------------------------------------------------------------------------------

SAMPLED = [
    SamplingParams(
        temperature=(0, 1.0)[i % 2], top_p=0.95, seed=i, max_tokens=80 + 7 * i, min_tokens=80,
        repetition_penalty=1.0 + 0.1 * (i % 3),
    )
    for i in range(len(PROMPTS))
]  # fmt: skip


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    return [
        ids(llm.generate(p, s, use_tqdm=False))[0] for p, s in zip(PROMPTS, SAMPLED, strict=True)
    ]


def test_batched_equals_alone(llm: LLM, alone: list[list[int]]) -> None:
    assert ids(llm.generate(PROMPTS, SAMPLED)) == alone


def test_preempted_equals_alone(alone: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_ENC_DEC_BLOCK_NUM", "0")  # admit without looking ahead
    tight = LLM(
        "demo", max_model_len=192, num_gpu_blocks_override=4, max_num_seqs=8,
        enable_prefix_caching=False,
    )  # fmt: skip
    assert ids(tight.generate(PROMPTS, SAMPLED)) == alone
    assert tight.llm_engine.stats().preemptions > 0


def test_chunked_and_cached_equal_alone(llm: LLM) -> None:
    long = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。" * 12
    prompts = [long + tail for tail in ("春", "夏", "秋")]
    plain = LLM(
        "demo", max_model_len=1024, num_gpu_blocks_override=100, enable_prefix_caching=False
    )
    expected = ids(plain.generate(prompts, GREEDY))
    assert plain.llm_engine.stats().prefix_hits == 0
    chunked = LLM("demo", max_model_len=1024, num_gpu_blocks_override=100,
                  max_num_batched_tokens=64, max_num_seqs=2)  # fmt: skip
    assert ids(chunked.generate(prompts, GREEDY)) == expected
    cold = llm.generate(prompts[0], GREEDY)[0]
    warm = llm.generate(prompts, GREEDY)
    assert cold.outputs.token_ids == expected[0]
    assert ids(warm) == expected
    assert [output.num_cached_tokens >= 128 for output in warm] == [True] * 3
    assert all(output.num_cached_tokens % 64 == 0 for output in warm)


# Streams and interruptions -----------------------------------------------------------------------


def test_streams_hold_what_is_new(llm: LLM) -> None:
    expected = llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False)
    texts, tokens = [""] * 3, [[], [], []]  # type: ignore[var-annotated]
    for step in llm.generate(PROMPTS[:3], GREEDY, stream=True):
        assert len(step) == 3
        for i, output in enumerate(step):
            if output is not None:
                texts[i] += output.outputs.text
                tokens[i] += output.outputs.token_ids
    assert texts == [output.outputs.text for output in expected]
    assert tokens == ids(expected)
    with pytest.raises(ValueError, match="prompt_logprobs"):
        llm.generate("a", SamplingParams(prompt_logprobs=1), stream=True)


def test_an_unopened_thinking_is_judged_as_by_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody says that the model thinks: the marker decides, and constraints wait for it."""
    llm = LLM("demo", max_model_len=64, num_gpu_blocks_override=8, reasoning_parser="qwen3")
    seen = []

    def run(requests: Any, _: Any) -> Iterator[RequestOutput]:
        seen.extend(requests)
        for text in ("思", "</th", "ink>", "答"):
            yield RequestOutput("x", outputs=CompletionOutput(text=text), finished=text == "答")

    monkeypatch.setattr(llm.llm_engine, "run", run)
    (whole,) = llm.chat([{"role": "user", "content": "a"}], use_tqdm=False)
    assert (whole.outputs.reasoning_content, whole.outputs.text) == ("思", "答")
    assert seen[0].sampling.thinking
    steps = [step[0] for step in llm.chat([{"role": "user", "content": "a"}], stream=True)]
    parts = [(s.outputs.reasoning_content, s.outputs.text) for s in steps if s]
    assert ["".join(part) for part in zip(*parts, strict=True)] == ["思", "答"]
    assert len(parts) == 4, "a step without text still has its tokens"


THOUGHTS = (
    r"<think>想[一二三]{2,9}</think>答[一二三]{2,9}"
    r'(<tool_call>\{"name": "f", "arguments": \{"a": "[a-z]{2,4}"\}\}</tool_call>)?'
)


@pytest.mark.parametrize("pattern", [THOUGHTS, THOUGHTS.removesuffix("?"), "无[一二三]{3,5}"])
def test_a_stream_of_chats_is_taken_apart_as_the_whole_is(pattern: str) -> None:
    """The pieces of thinking, content and calls add up to what the whole answer gives."""
    llm = LLM(
        "demo",
        max_model_len=512,
        num_gpu_blocks_override=64,
        reasoning_parser="think",
        tool_call_parser="hermes",
    )
    constraint = GuidedDecodingParams(regex=pattern)
    params = [
        SamplingParams(temperature=1.5, seed=seed, max_tokens=96, guided_decoding=constraint)
        for seed in range(3)
    ]
    chats = [[{"role": "user", "content": "数"}]] * 3
    expected = llm.chat(chats, params, use_tqdm=False)
    reasoning, content, arguments = [""] * 3, [""] * 3, [""] * 3
    for step in llm.chat(chats, params, stream=True):
        for i, output in enumerate(step):
            if output is not None:
                reasoning[i] += output.outputs.reasoning_content or ""
                content[i] += output.outputs.text
                for call in output.outputs.tool_calls or []:
                    arguments[i] += call.function.arguments or ""
    for i, output in enumerate(expected):
        whole = output.outputs
        assert (reasoning[i], content[i]) == (whole.reasoning_content or "", whole.text)
        calls = whole.tool_calls or []
        assert arguments[i] == "".join(call.function.arguments for call in calls)
        assert bool(reasoning[i]) == ("think" in pattern)
    assert any(arguments) or not pattern.endswith("</tool_call>)")
    raw = "".join(s[0].outputs.text for s in llm.generate("a", params[0], stream=True) if s[0])
    assert ("</think>" in raw) == ("think" in pattern), "generate parses nothing"


def test_a_stream_left_early_frees_everything(llm: LLM) -> None:
    stream = llm.generate(PROMPTS, SamplingParams(max_tokens=500, min_tokens=500), stream=True)
    for _ in range(5):
        next(stream)
    assert llm.llm_engine.stats().num_running > 0
    stream.close()  # type: ignore[attr-defined]
    assert llm.llm_engine.stats().num_running == llm.llm_engine.stats().num_waiting == 0


def test_two_streams_and_a_batch_share_the_engine(llm: LLM) -> None:
    expected = ids(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False))
    first = llm.generate(PROMPTS[0], GREEDY, stream=True)
    second = llm.generate(PROMPTS[1], GREEDY, stream=True)
    found: list[list[int]] = [[], []]
    for a, b in zip(first, second, strict=False):
        for i, step in enumerate((a, b)):
            assert step[0] is not None
            found[i] += step[0].outputs.token_ids
        assert ids(llm.generate("床前", SamplingParams(max_tokens=2), use_tqdm=False)) != []
    for i, rest in enumerate((first, second)):
        found[i] += [t for step in rest if step[0] for t in step[0].outputs.token_ids]
    shared = min(len(tokens) for tokens in expected)
    assert [tokens[:shared] for tokens in found] == [tokens[:shared] for tokens in expected]


INTERRUPTED = """
import os, signal, threading, time
from fastdeploy_lite import LLM, SamplingParams
# A shell that starts the tests in the background lets them ignore Ctrl-C, and children inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
llm = LLM("demo", max_model_len=1024, num_gpu_blocks_override=100)
threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    for _ in range(1000):
        llm.generate(["a"] * 8, SamplingParams(max_tokens=900, min_tokens=900), use_tqdm=False)
    raise SystemExit("never interrupted")
except KeyboardInterrupt:
    pass


def check():
    llm.llm_engine.check_integrity()
    stats = llm.llm_engine.stats()
    assert stats.num_free_blocks == 100 and stats.num_running == stats.num_waiting == 0, stats


check()
core = llm.llm_engine._core
for name in ("add", "abort"):  # Ctrl-C while the core keeps its books
    method, called = getattr(core, name), []

    def interrupted(*args):
        called.append(args)
        os.kill(os.getpid(), signal.SIGINT)
        return method(*args)

    setattr(core, name, interrupted)
    try:
        stream = llm.generate("a", SamplingParams(max_tokens=900), use_tqdm=False, stream=True)
        next(stream)
        stream.close()
        raise SystemExit(f"{name} was not interrupted")
    except KeyboardInterrupt:
        setattr(core, name, method)
    assert len(called) == 1, called
    check()
print(len(llm.generate("a", SamplingParams(max_tokens=5, min_tokens=5))[0].outputs.token_ids))
"""


def test_ctrl_c_leaves_a_usable_engine() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "5"), done.stderr


def test_the_import_touches_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, fastdeploy_lite as f; f.SamplingParams; assert f.__version__ and f.version();"
        "assert 'paddle' not in sys.modules\n"
        "try: f.no_such_name\nexcept AttributeError: print('ok')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stdout.strip() == "ok", done.stderr
    assert list(tmp_path.iterdir()) == []
