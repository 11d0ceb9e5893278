"""Which communicator joins the ranks of a model."""

from __future__ import annotations

from fastdeploy_lite.distributed.communicator import (
    Communicator,
    SharedMemory,
    SharedMemoryCommunicator,
)


def join(memory: SharedMemory, rank: int, on_cards: bool) -> Communicator:
    """Return the end of one rank; it is still to be opened.

    Args:
        memory: shared by all ranks.
        rank: which of them.
        on_cards: whether each has a card.
    """
    if not on_cards:
        return SharedMemoryCommunicator(memory, rank)
    from fastdeploy_lite.distributed.nccl import NcclCommunicator  # noqa: PLC0415 - needs CUDA

    return NcclCommunicator(memory, rank)
