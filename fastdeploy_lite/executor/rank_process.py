"""One rank beyond the first as a process of its own; `executor.ranks` starts it.

Standard input stays open as long as the parent lives; when it closes, or the parent dies in any
other way, this process ends at once, whatever it is doing. What starts it sees to the latter before
it imports this module.
"""

from __future__ import annotations

import logging
import signal
import socket
import traceback
from contextlib import suppress

import msgspec

from fastdeploy_lite import _ops_cpu, plugins
from fastdeploy_lite.distributed.communicator import (
    PeerLostError,
    SharedMemory,
    SharedMemoryCommunicator,
)
from fastdeploy_lite.distributed.group import join
from fastdeploy_lite.executor.channel import Channel
from fastdeploy_lite.executor.inline import report_of
from fastdeploy_lite.executor.messages import (
    Allocate,
    Blocks,
    CountBlocks,
    FromRank,
    Held,
    Loaded,
    RankFatal,
    SliceReader,
    Start,
    Step,
    StepFailed,
    ToRank,
    decode_start,
)
from fastdeploy_lite.executor.part import compute_part
from fastdeploy_lite.executor.verdict import describe
from fastdeploy_lite.utils.errors import FastDeployError
from fastdeploy_lite.utils.host_memory import keep_what_is_loaded
from fastdeploy_lite.utils.logging import init_console_logging, write_console
from fastdeploy_lite.utils.processes import die_with_standard_input
from fastdeploy_lite.utils.standard_streams import prepare_standard_streams
from fastdeploy_lite.worker.model_runner import ModelRunner


class RankLoop:
    """Receives steps and computes this rank's part of each.

    Args:
        channel: to the first rank.
        start: what to run.
    """

    def __init__(self, channel: Channel, start: Start) -> None:
        parallel = start.config.parallel
        memory = SharedMemory(parallel.tensor_parallel_size, start.widest, start.memory_fd)
        self._channel = channel
        ranks = SharedMemoryCommunicator(memory, parallel.rank)
        self._communicator = join(ranks, start.on_cards)
        self._runner = ModelRunner(start.config, self._communicator)
        self._reader = SliceReader()
        self._decoder: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)

    def run(self) -> None:
        """Load the model and serve until the parent goes."""
        self._runner.load_model()
        keep_what_is_loaded()
        self._send(Loaded(self._runner.load_seconds))
        while True:
            try:
                raw = self._channel.receive()
            except EOFError:
                return
            self._handle(self._decoder.decode(raw))

    def _handle(self, message: ToRank) -> None:
        match message:
            case Step():
                self._compute(message)
            case CountBlocks():
                self._send(Blocks(self._runner.profile_num_blocks()))
            case Allocate():
                self._runner.allocate_kv_cache(message.num_blocks)
                self._send(Held(report_of(self._runner).memory))

    def _compute(self, step: Step) -> None:
        results, failure = compute_part(
            self._communicator, lambda: self._runner.execute(self._reader.slices(step))
        )
        if failure is not None:
            write_console("".join(traceback.format_exception(failure)))
        if not self._communicator.agree(results is not None):
            self._send(StepFailed("" if failure is None else describe(failure)))

    def _send(self, message: FromRank) -> None:
        self._channel.send(msgspec.msgpack.encode(message))


def main(descriptor: int) -> int:
    """Run the process; returns its exit status."""
    prepare_standard_streams()
    init_console_logging()
    logging.disable(logging.WARNING)  # the first rank has said it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to answer
    die_with_standard_input()
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        start = decode_start(channel.receive())
        _ops_cpu.set_num_threads(start.threads)
        plugins.load_plugins(plugins.MODELS)
        RankLoop(channel, start).run()
    except PeerLostError:
        return 1  # whoever is to blame says why
    except BaseException as error:  # also MemoryError: the parent must hear the reason
        is_users = isinstance(error, FastDeployError)
        if not is_users:
            write_console(traceback.format_exc())
        text = str(error) if is_users else describe(error)
        with suppress(OSError):  # it may be gone
            channel.send(msgspec.msgpack.encode(RankFatal(text, is_users)))
        return 1
    return 0
