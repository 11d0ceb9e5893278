"""Runs the demo model in a process of its own; used by test_cuda_model.

    python run_model.py MODEL REQUEST.json RESULT.npz

FD_LITE_DEVICE names the device. REQUEST: {"prompts": [[ids]], "max_tokens": n, "sampling": {...},
"engine": {...}} generates; {"sequences": [[ids]], "load": {...}, "expert_offload": {...}} gives the
logits of all positions (key "i") and, for the last one, the experts of every layer in ascending
order ("experts i") and the scores that they were chosen by ("scores i").
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def generate(model: str, request: dict) -> dict[str, np.ndarray]:
    from fastdeploy_lite import LLM, SamplingParams

    llm = LLM(model, **{"max_num_seqs": 16, "max_model_len": 1024, **request.get("engine", {})})
    sampling = {"temperature": 0.0, **request.get("sampling", {})}
    wanted = request["max_tokens"]
    params = [
        SamplingParams(min_tokens=wanted, max_tokens=wanted, **sampling) for _ in request["prompts"]
    ]
    outputs = llm.generate(request["prompts"], params, use_tqdm=False)
    return {str(i): np.array(out.outputs.token_ids) for i, out in enumerate(outputs)}


def logits(model: str, request: dict) -> dict[str, np.ndarray]:
    from fastdeploy_lite.config import (
        ExpertOffloadConfig,
        LoadConfig,
        ModelConfig,
        RuntimeConfig,
        SchedulerConfig,
    )
    from fastdeploy_lite.worker.model_runner import ModelRunner

    offload = request.get("expert_offload")
    config = RuntimeConfig(
        model_path=Path(model),
        model=ModelConfig.from_dir(Path(model)),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=256, max_model_len=1024),
        load=LoadConfig(**request.get("load", {})),
        expert_offload=None if offload is None else ExpertOffloadConfig(**offload),
    )
    runner = ModelRunner(config)
    runner.load_model()
    routes = Routes()
    found = {}
    for i, ids in enumerate(request["sequences"]):
        found[str(i)] = runner.logits(ids)
        found[f"experts {i}"], found[f"scores {i}"] = routes.take()
    return found


class Routes:
    """Watches the router: what it chose for the last row of the last step, layer by layer."""

    def __init__(self) -> None:
        from fastdeploy_lite.model_executor import ops

        self._layers: list[tuple[np.ndarray, np.ndarray]] = []
        self._route = ops.route
        ops.route = self._watch

    def _watch(
        self, x: object, gate: object, bias: object, top_k: int, ids: object, weights: object
    ) -> None:
        from fastdeploy_lite.model_executor import ops

        self._route(x, gate, bias, top_k, ids, weights)
        row = ops.download(x)[-1]
        if row.dtype == np.uint16:
            row = (row.astype(np.uint32) << 16).view(np.float32)
        logits = row.astype(np.float64) @ ops.download(gate)
        p = np.exp(logits - logits.max())
        score = p / p.sum() + (0 if bias is None else ops.download(bias).reshape(-1))
        self._layers.append((np.sort(ops.download(ids)[-1]), score))

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Experts [layers, k] and scores [layers, E] since the last call."""
        experts, scores = zip(*self._layers, strict=True)
        self._layers = []
        return np.stack(experts), np.stack(scores)


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    run = logits if "sequences" in asked else generate
    np.savez(sys.argv[3], **run(sys.argv[1], asked))
