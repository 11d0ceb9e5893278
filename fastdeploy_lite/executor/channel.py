"""Whole messages over a pair of connected sockets: four bytes of length, then the bytes."""

from __future__ import annotations

import socket
import struct

_LENGTH = struct.Struct("<I")


class Channel:
    """One end; one thread may send while another receives.

    Args:
        end: a connected stream socket, closed by `close`.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def fileno(self) -> int:
        """Descriptor, for `select`."""
        return self._end.fileno()

    def send(self, message: bytes) -> None:
        """Send a message; OSError when the other end is gone."""
        self._end.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self) -> bytes:
        """Wait for a message; EOFError or OSError when the other end is gone."""
        (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return self._exactly(size)

    def close(self) -> None:
        """Close this end."""
        self._end.close()

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._end.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)
