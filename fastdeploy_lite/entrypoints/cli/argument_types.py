"""Types of flags: a value that makes no sense is refused while the command line is read."""

from __future__ import annotations

import argparse

from fastdeploy_lite.utils.errors import ConfigError, quote
from fastdeploy_lite.utils.files import check_writable


def positive(text: str) -> int:
    """Type of a flag that counts what is measured: nothing cannot be.

    Args:
        text: From the command line.

    Returns:
        An integer of at least 1.

    Raises:
        argparse.ArgumentTypeError: It is something else.
    """
    return _integer(text, 1)


def not_negative(text: str) -> int:
    """Type of a flag that counts what may be left out.

    Args:
        text: From the command line.

    Returns:
        An integer of at least 0.

    Raises:
        argparse.ArgumentTypeError: It is something else.
    """
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(
            f"expected an integer of at least {least}, got {quote(text)}"
        )
    return number


def output_file(text: str) -> str:
    """Type of a flag that names where the result goes: refused before anything is measured.

    Args:
        text: From the command line; "" is nowhere.

    Returns:
        The same.

    Raises:
        argparse.ArgumentTypeError: Nothing can be written there.
    """
    try:
        if text:
            check_writable(text, "cannot write")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def positive_rate(text: str) -> float:
    """Type of a flag that says how many a second.

    Args:
        text: From the command line.

    Returns:
        A number above 0, or infinity.

    Raises:
        argparse.ArgumentTypeError: It is something else.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {quote(text)}")
    return number


def seconds(text: str) -> float:
    """Type of a flag that is a time.

    Args:
        text: From the command line.

    Returns:
        A number of at least 0.

    Raises:
        argparse.ArgumentTypeError: It is something else.
    """
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"expected at least 0 seconds, got {quote(text)}")
    return number
