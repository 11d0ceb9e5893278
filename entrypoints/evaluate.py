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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.config import (
    LoadConfig,
    ModelConfig,
    RuntimeConfig,
    SchedulerConfig,
    WantedOrder,
)
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.model_executor.model_runner import ModelRunner
from fastdeploy_lite.utils.errors import FastDeployError

END_OF_DOCUMENT = "</s>"
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Scores:
    """Log-probabilities (float64) of tokens 1.. of a window, and the argmax before each of them."""

    logprobs: npt.NDArray[np.float64]
    argmax: npt.NDArray[np.int64]


def load_runner(
    model: Path,
    context: int,
    device: str | None,
    quantization: str | None = None,
    row_order: WantedOrder = "auto",
) -> ModelRunner:
    """The product's model runner, ready for teacher-forced windows of `context` tokens.

    quantization: what becomes of bf16 weights while they are loaded: wint8 or wint4.
    row_order: of 2-bit experts.
    """
    scheduler = SchedulerConfig(
        max_num_seqs=1, max_num_batched_tokens=CHUNK_TOKENS, max_model_len=context
    )
    config = RuntimeConfig(
        model_path=model,
        model=ModelConfig.from_dir(model).with_quantization(quantization),
        scheduler=scheduler,
        load=LoadConfig(row_order=row_order),
        device=device,
        use_cudagraph=False,
    )
    runner = ModelRunner(config)
    runner.load_model()
    return runner


def score(runner: ModelRunner, token_ids: Sequence[int]) -> Scores:
    """Score every token after the first, given all tokens before it."""
    targets = np.asarray(token_ids[1:])
    logprobs, argmax, done = [], [], 0
    for rows in runner.logits_chunks(token_ids):
        part = targets[done : done + len(rows)]  # the last row predicts beyond the window
        logits = rows[: len(part)].astype(np.float64)
        peak = logits.max(axis=1, initial=-np.inf)
        normaliser = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
        logprobs.append(logits[np.arange(len(part)), part] - normaliser)
        argmax.append(logits.argmax(axis=1))
        done += len(rows)
    return Scores(np.concatenate(logprobs), np.concatenate(argmax))


def encode_document(tokenizer: Ernie4_5Tokenizer, document: dict[str, Any]) -> list[int]:
    """Token ids of one line of the text file, closed by </s>."""
    end = [tokenizer.token_id(END_OF_DOCUMENT)]
    if "text" in document:
        return [*tokenizer.encode_text(document["text"]), *end]
    ids: list[int] = []
    prompt = str(tokenizer.cls_token)
    for message in document["messages"]:
        if message["role"] == "assistant":
            # The prompt and the answer are encoded apart, as they are at inference.
            ids += tokenizer.encode_text(prompt + "Assistant: ")
            ids += tokenizer.encode_text(message["content"]) + end
            prompt = ""
        else:
            prompt += f"User: {message['content']}\n"
    return ids


def read_stream(tokenizer: Ernie4_5Tokenizer, path: Path, every: int = 1) -> list[int]:
    """The documents 0, `every`, 2 `every` ... of a text file, packed one after another."""
    with path.open(encoding="utf-8") as file:
        lines = islice(file, 0, None, every)
        documents = [encode_document(tokenizer, json.loads(line)) for line in lines]
    return [token for document in documents for token in document]


def windows(stream: Sequence[int], context: int, limit: int | None) -> Iterator[Sequence[int]]:
    """Cut the first `limit` tokens (default all) into windows of at least two tokens."""
    stop = len(stream) if limit is None else min(limit, len(stream))
    for start in range(0, stop - 1, context):
        yield stream[start : min(start + context, stop)]


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
