"""Several ranks that share each layer: the first in this process, each other in one of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from fastdeploy_lite import _ops_cpu, device, envs
from fastdeploy_lite.checkpoint.linears import check_tensor_parallel
from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.distributed.communicator import (
    PeerLostError,
    SharedMemory,
    SharedMemoryCommunicator,
)
from fastdeploy_lite.distributed.group import join
from fastdeploy_lite.executor.base import Executor, ExecutorReport, RankError
from fastdeploy_lite.executor.inline import report_of
from fastdeploy_lite.executor.messages import (
    Allocate,
    Blocks,
    CountBlocks,
    Held,
    Loaded,
    SliceWriter,
    Start,
    StepFailed,
)
from fastdeploy_lite.executor.part import compute_part
from fastdeploy_lite.executor.ranks import RankProcesses
from fastdeploy_lite.request.step import SequenceSlice, SliceResult
from fastdeploy_lite.utils.errors import ConfigError
from fastdeploy_lite.worker.model_runner import ModelRunner


class ProcessesExecutor(Executor):
    """Runs a model over processes of one host, each on its part of the CPU or on its own card."""

    def __init__(self, config: RuntimeConfig, on_loss: Callable[[str], None] | None = None) -> None:
        """Check what can be checked; nothing is started yet.

        Args:
            config: of the model.
            on_loss: see RankProcesses.

        Raises:
            ConfigError: the model or the device cannot be had at this size.
        """
        size = config.parallel.tensor_parallel_size
        check_tensor_parallel(config.model, size)
        self.config = config
        self._cards = _cards(config)
        self._on_loss = on_loss
        self._threads = _ops_cpu.num_threads()
        self._ranks: RankProcesses | None = None
        self._writer = SliceWriter()
        self._memory: Counter[str] = Counter()
        self._load_seconds = 0.0

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks from 1."""
        return [] if self._ranks is None else self._ranks.pids

    def load(self, show_progress: bool = False) -> int:
        """See Executor."""
        try:
            return self._load(show_progress)
        except BaseException:
            self.close()
            raise

    def _load(self, show_progress: bool) -> int:
        size = self.config.parallel.tensor_parallel_size
        widest = -(-self.config.model.vocab_size // size)
        memory = SharedMemory(size, widest)
        self._communicator = join(SharedMemoryCommunicator(memory, 0), bool(self._cards))
        threads = envs.FD_LITE_NUM_THREADS or max(1, self._threads // size)
        starts = []
        for rank in range(1, size):
            config = replace(self.config, parallel=replace(self.config.parallel, rank=rank))
            starts.append(Start(config, memory.fd, widest, threads, bool(self._cards)))
        self._ranks = ranks = RankProcesses(
            starts, memory.fd, self._communicator, self._cards, self._on_loss
        )
        memory.close()  # the others have inherited it
        _ops_cpu.set_num_threads(threads)
        self.runner = ModelRunner(self.config, self._communicator)
        try:
            self.runner.load_model(show_progress, ranks.check)
        except PeerLostError as error:
            ranks.give_up(str(error))
            raise
        seconds = [found.seconds for found in ranks.answers() if isinstance(found, Loaded)]
        self._load_seconds = max([self.runner.load_seconds, *seconds])
        try:
            return self._allocate(ranks)
        except PeerLostError as error:
            ranks.give_up(str(error))
            raise

    def _allocate(self, ranks: RankProcesses) -> int:
        """Give every rank the same number of KV blocks, once all of them hold their weights."""
        ranks.send(CountBlocks())
        own = self.runner.profile_num_blocks()  # on cards a step of all ranks together
        counts = [found.count for found in ranks.answers() if isinstance(found, Blocks)]
        num_blocks = min([own, *counts])
        ranks.send(Allocate(num_blocks))
        self.runner.allocate_kv_cache(num_blocks)
        for found in ranks.answers():
            if isinstance(found, Held):
                self._memory.update(found.memory)
        return num_blocks

    def execute(self, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        """See Executor."""
        ranks = self._ranks
        assert ranks is not None
        ranks.check()
        ranks.send(self._writer.step(slices))
        self._communicator.begin()
        try:
            results, failure = compute_part(self._communicator, lambda: self.runner.execute(slices))
            if self._communicator.agree(results is not None):
                assert results is not None
                return results
        except PeerLostError as error:
            ranks.give_up(str(error))
            raise
        raise self._verdict(ranks, failure)

    def _verdict(self, ranks: RankProcesses, failure: Exception | None) -> Exception:
        """What a step failed of, from all ranks together."""
        for number, found in enumerate(ranks.answers(), 1):
            if failure is None and isinstance(found, StepFailed) and found.reason:
                failure = RankError(f"rank {number}: {found.reason}")
        return failure or RankError("a rank failed without a reason")

    def report(self) -> ExecutorReport:
        """See Executor."""
        own = report_of(self.runner)
        memory = {name: size + self._memory[name] for name, size in own.memory.items()}
        return replace(own, memory=memory, load_seconds=self._load_seconds)

    def check(self) -> None:
        """See Executor."""
        if self._ranks is not None:
            self._ranks.check()

    def close(self) -> None:
        """See Executor."""
        if self._ranks is not None:
            self._ranks.close()
            self._communicator.close()
            _ops_cpu.set_num_threads(self._threads)


def _cards(config: RuntimeConfig) -> list[str]:
    """The card of each rank, none where the model runs on the CPU."""
    size = config.parallel.tensor_parallel_size
    if config.device == "cpu" or not device.decide().is_cuda:
        return []
    cards = device.visible_cards()
    if len(cards) < size:
        raise ConfigError(
            f"tensor_parallel_size {size}: each rank takes a card and {len(cards)} can be seen:"
            f" lower it, or set {device.DEVICE_VARIABLE}=cpu"
        )
    from fastdeploy_lite.model_executor.ops import cuda_runtime  # noqa: PLC0415 - needs CUDA

    try:
        cuda_runtime.open_nccl()
    except RuntimeError as error:
        raise ConfigError(f"tensor_parallel_size {size}: {error}") from error
    return cards
