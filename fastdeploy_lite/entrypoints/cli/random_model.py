"""`fastdeploy-lite random-model`: a small bf16 checkpoint of random weights, to try things on."""

from __future__ import annotations

import argparse
from typing import Any

from fastdeploy_lite.entrypoints.cli.argument_types import not_negative
from fastdeploy_lite.quantization.random_model import (
    SHAPES,
    published_shape_config,
    random_model_config,
    write_random_model,
)
from fastdeploy_lite.utils.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.description = (
        "Write a bf16 ERNIE-4.5 MoE checkpoint of random weights in the Paddle format, with the "
        "demo model's tokenizer: something to quantise, to serve and to measure. It says nothing "
        "sensible."
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers; the first is dense")
    parser.add_argument("--hidden-size", type=int, help="a multiple of 128 (default 512)")
    parser.add_argument(
        "--experts", type=int, help="routed experts of a layer (default 16, or as --shape has)"
    )
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        help="widths of the published model of that size, in place of --hidden-size; a MoE layer "
        "of 21b has 0.8 billion weights, one of 300b 5.6 billion",
    )
    parser.add_argument("--seed", type=not_negative, default=0, help="of the weights")
    parser.add_argument("--force", action="store_true", help="replace a model in --output")


def run(args: argparse.Namespace) -> int:
    """Write it and say what to do with it."""
    config = _config(args)
    count = write_random_model(args.output, config, seed=args.seed, force=args.force)
    print(f"{args.output}: {count / 1e6:.1f} million weights in bf16")
    print(f"next: fastdeploy-lite quantize --model {args.output} --output {args.output}-2bits")
    return 0


def _config(args: argparse.Namespace) -> dict[str, Any]:
    if args.shape is None:
        given = {"hidden_size": args.hidden_size, "experts": args.experts}
        return random_model_config(
            args.layers, **{name: size for name, size in given.items() if size is not None}
        )
    if args.hidden_size is not None:
        raise ConfigError(
            f"--hidden-size {args.hidden_size}: --shape {args.shape} fixes the widths: pass one of "
            "them"
        )
    return published_shape_config(args.shape, args.layers, args.experts)
