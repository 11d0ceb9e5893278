"""How activations leave a card for main memory and come back: for layers that the CPU computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy.typing as npt

from fastdeploy_lite.model_executor.ops._view import ScratchSource, Tensor

Array = npt.NDArray[Any]


class HostLink(Protocol):
    """The way between the place of the layers and main memory.

    Crossings are queued with the place's other work and take place in that order. One link serves
    all layers in turn: what was fetched is valid until the next fetch.

    Attributes:
        is_mute: leave the host's work out, so that results mean nothing: for sizing memory, and for
            measurements of the card alone.
    """

    is_mute: bool

    @property
    def place(self) -> Any:
        """Paddle's place of main memory."""
        ...

    @property
    def workspace(self) -> ScratchSource:
        """Scratch memory there."""
        ...

    def fetch(self, *tensors: Tensor) -> Sequence[Array]:
        """Queue copies of contiguous tensors; return the arrays that they arrive in, bfloat16 as
        its bits in uint16. They may be read inside `on_host` only."""
        ...

    def on_host(self, work: Callable[[], None]) -> None:
        """Run `work` once what was fetched last has arrived: now and, where this is recorded as
        part of a step, at each replay."""
        ...

    def answer(self, like: Tensor) -> Array:
        """Return an array for `send` of a tensor's shape and dtype, for `work` to write."""
        ...

    def send(self, array: Array, tensor: Tensor) -> None:
        """Queue the copy of an `answer` into a contiguous tensor."""
        ...
