"""`fastdeploy-lite eval`: perplexity, divergence from another model, multiple choice."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from fastdeploy_lite import envs
from fastdeploy_lite.checkpoint.hub import resolve_model
from fastdeploy_lite.config import ActivationBits, WantedOrder
from fastdeploy_lite.utils.errors import ConfigError
from fastdeploy_lite.utils.files import check_writable

MEASURES = ("perplexity", "kl", "choice")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.description = (
        "Measure a model on your text. perplexity: of all its documents, packed one after another "
        "and cut into windows; kl: nats from the distributions of --against to the model's, and "
        "how often both find the same token likeliest; choice: share of questions whose right "
        "answer is the likeliest."
    )
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="model folder, repository id, or 'demo'"
    )
    parser.add_argument(
        "--text",
        required=True,
        metavar="FILE",
        help=".txt (a document a paragraph), .jsonl or .parquet of text or messages; `sample` is "
        'a packaged text; for choice .jsonl of {"question", "choices", "answer"}',
    )
    parser.add_argument("--against", metavar="DIR", help="model to compare with (kl needs it)")
    parser.add_argument("--context", type=int, default=1024, help="tokens a window (default 1024)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each Nth document only")
    parser.add_argument("--limit", type=int, metavar="TOKENS", help="only the text's first tokens")
    parser.add_argument(
        "--per-character", action="store_true", help="choice: log-likelihood per character"
    )
    parser.add_argument(
        "--quantization", metavar="NAME", help="load a bf16 --model as wint8, wint4"
    )
    parser.add_argument(
        "--lm-head-quantization",
        choices=("wint8",),
        help="keep the output head of --model in int8, on the CPU; that of --against stays",
    )
    parser.add_argument(
        "--activation-bits",
        type=int,
        choices=get_args(ActivationBits),
        default=24,
        help="rounding of the activations of --model on the CPU; --against keeps 24",
    )
    parser.add_argument(
        "--wint2-row-order",
        choices=get_args(WantedOrder),
        help="row order of 2-bit experts of --model; default: FD_LITE_WINT2_ROW_ORDER, else auto",
    )
    parser.add_argument("--device", help="cpu, nvidia or gpu (default: the best there is)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")


def run(args: argparse.Namespace) -> int:
    """Measure and print a line a figure."""
    if args.measure == "kl" and args.against is None:
        raise ConfigError("kl: --against is missing: the model to measure the divergence from")
    if args.context < 2 or args.every < 1 or (args.limit is not None and args.limit < 2):
        raise ConfigError("--context and --limit must be at least 2, --every at least 1")
    _refuse_idle(args)
    if args.json is not None:
        check_writable(args.json, "--json")
    args.model = resolve_model(args.model)
    if args.against is not None:
        args.against = resolve_model(args.against)
    started = time.perf_counter()
    measure = {"perplexity": _perplexity, "kl": _divergence, "choice": _choice}[args.measure]
    figures = measure(args)
    figures["seconds"] = round(time.perf_counter() - started, 1)
    for name, value in figures.items():
        print(f"{name:>20}: {_text(value)}")
    if args.json is not None:
        text = json.dumps(_plain(figures), indent=1, allow_nan=False)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 0


def _refuse_idle(args: argparse.Namespace) -> None:
    """Options that the measure would not read."""
    if args.measure == "choice" and args.limit is not None:
        raise ConfigError("--limit counts tokens of a text: for choice pass --every")
    if args.measure != "choice" and args.per_character:
        raise ConfigError(f"--per-character belongs to choice: leave it out for {args.measure}")


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    """For JSON, which has no NaN: an interval that is not known is null."""
    return {
        name: [None if math.isnan(part) else part for part in value]
        if isinstance(value, tuple)
        else value
        for name, value in figures.items()
    }


def _windows(args: argparse.Namespace) -> list[list[int]]:
    from fastdeploy_lite.calibration.text import read_stream, windows  # noqa: PLC0415
    from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer  # noqa: PLC0415

    tokenizer = Ernie4_5Tokenizer.from_pretrained(str(args.model))
    found = list(windows(read_stream(tokenizer, args.text, args.every), args.context, args.limit))
    if not found:
        raise ConfigError(f"{args.text}: found fewer than two tokens")
    return found


def _load(args: argparse.Namespace, context: int) -> Any:
    from fastdeploy_lite.entrypoints import evaluation  # noqa: PLC0415

    order: WantedOrder = args.wint2_row_order or envs.FD_LITE_WINT2_ROW_ORDER
    return evaluation.load_runner(
        args.model,
        context,
        args.device,
        args.quantization,
        order,
        args.lm_head_quantization,
        args.activation_bits,
    )


def _perplexity(args: argparse.Namespace) -> dict[str, Any]:
    from fastdeploy_lite.entrypoints import evaluation  # noqa: PLC0415

    if args.against is not None:
        return _divergence(args)
    parts = _windows(args)
    runner = _load(args, args.context)
    return _likelihood([evaluation.score(runner, part).logprobs for part in parts])


def _likelihood(logprobs: Sequence[Any]) -> dict[str, Any]:
    from fastdeploy_lite.entrypoints import evaluation  # noqa: PLC0415

    mean, (low, high) = evaluation.mean_interval([-part for part in logprobs])
    return {
        "perplexity": (math.exp(mean), math.exp(low), math.exp(high)),
        "nats a token": (mean, low, high),
        "tokens": sum(part.size for part in logprobs),
    }


def _divergence(args: argparse.Namespace) -> dict[str, Any]:
    from fastdeploy_lite.entrypoints import evaluation  # noqa: PLC0415

    parts = _windows(args)
    runner = _load(args, args.context)
    reference = evaluation.load_runner(args.against, args.context, args.device)
    if runner.config.model.vocab_size != reference.config.model.vocab_size:
        raise ConfigError(
            f"{args.against}: found a vocabulary of {reference.config.model.vocab_size}, expected "
            f"{runner.config.model.vocab_size} as in {args.model}"
        )
    found = [evaluation.diverge(runner, reference, part) for part in parts]
    loss, loss_range = evaluation.mean_interval(
        [part.reference_logprobs - part.logprobs for part in found]
    )
    kl, kl_range = evaluation.mean_interval([part.kl for part in found])
    same, same_range = evaluation.mean_interval([part.same_top.astype(float) for part in found])
    reference_mean = evaluation.mean_interval([-part.reference_logprobs for part in found])[0]
    return {
        **_likelihood([part.logprobs for part in found]),
        "reference perplexity": math.exp(reference_mean),
        "loss over reference": (loss, *loss_range),
        "kl": (kl, *kl_range),
        "same likeliest token": (same, *same_range),
    }


def _choice(args: argparse.Namespace) -> dict[str, Any]:
    from fastdeploy_lite.entrypoints import evaluation  # noqa: PLC0415
    from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer  # noqa: PLC0415

    tokenizer = Ernie4_5Tokenizer.from_pretrained(str(args.model))
    questions = list(evaluation.read_choices(tokenizer, Path(args.text)))[:: args.every]
    if not questions:
        raise ConfigError(f"{args.text}: found no question")
    longest = max(len(q.prompt) + max(map(len, q.answers)) for q in questions)
    runner = _load(args, max(args.context, longest))
    picks = [evaluation.likeliest(runner, q, args.per_character) for q in questions]
    hits = sum(pick == q.right for pick, q in zip(picks, questions, strict=True))
    figures: dict[str, Any] = {
        "accuracy": (hits / len(questions), *evaluation.share_interval(hits, len(questions))),
        "questions": len(questions),
    }
    if args.against is not None:
        other = evaluation.load_runner(args.against, max(args.context, longest), args.device)
        theirs = [evaluation.likeliest(other, q, args.per_character) for q in questions]
        same = sum(a == b for a, b in zip(picks, theirs, strict=True))
        figures["same choice as reference"] = same / len(questions)
    return figures


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        if math.isnan(value[1]):
            return f"{value[0]:.4f}  (no interval: a single window; see --context)"
        return f"{value[0]:.4f}  (95 %: {value[1]:.4f} to {value[2]:.4f})"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
