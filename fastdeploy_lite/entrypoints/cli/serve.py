"""Start the OpenAI-compatible HTTP server."""

from __future__ import annotations

import argparse

from fastdeploy_lite.entrypoints.openai import api_server, server_args
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add all flags of the server; `--model` may also stand alone as the first word."""
    parser.add_argument("model_tag", nargs="?", default=None, help="same as --model")
    server_args.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until stopped; returns the exit status."""
    if args.model_tag is not None:
        args.model = args.model_tag
    return api_server.serve(args)
