"""`fastdeploy-lite SUBCOMMAND ...`.

Each subcommand is a module with `add_arguments(parser)` and `run(args)`; only the chosen one is
imported, so that `--help` is quick and `tokenizer` needs no model framework.
"""

from __future__ import annotations

from fastdeploy_lite.utils.interrupts import end_on_interrupt, quiet_interrupts

if __name__ == "__main__":
    end_on_interrupt()  # before the imports that take time

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import fastdeploy_lite
from fastdeploy_lite import envs
from fastdeploy_lite.utils import blas
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import FastDeployError, exit_status, explain
from fastdeploy_lite.utils.logging import init_console_logging
from fastdeploy_lite.utils.standard_streams import prepare_standard_streams

PROGRAM = "fastdeploy-lite"
_PACKAGE = "fastdeploy_lite.entrypoints.cli"
SUBCOMMANDS = {
    "serve": "start the OpenAI-compatible HTTP server",
    "chat": "talk to a model here, or to a server with --url",
    "complete": "continue text with a server",
    "generate": "continue or answer a prompt here (the demo model by default)",
    "bench": "measure: bench latency | throughput | serve | kernels | quantize",
    "run-batch": "answer an OpenAI batch file",
    "tokenizer": "encode, decode, inspect a vocabulary",
    "inspect": "say what is in a model folder, without loading it",
    "quantize": "turn a bf16 checkpoint into a 2-bit one",
    "eval": "perplexity, divergence from another model, or multiple choice on your text",
    "random-model": "write a small bf16 checkpoint of random weights, to try quantize",
    "split": "cut a checkpoint into folders for several ranks",
    "packed-cache": "list and delete files of --packed-cache",
    "collect-env": "print what a bug report needs",
    "completion": "print the completion script of a shell",
}
ANY_ENVIRONMENT = ("collect-env", "completion")  # they help where variables are wrong
ENCODING = ("quantize", "bench quantize")
BENCHMARKS = {
    "latency": "seconds of one batch, offline",
    "throughput": "tokens per second of many requests, offline",
    "serve": "throughput and latencies of a running server",
    "kernels": "time of a MoE layer's experts beside the machine's ceilings",
    "quantize": "time and error of the 2-bit encoders",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run and end the process.

    Args:
        argv: Arguments; None takes the process's.
    """
    status = run(list(sys.argv[1:] if argv is None else argv))
    end_on_interrupt()  # nothing is left to tell anybody
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Dispatch to a subcommand.

    Args:
        arguments: Without the program's name.

    Returns:
        The exit status.
    """
    prepare_standard_streams()
    with quiet_interrupts():
        found = _dispatch(arguments)
    return found() if callable(found) else found


def _dispatch(arguments: list[str]) -> int | Callable[[], int]:
    """What is to be done, with all imports that it needs; or a status, if that was all."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(PROGRAM, SUBCOMMANDS))
        return 0
    if arguments[0] in ("-v", "--version"):
        print(fastdeploy_lite.__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in SUBCOMMANDS:
        return _unknown(PROGRAM, name, SUBCOMMANDS)
    module = name.replace("-", "_")
    if name == "bench":
        if not rest or rest[0] in ("-h", "--help"):
            print(_overview(f"{PROGRAM} bench", BENCHMARKS))
            return 0
        if rest[0] not in BENCHMARKS:
            return _unknown(f"{PROGRAM} bench", rest[0], BENCHMARKS)
        name, module, rest = f"bench {rest[0]}", f"bench_{rest[0]}", rest[1:]
    return _run_module(name, module, rest)


def _run_module(name: str, module_name: str, arguments: list[str]) -> Callable[[], int]:
    if name in ENCODING:
        blas.let_idle_threads_sleep()  # its products and our threads take turns
    module = importlib.import_module(f"{_PACKAGE}.{module_name}")
    return lambda: _run_parsed(name, module, arguments)


def _run_parsed(name: str, module: ModuleType, arguments: list[str]) -> int:
    try:
        return _parse_and_run(name, module, arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe had enough
        sys.stderr.close()
        return 0
    except (FastDeployError, OSError) as error:
        print(f"{PROGRAM} {name}: {explain(error)}", file=sys.stderr)
        return exit_status(error)


def _parse_and_run(name: str, module: ModuleType, arguments: list[str]) -> int:
    parser = FlexibleArgumentParser(prog=f"{PROGRAM} {name}", description=module.__doc__)
    module.add_arguments(parser)
    keyword = next((a[len("--help=") :] for a in arguments if a.startswith("--help=")), None)
    if keyword is not None:
        print(filtered_help(parser, keyword))
        return 0
    parsed = parser.parse_args(arguments)
    if name not in ANY_ENVIRONMENT:
        envs.snapshot()  # refuses what cannot be used, before it matters
        init_console_logging()
    return int(module.run(parsed) or 0)


def filtered_help(parser: argparse.ArgumentParser, keyword: str) -> str:
    """Help on some of many options.

    Args:
        parser: The parser.
        keyword: `listgroup` names the groups, `all` and `page` show everything, the name of a
            group shows that group, anything else the options that contain it.

    Returns:
        The text.
    """
    groups = [g for g in parser._action_groups if g._group_actions]
    if keyword in ("all", "page"):
        whole = getattr(parser, "format_whole_help", parser.format_help)
        return str(whole())
    if keyword == "listgroup":
        return "\n".join(f"{g.title} ({len(g._group_actions)} options)" for g in groups)
    formatter = parser._get_formatter()
    word = keyword.lower().replace("_", "-")
    for group in groups:
        named = word == str(group.title).lower()
        chosen = [a for a in group._group_actions if named or word in " ".join(a.option_strings)]
        if chosen:
            formatter.start_section(group.title)
            formatter.add_arguments(chosen)
            formatter.end_section()
    return formatter.format_help() or f"No option matches {keyword!r}; see --help=listgroup"


def _overview(program: str, entries: dict[str, str]) -> str:
    width = max(map(len, entries))
    lines = [f"  {name:<{width}}  {text}" for name, text in entries.items()]
    return "\n".join(
        [f"usage: {program} [-h] [-v] SUBCOMMAND ...", "", *lines, "",
         f"{program} SUBCOMMAND --help shows its options; --help=KEYWORD those that match."]
    )  # fmt: skip


def _unknown(program: str, name: str, entries: dict[str, str]) -> int:
    print(f"{program}: unknown subcommand {name!r}; choose from {', '.join(entries)}",
          file=sys.stderr)  # fmt: skip
    return 2


if __name__ == "__main__":
    main()
