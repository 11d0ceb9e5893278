#!/usr/bin/env python3
"""Perplexity of checkpoints on held-out text, and agreement with recorded log-probabilities.

    python entrypoints/evaluate.py --text heldout.jsonl MODEL_DIR [MODEL_DIR ...]
    python entrypoints/evaluate.py --text heldout.jsonl --quantization wint4 BF16_DIR
    python entrypoints/evaluate.py --reference reference_logprobs.json --key bf16 MODEL_DIR

Text: one JSON object a line, {"text"} or {"messages"} of user and assistant. Every document is
closed by </s> and the documents are packed one after another, as the demo models were trained.
The stream is cut into windows of --context tokens that do not overlap; every token of a window but
its first is scored with all tokens before it in the window. Logits are the product's own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastdeploy_lite.calibration.text import encode_document, read_stream, windows
from fastdeploy_lite.entrypoints.evaluation import load_runner, score
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.utils.errors import FastDeployError
from fastdeploy_lite.worker.model_runner import ModelRunner

__all__ = ["encode_document", "load_runner", "read_stream", "score", "windows"]


def report_perplexity(runner: ModelRunner, args: argparse.Namespace, model: Path) -> str:
    """One line: perplexity, mean negative log-probability, tokens scored, seconds."""
    started = time.perf_counter()
    stream = read_stream(Ernie4_5Tokenizer.from_pretrained(str(model)), args.text, args.every)
    parts = [score(runner, window).logprobs for window in windows(stream, args.context, args.limit)]
    logprobs = np.concatenate(parts)
    mean = -float(logprobs.mean())
    seconds = time.perf_counter() - started
    return (
        f"{_title(runner, model)}: perplexity {np.exp(mean):.3f}, {mean:.5f} nats a token, "
        f"{logprobs.size} tokens in windows of {args.context}, {seconds:.0f} s"
    )


def report_agreement(runner: ModelRunner, args: argparse.Namespace, model: Path) -> str:
    """One line: differences from recorded log-probabilities and the share of equal argmax."""
    recorded = json.loads(args.reference.read_text(encoding="utf-8"))[args.key]
    differences, equal = [], []
    for document in recorded:
        found = score(runner, document["ids"])
        differences.append(found.logprobs - np.asarray(document["logprobs"]))
        equal.append(found.argmax == np.asarray(document["argmax"])[: found.argmax.size])
    difference = np.abs(np.concatenate(differences))
    return (
        f"{_title(runner, model)}: mean |difference| {difference.mean():.4f}, "
        f"largest {difference.max():.4f}, same argmax {np.concatenate(equal).mean():.2%}, "
        f"{difference.size} tokens"
    )


def _title(runner: ModelRunner, model: Path) -> str:
    """The model's folder, and what was made of it while it was loaded."""
    config = runner.config.model
    online = config.quantizes_on_load and config.quantization
    return f"{model} ({online.quantization})" if online else str(model)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL_DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=Path, metavar="FILE", help="held-out text, JSON lines")
    what.add_argument("--reference", type=Path, metavar="FILE", help="recorded log-probabilities")
    parser.add_argument("--key", default="bf16", help="list in the reference file (default bf16)")
    parser.add_argument("--context", type=int, default=1024, help="tokens a window (default 1024)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each Nth document only")
    parser.add_argument("--limit", type=int, metavar="TOKENS", help="only the text's first tokens")
    parser.add_argument("--quantization", metavar="NAME", help="load bf16 models as wint8 or wint4")
    parser.add_argument(
        "--wint2-row-order",
        dest="row_order",
        default="auto",
        choices=("auto", "natural", "permuted"),
        help="of 2-bit experts (default auto: the files tell)",
    )
    parser.add_argument("--device", help="cpu, nvidia or gpu (default: the best there is)")
    return parser.parse_args(arguments)


def main() -> int:
    """Print one line a model; 1 if one of them cannot be loaded."""
    args = parse_arguments()
    try:
        for model in args.models:
            runner = load_runner(
                model, args.context, args.device, args.quantization, args.row_order
            )
            report = report_perplexity if args.text else report_agreement
            print(report(runner, args, model), flush=True)
    except (FastDeployError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
