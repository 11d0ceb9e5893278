"""Talk to a model that runs here (the packaged demo by default), or to a server with --url."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from typing import Any

from fastdeploy_lite.entrypoints.cli import client, offline
from fastdeploy_lite.entrypoints.cli.conversation import (
    Backend,
    Conversation,
    Local,
    Remote,
    converse,
)
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import FastDeployError
from fastdeploy_lite.utils.interrupts import quiet_interrupts


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags."""
    client.add_arguments(parser, url=None)
    parser.add_argument("--system-prompt", default=None, help="first message of the conversation")
    parser.add_argument("-q", "--quick", metavar="MESSAGE", default=None, help="ask once and leave")
    offline.add_sampling_arguments(parser)
    offline.add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Converse until the end of input; the whole screen only where there is one."""
    with quiet_interrupts():
        backend = _backend(args)
    conversation = Conversation()
    conversation.set_system(args.system_prompt or "")
    if args.quick is not None:
        _print_turn(backend, conversation, args.quick)
        return 0
    if sys.stdin.isatty() and sys.stdout.isatty():
        from fastdeploy_lite.entrypoints.cli import terminal  # noqa: PLC0415 - not for pipes

        return terminal.run(backend, conversation)
    return _run_lines(backend, conversation)


def _backend(args: argparse.Namespace) -> Backend:
    if args.url is not None:
        server = client.Client(args.url, args.model_name, args.api_key)
        return Remote(server, request_fields(args))
    sampling = offline.sampling(args)  # a wrong value costs no loading
    return Local(offline.load(args), sampling, args.served_model_name or args.model)


def _run_lines(backend: Backend, conversation: Conversation) -> int:
    """One message a line, for pipes; a failed turn is reported and forgotten."""
    for line in sys.stdin:
        if line.strip():
            try:
                _print_turn(backend, conversation, line.strip("\n"))
            except FastDeployError as error:
                print(f"error: {error}")
    return 0


def _print_turn(backend: Backend, conversation: Conversation, text: str) -> None:
    notes: list[str] = []
    with closing(converse(backend, conversation, text, notes)) as pieces:  # type: ignore[type-var]
        for piece in pieces:
            while notes:
                print(f"[{notes.pop(0)}]", file=sys.stderr)
            print(piece.thinking + piece.text, end="", flush=True)
    print()


def request_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags as request fields, without those not given."""
    fields = {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k or None,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.sampling_seed,
    }
    return {name: value for name, value in fields.items() if value is not None}
