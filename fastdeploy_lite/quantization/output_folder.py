"""The folder that a conversion writes, and the one beside it: never the input's, nor inside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from fastdeploy_lite.checkpoint.writer import PARTIAL_SUFFIX
from fastdeploy_lite.utils.errors import CheckpointError

UNFINISHED_SUFFIX = ".unfinished"
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "LICENSE*",
)
"""What is copied beside the weights; other files may describe the unquantised weights only."""


def unfinished_folder(output: Path) -> Path:
    """Return the folder beside the output in which finished layers wait."""
    whole = output.resolve()  # "." has no name
    return whole.with_name(whole.name + UNFINISHED_SUFFIX)


def check_output(model: Path, output: Path, force: bool) -> None:
    """Refuse an output folder in use, and any that would touch the input; change nothing.

    Args:
        model: the input folder.
        output: may not be there yet.
        force: a folder that is not empty will do.

    Raises:
        CheckpointError: names the folder.
    """
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output}: found a file, expected a folder or nothing")
    for folder in (output, *output.glob("rank*"), unfinished_folder(output)):
        _check_apart(model, folder)
    if not force and output.is_dir() and any(_kept_files(output)):
        raise CheckpointError(
            f"{output}: the output folder is not empty; name another one, or pass --force to "
            "replace the model in it"
        )


def prepare_output(model: Path, output: Path, force: bool) -> None:
    """`check_output`; with `force`, remove the model in the output folder."""
    check_output(model, output, force)
    if not output.is_dir():
        return
    # config.json first: a folder without it is not taken for a model.
    (output / "config.json").unlink(missing_ok=True)
    for old in (*output.glob("*.safetensors*"), *output.glob("rank*/*.safetensors*")):
        old.unlink()


def copy_companions(model: Path, output: Path) -> None:
    """Copy tokenizer and generation files."""
    for pattern in COMPANION_FILES:
        for file in sorted(model.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, output / file.name)


def _check_apart(model: Path, folder: Path) -> None:
    read, written = model.resolve(), folder.resolve()
    if written == read:
        raise CheckpointError(f"{folder}: this would write into the input folder; name another")
    if written.is_relative_to(read) or read.is_relative_to(written):
        raise CheckpointError(
            f"{folder}: this lies in the input folder {model}, or that lies in it; name a folder "
            "apart from it"
        )


def _kept_files(folder: Path) -> Iterator[Path]:
    """Files in a folder that a killed writer would not have left."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != PARTIAL_SUFFIX:
            yield path
