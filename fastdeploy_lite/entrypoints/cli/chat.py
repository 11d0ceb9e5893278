"""Talk to a model that runs here (the packaged demo by default), or to a server with --url."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from fastdeploy_lite.entrypoints.cli import client, generate, offline
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import FastDeployError

Answer = Callable[[list[dict[str, str]]], Iterator[str]]


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags."""
    client.add_arguments(parser, url=None)
    parser.add_argument("--system-prompt", default=None, help="first message of the conversation")
    parser.add_argument("-q", "--quick", metavar="MESSAGE", default=None, help="ask once and leave")
    offline.add_sampling_arguments(parser)
    offline.add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Converse until the end of input."""
    answer = _remote(args) if args.url else _local(args)
    messages: list[dict[str, str]] = []
    if args.system_prompt:
        messages.append({"role": "system", "content": args.system_prompt})
    if args.quick is not None:
        _turn(answer, messages, args.quick)
        return 0
    while True:
        try:
            text = input("> ")
        except EOFError:
            return 0
        if text.strip():
            _try_turn(answer, messages, text)


def _turn(answer: Answer, messages: list[dict[str, str]], text: str) -> None:
    messages.append({"role": "user", "content": text})
    reply = generate.print_stream(answer(messages))
    messages.append({"role": "assistant", "content": reply})


def _try_turn(answer: Answer, messages: list[dict[str, str]], text: str) -> None:
    """A failed turn is reported and forgotten; the conversation goes on."""
    before = len(messages)
    try:
        _turn(answer, messages, text)
    except FastDeployError as error:
        del messages[before:]
        print(f"error: {error}")


def _remote(args: argparse.Namespace) -> Answer:
    server = client.Client(args.url, args.model_name, args.api_key)
    body = request_fields(args)
    return lambda messages: client.chat_text(server, messages, body)


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


def _local(args: argparse.Namespace) -> Answer:
    llm, sampling = offline.load(args), offline.sampling(args)
    return lambda messages: generate.stream(llm, messages, sampling, chat=True)
