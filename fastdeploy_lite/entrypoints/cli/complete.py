"""Continue text with an OpenAI-compatible server."""

from __future__ import annotations

import argparse

from fastdeploy_lite.entrypoints.cli import chat, client, generate, offline
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags."""
    client.add_arguments(parser, url=client.DEFAULT_URL)
    parser.add_argument("-q", "--quick", metavar="PROMPT", default=None, help="once, then leave")
    offline.add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Continue prompts until the end of input."""
    server = client.Client(args.url, args.model_name, args.api_key)
    body = chat.request_fields(args)
    if args.quick is not None:
        generate.print_stream(client.completion_text(server, args.quick, body))
        return 0
    while True:
        try:
            text = input("> ")
        except EOFError:
            return 0
        generate.print_stream(client.completion_text(server, text, body))
