"""Engine cores over the fake runner, and requests for them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from fake_runner import VOCAB, FakeRunner

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.config import CacheConfig, ModelConfig, RuntimeConfig, SchedulerConfig
from fastdeploy_lite.engine.engine_core import EngineCore
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.request.messages import EngineOutput, EngineRequest, EngineSampling
from fastdeploy_lite.request.step import SamplerParams

EOS = 2


@cache
def demo_tokenizer() -> Ernie4_5Tokenizer:
    return Ernie4_5Tokenizer.from_pretrained(demo_path(), eos_token_ids=[7])


def make_config(
    *,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 256,
    max_model_len: int = 512,
    chunked: bool = True,
    prefix: bool = True,
    output_caching: bool = True,
    **extra: Any,
) -> RuntimeConfig:
    model = ModelConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=64, intermediate_size=64, vocab_size=VOCAB, max_position_embeddings=max_model_len,
    )  # fmt: skip
    return RuntimeConfig(
        model_path=Path("none"),
        model=model,
        cache=CacheConfig(enable_prefix_caching=prefix, enable_output_caching=output_caching),
        scheduler=SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_model_len, chunked),
        **extra,
    )


def make_core(num_blocks: int = 64, eos_every: int = 0, **config: Any) -> EngineCore:
    settings = make_config(**config)
    runner = FakeRunner(num_blocks, settings.scheduler.max_num_batched_tokens, eos_every)
    return EngineCore(settings, runner, demo_tokenizer(), num_blocks)


def runner_of(core: EngineCore) -> FakeRunner:
    runner = core._executor
    assert isinstance(runner, FakeRunner)
    return runner


def make_request(
    name: str, prompt: list[int], max_tokens: int = 16, seed: int = 0, **sampling: Any
) -> EngineRequest:
    sampler = SamplerParams(
        seed=seed,
        logprobs=sampling.pop("logprobs", None),
        prompt_logprobs=sampling.pop("prompt_logprobs", None),
    )
    settings = EngineSampling(sampler, max_tokens, (EOS, 7), **sampling)
    return EngineRequest(name, prompt, settings)


def run(core: EngineCore, *requests: EngineRequest, most_steps: int = 10_000) -> dict[str, Any]:
    """Run requests to their ends; return all their outputs by request id."""
    for request in requests:
        core.add(request)
    outputs: dict[str, list[EngineOutput]] = {request.request_id: [] for request in requests}
    for _ in range(most_steps):
        if not core.has_work:
            break
        for output in core.step():
            outputs[output.request_id].append(output)
    assert not core.has_work, "the engine did not finish"
    core.check_integrity()
    return outputs


def tokens(outputs: list[EngineOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]
