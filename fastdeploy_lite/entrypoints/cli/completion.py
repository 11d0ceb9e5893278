"""Print the completion script of a shell: source <(fastdeploy-lite completion bash)"""

from __future__ import annotations

import argparse
import importlib

import shtab

from fastdeploy_lite.entrypoints.cli import main
from fastdeploy_lite.utils.argument_parser import NO_EFFECT, FlexibleArgumentParser

_FILES = frozenset({"model", "config", "output", "chat_template", "dataset_path", "tokenizer"})


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="which shell")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    print(shtab.complete(_whole_parser(), args.shell))
    return 0


def _whole_parser() -> argparse.ArgumentParser:
    """All subcommands with the flags that have an effect, as one parser."""
    parser = argparse.ArgumentParser(prog=main.PROGRAM)
    commands = parser.add_subparsers()
    for name, text in main.SUBCOMMANDS.items():
        if name == "bench":
            kinds = commands.add_parser(name, help=text).add_subparsers()
            for kind, about in main.BENCHMARKS.items():
                _fill(kinds.add_parser(kind, help=about), f"bench_{kind}")
        else:
            _fill(commands.add_parser(name, help=text), name.replace("-", "_"))
    return parser


def _fill(target: argparse.ArgumentParser, module_name: str) -> None:
    module = importlib.import_module(f"fastdeploy_lite.entrypoints.cli.{module_name}")
    source = FlexibleArgumentParser(add_help=False)
    module.add_arguments(source)
    for group in source._action_groups:
        if group.title == NO_EFFECT:
            continue
        for action in group._group_actions:
            if action.dest in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            target._add_action(action)
