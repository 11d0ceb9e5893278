"""List the files of a folder of packed weights, and delete those that are not used."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fastdeploy_lite import envs
from fastdeploy_lite.checkpoint.packed_folder import PackedEntry, delete, list_packed
from fastdeploy_lite.entrypoints.cli.argument_types import not_negative
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import ConfigError

_DAY = 86400.0


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags."""
    add = parser.add_argument
    add("folder", nargs="?", metavar="DIR", help="that of --packed-cache; FD_LITE_PACKED_CACHE")
    add(
        "--delete-unused",
        type=not_negative,
        metavar="DAYS",
        help="delete what was not read for so many days; 0: everything. A process that has a "
        "file open is not disturbed",
    )


def run(args: argparse.Namespace) -> int:
    """List, or delete."""
    name = args.folder or envs.FD_LITE_PACKED_CACHE
    if not name:
        raise ConfigError("name the folder, or set FD_LITE_PACKED_CACHE")
    entries, now = list_packed(Path(name)), time.time()
    if args.delete_unused is not None:
        limit = now - args.delete_unused * _DAY
        gone = delete([entry for entry in entries if entry.used <= limit])
        for entry in gone:
            print(f"deleted {entry.path.name}")
        entries = [entry for entry in entries if entry not in gone]
        print(f"{len(gone)} files deleted, {_gigabytes(gone)}; {_left(entries)}")
        return 0
    for entry in entries:
        print(_line(entry, now))
    print(_left(entries))
    return 0


def _line(entry: PackedEntry, now: float) -> str:
    days = max(now - entry.used, 0) / _DAY
    state = "not complete, " if entry.is_partial else ""
    return f"{entry.nbytes / 1e9:9.2f} GB  {state}used {days:.1f} days ago  {entry.path.name}"


def _left(entries: list[PackedEntry]) -> str:
    return f"{len(entries)} files, {_gigabytes(entries)}"


def _gigabytes(entries: list[PackedEntry]) -> str:
    return f"{sum(entry.nbytes for entry in entries) / 1e9:.2f} GB"
