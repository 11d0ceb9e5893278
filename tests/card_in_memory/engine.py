"""An engine core over the place of the card, with a hashed model; import after `_ops_cuda`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hashed_model import VOCAB, HashedModel, model_config

from fastdeploy_lite import device
from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.config import CacheConfig, LoadConfig, RuntimeConfig, SchedulerConfig
from fastdeploy_lite.engine.engine_core import EngineCore
from fastdeploy_lite.engine.rehearsal import rehearse
from fastdeploy_lite.executor.inline import InlineExecutor
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer

__all__ = ["VOCAB", "create"]

LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 512}


def create(num_blocks: int, limits: dict[str, int] | None = None, **runtime: Any) -> EngineCore:
    """Build one; `limits` are fields of SchedulerConfig, `runtime` of RuntimeConfig."""
    device.prepare_environment = lambda: None  # the plug-in is there, and another one
    device.decide = lambda: device.Device("nvidia", "the card is main memory")
    HashedModel.queue = sys.modules["fastdeploy_lite._ops_cuda"]
    scheduler = SchedulerConfig(**(limits or LIMITS))
    config = RuntimeConfig(
        model_path=Path("none"),
        model=model_config(scheduler.max_model_len),
        cache=CacheConfig(num_blocks=num_blocks),
        scheduler=scheduler,
        load=LoadConfig(load_choices="dummy"),
        **runtime,
    )
    executor = InlineExecutor(config)
    tokenizer = Ernie4_5Tokenizer.from_pretrained(demo_path(), eos_token_ids=[7])
    num_blocks = executor.load()
    return EngineCore(config, executor, tokenizer, num_blocks, rehearse(config, executor))
