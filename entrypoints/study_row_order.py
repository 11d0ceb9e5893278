#!/usr/bin/env python3
"""What the order of rows costs a 2-bit encoding: natural, permuted and random orders of one model.

    python entrypoints/study_row_order.py --model BF16_DIR --text heldout.jsonl --work DIR

The permuted generation of 2-bit files rearranges the rows of every group of 64 before they are
encoded. Groups keep their rows, so local scales see the same values: only which four rows share a
byte changes. How far two such encodings differ by chance is told by random orders inside the
groups. Every order's experts are encoded without calibration, decoded and written as a bf16 model;
all models are scored on the same windows. Differences come with 95 % intervals over windows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.calibration.encoder import read_dense
from fastdeploy_lite.calibration.text import read_stream, windows
from fastdeploy_lite.checkpoint import Checkpoint, CheckpointWriter
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.entrypoints.evaluation import load_runner, mean_interval, score
from fastdeploy_lite.formats.ccq import GROUP_ROWS, to_stored_order
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.quantization import ccq_search
from fastdeploy_lite.quantization.ccq_codes import CODES
from fastdeploy_lite.quantization.output_folder import copy_companions
from fastdeploy_lite.utils.arrays import float32_to_bfloat16

Order = npt.NDArray[np.intp]


def group_order(name: str, rows: int, module: int) -> Order:
    """Stored row -> true row of a matrix: natural, permuted or a number, the seed of a draw."""
    if name in ("natural", "permuted"):
        return to_stored_order(np.arange(rows), name)  # type: ignore[arg-type]
    random = np.random.default_rng((int(name), module))
    groups = np.arange(rows).reshape(-1, GROUP_ROWS)
    return random.permuted(groups, axis=1).reshape(-1)


def write_model(
    model: Path, folder: Path, name: str, codes: Sequence[tuple[float, float]] | None
) -> tuple[float, float]:
    """Write the bf16 model whose experts went through 2 bits; relative error of gate/up and down.

    The encoder sees the rows as a file of that order holds them.
    """
    checkpoint = Checkpoint.open(model)
    encoded, sums = {}, {"up_gate_proj": [0.0, 0.0], "down_proj": [0.0, 0.0]}
    for number, linear in enumerate(model_linears(checkpoint.config)):
        if linear.expert is None:
            continue
        weight = read_dense(checkpoint, linear)
        order = group_order(name, len(weight), number)
        decoded = np.empty_like(weight)
        stored = np.ascontiguousarray(weight[order])
        decoded[order] = ccq_search.encode(stored, codes=codes, workers=1).decode()
        part = sums[linear.role]
        part[0] += float(np.square(decoded - weight, dtype=np.float64).sum())
        part[1] += float(np.square(weight, dtype=np.float64).sum())
        encoded[f"{linear.module}.weight"] = float32_to_bfloat16(decoded)
    shutil.rmtree(folder, ignore_errors=True)
    with CheckpointWriter(folder, dict(checkpoint.config.raw)) as writer:
        for key in sorted(checkpoint):
            source = checkpoint.get(key)
            writer.add(key, encoded.pop(key, source.data), source.dtype)
    if encoded:
        raise ValueError(f"{model}: no tensor {min(encoded)}; the model must have Paddle names")
    copy_companions(model, folder)
    up_gate, down = (error / energy for error, energy in sums.values())
    return up_gate, down


def score_model(
    folder: Path, stream: Sequence[int], context: int, limit: int | None
) -> list[npt.NDArray[np.float64]]:
    """Negative log-probabilities of every window."""
    runner = load_runner(folder, context)
    return [-score(runner, window).logprobs for window in windows(stream, context, limit)]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, metavar="BF16_DIR")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="for models")
    parser.add_argument("--every", type=int, default=3, metavar="N", help="each Nth document")
    parser.add_argument("--random", type=int, default=6, metavar="N", help="random orders")
    parser.add_argument("--codes", type=int, metavar="N", help="codes to try (default: quantize's)")
    parser.add_argument("--limit", type=int, metavar="TOKENS", help="only the text's first tokens")
    parser.add_argument("--context", type=int, default=1024)
    return parser.parse_args()


def main() -> int:
    """Print a line an order, then the spread."""
    args = parse_arguments()
    stream = read_stream(Ernie4_5Tokenizer.from_pretrained(str(args.model)), args.text, args.every)
    codes = None if args.codes is None else CODES[: args.codes]
    base = score_model(args.model, stream, args.context, args.limit)
    results = {}
    for name in ("natural", "permuted", *map(str, range(args.random))):
        folder = args.work / name
        errors = write_model(args.model, folder, name, codes)
        nats = score_model(folder, stream, args.context, args.limit)
        shutil.rmtree(folder)
        results[name] = float(np.concatenate(nats).mean())
        over, (low, high) = mean_interval([a - b for a, b in zip(nats, base, strict=True)])
        print(
            f"{name:>8}: relative error gate/up {errors[0]:.5f}, down {errors[1]:.5f}; perplexity "
            f"{np.exp(results[name]):.2f}, {over:.4f} nats over bf16 ({low:.4f} to {high:.4f})",
            flush=True,
        )
    drawn = np.array([value for name, value in results.items() if name.isdigit()])
    if len(drawn) > 1:
        print(
            json.dumps(
                {
                    "random orders": len(drawn),
                    "mean perplexity": round(float(np.exp(drawn.mean())), 2),
                    "standard deviation, nats": round(float(drawn.std(ddof=1)), 4),
                    "natural, deviations": round(
                        float((results["natural"] - drawn.mean()) / drawn.std(ddof=1)), 2
                    ),
                    "permuted, deviations": round(
                        float((results["permuted"] - drawn.mean()) / drawn.std(ddof=1)), 2
                    ),
                }
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
