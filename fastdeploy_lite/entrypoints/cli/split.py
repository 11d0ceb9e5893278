"""`fastdeploy-lite split`: a whole checkpoint in, folders of several ranks out."""

from __future__ import annotations

import argparse
import sys

from fastdeploy_lite.checkpoint.hub import resolve_model
from fastdeploy_lite.quantization.split import split_checkpoint
from fastdeploy_lite.utils.errors import FastDeployError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.description = (
        "Cut a checkpoint, quantised or not, into folders rank0 ... for tensor parallelism, as the "
        "published TP models have them. Nothing is quantised anew."
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="folder of the whole model, repository id, or 'demo'",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder")
    parser.add_argument(
        "--tensor-parallel-size", "-tp", type=int, required=True, metavar="N", help="ranks"
    )
    parser.add_argument("--force", action="store_true", help="replace a model in --output")


def run(args: argparse.Namespace) -> int:
    """Cut; 0, or 1 with a line on stderr that names what is wrong."""
    try:
        model = resolve_model(args.model)
        split_checkpoint(model, args.output, args.tensor_parallel_size, force=args.force)
    except (FastDeployError, OSError) as error:
        print(f"fastdeploy-lite split: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: rank0 to rank{args.tensor_parallel_size - 1}")
    return 0
