"""Continue or answer a prompt with a model that runs here; the packaged demo by default."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from fastdeploy_lite.entrypoints.cli import offline
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.interrupts import quiet_interrupts


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("prompt", help="text, or - to read it from standard input")
    parser.add_argument("--chat", action="store_true", help="ask it as a question: chat template")
    offline.add_sampling_arguments(parser)
    offline.add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the text as it is generated."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    sampling = offline.sampling(args)  # a wrong value costs no loading
    with quiet_interrupts():
        llm = offline.load(args)
    print_stream(stream(llm, prompt, sampling, args.chat))
    return 0


def stream(llm: Any, prompt: Any, sampling: Any, chat: bool) -> Iterator[str]:
    """Pieces of one answer.

    Args:
        llm: The model.
        prompt: Text, or messages for a chat.
        sampling: Sampling parameters.
        chat: Whether to apply the chat template.

    Yields:
        New text.
    """
    if chat:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        steps = llm.chat(messages, sampling, use_tqdm=False, stream=True)
    else:
        steps = llm.generate(prompt, sampling, use_tqdm=False, stream=True)
    for step in steps:
        for output in step:
            if output is not None:
                yield output.outputs.text


def print_stream(pieces: Iterator[str]) -> str:
    """Print pieces as they come.

    Args:
        pieces: New text.

    Returns:
        All of it.
    """
    text = ""
    for piece in pieces:
        text += piece
        print(piece, end="", flush=True)
    print()
    return text
