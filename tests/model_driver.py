"""A scheduler of a few lines for tests of the model runner, and runners on small checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy_lite.config import ModelConfig, RuntimeConfig, SchedulerConfig
from fastdeploy_lite.request.step import SamplerParams, SequenceSlice, SliceResult
from fastdeploy_lite.worker.model_runner import ModelRunner

GREEDY = SamplerParams(temperature=0.0)


def make_runner(
    folder: Path,
    *,
    seqs: int = 8,
    tokens: int = 256,
    length: int = 512,
    device: str | None = "cpu",
    model: ModelConfig | None = None,
    **runtime: Any,
) -> ModelRunner:
    """Load `folder` and allocate the KV cache that the limits ask for."""
    config = RuntimeConfig(
        model_path=folder,
        model=model or ModelConfig.from_dir(folder),
        scheduler=SchedulerConfig(
            max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=length
        ),
        device=device,
        **runtime,
    )
    runner = ModelRunner(config)
    runner.load_model()
    runner.allocate_kv_cache(runner.profile_num_blocks())
    return runner


@dataclass
class Running:
    """One running sequence: its tokens, its blocks, and the logits row of every sampled token."""

    prompt: list[int]
    slot: int
    blocks: list[int]
    sampling: SamplerParams = field(default_factory=lambda: GREEDY)
    output: list[int] = field(default_factory=list)
    rows: list[np.ndarray[Any, Any]] = field(default_factory=list)
    done: int = 0
    fresh: bool = True

    def slice(self, most: int, **extra: Any) -> SequenceSlice:
        """The next slice, of at most `most` tokens; keeps a copy of the logits that it samples."""
        tokens = (self.prompt + self.output)[self.done : self.done + most]
        last = self.done + len(tokens) == len(self.prompt) + len(self.output)

        def keep(_: Sequence[int], row: np.ndarray[Any, Any]) -> None:
            self.rows.append(row.copy())

        part = SequenceSlice(
            request_id=str(self.slot),
            slot=self.slot,
            fresh=self.fresh,
            token_ids=tokens,
            start=self.done,
            block_table=self.blocks,
            sample=last,
            prompt_token_ids=self.prompt,
            output_token_ids=self.output,
            sampling=self.sampling,
            step=len(self.output),
            logits_processors=[keep],
            **extra,
        )
        self.fresh = False
        self.done += len(tokens)
        return part

    def take(self, result: SliceResult) -> None:
        """Append the sampled tokens, if any."""
        assert result.error is None
        self.output += result.token_ids


def sequences(prompts: Sequence[list[int]], length: int, **fields: Any) -> list[Running]:
    """Sequences in slots 0, 1, .. whose blocks are interleaved and descending, as after churn."""
    per_sequence, count = -(-length // 64), len(prompts)
    return [
        Running(
            list(prompt),
            slot,
            [(per_sequence - 1 - i) * count + slot for i in range(per_sequence)],
            **fields,
        )
        for slot, prompt in enumerate(prompts)
    ]


def generate(
    runner: ModelRunner, running: list[Running], count: int, chunk: int = 10_000
) -> list[list[int]]:
    """Run all together until each has `count` tokens; prefill `chunk` tokens at a time."""
    budget = runner.config.scheduler.max_num_batched_tokens
    while pending := [one for one in running if len(one.output) < count]:
        step, left = [], budget
        for one in pending:
            if left == 0:
                break
            part = one.slice(min(chunk, left))
            left -= len(part.token_ids)
            step.append((one, part))
        results = runner.execute([part for _, part in step])
        for (one, _), result in zip(step, results, strict=True):
            one.take(result)
    return [one.output for one in running]


class PaddedSteps:
    """Stands for CUDA graphs: sizes are powers of two and every size runs the padded step."""

    def __init__(self, largest: int = 8) -> None:
        self.largest = largest
        self.sizes: list[int] = []

    def bucket(self, num_seqs: int) -> int | None:
        size = 1 << (num_seqs - 1).bit_length()
        return size if size <= self.largest else None

    def run(self, size: int, forward: Callable[[], Any]) -> Any:
        self.sizes.append(size)
        return forward()
