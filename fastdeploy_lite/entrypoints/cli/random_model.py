"""`fastdeploy-lite random-model`: a small bf16 checkpoint of random weights, to try things on."""

from __future__ import annotations

import argparse

from fastdeploy_lite.quantization.random_model import random_model_config, write_random_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.description = (
        "Write a bf16 ERNIE-4.5 MoE checkpoint of random weights in the Paddle format, with the "
        "demo model's tokenizer: something to quantise, to serve and to measure. It says nothing "
        "sensible."
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers; the first is dense")
    parser.add_argument("--hidden-size", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--experts", type=int, default=16, help="routed experts of a layer")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--force", action="store_true", help="replace a model in --output")


def run(args: argparse.Namespace) -> int:
    """Write it and say what to do with it."""
    config = random_model_config(args.layers, args.hidden_size, args.experts)
    count = write_random_model(args.output, config, seed=args.seed, force=args.force)
    print(f"{args.output}: {count / 1e6:.1f} million weights in bf16")
    print(f"next: fastdeploy-lite quantize --model {args.output} --output {args.output}-2bits")
    return 0
