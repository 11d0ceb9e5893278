"""Encode and decode text, and look into a vocabulary."""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

from fastdeploy_lite.checkpoint.hub import resolve_model
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import ConfigError, quote


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags."""
    add = parser.add_argument
    add("--model-name-or-path", "--model", "-m", dest="model", default="demo", help="folder or id")
    add("--encode", "-e", default=None, metavar="TEXT", help="print the token ids of a text")
    add("--decode", "-d", default=None, metavar="IDS", help="print the text of ids: [1, 2] or 1,2")
    add("--vocab-size", "-vs", action="store_true", help="print the number of tokens")
    add("--info", "-i", action="store_true", help="print the special tokens and more")
    add("--vocab-export", "-ve", default=None, metavar="FILE", help=".json, or lines id<TAB>repr")
    add("--enable-mm", "-mm", action="store_true", help="accepted, no effect")


def run(args: argparse.Namespace) -> int:
    """Do what the flags say, in their order."""
    tokenizer = Ernie4_5Tokenizer.from_pretrained(resolve_model(args.model, "master"))
    asked = False
    if args.encode is not None:
        asked = True
        ids = tokenizer.encode_text(args.encode)
        print(f"tokens: {tokenizer.convert_ids_to_tokens(ids)}")
        print(f"ids: {ids}")
    if args.decode is not None:
        asked = True
        print(f"text: {tokenizer.decode(known_ids(args.decode, tokenizer.vocab_size))}")
    if args.vocab_size:
        asked = True
        print(f"vocabulary size: {tokenizer.vocab_size}")
    if args.info or not (asked or args.vocab_export):
        for name, value in information(tokenizer).items():
            print(f"{name}: {value}")
    if args.vocab_export:
        count = export(tokenizer, Path(args.vocab_export))
        print(f"wrote {count} tokens to {args.vocab_export}")
    return 0


def parse_ids(text: str) -> list[int]:
    """Token ids from `[1, 2, 3]` or `1,2,3`.

    Args:
        text: Either form.

    Returns:
        The ids.

    Raises:
        ConfigError: It is neither.
    """
    try:
        value = ast.literal_eval(text if text.strip().startswith("[") else f"[{text}]")
    except (ValueError, SyntaxError, RecursionError):
        value = None
    if not isinstance(value, list) or not all(type(i) is int for i in value):
        raise ConfigError(f"--decode: expected ids such as [1, 2] or 1,2; got {quote(text)}")
    return value


def known_ids(text: str, vocab_size: int) -> list[int]:
    """As `parse_ids`, of a vocabulary: an id that is not in it would show no text.

    Args:
        text: Either form.
        vocab_size: Number of tokens.

    Returns:
        The ids.

    Raises:
        ConfigError: It is neither form, or holds another id.
    """
    ids = parse_ids(text)
    if wrong := [i for i in ids if not 0 <= i < vocab_size]:
        raise ConfigError(
            f"--decode: token id {quote(wrong[0])} is outside of the vocabulary of {vocab_size}"
        )
    return ids


def information(tokenizer: Ernie4_5Tokenizer) -> dict[str, Any]:
    """What there is to know about a tokenizer."""
    return {
        "class": type(tokenizer).__name__,
        "vocabulary size": tokenizer.vocab_size,
        "special tokens": dict(
            zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        ),
        "ids that end a sequence": list(tokenizer.eos_token_ids),
        "chat template": "own" if tokenizer.chat_template else "ERNIE 4.5's text form",
    }


def export(tokenizer: Ernie4_5Tokenizer, path: Path) -> int:
    """Write the vocabulary.

    Args:
        tokenizer: The tokenizer.
        path: `.json` gives a mapping from piece to id, anything else lines `id<TAB>repr(piece)`.

    Returns:
        The number of tokens.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if path.suffix == ".json":
        path.write_text(json.dumps(dict(vocabulary), ensure_ascii=False, indent=1), "utf-8")
    else:
        path.write_text("".join(f"{i}\t{piece!r}\n" for piece, i in vocabulary), "utf-8")
    return len(vocabulary)
