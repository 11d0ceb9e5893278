"""Two ways to do the same work, compared in pairs: each did a small part of it right beside the
other, so that what else the machine did in that moment disturbed both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def ratio_interval(
    these: Sequence[float], those: Sequence[float]
) -> tuple[float, tuple[float, float]]:
    """How many times as long these parts took as those, and its 95 % bootstrap interval.

    Parts of one place are a pair and are drawn together. The ratio is that of the sums, so what is
    rare and long counts for what it is.

    Args:
        these, those: seconds by part, of the same work in the same order.

    Raises:
        ValueError: there are no pairs, or not as many of these as of those.
    """
    if not these or len(these) != len(those):
        raise ValueError(f"{len(these)} and {len(those)} parts are no pairs")
    pairs = np.array([these, those])
    drawn = np.random.default_rng(0).integers(0, len(these), (RESAMPLES, len(these)))
    sums = pairs[:, drawn].sum(axis=2)
    low, high = np.quantile(sums[0] / sums[1], [0.025, 0.975])
    whole = pairs.sum(axis=1)
    return float(whole[0] / whole[1]), (float(low), float(high))
