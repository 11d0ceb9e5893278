"""Where the greedy answers of two devices part, and whether rounding explains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Arrays = Mapping[str, np.ndarray]
"""What run_model.py answers: tokens of prompts, or logits and routes of sequences."""


class Parting(NamedTuple):
    """The first different token of one prompt's two answers."""

    prompt: int
    at: int
    text: list[int]  # what both had read before it
    ours: int
    theirs: int


def find(prompts: Sequence[list[int]], ours: Arrays, theirs: Arrays) -> list[Parting]:
    """Return the partings of the answers of `ours` from those of `theirs`, in order of prompts."""
    found, equal = [], 0
    for i, prompt in enumerate(prompts):
        mine, other = ours[str(i)], theirs[str(i)]
        assert len(mine) == len(other) > 0
        different = np.flatnonzero(mine != other)
        at = int(different[0]) if len(different) else len(mine)
        equal += at
        if len(different):
            text = [*prompt, *other[:at].tolist()]
            found.append(Parting(i, at, text, int(mine[at]), int(other[at])))
    print(f"{equal} tokens equal, {len(found)} of {len(prompts)} answers part")
    return found


def request(partings: Sequence[Parting]) -> dict:
    """Return what to ask run_model.py for the logits and routes at the partings."""
    return {"sequences": [parting.text for parting in partings]}


def assert_near(parting: Parting, row: np.ndarray, near: np.ndarray, widest: float) -> float:
    """Fail unless both tokens' logits in `row` are as near as rounding is wide; return that width.

    The width is the standard deviation of the logits' difference over the vocabulary.
    """
    gap, width = float(row[parting.theirs] - row[parting.ours]), float(np.std(row - near))
    print(
        f"prompt {parting.prompt} token {parting.at}: gap {gap:.4f}, rounding {width:.4f}", end="; "
    )
    assert abs(gap) <= widest * width
    return width


def assert_explained(partings: Sequence[Parting], theirs: Arrays, ours: Arrays) -> None:
    """Fail unless each parting is a near tie of logits, of experts before it, or of both.

    `theirs` and `ours` are the two devices' answers to `request(partings)`.
    """
    for j, parting in enumerate(partings):
        row, near = theirs[str(j)][-1], ours[str(j)][-1]
        assert row[parting.theirs] >= row[parting.ours]
        width = assert_near(parting, row, near, widest=4)
        experts = theirs[f"experts {j}"]
        rerouted = np.flatnonzero(np.any(experts != ours[f"experts {j}"], axis=1))
        if not len(rerouted):
            assert width <= 0.1 * row.std()
            print("same experts")
            continue
        # Rounding decided between two experts, which moves the logits further.
        first = rerouted[0]
        scores, moved = theirs[f"scores {j}"][first], ours[f"scores {j}"][first]
        left = np.delete(scores, experts[first])
        margin = scores[experts[first]].min() - left.max()
        noise = np.std(scores - moved)
        print(f"rerouted from layer {first} on: margin {margin:.5f}, noise {noise:.5f}")
        assert margin <= 4 * noise and noise <= 0.05 * scores.std()
