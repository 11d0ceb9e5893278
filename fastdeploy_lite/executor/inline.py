"""One device, driven by this process."""

from __future__ import annotations

from collections.abc import Sequence

from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.executor.base import Executor, ExecutorReport
from fastdeploy_lite.request.step import SequenceSlice, SliceResult
from fastdeploy_lite.worker.model_runner import ModelRunner


class InlineExecutor(Executor):
    """The model runner itself.

    Attributes:
        runner: the model on its device.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        """Choose the device; nothing is loaded yet. Raises ConfigError as ModelRunner."""
        self.runner = ModelRunner(config)

    def load(self, show_progress: bool = False) -> int:
        """See Executor."""
        self.runner.load_model(show_progress)
        num_blocks = self.runner.profile_num_blocks()
        self.runner.allocate_kv_cache(num_blocks)
        return num_blocks

    def execute(self, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        """See Executor."""
        return self.runner.execute(slices)

    def report(self) -> ExecutorReport:
        """See Executor."""
        return report_of(self.runner)


_OTHERS = ("kv_cache", "workspace", "sampling", "offloaded_experts")


def report_of(runner: ModelRunner) -> ExecutorReport:
    """Return the report of one device."""
    held = runner.memory_report()
    memory = {f"weights.{role}": size for role, size in held.weights.items()}
    memory |= {name: getattr(held, name) for name in _OTHERS}
    return ExecutorReport(
        num_blocks=runner.num_blocks,
        load_seconds=runner.load_seconds,
        device=str(runner.place),
        memory=memory,
        bits_per_expert_weight=held.bits_per_expert_weight,
        row_order=held.row_order,
    )
