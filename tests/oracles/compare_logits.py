#!/usr/bin/env python3
"""Compare the product's teacher-forced logits with the float32 reference over a text file.

    python tests/oracles/compare_logits.py --text heldout.jsonl MODEL_DIR [MODEL_DIR ...]

Windows are those of entrypoints/evaluate.py. One line a model: largest and mean absolute error over
all logits, the largest logit, and how many tokens have the same argmax; where they differ, the
largest gap between the two candidates in the reference (a near tie if it is about the error).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "entrypoints")]

import evaluate  # noqa: E402
from oracles.ernie_float32 import ErnieFloat32  # noqa: E402

from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer  # noqa: E402


def compare(model: Path, text: Path, context: int, limit: int | None, wide: bool) -> str:
    """Return the line about one model."""
    started = time.perf_counter()
    runner = evaluate.load_runner(model, context, None)
    reference = ErnieFloat32(model, np.float64 if wide else np.float32)
    stream = evaluate.read_stream(Ernie4_5Tokenizer.from_pretrained(str(model)), text)
    worst = total = largest = widest_gap = 0.0
    tokens = same = 0
    for window in evaluate.windows(stream, context, limit):
        found, expected = runner.logits(window), reference.logits(list(window))
        error = np.abs(found - expected)
        worst, total = max(worst, float(error.max())), total + float(error.mean()) * len(window)
        largest = max(largest, float(np.abs(expected).max()))
        mine, theirs = found.argmax(1), expected.argmax(1)
        rows = np.arange(len(window))
        gap = expected[rows, theirs] - expected[rows, mine]
        widest_gap = max(widest_gap, float(gap.max()))
        same += int((mine == theirs).sum())
        tokens += len(window)
    return (
        f"{model}: {tokens} tokens, max |error| {worst:.2e}, mean |error| {total / tokens:.2e}, "
        f"largest |logit| {largest:.1f}, same argmax {same}/{tokens} (widest gap where not "
        f"{widest_gap:.2e}), {time.perf_counter() - started:.0f} s"
    )


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
