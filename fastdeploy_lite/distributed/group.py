"""Which communicator joins the ranks of a model."""

from __future__ import annotations

from fastdeploy_lite.distributed.communicator import LONGEST_WAIT, Communicator, HostCommunicator


def join(ranks: HostCommunicator, on_cards: bool, seconds: float = LONGEST_WAIT) -> Communicator:
    """Return the end of one rank; it is still to be opened.

    Args:
        ranks: the end of its process.
        on_cards: whether each rank has a card, which then carries the numbers.
        seconds: longest wait for another rank's card.
    """
    if not on_cards:
        return ranks
    from fastdeploy_lite.distributed.nccl import NcclCommunicator  # noqa: PLC0415 - needs CUDA

    return NcclCommunicator(ranks, seconds)
