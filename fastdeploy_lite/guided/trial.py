"""Compile a constraint from the network where it can be killed, before anybody depends on it.

The parsing library has limits of its own, but some constraints pass them only after seconds and
gigabytes. So the server tries each new one in a process with limits that the kernel enforces. The
process keeps the vocabulary and forks for every trial: a few milliseconds each.
"""

from __future__ import annotations

import hashlib
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import IO

import msgspec

from fastdeploy_lite.guided.compiler import GuidedDecoder
from fastdeploy_lite.guided.matcher import VocabularySource
from fastdeploy_lite.guided.spec import GuidedSpec, invalid
from fastdeploy_lite.utils.errors import RequestError

CPU_SECONDS = 2
WALL_SECONDS = 10.0  # a loaded machine
START_SECONDS = 60.0
MEMORY_BYTES = 64 << 20  # a schema of a real application takes one or two MiB
VERDICTS = 1024
_RUN = """\
import sys
sys.path[:] = {path!r}
from fastdeploy_lite.guided.trial import main
main()
"""


class Vocabulary(msgspec.Struct):
    """What a trial needs of a tokenizer; a `VocabularySource`."""

    pieces: list[bytes]
    eos_token_ids: list[int]
    logits: int

    @classmethod
    def of(cls, source: VocabularySource, logits: int) -> Vocabulary:
        """The vocabulary of a tokenizer; `logits` is the size of the model's rows."""
        pieces = [source.token_bytes(i) for i in range(source.vocab_size)]
        return cls(pieces, list(source.eos_token_ids), logits)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self.pieces)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token."""
        return self.pieces[token_id]

    def encode_as_text(self, text: str) -> list[int]:
        """A spelling, letter by letter: a trial asks whether there is one, not which."""
        letters = {piece: i for i, piece in enumerate(self.pieces) if len(piece) == 1}
        return [letters[bytes([b])] for b in text.encode() if bytes([b]) in letters]


class Verdict(msgspec.Struct):
    """What a trial found.

    Attributes:
        error: None for a constraint that can be used.
        is_final: Whether another trial would find the same: not where the machine was too busy.
    """

    error: str | None = None
    is_final: bool = True


class ConstraintTrial:
    """Tries constraints one after the other; thread-safe.

    Args:
        vocabulary: Of the model.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def check(self, spec: GuidedSpec) -> None:
        """Find out whether a constraint can be used.

        Args:
            spec: The constraint.

        Raises:
            RequestError: It is malformed, unsupported, or takes too much time or memory.
        """
        packed = msgspec.msgpack.encode(spec)
        key = hashlib.blake2b(packed).digest()
        with self._lock:
            verdict = self._verdicts.get(key) or self._try(packed)
            if verdict.is_final:
                self._verdicts[key] = verdict
                while len(self._verdicts) > VERDICTS:
                    self._verdicts.popitem(last=False)
        if verdict.error is not None:
            raise invalid(spec, verdict.error)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _try(self, packed: bytes) -> Verdict:
        try:
            if self._process is None or self._process.poll() is not None:
                self._start()
            process = self._process
            assert process is not None and process.stdin and process.stdout
            _write(process.stdin, packed)
            answer = _read(process.stdout, WALL_SECONDS + 5)
            return msgspec.msgpack.decode(answer, type=Verdict)
        except (OSError, EOFError, ValueError, TimeoutError):
            self._stop()
            return Verdict("it cannot be tried", is_final=False)

    def _start(self) -> None:
        self._stop()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RUN.format(path=sys.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin and self._process.stdout
        _write(self._process.stdin, msgspec.msgpack.encode(self._vocabulary))
        _read(self._process.stdout, START_SECONDS)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was not written any more
                    continue


# The process -------------------------------------------------------------------------------------


def main() -> None:
    """Answer trials until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)  # whoever serves plain requests comes first
    inbox, outbox = sys.stdin.buffer, sys.stdout.buffer
    vocabulary = msgspec.msgpack.decode(_read(inbox, None), type=Vocabulary)
    decoder = GuidedDecoder(vocabulary, vocabulary.logits)
    _write(outbox, b"ready")
    while True:
        try:
            packed = _read(inbox, None)
        except EOFError:
            return
        _write(outbox, msgspec.msgpack.encode(_fork_and_try(decoder, packed)))


def _fork_and_try(decoder: GuidedDecoder, packed: bytes) -> Verdict:
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a panic of the library is an answer here
        with os.fdopen(sink, "wb") as pipe:
            _write(pipe, msgspec.msgpack.encode(Verdict(_try_here(decoder, packed))))
        os._exit(0)
    os.close(sink)
    try:
        with os.fdopen(source, "rb") as pipe:
            return msgspec.msgpack.decode(_read(pipe, WALL_SECONDS), type=Verdict)
    except (EOFError, ValueError):  # killed by a limit
        return Verdict("it takes too much time or memory")
    except TimeoutError:
        return Verdict("it takes too much time", is_final=False)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _try_here(decoder: GuidedDecoder, packed: bytes) -> str | None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = _resident()
    resource.setrlimit(resource.RLIMIT_AS, (_virtual() + 4 * MEMORY_BYTES,) * 2)
    try:
        decoder.compile(msgspec.msgpack.decode(packed, type=GuidedSpec))
    except RequestError as error:
        return str(error).partition("guided decoding: ")[2] or str(error)
    except MemoryError:
        return "it takes too much memory"
    grown = _resident() - before
    return f"it takes {grown >> 20} MiB" if grown > MEMORY_BYTES else None


def _pages(column: int) -> int:
    numbers = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(numbers[column]) * resource.getpagesize()


def _virtual() -> int:
    return _pages(0)


def _resident() -> int:
    return _pages(1)


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(struct.pack("<I", len(data)) + data)
    pipe.flush()


def _read(pipe: IO[bytes], seconds: float | None) -> bytes:
    """One message.

    Raises:
        EOFError: The other side is gone.
        TimeoutError: It says nothing for so long.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    head = _read_bytes(pipe, 4, deadline)
    return _read_bytes(pipe, struct.unpack("<I", head)[0], deadline)


def _read_bytes(pipe: IO[bytes], count: int, deadline: float | None) -> bytes:
    data = b""
    while len(data) < count:
        if deadline is not None:
            left = max(deadline - time.monotonic(), 0.0)
            if not select.select([pipe], [], [], left)[0]:
                raise TimeoutError
        part = os.read(pipe.fileno(), count - len(data))
        if not part:
            raise EOFError
        data += part
    return data
