"""Log-probabilities on the host, for the modes that the device op does not cover."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.request.step import LOWEST, TokenLogprobs

FloatRow = npt.NDArray[np.floating[Any]]


def log_softmax(row: FloatRow) -> npt.NDArray[np.float64]:
    """Natural-log probabilities of float logits [V], in float64."""
    wide = row.astype(np.float64)
    wide -= wide.max()
    result: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    return result


def nucleus(values: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.float64]:
    """Renormalise log-probabilities [V] over the smallest set of mass `top_p`; -inf outside it.

    Equal probabilities enter by ascending id; the best token is always in the set.
    """
    order = np.argsort(-values, kind="stable")
    mass = np.cumsum(np.exp(values[order]))
    size = int(np.searchsorted(mass, top_p)) + 1
    kept = order[:size]
    result = np.full_like(values, -np.inf)
    # Rounding may leave a lone token a hair above probability 1.
    result[kept] = np.minimum(values[kept] - np.log(np.exp(values[kept]).sum()), 0.0)
    return result


def select(values: FloatRow, token: int, count: int) -> TokenLogprobs:
    """Return the value and rank of `token` and the `count` best (-1: all), ties to the lower id."""
    count = len(values) if count < 0 else min(count, len(values))
    best = np.argsort(-values, kind="stable")[:count]
    return TokenLogprobs(
        logprob=max(float(values[token]), LOWEST),
        rank=1 + int((values > values[token]).sum()),
        top_ids=best.tolist(),
        top_logprobs=np.maximum(values[best], LOWEST).tolist(),
    )
