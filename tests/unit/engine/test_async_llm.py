"""`AsyncLLM`: the server's engine in a program's own event loop."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fastdeploy_lite import LLM, SamplingParams
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.async_llm import AsyncLLM, AsyncLLMEngine
from fastdeploy_lite.utils.errors import RequestError

ARGS = EngineArgs(model="demo", max_model_len=512, num_gpu_blocks_override=40)
GREEDY = SamplingParams(temperature=0, max_tokens=16)


@pytest.fixture(autouse=True)
def logs_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@asynccontextmanager
async def started() -> AsyncIterator[AsyncLLM]:
    engine = AsyncLLMEngine.from_engine_args(ARGS, pid=1)
    assert await engine.start()
    await engine.init_connections()
    try:
        yield engine
    finally:
        await engine.shutdown()
    assert not engine.is_running


async def text_of(engine: AsyncLLM, prompt: Any, params: SamplingParams = GREEDY) -> str:
    chunks = [chunk async for chunk in engine.generate(prompt, params)]
    assert [chunk.finished for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    return "".join(chunk.outputs.text for chunk in chunks)


def test_answers_are_those_of_llm() -> None:
    messages = [{"role": "user", "content": "Hello"}]

    async def run() -> list[str]:
        async with started() as engine:
            ids = (await engine.get_tokenizer()).encode_text("床前明月光")
            prompts = ("床前明月光", ids, {"prompt_token_ids": ids}, {"messages": messages})
            return list(await asyncio.gather(*(text_of(engine, prompt) for prompt in prompts)))

    texts = asyncio.run(run())
    llm = LLM("demo", max_model_len=512, num_gpu_blocks_override=40)
    whole = llm.generate("床前明月光", GREEDY, use_tqdm=False)[0].outputs.text
    chat = llm.chat(messages, GREEDY, use_tqdm=False)[0].outputs.text
    assert texts == [whole, whole, whole, chat]


def test_faults_and_aborts_are_one_requests_own() -> None:
    async def run() -> None:
        async with started() as engine:
            long = SamplingParams(temperature=0, min_tokens=400, max_tokens=401)
            stream = engine.generate("a", long, request_id="mine")
            await anext(stream)
            with pytest.raises(RequestError, match="in use"):
                await anext(engine.generate("a", GREEDY, request_id="mine"))
            with pytest.raises(RequestError, match="vocabulary"):
                await text_of(engine, [10**9])
            with pytest.raises(TypeError, match="Invalid type for 'prompt'"):
                await text_of(engine, 7)
            await engine.abort_request("mine")
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].finished
            assert chunks[-1].outputs.finish_reason == "abort"
            assert await text_of(engine, "a")
            assert await engine.check_health()

    asyncio.run(run())
