"""What the engine core asks of whoever runs the model; it knows nothing of devices or ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastdeploy_lite.request.step import SequenceSlice, SliceResult


class ExecutorDeadError(RuntimeError):
    """No step can be run any more; the message is the root cause, in one line."""


class RankError(RuntimeError):
    """A step failed on another rank."""


@dataclass(frozen=True)
class ExecutorReport:
    """What there is to say of a loaded model.

    Attributes:
        num_blocks: KV blocks, the same on every device.
        load_seconds: of the slowest device.
        device: name of the place.
        memory: bytes by role, of all devices together.
        bits_per_expert_weight: 0 for a model without routed experts.
        row_order: how the rows of 2-bit experts are read and why, "" without such experts.
    """

    num_blocks: int
    load_seconds: float
    device: str
    memory: dict[str, int] = field(default_factory=dict)
    bits_per_expert_weight: float = 0.0
    row_order: str = ""


class Executor(ABC):
    """Runs one model; used by one thread."""

    @abstractmethod
    def load(self, show_progress: bool = False) -> int:
        """Load the model, allocate the KV cache and return its number of blocks.

        Args:
            show_progress: draw bars of bytes and of layers on stderr.

        Raises:
            FastDeployError: model, configuration or memory do not allow it; one line says why.
            ExecutorDeadError: a process ended meanwhile.
        """

    @abstractmethod
    def execute(self, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        """Compute one step; one result per slice, in order.

        Whatever is raised is the verdict of all devices together: the step has failed on each of
        them, and each is ready for the next one.

        Raises:
            ExecutorDeadError: a device is lost.
            Exception: the step failed.
        """

    @abstractmethod
    def report(self) -> ExecutorReport:
        """Return what is held now."""

    def check(self) -> None:  # noqa: B027 - most executors live in the process that asks
        """Raise ExecutorDeadError when a device is lost; cheap, for use between steps."""

    def close(self) -> None:  # noqa: B027 - as above
        """End processes; idempotent."""
