"""Runs the demo model in a process of its own; used by test_cuda_model.

    python run_model.py MODEL REQUEST.json RESULT.npz

FD_LITE_DEVICE names the device. REQUEST: {"prompts": [[ids]], "max_tokens": n, "sampling": {...}}
generates; {"sequences": [[ids]]} gives the logits of all positions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def generate(model: str, request: dict) -> dict[str, np.ndarray]:
    from fastdeploy_lite import LLM, SamplingParams

    llm = LLM(model, max_num_seqs=16, max_model_len=1024, **request.get("engine", {}))
    sampling = {"temperature": 0.0, **request.get("sampling", {})}
    wanted = request["max_tokens"]
    params = [
        SamplingParams(min_tokens=wanted, max_tokens=wanted, **sampling) for _ in request["prompts"]
    ]
    outputs = llm.generate(request["prompts"], params, use_tqdm=False)
    return {str(i): np.array(out.outputs.token_ids) for i, out in enumerate(outputs)}


def logits(model: str, request: dict) -> dict[str, np.ndarray]:
    from fastdeploy_lite.config import ModelConfig, RuntimeConfig, SchedulerConfig
    from fastdeploy_lite.model_executor.model_runner import ModelRunner

    config = RuntimeConfig(
        model_path=Path(model),
        model=ModelConfig.from_dir(Path(model)),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=256, max_model_len=1024),
    )
    runner = ModelRunner(config)
    runner.load_model()
    return {str(i): runner.logits(ids) for i, ids in enumerate(request["sequences"])}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    run = logits if "sequences" in asked else generate
    np.savez(sys.argv[3], **run(sys.argv[1], asked))
