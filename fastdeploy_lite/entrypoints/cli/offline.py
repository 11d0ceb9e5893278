"""What the subcommands that run a model in this process share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import ConfigError

if TYPE_CHECKING:
    from fastdeploy_lite.entrypoints.llm import LLM
    from fastdeploy_lite.request.params import SamplingParams


def add_engine_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the engine's flags, with the packaged demo model as default.

    Args:
        parser: Where to.
    """
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model="demo")


def add_sampling_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags of `sampling`.

    Args:
        parser: Where to.
    """
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=256, help="tokens to generate")
    group.add_argument("--temperature", type=float, default=None, help="0 is greedy")
    group.add_argument("--top-p", type=float, default=None, help="0 is greedy")
    group.add_argument("--top-k", type=int, default=0, help="candidates, 0 is all")
    group.add_argument(
        "--repetition-penalty", type=float, default=None, help="above 1: repeat less"
    )
    # --seed is the engine's flag already
    group.add_argument("--sampling-seed", type=int, default=None, help="makes sampling repeatable")


def sampling(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters of parsed arguments.

    Args:
        args: What the parser gave.

    Returns:
        The parameters.

    Raises:
        ConfigError: A value is out of range.
    """
    from fastdeploy_lite.request.params import SamplingParams  # noqa: PLC0415 - lazily

    try:
        return SamplingParams(
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            repetition_penalty=args.repetition_penalty,
            seed=args.sampling_seed,
        )
    except ValueError as error:
        raise ConfigError(error) from None


def load(args: argparse.Namespace) -> LLM:
    """Load the model of parsed arguments.

    Args:
        args: What the parser gave.

    Returns:
        The model.
    """
    from fastdeploy_lite.entrypoints.llm import LLM  # noqa: PLC0415 - loads Paddle

    engine: dict[str, Any] = EngineArgs.from_cli_args(args).to_dict()
    return LLM(**engine)
