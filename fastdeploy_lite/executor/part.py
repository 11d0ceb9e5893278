"""What one rank does of a step that several share."""

from __future__ import annotations

from collections.abc import Callable

from fastdeploy_lite.distributed.communicator import Communicator, PeerFailedError, PeerLostError
from fastdeploy_lite.request.step import SliceResult


def compute_part(
    communicator: Communicator | None, work: Callable[[], list[SliceResult]]
) -> tuple[list[SliceResult] | None, Exception | None]:
    """Compute this rank's part; `Communicator.agree` is still to be called.

    Args:
        communicator: to the other ranks, which are told of a failure at once; None for a lone one.
        work: computes the part.

    Returns:
        Results, or None and what failed here if it was not another rank.

    Raises:
        PeerLostError: another rank is gone.
    """
    try:
        return work(), None
    except PeerFailedError:
        return None, None
    except PeerLostError:
        raise
    except Exception as error:
        if communicator is not None:
            communicator.fail()
        return None, error
