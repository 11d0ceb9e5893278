"""The sampling chain in float64 numpy and Python integers, written from its definition."""

from __future__ import annotations

import numpy as np

MASK32 = 0xFFFFFFFF


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox4x32-10 (Salmon et al., 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            right >> 32 ^ c[1] ^ k[0],
            right & MASK32,
            left >> 32 ^ c[3] ^ k[1],
            left & MASK32,
        ]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return c


def uniform(seed: int, step: int) -> float:
    """The uniform number in [0, 1) of a draw."""
    words = philox((step & MASK32, step >> 32, 0, 0), (seed & MASK32, seed >> 32))
    return (words[0] | words[1] << 32) / 2.0**64


def kept(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Boolean [V]: what min_p, then top_k, then top_p leave."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    order = np.argsort(-logits.astype(np.float64), kind="stable")
    order = order[weights[order] >= min_p]
    if top_k > 0:
        order = order[:top_k]
    mass = np.cumsum(weights[order])
    # The least that reaches top_p; the margin is float64's own rounding of the running sum.
    size = int(np.searchsorted(mass, top_p * mass[-1] * (1 - 1e-12))) + 1 if top_p < 1 else None
    chosen = np.zeros(len(logits), bool)
    chosen[order[:size]] = True
    return chosen


def distribution(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """float64 probabilities [V] of a draw."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    weights[~kept(logits, top_k, top_p, min_p)] = 0
    return weights / weights.sum()


def draw(logits: np.ndarray, top_k: int, top_p: float, min_p: float, seed: int, step: int) -> int:
    """The token where the running sum of probabilities, by ascending id, passes the uniform."""
    running = np.cumsum(distribution(logits, top_k, top_p, min_p))
    return int(np.searchsorted(running, uniform(seed, step), side="right"))


def process(
    logits: np.ndarray,
    occurrences: np.ndarray,
    repetition: float,
    frequency: float,
    presence: float,
    temperature: float,
    edits: dict[int, float],
) -> np.ndarray:
    """One row [V] through edits, penalties and temperature."""
    x = logits.astype(np.float64)
    for token, value in edits.items():
        x[token] += value
    seen = occurrences != 0
    x[seen] = np.where(x[seen] > 0, x[seen] / repetition, x[seen] * repetition)
    count = occurrences & 0xFFFFFF
    x[count > 0] -= (count * frequency + presence)[count > 0]
    return x / temperature if temperature > 0 else x


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max()
    return wide - np.log(np.exp(wide).sum())
