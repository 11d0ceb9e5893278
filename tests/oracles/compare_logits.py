#!/usr/bin/env python3
"""Compare the product's teacher-forced logits with the float32 reference over a text file.

    python tests/oracles/compare_logits.py --text heldout.jsonl MODEL_DIR [MODEL_DIR ...]

Windows are those of entrypoints/evaluate.py. One line a model: largest and mean absolute error over
all logits, the largest logit, and how many tokens have the same argmax; where they differ, the
largest gap between the two candidates in the reference (a near tie if it is about the error).
Tokens that follow, in their window, a token whose choice of experts is a tie within rounding are
counted apart: there the two may rightly use different experts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "entrypoints")]

import evaluate  # noqa: E402
from oracles.ernie_float32 import Array, ErnieFloat32  # noqa: E402

from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer  # noqa: E402

ROUTER_TIE = 1e-6


@dataclass(frozen=True)
class Errors:
    """Differences of two sets of logits [tokens, V]."""

    tokens: int
    worst: float
    mean: float
    largest_logit: float
    same_argmax: int
    widest_gap: float

    @classmethod
    def between(cls, found: Array, expected: Array) -> Errors:
        """Compare row by row."""
        error = np.abs(found - expected)
        rows, mine, theirs = np.arange(len(found)), found.argmax(1), expected.argmax(1)
        gap = expected[rows, theirs] - expected[rows, mine]
        return cls(
            len(found),
            float(error.max()),
            float(error.mean()),
            float(np.abs(expected).max()),
            int((mine == theirs).sum()),
            float(gap.max()),
        )

    @classmethod
    def joined(cls, parts: Sequence[Errors]) -> Errors:
        """Figures of all tokens of all parts."""
        tokens = sum(part.tokens for part in parts)
        return cls(
            tokens,
            max(part.worst for part in parts),
            sum(part.mean * part.tokens for part in parts) / tokens,
            max(part.largest_logit for part in parts),
            sum(part.same_argmax for part in parts),
            max(part.widest_gap for part in parts),
        )

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, max |error| {self.worst:.2e}, mean |error| {self.mean:.2e}, "
            f"largest |logit| {self.largest_logit:.1f}, same argmax {self.same_argmax}/"
            f"{self.tokens} (widest gap where not {self.widest_gap:.2e})"
        )


def compare(model: Path, text: Path, context: int, limit: int | None, wide: bool) -> str:
    """Return the line about one model."""
    started = time.perf_counter()
    runner = evaluate.load_runner(model, context, None)
    reference = ErnieFloat32(model, np.float64 if wide else np.float32)
    stream = evaluate.read_stream(Ernie4_5Tokenizer.from_pretrained(str(model)), text)
    parts: dict[bool, list[Errors]] = {False: [], True: []}
    for window in evaluate.windows(stream, context, limit):
        found, expected = runner.logits(window), reference.logits(list(window))
        tied = np.logical_or.accumulate(reference.margin < ROUTER_TIE)
        for after_tie, rows in ((False, ~tied), (True, tied)):
            if rows.any():
                parts[after_tie].append(Errors.between(found[rows], expected[rows]))
    clear = Errors.joined(parts[False])
    tail = f"; after a router tie: {Errors.joined(parts[True])}" if parts[True] else ""
    return f"{model}: {clear}{tail}; {time.perf_counter() - started:.0f} s"


def main() -> None:
    """Read the command line and print one line a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--text", type=Path, required=True, help="JSON lines as in evaluate.py")
    parser.add_argument("--context", type=int, default=1024, help="tokens a window (default 1024)")
    parser.add_argument("--limit", type=int, metavar="TOKENS", help="only the text's first tokens")
    parser.add_argument("--float64", action="store_true", help="compute the reference in float64")
    args = parser.parse_args()
    for model in args.models:
        print(compare(model, args.text, args.context, args.limit, args.float64), flush=True)


if __name__ == "__main__":
    main()
